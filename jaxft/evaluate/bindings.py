"""What makes a check out of a function: its options from a config, the files that they name, and
the numbers that stand for it in a summary.

What a check may be asked is what its function says: every argument after the candidates is an
option, with its type and default. Arguments of the names in ``READERS`` are files there.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ase
from pydantic import BaseModel, ConfigDict, create_model

from jaxft.data import Frame, Keys, read, read_atoms, without_isolated_atoms
from jaxft.evaluate.candidate import Candidate
from jaxft.evaluate.finding import Finding, Row

CheckFn = Callable[..., Finding]
"""``(candidates, …) -> Finding``."""

BoundCheck = Callable[[Sequence[Candidate]], Finding]
"""A check with its options, whose files are read."""

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)

NO_OPTIONS = {"progress", "trajectories", "stride"}
"""Arguments that a config has no say in: a comparison writes its own folder and nothing else."""


COUNTS = ("frames", "pairs")
"""Columns that say how many things a row is of."""


@dataclass(frozen=True)
class Headline:
    """A number that stands for a check in a summary.

    Args:
      column: of its rows.
      subject: of the row, or what its subject begins with before a comma (``all`` of ``all, 50
        GPa``); the mean over all rows of the model by default, and where it has no such row.
      absolute: mean of absolute values: of signed errors.
      best: the ideal; infinite where more is better, None where nothing is.
      against: the setting of the finding that names the model which the number compares with.
      flagged: whether rows with a flag count, such as a relaxation that did not end.
    """

    column: str
    subject: str | None = None
    absolute: bool = False
    best: float | None = 0.0
    against: str | None = None
    flagged: bool = True

    def of(self, finding: Finding, model: str) -> float | None:
        """The number of one model, None where it has none."""
        found = [row.values[self.column] for row in self._rows(finding, model)]
        values = [float(v) for v in found if isinstance(v, int | float)]
        if not values:
            return None
        return sum(map(abs, values) if self.absolute else values) / len(values)

    def subjects(self, finding: Finding, model: str) -> int:
        """How many things the number is of: rows, or what rows say that they are means of."""
        told = [
            [v for name in COUNTS if isinstance(v := row.values.get(name), int)]
            for row in self._rows(finding, model)
        ]
        return sum(counts[0] if counts else 1 for counts in told)

    def _rows(self, finding: Finding, model: str) -> tuple[Row, ...]:
        rows = finding.of(model)
        rows = tuple(filter(self._is_chosen, rows)) or rows
        return tuple(
            row
            for row in rows
            if row.values.get(self.column) is not None and (self.flagged or row.flag is None)
        )

    def distance(self, value: float) -> float:
        """From the ideal; less is better."""
        if self.best is None:
            return 0.0
        return -value if self.best == float("inf") else abs(value - self.best)

    def _is_chosen(self, row: Row) -> bool:
        return self.subject is not None and (
            row.subject == self.subject or row.subject.startswith(f"{self.subject}, ")
        )


@dataclass(frozen=True)
class Reader:
    """How an option that is files is written, and what becomes of it."""

    written: Any
    """The type in a config."""
    read: Callable[[Any, Keys, Any], Any]
    """``(value, keys of labels, all options) ->`` what the function wants."""


def one_structure(path: Path) -> ase.Atoms:
    """The only structure of a file.

    Raises:
      ValueError: it has several, or cannot be read.
    """
    found = read_atoms(path)
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} structures; give a file with one.")
    return found[0]


def _structures(paths: Mapping[str, Path], *_: Any) -> dict[str, ase.Atoms]:
    return {name: one_structure(path) for name, path in paths.items()}


def _frames(paths: list[Path] | Path, keys: Keys, _: Any) -> list[Frame]:
    return without_isolated_atoms(read(paths, keys=keys))


READERS = {
    "structures": Reader(dict[str, Path], _structures),
    "frames": Reader(list[Path] | Path, _frames),
    "equilibrium": Reader(list[Path] | Path, _frames),
}
"""By the name of the argument."""


@dataclass(frozen=True)
class Check:
    """A function of candidates and options.

    Args:
      run: the function; what follows the candidates are its options.
      headlines: its numbers in a summary, the first being the one that matters most; none if no
        one number stands for it.
      readers: of options that are files, besides ``READERS``.
      of_models: its rows are of models, not of ensembles of them.
    """

    run: CheckFn
    headlines: tuple[Headline, ...] = ()
    readers: Mapping[str, Reader] = field(default_factory=dict)
    of_models: bool = True

    @property
    def options(self) -> type[BaseModel]:
        """What may be asked, as a model that refuses everything else."""
        types = typing.get_type_hints(self.run)
        _, *parameters = inspect.signature(self.run).parameters.values()
        fields: dict[str, Any] = {}
        for parameter in parameters:
            if parameter.name in NO_OPTIONS:
                continue
            reader = self._reader(parameter.name)
            is_needed = parameter.default is inspect.Parameter.empty
            written = reader.written if reader else types[parameter.name]
            if not is_needed:
                written = written | None if reader else written
            default = ... if is_needed else None if reader else parameter.default
            fields[parameter.name] = (written, default)
        return create_model("Options", __config__=STRICT, **fields)

    def bind(self, options: BaseModel, keys: Keys | None = None) -> BoundCheck:
        """With checked ``options``, whose files are read now.

        A file that a package is missing for is told when the check runs, as all that needs it is.

        Raises:
          ValueError: a file cannot be read.
        """
        given = {}
        for name in options.model_fields_set:
            value = getattr(options, name)
            reader = self._reader(name)
            if reader is None:
                given[name] = value
            elif value is not None:
                try:
                    given[name] = reader.read(value, keys or Keys(), options)
                except ModuleNotFoundError as error:
                    return functools.partial(_missing, error)
        return functools.partial(_call, self.run, given)

    def _reader(self, name: str) -> Reader | None:
        return {**READERS, **self.readers}.get(name)


def _call(run: CheckFn, given: Mapping[str, Any], candidates: Sequence[Candidate]) -> Finding:
    return run(candidates, **given)


def _missing(error: ModuleNotFoundError, _: Sequence[Candidate]) -> Finding:
    raise error
