"""The config of a search, and the candidates that are drawn from it."""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from jaxft.recipe import Strict
from jaxft.study.config import Common, Name, RecipeConfig
from jaxft.study.plan import Cell, cell

TRIES = 50
"""Draws per candidate before a space counts as exhausted."""


class Range(Strict):
    """Numbers between two ends, drawn evenly, or evenly in their logarithm."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _is_range(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("a range needs low < high, and low > 0 with log")
        return self

    def draw(self, rng: np.random.Generator) -> float | int:
        """One number; three figures, which are all that a rate needs."""
        low, high = (math.log(x) if self.log else x for x in (self.low, self.high))
        value = rng.uniform(low, high)
        value = math.exp(value) if self.log else value
        if self.integer:
            return min(max(round(value), math.ceil(self.low)), math.floor(self.high))
        return min(max(float(f"{value:.3g}"), self.low), self.high)


class SearchedRecipe(RecipeConfig):
    """A recipe and what may be changed of it."""

    ranges: dict[str, Range | list[Any]] = Field(min_length=1)
    """By key: a range, or values to choose from."""

    @field_validator("vary")
    @classmethod
    def _is_not_varied(cls, vary: dict[str, Any]) -> dict[str, Any]:
        if vary:
            raise ValueError("a search draws from `ranges`; `vary` belongs to a study")
        return vary

    @field_validator("ranges")
    @classmethod
    def _have_values(cls, ranges: dict[str, Any]) -> dict[str, Any]:
        if empty := [key for key, values in ranges.items() if values == []]:
            raise ValueError(f"{empty[0]!r} has no values to choose from")
        return ranges


class TuneConfig(Common):
    """Random search with successive halving, for every dataset and recipe."""

    recipes: dict[Name, SearchedRecipe] = Field(min_length=1)
    samples: int = Field(16, ge=2)
    """Candidates per dataset and recipe: the recipe as it is, and random ones."""
    first: int = Field(ge=1)
    """Epochs after which the first are dropped; the budget is what the last ones get."""
    keep: int = Field(3, ge=2)
    """One in so many goes on, with so many times the epochs."""
    size: int | float | None = Field(None, gt=0)
    """Training frames, or a fraction of them."""
    seed: int = Field(0, ge=0)
    """Of the draws; that of the runs, too."""

    @model_validator(mode="after")
    def _has_epochs(self) -> TuneConfig:
        if self.budget is None or self.budget.epochs is None:
            raise ValueError("a search needs `budget: {epochs: …}`, those of the last rung")
        if self.first > self.budget.epochs:
            raise ValueError(f"first={self.first} epochs exceed the budget")
        if isinstance(self.size, float) and self.size > 1:
            raise ValueError("size is a number of frames, or a fraction of at most 1")
        return self

    @property
    def epochs(self) -> int:
        """Of the last rung."""
        assert self.budget is not None
        assert self.budget.epochs is not None
        return self.budget.epochs


def rungs(first: int, last: int, keep: int) -> list[int]:
    """Epochs after which candidates are compared: ``first`` × ``keep``ⁱ, and ``last``."""
    found = []
    while first < last:
        found.append(first)
        first *= keep
    return [*found, last]


def candidates(tune: TuneConfig, dataset: str, recipe: str) -> list[Cell]:
    """The recipe as it is, then random changes of it, no two alike.

    Candidate i does not depend on how many there are, so a longer search goes on from a shorter.

    Raises:
      ValueError: a range leads to what is no config, or scores could not be compared.
    """
    chosen = tune.recipes[recipe]
    found = [_cell(tune, dataset, recipe, {})]
    metric = found[0].config.metric.rpartition("/")[2]
    if metric == "loss" and any(key.split(".")[0] == "loss" for key in chosen.ranges):
        raise ValueError(
            f"{recipe!r} searches over the loss, by which candidates are compared;\n"
            "set metric=forces, energy or stress."
        )
    known = {found[0].id}
    key = zlib.crc32(f"{dataset}/{recipe}".encode())
    for number in range(1, tune.samples):
        rng = np.random.default_rng([tune.seed, key, number])
        for _ in range(TRIES):
            one = _cell(tune, dataset, recipe, _drawn(chosen, rng))
            if one.id not in known:
                known.add(one.id)
                found.append(one)
                break
    return found


def _drawn(recipe: SearchedRecipe, rng: np.random.Generator) -> dict[str, Any]:
    return {
        key: one.draw(rng) if isinstance(one, Range) else one[int(rng.integers(len(one)))]
        for key, one in recipe.ranges.items()
    }


def _cell(tune: TuneConfig, dataset: str, recipe: str, drawn: dict[str, Any]) -> Cell:
    words = [f"{key}={json.dumps(value)}" for key, value in drawn.items()]
    varied = {
        key: f"{value:g}" if isinstance(value, float) else str(value)
        for key, value in drawn.items()
    }
    chosen = tune.recipes[recipe]
    return cell(tune, dataset, chosen, recipe, words, varied, tune.size, tune.seed)
