"""LoRA: low-rank updates of the matrices, irrep by irrep."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxft import tree
from jaxft.strategies.base import Strategy
from jaxft.tree import Patterns
from jaxft.typing import Array, Consts, Coords, Mask, Params

Scaling = Literal["torch", "classic", "rslora"]

LINEARS = (
    "interactions_*/linear_up/*",
    "interactions_*/linear/*",
    "interactions_*/conv_tp_weights/*",
    "products_*/linear/*",
)
"""The matrices of all layers that mix channels or radial features."""

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "torch": lambda alpha, rank: alpha * rank**-1.5,
    "classic": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha * rank**-0.5,
}
"""What ``alpha`` and ``rank`` make of a product A B, by name."""


def lora(
    where: Patterns = LINEARS,
    *,
    rank: int = 4,
    alpha: float = 1.0,
    scaling: Scaling = "torch",
    init_std: float = 1.0,
    also_train: Patterns | None = None,
    name: str = "lora",
) -> Strategy:
    r"""Low-rank adaptation: :math:`W + s A B` on each leaf that matches.

    A leaf holds one irrep's matrix in its last two axes (leading axes, such as elements, get
    factors of their own), so the update never mixes irreps and stays equivariant. A starts normal,
    B zero: the identity at init.

    =========== ============================== ====================================================
    scaling     s                              whose
    =========== ============================== ====================================================
    ``torch``   :math:`\alpha r^{-3/2}`        torch MACE's equivariant layers: α/r times the path
                                               normalisation of the bottleneck
    ``classic`` :math:`\alpha/r`               Hu et al.
    ``rslora``  :math:`\alpha/\sqrt{r}`        Kalajdzievski: as large at every rank
    =========== ============================== ====================================================

    Args:
      where: patterns of the matrices to adapt; all other base leaves are frozen.
      rank: r, smaller than both matrix dimensions.
      alpha: α.
      scaling: how s follows from α and r.
      init_std: standard deviation of A at the start. The rate at which B learns goes with it.
      also_train: patterns of leaves to train in full beside the factors.
      name: of the strategy.

    Returns:
      A strategy that trains its factors ``<leaf>/A`` [..., in, r] and ``<leaf>/B`` [..., r, out],
      and ``also_train``.

    Raises:
      ValueError: a number or ``scaling`` makes no sense; or, when the recipe is set up, a pattern
        matches nothing, a leaf is no matrix, or the rank is not low for one of them.

    Example:
      >>> recipe = (lora("interactions_*/linear*/**", rank=2, also_train="readouts_*/**"),)
      >>> print(jaxft.describe(recipe, params).splitlines()[-1])
      trainable params: 200 || all params: 21,292 || trainable%: 0.94

    Reference: Hu et al., arXiv:2106.09685; Kalajdzievski, arXiv:2312.03732; ``mace.modules.lora``
    of mace-torch, for which see :func:`lora_torch`.
    """
    check_numbers("lora", rank=rank, alpha=alpha, init_std=init_std)
    s = scale_of("lora", scaling, alpha, rank)

    def plan(params: Params) -> dict[str, Start]:
        return {
            path: own_factors(leaf, rank, init_std)
            for path, leaf in matrices("lora", params, where, rank).items()
        }

    cites = ("hu2021lora", *(("kalajdzievski2023rslora",) if scaling == "rslora" else ()))
    return adapter(name, plan, lambda path: s, also(also_train), cites)


def lora_torch(
    *,
    rank: int = 4,
    alpha: float = 1.0,
    init: Literal["torch", "small"] = "torch",
    name: str = "lora",
) -> Strategy:
    r"""torch MACE's ``--lora``: the same matrices, scales and starting numbers.

    =============================================== ============================ ==========
    layers                                          update                       std of A
    =============================================== ============================ ==========
    equivariant linears: embeddings, readouts,      :math:`\alpha r^{-3/2} A B`  1
    ``linear*``, ``skip_tp`` of non-linear blocks
    radial and density networks, joint embeddings   :math:`(\alpha/r) A B`       10⁻³
    =============================================== ============================ ==========

    All else is frozen: biases, layer norms, embedding tables, contraction weights, and ``skip_tp``
    where it is a tensor product. Readouts are adapted at any rank, though a matrix with one column
    has no low-rank update that is smaller. The stds differ because torch's means to draw 10⁻³ miss
    the equivariant layers, whose weights are flat there: at equal rates B learns a thousand times
    faster in these. ``init="small"`` draws 10⁻³ everywhere.

    Args:
      rank: r, torch's ``--lora_rank``.
      alpha: α, torch's ``--lora_alpha``.
      init: the standard deviations of A.
      name: of the strategy.

    Returns:
      A strategy that trains its factors ``<leaf>/A`` [in, r] and ``<leaf>/B`` [r, out] alone.

    Raises:
      ValueError: a number or ``init`` makes no sense; or, when the recipe is set up, the model has
        none of these layers.

    Example:
      >>> print(jaxft.describe((lora_torch(rank=4),), params).splitlines()[-1])
      trainable params: 3,836 || all params: 21,292 || trainable%: 18.02

    Reference: ``inject_lora`` in ``mace/modules/lora.py`` of mace-torch 0.3.16; Hu et al.,
    arXiv:2106.09685.
    """
    check_numbers("lora_torch", rank=rank, alpha=alpha)
    stds = {"torch": {"equivariant": 1.0, "dense": 1e-3}}
    stds["small"] = dict.fromkeys(stds["torch"], 1e-3)
    if init not in stds:
        raise ValueError(
            f"lora_torch(init={init!r}) is no way to start; use 'torch' for torch MACE's own "
            "standard deviations or 'small' for 1e-3 everywhere."
        )
    scales = {"equivariant": SCALINGS["torch"](alpha, rank), "dense": alpha / rank}

    def plan(params: Params) -> dict[str, Start]:
        flat = tree.flatten(params)
        paths = tree.select(params, lambda path, leaf: layer_kind(path, leaf) is not None)
        return {
            path: own_factors(flat[path], rank, stds[init][str(layer_kind(path, flat[path]))])
            for path in paths
        }

    def scale(path: str) -> float:
        return scales["dense" if _DENSE.fullmatch(path) else "equivariant"]

    return adapter(name, plan, scale, also(None), ("hu2021lora", "batatia2022mace"))


# --- what the family shares -----------------------------------------------------------------------


class Start(NamedTuple):
    """The factors of a leaf before training: A ~ N(0, std²), B = 0."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    std: float
    dtype: jnp.dtype


Plan = Callable[[Params], dict[str, Start]]
"""Which leaves get factors, and which."""


def own_factors(leaf: Array, rank: int, std: float) -> Start:
    """A [..., in, r] and B [..., r, out]: each matrix of the leaf has its own."""
    *lead, n_in, n_out = leaf.shape
    return Start((*lead, n_in, rank), (*lead, rank, n_out), std, leaf.dtype)


def adapter(
    name: str,
    plan: Plan,
    scale: Callable[[str], float],
    trains: Callable[[Params], Mask],
    cites: tuple[str, ...],
) -> Strategy:
    """The strategy that adds ``scale(path) · A B`` to each leaf of the plan."""

    def checked(params: Params) -> Mask:
        plan(params)
        return trains(params)

    def init(key: Array, params: Params) -> tuple[Coords, Consts]:
        return tree.unflatten(draw(key, plan(params))), {}

    def apply(params: Params, coords: Coords, consts: Consts) -> Params:
        flat = dict(tree.flatten(params))
        for path, product in products(tree.flatten(coords)):
            flat[path] = flat[path] + scale(path) * product
        return tree.unflatten(flat)

    return Strategy(name=name, trains=checked, init=init, apply=apply, cites=cites)


def draw(key: Array, starts: Mapping[str, Start]) -> dict[str, Array]:
    """``{leaf path/A or B: array}``."""
    factors = {}
    for index, (path, start) in enumerate(starts.items()):
        a = jax.random.normal(jax.random.fold_in(key, index), start.a, start.dtype)
        factors[f"{path}/A"] = start.std * a
        factors[f"{path}/B"] = jnp.zeros(start.b, start.dtype)
    return factors


def products(factors: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """``(leaf path, A B)`` of all pairs; a B without leading axes serves every matrix of A."""
    for path in (key.removesuffix("/A") for key in factors if key.endswith("/A")):
        yield path, factors[f"{path}/A"] @ factors[f"{path}/B"]


def also(patterns: Patterns | None) -> Callable[[Params], Mask]:
    """The mask of what trains in full beside the factors."""

    def trains(params: Params) -> Mask:
        if patterns is None:
            return tree.constant_mask(params, False)
        return tree.mask(params, patterns)

    return trains


_EQUIVARIANT = re.compile(
    r"[^/]+/(linear|linear_up|linear_1|linear_2|linear_mid|linear_res|skip_tp"
    r"|source_embedding|target_embedding)/[^/]+"
)
_DENSE = re.compile(
    r"interactions_\d+/(conv_tp_weights|density_fn)/(layer\d+|net_\d+/weight)"
    r"|joint_embedding/(project|embedders_[^/]+/net_\d+/weight)"
)


def layer_kind(path: str, leaf: Array) -> str | None:
    """``"equivariant"`` (an ``o3.Linear`` in torch), ``"dense"``, or None for what is neither.

    Biases and layer norms, which share these names, are vectors; the tensor product of a
    ``skip_tp`` has a matrix per element, where a linear has one. A moment head is not torch's.
    """
    if leaf.ndim != 2 or path.startswith("moments/"):
        return None
    if _DENSE.fullmatch(path):
        return "dense"
    return "equivariant" if _EQUIVARIANT.fullmatch(path) else None


def matrices(caller: str, params: Params, where: Patterns, rank: int) -> dict[str, Array]:
    """The leaves that match, by path; ValueError for one without a low-rank update."""
    flat = tree.flatten(params)
    chosen = {path: flat[path] for path in tree.select(params, where)}
    for path, leaf in chosen.items():
        if leaf.ndim < 2:
            raise ValueError(
                f"{caller}() was asked to adapt {path!r} of shape {leaf.shape}, which is no matrix;"
                "\nleave this leaf out of `where`, or add it to `also_train`."
            )
        if rank >= min(leaf.shape[-2:]):
            raise ValueError(
                f"{caller}(rank={rank}) is not low rank for {path!r} of shape {leaf.shape};\n"
                f"use rank < {min(leaf.shape[-2:])}, or leave this leaf out of `where`."
            )
    return chosen


def check_numbers(caller: str, *, rank: int, **positive: float) -> None:
    """Raises ValueError unless the rank is one and the others are positive and finite."""
    if rank < 1 or rank != int(rank):
        raise ValueError(f"{caller}(rank={rank}) is not a rank; use an integer >= 1.")
    for word, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"{caller}({word}={value}) would never learn or never stop; "
                "use a positive, finite number."
            )


def scale_of(caller: str, scaling: str, alpha: float, rank: int) -> float:
    """s of A B; ValueError for a name that is none of :data:`SCALINGS`."""
    if scaling not in SCALINGS:
        raise ValueError(
            f"{caller}(scaling={scaling!r}) is no known scaling;\n"
            f"use one of {', '.join(map(repr, SCALINGS))}."
        )
    return SCALINGS[scaling](alpha, rank)
