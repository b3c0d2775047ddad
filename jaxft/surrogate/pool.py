"""The pool: structures that the teacher's own motion, rattling and strain make, and its labels.

Structures are dropped, in this order and counted, where two atoms are too close, where the teacher
has no finite answer, where a force is too large, and where a structure occurs again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ase
import numpy as np
from ase.data import covalent_radii

from jaxft.data import Frame, select, structure_key, unlabelled
from jaxft.data.neighbours import neighbours
from jaxft.evaluate.candidate import Flag, JaxCandidate
from jaxft.evaluate.descriptors import descriptors
from jaxft.evaluate.mdruns import Plan, jobs_of, outcomes_of
from jaxft.evaluate.predictions import FrameResult
from jaxft.evaluate.trials import Ranges, trials_of
from jaxft.surrogate.config import Dynamics, Keep, Rattle

PREFIX = "surrogate_"
"""Of what is written into ``info`` beside the labels."""


def moved(
    teacher: JaxCandidate, seeds: Sequence[ase.Atoms], plan: Dynamics, seed: int
) -> tuple[list[ase.Atoms], int]:
    """Frames of molecular dynamics, without their starts, and how many replicas ended early."""
    draws = np.random.default_rng([seed, 1])
    count = min(plan.starts or len(seeds), len(seeds))
    chosen = [seeds[i] for i in sorted(draws.permutation(len(seeds))[:count].tolist())]
    options = plan.model_dump(exclude={"starts"})
    runs = Plan(**options, seed=seed)
    found, ended = [], 0
    for subject, outcome in outcomes_of(teacher, jobs_of(chosen, runs), runs, None).items():
        kelvin = float(subject.rpartition(", ")[2].removesuffix(" K"))
        for trajectory in outcome.replicas:
            ended += trajectory.ended is not None
            for i in range(1, len(trajectory)):
                atoms = trajectory.start.copy()
                atoms.set_cell(trajectory.cells[i])
                atoms.positions = trajectory.positions[i]
                found.append(_bare(atoms, "md", kelvin=kelvin))
    return found, ended


def rattled(seeds: Sequence[ase.Atoms], plan: Rattle, seed: int) -> list[ase.Atoms]:
    """Displaced copies of the seeds, in strained cells where there is a volume."""
    found = []
    for i, parent in enumerate(seeds):
        volume, strain = (plan.volume, plan.strain) if parent.pbc.all() else ((1.0, 1.0), 0.0)
        ranges = Ranges(amplitude=plan.amplitude, volume=volume, strain=strain)
        for trial in trials_of(parent, plan.frames, ranges, np.random.default_rng([seed, 2, i])):
            found.append(
                _bare(trial.atoms, "rattle", amplitude=trial.amplitude, volume=trial.volume)
            )
    return found


def _bare(atoms: ase.Atoms, kind: str, **known: float) -> ase.Atoms:
    """The structure alone, and how it was made; labels of its parent are another structure's."""
    kept = {k: atoms.info[k] for k in ("charge", "spin") if k in atoms.info}
    bare = ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    bare.info = {"config_type": kind} | {PREFIX + k: v for k, v in known.items()} | kept
    return bare


@dataclass(frozen=True, eq=False)
class Pool:
    """What the student learns from."""

    structures: list[ase.Atoms]
    """With the teacher's labels under ``REF_energy``, ``REF_forces``, ``REF_stress``."""
    counts: Mapping[str, int]
    """Structures made, dropped and why, and kept."""


def labelled(teacher: JaxCandidate, structures: Sequence[ase.Atoms], keep: Keep, seed: int) -> Pool:
    """Filter, label and choose.

    Raises:
      ValueError: fewer structures are left than the config wants, or none.
    """
    counts = {"made": len(structures)}
    far = [atoms for atoms in structures if closest(unlabelled(atoms)) >= keep.closest]
    counts["too_close"] = len(structures) - len(far)
    unique = list({structure_key(unlabelled(atoms)): atoms for atoms in far}.values())
    counts["repeated"] = len(far) - len(unique)
    answers = list(zip(unique, teacher.evaluate(unique), strict=True)) if unique else []
    finite = [(a, r) for a, r in answers if not isinstance(r, Flag)]
    counts["not_finite"] = len(answers) - len(finite)
    calm = [(a, r) for a, r in finite if np.linalg.norm(r.forces, axis=1).max() <= keep.max_force]
    counts["forces_too_large"] = len(finite) - len(calm)
    wanted = keep.frames or len(calm)
    if len(calm) < max(wanted, 2):
        left = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise ValueError(
            f"{len(calm)} structures are left for the pool ({left}), and "
            f"{max(wanted, 2)} are needed; make more of them, or filter less."
        )
    pairs = _chosen(teacher, calm, wanted, keep.how, seed)
    counts["not_chosen"] = len(calm) - len(pairs)
    counts["kept"] = len(pairs)
    return Pool([_with_labels(atoms, result) for atoms, result in pairs], counts)


Pair = tuple[ase.Atoms, FrameResult]


def _chosen(
    teacher: JaxCandidate, pairs: list[Pair], count: int, how: str, seed: int
) -> list[Pair]:
    if count == len(pairs):
        return pairs
    frames = [unlabelled(atoms, source=str(i)) for i, (atoms, _) in enumerate(pairs)]
    if how == "random":
        found = select(frames, count, how="random", seed=seed)
    else:
        points = descriptors(teacher.model, teacher.params, frames, dtype=teacher.dtype)
        found = select(frames, count, how="farthest", descriptors=points)
    return [pairs[int(frame.source)] for frame in found]


def _with_labels(atoms: ase.Atoms, result: FrameResult) -> ase.Atoms:
    atoms = atoms.copy()
    atoms.info["REF_energy"] = result.energy
    atoms.arrays["REF_forces"] = result.forces
    if result.stress is not None:
        atoms.info["REF_stress"] = result.stress
    return atoms


def closest(frame: Frame) -> float:
    """Least distance of two atoms over the sum of their covalent radii; 0 for atoms that coincide,
    infinite without a pair within twice that sum."""
    radii = covalent_radii[frame.atomic_numbers]
    try:
        edges = neighbours(frame, 4 * float(radii.max()))
    except ValueError:  # atoms on top of each other
        return 0.0
    if not len(edges.senders):
        return np.inf
    sums = radii[edges.senders] + radii[edges.receivers]
    return float((np.linalg.norm(edges.vectors, axis=1) / sums).min())
