"""Which replicas molecular dynamics runs for a check, and how: in batches, or through ASE."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import ase
import numpy as np

from jaxft.evaluate.candidate import Candidate, JaxCandidate
from jaxft.md.ensembles import Ensemble, bussi, ensemble_of, thermal
from jaxft.md.limits import Limits
from jaxft.md.serial import run_serial
from jaxft.md.simulation import Simulation
from jaxft.md.trajectory import Recorder, Trajectory

MOST_SEED = 1 << 31


@dataclass(frozen=True)
class Plan:
    """How long, how hot, and what is kept.

    Args:
      ensemble: ``nve``, ``langevin``, ``bussi`` or ``npt``.
      temperatures: K; every structure runs at each.
      pressure: GPa, of ``npt``.
      timestep: fs.
      steps: of production.
      equilibration: steps before, with Bussi's thermostat at fixed volume (``npt``: at the
        pressure), which no number of the result sees but survival.
      replicas: of every structure and temperature, which differ in velocities and noise.
      interval: steps between the frames that are looked at.
      element: whose diffusion is measured; by default all atoms alike.
      seed: of velocities and noise.
      skin: Å, of the lists.
      limits: that end a replica.
    """

    ensemble: str = "nve"
    temperatures: Sequence[float] = (300.0,)
    pressure: float = 0.0
    timestep: float = 1.0
    steps: int = 1000
    equilibration: int = 0
    replicas: int = 1
    interval: int = 5
    element: str | None = None
    seed: int = 0
    skin: float = 1.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for kelvin in self.temperatures:
            ensemble_of(self.ensemble, kelvin, self.pressure)
            bussi(kelvin)  # nve's temperature, that of its velocities, is checked too
        if not np.isfinite(self.pressure):
            raise ValueError(f"pressure={self.pressure} GPa is not possible; use a finite one.")
        counts = (self.steps, self.replicas, self.interval)
        if not self.temperatures or min(counts) < 1 or self.equilibration < 0:
            raise ValueError(
                f"{self.replicas} replicas, {len(self.temperatures)} temperatures, "
                f"{self.equilibration} + {self.steps} steps and a frame every {self.interval} are "
                "not possible; use at least one of each."
            )
        if len({f"{kelvin:g}" for kelvin in self.temperatures}) < len(self.temperatures):
            raise ValueError(
                f"temperatures {list(self.temperatures)} K are not all different; give each once, "
                "and replicas for more runs at one."
            )
        if not 0 <= self.seed < MOST_SEED:
            raise ValueError(
                f"seed={self.seed} is not possible; use one from 0 to {MOST_SEED - 1}."
            )
        if not 0 < self.timestep < np.inf or not self.skin > 0:
            raise ValueError(
                f"timestep={self.timestep} fs and skin={self.skin} Å are not possible; use "
                "positive numbers."
            )


class Job(NamedTuple):
    """One replica."""

    subject: str
    structure: str
    kelvin: float
    atoms: ase.Atoms
    seed: int


class Outcome(NamedTuple):
    """Replicas of one subject by one model."""

    replicas: list[Trajectory]
    seconds: float
    """Its share of the wall time, compilation included."""
    lists: int | None
    """Made after the first, of its last batch; None where ASE ran."""
    compilations: int | None


def names_of(structures: Sequence[ase.Atoms]) -> list[str]:
    """Names or formulas, numbered where they repeat.

    Raises:
      ValueError: a structure is called what another becomes by its number.
    """
    formulas = [str(atoms.info.get("name", atoms.get_chemical_formula())) for atoms in structures]
    names = [
        f"{name} #{formulas[: i + 1].count(name)}" if formulas.count(name) > 1 else name
        for i, name in enumerate(formulas)
    ]
    if len(set(names)) < len(names):
        raise ValueError(f"structures called {formulas} cannot be told apart; rename them.")
    return names


def jobs_of(structures: Sequence[ase.Atoms], plan: Plan) -> list[Job]:
    """Every structure at every temperature, as often as there are replicas, with velocities."""
    jobs: list[Job] = []
    for name, atoms in zip(names_of(structures), structures, strict=True):
        for kelvin in plan.temperatures:
            for _ in range(plan.replicas):
                seed = plan.seed + len(jobs)
                start = thermal(atoms, kelvin, seed=seed)
                jobs.append(Job(f"{name}, {kelvin:g} K", name, kelvin, start, seed))
    return jobs


def outcomes_of(
    candidate: Candidate,
    jobs: Sequence[Job],
    plan: Plan,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Outcome]:
    """By subject, in the order of the jobs."""
    found: dict[str, list[Outcome]] = {}
    size = candidate.batch_size if isinstance(candidate, JaxCandidate) else 1
    for first in range(0, len(jobs), size):
        batch = jobs[first : first + size]
        start = time.perf_counter()
        if isinstance(candidate, JaxCandidate):
            done, lists, shapes = _batched(candidate, batch, plan, progress)
        else:
            done, lists, shapes = [_serial(candidate, batch[0], plan, progress)], None, None
        seconds = time.perf_counter() - start
        for job, trajectory in zip(batch, done, strict=True):
            found.setdefault(job.subject, []).append(
                Outcome([trajectory], seconds / len(batch), lists, shapes)
            )
    return {
        subject: Outcome(
            [trajectory for part in parts for trajectory in part.replicas],
            sum(part.seconds for part in parts),
            parts[-1].lists,
            parts[-1].compilations,
        )
        for subject, parts in found.items()
    }


def _batched(
    candidate: JaxCandidate,
    batch: Sequence[Job],
    plan: Plan,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Trajectory], int, int]:
    simulation = Simulation(
        candidate.model,
        candidate.params,
        [job.atoms for job in batch],
        head=candidate.head,
        dtype=candidate.dtype,
        skin=plan.skin,
        limits=plan.limits,
        seeds=[job.seed for job in batch],
    )
    for steps, interval, ensembles in _phases(plan, [job.kelvin for job in batch]):
        done = simulation.run(
            ensembles,
            timestep=plan.timestep,
            steps=steps,
            interval=interval,
            progress=progress,
        )
    return done, simulation.rebuilds, simulation.compilations


def _serial(
    candidate: Candidate,
    job: Job,
    plan: Plan,
    progress: Callable[[int, int], None] | None,
) -> Trajectory:
    atoms, began = job.atoms, 0.0
    *before, last = _phases(plan, [job.kelvin])
    for phase in (*before, last):
        steps, interval, (ensemble,) = phase
        done = run_serial(
            candidate.ase_calculator(),
            atoms,
            ensemble,
            timestep=plan.timestep,
            steps=steps,
            interval=interval,
            seed=job.seed,
            limits=plan.limits,
            began=began,
            progress=progress,
        )
        if phase is not last:
            if done.ended is not None:
                return Recorder(job.atoms, 1).trajectory(done.ended, 0)
            atoms, began = done.atoms(-1), done.survival
    return done


def _phases(plan: Plan, temperatures: Sequence[float]) -> list[tuple[int, int, list[Ensemble]]]:
    """Steps, interval of frames and ensembles, of equilibration, if any, and of production."""
    production = [ensemble_of(plan.ensemble, kelvin, plan.pressure) for kelvin in temperatures]
    phases = [(plan.steps, plan.interval, production)]
    if plan.equilibration:
        before = (
            production if plan.ensemble == "npt" else [bussi(kelvin) for kelvin in temperatures]
        )
        phases.insert(0, (plan.equilibration, plan.equilibration, before))
    return phases
