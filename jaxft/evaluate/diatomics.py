"""Curves of two atoms: is there a wall, is there one well, is it smooth?

Definitions of ml-peg (flips of the force, minima, inflections, Spearman's correlations) and of
Matbench Discovery (tortuosity, energy jump, distance of walls), whose sources they were read in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import ase
import ase.units as units
import numpy as np
from ase.data import atomic_masses, atomic_numbers, covalent_radii
from scipy.signal import find_peaks
from scipy.stats import spearmanr

from jaxft.evaluate.candidate import Candidate, Flag, Outcome, check_names
from jaxft.evaluate.finding import Finding, Line, Picture, Row, Value

SHORTEST, LONGEST, POINTS = 0.18, 6.0, 100
SMALL_FORCE = 0.01
"""eV/Å; smaller forces have no sign, as the next two."""
SMALL_CURVATURE = 0.5
"""eV/Å²."""
SMALL_DIFFERENCE = 1e-3
"""eV."""
PROMINENCE = 0.1
"""eV, of a minimum."""
WALLS = (1.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""eV above the well."""
SHALLOW = 0.05
"""eV; no bond length is told of a shallower well."""
TOO_CLOSE = 0.5
"""Of the sum of covalent radii; no molecule is this short."""
HIGHEST = 8.0
"""eV, of a picture."""

UNITS = {
    "pairs": "",
    "force_flips": "",
    "minima": "",
    "inflections": "",
    "spearman_repulsion": "",
    "spearman_attraction": "",
    "tortuosity": "",
    "energy_flips": "",
    "energy_jump": "eV",
    "wall_height": "eV",
    "bond_length": "Å",
    "well_depth": "eV",
    "frequency": "1/cm",
    "wall_distance": "Å",
    "energy_mae": "eV",
}
ALL = "mean of pairs"
NOTES = (
    "ideal: one force flip, one minimum, Spearman −1 inside the minimum and +1 outside, tortuosity "
    "1, no jump. wall distance and energy MAE are against the reference model.",
)


@dataclass(frozen=True, eq=False)
class Dissociation:
    """Energies (eV, 0 at the largest distance) and forces along the pair (eV/Å, > 0 repels)."""

    r: np.ndarray
    energy: np.ndarray
    force: np.ndarray


def check(
    candidates: Sequence[Candidate],
    elements: Sequence[str],
    *,
    against: str | None = None,
    shortest: float = SHORTEST,
    longest: float = LONGEST,
    points: int = POINTS,
) -> Finding:
    """Curves of all pairs of ``elements``, one batch per model.

    Args:
      candidates: who is judged.
      elements: symbols.
      against: the name of the candidate whose curves are the reference.
      shortest: Å.
      longest: Å.
      points: of each curve, at equal distances.

    Raises:
      ValueError: names occur twice or are not known, an element is none, or distances make no
        sense.
    """
    check_names(candidates)
    unknown = [e for e in elements if atomic_numbers.get(e, 0) < 1]
    if unknown or not elements:
        raise ValueError(f"{', '.join(unknown) or 'nothing'} is no element; give symbols: Na Cl.")
    if against is not None and against not in [c.name for c in candidates]:
        raise ValueError(f"{against!r} is none of the models; name one of them.")
    if not 0 < shortest < longest or points < 10:
        raise ValueError("distances must grow from above 0, in at least 10 points; give others.")
    pairs = list(combinations_with_replacement(dict.fromkeys(elements), 2))
    r = np.linspace(shortest, longest, points)
    found = {c.name: _curves(c, pairs, r) for c in candidates}
    rows: list[Row] = []
    for model, curves in found.items():
        known = found[against] if against not in (None, model) else {}
        some = [_row(model, pair, curve, known.get(pair)) for pair, curve in curves.items()]
        rows += [*some, _mean(model, some)] if len(some) > 1 else some
    pictures = tuple(_picture(pair, found) for pair in pairs)
    settings = {"shortest": shortest, "longest": longest, "points": points, "against": against}
    return Finding("diatomics", tuple(rows), UNITS, settings, pictures, NOTES)


Curves = Mapping[tuple[str, str], Dissociation | Flag]


def _curves(
    candidate: Candidate, pairs: Sequence[tuple[str, str]], r: np.ndarray
) -> dict[tuple[str, str], Dissociation | Flag]:
    structures = [ase.Atoms(pair, [[0, 0, 0], [0, 0, x]]) for pair in pairs for x in r]
    outcomes = candidate.evaluate(structures)
    return {
        pair: _curve(r, outcomes[i * len(r) : (i + 1) * len(r)]) for i, pair in enumerate(pairs)
    }


def _curve(r: np.ndarray, outcomes: Sequence[Outcome]) -> Dissociation | Flag:
    sound = [o for o in outcomes if not isinstance(o, Flag)]
    lost = [(x, o) for x, o in zip(r, outcomes, strict=True) if isinstance(o, Flag)]
    if lost:
        return Flag(
            f"{len(lost)} of {len(r)} points, first {lost[0][0]:.3g} Å: {lost[0][1].reason}"
        )
    energy = np.array([o.energy for o in sound])
    force = np.array([(o.forces[1, 2] - o.forces[0, 2]) / 2 for o in sound])
    return Dissociation(r, energy - energy[-1], force)


def measures(curve: Dissociation) -> dict[str, Value]:
    """What can be said of a curve alone."""
    r, energy = curve.r, curve.energy
    lowest = int(np.argmin(energy))
    steps = np.diff(energy)
    steps = steps[abs(steps) >= SMALL_DIFFERENCE]
    flips = np.flatnonzero(np.diff(np.sign(steps)))
    curvature = np.gradient(np.gradient(energy, r), r)
    # ends are no peaks for scipy: a well at the shortest distance is seen by its place
    minima, _ = find_peaks(-energy, prominence=PROMINENCE, width=1)
    values: dict[str, Value] = {
        "force_flips": _sign_changes(curve.force, SMALL_FORCE),
        "minima": len(minima),
        "inflections": _sign_changes(curvature, SMALL_CURVATURE),
        "spearman_repulsion": _spearman(r[: lowest + 1], energy[: lowest + 1]),
        "spearman_attraction": _spearman(r[lowest:], energy[lowest:]),
        "tortuosity": tortuosity(energy),
        "energy_flips": len(flips),
        "energy_jump": float((abs(steps[flips]) + abs(steps[flips + 1])).sum()),
        "wall_height": float(energy[: lowest + 1].max() - energy[lowest]),
    }
    return values


def tortuosity(energy: np.ndarray) -> float | None:
    """Path over the least that a curve with this minimum needs; None of a flat curve.

    Example:
      >>> tortuosity(np.array([3.0, 0.0, 1.0]))
      1.0
    """
    least = abs(energy[0] - energy.min()) + abs(energy[-1] - energy.min())
    return float(abs(np.diff(energy)).sum() / least) if least > 0 else None


def bond(pair: tuple[str, str], curve: Dissociation) -> dict[str, Value]:
    """Length, depth and frequency, of a quadratic through five points; nothing without a well."""
    lowest = int(np.argmin(curve.energy))
    if curve.energy[lowest] > -SHALLOW or not 2 <= lowest < len(curve.r) - 2:
        return {}
    near = slice(lowest - 2, lowest + 3)
    middle = curve.r[lowest]
    a, b, c = np.polyfit(curve.r[near] - middle, curve.energy[near], 2)
    masses = [atomic_masses[atomic_numbers[symbol]] for symbol in pair]
    reduced = masses[0] * masses[1] / sum(masses)
    hbar = units._hbar * units.J * units.s
    quantum = hbar * np.sqrt(2 * a / reduced) if a > 0 else np.nan
    return {
        "bond_length": float(middle - b / (2 * a)),
        "well_depth": float(b * b / (4 * a) - c),
        "frequency": float(quantum / units.invcm),
    }


def wall_distance(found: Dissociation, reference: Dissociation) -> float | None:
    """Å, mean over ``WALLS`` of how far apart the walls are; a missing wall costs its place.

    None if the reference has no wall.
    """
    walls = [_crossing(reference, height) for height in WALLS]
    known = [(height, place) for height, place in zip(WALLS, walls, strict=True) if place]
    if not known:
        return None
    places = ((_crossing(found, height), place) for height, place in known)
    return float(np.mean([abs((place or 0.0) - there) for place, there in places]))


def _crossing(curve: Dissociation, height: float) -> float | None:
    """Where the wall is so high above the well, linearly between points."""
    lowest = int(np.argmin(curve.energy))
    above = curve.energy[: lowest + 1] - curve.energy[lowest] - height
    inside = np.flatnonzero(above >= 0)
    if not inside.size:
        return None
    k = int(inside[-1])
    share = above[k] / (above[k] - above[k + 1])
    return float(curve.r[k] + share * (curve.r[k + 1] - curve.r[k]))


def _sign_changes(values: np.ndarray, small: float) -> int:
    signs = np.sign(values[abs(values) > small])
    return int((np.diff(signs) != 0).sum())


def _spearman(r: np.ndarray, energy: np.ndarray) -> float | None:
    if len(r) < 3 or np.ptp(energy) == 0:
        return None
    return float(spearmanr(r, energy).statistic)


def _row(
    model: str,
    pair: tuple[str, str],
    curve: Dissociation | Flag,
    reference: Dissociation | Flag | None,
) -> Row:
    subject = "–".join(pair)
    if isinstance(curve, Flag):
        return Row(model, subject, {}, curve.reason)
    values = measures(curve) | bond(pair, curve)
    if isinstance(reference, Dissociation):
        values["wall_distance"] = wall_distance(curve, reference)
        values["energy_mae"] = float(abs(curve.energy - reference.energy).mean())
    place = curve.r[int(np.argmin(curve.energy))]
    limit = TOO_CLOSE * sum(covalent_radii[atomic_numbers[symbol]] for symbol in pair)
    if curve.energy.min() < -SHALLOW and place < limit:
        return Row(model, subject, values, f"a hole: the lowest energy is at {place:.2f} Å")
    if isinstance(reference, Flag):
        return Row(model, subject, values, f"there is no reference: {reference.reason}")
    minima = values["minima"]
    if isinstance(minima, int) and minima > 1:
        return Row(model, subject, values, f"{minima} minima")
    return Row(model, subject, values)


def _mean(model: str, rows: Sequence[Row]) -> Row:
    lost = sum(not row.values for row in rows)
    numbers: dict[str, Value] = {"pairs": len(rows) - lost}
    for column in UNITS:
        found = [v for row in rows if isinstance(v := row.values.get(column), int | float)]
        finite = [float(v) for v in found if np.isfinite(v)]
        if finite:
            numbers[column] = float(np.mean(finite))
    return Row(model, ALL, numbers, f"{lost} of {len(rows)} pairs left out" if lost else None)


def _picture(pair: tuple[str, str], found: Mapping[str, Curves]) -> Picture:
    lines = [
        Line(model, curve.r, np.where(curve.energy > HIGHEST, np.nan, curve.energy))
        for model, curves in found.items()
        if not isinstance(curve := curves[pair], Flag)
    ]
    return Picture("–".join(pair), "distance, Å", "energy, eV", tuple(lines))
