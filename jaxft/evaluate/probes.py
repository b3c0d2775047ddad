"""Changes of a structure under which a potential must behave, and by how much it does not.

A probe makes structures and reads numbers off their results; the first structure of all is the one
that is judged. Everything is evaluated in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ase
import numpy as np
from ase.stress import voigt_6_to_full_3x3_strain
from scipy.spatial.transform import Rotation

from jaxft.evaluate.predictions import FrameResult

APART = 100.0
"""Å, of two copies that must not feel each other."""
CROSSING_STEP = 1e-4
"""Å."""
CROSSING_STEPS = 10
"""On either side of the cutoff."""

Numbers = Mapping[str, float]
Results = Sequence[FrameResult]


@dataclass(frozen=True)
class Probe:
    """One question to a potential."""

    structures: Sequence[ase.Atoms]
    read: Callable[[FrameResult, Results], Numbers]
    """Of the result of the structure itself, and those of ``structures``."""


def probes(atoms: ase.Atoms, *, r_max: float | None, step: float, seed: int) -> dict[str, Probe]:
    """All that a structure can be asked.

    Args:
      atoms: the structure; away from symmetric places, where forces are zero, it tells more.
      r_max: Å, the cutoff of the model; None if not known.
      step: Å and strain, of finite differences.
      seed: of directions, rotations and permutations.
    """
    rng = np.random.default_rng(seed)
    found = {
        "itself": Probe([], lambda own, _: _balance(atoms, own)),
        "rotation": _turned("rotation", atoms, Rotation.random(rng=rng).as_matrix()),
        "inversion": _turned("inversion", atoms, -np.eye(3)),
        "translation": _shifted(atoms, rng.uniform(-3, 3, size=3)),
        "permutation": _permuted(atoms, _cycle(rng.permutation(len(atoms)))),
        "forces": _force_differences(atoms, rng, step),
        "extensivity": _twice(atoms),
    }
    if atoms.pbc.all():
        found["stress"] = _stress_differences(atoms, step)
        found["supercell"] = _supercell(atoms)
    if r_max is not None:
        found["crossing"] = _crossing(atoms, r_max)
    return found


def _balance(atoms: ase.Atoms, own: FrameResult) -> Numbers:
    numbers = {"net_force": float(np.linalg.norm(own.forces.sum(axis=0)))}
    if not atoms.pbc.any():
        centred = atoms.positions - atoms.positions.mean(axis=0)
        numbers["torque"] = float(np.linalg.norm(np.cross(centred, own.forces).sum(axis=0)))
    return numbers


def _compared(name: str, own: FrameResult, energy: float, forces: np.ndarray) -> Numbers:
    return {
        f"{name}_energy": abs(energy - own.energy) / len(own.forces),
        f"{name}_forces": float(abs(forces - own.forces).max()),
    }


def _turned(name: str, atoms: ase.Atoms, matrix: np.ndarray) -> Probe:
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ matrix.T)
    turned.positions = atoms.positions @ matrix.T

    def read(own: FrameResult, results: Results) -> Numbers:
        (result,) = results
        numbers = dict(_compared(name, own, result.energy, result.forces @ matrix))
        if own.stress is not None and result.stress is not None:
            back = matrix.T @ result.stress @ matrix
            numbers[f"{name}_stress"] = float(abs(back - own.stress).max())
        return numbers

    return Probe([turned], read)


def _shifted(atoms: ase.Atoms, vector: np.ndarray) -> Probe:
    shifted = atoms.copy()
    shifted.positions += vector
    return Probe(
        [shifted],
        lambda own, results: _compared("translation", own, results[0].energy, results[0].forces),
    )


def _cycle(order: np.ndarray) -> np.ndarray:
    """One cycle through all atoms: every one moves, which a random permutation does not promise."""
    cycle = np.empty_like(order)
    cycle[order] = np.roll(order, 1)
    return cycle


def _permuted(atoms: ase.Atoms, order: np.ndarray) -> Probe:
    def read(own: FrameResult, results: Results) -> Numbers:
        forces = np.empty_like(own.forces)
        forces[order] = results[0].forces
        return _compared("permutation", own, results[0].energy, forces)

    return Probe([atoms[order]], read)


def _force_differences(
    atoms: ase.Atoms, rng: np.random.Generator, step: float, directions: int = 6
) -> Probe:
    """Along random directions of all coordinates at once, of length one."""
    along = rng.normal(size=(directions, len(atoms), 3))
    along /= np.linalg.norm(along, axis=(1, 2), keepdims=True)
    structures = []
    for direction in along:
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions += sign * step * direction
            structures.append(moved)

    def read(own: FrameResult, results: Results) -> Numbers:
        energies = np.array([r.energy for r in results])
        slopes = (energies[::2] - energies[1::2]) / (2 * step)
        expected = -np.tensordot(along, own.forces, axes=([1, 2], [0, 1]))
        return {"force_difference": float(abs(slopes - expected).max())}

    return Probe(structures, read)


def _stress_differences(atoms: ase.Atoms, step: float) -> Probe:
    structures = []
    for strain in np.eye(6) * step:
        for sign in (1, -1):
            strained = atoms.copy()
            deformation = voigt_6_to_full_3x3_strain(sign * strain)  # ASE's holds the identity
            strained.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
            structures.append(strained)

    def read(own: FrameResult, results: Results) -> Numbers:
        if own.stress is None:
            return {}
        energies = np.array([r.energy for r in results])
        slopes = (energies[::2] - energies[1::2]) / (2 * step * atoms.get_volume())
        voigt = own.stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        return {"stress_difference": float(abs(slopes - voigt).max())}

    return Probe(structures, read)


def cluster(atoms: ase.Atoms) -> ase.Atoms:
    """The atoms without their images."""
    return ase.Atoms(atoms.numbers, atoms.positions, info=atoms.info)


def _twice(atoms: ase.Atoms) -> Probe:
    one = cluster(atoms)
    other = one.copy()
    other.positions[:, 0] += APART + np.ptp(one.positions[:, 0])

    def read(own: FrameResult, results: Results) -> Numbers:
        alone, both = results
        return {"extensivity": abs(both.energy - 2 * alone.energy)}

    return Probe([one, one + other], read)


def _supercell(atoms: ase.Atoms) -> Probe:
    return Probe(
        [atoms.repeat((2, 1, 1))],
        lambda own, results: {
            "supercell": abs(results[0].energy - 2 * own.energy) / (2 * len(own.forces))
        },
    )


def _crossing(atoms: ase.Atoms, r_max: float) -> Probe:
    """Another atom passes the cutoff of the outermost one, away from all others.

    What is smooth has second differences of the square of the step; a jump stands out of them.
    """
    start = cluster(atoms)
    outward = start.positions - start.positions.mean(axis=0)
    last = int(np.argmax(np.linalg.norm(outward, axis=1)))
    length = np.linalg.norm(outward[last])
    direction = outward[last] / length if length > 1e-6 else np.array([0.48, 0.6, 0.64])
    structures = []
    for k in range(-CROSSING_STEPS, CROSSING_STEPS + 1):
        # half a step aside: no atom sits on the cutoff to within rounding
        distance = r_max + (k + 0.5) * CROSSING_STEP
        place = start.positions[last] + distance * direction
        structures.append(start + ase.Atoms([start.numbers[last]], [place]))

    def read(own: FrameResult, results: Results) -> Numbers:
        energies = np.array([r.energy for r in results])
        forces = np.array([r.forces for r in results])
        return {
            "energy_jump": float(abs(np.diff(energies, n=2)).max()),
            "force_jump": float(abs(np.diff(forces, n=2, axis=0)).max()),
        }

    return Probe(structures, read)
