"""What is better in two numbers at once: the Pareto front of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxft.evaluate.bindings import Headline
from jaxft.evaluate.checks import HEADLINES
from jaxft.evaluate.finding import Finding, Line, Picture


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


def front(
    findings: Sequence[Finding], models: Sequence[str], axes: Axes
) -> tuple[tuple[Picture, ...], tuple[str, ...]]:
    """The picture, if anything can be on it, and what to say of it."""
    by_check = {finding.check: finding for finding in findings}
    values, labels = [], []
    for axis in (axes.x, axes.y):
        check, _, column = axis.partition(".")
        finding = by_check.get(check)
        if finding is None or column not in finding.units:
            return (), (f"No Pareto front: there is no {axis} here.",)
        found, label = _to_be_small(_headline_of(check, column), finding, models)
        values.append(found)
        labels.append(label)
    points = {
        name: (float(x), float(y))
        for name, x, y in zip(models, *values, strict=True)
        if x is not None and y is not None and np.isfinite([x, y]).all()
    }
    missing = [name for name in models if name not in points]
    note = f"Not on the Pareto plot, for want of a number: {', '.join(missing)}."
    if not points:
        return (), (note,)
    best = pareto_front(points)
    x, y = zip(*(points[name] for name in best), strict=True)
    lines = [Line("Pareto front", x, y, is_reference=True)]
    lines += [Line(n, [x], [y], is_scatter=True) for n, (x, y) in points.items()]
    picture = Picture("Pareto front: left and below is better", labels[0], labels[1], tuple(lines))
    told = f"On the Pareto front of {axes.x} and {axes.y}: {', '.join(best)}."
    return (picture,), ((told, note) if missing else (told,))


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


def _headline_of(check: str, column: str) -> Headline:
    """Where a column is looked up: in the row of the headlines, if the check has some."""
    known = HEADLINES.get(check)
    if not known:
        return Headline(column)
    other = replace(known[0], column=column, best=0.0)
    return next((h for h in known if h.column == column), other)


def _to_be_small(
    headline: Headline, finding: Finding, models: Sequence[str]
) -> tuple[list[float | None], str]:
    """A number of every model that is the better the smaller it is, and what it is called."""
    found = [headline.of(finding, name) for name in models]
    name = f"{finding.check}: {headline.column.replace('_', ' ')}"
    if headline.best:
        found = [None if v is None else headline.distance(v) for v in found]
        more = headline.best == np.inf
        name = f"−({name})" if more else f"distance of {name} from {headline.best:g}"
    unit = finding.units[headline.column]
    return found, f"{name}, {unit}" if unit else name
