"""Rattled and strained supercells at random, and those of them that fill a window of energies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import ase
import numpy as np
from scipy.linalg import expm


@dataclass(frozen=True)
class Ranges:
    """What is drawn, each uniformly in its range.

    Args:
      amplitude: Å, standard deviation of every component of the displacements.
      volume: of the cell, relative to the relaxed one.
      strain: largest component of a random strain that keeps the volume.
      window: eV/atom above the relaxed structure that energies fill uniformly.
      min_length: Å between opposite faces of the supercell.
    """

    amplitude: tuple[float, float] = (0.0, 0.15)
    volume: tuple[float, float] = (0.96, 1.04)
    strain: float = 0.01
    window: tuple[float, float] = (0.0, 0.05)
    min_length: float = 10.0

    def __post_init__(self) -> None:
        checks = {
            "amplitude": 0 <= self.amplitude[0] <= self.amplitude[1]
            and 0 < self.amplitude[1] < np.inf,
            "volume": 0 < self.volume[0] <= self.volume[1] < 8,
            "strain": 0 <= self.strain < 0.5,
            "window": 0 <= self.window[0] < self.window[1] < np.inf,
            "min_length": 0 < self.min_length < np.inf,
        }
        wrong = [f"{name}={getattr(self, name)}" for name, is_good in checks.items() if not is_good]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: not possible; give ranges that rise, amplitudes (Å), volumes "
                "(1 is as relaxed) and energies (eV/atom) that are not negative, strain below 0.5."
            )

    @property
    def changes_cells(self) -> bool:
        """Volume or shape are not always those of the relaxed structure."""
        return self.volume != (1.0, 1.0) or self.strain > 0


@dataclass(frozen=True, eq=False)
class Trial:
    """One rattled supercell and how it was made."""

    atoms: ase.Atoms
    amplitude: float
    """Å."""
    volume: float
    """Relative."""
    strain: np.ndarray
    """[3, 3], volume-preserving, symmetric."""


def trials_of(
    supercell: ase.Atoms, count: int, ranges: Ranges, draws: np.random.Generator
) -> Iterator[Trial]:
    for _ in range(count):
        amplitude = float(draws.uniform(*ranges.amplitude))
        volume = float(draws.uniform(*ranges.volume))
        strain = draws.uniform(-ranges.strain, ranges.strain, (3, 3))
        strain = (strain + strain.T) / 2
        strain -= np.trace(strain) / 3 * np.eye(3)
        atoms = supercell.copy()
        if ranges.changes_cells:
            # the exponential of a traceless strain has determinant 1
            deformation = volume ** (1 / 3) * expm(strain)
            atoms.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
        atoms.positions += draws.normal(scale=amplitude, size=atoms.positions.shape)
        yield Trial(atoms, amplitude, volume, strain)


def even(energies: np.ndarray, count: int, window: tuple[float, float]) -> list[int | None]:
    """Positions of ``count`` energies, one in each of so many equal parts of the window, each the
    nearest to the middle of its part; None where there is none. NaN is nowhere."""
    edges = np.linspace(*window, count + 1)
    chosen: list[int | None] = []
    for low, high in itertools.pairwise(edges):
        inside = np.flatnonzero((energies >= low) & (energies < high))
        nearest = np.abs(energies[inside] - (low + high) / 2)
        chosen.append(int(inside[nearest.argmin()]) if len(inside) else None)
    return chosen


def unevenness(energies: np.ndarray, window: tuple[float, float]) -> float:
    """Kolmogorov–Smirnov distance of energies from the uniform distribution over the window."""
    x = (np.sort(energies) - window[0]) / (window[1] - window[0])
    steps = np.arange(len(x) + 1) / len(x)
    return float(max((steps[1:] - x).max(), (x - steps[:-1]).max()))
