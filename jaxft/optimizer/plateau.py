"""A learning-rate factor that the host changes between epochs, and the rule for changing it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxft.typing import Array

State = TypeVar("State")


class FactorState(NamedTuple):
    """What updates are multiplied by."""

    factor: Array
    """[] float32."""


def scale_by_factor() -> optax.GradientTransformation:
    """Multiplies updates by a number in the state, 1 at first; see :func:`set_factor`.

    The number is traced: a jitted step does not recompile when it changes. At 1 updates are
    bitwise unchanged.
    """

    def init(params: Any) -> FactorState:
        return FactorState(jnp.ones((), jnp.float32))

    def update(updates: Any, state: FactorState, params: Any = None) -> tuple[Any, FactorState]:
        return jax.tree.map(lambda u: u * state.factor.astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


def set_factor(opt_state: State, value: float) -> State:
    """The same optimiser state with another learning-rate factor; ValueError if it holds none."""
    get_factor(opt_state)
    return jax.tree.map(
        lambda node: FactorState(jnp.full_like(node.factor, value)) if _is_factor(node) else node,
        opt_state,
        is_leaf=_is_factor,
    )


def get_factor(opt_state: Any) -> float:
    """The learning-rate factor of an optimiser state; ValueError if it holds none."""
    for node in jax.tree.leaves(opt_state, is_leaf=_is_factor):
        if _is_factor(node):
            return float(node.factor)
    raise ValueError(
        "this optimiser state holds no learning-rate factor; expected the state of "
        "jaxft.optimizer.optimizer(…), or of a chain with scale_by_factor()."
    )


def _is_factor(node: Any) -> bool:
    return isinstance(node, FactorState)


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Reduces the learning rate when a metric no longer falls; a record on the host.

    Feed it a metric per epoch and hand ``scale`` to :func:`set_factor`. All fields are numbers or
    None: ``dataclasses.asdict`` and ``Plateau(**…)`` save and resume it.

    Raises:
      ValueError: ``factor`` is not in (0, 1), patience or threshold is negative, or ``min_factor``
        is not in [0, 1].

    Example:
      >>> plateau = Plateau(factor=0.5, patience=1)
      >>> for error in (1.0, 1.0, 1.0, 0.9):
      ...     plateau = plateau.update(error)
      >>> plateau.scale, plateau.best, plateau.waited
      (0.5, 0.9, 0)

    Reference: ``torch.optim.lr_scheduler.ReduceLROnPlateau``, mode ``min``, relative threshold.
    """

    factor: float = 0.8
    """Of each reduction."""
    patience: int = 50
    """Epochs without improvement that are accepted; one more reduces."""
    threshold: float = 1e-4
    """Least relative improvement that counts."""
    min_factor: float = 0.0
    """``scale`` is never below."""
    scale: float = 1.0
    """Product of the reductions so far."""
    best: float | None = None
    """Lowest value that counted."""
    waited: int = 0
    """Epochs since."""

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1:
            raise ValueError(
                f"factor={self.factor} of a plateau is not between 0 and 1; "
                "the learning rate is multiplied by it: use 0.8 or so."
            )
        if not 0 <= self.min_factor <= 1:
            raise ValueError(
                f"min_factor={self.min_factor} of a plateau is not between 0 and 1; it is a "
                "fraction of the learning rate at the start: use 0 for no limit."
            )
        for name in ("patience", "threshold"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} of a plateau is negative; use 0 or more."
                )

    def update(self, value: float) -> Plateau:
        """The record after one more epoch; a value that is not finite is no improvement."""
        best = math.inf if self.best is None else self.best
        if value < best * (1 - self.threshold) and math.isfinite(value):
            return replace(self, best=float(value), waited=0)
        if self.waited < self.patience:
            return replace(self, waited=self.waited + 1)
        return replace(self, scale=max(self.scale * self.factor, self.min_factor), waited=0)
