"""Crystals whose phonons are judged, and what is known of them: phonopy's files and plain ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase
import numpy as np
from ase.units import Bohr, Hartree

from jaxft.data.frames import read_atoms
from jaxft.evaluate.phonopyfiles import born_charges, force_sets, phonopy_yaml

YAMLS = ("phonopy_params.yaml", "phonopy_disp.yaml", "phonopy.yaml")
"""What a folder is looked through for, in this order; also as ``.xz`` and ``.gz``."""

PACKED = ("", ".xz", ".gz")
CELLS = ("POSCAR-unitcell", "POSCAR")

Phonons = Any
"""A ``phonopy.Phonopy``: cell, supercell, and force constants once they are known."""


def phonopy_api() -> Any:
    """The module ``phonopy``.

    Raises:
      ModuleNotFoundError: phonopy, seekpath or spglib is not installed.
    """
    try:
        import phonopy
        import seekpath  # noqa: F401
        import spglib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"phonons need {error.name}, which is not installed;\nuse pip install 'jaxft[phonons]'."
        ) from error
    return phonopy


@dataclass(frozen=True, eq=False)
class Crystal:
    """A cell with its supercell, and the reference where there is one.

    Args:
      name: in tables.
      cell: the unit cell, periodic in three directions.
      supercell: [3, 3] integers, rows in units of the cell's vectors; None: from a length.
      primitive: [3, 3] in units of the cell's vectors; None: as phonopy finds it.
      reference: phonons with force constants, and the forces they came from where they are known.
      nac: Born charges and dielectric tensor as phonopy has them; every model is given them.
      missing: why there is no reference, where one was to be expected.
    """

    name: str
    cell: ase.Atoms
    supercell: np.ndarray | None = None
    primitive: np.ndarray | None = None
    reference: Phonons | None = None
    nac: Any | None = None
    missing: str | None = None


def crystal_of(
    atoms: ase.Atoms, name: str | None = None, supercell: Sequence[int] | None = None
) -> Crystal:
    """A structure without a reference.

    Args:
      atoms: the unit cell.
      name: in tables; the formula by default.
      supercell: repetitions along the three vectors; by default from a length.

    Raises:
      ValueError: it is not periodic in three directions.
    """
    if not all(atoms.pbc):
        raise ValueError(
            f"{name or atoms.symbols} has pbc={atoms.pbc.tolist()}; phonons need a crystal, "
            "periodic in three directions. For molecules use jaxft.evaluate.hessian."
        )
    matrix = None if supercell is None else np.diag(np.asarray(supercell, int))
    return Crystal(name or str(atoms.symbols), atoms, matrix)


def read_crystal(
    path: str | Path, supercell: Sequence[int] | None = None, name: str | None = None
) -> Crystal:
    """A crystal from a file or a folder, with its reference where one is beside it.

    Args:
      path: ``phonopy_params.yaml``, ``phonopy_disp.yaml`` or the like (also ``.xz``, ``.gz``) with
        FORCE_SETS and BORN in the same folder; that folder; or any structure that ASE reads. A
        folder without such a file needs ``POSCAR-unitcell`` and ``supercell``.
      supercell: repetitions along the three vectors, where no file says them.
      name: in tables; by default the folder's or file's name.

    Returns:
      The crystal. Forces without a file of them leave the reference ``missing`` with the reason.

    Raises:
      ValueError: nothing there can be read, or it is no crystal.
      ModuleNotFoundError: phonopy is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a crystal's file, or a folder of phonopy.")
    yaml = _yaml(path) if path.is_dir() else path if ".yaml" in path.name else None
    folder = path if path.is_dir() else path.parent
    name = name or (path.name if path.is_dir() else path.name.split(".")[0])
    if yaml is not None:
        return _with_reference(name, folder, *_said(yaml, supercell))
    if path.is_dir():
        cells = [path / cell for cell in CELLS if (path / cell).exists()]
        if not cells or supercell is None:
            raise ValueError(
                f"{path} holds no {YAMLS[0]} or {YAMLS[1]}; add one, or {CELLS[0]} and the "
                "repetitions of its supercell."
            )
        from phonopy.interface.calculator import read_crystal_structure

        phonopy_api()
        unit, _ = read_crystal_structure(str(cells[0]), interface_mode="vasp")
        return _with_reference(name, folder, unit, np.diag(supercell), None, None, None, None)
    images = read_atoms(path)
    if len(images) > 1:
        raise ValueError(f"{path} holds {len(images)} structures; give a file of one crystal.")
    return crystal_of(images[0], name, supercell)


def _yaml(folder: Path) -> Path | None:
    found = [folder / f"{name}{end}" for name in YAMLS for end in PACKED]
    return next((path for path in found if path.exists()), None)


def _said(path: Path, supercell: Sequence[int] | None) -> tuple[Any, ...]:
    """Unit cell, supercell and primitive matrices, dataset, force constants, NAC of a file."""
    phonopy_api()
    data = phonopy_yaml(path)
    matrix = data.supercell_matrix if supercell is None else np.diag(supercell)
    if data.unitcell is None or matrix is None:
        raise ValueError(
            f"{path} says no unit cell or no supercell; use a file that phonopy saved."
        )
    return (
        data.unitcell,
        matrix,
        data.primitive_matrix,
        data.dataset,
        data.force_constants,
        data.nac_params,
    )


def _with_reference(
    name: str,
    folder: Path,
    unit: Any,
    matrix: Any,
    primitive: Any,
    dataset: Any,
    constants: Any,
    nac: Any,
) -> Crystal:
    phonons = new_phonons(unit, matrix, primitive)
    if nac is None and (folder / "BORN").exists():
        nac = born_charges(folder / "BORN", phonons)
    if not has_forces(dataset) and (folder / "FORCE_SETS").exists():
        dataset = force_sets(folder / "FORCE_SETS", phonons, dataset)
    missing = None
    if has_forces(dataset):
        phonons.dataset = dataset
        solve(phonons)
    elif constants is not None:
        phonons.force_constants = constants
        phonons.symmetrize_force_constants(show_drift=False)
    else:
        missing = f"no reference: {folder} holds neither FORCE_SETS nor force constants"
    if nac is not None:
        nac = {"factor": Hartree * Bohr} | nac  # e²/4πε₀ in eV Å, where the file leaves it out
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*is largely broken")
            try:
                phonons.nac_params = nac
            except UserWarning as error:
                raise ValueError(
                    f"the Born charges in {folder} have not the symmetry of {name}; are they of "
                    "this crystal?"
                ) from error
    return Crystal(
        name,
        to_ase(phonons.unitcell),
        np.asarray(phonons.supercell_matrix),
        np.asarray(phonons.primitive_matrix),
        None if missing else phonons,
        nac,
        missing,
    )


def has_forces(dataset: Any) -> bool:
    """Whether phonopy's displacements come with their forces."""
    if not dataset:
        return False
    return "forces" in dataset or all("forces" in d for d in dataset.get("first_atoms", [{}]))


def is_random(phonons: Phonons) -> bool:
    """Whether all atoms of its displaced cells moved; a fit then gives the force constants."""
    return phonons.dataset is not None and "displacements" in phonons.dataset


def new_phonons(unit: Any, supercell: Any, primitive: Any = None) -> Phonons:
    """A ``Phonopy`` without forces; ``unit`` is phonopy's or ASE's."""
    if isinstance(unit, ase.Atoms):
        unit = from_ase(unit)
    api = phonopy_api()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that "auto" finds a primitive cell
        return api.Phonopy(unit, supercell, "auto" if primitive is None else primitive)


def solve(phonons: Phonons) -> float:
    """Force constants of the forces that ``phonons`` hold, symmetrised.

    Returns:
      The residual of the acoustic sum rule before it was imposed, max |Σ_b Φ_ab| in eV/Å²; the
      fit to random displacements imposes it itself.
    """
    method = "symfc" if is_random(phonons) else "traditional"
    phonons.produce_force_constants(fc_calculator=method, show_drift=False)
    residual = sum_rule_residual(phonons.force_constants)
    phonons.symmetrize_force_constants(show_drift=False)
    return residual


def sum_rule_residual(constants: np.ndarray) -> float:
    """max |Σ_b Φ_ab| in eV/Å² of [a, b, 3, 3]: the force on an atom when all move together."""
    return float(abs(np.asarray(constants).sum(axis=1)).max())


def supercell_of(crystal: Crystal, min_length: float) -> np.ndarray:
    """The crystal's own supercell, or the smallest multiple of its cell whose faces are at least
    ``min_length`` Å apart."""
    if crystal.supercell is not None:
        return crystal.supercell
    heights = 1 / np.linalg.norm(np.linalg.inv(crystal.cell.cell.array), axis=0)
    return np.diag(np.ceil(min_length / heights - 1e-6).astype(int))


def to_ase(cell: Any) -> ase.Atoms:
    """Of phonopy's cell; masses are kept."""
    return ase.Atoms(
        cell.symbols,
        scaled_positions=cell.scaled_positions,
        cell=cell.cell,
        masses=cell.masses,
        pbc=True,
    )


def from_ase(atoms: ase.Atoms) -> Any:
    """Phonopy's cell; masses are kept."""
    from phonopy.structure.atoms import PhonopyAtoms

    return PhonopyAtoms(
        symbols=atoms.get_chemical_symbols(),
        scaled_positions=atoms.get_scaled_positions(),
        cell=atoms.cell.array,
        masses=atoms.get_masses(),
    )
