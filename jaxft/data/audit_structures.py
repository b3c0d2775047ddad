"""What an audit asks of structures: possible, in Å, of known elements, and no copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from ase.data import chemical_symbols, covalent_radii

from jaxft.data.finding import EXAMPLES, Finding, Severity, found, worst
from jaxft.data.frames import Frame
from jaxft.data.neighbours import neighbours
from jaxft.data.split import structure_key
from jaxft.typing import Domain

CLOSE = 0.6
"""Of the sum of two covalent radii; sound sets, hot and compressed ones too, stay above."""

SAMPLED = 40
"""Frames whose bond lengths are measured."""
LONG, SHORT = 1.6, 0.65
"""Median distance to the nearest atom over the sum of covalent radii; 0.8 to 1.12 in forty public
sets. Lengths in Bohr that are taken for Å give 1.9 times as much, Å taken for Bohr half."""

DENSE, EMPTY = 3.0, 200.0
"""Å³ per atom, of periodic frames."""

SAME_ENERGY = 1e-3
"""eV/atom, and SAME_FORCE eV/Å, the disagreement of two calculations of one structure."""
SAME_FORCE = 0.02


def check_structures(
    frames: Sequence[Frame],
    model: Domain | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> list[Finding]:
    """All findings about structures; ``progress(done, total)`` counts frames."""
    closest: dict[int, float] = {}
    impossible: dict[str, list[Frame]] = {}
    for done, frame in enumerate(frames):
        try:
            closest[id(frame)] = _closest(frame)
        except ValueError as error:
            impossible.setdefault(str(error), []).append(frame)
        progress(done + 1, len(frames))
    close = worst(frames, {id(f): -closest.get(id(f), np.inf) for f in frames}, -CLOSE)
    return [
        *found(
            "impossible-geometry", "error", [f for group in impossible.values() for f in group],
            next(iter(impossible), "").replace("\n", " "),
            "Repair or remove these frames: training refuses them.",
        ),
        *found(
            "close-contacts", "warning", close,
            f"Atoms as near as {min(closest.values(), default=np.inf):.2f} times the sum of their "
            f"covalent radii (below {CLOSE}).",
            "Look at these frames; leave them out unless the repulsive wall is meant.",
        ),
        *_lengths([f for f in frames if id(f) in closest]),
        *_boundaries(frames),
        *_elements(frames, model),
        *_copies(frames),
    ]  # fmt: skip


def _closest(frame: Frame) -> float:
    """The smallest distance over the sum of covalent radii, or infinity beyond CLOSE."""
    radii = covalent_radii[frame.atomic_numbers]
    edges = neighbours(frame, 2 * CLOSE * float(radii.max()))
    length = np.linalg.norm(edges.vectors, axis=1)
    return float((length / (radii[edges.senders] + radii[edges.receivers])).min(initial=np.inf))


def _lengths(frames: Sequence[Frame]) -> list[Finding]:
    several = [f for f in frames if len(f) > 2]
    chosen = several[:: -(-len(several) // SAMPLED) or 1]
    ratios: list[float] = []
    for frame in chosen:
        radii = covalent_radii[frame.atomic_numbers]
        try:
            edges = neighbours(frame, min(8.0, 2 * 2.2 * float(radii.max())))
        except ValueError:  # more neighbours than atoms can have: lengths are short
            ratios += [0.0] * len(frame)
            continue
        length = np.linalg.norm(edges.vectors, axis=1)
        nearest = np.full(len(frame), np.inf)
        ratio = length / (radii[edges.senders] + radii[edges.receivers])
        np.minimum.at(nearest, edges.receivers, ratio)
        ratios += nearest[np.isfinite(nearest)].tolist()
    median = float(np.median(ratios)) if ratios else 1.0
    return found(
        "length-unit", "error", [] if SHORT < median < LONG else chosen,
        f"Suspicion: nearest atoms are {median:.2g} times the sum of their covalent radii apart in "
        "the median; about 1 is usual. Likely lengths are not in Å (Bohr: 1.9, Å as Bohr: 0.5, "
        "nm: 0.1).",
        "Convert positions and cell to Å.",
    )  # fmt: skip


def _boundaries(frames: Sequence[Frame]) -> list[Finding]:
    size = {id(f): f.volume / len(f) for f in frames}
    bulk = [f for f in frames if f.is_periodic and len(f) > 1 and f.volume > 0]
    mixed = [f for f in frames if any(f.pbc) and not all(f.pbc)]
    boxed = [f for f in frames if not any(f.pbc) and f.cell.any() and f.stress is not None]
    return [
        *found(
            "dense", "warning", worst(bulk, {i: -v for i, v in size.items()}, -DENSE),
            f"Less than {DENSE:g} Å³ per atom.", "Check the cell and its unit (Å).",
        ),
        *found(
            "mostly-vacuum", "note", worst(bulk, size, EMPTY),
            f"Periodic, with more than {EMPTY:g} Å³ per atom: clusters or slabs in a box.",
            "Set pbc to False for molecules: their stress says nothing.",
        ),
        *found(
            "mixed-boundaries", "note", mixed, "Periodic in one or two directions only.",
            "Nothing to do; a stress of such a frame is not trained on.",
        ),
        *found(
            "cell-without-periodicity", "warning", boxed,
            "A cell and a stress, but pbc is False in all directions.",
            "Set pbc: otherwise neighbours across the boundary are missing.",
        ),
    ]  # fmt: skip


def _elements(frames: Sequence[Frame], model: Domain | None) -> list[Finding]:
    if model is None:
        return []
    known = set(model.atomic_numbers)
    lacking = [f for f in frames if not set(f.atomic_numbers.tolist()) <= known]
    names = sorted({int(z) for f in lacking for z in f.atomic_numbers} - known)
    return found(
        "unknown-elements", "error", lacking,
        f"The model does not know {' '.join(chemical_symbols[z] for z in names)}.",
        "Leave these frames out, or start from a model that covers these elements.",
    )  # fmt: skip


def _copies(frames: Sequence[Frame]) -> list[Finding]:
    alike: dict[bytes, list[Frame]] = {}
    for frame in frames:
        if len(frame) > 1:
            alike.setdefault(structure_key(frame), []).append(frame)
    pairs = [(first, other) for first, *others in alike.values() for other in others]
    copies = [(a, b) for a, b in pairs if _difference(a, b) <= 1]
    apart = sorted(
        ((a, b) for a, b in pairs if _difference(a, b) > 1), key=lambda p: -_difference(*p)
    )
    gap = max((abs(a.energy - b.energy) for a, b in apart if a.energy and b.energy), default=0.0)
    return [
        *_of_pairs(
            "duplicates", "warning", copies, "The same structure and labels occur again.",
            "Remove the copies: they count twice, and leak from training into a test set.",
        ),
        *_of_pairs(
            "contradictions", "error", apart,
            f"The same structure occurs with other labels; energies differ by up to {gap:.3g} eV.",
            "Keep one: no model fits both. Several methods need a head each.",
        ),
    ]  # fmt: skip


def _of_pairs(
    name: str, severity: Severity, pairs: Sequence[tuple[Frame, Frame]], text: str, advice: str
) -> list[Finding]:
    if not pairs:
        return []
    sources = tuple(f"{a.source} = {b.source}" for a, b in pairs[:EXAMPLES])
    return [Finding(name, severity, len(pairs), sources, text, advice)]


def _difference(one: Frame, other: Frame) -> float:
    """Of energies and forces, in units of what two calculations may differ by."""
    found_ = [0.0]
    if one.energy is not None and other.energy is not None:
        found_.append(abs(one.energy - other.energy) / len(one) / SAME_ENERGY)
    if one.forces is not None and other.forces is not None:
        found_.append(float(np.abs(one.forces - other.forces).max()) / SAME_FORCE)
    return max(found_)
