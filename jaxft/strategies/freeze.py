"""Freezing: some leaves stay as they are."""

from __future__ import annotations

import jax

from jaxft import tree
from jaxft.strategies.base import Strategy
from jaxft.tree import Patterns
from jaxft.typing import Mask, Params


def freeze(
    where: Patterns | None = None, *, except_: Patterns | None = None, name: str = "freeze"
) -> Strategy:
    """Keep the leaves that match ``where``, or all but those that match ``except_``.

    Frozen leaves take no part in gradients, optimiser state, weight decay or clipping norm.

    Args:
      where: patterns of the leaves to freeze.
      except_: patterns of the leaves to train; all others are frozen.
      name: of the strategy.

    Returns:
      A strategy that only sets a mask.

    Raises:
      ValueError: not exactly one of the two is given; or, when the recipe is set up, a pattern
        matches nothing or no leaf is left to train.

    Example:
      >>> recipe = (freeze(except_="readouts_*/**"),)

    Reference: Radova et al., npj Comput. Mater. (2025), arXiv:2502.15582.
    """
    if (where is None) == (except_ is None):
        raise ValueError(
            "freeze() was given " + ("neither" if where is None else "both") + " of `where` and "
            "`except_`; give the leaves to freeze or the leaves to train, not both."
        )

    def trains(params: Params) -> Mask:
        if except_ is not None:
            return tree.mask(params, except_)
        return jax.tree.map(lambda frozen: not frozen, tree.mask(params, where or ()))

    return Strategy(name=name, trains=trains)
