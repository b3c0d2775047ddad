"""How stiff a Fisher makes each part of a model: what to know before choosing λ of EWC."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxft import tree
from jaxft.strategies.ewc import Fisher
from jaxft.strategies.l2sp import check_strength
from jaxft.typing import Params

EMBEDDINGS = ("node_embedding", "joint_embedding", "embedding_readout")
LAYER = re.compile(r"(interactions|products|readouts)_(\d+)")

DECADES = 2
"""Of the suggested sweep, on each side of the λ that makes the mean curvature one."""

BAR = 40
"""Characters of the longest bar."""


SHOWN = 12
"""Decades below the largest with a row of their own."""


@dataclass(frozen=True)
class Spread:
    """How F is distributed over the numbers of a group of leaves."""

    numbers: int
    zero: float
    """Fraction of the numbers with F = 0, which move freely."""
    min: float
    median: float
    mean: float
    max: float
    unit_mean: float | None
    """λ at which the mean curvature λF is 1, that of ``l2sp(1.0)``; None if all F are zero."""
    unit_median: float | None
    """λ at which the median of the curvatures that are not zero is 1."""
    histogram: dict[int, int]
    """``{k: numbers with 10ᵏ <= F < 10ᵏ⁺¹}``, of λF where a strength was given; zeros left out."""


@dataclass(frozen=True)
class Calibration:
    """What λ means with a given Fisher: the penalty has the curvature λF in each parameter."""

    strength: float | None
    groups: dict[str, Spread]
    """By group of leaves, in the order of the model; the last is ``total``."""
    sweep: tuple[float, ...]
    """Strengths worth trying: decades about the one that makes the mean curvature one."""
    provenance: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; decades become strings."""
        groups = {name: asdict(spread) for name, spread in self.groups.items()}
        for group in groups.values():
            group["histogram"] = {str(k): count for k, count in group["histogram"].items()}
        return {
            "strength": self.strength,
            "sweep": list(self.sweep),
            "groups": groups,
            "provenance": dict(self.provenance),
        }

    def render(self) -> Group:
        """For a terminal; rich prints it."""
        strengths = ", ".join(f"{strength:.0e}" for strength in self.sweep)
        return Group(_table(self.groups), _bars(self), Text(f"suggested sweep of λ: {strengths}"))


def calibration(fisher: Fisher | Params, strength: float | None = None) -> Calibration:
    """The distribution of F, and of λF, over the parts of a model.

    The penalty of :func:`jaxft.strategies.ewc` has curvature λF: with λF far below the curvature of
    the data's loss a parameter is free, far above it is pinned. That of the loss is not known here,
    so λ has to be scanned; this says where to begin and what a λ of the literature would do.

    Args:
      fisher: F, from :func:`jaxft.fisher` or :func:`jaxft.fisher.sampled`, or a tree of them.
      strength: λ, whose curvatures are to be counted.

    Raises:
      ValueError: F is not a Fisher, or the strength is negative, not finite or zero.

    Example:
      >>> found = calibration({"readouts_0": {"linear": {"0e": np.array([0.0, 1e-4, 3e-4])}}})
      >>> found.groups["readouts.0"].histogram, found.sweep
      ({-4: 2}, (100.0, 1000.0, 10000.0, 100000.0, 1000000.0))
    """
    if strength is not None:
        check_strength(strength, "calibration")
        if strength == 0:
            raise ValueError("calibration(strength=0) has no curvature; use None for that of F.")
    known = fisher if isinstance(fisher, Fisher) else Fisher(fisher)
    groups: dict[str, list[np.ndarray]] = {}
    for path, leaf in tree.flatten(known.values).items():
        groups.setdefault(group_of(path), []).append(np.asarray(leaf, np.float64).ravel())
    flat = {name: np.concatenate(leaves) for name, leaves in groups.items()}
    flat["total"] = np.concatenate(list(flat.values()))
    spreads = {name: _spread(values, strength or 1.0) for name, values in flat.items()}
    centre = round(-math.log10(spreads["total"].mean))
    sweep = tuple(10.0**k for k in range(centre - DECADES, centre + DECADES + 1))
    return Calibration(strength, spreads, sweep, known.provenance)


def group_of(path: str) -> str:
    """``embedding``, ``interactions.0``, … of a leaf; the first name of any other."""
    first = path.split("/")[0]
    if first in EMBEDDINGS:
        return "embedding"
    match = LAYER.fullmatch(first)
    return f"{match[1]}.{match[2]}" if match else first


def _spread(values: np.ndarray, strength: float) -> Spread:
    positive = values[values > 0]
    decades = np.floor(np.log10(positive) + math.log10(strength)).astype(int)
    histogram = dict(zip(*(a.tolist() for a in np.unique(decades, return_counts=True))))
    has_any = positive.size > 0
    return Spread(
        numbers=values.size,
        zero=1.0 - positive.size / values.size,
        min=float(values.min()),
        median=float(np.median(values)),
        mean=float(values.mean()),
        max=float(values.max()),
        unit_mean=float(1 / values.mean()) if has_any else None,
        unit_median=float(1 / np.median(positive)) if has_any else None,
        histogram=histogram,
    )


def _table(groups: Mapping[str, Spread]) -> Table:
    table = Table(title="Fisher information by group of leaves", title_justify="left")
    table.add_column("group")
    for heading in ("numbers", "zero %", "median", "mean", "max", "1 / mean"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, s in groups.items():
        numbers = (s.median, s.mean, s.max, s.unit_mean)
        cells = ["–" if number is None else f"{number:.1e}" for number in numbers]
        table.add_row(name, f"{s.numbers:,}", f"{100 * s.zero:.1f}", *cells)
    return table


def _bars(found: Calibration) -> Table:
    """How many numbers of the whole model lie in each decade."""
    what = "F" if found.strength is None else f"λF, λ = {found.strength:g}"
    table = Table(title=f"numbers by decade of {what}", title_justify="left", box=None)
    table.add_column("from", justify="right")
    table.add_column("numbers", justify="right")
    table.add_column("")
    counts = found.groups["total"].histogram
    top, last = max(counts), max(max(counts) - SHOWN, min(counts))

    def row(label: str, count: int) -> None:
        table.add_row(label, f"{count:,}", "█" * math.ceil(BAR * count / max(counts.values())))

    for decade in range(top, last - 1, -1):
        row(f"1e{decade:+03d}", counts.get(decade, 0))
    if below := sum(count for decade, count in counts.items() if decade < last):
        row("below", below)
    return table
