"""Force constants of a model: all displaced cells of all crystals in one batched call, or exact."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import ase
import numpy as np

from jaxft.evaluate.candidate import Candidate, Flag, JaxCandidate, ProgressFn
from jaxft.evaluate.crystals import (
    Phonons,
    from_ase,
    new_phonons,
    solve,
    sum_rule_residual,
    to_ase,
)
from jaxft.evaluate.hessian import force_constants
from jaxft.evaluate.predictions import FrameResult

RELAX_STEPS = 500


@dataclass(frozen=True, eq=False)
class Lattice:
    """A crystal of a model with its force constants."""

    phonons: Phonons
    energy: float
    """eV per primitive cell, of the perfect crystal."""
    sum_rule: float
    """max |Σ_b Φ_ab| before the acoustic sum rule was imposed, eV/Å²."""
    forces: np.ndarray | None = None
    """[cells, N, 3] eV/Å in the displaced cells, less those in the perfect one; None if exact."""


def by_displacements(
    candidate: Candidate,
    phonons: Sequence[Phonons],
    *,
    progress: ProgressFn | None = None,
) -> list[Lattice | Flag]:
    """Force constants by finite displacement.

    All displaced cells of all ``phonons`` go to the model in one call, together with the perfect
    supercells, whose forces are subtracted: a cell that is not the model's own equilibrium has
    forces where symmetry allows them, and they are no response to a displacement.

    Args:
      candidate: the model.
      phonons: with their displacements; forces and force constants are set.
      progress: told (cells done, cells in total).

    Returns:
      For each of ``phonons`` its lattice, or the reason why a cell of it could not be evaluated.
    """
    cells: list[ase.Atoms] = []
    for one in phonons:
        cells.append(to_ase(one.supercell))
        cells += [to_ase(cell) for cell in one.supercells_with_displacements]
    outcomes = iter(candidate.evaluate(cells, progress))
    found: list[Lattice | Flag] = []
    for one in phonons:
        perfect = next(outcomes)
        displaced = [next(outcomes) for _ in one.supercells_with_displacements]
        wrong = [o.reason for o in (perfect, *displaced) if isinstance(o, Flag)]
        if wrong:
            found.append(Flag(f"{wrong[0]} ({len(wrong)} of {1 + len(displaced)} supercells)"))
            continue
        assert isinstance(perfect, FrameResult)
        forces = np.array([o.forces - perfect.forces for o in displaced])  # type: ignore[union-attr]
        one.forces = forces
        residual = solve(one)
        found.append(Lattice(one, perfect.energy / _multiple(one), residual, forces))
    return found


def by_hessian(
    candidate: JaxCandidate,
    phonons: Sequence[Phonons],
    *,
    progress: ProgressFn | None = None,
) -> list[Lattice | Flag]:
    """Force constants by differentiation, of the atoms of one primitive cell in each supercell.

    Args:
      candidate: a potential of ours; it is evaluated in float64.
      phonons: supercells; force constants are set.
      progress: told (supercells done, in total).
    """
    outcomes = candidate.evaluate([to_ase(one.supercell) for one in phonons])
    found: list[Lattice | Flag] = []
    for one, outcome in zip(phonons, outcomes, strict=True):
        found.append(outcome if isinstance(outcome, Flag) else _exact(candidate, one, outcome))
        if progress is not None:
            progress(len(found), len(phonons))
    return found


def _exact(candidate: JaxCandidate, phonons: Phonons, perfect: FrameResult) -> Lattice | Flag:
    constants = force_constants(
        candidate.model,
        candidate.params,
        to_ase(phonons.supercell),
        phonons.primitive.p2s_map,
        head=candidate.head,
    )
    if not np.isfinite(constants).all():
        return Flag("second derivatives are not finite")
    phonons.force_constants = constants
    residual = sum_rule_residual(constants)
    phonons.symmetrize_force_constants(show_drift=False)
    return Lattice(phonons, perfect.energy / _multiple(phonons), residual)


def _multiple(phonons: Phonons) -> float:
    return len(phonons.supercell) / len(phonons.primitive)


def like(phonons: Phonons, cell: ase.Atoms | None = None) -> Phonons:
    """The same crystal without forces and force constants; ``cell`` instead of its own if given.

    Displacements are kept with the cell they were made for.
    """
    unit = phonons.unitcell if cell is None else from_ase(cell)
    found = new_phonons(unit, phonons.supercell_matrix, phonons.primitive_matrix)
    if cell is None and phonons.dataset is not None:
        found.dataset = _without_forces(phonons.dataset)
    found.nac_params = phonons.nac_params
    return found


def _without_forces(dataset: dict) -> dict:
    if "displacements" in dataset:
        return {"displacements": np.array(dataset["displacements"])}
    found = copy.deepcopy(dataset)
    for first in found["first_atoms"]:
        first.pop("forces", None)
        first.pop("supercell_energy", None)
    return found


def scaled(cell: ase.Atoms, factor: float) -> ase.Atoms:
    """The same crystal at ``factor`` times the volume; atoms stay where they are in the cell."""
    found = cell.copy()
    found.set_cell(cell.cell.array * factor ** (1 / 3), scale_atoms=True)
    return found


def relaxed(
    candidate: Candidate, cell: ase.Atoms, fmax: float, *, fixed_cell: bool = False
) -> tuple[ase.Atoms, str | None] | Flag:
    """The model's own equilibrium with the symmetry of ``cell``, by ASE.

    Args:
      candidate: the model.
      cell: the unit cell.
      fmax: largest force, and stress times volume, at the end, eV/Å.
      fixed_cell: only atoms move.

    Returns:
      The cell, and what is wrong with it; or the reason why there is none.
    """
    from ase.constraints import FixSymmetry
    from ase.filters import FrechetCellFilter
    from ase.optimize import FIRE

    atoms = cell.copy()
    atoms.calc = candidate.ase_calculator()
    try:
        atoms.set_constraint(FixSymmetry(atoms))
        mover = FIRE(atoms if fixed_cell else FrechetCellFilter(atoms), logfile=None)
        is_done = mover.run(fmax=fmax, steps=RELAX_STEPS)
    except Exception as error:  # a stranger's code: its failure is what is to be reported
        return Flag(f"relaxation failed, {type(error).__name__}: {error}".splitlines()[0])
    if not np.isfinite(atoms.positions).all() or not np.isfinite(atoms.cell.array).all():
        return Flag("relaxation failed: positions are not finite")
    atoms.calc = None
    atoms.set_constraint()
    reason = None if is_done else f"not relaxed to {fmax} eV/Å within {RELAX_STEPS} steps"
    return atoms, reason
