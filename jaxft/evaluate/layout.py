"""A finding on a terminal: tables that are no wider than it, and flags in full below them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxft.evaluate.finding import Finding


def fitted(finding: Finding, console: Console) -> list[RenderableType]:
    """One table if it fits; else several, of as many columns as fit, and the flags as a list.

    A table of some columns leaves out the rows that have nothing in them.
    """
    whole = finding.render()
    if _fits(whole, console):
        return [whole]
    tables: list[RenderableType] = []
    columns: list[str] = []
    for column in finding.units:
        wider = _part(finding, [*columns, column], is_first=not tables)
        if columns and wider is not None and not _fits(wider, console):
            tables += _parts(finding, columns, is_first=not tables)
            columns = []
        columns.append(column)
    tables += _parts(finding, columns, is_first=not tables)
    return [*tables, *flag_lines(finding)]


def flag_lines(finding: Finding) -> list[RenderableType]:
    """Each flag with its model and subject, indented below the first line."""
    lines = [Text(f"! {row.model}, {row.subject}: {row.flag}") for row in finding.flags]
    return [Padding(line, (0, 0, 0, 1)) for line in lines]


def _fits(table: Table, console: Console) -> bool:
    return console.measure(table, options=console.options.update(width=10_000)).maximum <= (
        console.width
    )


def _parts(finding: Finding, columns: Sequence[str], *, is_first: bool) -> list[RenderableType]:
    found = _part(finding, columns, is_first=is_first)
    return [] if found is None else [found]


def _part(finding: Finding, columns: Sequence[str], *, is_first: bool) -> Table | None:
    """Without flags; None where no row has a value."""
    rows = [
        replace(row, values={c: row.values[c] for c in columns if c in row.values}, flag=None)
        for row in finding.rows
    ]
    rows = [row for row in rows if any(value is not None for value in row.values.values())]
    if not rows:
        return None
    units = {column: finding.units[column] for column in columns}
    table = replace(finding, rows=tuple(rows), units=units).render()
    if not is_first:
        table.title = None
    for column in table.columns:  # narrow: a word of the heading per line
        column.header = str(column.header).replace(" ", "\n")
        column.vertical = "bottom"
    return table
