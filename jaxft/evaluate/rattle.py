r"""Rattled and strained supercells for fine-tuning on phonons, spread evenly in energy.

The protocol of Equitrain's data: a structure is relaxed with the base model, repeated to a
supercell of some ten Å, its atoms are moved at random and its cell is scaled and strained; of many
such trials those are kept whose energies by the base model fill a window above the minimum
uniformly. So soft and stiff directions are seen alike, close to equilibrium and far from it.

Reference: Grandel, Benner and George, arXiv:2604.01017.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ase
import numpy as np
from ase.constraints import FixSymmetry

from jaxft.evaluate.candidate import Candidate, Flag
from jaxft.evaluate.finding import Finding, Row, Value
from jaxft.evaluate.relaxation import Relaxed, relax
from jaxft.evaluate.softmodes import repeats
from jaxft.evaluate.spacegroups import unfit
from jaxft.evaluate.trials import Ranges, Trial, even, trials_of, unevenness

MILLI = 1e3
POOL = 8
"""Trials per frame that is wanted, in every round."""
ROUNDS = 8
"""Of trials, until every energy is found."""
SYMPREC = 0.01
"""Å, of the symmetry that is kept while a parent is relaxed."""
PREFIX = "rattle_"
"""Of what is written into ``info``: no name that a label has anywhere."""

UNITS = {
    "frames": "",
    "atoms": "",
    "trials": "",
    "failed": "",
    "lowest": "meV/atom",
    "highest": "meV/atom",
    "unevenness": "",
    "amplitude": "Å",
    "smallest_volume": "",
    "largest_volume": "",
    "relax_steps": "",
}

NOTES = (
    "Energies are the base model's, above the relaxed structure. unevenness: largest distance "
    "between the distribution of energies and a uniform one (Kolmogorov–Smirnov), 1/frames or "
    "less where every energy was found. amplitude: mean over the frames. Volumes are relative.",
)


def rattle(
    candidate: Candidate,
    structures: Mapping[str, ase.Atoms],
    *,
    frames: int = 20,
    ranges: Ranges | None = None,
    seed: int = 0,
    fmax: float = 0.005,
    steps: int = 500,
) -> tuple[list[ase.Atoms], Finding]:
    """Frames for a reference calculation, without anything that looks like its result.

    Args:
      candidate: the base model.
      structures: equilibrium structures by name; they are relaxed first, under their own symmetry,
        with their cells where all directions are periodic.
      frames: of each structure.
      ranges: see :class:`Ranges`.
      seed: of everything that is drawn, with the name: other structures change nothing.
      fmax: eV/Å, where relaxations end.
      steps: of a relaxation, at most.

    Returns:
      The frames, those of one structure together in order of energy, with ``rattle_parent``,
      ``rattle_amplitude`` (Å), ``rattle_volume``, ``rattle_strain``, ``rattle_base_energy``
      (eV/atom above the relaxed structure, by the base model), ``rattle_model`` and
      ``rattle_seed`` in ``info``; and a row per structure, flagged where frames are missing.

    Raises:
      ValueError: no structure or frame is asked for, or a structure has cells to be strained that
        it has not.
    """
    ranges = ranges or Ranges()
    _check(structures, frames, ranges)
    found: list[ase.Atoms] = []
    rows = []
    wrong = {name: _unfit(atoms) for name, atoms in structures.items()}
    starts = [_symmetric(atoms) for name, atoms in structures.items() if not wrong[name]]
    parents = iter(relax(candidate, starts, fmax=fmax, steps=steps, optimizer="LBFGS"))
    for name, reason in wrong.items():
        if reason:
            rows.append(Row(candidate.name, name, {"frames": 0}, reason))
            continue
        draws = np.random.default_rng([seed, *name.encode()])
        chosen, row = _of_one(candidate, name, next(parents), frames, ranges, draws)
        for atoms in chosen:
            atoms.info |= {f"{PREFIX}model": candidate.name, f"{PREFIX}seed": seed}
        found += chosen
        rows.append(row)
    settings = {**vars(ranges), "frames": frames, "seed": seed, "fmax": fmax, "steps": steps}
    return found, Finding("rattle", tuple(rows), UNITS, settings, (), NOTES)


def _check(structures: Mapping[str, ase.Atoms], frames: int, ranges: Ranges) -> None:
    if not structures or frames < 1:
        raise ValueError(
            f"{frames} frames of {len(structures)} structures were asked for; give at least one."
        )
    open_ones = [name for name, atoms in structures.items() if not atoms.pbc.all()]
    if open_ones and ranges.changes_cells:
        raise ValueError(
            f"{', '.join(open_ones)}: not periodic in three directions, so there is no volume to "
            "change; use volume 1 1 and strain 0 (--volume 1 1 --strain 0)."
        )


def _unfit(atoms: ase.Atoms) -> str | None:
    """Why nothing can be made of a structure."""
    if reason := unfit(atoms, SYMPREC):
        return reason
    try:
        repeats(atoms, 1.0)
    except ValueError as error:
        return str(error)
    return None


def _symmetric(atoms: ase.Atoms) -> ase.Atoms:
    """To be relaxed under its symmetry: an unstable phase is a parent too."""
    start = atoms.copy()
    start.calc = None
    start.set_constraint(FixSymmetry(start, symprec=SYMPREC) if start.pbc.all() else None)
    return start


def _of_one(
    candidate: Candidate,
    name: str,
    parent: Relaxed,
    count: int,
    ranges: Ranges,
    draws: np.random.Generator,
) -> tuple[list[ase.Atoms], Row]:
    if parent.energy is None or parent.flag is not None:
        return [], Row(candidate.name, name, {"frames": 0}, f"not relaxed: {parent.flag}")
    zero = parent.energy / len(parent.atoms)
    parent.atoms.set_constraint()
    parent.atoms.calc = None
    supercell = parent.atoms.repeat(repeats(parent.atoms, ranges.min_length))
    trials: list[Trial] = []
    energies = np.empty(0)
    chosen: list[int | None] = [None] * count
    for _ in range(ROUNDS):
        more = list(trials_of(supercell, POOL * count, ranges, draws))
        outcomes = candidate.evaluate([trial.atoms for trial in more])
        said = [np.nan if isinstance(o, Flag) else o.energy / len(supercell) for o in outcomes]
        trials, energies = trials + more, np.concatenate([energies, np.array(said) - zero])
        chosen = even(energies, count, ranges.window)
        if None not in chosen:
            break
    picked = [i for i in chosen if i is not None]
    frames = [_labelled(trials[i], name, float(energies[i])) for i in picked]
    values: dict[str, Value] = {
        "frames": len(picked),
        "atoms": len(supercell),
        "trials": len(trials),
        "failed": int(np.isnan(energies).sum()),
        "relax_steps": parent.steps,
        **_described([trials[i] for i in picked], energies[picked], ranges.window),
    }
    return frames, Row(candidate.name, name, values, _missing(chosen, energies, ranges.window))


def _labelled(trial: Trial, parent: str, energy: float) -> ase.Atoms:
    atoms = trial.atoms
    known: dict[str, Any] = {
        "parent": parent,
        "amplitude": trial.amplitude,
        "volume": trial.volume,
        "strain": trial.strain,
        "base_energy": energy,
    }
    atoms.info = {PREFIX + key: value for key, value in known.items()} | _features(atoms.info)
    return atoms


def _features(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a calculation must know of the parent; its labels are of another structure."""
    kept = ("charge", "spin", "total_charge", "total_spin")
    return {key: info[key] for key in kept if key in info}


def _described(
    picked: Sequence[Trial], energies: np.ndarray, window: tuple[float, float]
) -> dict[str, Value]:
    if not picked:
        return {}
    volumes = [trial.volume for trial in picked]
    return {
        "lowest": MILLI * float(energies.min()),
        "highest": MILLI * float(energies.max()),
        "unevenness": unevenness(energies, window),
        "amplitude": float(np.mean([trial.amplitude for trial in picked])),
        "smallest_volume": min(volumes),
        "largest_volume": max(volumes),
    }


def _missing(
    chosen: Sequence[int | None], energies: np.ndarray, window: tuple[float, float]
) -> str | None:
    """Which energies were not found, and what to change."""
    empty = [i for i, place in enumerate(chosen) if place is None]
    if not empty:
        return None
    known = energies[~np.isnan(energies)]
    if not len(known):
        return f"none of {len(energies)} trials has an energy; is the amplitude too large?"
    edges = MILLI * np.linspace(*window, len(chosen) + 1)
    low, high = MILLI * known.min(), MILLI * known.max()
    if high < edges[-1]:
        advice = "raise the amplitude, or lower the window"
    elif low > edges[empty[0]]:
        advice = "lower the smallest amplitude and narrow volume and strain, or raise the window"
    else:
        advice = "ask for fewer frames"
    return (
        f"{len(empty)} of {len(chosen)} energies were not found, the first between "
        f"{edges[empty[0]]:.3g} and {edges[empty[0] + 1]:.3g} meV/atom; {len(known)} trials reach "
        f"from {low:.3g} to {high:.3g}: {advice}"
    )
