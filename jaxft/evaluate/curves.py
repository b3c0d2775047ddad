"""Learning curves of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.evaluate.svg import inline, literal, new_figure

History = Sequence[Mapping[str, float]]
"""A row per epoch, with ``epoch``, ``<set>/<metric>`` and others."""

PANELS = {
    "loss": ("loss", 1.0),
    "energy": ("energy RMSE, meV/atom", 1e3),
    "forces": ("force RMSE, meV/Å", 1e3),
    "stress": ("stress RMSE, meV/Å³", 1e3),
    "moments": ("moment RMSE, mµB", 1e3),
    "learning_rate": ("learning rate", 1.0),
}
"""Metrics with a panel: its title and the factor from eV, or µB."""

COLOURS = {"train": "#d1873b", "valid": "#2a6fb0"}
OTHERS = ("#4b8f5a", "#8a5aa5", "#b5485d", "#3b9c9c", "#8c7a3c", "#77838f")
STYLES = ("-", "--", ":", "-.")
"""Change after every round of colours."""

COLUMNS = 3
MANY = 40
"""Epochs; below, each is marked."""


def curves_svg(history: History, *, best: int | None = None, ids: str = "curves") -> str:
    """Losses, errors per set and the learning rate against the epoch, with logarithmic axes.

    Numbers that are not positive and finite have no place on such an axis and are left out; a panel
    without any is not drawn.

    Args:
      history: a row per epoch; errors in eV and Å.
      best: the epoch whose parameters were kept; a thin line.
      ids: as in :func:`jaxft.evaluate.svg.inline`.

    Returns:
      An ``<svg>`` element, or nothing where there is nothing to draw.

    Raises:
      ImportError: matplotlib is not installed.
    """
    panels = series(history)
    if not panels:
        return ""
    label = f"learning curves: {', '.join(PANELS[name][0] for name in panels)}"
    return inline(lambda: _figure(panels, best), ids=ids, label=label)


def series(history: History) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """``{metric: {set: (epochs, values)}}`` in the units of ``PANELS``."""
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for metric, (_, factor) in PANELS.items():
        for row in history:
            for key, value in row.items():
                name, _, last = key.rpartition("/")
                if last == metric and math.isfinite(value) and value > 0:
                    epochs, values = found.setdefault(metric, {}).setdefault(name, ([], []))
                    epochs.append(row["epoch"])
                    values.append(factor * value)
    return found


def _figure(panels: Mapping[str, Any], best: int | None) -> Any:
    from matplotlib.ticker import LogLocator

    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    figure = new_figure(3.6 * columns, 2.9 * rows)
    names = dict.fromkeys(name for lines in panels.values() for name in lines if name)
    others = [name for name in names if name not in COLOURS]
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (metric, lines) in zip(grid.flat, panels.items(), strict=False):
        for name, (epochs, values) in lines.items():
            axes.plot(epochs, values, **_look(name, others, len(epochs)))
        if best is not None:
            axes.axvline(best, color="0.5", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_title(PANELS[metric][0], fontsize=9.5)
        axes.set_xlabel("epoch", fontsize=8.5)
        axes.tick_params(labelsize=8, which="both")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="0.5", alpha=0.25, linewidth=0.5)
        if any(lines):
            axes.legend(fontsize=7.5, frameon=False)
    return figure


def _look(name: str, others: Sequence[str], count: int) -> dict[str, Any]:
    rank = others.index(name) if name in others else 0
    return {
        "label": literal(name),
        "color": COLOURS.get(name, OTHERS[rank % len(OTHERS)] if name else "0.5"),
        "linestyle": STYLES[rank // len(OTHERS) % len(STYLES)],
        "linewidth": 1.4,
        "marker": "o" if count < MANY else "",
        "markersize": 2.5,
    }
