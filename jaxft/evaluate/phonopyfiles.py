"""phonopy's files beside a crystal, read with one clear error each."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

SAME = 1e-4
"""Å: displacements that differ by less are the same."""


def phonopy_yaml(path: Path) -> Any:
    """What a ``phonopy_*.yaml`` says: cell, supercell, dataset, force constants, NAC.

    Raises:
      ValueError: it is none.
    """
    from phonopy.exception import NotPhonopyYamlError
    from phonopy.interface.phonopy_yaml import PhonopyYaml
    from yaml import YAMLError

    try:
        return PhonopyYaml().read(str(path))
    except (NotPhonopyYamlError, YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of phonopy: {_line(error)}.") from error


def force_sets(path: Path, phonons: Any, expected: Any) -> Any:
    """Displacements and forces of a FORCE_SETS file.

    Args:
      path: the file.
      phonons: a ``Phonopy`` of the crystal.
      expected: displacements that another file said, or None.

    Raises:
      ValueError: it cannot be read, or is of another crystal: another number of atoms, or other
        displacements than were expected.
    """
    from phonopy.file_IO import parse_FORCE_SETS

    try:
        found = parse_FORCE_SETS(str(path), natom=len(phonons.supercell))
    except (RuntimeError, ValueError, IndexError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read: {_line(error)}.\nIt must be of the {len(phonons.supercell)} "
            "atoms of this crystal's supercell, and whole."
        ) from error
    if expected and not _same(found, expected):
        raise ValueError(
            f"{path} has other displacements than the yaml file beside it; is it of another "
            "crystal? Put files together that were made together."
        )
    return found


def _same(one: Any, other: Any) -> bool:
    a, b = _displacements(one), _displacements(other)
    return a.shape == b.shape and bool(np.allclose(a, b, atol=SAME))


def _displacements(dataset: Any) -> np.ndarray:
    """[cells, N, 3] of random ones; [cells, 4], atom and displacement, of single ones; Å."""
    if "displacements" in dataset:
        return np.asarray(dataset["displacements"], float)
    return np.array([[d["number"], *d["displacement"]] for d in dataset["first_atoms"]])


def born_charges(path: Path, phonons: Any) -> Any:
    """Born charges and dielectric tensor of a BORN file, for the atoms of the primitive cell.

    Of the atoms that symmetry leaves, as the format has it, or else of all atoms: of the primitive
    cell, or of the unit cell, as where symmetry was not used.

    Raises:
      ValueError: it cannot be read, or has not the crystal's symmetry.
    """
    from phonopy.exception import BORNFileParseError
    from phonopy.file_IO import parse_BORN

    primitive, why = phonons.primitive, ""
    for cell, is_symmetry in ((primitive, True), (primitive, False), (phonons.unitcell, False)):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", ".*is largely broken")
                found = parse_BORN(cell, filename=str(path), is_symmetry=is_symmetry)
                return found if cell is primitive else _of_primitive(found, phonons)
        except (BORNFileParseError, ValueError, IndexError, UserWarning) as error:
            why = why or _line(error)
    raise ValueError(f"{path} cannot be read: {why}.\nIs it of this crystal?")


def _of_primitive(nac: Any, phonons: Any) -> Any:
    """Charges of all atoms of the unit cell, averaged over symmetry, of those of the primitive."""
    from phonopy.structure.symmetry import symmetrize_borns_and_epsilon

    born, dielectric = symmetrize_borns_and_epsilon(
        nac["born"],
        nac["dielectric"],
        phonons.unitcell,
        primitive_matrix=phonons.primitive_matrix,
        supercell_matrix=phonons.supercell_matrix,
    )
    return nac | {"born": born, "dielectric": dielectric}


def _line(error: BaseException) -> str:
    """Its first line without a full stop."""
    if isinstance(error, RecursionError):  # phonopy looks for the next line that is not empty
        return "it ends too early"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
