"""From a study to its cells: independent configs of ``jaxft finetune``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from jaxft import bundle, data, presets
from jaxft import config as configs
from jaxft.config import Config, ConfigError
from jaxft.data.shares import Slots
from jaxft.recipe import Ewc
from jaxft.study.config import (
    Axis,
    Common,
    DatasetConfig,
    PhononsConfig,
    RecipeConfig,
    StudyConfig,
    Words,
)
from jaxft.study.identity import identity
from jaxft.study.made import Made, contents, fisher_file, scratch_bundle
from jaxft.study.phonons import with_phonons

CELLS, RUN = "cells", "run"
ENDLESS = 1_000_000
"""Epochs of a run that ends by time."""

BUDGET = ("epochs", "max_seconds")
OWN = {
    "seed": "seeds",
    "train_size": "sizes",
    "output": "output",
    "model": "base",
    "train": "datasets",
    "valid": "datasets",
    "test": "datasets",
    **dict.fromkeys(BUDGET, "budget"),
}
"""Keys of a cell's config that a study decides on, and how: no word may."""


@dataclass(frozen=True)
class Cell:
    """One fine-tune of a study."""

    dataset: str
    recipe: str
    seed: int
    size: int | None
    """Training frames; None is all of them."""
    varied: Mapping[str, str]
    """Chosen value by axis."""
    config: Config = field(repr=False)
    id: str
    base_tests: tuple[str, ...] = ()
    """Of the test sets those of the base model's level of theory."""
    needs: tuple[Made, ...] = ()
    """Files that are made before it."""
    phonons: Mapping[str, PhononsConfig] = field(default_factory=dict)
    """What it is judged by beside its config."""

    @property
    def folder(self) -> Path:
        return self.config.output.parent

    @property
    def name(self) -> str:
        """For people."""
        chosen = [f"{key}={value}" for key, value in self.varied.items()]
        frames = [] if self.size is None else [f"{self.size} frames"]
        return " ".join([self.dataset, self.recipe, *chosen, *frames, f"seed {self.seed}"])


def plan(study: StudyConfig) -> list[Cell]:
    """All cells, in the order of datasets, recipes, hyperparameters, sizes, seeds.

    Raises:
      ConfigError: a cell is no config of ``jaxft finetune``; the message names it.
      ValueError: a size exceeds the data, two cells are the same, or a file cannot be read.
    """
    counts = _Counts()
    cells = [
        cell
        for dataset, recipe in itertools.product(study.datasets, study.recipes)
        for cell in _of_pair(study, dataset, recipe, counts)
    ]
    check_different(cells)
    return cells


def check_different(cells: list[Cell]) -> None:
    """Raises ValueError if two cells are one and the same fine-tune."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.id in seen:
            raise ValueError(
                f"two cells are the same fine-tune: {seen[cell.id].name!r} and {cell.name!r};\n"
                "remove one of the two, or one of two equal values."
            )
        seen[cell.id] = cell


def _of_pair(study: StudyConfig, dataset: str, recipe: str, counts: _Counts) -> Iterator[Cell]:
    axes = {**study.vary, **study.recipes[recipe].vary}
    choices = [_choices(name, axis) for name, axis in axes.items()]
    sizes: Sequence[int | float | None] = study.sizes or (None,)
    for chosen in itertools.product(*choices):
        words = [word for _, given in chosen for word in given]
        varied = {name: label for name, (label, _) in zip(axes, chosen, strict=True)}
        for size, seed in itertools.product(sizes, study.all_seeds):
            yield cell(
                study, dataset, study.recipes[recipe], recipe, words, varied, size, seed, counts
            )


def _choices(name: str, axis: Axis) -> list[tuple[str, Words]]:
    if isinstance(axis, dict):
        return list(axis.items())
    return [(_label(value), [f"{name}={json.dumps(value)}"]) for value in axis]


def _label(value: Any) -> str:
    """1e-3 is a word in YAML, and means 0.001."""
    try:
        is_number = isinstance(value, float | str) and value != ""
        return f"{float(value):g}" if is_number else str(value)
    except ValueError:
        return str(value)


def cell(
    study: Common,
    dataset: str,
    recipe: RecipeConfig,
    name: str,
    words: Words,
    varied: Mapping[str, str],
    size: int | float | None,
    seed: int,
    counts: _Counts | None = None,
) -> Cell:
    """One cell; errors as :func:`plan`.

    Args:
      study: what all have in common.
      dataset: its name in the study.
      recipe, name: what is done, and how it is called.
      words: overrides that make this cell.
      varied: what they choose, for people.
      size: training frames, a fraction of them, or None for all.
      seed: of everything.
      counts: numbers of frames that are known already.
    """
    told = f"cell {' '.join([dataset, name, *varied.values(), f'seed {seed}'])!r}"
    counts = counts or _Counts()
    target = study.datasets[dataset]
    document = _document(study, target, recipe, words, told)
    document["seed"] = seed
    first = configs.validate(document, told)
    frames = None if size is None else counts.size(first, size)
    document["train_size"] = frames
    base_tests = _add_tests(document, study, dataset, recipe, first)
    _add_budget(document, study, first, frames, counts, told)
    needs = _add_made(document, study, recipe, told)
    config = configs.validate(document, told)
    known = identity(config, contents(needs))
    output = study.output / CELLS / known / RUN
    config = config.model_copy(update={"output": output})
    found = Cell(dataset, name, seed, frames, varied, config, known, base_tests, needs)
    return with_phonons(found, target.phonons)


def _document(
    study: Common, target: DatasetConfig, recipe: RecipeConfig, words: Words, told: str
) -> dict[str, Any]:
    """The preset under what the study, the dataset, the recipe and the axes say."""
    if recipe.preset is not None:
        document = yaml.safe_load(presets.text(recipe.preset))
    else:
        entries = [e.model_dump(by_alias=True, exclude_unset=True) for e in recipe.recipe or []]
        document = {"recipe": entries}
    document |= {"model": _bundle(recipe.base or study.base), "output": study.output / CELLS}
    document |= {"train": target.train, "valid": target.valid, "test": {}}
    if study.budget is not None:
        document["epochs"] = study.budget.epochs or ENDLESS
    for word in (*study.set, *target.set, *recipe.set, *words):
        key = word.partition("=")[0].split(".")[0]
        if key in OWN and (key not in BUDGET or study.budget is not None):
            raise ConfigError(f"{told}: {word!r} would undo what the study says; use {OWN[key]!r}.")
        try:
            configs.override(document, word)
        except ConfigError as error:
            raise ConfigError(f"{told}: {error}") from error
    return document


def _bundle(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(
            f"{path} is no bundle, but a study starts from one;\n"
            f"use jaxft convert {path} {path.stem}.jaxft."
        )
    return path


def _add_tests(
    document: dict[str, Any], study: Common, dataset: str, recipe: RecipeConfig, first: Config
) -> tuple[str, ...]:
    target, base_test = study.datasets[dataset], {} if recipe.scratch else study.base_test
    head = first.head
    if first.add_head is not None and base_test:
        config, _ = bundle.read_model(first.model)
        head = first.add_head.like or config.heads[0]
    document["test"] = {
        **{name: {"files": files} for name, files in target.test.items()},
        **{
            name: {"files": files, "e0s": "base", "head": head} for name, files in base_test.items()
        },
    }
    return tuple(base_test)


def _add_made(
    document: dict[str, Any], study: Common, recipe: RecipeConfig, told: str
) -> tuple[Made, ...]:
    """Names of files that do not exist yet: the model, then Fishers, which belong to it."""
    config = configs.validate(document, told)
    needs: list[Made] = []
    if recipe.scratch:
        needs.append(scratch_bundle(study.output, config, config.model))
        document["model"] = needs[0].path
        config = config.model_copy(update={"model": needs[0].path})
    entries = []
    for given in config.recipe:
        entry = given
        if isinstance(given, Ewc) and str(given.fisher) in study.fishers:
            asked = study.fishers[str(given.fisher)]
            made = fisher_file(study.output, config, asked, contents(needs))
            needs.append(made)
            entry = given.model_copy(update={"fisher": made.path})
        entries.append(entry.model_dump(by_alias=True, exclude_unset=True))
    document["recipe"] = entries
    return tuple(needs)


def _add_budget(
    document: dict[str, Any],
    study: Common,
    first: Config,
    frames: int | None,
    counts: _Counts,
    told: str,
) -> None:
    budget = study.budget
    if budget is None or budget.epochs is not None:
        return
    if budget.seconds is not None:
        if first.optimizer.schedule != "constant":
            raise ConfigError(
                f"{told}: the schedule {first.optimizer.schedule!r} has to know the number of "
                "updates, and a budget in seconds does not;\nset optimizer.schedule=constant, or "
                "give epochs or steps."
            )
        document["max_seconds"] = budget.seconds
        return
    n = counts.of(first) if frames is None else frames
    assert budget.steps is not None
    document["epochs"] = max(1, round(budget.steps / updates_per_epoch(first, n)))


def updates_per_epoch(config: Config, frames: int) -> int:
    """Of a run on so many training frames, those of alternating sources counted too."""
    mixed = [Fraction(s.fraction).limit_denominator(1_000_000) for s in config.sources]
    mixed = [f for f, s in zip(mixed, config.sources, strict=True) if s.schedule == "mixed"]
    share = 1 - sum(mixed, Fraction(0))
    batches = Slots(frames, share, config.batch_size).num_batches * config.period
    return -(-batches // config.accumulate)


class _Counts:
    """Training frames of configs, each file read once."""

    def __init__(self) -> None:
        self._frames: dict[str, list[data.Frame]] = {}

    def of(self, config: Config) -> int:
        """Frames left for training, isolated atoms and validation frames not counted."""
        files = config.train if isinstance(config.train, list) else [config.train]
        key = json.dumps([str(f) for f in files])
        if key not in self._frames:
            keys = data.Keys(**config.keys.model_dump())
            self._frames[key] = data.without_isolated_atoms(data.read(files, keys=keys))
        frames = self._frames[key]
        if isinstance(config.valid, float):
            frames, _ = data.split(frames, valid=config.valid, seed=config.seed)
        return len(frames)

    def size(self, config: Config, size: int | float) -> int:
        """Raises ValueError if there are not so many."""
        there = self.of(config)
        found = max(1, round(size * there)) if isinstance(size, float) else size
        if found > there:
            raise ValueError(
                f"a training set of {found} frames was asked for, and {config.train} has {there} "
                "without those of the validation set; ask for fewer, or for fractions."
            )
        return found
