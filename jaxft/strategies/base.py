"""The strategy record and the folds that make a recipe of several.

A strategy is one idea: pure functions on parameter trees, every slot with a neutral default. A
recipe is a tuple of strategies; full fine-tuning is ``()``. A strategy may read the effective
parameters and writes only coordinates that it owns.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxft import tree
from jaxft.source import Source
from jaxft.typing import Array, Consts, Coords, Mask, Params


def _trains_everything(params: Params) -> Mask:
    return tree.constant_mask(params, True)


def _owns_nothing(key: Array, params: Params) -> tuple[Coords, Consts]:
    return {}, {}


def _as_they_are(params: Params, coords: Coords, consts: Consts) -> Params:
    return params


def _free(params: Params, consts: Consts, batch: Any) -> Array:
    return jnp.zeros(())


def _stays(coords: Coords, consts: Consts) -> Coords:
    return coords


_IDENTITY = optax.identity()


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One idea of fine-tuning."""

    name: str
    """Unique in a recipe; keys its coordinates, its constants and its log lines."""
    trains: Callable[[Params], Mask] = _trains_everything
    """``params -> mask``: which base leaves may move."""
    init: Callable[[Array, Params], tuple[Coords, Consts]] = _owns_nothing
    """``key, params -> coords, consts``: the arrays it owns, trained and constant."""
    apply: Callable[[Params, Coords, Consts], Params] = _as_they_are
    """``params, coords, consts -> params``: reparametrisation."""
    penalty: Callable[[Params, Consts, Any], Array] = _free
    """``effective params, consts, batch -> scalar``, added to the loss."""
    project: Callable[[Coords, Consts], Coords] = _stays
    """``coords, consts -> coords``, after the update."""
    tx: optax.GradientTransformation = _IDENTITY
    """Acts on the updates, after the optimiser."""
    sources: tuple[Source, ...] = ()
    """Extra data."""
    is_identity_at_init: bool = True
    """Whether training starts at the base's own parameters, bit for bit; few methods do not."""
    reads_batch: bool = False
    """Whether the penalty is a mean over the batch, so that batches of one update do not add up."""
    cites: tuple[str, ...] = ()
    """Keys of the works to cite, in ``jaxft.citation``."""

    @property
    def has_penalty(self) -> bool:
        return self.penalty is not _free

    @property
    def acts_after_update(self) -> bool:
        """Whether it changes what the optimiser decided."""
        return self.tx is not _IDENTITY or self.project is not _stays


Recipe = Sequence[Strategy]


def check_names(recipe: Recipe) -> None:
    """Raises ValueError if two strategies share a name."""
    twice = [name for name, n in Counter(s.name for s in recipe).items() if n > 1]
    if twice:
        raise ValueError(
            "the recipe holds more than one strategy named "
            f"{', '.join(map(repr, sorted(twice)))};\n"
            "names must be unique, since they key coordinates and log lines: pass name=… to one."
        )


def check(recipe: Recipe, params: Params) -> None:
    """Raises ValueError for whatever a strategy refuses, and if nothing would train."""
    check_names(recipe)
    mask = trains(recipe, params)
    coords, _ = jax.eval_shape(lambda: init(recipe, jax.random.key(0), params))
    if not any(jax.tree.leaves(mask)) and not jax.tree.leaves(coords):
        names = ", ".join(strategy.name for strategy in recipe)
        raise ValueError(
            f"the recipe ({names}) leaves nothing to train: all {len(jax.tree.leaves(params))} "
            "leaves are frozen and no strategy owns coordinates; train at least one leaf."
        )


def trains(recipe: Recipe, params: Params) -> Mask:
    """Which base leaves move: the logical AND over the recipe."""
    masks = [strategy.trains(params) for strategy in recipe]
    return jax.tree.map(lambda *leaf: all(leaf), tree.constant_mask(params, True), *masks)


def init(recipe: Recipe, key: Array, params: Params) -> tuple[dict[str, Coords], dict[str, Consts]]:
    """Coordinates and constants by strategy name; each key is folded with the name alone."""
    coords, consts = {}, {}
    for strategy in recipe:
        own = jax.random.fold_in(key, zlib.crc32(strategy.name.encode()))
        coords[strategy.name], consts[strategy.name] = strategy.init(own, params)
    return coords, consts


def apply(recipe: Recipe, params: Params, coords: Coords, consts: Consts) -> Params:
    """Effective parameters, strategies applied left to right."""
    for strategy in recipe:
        params = strategy.apply(params, coords[strategy.name], consts[strategy.name])
    return params


def penalties(recipe: Recipe, params: Params, consts: Consts, batch: Any) -> dict[str, Array]:
    """``{strategy name: penalty}`` on the effective parameters."""
    return {
        strategy.name: strategy.penalty(params, consts[strategy.name], batch)
        for strategy in recipe
        if strategy.has_penalty
    }


def sources(recipe: Recipe) -> tuple[Source, ...]:
    """The extra data of all members, in order.

    Raises:
      ValueError: two sources share a name.
    """
    found = tuple(source for strategy in recipe for source in strategy.sources)
    twice = [name for name, n in Counter(s.name for s in found).items() if n > 1]
    if twice:
        raise ValueError(
            f"the recipe has more than one source named {', '.join(map(repr, sorted(twice)))};\n"
            "names must be unique, since they key log lines: pass name=… to one."
        )
    return found


def project(recipe: Recipe, coords: Coords, consts: Consts) -> Coords:
    """Each strategy's projection of its own coordinates."""
    return {s.name: s.project(coords[s.name], consts[s.name]) for s in recipe}
