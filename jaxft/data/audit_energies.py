"""What an audit asks of energies: do they fit E0s, are they totals, are the atoms free ones?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ase.data import chemical_symbols

from jaxft.data.finding import Finding, found, worst
from jaxft.data.frames import ISOLATED_ATOM, Frame

FIT_FRAMES = 20_000
"""Frames that the fit of E0s uses, evenly chosen."""
OUTLYING = 25.0
"""Robust standard deviations, and FAR_OFF eV/atom: an energy beyond both is an outlier. Sound sets
with surfaces and compressed cells reach 21 and 3."""
FAR_OFF = 1.0

LEAST_COHESION = 0.5
"""eV/atom, the cohesive energies of solids, liquids and molecules lie between it and MOST_COHESION;
of noble gases and mercury, below."""
MOST_COHESION = 10.0

LONE_VOLUME = 500.0
"""Å³; a single atom with as much room is isolated."""


class Fit(NamedTuple):
    """Energies as sums of E0s, fitted for least absolute deviations."""

    elements: tuple[int, ...]
    rank: int
    """Of the compositions; below the number of elements, only sums are determined."""
    undetermined: tuple[int, ...]
    """Elements whose E0 the compositions leave open."""
    spread: float
    """Robust standard deviation of what is left, eV/atom."""


def check_energies(frames: Sequence[Frame]) -> tuple[Fit | None, list[Finding]]:
    """Fit E0s and find the energies that do not fit, or are not totals."""
    have = [
        f
        for f in frames
        if f.energy is not None and f.config_type != ISOLATED_ATOM and not _is_lone(f)
    ]
    if not have:
        return None, []
    chosen = have[:: -(-len(have) // FIT_FRAMES)]
    elements = np.unique(np.concatenate([f.atomic_numbers for f in chosen]))
    known = [f for f in have if np.isin(f.atomic_numbers, elements).all()]
    counts = _counts(known, elements)
    energies, sizes = np.array([f.energy for f in known], float), counts.sum(1)
    shares, per_atom = counts / sizes[:, None], energies / sizes
    step = slice(None, None, -(-len(known) // FIT_FRAMES))
    left = per_atom - shares @ _least_absolute(shares[step], per_atom[step])
    spread = 1.4826 * float(np.median(np.abs(left - np.median(left))))
    values, vectors = np.linalg.eigh(counts.T @ counts)
    null = vectors[:, values < 1e-9 * values.max()]
    free = np.flatnonzero(np.abs(null).max(1, initial=0) > 1e-6)
    fit = Fit(
        tuple(elements.tolist()),
        len(elements) - null.shape[1],
        tuple(elements[free].tolist()),
        spread,
    )
    beyond = {id(f): abs(float(x)) for f, x in zip(known, left, strict=True)}
    findings = found(
        "energy-outliers", "warning",
        worst(known, beyond, max(FAR_OFF, OUTLYING * spread)) if len(known) > 3 else [],
        f"Energies lie up to {max(beyond.values()):.3g} eV/atom from a fit of E0s, whose robust "
        f"standard deviation is {spread * 1e3:.3g} meV/atom.",
        "Look at these calculations: another method, an unconverged one, atoms too close.",
    )  # fmt: skip
    return fit, [*findings, *_totals(known, counts, shares, energies)]


def _counts(frames: Sequence[Frame], elements: np.ndarray) -> np.ndarray:
    """[frames, elements] float, atoms of each element."""
    where = [np.searchsorted(elements, f.atomic_numbers) for f in frames]
    return np.array([np.bincount(w, minlength=len(elements)) for w in where], float)


def _least_absolute(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Iteratively reweighted least squares; of smallest norm where rows are dependent."""
    weight = np.ones(len(values))
    for _ in range(15):
        found_ = np.linalg.lstsq(rows * weight[:, None], values * weight, rcond=None)[0]
        weight = 1 / np.sqrt(np.abs(values - rows @ found_) + 1e-4)
    return found_


def _totals(
    frames: Sequence[Frame], counts: np.ndarray, shares: np.ndarray, energies: np.ndarray
) -> list[Finding]:
    """Totals grow with the number of atoms; energies per atom do not."""
    if len(frames) < 2 * counts.shape[1] + 2 or np.ptp(counts.sum(1)) < 0.3 * counts.sum(1).mean():
        return []
    total, mean = (
        float(np.sqrt(np.mean((energies - x @ np.linalg.lstsq(x, energies, rcond=None)[0]) ** 2)))
        for x in (counts, shares)
    )
    return found(
        "energies-per-atom", "error", frames if 5 * mean < total else [],
        f"Suspicion: energies do not grow with the number of atoms (as energies per atom they fit "
        f"E0s within {mean:.2g} eV, as totals within {total:.2g} eV).",
        "Give total energies: multiply by the number of atoms.",
    )  # fmt: skip


def check_atoms(frames: Sequence[Frame]) -> list[Finding]:
    """Isolated atoms: marked as such, one energy per element, a sensible cohesion."""
    marked = [f for f in frames if f.config_type == ISOLATED_ATOM]
    wrong = [f for f in marked if len(f) != 1 or f.energy is None]
    single = [f for f in marked if len(f) == 1 and f.energy is not None]
    energies: dict[int, list[Frame]] = {}
    for frame in single:
        energies.setdefault(int(frame.atomic_numbers[0]), []).append(frame)
    twice = [f for group in energies.values() if len({x.energy for x in group}) > 1 for f in group]
    lone = [f for f in frames if f.config_type != ISOLATED_ATOM and _is_lone(f)]
    names = " ".join(chemical_symbols[z] for z in sorted(energies))
    return [
        *found(
            "isolated-atoms", "note", single, f"Isolated atoms of {names}: they give E0s.",
            "Nothing to do: they are not trained on.",
        ),
        *found(
            "isolated-atoms-damaged", "error", wrong,
            f"Marked {ISOLATED_ATOM}, but not one atom with an energy.",
            "Give one atom and its energy, or another config_type.",
        ),
        *found(
            "isolated-atoms-ambiguous", "error", twice,
            "Several energies for the isolated atom of one element.", "Keep one.",
        ),
        *found(
            "isolated-atoms-unmarked", "warning", lone,
            f"A single atom in free space, whose config_type is not {ISOLATED_ATOM}.",
            f"Set config_type={ISOLATED_ATOM}: it then gives an E0 instead of being trained on.",
        ),
        *_cohesion(frames, {z: group[0] for z, group in energies.items()}),
    ]  # fmt: skip


def _is_lone(frame: Frame) -> bool:
    return len(frame) == 1 and (not any(frame.pbc) or frame.volume > LONE_VOLUME)


def _cohesion(frames: Sequence[Frame], atoms: dict[int, Frame]) -> list[Finding]:
    """Atoms of another method, spin or meaning shift the cohesive energy."""
    have = [
        f
        for f in frames
        if f.energy is not None and len(f) > 1 and set(f.atomic_numbers.tolist()) <= set(atoms)
    ]
    free = {z: frame.energy or 0.0 for z, frame in atoms.items()}
    cohesion = [
        (sum(free[z] for z in f.atomic_numbers.tolist()) - (f.energy or 0.0)) / len(f) for f in have
    ]
    median = float(np.median(cohesion)) if have else 1.0
    return found(
        "isolated-atoms-implausible", "warning",
        [] if LEAST_COHESION < median < MOST_COHESION else list(atoms.values()),
        f"Suspicion: relative to these atoms the cohesive energy is {median:.3g} eV/atom in the "
        "median; 1 to 8 is usual.",
        "Check that the atoms are of the same method, free and spin-polarised; otherwise let E0s "
        "be estimated.",
    )  # fmt: skip
