"""The mean and spread of an ensemble, frame by frame, and the frames to label next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ase
import ase.io
import numpy as np

from jaxft.bundle import refuse_existing
from jaxft.evaluate.candidate import Candidate, Flag, ProgressFn, check_names
from jaxft.evaluate.ensemble import opinions


@dataclass(frozen=True, eq=False)
class Spread:
    """Mean and standard deviation of an ensemble on one frame."""

    members: int
    energy: float
    """eV, total, of the mean."""
    energy_std: float
    """eV/atom."""
    forces: np.ndarray
    """[n, 3] eV/Å, of the mean."""
    forces_std: np.ndarray
    """[n, 3] eV/Å, of every component."""

    @property
    def atoms_std(self) -> np.ndarray:
        """[n] eV/Å, of the force vectors."""
        return np.linalg.norm(self.forces_std, axis=1)

    @property
    def worst(self) -> float:
        """eV/Å, of the atom that the members disagree on most."""
        return float(self.atoms_std.max())


Spreads = Sequence[Spread | Flag]
"""Of frames in their order."""


def spreads(
    members: Sequence[Candidate],
    structures: Sequence[ase.Atoms],
    progress: ProgressFn | None = None,
) -> list[Spread | Flag]:
    """Mean and spread of an ensemble on every structure, or why there is none.

    Members that are potentials of ours and differ in their parameters alone (last-layer and LoRA
    ensembles, seeds) are evaluated together, see :mod:`jaxft.evaluate.ensemble`.

    Raises:
      ValueError: there are less than two members, or two of one name.
    """
    check_names(members)
    if len(members) < 2:
        raise ValueError(
            f"an ensemble of {len(members)} model has no spread; give two models or more."
        )
    found: list[Spread | Flag] = []
    for said in zip(*opinions(members, structures, progress), strict=True):
        flags = {
            f"{m.name}: {o.reason}"
            for m, o in zip(members, said, strict=True)
            if isinstance(o, Flag)
        }
        if flags:
            found.append(Flag("; ".join(sorted(flags))))
            continue
        results = [outcome for outcome in said if not isinstance(outcome, Flag)]
        energies = np.array([r.energy for r in results])
        forces = np.stack([r.forces for r in results])
        found.append(
            Spread(
                len(members),
                float(energies.mean()),
                float(energies.std(ddof=1)) / forces.shape[1],
                forces.mean(axis=0),
                forces.std(axis=0, ddof=1),
            )
        )
    return found


def ranking(found: Spreads) -> list[int]:
    """Positions of the frames, those with the largest spread of forces first; flagged ones are
    left out."""
    known = [(i, s.worst) for i, s in enumerate(found) if isinstance(s, Spread)]
    return [i for i, _ in sorted(known, key=lambda pair: -pair[1])]


def write_ranked(
    path: str | Path, structures: Sequence[ase.Atoms], found: Spreads, *, most: int | None = None
) -> int:
    """Write frames for labelling, the most uncertain first, as extended XYZ.

    Each keeps its ``info`` and ``arrays`` and gets ``spread_rank``, ``spread_forces_max`` (eV/Å)
    and ``spread_energy`` (eV/atom) in ``info``, ``spread_forces`` (eV/Å) per atom. Results of a
    calculator are not kept: nothing that is not a label can be taken for one.

    Returns:
      How many were written.

    Raises:
      FileExistsError: ``path`` exists.
      ValueError: no frame has a spread, or the suffix is another.
    """
    check_ranked(Path(path))
    chosen = ranking(found)[:most]
    written = []
    for rank, i in enumerate(chosen):
        spread, atoms = found[i], structures[i].copy()
        assert isinstance(spread, Spread)
        atoms.info |= {
            "spread_rank": rank,
            "spread_forces_max": spread.worst,
            "spread_energy": spread.energy_std,
        }
        atoms.set_array("spread_forces", spread.atoms_std)
        written.append(atoms)
    if not written:
        raise ValueError("no frame has a spread, so there is nothing to rank; see their flags.")
    ase.io.write(path, written, format="extxyz")
    return len(written)


def check_ranked(path: Path) -> None:
    """Raises FileExistsError, or ValueError, unless a ranking can be written there."""
    refuse_existing(path)
    if path.suffix not in (".xyz", ".extxyz"):
        raise ValueError(f"{path} is no .xyz or .extxyz; give such a name.")
