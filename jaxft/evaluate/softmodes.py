"""Unstable modes of a crystal, through phonopy, and the energy along them.

Forces of phonopy's displaced supercells come from a candidate in batches. Modes are looked for at
the wave vectors that the supercell holds exactly, one of every set that symmetry makes equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ase
import numpy as np

from jaxft.evaluate.candidate import Candidate, Flag

DEGENERATE = 1e-2
"""THz; modes of one wave vector that are closer than this are one."""

MOST_COMBINED = 3
"""Modes of one degenerate set whose sums are walked along too."""

SAME = 1e-5
"""Of wave vectors and of mode vectors, when they are compared."""


@dataclass(frozen=True, eq=False)
class SoftMode:
    """A set of degenerate modes beyond the threshold."""

    q: tuple[float, ...]
    """In reciprocal lattice vectors of the parent."""
    frequency: float
    """THz, negative: imaginary."""
    directions: np.ndarray
    """[d, n, 3] displacements of the supercell, in each the largest of one atom is 1 Å."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What a supercell shows of the parent's stability."""

    supercell: ase.Atoms
    modes: tuple[SoftMode, ...]
    """Most unstable first."""
    lowest: float
    """THz, over all its wave vectors; acoustic modes at Γ are about 0."""


def repeats(atoms: ase.Atoms, min_length: float) -> tuple[int, int, int]:
    """How often to repeat a cell so that opposite faces are ``min_length`` Å apart; 1 where the
    structure is not periodic.

    Raises:
      ValueError: a periodic direction has no cell vector.
    """
    if not min_length > 0:
        raise ValueError(f"a cell of {min_length} Å is not possible; give min_length > 0.")
    areas = [np.cross(atoms.cell[(i + 1) % 3], atoms.cell[(i + 2) % 3]) for i in range(3)]
    heights = [
        abs(atoms.cell[i] @ areas[i]) / max(float(np.linalg.norm(areas[i])), 1e-12)
        for i in range(3)
    ]
    if any(p and h < 1e-3 for p, h in zip(atoms.pbc, heights, strict=True)):
        raise ValueError(f"{atoms.symbols} is periodic, but its cell is flat; give a cell.")
    # a hair's breadth of rounding is no reason for twice the atoms
    a, b, c = (
        max(int(np.ceil(min_length / h - 1e-6)), 1) if p else 1
        for p, h in zip(atoms.pbc, heights, strict=True)
    )
    return a, b, c


def spectrum(
    candidate: Candidate,
    parent: ase.Atoms,
    repeat: Sequence[int],
    *,
    displacement: float,
    threshold: float,
    symprec: float,
) -> Spectrum | Flag:
    """Imaginary modes of a crystal at its equilibrium.

    Args:
      candidate: gives the forces.
      parent: one cell.
      repeat: of the cell, in its three directions.
      displacement: Å, of phonopy's finite differences.
      threshold: THz; modes with a frequency below ``-threshold`` count.
      symprec: Å, for phonopy's symmetry.

    Raises:
      ImportError: phonopy is not installed.
    """
    phonon = _phonopy(parent, repeat, symprec)
    phonon.generate_displacements(distance=displacement)
    cells = [_to_ase(c, parent) for c in phonon.supercells_with_displacements]
    forces = []
    for outcome in candidate.evaluate(cells):
        if isinstance(outcome, Flag):
            return Flag(f"a displaced supercell: {outcome.reason}")
        forces.append(outcome.forces)
    phonon.forces = forces
    phonon.produce_force_constants()
    phonon.symmetrize_force_constants()
    points = _wave_vectors(phonon)
    frequencies = phonon.run_qpoints(points).frequencies
    modes = [
        SoftMode(tuple(map(float, q)), float(own[bands].mean()), directions)
        for q, own in zip(points, frequencies, strict=True)
        for bands, directions in _soft(phonon, q, own, threshold, repeat)
    ]
    return Spectrum(
        _to_ase(phonon.supercell, parent),
        tuple(sorted(modes, key=lambda mode: mode.frequency)),
        float(frequencies.min()),
    )


def walk(
    candidate: Candidate, supercell: ase.Atoms, directions: np.ndarray, amplitudes: np.ndarray
) -> np.ndarray | Flag:
    """[d, a] eV/atom: energies along displacements, above that of the supercell itself.

    Those that cannot be computed are NaN, as atoms that meet are no reason to look no further.
    """
    moves = [a * direction for direction in directions for a in amplitudes]
    outcomes = candidate.evaluate([supercell, *(_moved(supercell, move) for move in moves)])
    first, *others = (np.nan if isinstance(o, Flag) else o.energy for o in outcomes)
    if not np.isfinite(first):
        return outcomes[0] if isinstance(outcomes[0], Flag) else Flag("no energy of the parent")
    found = (np.asarray(others) - first) / len(supercell)
    return found.reshape(len(directions), len(amplitudes))


def _moved(atoms: ase.Atoms, move: np.ndarray) -> ase.Atoms:
    atoms = atoms.copy()
    atoms.positions += move
    return atoms


def _phonopy(parent: ase.Atoms, repeat: Sequence[int], symprec: float) -> Any:
    try:
        from phonopy import Phonopy
        from phonopy.structure.atoms import PhonopyAtoms
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "modes need phonopy, which is not installed;\nuse pip install 'jaxft[phonons]'."
        ) from error
    cell = PhonopyAtoms(
        symbols=parent.get_chemical_symbols(),
        cell=parent.cell.array,
        positions=parent.positions,
        masses=parent.get_masses(),
    )
    return Phonopy(cell, np.diag(repeat), primitive_matrix="P", symprec=symprec)


def _to_ase(cell: Any, parent: ase.Atoms) -> ase.Atoms:
    """With the masses and the ``info`` (charge, spin) of the parent."""
    found = ase.Atoms(
        cell.symbols, cell=cell.cell, positions=cell.positions, masses=cell.masses, pbc=True
    )
    found.info.update(parent.info)
    return found


def _wave_vectors(phonon: Any) -> list[np.ndarray]:
    """Those commensurate with the supercell, one of each star and of ±q."""
    from phonopy.harmonic.dynmat_to_fc import get_commensurate_points

    points = get_commensurate_points(phonon.supercell_matrix)
    rotations = phonon.primitive_symmetry.reciprocal_operations
    kept: list[np.ndarray] = []
    for q in points:
        images = [sign * (r @ q) for r in rotations for sign in (1, -1)]
        apart = (k - image for k in kept for image in images)
        if not any(np.abs(d - np.rint(d)).max() < SAME for d in apart):
            kept.append(q)
    return kept


def _soft(
    phonon: Any, q: np.ndarray, frequencies: np.ndarray, threshold: float, repeat: Sequence[int]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """(bands, directions) of every degenerate set beyond the threshold."""
    from phonopy.phonon.degeneracy import degenerate_sets

    for bands in degenerate_sets(frequencies, cutoff=DEGENERATE):
        if frequencies[bands].max() < -threshold:
            modes = [(q, band, 1.0, 0.0) for band in bands]
            fields = phonon.run_modulations(np.diag(repeat), modes).modulations
            yield bands, _directions(fields, phonon.supercell.masses)


def _directions(fields: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """[d, n, 3] real displacements that span complex ones, and sums of a few of them.

    The basis of degenerate modes is arbitrary. Here it is the one that a pivoted Cholesky
    decomposition of their projector gives: each vector is what they have of the move of one atom
    along one axis, so that polar modes of a cubic crystal are along x, y and z, and their sums
    along [110] and [111].
    """
    roots = np.sqrt(masses)[:, None]
    complex_modes = (fields * roots).reshape(len(fields), -1)
    spread = np.concatenate([complex_modes.real, complex_modes.imag])
    _, sizes, rows = np.linalg.svd(spread, full_matrices=False)
    left = rows[sizes > SAME * sizes[0]]
    basis = []
    for _ in range(len(left)):
        norms = np.linalg.norm(left, axis=0)
        pivot = int(np.argmax(norms > (1 - SAME) * norms.max()))  # the first of equals
        axis = left[:, pivot] / norms[pivot]
        basis.append(axis @ left)
        left = left - np.outer(axis, axis @ left)
    most = min(MOST_COMBINED if len(basis) <= MOST_COMBINED else 2, len(basis))
    sums = [
        np.sum(chosen, axis=0)
        for count in range(1, most + 1)
        for chosen in itertools.combinations(basis, count)
    ]
    moves = np.stack(sums).reshape(len(sums), -1, 3) / roots
    return moves / np.linalg.norm(moves, axis=2).max(axis=1)[:, None, None]
