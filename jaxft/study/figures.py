"""What a study looks like: data efficiency, sensitivity, forgetting against accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from jaxft.evaluate.finding import Line, Picture
from jaxft.evaluate.fronts import pareto_front
from jaxft.study.results import RATIO
from jaxft.study.tables import Group, Grouped, Summary

ERROR, LOST = "forces_rmse", f"forces_rmse{RATIO}"
UNIT = "meV/Å"


def pictures(
    groups: Sequence[Grouped], targets: Sequence[str], bases: Sequence[str]
) -> list[Picture]:
    """All pictures that the groups of one dataset have points for."""
    found = [*_efficiency(groups, targets), *_sensitivity(groups, targets)]
    return [*found, *_forgetting(groups, targets, bases), *_thrift(groups, targets)]


def _efficiency(groups: Sequence[Grouped], targets: Sequence[str]) -> Iterator[Picture]:
    """Error against training frames, a line per recipe and choice."""
    if len({found.group.size for found in groups}) < 2:
        return
    for target in targets:
        lines: dict[str, list[tuple[float, Summary]]] = {}
        for found in groups:
            size, error = found.group.size, found.get(target, ERROR)
            if size is not None and error is not None:
                lines.setdefault(found.group.label, []).append((size, error))
        yield from _curves(f"{target}: data efficiency", "training frames", target, lines)


def _sensitivity(groups: Sequence[Grouped], targets: Sequence[str]) -> Iterator[Picture]:
    """Error against every hyperparameter that is a number, a line per all else."""
    axes = dict.fromkeys(axis for found in groups for axis, _ in found.group.varied)
    for axis in axes:
        chosen = {dict(found.group.varied).get(axis) for found in groups} - {None}
        if len(chosen) < 2 or not all(_is_number(value) for value in chosen):
            continue
        for target in targets:
            lines: dict[str, list[tuple[float, Summary]]] = {}
            for found in groups:
                value = dict(found.group.varied).get(axis)
                error = found.get(target, ERROR)
                if value is not None and error is not None:
                    label = _without(found.group, axis)
                    lines.setdefault(label, []).append((float(value), error))
            yield from _curves(f"{target}: sensitivity to {axis}", axis, target, lines)


def _without(group: Group, axis: str) -> str:
    rest = tuple(pair for pair in group.varied if pair[0] != axis)
    frames = "" if group.size is None else f", {group.size} frames"
    return Group(group.dataset, group.recipe, rest, None).label + frames


def _is_number(text: str | None) -> bool:
    try:
        return math.isfinite(float(text or ""))
    except ValueError:
        return False


def _curves(
    title: str, x: str, target: str, lines: dict[str, list[tuple[float, Summary]]]
) -> Iterator[Picture]:
    """Means joined, and the value of every seed as a point."""
    drawn = []
    for label, points in lines.items():
        points = sorted(points, key=lambda point: point[0])
        drawn.append(Line(label, [p for p, _ in points], [s.mean for _, s in points]))
        x_of, y_of = zip(*((p, value) for p, s in points for value in s.values), strict=True)
        drawn.append(Line(label, x_of, y_of, is_scatter=True))
    if drawn:
        is_log_x = all(min(line.x) > 0 for line in drawn)
        yield Picture(title, x, f"force RMSE, {UNIT}", tuple(drawn), is_log_x, is_log_y=True)


Points = dict[Group, tuple[float, float]]


def _forgetting(
    groups: Sequence[Grouped], targets: Sequence[str], bases: Sequence[str]
) -> Iterator[Picture]:
    """What was lost against what was gained, and who is beaten by nobody in both."""
    for target in targets:
        for base in bases:
            points: Points = {}
            for found in groups:
                gained, lost = found.get(target, ERROR), found.get(base, LOST)
                if gained is not None and lost is not None:
                    points[found.group] = (gained.mean, lost.mean)
            title = f"{target}: forgetting against accuracy"
            axes = f"force RMSE, {UNIT}", f"{base}: force RMSE after / before"
            yield from _fronts(title, axes, points)


def _thrift(groups: Sequence[Grouped], targets: Sequence[str]) -> Iterator[Picture]:
    """Error against how much of the model is changed, and against how many numbers train."""
    for target in targets:
        for quantity, axis in (("changed", "changed numbers, %"), ("trained", "trained numbers")):
            points: Points = {}
            for found in groups:
                spent, error = found.get("", quantity), found.get(target, ERROR)
                if spent is not None and spent.mean > 0 and error is not None:
                    points[found.group] = (spent.mean, error.mean)
            if len({x for x, _ in points.values()}) > 1:
                title = f"{target}: accuracy against {axis.partition(',')[0]}"
                yield from _fronts(title, (axis, f"force RMSE, {UNIT}"), points)


def _fronts(title: str, axes: tuple[str, str], points: Points) -> Iterator[Picture]:
    """A point per group, those that differ in numbers joined, and the front of all."""
    if not points:
        return
    named = {_name(group): point for group, point in points.items()}
    front = [named[name] for name in pareto_front(named)]
    drawn = [Line("Pareto front", *_transposed(front), is_reference=True)]
    families: dict[str, list[tuple[float, float]]] = {}
    for group, point in points.items():
        families.setdefault(_family(group), []).append(point)
    for label, members in families.items():
        drawn.append(Line(label, *_transposed(members)))
        drawn.append(Line(label, *_transposed(members), is_scatter=True))
    yield Picture(title, *axes, tuple(drawn), is_log_x=True, is_log_y=True)


def _transposed(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _family(group: Group) -> str:
    """What groups have in common that differ in numbers alone."""
    named = tuple(pair for pair in group.varied if not _is_number(pair[1]))
    return Group(group.dataset, group.recipe, named, None).label


def _name(group: Group) -> str:
    return group.label + ("" if group.size is None else f", {group.size} frames")
