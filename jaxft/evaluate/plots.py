"""Pictures of predictions against labels. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.units import GPa

from jaxft.bundle import refuse_existing
from jaxft.data import Frame, magnitudes
from jaxft.evaluate.predictions import FrameResult
from jaxft.evaluate.svg import inline, new_figure

FORMATS = (".png", ".pdf", ".svg")
"""Of a picture, by its suffix."""

COLOURS = ("#d1873b", "#2a6fb0", "#4b8f5a", "#8a5aa5")
"""Of the models, in the order given."""

TITLES = {
    "energy": "energy per atom",
    "forces": "force components",
    "stress": "stress components",
    "moments": "magnetic moments",
}


@dataclass(frozen=True, eq=False)
class _Panel:
    """One quantity: labels, and each model's predictions, in the same order."""

    title: str
    unit: str
    error_unit: str
    error_factor: float
    reference: np.ndarray
    predicted: Mapping[str, np.ndarray]


def parity_plot(
    frames: Sequence[Frame], results: Mapping[str, Sequence[FrameResult]], path: str | Path
) -> Path:
    """Draw predictions and their errors against labels, one column per labelled quantity.

    Energies per atom are total energies, as in the labels: no isolated-atom energy and no shift
    is removed.

    Args:
      frames: structures with labels.
      results: ``{name of a model: its results}``; ``{"before": …, "after": …}`` overlays two.
      path: of the picture; its suffix gives the format (``.png``, ``.pdf``, ``.svg``).

    Returns:
      The path.

    Raises:
      ValueError: no frame has a label, or no results are given, or too many to tell apart.
      ImportError: matplotlib is not installed.
    """
    panels = _panels(frames, results)
    path = Path(path)
    check_picture(path)
    _figure(panels).savefig(path, dpi=160)
    return path


def parity_svg(
    frames: Sequence[Frame], results: Mapping[str, Sequence[FrameResult]], *, ids: str
) -> str:
    """The picture of :func:`parity_plot` as an element for a page, see :mod:`jaxft.evaluate.svg`.

    Raises:
      ValueError, ImportError: as :func:`parity_plot`.
    """
    panels = _panels(frames, results)
    return inline(lambda: _figure(panels), ids=ids, label="predictions against labels")


def check_picture(path: Path) -> None:
    """Raises FileExistsError or ValueError if a plot cannot be written to ``path``."""
    refuse_existing(path)
    if path.suffix not in FORMATS or not path.parent.is_dir():
        raise ValueError(
            f"{path} cannot be written; give a name ending in {', '.join(FORMATS)} in a folder "
            "that exists."
        )


def _panels(frames: Sequence[Frame], results: Mapping[str, Sequence[FrameResult]]) -> list[_Panel]:
    if not 1 <= len(results) <= len(COLOURS):
        raise ValueError(f"{len(results)} sets of results were given; give 1 to {len(COLOURS)}.")
    energy = [i for i, frame in enumerate(frames) if frame.energy is not None]
    forces = [i for i, frame in enumerate(frames) if frame.forces is not None]
    stress = [i for i, f in enumerate(frames) if f.stress is not None and f.is_periodic]
    has_head = all(r.moments is not None for items in results.values() for r in items)
    moments = [i for i, f in enumerate(frames) if f.moments is not None and has_head]

    def panel(name: str, unit: str, errors: tuple[str, float], chosen: list[int]) -> _Panel:
        def joined(items: Sequence[Frame] | Sequence[FrameResult]) -> np.ndarray:
            values = [_values(items[i], name, len(frames[i])) for i in chosen]
            return np.concatenate(values)

        predicted = {model: joined(items) for model, items in results.items()}
        return _Panel(TITLES[name], unit, *errors, joined(frames), predicted)

    found = []
    if energy:
        found.append(panel("energy", "eV/atom", ("meV/atom", 1e3), energy))
    if forces:
        found.append(panel("forces", "eV/Å", ("meV/Å", 1e3), forces))
    if stress:
        found.append(panel("stress", "GPa", ("GPa", 1.0), stress))
    if moments:
        found.append(panel("moments", "µB", ("mµB", 1e3), moments))
    if not found:
        raise ValueError("none of the frames has a label to compare with; check the label keys.")
    return found


def _values(item: Frame | FrameResult, name: str, count: int) -> np.ndarray:
    """Flat, in the panel's unit."""
    if name == "moments":
        return magnitudes(np.asarray(item.moments))
    factor = {"energy": 1 / count, "forces": 1.0, "stress": 1 / GPa}[name]
    return np.ravel(getattr(item, name)) * factor


def _figure(panels: Sequence[_Panel]) -> Any:
    width, height = 4.2, 6.2
    figure = new_figure(width * len(panels), height)
    grid = figure.subplots(2, len(panels), squeeze=False, height_ratios=(3, 1.3))
    for (parity, residual), panel in zip(grid.T, panels, strict=True):
        _draw_parity(parity, panel)
        _draw_errors(residual, panel)
    figure.align_ylabels(grid)
    return figure


def _draw_parity(axes: Any, panel: _Panel) -> None:
    everything = np.concatenate([panel.reference, *panel.predicted.values()])
    limits = _limits(everything)
    axes.plot(limits, limits, color="0.5", linewidth=0.8, zorder=1)
    for colour, (name, predicted) in zip(COLOURS, panel.predicted.items(), strict=False):
        rmse = panel.error_factor * np.sqrt(np.mean((predicted - panel.reference) ** 2))
        axes.scatter(
            panel.reference,
            predicted,
            **_marker(panel.reference.size, colour),
            label=f"{name}: RMSE {rmse:.3g} {panel.error_unit}",
        )
    axes.set(
        xlim=limits,
        ylim=limits,
        xlabel=f"reference, {panel.unit}",
        ylabel=f"model, {panel.unit}",
        aspect="equal",
    )
    axes.set_title(f"{panel.title} ({panel.reference.size} values)", fontsize=10)
    axes.locator_params(nbins=6)
    axes.yaxis.set_major_locator(axes.xaxis.get_major_locator())
    axes.ticklabel_format(useOffset=False)
    legend = axes.legend(loc="upper left", fontsize=7.5, frameon=True, handletextpad=0.3)
    for handle in legend.legend_handles:
        handle.set_alpha(1.0)
        handle.set_sizes([16])


def _draw_errors(axes: Any, panel: _Panel) -> None:
    axes.axhline(0.0, color="0.5", linewidth=0.8, zorder=1)
    for colour, predicted in zip(COLOURS, panel.predicted.values(), strict=False):
        error = panel.error_factor * (predicted - panel.reference)
        axes.scatter(panel.reference, error, **_marker(panel.reference.size, colour))
    axes.set(
        xlim=_limits(np.concatenate([panel.reference, *panel.predicted.values()])),
        xlabel=f"reference, {panel.unit}",
        ylabel=f"model − reference,\n{panel.error_unit}",
    )
    axes.locator_params(nbins=6)
    axes.ticklabel_format(useOffset=False)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """A common range of both axes; not finite predictions are outside any picture."""
    values = values[np.isfinite(values)]
    low, high = values.min(), values.max()
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _marker(count: int, colour: str) -> dict[str, Any]:
    """Smaller and fainter the more points there are."""
    size = float(np.clip(12000 / count, 5, 18))
    alpha = float(np.clip(1200 / count, 0.3, 0.8))
    return {
        "s": size,
        "alpha": alpha,
        "color": colour,
        "linewidths": 0,
        "rasterized": True,
        "zorder": 2,
    }
