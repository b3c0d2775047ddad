"""What a simulation leaves: the frames of one replica, and why there are no more."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase import units
from ase.calculators.singlepoint import SinglePointCalculator


@dataclass(frozen=True)
class Ended:
    """A replica stopped before the others."""

    time: float
    """ps, of the step that could not be."""
    reason: str


@dataclass(frozen=True, eq=False)
class Trajectory:
    """F frames of one replica with n atoms; frame 0 is the start.

    Positions are never wrapped into the cell.
    """

    start: ase.Atoms
    times: np.ndarray
    """[F] ps."""
    positions: np.ndarray
    """[F, n, 3] Å."""
    velocities: np.ndarray
    """[F, n, 3] in ``ase.units``."""
    cells: np.ndarray
    """[F, 3, 3] Å."""
    potential: np.ndarray
    """[F] eV, isolated-atom energies included."""
    kinetic: np.ndarray
    """[F] eV."""
    temperature: np.ndarray
    """[F] K."""
    pressure: np.ndarray
    """[F] GPa, kinetic part included; NaN unless periodic in three directions."""
    ended: Ended | None = None
    steps: int = 0
    """Done, of all that were asked for."""

    def __len__(self) -> int:
        return len(self.times)

    @property
    def total(self) -> np.ndarray:
        """[F] eV, kinetic and potential energy."""
        return self.potential + self.kinetic

    @property
    def survival(self) -> float:
        """ps, until the end or to the last frame."""
        if self.ended is not None:
            return self.ended.time
        return float(self.times[-1]) if len(self) else 0.0

    @property
    def interval(self) -> float:
        """ps between frames.

        Raises:
          ValueError: there are fewer than two.
        """
        if len(self) < 2:
            raise ValueError(f"a trajectory of {len(self)} frames has no interval; run it longer.")
        return float(self.times[1] - self.times[0])

    def unstrained(self) -> np.ndarray:
        """[F, n, 3] Å: positions as in the mean cell, without the motion that is the cell's own."""
        if not self.start.pbc.all() or np.ptp(self.cells, axis=0).max(initial=0.0) == 0:
            return self.positions
        fractional = np.linalg.solve(
            self.cells.transpose(0, 2, 1)[:, None], self.positions[..., None]
        )[..., 0]
        return np.asarray(fractional @ self.cells.mean(0))

    def atoms(self, frame: int) -> ase.Atoms:
        """A frame with velocities and energy."""
        atoms = self.start.copy()
        atoms.set_cell(self.cells[frame])
        atoms.positions = self.positions[frame]
        atoms.set_velocities(self.velocities[frame])
        atoms.info["time_ps"] = float(self.times[frame])
        atoms.calc = SinglePointCalculator(atoms, energy=float(self.potential[frame]))
        return atoms

    def write(self, path: Path, *, stride: int = 1) -> int:
        """Every ``stride``-th frame as extended XYZ; returns how many.

        Raises:
          FileExistsError: there is something at ``path``.
          ValueError: a stride below 1.
        """
        if stride < 1:
            raise ValueError(f"stride={stride} is not possible; use 1 for all frames, or more.")
        chosen = range(0, len(self), stride)
        with open(path, "x") as file:
            for frame in chosen:
                ase.io.write(file, self.atoms(frame), format="extxyz")
        return len(chosen)


@dataclass(eq=False)
class Recorder:
    """Collects frames of one replica."""

    start: ase.Atoms
    degrees: int
    """Of freedom, that the temperature is a mean over."""
    frames: list[tuple[np.ndarray | float, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.masses = self.start.get_masses()

    def add(
        self,
        time: float,
        positions: np.ndarray,
        velocities: np.ndarray,
        cell: np.ndarray,
        potential: float,
        stress: np.ndarray | None,
    ) -> None:
        """A frame at ``time`` (ps), its energy in eV, its stress [3, 3] in eV/Å³ with ASE's sign,
        without the kinetic part."""
        kinetic = 0.5 * float((self.masses * (velocities**2).sum(1)).sum())
        temperature = 2 * kinetic / (max(self.degrees, 1) * units.kB)
        pressure = np.nan
        if stress is not None:
            volume = abs(np.linalg.det(cell))
            pressure = (2 * kinetic / (3 * volume) - np.trace(stress) / 3) / units.GPa
        self.frames.append(
            (time, positions, velocities, cell, potential, kinetic, temperature, pressure)
        )

    def trajectory(self, ended: Ended | None, steps: int) -> Trajectory:
        """Of all frames so far."""
        n = len(self.start)
        shapes = ((), (n, 3), (n, 3), (3, 3), (), (), (), ())
        columns = [
            np.array([frame[k] for frame in self.frames]).reshape(-1, *shape)
            for k, shape in enumerate(shapes)
        ]
        times, positions, velocities, cells, potential, kinetic, temperature, pressure = columns
        return Trajectory(
            self.start,
            times,
            positions,
            velocities,
            cells,
            potential,
            kinetic,
            temperature,
            pressure,
            ended,
            steps,
        )
