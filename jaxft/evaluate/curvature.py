"""Labels of second derivatives: force constants that are known become columns of a frame."""

from __future__ import annotations

import ase
import numpy as np

from jaxft.data import Keys
from jaxft.data.curvatures import arrays_of, columns
from jaxft.evaluate.candidate import JaxCandidate
from jaxft.evaluate.crystals import Crystal, new_phonons, supercell_of, to_ase
from jaxft.evaluate.hessian import force_constants


def labelled(
    crystal: Crystal,
    *,
    teacher: JaxCandidate | None = None,
    min_length: float = 10.0,
    is_at_rest: bool = False,
    keys: Keys | None = None,
) -> ase.Atoms:
    """The perfect supercell of a crystal with columns of its Hessian as labels.

    Columns are those of the atoms of one primitive cell: all others are translations of them. The
    energy of the perfect crystal is another calculation, and no label.

    Args:
      crystal: with a reference, FORCE_SETS or force constants; only its structure is used with
        a ``teacher``.
      teacher: a model whose exact second derivatives are the labels instead.
      min_length: of the supercell where the crystal says none, Å.
      is_at_rest: the crystal is the reference's own equilibrium: forces and stress of 0 are labels.
      keys: names of the labels.

    Raises:
      ValueError: there are no force constants, or they are not finite.
      ModuleNotFoundError: phonopy is not installed.
    """
    keys = keys or Keys()
    phonons = crystal.reference
    if teacher is not None:
        supercell = supercell_of(crystal, min_length)
        phonons = new_phonons(crystal.cell, supercell, crystal.primitive)
    elif phonons is None:
        raise ValueError(
            f"{crystal.missing or f'{crystal.name} comes without force constants'};\ngive a folder "
            "with FORCE_SETS or force constants, or a model as teacher."
        )
    atoms, chosen = to_ase(phonons.supercell), np.asarray(phonons.primitive.p2s_map)
    if teacher is not None:
        constants = force_constants(teacher.model, teacher.params, atoms, chosen, head=teacher.head)
    else:
        constants = np.asarray(phonons.force_constants)
        # phonopy's compact form has these rows alone
        constants = constants if len(constants) == len(chosen) else constants[chosen]
    if not np.isfinite(constants).all():
        raise ValueError(f"force constants of {crystal.name} are not finite.")
    atoms.arrays.pop("masses", None)
    atoms.arrays |= arrays_of(columns(constants, chosen), (keys.probe, keys.hessian))
    if is_at_rest:
        atoms.arrays[keys.forces] = np.zeros((len(atoms), 3))
        atoms.info[keys.stress] = np.zeros((3, 3))
    atoms.info["config_type"] = "hessian"
    return atoms
