"""Elastic weight consolidation: what mattered before moves least."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import tree
from jaxft.strategies.base import Strategy
from jaxft.strategies.l2sp import check_strength
from jaxft.typing import Array, Consts, Coords, Mask, Params


@dataclass(frozen=True, eq=False)
class Fisher:
    """How much each parameter matters, and how that was found out.

    Raises:
      ValueError: a value is negative or not finite, or all are zero.
    """

    values: Params
    """Non-negative tree, shaped like the parameters."""
    parameters: str | None = None
    """:func:`digest` of the parameters that it was estimated at; None binds it to none."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Anything JSON can hold."""

    def __post_init__(self) -> None:
        flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(self.values).items()}
        wrong = [path for path, leaf in flat.items() if not (np.isfinite(leaf) & (leaf >= 0)).all()]
        if wrong:
            raise ValueError(
                "a Fisher is a mean of squares, but this one holds negative or non-finite numbers "
                f"in {', '.join(map(repr, sorted(wrong)))}."
            )
        if not any(leaf.any() for leaf in flat.values()):
            raise ValueError(
                "this Fisher is zero everywhere, so it would restrain nothing. A Fisher of "
                "self-labelled data is zero, since nothing is left to fit;\nestimate it on "
                "frames with the labels of the pretraining data."
            )

    @functools.cached_property
    def digest(self) -> str:
        """Hash of names, shapes, numbers and provenance: another Fisher has another."""
        about = json.dumps([self.parameters, dict(self.provenance)], sort_keys=True, default=str)
        return _hashed(self.values, np.float64, about)


def ewc(fisher: Fisher | Params, *, strength: float, name: str = "ewc") -> Strategy:
    r"""Elastic weight consolidation: a leash per parameter, as short as the parameter matters.

    Adds :math:`\frac{\lambda}{2}\sum_i F_i(\theta_i-\theta_i^\ast)^2` to the loss. θ are the
    *effective* parameters, so low-rank updates are restrained too; θ* are those that training
    starts from. Parameters with :math:`F_i=0` (of elements that no frame held, say) move freely.

    F scales as the square of the loss that it was estimated with, so λ does not carry over to other
    loss weights or units: scan it. (SevenNet's preset is 1e5, for its own loss.)

    Args:
      fisher: F, from :func:`jaxft.fisher`; or a non-negative tree shaped like the parameters,
        which is then not checked to belong to this model.
      strength: λ. 0 is plain fine-tuning, bitwise.
      name: of the strategy.

    Returns:
      A strategy that trains everything and owns no coordinates.

    Raises:
      ValueError: the strength is negative or not finite; F is not a Fisher (see :class:`Fisher`);
        or, when the recipe is set up, F belongs to other parameters.

    Example:
      >>> importance = jax.tree.map(np.ones_like, params)  # l2sp; else from jaxft.fisher
      >>> recipe = (freeze("node_embedding/**"), ewc(importance, strength=1e3))

    Reference: Kirkpatrick et al., PNAS 114, 3521 (2017), eq. 3; for potentials reEWC,
    arXiv:2506.15223, and ``sevenn/train/reewc/loss.py`` of SevenNet: F neither normalised, clipped
    nor damped.
    """
    check_strength(strength, "ewc")
    known = fisher if isinstance(fisher, Fisher) else Fisher(fisher)

    def trains(params: Params) -> Mask:
        _check_belongs(known, params, name)
        return tree.constant_mask(params, True)

    def init(key: Array, params: Params) -> tuple[Coords, Consts]:
        _check_belongs(known, params, name)
        importance = jax.tree.map(lambda f, leaf: jnp.asarray(f, leaf.dtype), known.values, params)
        return {}, {"anchor": params, "fisher": importance}

    def penalty(params: Params, consts: Consts, batch: Any) -> Array:
        if strength == 0:  # 0 · ∞ is not 0
            return jnp.zeros_like(jax.tree.leaves(params)[0], shape=())
        weighted = jax.tree.map(
            lambda leaf, start, f: jnp.sum(f * (leaf - start) ** 2),
            params,
            consts["anchor"],
            consts["fisher"],
        )
        return 0.5 * strength * sum(jax.tree.leaves(weighted))

    cites = ("kirkpatrick2017ewc", "kim2026reewc")
    return Strategy(name=name, trains=trains, init=init, penalty=penalty, cites=cites)


def digest(params: Params) -> str:
    """Hash of names, shapes and numbers, rounded to float32: whatever dtype they are loaded in."""
    return _hashed(params, np.float32)


def _hashed(params: Params, dtype: type[np.floating], about: str = "") -> str:
    found = hashlib.sha256(about.encode())
    for path, leaf in sorted(tree.flatten(params).items()):
        found.update(f"{path} {np.shape(leaf)}\n".encode())
        found.update(np.ascontiguousarray(leaf, dtype).tobytes())
    return found.hexdigest()[:16]


def _check_belongs(fisher: Fisher, params: Params, name: str) -> None:
    given, expected = tree.flatten(fisher.values), tree.flatten(params)
    diff = tree.name_diff(
        (f"{path} {np.shape(leaf)}" for path, leaf in given.items()),
        (f"{path} {np.shape(leaf)}" for path, leaf in expected.items()),
    )
    if diff:
        raise ValueError(
            f"{name!r} has a Fisher of other parameters (- of this model, + of the Fisher):\n"
            f"{diff}\nEstimate one for this model with jaxft.fisher."
        )
    if fisher.parameters is not None and fisher.parameters != (found := digest(params)):
        raise ValueError(
            f"{name!r} has the Fisher of another model: it was estimated at parameters "
            f"{fisher.parameters}, and training starts from {found};\n"
            "start from that model, or estimate one for this model with jaxft.fisher."
        )
    for path, leaf in given.items():
        if np.max(np.asarray(leaf), initial=0) > jnp.finfo(expected[path].dtype).max:
            raise ValueError(
                f"{name!r}: the Fisher of {path!r} reaches {np.max(leaf):.1e}, which is infinite "
                f"in {expected[path].dtype}; normalise it, see jaxft.fisher."
            )
