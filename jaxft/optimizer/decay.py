"""Decoupled weight decay, by pattern, towards zero or towards the start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft import tree
from jaxft.typing import Array

TARGETS = ("zero", "start")
"""Where decay may lead."""


class DecayState(NamedTuple):
    """Where decay leads."""

    start: tuple[Array, ...]
    """The leaves that decay as they were at ``init``, in tree order; none towards zero."""


def decay(
    rates: float | Mapping[str, float], *, towards: str = "zero"
) -> optax.GradientTransformation:
    r"""Adds :math:`w (\theta - \theta_0)` to an update that is not yet scaled by the learning rate.

    After the scaling by :math:`-\eta_t` each update moves a leaf by
    :math:`-\eta_t w (\theta - \theta_0)`, whatever the optimiser makes of the gradient; with plain
    gradient descent this is a penalty :math:`\frac{w}{2}\|\theta - \theta_0\|^2`.

    Args:
      rates: w of all leaves, or w by pattern of paths (``params/<leaf path>``,
        ``coords/<strategy>/<path>``; a glob as in :mod:`jaxft.tree`). Leaves that no pattern
        matches do not decay.
      towards: ``"zero"``; or ``"start"``, the values that ``init`` is given.

    Raises:
      ValueError: a rate is negative or not finite, ``towards`` is unknown; from ``init``: a pattern
        matches no trained leaf, or two match the same.

    Example:
      >>> tx = optax.chain(decay({"delta/**": 10.0}), optax.scale_by_learning_rate(0.01))
      >>> theta = {"base": jax.numpy.ones(2), "delta": {"w": jax.numpy.ones(2)}}
      >>> updates, _ = tx.update(jax.tree.map(jax.numpy.zeros_like, theta), tx.init(theta), theta)
      >>> float(updates["base"][0]), round(float(updates["delta"]["w"][0]), 6)
      (-0.0, -0.1)

    Reference: Loshchilov and Hutter, ICLR 2019, algorithm 2, with w scaled by the learning rate as
    in torch.
    """
    _check(rates, towards)

    def init(trainable: Any) -> DecayState:
        pairs = zip(jax.tree.leaves(trainable), _each(rates, trainable), strict=True)
        # also towards zero the patterns are looked up, so that they fail here
        decaying = [leaf for leaf, rate in pairs if rate]
        return DecayState(tuple(map(jnp.copy, decaying)) if towards == "start" else ())

    def update(updates: Any, state: DecayState, trainable: Any = None) -> tuple[Any, DecayState]:
        if trainable is None:
            raise ValueError(
                "decay needs the trained leaves: call update(gradient, state, leaves)."
            )
        leaves, structure = jax.tree.flatten(updates)
        start = iter(state.start)
        for i, (leaf, rate) in enumerate(
            zip(jax.tree.leaves(trainable), _each(rates, trainable), strict=True)
        ):
            if rate:
                leaves[i] += rate * (leaf - next(start) if state.start else leaf)
        return jax.tree.unflatten(structure, leaves), state

    return optax.GradientTransformation(init, update)


def _check(rates: float | Mapping[str, float], towards: str) -> None:
    if towards not in TARGETS:
        raise ValueError(f"decay_towards={towards!r} is unknown; use one of {', '.join(TARGETS)}.")
    by_pattern = rates if isinstance(rates, Mapping) else {"**": rates}
    for pattern, rate in by_pattern.items():
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(
                f"weight_decay of {pattern!r} is {rate}; a rate is finite and not negative: use 0 "
                "for leaves that shall not decay."
            )


def _each(rates: float | Mapping[str, float], trainable: Any) -> list[float]:
    """The rate of each leaf, in tree order."""
    found, _ = jax.tree_util.tree_flatten_with_path(trainable)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}
    if not isinstance(rates, Mapping):
        return [rates] * len(leaves)
    chosen: dict[str, str] = {}
    for pattern in rates:
        for path in tree.select(leaves, pattern):
            if path in chosen:
                raise ValueError(
                    f"weight_decay: {chosen[path]!r} and {pattern!r} both match {path!r}; patterns "
                    "must not overlap, so that one rate holds: narrow one of them."
                )
            chosen[path] = pattern
    return [rates[chosen[path]] if path in chosen else 0.0 for path in leaves]
