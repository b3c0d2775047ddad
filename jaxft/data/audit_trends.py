"""Do energies, forces and stresses of one set belong together? Answered by pairs of near frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ase import units

from jaxft.data.finding import Finding
from jaxft.data.frames import Frame

FAR = 0.5
"""Å, the largest move of an atom, and STRAINED, the largest strain, within a pair: beyond them the
trapezoid rule, exact for parabolas, is too rough."""
STRAINED = 0.06

MOVED = 10.0
"""Å; largest move of an atom per strain in a pair that tells of the stress."""

FRAMES_PER_GROUP = 60
"""Of one composition that are compared, in runs of neighbours; pairs grow as its square."""
PARTNERS = 3
"""Nearest frames that a frame is paired with, about."""

MIN_PAIRS = 8
SOUND = 1.6
"""Factor that a sound slope stays within: 0.82 to 1.05 in forty public sets. Below any unit's."""
CLEAR = 0.6
"""Share of the pairs that must follow one slope before it says anything."""
MUDDLED = 0.3
"""Share below which forces of 30 pairs or more have nothing to do with the energies."""

FACTORS = {
    "the force unit is Hartree/Bohr, the energy unit eV": units.Hartree / units.Bohr,
    "the energy unit is Hartree, the force unit eV/Å": 1 / units.Hartree,
    "the energy unit is kcal/mol, the force unit eV/Å": units.mol / units.kcal,
    "the force unit is kcal/mol/Å, the energy unit eV": units.kcal / units.mol,
    "the energy unit is kJ/mol, the force unit eV/Å": units.mol / units.kJ,
    "the force unit is kJ/mol/Å, the energy unit eV": units.kJ / units.mol,
    "forces are per Bohr, or lengths in Bohr": 1 / units.Bohr,
    "forces are per Å, but lengths in Bohr": units.Bohr,
    "the force unit is Rydberg/Bohr, the energy unit eV": units.Rydberg / units.Bohr,
    "the energy unit is Rydberg, the force unit eV/Å": 1 / units.Rydberg,
    "the energy unit is meV, the force unit eV/Å": 1e3,
    "the force unit is meV/Å, the energy unit eV": 1e-3,
    "the right sign and unit": 1.0,
}
"""What the ratio of energy differences to the work of the forces says of their units."""

STRESS_FACTORS = {
    "the unit is GPa": units.GPa,
    "the unit is kbar": 0.1 * units.GPa,
    "the unit is Hartree/Bohr³": units.Hartree / units.Bohr**3,
    "the energy unit is kcal/mol": units.mol / units.kcal,
    "the energy unit is Hartree": 1 / units.Hartree,
    "the right unit": 1.0,
}


class Trend(NamedTuple):
    """How energy differences follow the work of a label over pairs of near frames."""

    label: str
    pairs: int
    slope: float
    """Energy difference over work; 1 for labels that belong together."""
    agreement: float
    """Share of the pairs, weighted by their work, that are within a quarter of the slope."""


class _Pairs(NamedTuple):
    """[p] each: what one pair of frames tells."""

    first: np.ndarray
    """Position of one frame of the pair."""
    energy: np.ndarray
    """eV, difference."""
    force_work: np.ndarray
    """eV, −F·Δx."""
    stress_work: np.ndarray
    """eV, V σ:ε."""
    strain: np.ndarray
    """Largest component."""
    move: np.ndarray
    """Å, largest of an atom beyond the strain."""
    n_atoms: np.ndarray


def trends(frames: Sequence[Frame]) -> tuple[list[Trend], list[Finding]]:
    """Compare energy differences with the work of forces and stresses, where frames allow it.

    Frames of one ``config_type`` that hold the same atoms in the same order and are close to one
    another are paired; along a pair ΔE = −F̄·Δx + V̄σ̄:ε with the means of its ends.

    Returns:
      What was found for forces and stress, as far as there are ``MIN_PAIRS`` pairs, and findings.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, frame in enumerate(frames):
        is_labelled = frame.energy is not None and frame.forces is not None
        is_free_or_bulk = all(frame.pbc) or not any(frame.pbc)
        if is_labelled and is_free_or_bulk and len(frame) > 1:
            key = (frame.config_type, frame.pbc, frame.atomic_numbers.tobytes())
            groups.setdefault(key, []).append(i)
    found = [_pairs(frames, _runs(members)) for members in groups.values() if len(members) > 1]
    if not found:
        return [], []
    pairs = _Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))
    sources = [frames[i].source for i in pairs.first]
    seen: list[Trend] = []
    findings: list[Finding] = []
    at_rest = pairs.strain < 1e-6
    forces = _trend("forces", pairs.energy[at_rest], pairs.force_work[at_rest])
    if forces is not None:
        seen.append(forces)
        findings += _judge_forces(forces, pairs.n_atoms[at_rest], _first(sources, at_rest))
    slope = forces.slope if forces is not None and forces.agreement > CLEAR else 1.0
    # where atoms move much as well, the work of the stress is a small difference
    strained = (pairs.strain > 1e-3) & (pairs.move < MOVED * pairs.strain)
    rest = pairs.energy - slope * pairs.force_work
    stress = _trend("stress", rest[strained], pairs.stress_work[strained])
    if stress is not None:
        seen.append(stress)
        # where both slopes are wrong alike, it is the energies: said once
        is_wrong = any(finding.severity == "error" for finding in findings)
        alike = is_wrong and 1 / SOUND < stress.slope / slope < SOUND
        findings += [] if alike else _judge_stress(stress, _first(sources, strained))
    return seen, findings


def _first(sources: Iterable[str], chosen: np.ndarray) -> tuple[str, ...]:
    return tuple(dict.fromkeys(s for s, c in zip(sources, chosen, strict=True) if c))[:3]


def _runs(members: Sequence[int]) -> list[int]:
    """At most FRAMES_PER_GROUP of them, in four runs: trajectories have their near frames there."""
    if len(members) <= FRAMES_PER_GROUP:
        return list(members)
    length = FRAMES_PER_GROUP // 4
    starts = np.linspace(0, len(members) - length, 4).astype(int)
    return [members[i] for i in sorted({int(s) + k for s in starts for k in range(length)})]


def _pairs(frames: Sequence[Frame], members: Sequence[int]) -> _Pairs:
    chosen = [frames[i] for i in members]
    a, b = np.triu_indices(len(chosen), 1)
    moves, strains, volumes = _geometry(chosen, a, b)
    size = np.sqrt((moves**2).sum(-1)).max(1)
    strain = np.abs(strains).max((1, 2))
    has_stress = np.array([frame.stress is not None for frame in chosen])
    is_near = (size < FAR) & (strain < STRAINED) & (size + strain > 1e-6)
    is_near &= (strain < 1e-6) | (has_stress[a] & has_stress[b])
    kept = _nearest(a, b, size + 10 * strain, is_near)
    energy = np.array([frame.energy for frame in chosen], float)
    forces = np.array([frame.forces for frame in chosen])
    stresses = np.array([np.zeros((3, 3)) if f.stress is None else f.stress for f in chosen])
    a, b = a[kept], b[kept]
    virials = volumes[:, None, None] * stresses
    return _Pairs(
        np.array([members[i] for i in a], int),
        energy[b] - energy[a],
        -0.5 * ((forces[a] + forces[b]) * moves[kept]).sum((1, 2)),
        0.5 * ((virials[a] + virials[b]) * strains[kept]).sum((1, 2)),
        strain[kept],
        size[kept],
        np.full(len(a), len(chosen[0])),
    )


def _geometry(
    frames: Sequence[Frame], a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[p, n, 3] moves beyond the strain, [p, 3, 3] strains, [frames] volumes."""
    positions = np.array([frame.positions for frame in frames])
    if not frames[0].is_periodic:
        moves = positions[b] - positions[a]
        moves -= moves.mean(1, keepdims=True)
        return moves, np.zeros((len(a), 3, 3)), np.ones(len(frames))
    cells = np.array([frame.cell for frame in frames])
    scaled = positions @ np.linalg.pinv(cells)
    moves = scaled[b] - scaled[a]
    moves -= np.round(moves)
    moves -= moves.mean(1, keepdims=True)
    mean = (cells[a] + cells[b]) / 2
    gradient = np.linalg.pinv(mean) @ (cells[b] - cells[a])
    strains = (gradient + gradient.transpose(0, 2, 1)) / 2
    return moves @ mean, strains, np.abs(np.linalg.det(cells))


def _nearest(a: np.ndarray, b: np.ndarray, distance: np.ndarray, is_near: np.ndarray) -> np.ndarray:
    """Positions of pairs, nearest first, until each frame has its PARTNERS."""
    count = np.zeros(int(b.max()) + 1, int)
    kept = []
    candidates = np.flatnonzero(is_near)
    for k in candidates[np.argsort(distance[candidates], kind="stable")]:
        if min(count[a[k]], count[b[k]]) < PARTNERS:
            kept.append(int(k))
            count[[a[k], b[k]]] += 1
    return np.array(kept, int)


def _trend(label: str, energy: np.ndarray, work: np.ndarray) -> Trend | None:
    told = np.abs(work) > 1e-9
    energy, work = energy[told], work[told]
    if len(work) < MIN_PAIRS:
        return None
    weight = np.sqrt(np.abs(work))
    ratio = energy / work
    order = np.argsort(ratio)
    half = np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2)
    slope = float(ratio[order][min(half, len(ratio) - 1)])
    follows = np.abs(ratio - slope) <= 0.25 * abs(slope)
    return Trend(label, len(work), slope, float(weight[follows].sum() / weight.sum()))


def _judge_forces(found: Trend, n_atoms: np.ndarray, sources: tuple[str, ...]) -> Iterator[Finding]:
    if found.agreement < MUDDLED and found.pairs >= 30:
        yield Finding(
            "forces-unrelated",
            "warning",
            found.pairs,
            sources,
            f"Suspicion: energies do not follow the forces on {found.pairs} pairs of near frames "
            f"(only {found.agreement:.0%} agree on one slope, {found.slope:.2g}).",
            "Check that forces, positions and energies are of the same step and atom order.",
        )
    if found.agreement < CLEAR or 1 / SOUND < found.slope < SOUND:
        return
    guess = _guess(found.slope, FACTORS, "forces are gradients, of the wrong sign")
    if abs(found.slope * np.median(n_atoms) - 1) < 0.3:
        guess = "energies are per atom, not totals"
    yield _unit("forces", found, sources, guess)


def _judge_stress(found: Trend, sources: tuple[str, ...]) -> Iterator[Finding]:
    if found.agreement < CLEAR or 1 / SOUND < found.slope < SOUND:
        return
    guess = _guess(found.slope, STRESS_FACTORS, "positive is compression, as in VASP's output")
    yield _unit("stress", found, sources, guess)


def _unit(label: str, found: Trend, sources: tuple[str, ...], guess: str) -> Finding:
    return Finding(
        f"{label}-unit-or-sign",
        "error",
        found.pairs,
        sources,
        f"Suspicion: energy differences are {found.slope:.3g} times the work of the {label} on "
        f"{found.pairs} pairs of near frames ({found.agreement:.0%} agree); expected 1. "
        f"Likely {guess}.",
        f"Convert the {label} to {'eV/Å' if label == 'forces' else 'eV/Å³, positive = tension'} "
        "and energies to eV per cell, or leave the wrong label out.",
    )


def _guess(slope: float, factors: dict[str, float], flipped: str) -> str:
    """The unit whose factor is nearest, if one is near; and the sign."""
    distance: Callable[[str], float] = lambda name: abs(np.log(abs(slope) / factors[name]))  # noqa: E731
    name = min(factors, key=distance)
    unit = name if distance(name) < 0.15 else "a unit that is not known here"
    if slope > 0:
        return unit
    return flipped if factors[name] == 1 else f"{flipped}, and {unit}"
