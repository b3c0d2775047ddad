"""How well a trajectory conserves its energy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxft.md.trajectory import Trajectory


@dataclass(frozen=True)
class Drift:
    """Of the total energy at constant energy."""

    slope: float
    """meV/atom/ps, of a straight line."""
    fluctuation: float
    """meV/atom, root mean square about that line."""


def drift(trajectory: Trajectory) -> Drift:
    """By least squares over all frames.

    Raises:
      ValueError: fewer than three frames.
    """
    if len(trajectory) < 3:
        raise ValueError(f"{len(trajectory)} frames show no drift; run longer.")
    energies = 1000 * (trajectory.total - trajectory.total[0]) / len(trajectory.start)
    line = np.polyfit(trajectory.times, energies, 1)
    rest = energies - np.polyval(line, trajectory.times)
    return Drift(float(line[0]), float(np.sqrt((rest**2).mean())))
