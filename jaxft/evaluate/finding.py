"""What every check ends in: rows of numbers with units, pictures, flags with reasons.

So a table on the terminal, a JSON document, a CSV file and a page of the report come from one
record, and no check writes its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

MISSING = "–"

WIDEST = 32
"""Characters of a model's or subject's name on a line of a terminal."""
MOST_POINTS = 2000
"""Of one model in a picture."""

Value = float | int | bool | str | None
"""None where a quantity does not exist for this row."""


@dataclass(frozen=True)
class Row:
    """What was found of one model and one subject."""

    model: str
    subject: str
    """A structure, a pair of elements, a set of frames, a temperature …"""
    values: Mapping[str, Value] = field(default_factory=dict)
    """By column; columns that other rows have may be absent."""
    flag: str | None = None
    """Why values are missing, or what is wrong with them."""


@dataclass(frozen=True)
class Line:
    """Points of a picture, joined unless ``is_scatter``."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    is_scatter: bool = False
    is_reference: bool = False
    """Drawn in grey, behind."""


@dataclass(frozen=True)
class Picture:
    """Axes with lines."""

    title: str
    x: str
    """What is on the axis, with its unit: ``volume, Å³/atom``."""
    y: str
    lines: tuple[Line, ...]
    is_log_x: bool = False
    is_log_y: bool = False
    ticks: Mapping[str, float] = field(default_factory=dict)
    """Named places on the x axis, each with a thin vertical line: points of the Brillouin zone."""
    diagonal: bool = False
    """Draw y = x: predicted against reference."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
      check: its name, that of the command.
      rows: in the order of the table.
      units: of every column of the rows, in the order of the columns; "" for pure numbers.
      settings: what was chosen, as JSON values.
      pictures: to look at.
      notes: what a reader must know to read the numbers.
    """

    check: str
    rows: tuple[Row, ...]
    units: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = {column for row in self.rows for column in row.values} - set(self.units)
        if unknown:
            raise ValueError(f"columns {sorted(unknown)} of {self.check} have no unit; give each.")

    @property
    def flags(self) -> tuple[Row, ...]:
        """Rows that something is wrong with."""
        return tuple(row for row in self.rows if row.flag is not None)

    def of(self, model: str) -> tuple[Row, ...]:
        """Rows of one model."""
        return tuple(row for row in self.rows if row.model == model)

    def mean(self, model: str, column: str) -> float | None:
        """Over the rows of a model that have a finite number there; None without any."""
        found = [row.values.get(column) for row in self.of(model)]
        numbers = [float(v) for v in found if isinstance(v, int | float) and math.isfinite(v)]
        return float(np.mean(numbers)) if numbers else None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; numbers that are not finite are None, and their rows say why."""
        return {
            "check": self.check,
            "units": dict(self.units),
            "settings": _plain(self.settings),
            "rows": [
                {
                    "model": row.model,
                    "subject": row.subject,
                    **{column: _plain(row.values.get(column)) for column in self.units},
                    "flag": row.flag,
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
        }

    def render(self) -> Table:
        """For a terminal; rich prints it. Columns without any value are left out, and flags, which
        are sentences: see :func:`jaxft.evaluate.layout.fitted`."""
        shown = [c for c in self.units if any(row.values.get(c) is not None for row in self.rows)]
        table = Table(
            title=self.check, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for name in ("model", "subject"):
            table.add_column(name, overflow="fold", max_width=WIDEST)
        for column in shown:
            unit = self.units[column]
            heading = column.replace("_", " ") + (f"\n{unit}" if unit else "")
            table.add_column(heading, justify="right")
        for row in self.rows:
            cells = [shown_value(row.values.get(column)) for column in shown]
            table.add_row(row.model, row.subject, *cells)
        return table

    def csv_rows(self) -> list[list[str]]:
        """The heading, with units in brackets, and a line per row."""
        names = [f"{c} [{unit}]" if unit else c for c, unit in self.units.items()]
        heading = ["check", "model", "subject", *names, "flag"]
        lines = (
            [
                self.check,
                row.model,
                row.subject,
                *("" if row.values.get(c) is None else str(row.values[c]) for c in self.units),
                row.flag or "",
            ]
            for row in self.rows
        )
        return [heading, *lines]


def scatter(label: str, x: np.ndarray, y: np.ndarray) -> Line:
    """At most ``MOST_POINTS`` of many, at random with a fixed seed: every third component of forces
    would be those along x."""
    if len(x) > MOST_POINTS:
        chosen = np.random.default_rng(0).permutation(len(x))[:MOST_POINTS]
        x, y = x[chosen], y[chosen]
    return Line(label, x, y, is_scatter=True)


def shown_value(value: Value) -> str:
    """Four figures; words as they are."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def from_dict(found: Mapping[str, Any]) -> Finding:
    """Of :meth:`Finding.to_dict`; pictures are not kept there.

    Raises:
      ValueError: this is no such document.
    """
    try:
        units = {str(k): str(v) for k, v in found["units"].items()}
        rows = tuple(
            Row(
                str(row["model"]),
                str(row["subject"]),
                {column: row[column] for column in units if row.get(column) is not None},
                row.get("flag"),
            )
            for row in found["rows"]
        )
        return Finding(
            str(found["check"]), rows, units, found.get("settings", {}), (), tuple(found["notes"])
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"this is no result of jaxft evaluate ({type(error).__name__}: {error}); give a file "
            "that jaxft evaluate … --json wrote."
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Iterable):
        return [_plain(v) for v in value]
    raise TypeError(f"{value!r} has no place in JSON; use numbers, words, lists or mappings.")
