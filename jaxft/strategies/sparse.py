"""Sparse deltas by soft thresholding (STR): few numbers move, and training chooses which."""

from __future__ import annotations

import math
import re
import zlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxft import tree
from jaxft.strategies.base import Strategy
from jaxft.tree import Patterns
from jaxft.typing import Array, Consts, Coords, Mask, Params


def o3_linears(path: str, leaf: Any) -> bool:
    """The matrices of torch's ``o3.Linear``, irrep by irrep; biases are none.

    Embeddings, ``linear*`` of interactions, products and readouts; the skip connection where it
    is not per element. A moment head has no pretrained numbers: it is for ``also_train``.
    """
    *_, module, name = ("", *path.split("/"))
    if not re.fullmatch(r"\d+[eo]", name) or path.startswith("moments/"):
        return False
    is_skip = module == "skip_tp" and leaf.ndim == 2
    return is_skip or module.startswith("linear") or module.endswith("_embedding")


def sparse(
    where: Patterns = o3_linears,
    *,
    threshold: float = 1e-3,
    init_std: float = 0.01,
    per: Literal["layer", "leaf"] = "layer",
    also_train: Patterns | None = None,
    name: str = "sparse",
) -> Strategy:
    r"""Sparsity-promoting fine-tuning: :math:`W + S(\delta, \sigma(s))` with W frozen.

    .. math:: S(\delta, d) = \operatorname{sign}(\delta)\,\max(|\delta| - d,\, 0)

    δ starts normal, not zero: where |δ| is below the threshold d = σ(s), δ has no gradient. So
    training does *not* start at W, but with noise of ``init_std`` on most numbers. Decay drives the
    sparsity: it pulls s to 0, hence d to 0.5, which prunes whatever the loss does not defend. Give
    δ and s decays of their own in the optimiser, by the patterns ``coords/sparse/**/delta`` and
    ``coords/sparse/**/score``. Published: schedule-free AdamW, 1e-8 on δ; on s 0.01 ("L", low
    sparsity) or 0.3 ("H"). Momentum also moves numbers that are pruned, as in the authors' code.

    Survivors are smaller than δ by d; ``delta(support=support_of(base, merged))``, started from the
    merged model, refits them without a threshold.

    Args:
      where: patterns of the leaves to change; all other base leaves are frozen.
      threshold: d at the start, in (0, 1). The authors' code has 1e-4.
      init_std: standard deviation of δ at the start.
      per: one threshold per ``layer`` (all irreps of a module) or per ``leaf``.
      also_train: patterns of leaves to train in full beside.
      name: of the strategy.

    Returns:
      A strategy that trains ``<leaf>/delta``, ``<layer>/score`` or ``<leaf>/score``, and
      ``also_train``. It is not the identity at init.

    Raises:
      ValueError: a number is out of its range; or, when the recipe is set up, a pattern matches
        nothing.

    Example:
      >>> recipe = (sparse("products_*/linear/*", threshold=1e-4, per="leaf"),)

    Reference: Cho et al., ICLR 2026, arXiv:2606.18691; Kusupati et al., ICML 2020,
    arXiv:2002.03231.
    """
    _check(threshold, init_std, per)

    def trains(params: Params) -> Mask:
        tree.select(params, where)
        if also_train is None:
            return tree.constant_mask(params, False)
        return tree.mask(params, also_train)

    def init(key: Array, params: Params) -> tuple[Coords, Consts]:
        flat = tree.flatten(params)
        score = math.log(threshold) - math.log1p(-threshold)
        coords = {}
        for path in tree.select(params, where):
            leaf = flat[path]
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            coords[f"{path}/delta"] = init_std * jax.random.normal(own, leaf.shape, leaf.dtype)
            owner = path if per == "leaf" else _layer(path)
            coords[f"{owner}/score"] = jnp.full((), score, leaf.dtype)
        return tree.unflatten(coords), {}

    def apply(params: Params, coords: Coords, consts: Consts) -> Params:
        flat = dict(tree.flatten(params))
        for path, update in _surviving(coords).items():
            flat[path] = flat[path] + update
        return tree.unflatten(flat)

    return Strategy(
        name=name,
        trains=trains,
        init=init,
        apply=apply,
        is_identity_at_init=False,
        cites=("cho2026sparse", "kusupati2020str"),
    )


def soft_threshold(values: Array, threshold: Array) -> Array:
    """S(x, d) = sign(x) max(|x| - d, 0), of any shape."""
    return jnp.sign(values) * jax.nn.relu(jnp.abs(values) - threshold)


def pruned(coords: Coords) -> Params:
    """S(δ, σ(s)) by leaf, the numbers to add to the base: ``{"interactions_0": …}``.

    Args:
      coords: of one :func:`sparse`, ``state.trainable.coords["sparse"]``.
    """
    return tree.unflatten(_surviving(coords))


class Sparsity(NamedTuple):
    """How much of the update is zero."""

    total: float
    """Zeros of S(δ, σ(s)) over all its numbers, in [0, 1]."""
    leaves: dict[str, float]
    """The same by leaf."""
    thresholds: dict[str, float]
    """σ(s) by layer or leaf, whichever has one."""


def sparsity(coords: Coords) -> Sparsity:
    """Counts what the threshold pruned, on S and not on δ.

    Args:
      coords: of one :func:`sparse`, ``state.trainable.coords["sparse"]``.

    Example:
      >>> coords, _ = sparse().init(jax.random.key(0), params)
      >>> sparsity(coords).thresholds["products_1/linear"]
      0.001...
    """
    kept = {path: update != 0 for path, update in _surviving(coords).items()}
    numbers = sum(mask.size for mask in kept.values())
    scores = {key: s for key, s in tree.flatten(coords).items() if key.endswith("/score")}
    return Sparsity(
        total=1.0 - sum(int(mask.sum()) for mask in kept.values()) / numbers,
        leaves={path: 1.0 - int(mask.sum()) / mask.size for path, mask in kept.items()},
        thresholds={
            key.removesuffix("/score"): float(jax.nn.sigmoid(s)) for key, s in scores.items()
        },
    )


def _surviving(coords: Coords) -> dict[str, Array]:
    flat = tree.flatten(coords)
    found = {}
    for key, value in flat.items():
        if not key.endswith("/delta"):
            continue
        path = key.removesuffix("/delta")
        own = f"{path}/score"
        score = flat[own] if own in flat else flat[f"{_layer(path)}/score"]
        found[path] = soft_threshold(value, jax.nn.sigmoid(score))
    return found


def _layer(path: str) -> str:
    return path.rpartition("/")[0] or path


def _check(threshold: float, init_std: float, per: str) -> None:
    if not 0 < threshold < 1:
        raise ValueError(
            f"sparse(threshold={threshold}) is no threshold: it is a sigmoid, in (0, 1); "
            "published are 1e-3 and 1e-4."
        )
    if not 0 < init_std < math.inf:
        raise ValueError(
            f"sparse(init_std={init_std}) would never move: what lies below the threshold has no "
            "gradient, so it must not start at zero; use a number > 0, such as 0.01."
        )
    if per not in ("layer", "leaf"):
        raise ValueError(f"sparse(per={per!r}) is unknown; use 'layer' or 'leaf'.")
