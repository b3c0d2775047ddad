"""What gradients of target and memory, which take turns, do to each other.

Updates are counted in periods: the first of a period is the target's, the others the memory's.
These transforms see raw gradients and stand in front of the optimiser.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.typing import Array


class AlternationState(NamedTuple):
    """Where in a period the next update is, and what it needs of the past."""

    position: Array
    """[] int32."""
    kept: Any
    """A gradient, or a sum of some."""


def project_gradients(period: int = 2) -> optax.GradientTransformation:
    r"""Removes from a gradient what would undo the other kind's last one.

    .. math:: g \leftarrow g - \frac{g \cdot h}{h \cdot h}\, h \quad \text{if } g \cdot h < 0

    h is the last gradient of the memory for an update of the target, and the other way round; dot
    products run over all trained leaves. Without a conflict g is bitwise unchanged, as is the very
    first. A step of gradient descent along the result leaves the other loss as it is, to first
    order and as far as h is still its gradient.

    Args:
      period: updates of the target and the memory together, at least 2.

    Reference: Chaudhry et al., ICLR 2019 (A-GEM), eq. 11; Yu et al., NeurIPS 2020 (PCGrad),
    algorithm 1. Unlike theirs h is an update old, at another batch's parameters: it costs nothing.
    """
    _check(period)

    def update(
        updates: Any, state: AlternationState, params: Any = None
    ) -> tuple[Any, AlternationState]:
        other = state.kept
        dot, square = optax.tree.vdot(updates, other), optax.tree.vdot(other, other)
        conflicts = dot < 0
        share = dot / jnp.where(conflicts, square, 1.0)
        projected = jax.tree.map(
            lambda g, h: jnp.where(conflicts, g - share.astype(g.dtype) * h, g), updates, other
        )
        # the target's gradient serves all of the memory, the memory's last one the next target
        is_kept = (state.position == 0) | (state.position == period - 1)
        kept = jax.tree.map(lambda g, h: jnp.where(is_kept, g, h), updates, other)
        return projected, AlternationState((state.position + 1) % period, kept)

    return optax.GradientTransformation(_init, update)


def add_previous(period: int = 2) -> optax.GradientTransformation:
    """Each update uses the sum of the gradients since its period began.

    With a period of 2 every second update uses g_memory + g_target, as when ``zero_grad`` is left
    out between the two steps of reEWC: the research version did so, the released one does not.

    Args:
      period: updates of the target and the memory together, at least 2.
    """
    _check(period)

    def update(
        updates: Any, state: AlternationState, params: Any = None
    ) -> tuple[Any, AlternationState]:
        begins = state.position == 0
        total = jax.tree.map(lambda g, h: jnp.where(begins, g, g + h), updates, state.kept)
        return total, AlternationState((state.position + 1) % period, total)

    return optax.GradientTransformation(_init, update)


def _init(params: Any) -> AlternationState:
    return AlternationState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))


def _check(period: int) -> None:
    if period < 2:
        raise ValueError(
            f"period={period} leaves no turn for the memory; a period is one update of the target "
            "and at least one of the memory: use 2 or more."
        )
