"""Which supercells a model has to answer for, and its force constants from the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ase
import numpy as np

from jaxft.evaluate.candidate import Candidate, Flag, JaxCandidate, ProgressFn
from jaxft.evaluate.crystals import Crystal, Phonons, has_forces, new_phonons, supercell_of
from jaxft.evaluate.lattices import Lattice, by_displacements, by_hessian, like, relaxed, scaled
from jaxft.evaluate.zones import Zone, zone_of

METHODS = ("displacements", "hessian")
POSITIVE = (
    "min_length",
    "distance",
    "mesh",
    "tolerance",
    "kappa_length",
    "kappa_distance",
    "kappa_mesh",
)
GRUNEISEN_STEP = 0.01
"""Relative change of the volume, up and down."""

NO_FORCE = 1e-10
"""eV/Å², of rounding."""

QHA_VOLUMES = (0.97, 0.985, 1.0, 1.015, 1.03, 1.045, 1.06)
"""Relative to that of the crystal."""


@dataclass(frozen=True)
class Options:
    """How phonons are computed.

    Args:
      method: ``displacements``, or ``hessian`` for exact second derivatives (models of ours).
      min_length: of the supercell, between its faces, Å; not used where a crystal says its own.
      distance: of displacements, Å; not used where the reference says its own.
      mesh: phonopy's measure of the q mesh, Å.
      temperatures: K.
      fmax: relax cell and atoms first, to this force in eV/Å, symmetry kept; None: as given.
      slack: Slack's thermal conductivity, from Grüneisen parameters at two more volumes.
      expansion: thermal expansion, from seven volumes.
      tolerance: a crystal is stable if its lowest frequency is above minus this, THz.
      kappa: thermal conductivity from third-order force constants, see :mod:`jaxft.evaluate.kappa`.
      kappa_length: of supercells for the third order, between their faces, Å.
      kappa_distance: of displacements for the third order, Å.
      kappa_mesh: as ``mesh``, of the q points that scatter.
    """

    method: str = "displacements"
    min_length: float = 10.0
    distance: float = 0.01
    mesh: float = 40.0
    temperatures: tuple[float, ...] = (300.0,)
    fmax: float | None = None
    slack: bool = False
    expansion: bool = False
    tolerance: float = 0.05
    kappa: bool = False
    kappa_length: float = 8.0
    kappa_distance: float = 0.03
    kappa_mesh: float = 30.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown; use one of {', '.join(METHODS)}.")
        for name in POSITIVE:
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name}={getattr(self, name)} is not possible; use one above 0.")
        if self.fmax is not None and not 0 < self.fmax < np.inf:
            raise ValueError(f"fmax={self.fmax} is not possible; use one above 0, eV/Å.")
        if not self.temperatures or not all(0 < t < np.inf for t in self.temperatures):
            raise ValueError(
                f"temperatures {list(self.temperatures)} are not possible; give some above 0 K."
            )

    @property
    def gruneisen_volumes(self) -> tuple[float, ...]:
        """Relative volumes, the smaller first."""
        return (1 - GRUNEISEN_STEP, 1 + GRUNEISEN_STEP) if self.slack else ()

    @property
    def qha_volumes(self) -> tuple[float, ...]:
        """Relative volumes, ascending."""
        return QHA_VOLUMES if self.expansion else ()

    @property
    def volumes(self) -> tuple[float, ...]:
        """All at which phonons are needed; 1 is the first."""
        return tuple(dict.fromkeys((1.0, *self.gruneisen_volumes, *self.qha_volumes)))


@dataclass(frozen=True, eq=False)
class Ground:
    """A crystal with its supercell and displacements, and where its phonons are looked at."""

    crystal: Crystal
    phonons: Phonons
    zone: Zone


@dataclass(frozen=True, eq=False)
class Solved:
    """A model's phonons in one crystal."""

    ground: Ground
    at: Mapping[float, Lattice]
    """By relative volume."""
    flags: tuple[str, ...]
    force_rmse: float | None
    """meV/Å, in the reference's displaced cells; None without."""

    @property
    def phonons(self) -> Phonons:
        return self.at[1.0].phonons

    @property
    def sum_rule(self) -> float:
        """eV/Å²."""
        return self.at[1.0].sum_rule


def ground_of(crystal: Crystal, options: Options) -> Ground | Flag:
    """The crystal made ready, with the reference's displacements where it has some."""
    try:
        phonons = (
            new_phonons(crystal.cell, supercell_of(crystal, options.min_length), crystal.primitive)
            if crystal.reference is None
            else like(crystal.reference)
        )
        zone = zone_of(phonons, options.mesh)
    except Exception as error:  # spglib and seekpath have no errors of their own to name
        return Flag(f"no symmetry of the cell, {type(error).__name__}: {error}".splitlines()[0])
    if phonons.dataset is None:
        phonons.generate_displacements(distance=options.distance)
    if crystal.nac is not None:
        phonons.nac_params = crystal.nac
    return Ground(crystal, phonons, zone)


def solve_all(
    candidate: Candidate,
    grounds: Mapping[str, Ground | Flag],
    options: Options,
    progress: ProgressFn | None = None,
) -> dict[str, Solved | Flag]:
    """A model's phonons in all crystals at all volumes; one batched call for all supercells."""
    plans = {name: _plan(candidate, ground, options) for name, ground in grounds.items()}
    tasks = [task for plan in plans.values() if isinstance(plan, _Plan) for task in plan.tasks]
    if isinstance(candidate, JaxCandidate) and options.method == "hessian":
        answers = iter(by_hessian(candidate, tasks, progress=progress))
    else:
        answers = iter(by_displacements(candidate, tasks, progress=progress))
    found: dict[str, Solved | Flag] = {}
    for name, plan in plans.items():
        if isinstance(plan, Flag):
            found[name] = plan
            continue
        own = [next(answers) for _ in plan.tasks]
        found[name] = _solved(plan, own, options)
    return found


@dataclass(frozen=True, eq=False)
class _Plan:
    ground: Ground
    tasks: list[Phonons]
    """One per volume; then, if cells were relaxed, the reference's own displaced cells."""
    flags: tuple[str, ...]


def _plan(candidate: Candidate, ground: Ground | Flag, options: Options) -> _Plan | Flag:
    if isinstance(ground, Flag):
        return ground
    cell, flags = ground.crystal.cell, _folded(candidate, ground)
    if options.fmax is not None:
        outcome = relaxed(candidate, cell, options.fmax)
        if isinstance(outcome, Flag):
            return outcome
        cell, reason = outcome
        flags += [reason] if reason else []
    tasks = []
    for volume in options.volumes:
        if volume == 1.0 and options.fmax is None:
            tasks.append(like(ground.phonons))
            continue
        stretched: ase.Atoms = scaled(cell, volume)
        if options.fmax is not None and volume != 1.0:
            outcome = relaxed(candidate, stretched, options.fmax, fixed_cell=True)
            if isinstance(outcome, Flag):
                return Flag(f"at {volume:g} of the volume: {outcome.reason}")
            stretched, reason = outcome
            flags += [f"at {volume:g} of the volume: {reason}"] if reason else []
        task = like(ground.phonons, stretched)
        task.generate_displacements(distance=options.distance)
        tasks.append(task)
    if options.fmax is not None and _known_forces(ground) is not None:
        tasks.append(like(ground.phonons))
    return _Plan(ground, tasks, tuple(flags))


def _folded(candidate: Candidate, ground: Ground) -> list[str]:
    """Whether atoms feel their own images in the supercell, where the model's cutoff is known."""
    if not isinstance(candidate, JaxCandidate):
        return []
    inverse = np.linalg.inv(np.asarray(ground.phonons.supercell.cell))
    thickness, cutoff = float(1 / np.linalg.norm(inverse, axis=0).max()), candidate.model.r_max
    if thickness >= cutoff:
        return []
    return [
        f"the supercell is {thickness:.1f} Å thick, the cutoff {cutoff:g} Å: frequencies are the "
        "model's at wave vectors that fit into it alone"
    ]


def _solved(plan: _Plan, answers: list[Lattice | Flag], options: Options) -> Solved | Flag:
    lattices: dict[float, Lattice] = {}
    for volume, answer in zip(options.volumes, answers, strict=False):
        if isinstance(answer, Flag):
            where = "" if volume == 1.0 else f"at {volume:g} of the volume: "
            return Flag(where + answer.reason)
        if not abs(answer.phonons.force_constants).max() > NO_FORCE:
            return Flag("no phonons: force constants are zero, as in a supercell of one atom")
        lattices[volume] = answer
    at_reference = answers[-1] if len(answers) > len(options.volumes) else lattices[1.0]
    flags, error = plan.flags, None
    known = _known_forces(plan.ground)
    if isinstance(at_reference, Flag):
        flags = (*flags, f"no forces in the reference's cells: {at_reference.reason}")
    elif known is not None and at_reference.forces is not None:
        error = 1e3 * float(np.sqrt(np.mean((at_reference.forces - known) ** 2)))
    return Solved(plan.ground, lattices, flags, error)


def _known_forces(ground: Ground) -> np.ndarray | None:
    """[cells, N, 3] eV/Å, of the reference."""
    reference = ground.crystal.reference
    if reference is None or not has_forces(reference.dataset):
        return None
    return np.asarray(reference.forces)
