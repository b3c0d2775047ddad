"""Where structures relax to: steps, volume, displacements, space group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ase
import numpy as np
from ase.geometry import find_mic
from ase.units import GPa

from jaxft.evaluate.candidate import Candidate, check_names
from jaxft.evaluate.finding import Finding, Row, Value
from jaxft.evaluate.relaxation import Relaxed, collapse, relax
from jaxft.evaluate.spacegroups import space_group

UNITS = {
    "steps": "",
    "fmax": "meV/Å",
    "energy": "eV/atom",
    "energy_gain": "meV/atom",
    "volume_change": "%",
    "rmsd": "",
    "rmsd_length": "Å",
    "space_group_before": "",
    "space_group_after": "",
    "keeps_symmetry": "",
}

NOTES = (
    "rmsd_length: of the atoms' displacements in the relaxed cell, without the change of the cell "
    "and a common shift; rmsd: the same over (V/N)^(1/3), the normalisation of pymatgen's "
    "StructureMatcher.",
)


def check(
    candidates: Sequence[Candidate],
    structures: Mapping[str, ase.Atoms],
    *,
    cell: bool = True,
    fmax: float = 0.05,
    steps: int = 500,
    optimizer: str = "FIRE",
    symprec: float = 1e-2,
    pressure: float = 0.0,
) -> Finding:
    """Relax every structure with every model, and compare with where it started.

    A structure that does not converge is a flagged row with what was reached.

    Args:
      candidates: who is judged.
      structures: by name; reference structures, if the change is to be an error.
      cell: relax the cell too, of structures periodic in three directions.
      fmax: eV/Å.
      steps: at most.
      optimizer: as in :func:`jaxft.evaluate.relaxation.relax`.
      symprec: Å, how far atoms may be from symmetric places.
      pressure: GPa.

    Raises:
      ValueError: names occur twice, there are no structures, or a setting makes no sense.
      ImportError: spglib is not installed.
    """
    check_names(candidates)
    if not structures:
        raise ValueError("no structures to relax; give at least one.")
    before = {name: _group(atoms, symprec) for name, atoms in structures.items()}
    rows = []
    for candidate in candidates:
        found = relax(
            candidate,
            list(structures.values()),
            cell=cell,
            fmax=fmax,
            steps=steps,
            optimizer=optimizer,
            pressure=pressure * GPa,
            stop=collapse,
        )
        start = dict(zip(structures, candidate.evaluate(list(structures.values())), strict=True))
        for (name, atoms), result in zip(structures.items(), found, strict=True):
            values = _values(atoms, result, before[name], symprec)
            energy = getattr(start[name], "energy", None)
            if energy is not None and result.energy is not None:
                values["energy_gain"] = 1e3 * (energy - result.energy) / len(atoms)
            rows.append(Row(candidate.name, name, values, result.flag))
    settings = {
        "cell": cell,
        "fmax": fmax,
        "steps": steps,
        "optimizer": optimizer,
        "symprec": symprec,
        "pressure_gpa": pressure,
    }
    return Finding("relax", tuple(rows), UNITS, settings, (), NOTES)


def _values(
    start: ase.Atoms, result: Relaxed, group: str | None, symprec: float
) -> dict[str, Value]:
    values: dict[str, Value] = {
        "steps": result.steps,
        "fmax": None if result.fmax is None else 1e3 * result.fmax,
        "energy": None if result.energy is None else result.energy / len(start),
        "space_group_before": group,
    }
    if result.fmax is None:
        return values
    length = displacement(start, result.atoms)
    values["rmsd_length"] = length
    if start.pbc.all():
        after = _group(result.atoms, symprec)
        volume = result.atoms.get_volume()
        values |= {
            "volume_change": 100 * (volume / start.get_volume() - 1),
            "rmsd": length / (volume / len(start)) ** (1 / 3),
            "space_group_after": after,
            "keeps_symmetry": after == group,
        }
    return values


def displacement(before: ase.Atoms, after: ase.Atoms) -> float:
    """Å, root mean square over atoms, in the cell of ``after`` and without a common shift.

    Both hold the same atoms in the same order.
    """
    if not before.pbc.any():
        moved = after.positions - before.positions
    else:
        moved = after.positions - before.cell.scaled_positions(before.positions) @ after.cell
        moved, _ = find_mic(moved, after.cell, after.pbc)
    moved = moved - moved.mean(axis=0)
    return float(np.sqrt((moved**2).sum(axis=1).mean()))


def _group(atoms: ase.Atoms, symprec: float) -> str | None:
    """``Fm-3m (225)``; None of what is not periodic in three directions or not found."""
    found = space_group(atoms, symprec) if atoms.pbc.all() else None
    return None if found is None else str(found)
