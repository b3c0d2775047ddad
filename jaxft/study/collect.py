"""All results of a study as one tidy table: a row per cell and quantity."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.study import results
from jaxft.study.plan import Cell
from jaxft.study.results import Result
from jaxft.study.work import status

CSV, PARQUET = "results.csv", "results.parquet"


@dataclass(frozen=True)
class Outcome:
    """A cell and what is known of it."""

    cell: Cell
    status: str
    result: Result | None


def outcomes(cells: Sequence[Cell]) -> list[Outcome]:
    """Of all cells, finished or not."""
    return [Outcome(cell, status(cell), results.read(cell.folder)) for cell in cells]


def rows(found: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """Tidy rows with the same columns; a cell without numbers has one that says why."""
    axes = dict.fromkeys(axis for outcome in found for axis in outcome.cell.varied)
    for outcome in found:
        cell, result = outcome.cell, outcome.result
        same = {
            "cell": cell.id,
            "dataset": cell.dataset,
            "recipe": cell.recipe,
            "size": cell.size,
            "seed": cell.seed,
            **{axis: cell.varied.get(axis) for axis in axes},
            "status": outcome.status,
            "reason": "" if result is None else result.reason.replace("\n", " "),
        }
        empty = {"set": None, "quantity": None, "unit": None, "value": None}
        if result is None or not result.quantities:
            yield same | empty
        for q in () if result is None else result.quantities:
            yield same | {"set": q.set, "quantity": q.name, "unit": q.unit, "value": q.value}


def to_csv(table: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV; what is absent is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return buffer.getvalue()


def write(folder: Path, table: Sequence[dict[str, Any]]) -> list[Path]:
    """The table as CSV, and as Parquet where pyarrow is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [replace(folder / CSV, to_csv(table))]
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        return written
    scratch = folder / f".{PARQUET}"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(table)), scratch)
    written.append(scratch.replace(folder / PARQUET))
    return written


def replace(path: Path, text: str) -> Path:
    """Write a file at once."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text)
    return scratch.replace(path)
