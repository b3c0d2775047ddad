"""Several models under several checks: one summary, one Pareto front, one document.

A check that raises is a flagged row with its reason, and the others go on: this is the one place
where that is decided.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ase
import jax
import numpy as np

from jaxft import tree
from jaxft.evaluate.candidate import Candidate, Flag, JaxCandidate, check_names
from jaxft.evaluate.checks import CHECKS, BoundCheck, Headline
from jaxft.evaluate.finding import Finding, Line, Picture, Row, Value, from_dict
from jaxft.strategies.delta import support_of

SUMMARY, COST = "summary", "cost"
EVERY = "all models"
FAILED = "the whole check"

COST_UNITS = {
    "parameters": "",
    "changed": "",
    "changed_share": "%",
    "seconds": "s",
    "atoms": "",
}
COST_NOTES = (
    "changed: parameters that differ at all from those of the base. seconds of a model: energy, "
    "forces and stress of the structure named, compiled before, the median of several; those of a "
    "check: all of it, for all models, with compilation.",
)


@dataclass(frozen=True)
class Axes:
    """Two numbers of every model, both to be small, as ``check.column``."""

    x: str = "errors.forces_rmse"
    y: str = "forget.forces_ratio"

    def __post_init__(self) -> None:
        for axis in (self.x, self.y):
            check, _, column = axis.partition(".")
            if not check or not column:
                raise ValueError(f"{axis!r} names no number; write check.column.")


@dataclass(frozen=True)
class Comparison:
    """Findings of all checks, and what they come to."""

    findings: tuple[Finding, ...]
    axes: Axes = Axes()

    @property
    def models(self) -> list[str]:
        """In the order of their first rows."""
        names = (row.model for finding in self.findings for row in finding.rows)
        return [name for name in dict.fromkeys(names) if name != EVERY]

    @property
    def summary(self) -> Finding:
        """A row per model: the headline of every check, and the Pareto front."""
        units: dict[str, str] = {}
        values: dict[str, dict[str, Value]] = {name: {} for name in self.models}
        for finding in self.findings:
            for headline in _headlines(finding):
                column = f"{finding.check}_{headline.column}"
                units[column] = finding.units[headline.column]
                for name in self.models:
                    values[name][column] = headline.of(finding, name)
        rows = [Row(name, "headlines", values[name], self._flag(name)) for name in self.models]
        pictures, notes = self._front()
        return Finding(SUMMARY, tuple(rows), units, {}, pictures, notes)

    def page(self, title: str) -> str:
        """A whole page that loads nothing and runs nothing.

        Raises:
          ImportError: matplotlib is not installed.
        """
        from jaxft.report.findings import findings_page

        return findings_page(title, [self.summary, *self.findings])

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; :func:`read_findings` reads it back."""
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

    def _front(self) -> tuple[tuple[Picture, ...], tuple[str, ...]]:
        by_check = {finding.check: finding for finding in self.findings}
        values, labels = [], []
        for axis in (self.axes.x, self.axes.y):
            check, _, column = axis.partition(".")
            finding = by_check.get(check)
            if finding is None or column not in finding.units:
                return (), (f"No Pareto front: there is no {axis} here.",)
            headline = _headline_of(check, column)
            values.append([headline.of(finding, name) for name in self.models])
            unit = finding.units[column]
            labels.append(f"{check} {column.replace('_', ' ')}" + (f", {unit}" if unit else ""))
        points = {
            name: (float(x), float(y))
            for name, x, y in zip(self.models, *values, strict=True)
            if x is not None and y is not None and np.isfinite([x, y]).all()
        }
        missing = [name for name in self.models if name not in points]
        note = f"Not on the Pareto plot, for want of a number: {', '.join(missing)}."
        if not points:
            return (), (note,)
        x, y = zip(*(points[name] for name in pareto_front(points)), strict=True)
        lines = [Line("Pareto front", x, y, is_reference=True)]
        lines += [Line(n, [x], [y], is_scatter=True) for n, (x, y) in points.items()]
        picture = Picture("Left and below is better", labels[0], labels[1], tuple(lines))
        return (picture,), ((note,) if missing else ())


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
      checks: by name, with their options: :meth:`jaxft.evaluate.checks.Check.bind`.
      base: the candidate whose parameters the others are compared with.
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
        seconds = {}
        for name, bound in checks.items():
            if told is not None:
                told(name)
            start = time.perf_counter()
            found.append(run_check(name, bound, candidates))
            seconds[name] = time.perf_counter() - start
        found.append(cost(candidates, by_name.get(base or ""), probe, seconds))
    return Comparison(tuple(merge([*earlier, *found])), axes or Axes())


def run_check(name: str, bound: BoundCheck, candidates: Sequence[Candidate]) -> Finding:
    """What the check finds, or flagged rows that say why it found nothing."""
    try:
        return replace(bound(candidates), check=name)
    # Whatever goes wrong in one check must not take the others along: it is told in its place.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return Finding(name, tuple(Row(c.name, FAILED, {}, reason) for c in candidates), {})


def cost(
    candidates: Sequence[Candidate],
    base: Candidate | None,
    probe: ase.Atoms | None,
    seconds: Mapping[str, float],
) -> Finding:
    """Parameters, parameters that changed, and time; of models that are not ours, the time."""
    rows = []
    for candidate in candidates:
        values: dict[str, Value] = {}
        if isinstance(candidate, JaxCandidate):
            values["parameters"] = tree.size(candidate.params)
            if isinstance(base, JaxCandidate):
                values |= _changed(base, candidate)
        rows.append(Row(candidate.name, "parameters", values))
        if probe is not None:
            rows.append(_timed(candidate, probe))
    rows += [Row(EVERY, f"check {name}", {"seconds": s}) for name, s in seconds.items()]
    return Finding(COST, tuple(rows), COST_UNITS, {}, (), COST_NOTES)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that none is better than in one number and as good in the other, from
    left to right; both numbers are to be small."""
    front: list[str] = []
    lowest = np.inf
    for name in sorted(points, key=points.__getitem__):
        if points[name][1] < lowest or (front and points[name] == points[front[-1]]):
            front.append(name)
            lowest = points[name][1]
    return front


def merge(findings: Sequence[Finding]) -> list[Finding]:
    """One finding per check, rows of all one after the other.

    Raises:
      ValueError: two say different things of the same model and subject, or units differ.
    """
    merged: dict[str, Finding] = {}
    for finding in findings:
        known = merged.get(finding.check)
        merged[finding.check] = finding if known is None else _both(known, finding)
    return list(merged.values())


def _both(a: Finding, b: Finding) -> Finding:
    wrong = [c for c in a.units if c in b.units and a.units[c] != b.units[c]]
    if wrong:
        raise ValueError(f"two results of {a.check} give {', '.join(wrong)} in different units.")
    rows = list(a.rows)
    known = {(row.model, row.subject) for row in rows}
    for row in b.rows:
        if row in a.rows:
            continue
        if (row.model, row.subject) not in known:
            rows.append(row)
        elif a.check == COST:  # times differ from run to run
            rows.append(replace(row, subject=f"{row.subject} (again)"))
        else:
            raise ValueError(
                f"two results of {a.check} differ about {row.model!r}, {row.subject!r}; give one "
                "of them, or another name to the model of one."
            )
    keys = sorted(k for k in {**a.settings, **b.settings} if _other(a, b, k))
    note = f"The runs differ in their settings: {', '.join(keys)}."
    notes = dict.fromkeys([*a.notes, *b.notes, *([note] if keys else [])])
    return Finding(
        a.check,
        tuple(rows),
        {**a.units, **b.units},
        {**b.settings, **a.settings},
        a.pictures + b.pictures,
        tuple(notes),
    )


def _other(a: Finding, b: Finding, key: str) -> bool:
    """Whether a setting differs, as JSON has it."""
    plain = [replace(f, rows=(), pictures=()).to_dict()["settings"].get(key) for f in (a, b)]
    return bool(plain[0] != plain[1])


def read_findings(path: str | Path) -> list[Finding]:
    """What ``--save`` of a check or a comparison wrote.

    Raises:
      ValueError: the file is no such document.
    """
    try:
        document = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}).") from error
    is_many = isinstance(document, dict) and isinstance(document.get("findings"), list)
    try:
        return [from_dict(found) for found in (document["findings"] if is_many else [document])]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _headlines(finding: Finding) -> list[Headline]:
    known = CHECKS.get(finding.check)
    headline = known.headline if known is not None else None
    return [headline] if headline is not None and headline.column in finding.units else []


def _headline_of(check: str, column: str) -> Headline:
    """Where a column is looked up: in the row of the headline, if the check has one."""
    known = CHECKS.get(check)
    if known is None or known.headline is None:
        return Headline(column)
    return replace(known.headline, column=column)


def _changed(base: JaxCandidate, candidate: JaxCandidate) -> dict[str, Value]:
    try:
        support = support_of(base.params, candidate.params)
    except ValueError:  # another architecture
        return {}
    changed = sum(int(leaf.sum()) for leaf in jax.tree.leaves(support))
    return {"changed": changed, "changed_share": 100 * changed / tree.size(candidate.params)}


def _timed(candidate: Candidate, probe: ase.Atoms, repeats: int = 5) -> Row:
    """The median of several evaluations after a first, each of slightly moved atoms: a calculator
    does not compute the same structure twice."""
    subject = f"one step of {probe.symbols}"
    times = []
    for i in range(repeats + 1):
        moved = probe.copy()
        moved.rattle(1e-4, seed=i)
        start = time.perf_counter()
        (outcome,) = candidate.evaluate([moved])
        times.append(time.perf_counter() - start)
        if isinstance(outcome, Flag):
            return Row(candidate.name, subject, {}, outcome.reason)
    return Row(
        candidate.name,
        subject,
        {"seconds": statistics.median(times[1:]), "atoms": len(probe)},
    )
