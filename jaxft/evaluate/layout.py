"""A finding on a terminal: tables that are no wider than it, and flags in full below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxft.evaluate.finding import Finding, Row

UNBOUNDED = 10_000
"""Characters; wide enough for any table."""


def fitted(finding: Finding, console: Console) -> list[RenderableType]:
    """One table if it fits, else several of as many columns as fit; then the flags as a list.

    A table of some columns leaves out the rows that have nothing in them.
    """
    whole = finding.render()
    if _fits(whole, console):
        return [whole, *flag_lines(finding)]
    shown = [c for c in finding.units if any(r.values.get(c) is not None for r in finding.rows)]
    parts: list[list[str]] = [[]]
    for column in shown:
        if parts[-1] and not _fits(_part(finding, [*parts[-1], column]), console):
            parts.append([])
        parts[-1].append(column)
    tables = [_part(finding, part) for part in parts if part]
    for table in tables[1:]:
        table.title = None
    heading = [] if tables else [Text(finding.check)]
    return [*heading, *tables, *flag_lines(finding)]


def grouped(finding: Finding, groups: Mapping[str, str]) -> list[Finding]:
    """One finding per group of columns, ``{title: names}``, with the rows that have something in
    it; the first has the flags."""
    found: list[Finding] = []
    for title, names in groups.items():
        columns = names.split()
        rows = [
            Row(row.model, row.subject, values, None if found else row.flag)
            for row in finding.rows
            if (values := {c: row.values[c] for c in columns if row.values.get(c) is not None})
            or (row.flag and not found)
        ]
        if rows:
            found.append(Finding(title, tuple(rows), {c: finding.units[c] for c in columns}))
    return found


def flag_lines(finding: Finding) -> list[RenderableType]:
    """Each flag with its model and subject."""
    lines = [Text(f"! {row.model}, {row.subject}: {row.flag}") for row in finding.flags]
    return [Padding(line, (0, 0, 0, 1)) for line in lines]


def _fits(table: Table, console: Console) -> bool:
    wide = console.options.update(width=UNBOUNDED)
    return console.measure(table, options=wide).maximum <= console.width


def _part(finding: Finding, columns: Sequence[str]) -> Table:
    """Some columns without the flags; a word of the heading per line."""
    rows = [
        replace(row, values={c: v for c in columns if (v := row.values.get(c)) is not None})
        for row in finding.rows
    ]
    rows = [replace(row, flag=None) for row in rows if row.values]
    units = {column: finding.units[column] for column in columns}
    table = replace(finding, rows=tuple(rows), units=units).render()
    for column in table.columns:
        column.header = str(column.header).replace(" ", "\n")
        column.vertical = "bottom"
    return table
