"""Random crystals, by PyXtal."""

from __future__ import annotations

from collections.abc import Sequence

import ase
import numpy as np
from ase.formula import Formula

SPACE_GROUPS = 230
MOST_TRIES = 200
"""Of space groups, for one structure."""


def random_crystals(
    composition: str, count: int, *, seed: int, factor: float = 1.1
) -> list[ase.Atoms]:
    """Crystals of random space groups, lattices and sites, by PyXtal.

    Args:
      composition: what a conventional cell holds, ``Na4Cl4``.
      count: how many.
      seed: the same structures for the same version of PyXtal.
      factor: of the volume that PyXtal expects of the covalent radii.

    Raises:
      ValueError: the composition is no formula, or almost no space group can hold it.
      ImportError: pyxtal is not installed.
    """
    species, numbers = formula_of(composition)
    try:
        from pyxtal import pyxtal
        from pyxtal.msg import Comp_CompatibilityError, Symm_CompatibilityError, VolumeError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"random crystals need pyxtal, and {error.name} is not installed;\n"
            "use pip install 'jaxft[rss]', or give structures of your own."
        ) from error
    rng = np.random.default_rng(seed)
    found: list[ase.Atoms] = []
    for _ in range(MOST_TRIES * count):
        crystal = pyxtal()
        group, state = (int(rng.integers(*ends)) for ends in ((1, SPACE_GROUPS + 1), (0, 2**31)))
        try:
            crystal.from_random(
                3, group, list(species), list(numbers), factor=factor, random_state=state
            )
        except (Comp_CompatibilityError, Symm_CompatibilityError, VolumeError):
            continue
        if crystal.valid:
            atoms = crystal.to_ase()
            found.append(ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True))
        if len(found) == count:
            return found
    raise ValueError(
        f"only {len(found)} of {count} random crystals of {composition} were found; give a "
        "composition that more space groups can hold, such as one with four formula units."
    )


def formula_of(composition: str) -> tuple[Sequence[str], Sequence[int]]:
    """Symbols and how many of each.

    Raises:
      ValueError: this is no formula.

    Example:
      >>> formula_of("Na4Cl4")
      (('Na', 'Cl'), (4, 4))
    """
    try:
        counts = Formula(composition).count()
        ase.Atoms(composition)  # knows the elements
    except (ValueError, KeyError) as error:
        raise ValueError(f"{composition!r} is no formula; give one like Na4Cl4.") from error
    if not counts:
        raise ValueError("an empty composition has no crystals; give one like Na4Cl4.")
    return tuple(counts), tuple(counts.values())
