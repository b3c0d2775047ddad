"""Space groups, through spglib."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import ase
import numpy as np

DENSEST = 0.5
"""Å³/atom; below this a cell is a mistake."""


class SpaceGroup(NamedTuple):
    """Of the 230."""

    number: int
    symbol: str

    def __str__(self) -> str:
        return f"{self.symbol} ({self.number})"


def space_group(atoms: ase.Atoms, symprec: float) -> SpaceGroup | None:
    """Of a crystal within ``symprec`` Å; None where spglib finds none."""
    cell = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
    spglib = _spglib()
    try:
        found = spglib.get_symmetry_dataset(cell, symprec=symprec)
    except spglib.SpglibError:  # older versions answer None
        return None
    return None if found is None else named_group(int(found.number))


def unfit(atoms: ase.Atoms, symprec: float) -> str | None:
    """Why a structure's symmetry cannot be kept or looked for; None where it can."""
    if not len(atoms):
        return "there are no atoms"
    if not np.isfinite(atoms.positions).all() or not np.isfinite(atoms.cell.array).all():
        return "positions or cell are not finite"
    if not atoms.pbc.all():
        return None
    volume = abs(float(np.linalg.det(atoms.cell.array))) / len(atoms)
    if volume < DENSEST:
        return f"{volume:.2g} Å³/atom is no volume of a crystal"
    if space_group(atoms, symprec) is None:
        return "spglib finds no symmetry; are atoms on top of one another?"
    return None


def named_group(name: str | int) -> SpaceGroup:
    """By number or by short international symbol of any setting: ``62``, ``"Pnma"``, ``"P b n m"``.

    Raises:
      ValueError: there is no such space group.
    """
    wanted = str(name).replace(" ", "").replace("_", "")
    number = _numbers().get(wanted)
    if number is None:
        raise ValueError(
            f"{name!r} is no space group; give its number (1 to 230) or its short international "
            "symbol, such as Pm-3m."
        )
    return SpaceGroup(number, _symbols(number)[0])


@functools.cache
def _numbers() -> dict[str, int]:
    """By number, and by symbol without underscores."""
    found = {str(number): number for number in range(1, 231)}
    for number in range(1, 231):
        found |= {symbol.replace("_", ""): number for symbol in _symbols(number)}
    return found


@functools.cache
def _symbols(number: int) -> tuple[str, ...]:
    """Of all settings, that of the standard one first."""
    return tuple(t.international_short for t in _types() if t.number == number)


@functools.cache
def _types() -> tuple[Any, ...]:
    return tuple(_spglib().get_spacegroup_type(hall) for hall in range(1, 531))


def _spglib() -> Any:
    try:
        import spglib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "space groups need spglib, which is not installed;\nuse pip install 'jaxft[phonons]'."
        ) from error
    return spglib
