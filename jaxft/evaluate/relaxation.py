"""Many structures relaxed in step: ASE's optimisers and cell filter, one batch of forces per step.

Each structure has an optimiser of its own; what is shared is the evaluation. So every path is the
one that ASE alone would take, and a potential of ours computes a whole batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ase
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii
from ase.filters import FrechetCellFilter
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS, FIRE, LBFGS

from jaxft.evaluate.candidate import Candidate, Flag, JaxCandidate, Outcome
from jaxft.evaluate.predictions import ase_results

OPTIMIZERS: dict[str, Any] = {"FIRE": FIRE, "LBFGS": LBFGS, "BFGS": BFGS}

StopFn = Callable[[ase.Atoms], str | None]
"""Why a relaxation is not worth another step, or None."""

COLLAPSED, VANISHED = 0.2, 0.1
"""No relaxation goes on with atoms closer than this part of their covalent radii's sum, or in so
little of their covalent spheres' volume."""

NO_STRESS = "there is no stress, so the cell cannot be relaxed"


@dataclass(frozen=True, eq=False)
class Relaxed:
    """Where a relaxation ended."""

    atoms: ase.Atoms
    """With its results, or without a calculator where there are none."""
    steps: int
    fmax: float | None
    """eV/Å, the largest of forces and cell gradient per atom; None without a result there."""
    flag: str | None
    """Why it is not converged."""

    @property
    def is_converged(self) -> bool:
        """The largest force is below the limit."""
        return self.flag is None

    @property
    def energy(self) -> float | None:
        """eV, total, of :attr:`atoms`; None without a result there."""
        return None if self.atoms.calc is None else float(self.atoms.get_potential_energy())


def relax(
    candidate: Candidate,
    structures: Sequence[ase.Atoms],
    *,
    fmax: float = 0.05,
    steps: int = 500,
    cell: bool = True,
    pressure: float = 0.0,
    optimizer: str = "FIRE",
    stop: StopFn | None = None,
) -> list[Relaxed]:
    """Relax ``structures``, all at once; what fails is flagged and the others go on.

    Args:
      candidate: gives forces and stresses.
      structures: start from here; they are not changed. Those that are not periodic in three
        directions keep their cells.
      fmax: eV/Å, the limit of ASE's optimisers; with a cell, also of its gradient per atom.
      steps: of the optimiser, at most.
      cell: relax cells too, in ASE's :class:`~ase.filters.FrechetCellFilter`.
      pressure: eV/Å³, on cells that are relaxed.
      optimizer: one of ``OPTIMIZERS``.
      stop: looked at before every step; for what would only waste time, like a collapse.

    Raises:
      ValueError: an optimiser that is not known, or limits that are not positive.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {optimizer!r} is not known; use {', '.join(OPTIMIZERS)}.")
    if fmax <= 0 or steps < 1:
        raise ValueError(f"fmax={fmax} and steps={steps} must be positive; give others.")
    jobs = [_Job(s, cell=cell, pressure=pressure, optimizer=optimizer) for s in structures]
    active = list(jobs)
    judge = candidate.steady() if isinstance(candidate, JaxCandidate) else candidate
    while active:
        # Batches keep their size while structures finish: no shape of fewer is compiled.
        size = min(len(jobs), max(len(active), getattr(candidate, "batch_size", 1)))
        rest = [job for job in jobs if job.is_done and job.flag is None]
        batch = [*active, *rest[: size - len(active)]]
        outcomes = judge.evaluate([job.atoms for job in batch])
        for job, outcome in zip(active, outcomes[: len(active)], strict=True):
            job.advance(outcome, fmax, steps, stop)
        active = [job for job in active if not job.is_done]
    return [Relaxed(job.atoms, job.steps, job.fmax, job.flag) for job in jobs]


@dataclass(eq=False)
class _Job:
    start: ase.Atoms
    cell: bool
    pressure: float
    optimizer: str
    steps: int = 0
    fmax: float | None = None
    flag: str | None = None
    is_done: bool = False
    atoms: ase.Atoms = field(init=False)
    _inner: Any = field(init=False)

    def __post_init__(self) -> None:
        self.atoms = self.start.copy()
        self.cell = self.cell and bool(self.atoms.pbc.all())
        target: Any = self.atoms
        if self.cell:
            target = FrechetCellFilter(self.atoms, scalar_pressure=self.pressure)
        self._inner = OPTIMIZERS[self.optimizer](target, logfile=None)

    def advance(self, outcome: Outcome, fmax: float, steps: int, stop: StopFn | None) -> None:
        """Take the results of where it is; move, unless it is done."""
        if isinstance(outcome, Flag):
            self.atoms.calc, self.fmax = None, None
            return self._end(self._after(outcome.reason))
        self.atoms.calc = SinglePointCalculator(self.atoms, **ase_results(outcome))
        if self.cell and outcome.stress is None:
            return self._end(NO_STRESS)
        gradient = self._inner.optimizable.get_gradient()
        self.fmax = float(np.linalg.norm(gradient.reshape(-1, 3), axis=1).max())
        if self.fmax < fmax:
            return self._end(None)
        if reason := stop(self.atoms) if stop is not None else None:
            return self._end(self._after(reason))
        if self.steps == steps:
            return self._end(f"not converged in {steps} steps: {self.fmax:.3g} eV/Å are left")
        self._inner.step()
        self.steps += 1
        return None

    def _after(self, reason: str) -> str:
        return f"{reason} (after {self.steps} steps)" if self.steps else reason

    def _end(self, flag: str | None) -> None:
        self.flag, self.is_done = flag, True


def collapse(atoms: ase.Atoms) -> str | None:
    """Why a structure is none any more, see ``COLLAPSED``; None if it is one."""
    spheres = 4 / 3 * np.pi * covalent_radii[atoms.numbers] ** 3
    if atoms.pbc.all() and volume_per_atom(atoms) < VANISHED * spheres.mean():
        return "the cell collapsed"
    if closeness(atoms, most=2 * COLLAPSED) < COLLAPSED:
        return "atoms fell onto each other"
    return None


def closeness(atoms: ase.Atoms, *, most: float = 1.0) -> float:
    """The smallest distance over the sum of the two covalent radii, images included.

    Returns:
      ``most`` if no pair is closer than that.
    """
    radii = covalent_radii[atoms.numbers]
    i, j, distance = neighbor_list("ijd", atoms, most * radii)
    return float((distance / (radii[i] + radii[j])).min(initial=most))


def no_crystal(atoms: ase.Atoms) -> str | None:
    """Why a structure has no volume; None if it has one."""
    if not atoms.pbc.all() or atoms.cell.rank < 3:
        return "it is not periodic in three directions and has no volume"
    return None


def volume_per_atom(atoms: ase.Atoms) -> float:
    """Å³."""
    return float(abs(np.linalg.det(atoms.cell.array)) / len(atoms))
