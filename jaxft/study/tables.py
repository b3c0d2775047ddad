"""Means over seeds with their spread, and the tables made of them."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from jaxft.evaluate.finding import MISSING
from jaxft.study import results
from jaxft.study.collect import Outcome
from jaxft.study.results import RATIO

SHOWN = (
    "energy_rmse",
    "forces_rmse",
    "stress_rmse",
    "moments_mae",
    "moments_mean_mae",
    "omega_mae",
    "omega_max_bias",
)
OF_BASE = (f"forces_rmse{RATIO}", "forces_rmse")
OF_RUN = ("trained", "changed", "epochs", "seconds")


@dataclass(frozen=True)
class Group:
    """Cells that differ in their seed alone."""

    dataset: str
    recipe: str
    varied: tuple[tuple[str, str], ...]
    size: int | None

    @property
    def label(self) -> str:
        """Recipe and what varies, without the size."""
        return " ".join([self.recipe, *(f"{key}={value}" for key, value in self.varied)])


@dataclass(frozen=True)
class Summary:
    """A quantity over the seeds of a group."""

    unit: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation; None of one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.2g}"
        mean = f"{self.mean:.0f}" if abs(self.mean) >= 1000 else f"{self.mean:.4g}"
        return f"{mean}{spread}"


@dataclass(frozen=True)
class Grouped:
    """All that is known of a group."""

    group: Group
    cells: int
    done: int
    summaries: dict[tuple[str, str], Summary] = field(default_factory=dict)
    """By set and quantity."""
    reasons: tuple[str, ...] = ()

    def get(self, subject: str, quantity: str) -> Summary | None:
        return self.summaries.get((subject, quantity))


def grouped(found: Sequence[Outcome]) -> list[Grouped]:
    """Groups in the order of the plan."""
    members: dict[Group, list[Outcome]] = {}
    for outcome in found:
        cell = outcome.cell
        group = Group(cell.dataset, cell.recipe, tuple(cell.varied.items()), cell.size)
        members.setdefault(group, []).append(outcome)
    return [_summarised(group, outcomes) for group, outcomes in members.items()]


def _summarised(group: Group, outcomes: Sequence[Outcome]) -> Grouped:
    values: dict[tuple[str, str], list[float]] = {}
    units: dict[tuple[str, str], str] = {}
    for outcome in outcomes:
        for q in () if outcome.result is None else outcome.result.quantities:
            values.setdefault((q.set, q.name), []).append(q.value)
            units[q.set, q.name] = q.unit
    reasons = [
        f"{outcome.cell.name}: {outcome.status}: {outcome.result.reason}"
        for outcome in outcomes
        if outcome.result is not None and outcome.status != results.DONE
    ]
    return Grouped(
        group,
        len(outcomes),
        sum(outcome.status == results.DONE for outcome in outcomes),
        {key: Summary(units[key], tuple(numbers)) for key, numbers in values.items()},
        tuple(reasons),
    )


def columns(groups: Sequence[Grouped], base_tests: Sequence[str]) -> list[tuple[str, str]]:
    """(set, quantity) of what a table shows: errors on targets, what is lost of the base, cost."""
    known = dict.fromkeys(key for group in groups for key in group.summaries)
    sets = dict.fromkeys(subject for subject, _ in known if subject)
    targets = [s for s in sets if s not in base_tests]
    wanted = [(subject, name) for subject in targets for name in SHOWN]
    wanted += [(subject, name) for subject in base_tests for name in OF_BASE]
    wanted += [("", name) for name in OF_RUN]
    return [key for key in wanted if key in known]


def cells_of(
    groups: Sequence[Grouped], shown: Sequence[tuple[str, str]]
) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of a table."""
    units = {key: s.unit for group in groups for key, s in group.summaries.items()}
    headings = ["recipe", "frames", "done"]
    headings += [
        " ".join(filter(None, (subject, name.replace("_", " "))))
        + (f", {units[subject, name]}" if units[subject, name] else "")
        for subject, name in shown
    ]
    lines = [
        [
            found.group.label,
            "all" if found.group.size is None else str(found.group.size),
            f"{found.done}/{found.cells}",
            *(str(found.get(*key) or MISSING) for key in shown),
        ]
        for found in groups
    ]
    return headings, lines


def render(title: str, groups: Sequence[Grouped], base_tests: Sequence[str]) -> Table:
    """For a terminal; rich prints it."""
    headings, lines = cells_of(groups, columns(groups, base_tests))
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def to_csv(groups: Sequence[Grouped]) -> str:
    """Mean, spread and number of values of every quantity of every group."""
    axes = list(dict.fromkeys(axis for found in groups for axis, _ in found.group.varied))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    heading = ["dataset", "recipe", "size", *axes, "set", "quantity", "unit"]
    writer.writerow([*heading, "mean", "spread", "n"])
    for found in groups:
        group, varied = found.group, dict(found.group.varied)
        size = "" if group.size is None else group.size
        same = [group.dataset, group.recipe, size, *(varied.get(axis, "") for axis in axes)]
        for (subject, name), s in found.summaries.items():
            spread = "" if s.spread is None else s.spread
            writer.writerow([*same, subject, name, s.unit, s.mean, spread, len(s.values)])
    return buffer.getvalue()
