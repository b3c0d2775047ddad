"""L2-SP: a pull towards the parameters that training starts from."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jaxft import tree
from jaxft.strategies.base import Strategy
from jaxft.tree import Patterns
from jaxft.typing import Array, Consts, Coords, Params


def l2sp(strength: float, *, where: Patterns = "**", name: str = "l2sp") -> Strategy:
    r"""Add :math:`\frac{\lambda}{2}\sum_i(\theta_i-\theta_i^\ast)^2` to the loss.

    θ are the *effective* parameters, so low-rank updates are restrained too; θ* are those that
    training starts from. A penalty is scaled by adaptive optimisers like any other gradient: only
    under plain SGD is it a decay of θ − θ* at the rate λ times the learning rate.

    Args:
      strength: λ, in units of the loss per squared parameter. 0 is plain fine-tuning, bitwise.
      where: patterns of the leaves to hold; the others move freely.
      name: of the strategy.

    Returns:
      A strategy that trains everything and owns no coordinates.

    Raises:
      ValueError: the strength is negative or not finite; or, when the recipe is set up, a pattern
        matches nothing.

    Example:
      >>> recipe = (l2sp(1e-2, where="interactions_*/**"),)

    Reference: Li, Grandvalet and Davoine, ICML 2018, arXiv:1802.01483, without their second term
    for new layers.
    """
    check_strength(strength, "l2sp")

    def init(key: Array, params: Params) -> tuple[Coords, Consts]:
        flat = tree.flatten(params)
        return {}, tree.unflatten({path: flat[path] for path in tree.select(params, where)})

    def penalty(params: Params, consts: Consts, batch: Any) -> Array:
        flat, anchor = tree.flatten(params), tree.flatten(consts)
        if strength == 0:  # 0 · ∞ is not 0
            return jnp.zeros_like(next(iter(flat.values())), shape=())
        squares = [jnp.sum((flat[path] - start) ** 2) for path, start in anchor.items()]
        return 0.5 * strength * sum(squares)

    return Strategy(name=name, init=init, penalty=penalty, cites=("li2018l2sp",))


def check_strength(strength: float, who: str) -> None:
    """Raises ValueError unless λ is finite and not negative."""
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"{who}(strength={strength}) pulls nowhere; use a finite number >= 0.")
