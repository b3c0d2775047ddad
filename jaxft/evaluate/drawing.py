"""Pictures of a finding as SVG elements of a page. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxft.evaluate.curves import OTHERS, STYLES
from jaxft.evaluate.finding import Line, Picture
from jaxft.evaluate.svg import inline, literal, new_figure

COLOURS = ("#2a6fb0", "#d1873b", *OTHERS)
REFERENCE = "0.55"
WIDTH, HEIGHT = 5.2, 3.6
"""Inches."""
EXPLODED, USUAL = 1e6, 1e3
"""What is so many times larger than usual, on a diagonal than any reference, is not drawn."""
BEYOND = " (partly beyond the picture)"
CROWDED, BESIDE = 5, 2.2
"""Names beyond which the legend stands beside the picture, and the inches that it takes there."""
PLAIN = (0.9, 1e4)
"""A logarithmic axis between these has numbers without powers."""
FEW = 3
"""Points that are drawn large."""


def picture_svg(picture: Picture, *, ids: str) -> str:
    """An ``<svg>`` element, or nothing where no line has a point that can be drawn.

    Args:
      picture: what to draw; points that are not finite leave gaps.
      ids: as in :func:`jaxft.evaluate.svg.inline`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    if not any(_finite(line) for line in picture.lines):
        return ""
    return inline(lambda: _figure(picture), ids=ids, label=f"{picture.title}: {picture.y}")


def _finite(line: Line) -> bool:
    return bool(np.isfinite(np.asarray(line.y, np.float64)).any())


def _figure(picture: Picture) -> Any:
    picture = _in_scale(picture)
    names = list(dict.fromkeys(line.label for line in picture.lines if not line.is_reference))
    is_crowded = len(names) > CROWDED
    figure = new_figure(WIDTH + (BESIDE if is_crowded else 0), HEIGHT)
    axes = figure.subplots()
    for line in picture.lines:
        axes.plot(np.asarray(line.x), np.asarray(line.y), **_look(line, names))
    if picture.diagonal:
        ends = _range([v for line in picture.lines for v in (line.x, line.y)])
        axes.plot(ends, ends, color="0.5", linewidth=0.8, zorder=0)
    if picture.is_log_x:
        axes.set_xscale("log")
        _plain(axes.xaxis)
    if picture.is_log_y:
        axes.set_yscale("log")
        _plain(axes.yaxis)
    if picture.ticks:
        axes.set_xticks(list(picture.ticks.values()), [literal(name) for name in picture.ticks])
        for place in picture.ticks.values():
            axes.axvline(place, color="0.5", linewidth=0.6, zorder=0)
    axes.set_title(literal(picture.title), fontsize=9.5)
    axes.set_xlabel(literal(picture.x), fontsize=8.5)
    axes.set_ylabel(literal(picture.y), fontsize=8.5)
    axes.tick_params(labelsize=8, which="both")
    axes.grid(color="0.5", alpha=0.25, linewidth=0.5)
    if any(line.label for line in picture.lines):
        handles, labels = axes.get_legend_handles_labels()
        first = dict(zip(reversed(labels), reversed(handles), strict=True))  # a name appears once
        axes.legend(
            list(reversed(first.values())),
            list(reversed(first)),
            fontsize=7.5,
            frameon=False,
            **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if is_crowded else {}),
        )
    return figure


def _plain(axis: Any) -> None:
    """200 in place of 2 x 10², where numbers are neither small nor large."""
    from matplotlib.ticker import LogFormatter

    low, high = sorted(axis.get_view_interval())
    if low > PLAIN[0] and high < PLAIN[1]:
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter())


def _in_scale(picture: Picture) -> Picture:
    """Without the points of a model that exploded, beside which nothing else could be seen; its
    name says so. As it is where nothing else is there, or on a logarithmic axis."""
    most = EXPLODED * USUAL
    if picture.diagonal:
        most = EXPLODED * (max(abs(v) for v in _range([li.x for li in picture.lines])) or USUAL)
    heights = [np.abs(np.asarray(line.y, np.float64)) for line in picture.lines]
    far = {li.label for li, y in zip(picture.lines, heights, strict=True) if (y > most).any()}
    if picture.is_log_y or not far or not any((y <= most).any() for y in heights):
        return picture
    lines = (
        replace(
            line,
            y=np.where(y > most, np.nan, line.y),
            label=line.label + BEYOND if line.label in far else line.label,
        )
        for line, y in zip(picture.lines, heights, strict=True)
    )
    return replace(picture, lines=tuple(lines))


def _look(line: Line, names: Sequence[str]) -> dict[str, Any]:
    rank = 0 if line.is_reference else names.index(line.label)
    return {
        "label": literal(line.label) if line.label else None,
        "color": REFERENCE if line.is_reference else COLOURS[rank % len(COLOURS)],
        "linestyle": "" if line.is_scatter else STYLES[rank // len(COLOURS) % len(STYLES)],
        "linewidth": 2.2 if line.is_reference else 1.3,
        "marker": "o" if line.is_scatter else "",
        "markersize": 3 if len(line.x) > FEW else 6,
        "zorder": 1 if line.is_reference else 2,
    }


def _range(values: Sequence[Any]) -> tuple[float, float]:
    every = np.concatenate([np.asarray(v, np.float64).ravel() for v in values])
    every = every[np.isfinite(every)]
    low, high = (float(every.min()), float(every.max())) if every.size else (0.0, 1.0)
    return (low, high) if math.isfinite(high - low) else (0.0, 1.0)
