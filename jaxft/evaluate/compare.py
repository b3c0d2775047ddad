"""Several models under several checks: one summary, one Pareto front, one document.

A check that raises is a flagged row with its reason, and the others go on: this is the one place
where that is decided.
"""

from __future__ import annotations

import csv
import functools
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import ase
import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from jaxft.evaluate.bindings import BoundCheck, Headline
from jaxft.evaluate.candidate import Candidate, check_names
from jaxft.evaluate.checks import CHECKS, HEADLINES
from jaxft.evaluate.cost import COST, EVERY, cost
from jaxft.evaluate.finding import Finding, Row, shown_value
from jaxft.evaluate.fronts import Axes, front
from jaxft.evaluate.joining import merge

SUMMARY = "summary"
FAILED = "the whole check"
REFERENCE = "reference"
"""Whose rows in a finding are of no model."""
ALIKE, ROUNDING = 1e-6, 1e-6
"""Relative and absolute differences of headlines that say nothing."""


class Entry(NamedTuple):
    """A line of the summary: one number of every model."""

    check: str
    headline: Headline
    unit: str
    values: dict[str, float | None]
    """By model."""
    against: str | None = None
    """The model that all are compared with, if it is one."""
    partial: frozenset[str] = frozenset()
    """Models whose number is of fewer frames or structures than another's: what they failed on is
    not in it."""

    @property
    def name(self) -> str:
        """Of its column."""
        return f"{self.check}_{self.headline.column}"

    @property
    def quantity(self) -> str:
        """In words, with its ideal where that is not 0."""
        ideals = {1.0: " (ideal: 1)", np.inf: " (the more the better)"}
        against = "" if self.against is None else f" against {self.against}"
        ideal = ideals.get(self.headline.best or 0.0, "")
        return self.headline.column.replace("_", " ") + against + ideal

    @property
    def best(self) -> set[str]:
        """The models nearest to the ideal, of those that are judged by everything; nobody where
        all are equally near, or none is known."""
        far = {
            model: self.headline.distance(value)
            for model, value in self.values.items()
            if value is not None and np.isfinite(value) and model not in self.partial
        }
        least, most = min(far.values(), default=0.0), max(far.values(), default=0.0)
        if most - least <= ALIKE * abs(most) or most - least < ROUNDING:
            return set()
        # not of the worst, which may have exploded
        return {model for model, d in far.items() if d - least <= max(ALIKE * abs(d), ROUNDING)}


@dataclass(frozen=True)
class Comparison:
    """Findings of all checks, and what they come to."""

    findings: tuple[Finding, ...]
    axes: Axes = field(default_factory=Axes)

    @property
    def models(self) -> list[str]:
        """In the order of their first rows."""
        judging = (f for f in self.findings if f.check not in CHECKS or CHECKS[f.check].of_models)
        names = dict.fromkeys(row.model for finding in judging for row in finding.rows)
        return [name for name in names if name not in (EVERY, REFERENCE)]

    @property
    def entries(self) -> list[Entry]:
        """The headlines of every check that any model has."""
        models = self.models
        found = [
            Entry(
                f.check,
                h,
                f.units[h.column],
                {name: h.of(f, name) for name in models},
                f.settings.get(h.against) if h.against else None,
                _partial({name: h.subjects(f, name) for name in models}),
            )
            for f in self.findings
            for h in HEADLINES.get(f.check, ())
            if h.column in f.units
        ]
        return [entry for entry in found if any(v is not None for v in entry.values.values())]

    @property
    def summary(self) -> Finding:
        """A row per model: the headlines of every check, and the Pareto front."""
        entries = self.entries
        rows = [
            Row(name, "headlines", {e.name: e.values[name] for e in entries}, self._flag(name))
            for name in self.models
        ]
        pictures, notes = front(self.findings, self.models, self.axes)
        units = {entry.name: entry.unit for entry in entries}
        told = (*notes, *self._partial(entries), *self._silent())
        return Finding(SUMMARY, tuple(rows), units, {}, pictures, told)

    def page(self, title: str) -> str:
        """A whole page that loads nothing and runs nothing.

        Raises:
          ImportError: matplotlib is not installed.
        """
        from jaxft.report.comparison import comparison_page

        return comparison_page(title, self)

    def render(self) -> Table:
        """The summary for a terminal, a column per model; rich prints it."""
        table = Table(title=SUMMARY, title_justify="left", box=box.SIMPLE_HEAD)
        for heading in ("check", "quantity", "unit"):
            table.add_column(heading, overflow="fold")
        for name in self.models:
            table.add_column(Text(name), justify="right", overflow="fold")
        for entry in self.entries:
            cells = [
                Text(shown_value(value), "bold" if name in entry.best else "")
                for name, value in entry.values.items()
            ]
            table.add_row(entry.check, entry.quantity, entry.unit, *cells)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; :func:`jaxft.evaluate.joining.read_findings` reads it back."""
        return {
            "summary": self.summary.to_dict(),
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def to_csv(self) -> str:
        """A line per number: check, model, subject, quantity, unit, value, flag."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["check", "model", "subject", "quantity", "unit", "value", "flag"])
        for finding in (self.summary, *self.findings):
            for row in finding.rows:
                said = {c: v for c in finding.units if (v := row.values.get(c)) is not None}
                start = [finding.check, row.model, row.subject]
                for column, value in said.items() or [("", "")]:
                    unit = finding.units.get(column, "")
                    writer.writerow([*start, column, unit, value, row.flag or ""])
        return text.getvalue()

    def _flag(self, model: str) -> str | None:
        counts = {f.check: sum(r.flag is not None for r in f.of(model)) for f in self.findings}
        told = [f"{check} ({count})" for check, count in counts.items() if count]
        return f"flagged rows: {', '.join(told)}" if told else None

    def _partial(self, entries: Sequence[Entry]) -> tuple[str, ...]:
        """Numbers that leave out what their models failed on."""
        return tuple(
            f"{e.check}, {e.headline.column}: that of {', '.join(sorted(e.partial))} is of fewer "
            "frames or structures than the others', so it is not the best; see the flags."
            for e in entries
            if e.partial
        )

    def _silent(self) -> tuple[str, ...]:
        """Checks that ran and have no number to show here."""
        known = {entry.check for entry in self.entries}
        silent = [f.check for f in self.findings if HEADLINES.get(f.check) and f.check not in known]
        if not silent:
            return ()
        return (
            f"Without a number here: {', '.join(silent)}; see the flags there, or give what they "
            "are to be compared with (labels, references, against).",
        )


def _partial(subjects: Mapping[str, int]) -> frozenset[str]:
    most = max(subjects.values(), default=0)
    return frozenset(name for name, count in subjects.items() if 0 < count < most)


def compare(
    candidates: Sequence[Candidate],
    checks: Mapping[str, BoundCheck],
    *,
    base: str | None = None,
    probe: ase.Atoms | None = None,
    earlier: Sequence[Finding] = (),
    axes: Axes | None = None,
    told: Callable[[str], None] | None = None,
) -> Comparison:
    """Run all checks, one after the other.

    Args:
      candidates: the models.
      checks: by name, with their options: :meth:`jaxft.evaluate.bindings.Check.bind`.
      base: the candidate that the others were made of: the first of every check, and the one whose
        parameters the others' are compared with.
      probe: a structure to take the time of.
      earlier: findings of other runs, of other models or checks.
      axes: of the Pareto front.
      told: called with the name of every check before it runs.

    Raises:
      ValueError: two candidates have one name, the base is none of them, or an earlier finding
        contradicts.
    """
    found: list[Finding] = []
    if candidates:
        check_names(candidates)
        by_name = {candidate.name: candidate for candidate in candidates}
        if base is not None and base not in by_name:
            raise ValueError(f"the base {base!r} is none of {', '.join(map(repr, by_name))}.")
        first = by_name.get(base or "")
        ordered = sorted(candidates, key=lambda candidate: candidate is not first)
        seconds = {}
        for name, bound in checks.items():
            if told is not None:
                told(name)
            start = time.perf_counter()
            found.append(run_check(name, bound, ordered))
            seconds[name] = time.perf_counter() - start
        priced = functools.partial(cost, base=first, probe=probe, seconds=seconds)
        found.append(run_check(COST, priced, ordered))
    return Comparison(tuple(merge([*earlier, *found])), axes or Axes())


def run_check(name: str, bound: BoundCheck, candidates: Sequence[Candidate]) -> Finding:
    """What the check finds, or flagged rows that say why it found nothing."""
    try:
        return replace(bound(candidates), check=name)
    # Whatever goes wrong in one check must not take the others along: it is told in its place.
    except Exception as error:
        words = " ".join(str(error).split())
        is_ours = isinstance(error, ValueError | ModuleNotFoundError)  # both say what to do
        reason = words if is_ours and words else f"{type(error).__name__}: {words}"
        return Finding(name, tuple(Row(c.name, FAILED, {}, reason) for c in candidates), {})
