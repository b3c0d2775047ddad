"""The checks that a comparison knows, by name: one line each in ``CHECKS``.

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
from jaxft.evaluate import phase, uncertainty
from jaxft.evaluate.candidate import Candidate
from jaxft.evaluate.finding import Finding

CheckFn = Callable[..., Finding]
"""``(candidates, …) -> Finding``."""

BoundCheck = Callable[[Sequence[Candidate]], Finding]
"""A check with its options, whose files are read."""


@dataclass(frozen=True)
class Headline:
    """The number that stands for a check in a summary.

    Args:
      column: of its rows.
      subject: of the row; by default the mean over the model's rows.
      absolute: mean of absolute values: of signed errors.
    """

    column: str
    subject: str | None = None
    absolute: bool = False

    def of(self, finding: Finding, model: str) -> float | None:
        """The number of one model, None where it has none."""
        rows = [r for r in finding.of(model) if self.subject in (None, r.subject)]
        values = [float(v) for r in rows if isinstance(v := r.values.get(self.column), int | float)]
        if not values:
            return None
        return sum(map(abs, values) if self.absolute else values) / len(values)


@dataclass(frozen=True)
class Reader:
    """How an option that is files is written, and what becomes of it."""

    written: Any
    """The type in a config."""
    read: Callable[[Any, Keys], Any]


def one_structure(path: Path) -> ase.Atoms:
    """The only structure of a file.

    Raises:
      ValueError: it has several, or cannot be read.
    """
    found = read_atoms(path)
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} structures; give a file with one.")
    return found[0]


def _structures(paths: Mapping[str, Path], _: Keys) -> dict[str, ase.Atoms]:
    return {name: one_structure(path) for name, path in paths.items()}


def _frames(paths: list[Path] | Path, keys: Keys) -> list[Frame]:
    return without_isolated_atoms(read(paths, keys=keys))


READERS = {
    "structures": Reader(dict[str, Path], _structures),
    "frames": Reader(list[Path] | Path, _frames),
    "equilibrium": Reader(list[Path] | Path, _frames),
}
"""By the name of the argument."""

NO_OPTIONS = {"progress"}
"""Arguments that a config has no say in."""


@dataclass(frozen=True)
class Check:
    """A function of candidates and options.

    Args:
      run: the function; what follows the candidates are its options.
      headline: its number in a summary; None if no one number stands for it.
      readers: of options that are files, besides ``READERS``.
    """

    run: CheckFn
    headline: Headline | None = None
    readers: Mapping[str, Reader] = field(default_factory=dict)

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
        config = ConfigDict(
            extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True
        )
        return create_model("Options", __config__=config, **fields)

    def bind(self, options: BaseModel, keys: Keys | None = None) -> BoundCheck:
        """With checked ``options``, whose files are read now.

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
                given[name] = reader.read(value, keys or Keys())
        return functools.partial(_call, self.run, given)

    def _reader(self, name: str) -> Reader | None:
        return {**READERS, **self.readers}.get(name)


def _call(run: CheckFn, given: Mapping[str, Any], candidates: Sequence[Candidate]) -> Finding:
    return run(candidates, **given)


CHECKS: dict[str, Check] = {
    "phase": Check(phase.check, Headline("f1", phase.ALL)),
    "uncertainty": Check(uncertainty.check),
}
"""By the name in a config and of the finding."""
