"""What is measured of the replicas of one subject, and pictures of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ase
import numpy as np
from ase.data import atomic_numbers

from jaxft.evaluate.finding import Line, Picture
from jaxft.evaluate.mdruns import Plan
from jaxft.md.diffusion import Diffusion, diffusion, mean_squared_displacement, without_drift
from jaxft.md.drift import Drift, drift
from jaxft.md.rdf import Rdf, largest_radius, rdf
from jaxft.md.spectrum import Spectrum, spectrum
from jaxft.md.trajectory import Trajectory

RDF_FRAMES = 100
"""At most, of each replica, that pairs are counted in."""

LEAST = 3
"""Frames of a trajectory that is measured."""

Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Look:
    """None where there is too little to measure."""

    drifts: tuple[Drift, ...]
    diffusion: Diffusion | None
    rdf: Rdf | None
    expected: Rdf | None
    """Of the reference, in the same bins."""
    spectrum: Spectrum | None
    displacement: Curve | None
    """ps, Å²: of the first replica."""
    energy: Curve | None
    """ps, meV/atom against the start: of the first replica."""
    missing: tuple[str, ...]
    """Why."""


def look_at(
    replicas: Sequence[Trajectory], plan: Plan, reference: Sequence[ase.Atoms] | None
) -> Look:
    """Measure the replicas that reached the end; of the others nothing but survival counts."""
    whole = [t for t in replicas if t.ended is None]
    if not whole or len(whole[0]) < LEAST:
        short = [f"{len(t)} frames are too few to measure anything" for t in whole[:1]]
        return Look((), None, None, None, None, None, None, tuple(short))
    moved = [_displaced(t, plan.element) for t in whole]
    interval, missing = whole[0].interval, list[str]()
    coefficient = vibrations = None
    try:
        coefficient = diffusion(moved, interval)
    except ValueError as error:
        missing.append(str(error).splitlines()[0])
    try:
        vibrations = spectrum([t.velocities for t in whole], interval)
    except ValueError as error:
        missing.append(str(error).splitlines()[0])
    pairs = expected = None
    try:
        pairs, expected = _pairs(whole, reference)
    except ValueError as error:
        missing.append(str(error).splitlines()[0])
    first = whole[0]
    energy = 1000 * (first.total - first.total[0]) / len(first.start)
    return Look(
        tuple(drift(t) for t in whole),
        coefficient,
        pairs,
        expected,
        vibrations,
        (first.times - first.times[0], mean_squared_displacement(moved[0])),
        (first.times, energy),
        tuple(missing),
    )


def _displaced(trajectory: Trajectory, element: str | None) -> np.ndarray:
    """[F, n, 3] Å of the atoms whose diffusion is measured, relative to the centre of mass."""
    positions = without_drift(trajectory.unstrained(), trajectory.start.get_masses())
    if element is None:
        return positions
    return positions[:, trajectory.start.numbers == atomic_numbers[element]]


def _pairs(
    replicas: Sequence[Trajectory], reference: Sequence[ase.Atoms] | None
) -> tuple[Rdf | None, Rdf | None]:
    """Of the replicas and of the reference; none of structures without a density.

    Bins reach to half the shortest lattice vector of the start (or of the reference, if that is
    shorter), so that they are the same for all models.
    """
    start = replicas[0].start
    if not start.pbc.all():
        return None, None
    r_max = largest_radius([start, *(reference or ())])
    frames = [
        t.atoms(int(i))
        for t in replicas
        for i in np.unique(np.linspace(0, len(t) - 1, RDF_FRAMES).astype(int))
    ]
    expected = None if reference is None else _curve(reference, r_max)
    return _curve(frames, r_max), expected


def _curve(frames: Sequence[ase.Atoms], r_max: float) -> Rdf:
    """Raises ValueError where no pair is within ``r_max``, so that nothing can be compared."""
    if len(frames[0]) > 1:
        found = rdf(frames, r_max=r_max)
        if found.g.any():
            return found
    raise ValueError(
        f"no radial distribution: no two atoms are within {r_max:.3g} Å, half the shortest lattice "
        "vector; repeat the cell"
    )


def pictures_of(looks: Mapping[tuple[str, str], Look]) -> tuple[Picture, ...]:
    """Four for every subject, with a line per model."""
    found = []
    for subject in dict.fromkeys(subject for _, subject in looks):
        of = {model: look for (model, name), look in looks.items() if name == subject}
        expected = next((k.expected for k in of.values() if k.expected is not None), None)
        pairs = [_line(m, (k.rdf.r, k.rdf.g)) for m, k in of.items() if k.rdf]
        if expected is not None:
            pairs.append(Line("reference", expected.r, expected.g, is_reference=True))
        vibrations = [
            _line(m, (k.spectrum.frequency, k.spectrum.density))
            for m, k in of.items()
            if k.spectrum
        ]
        moves = [_line(m, k.displacement) for m, k in of.items() if k.displacement]
        energies = [_line(m, k.energy) for m, k in of.items() if k.energy]
        panels = (
            ("total energy", "time, ps", "change, meV/atom", energies),
            ("radial distribution", "r, Å", "g", pairs),
            ("vibrational density of states", "frequency, THz", "1/THz", vibrations),
            ("mean squared displacement", "lag, ps", "Å²", moves),
        )
        found += [
            Picture(f"{title}: {subject}", x, y, tuple(lines))
            for title, x, y, lines in panels
            if lines
        ]
    return tuple(found)


def _line(model: str, curve: Curve) -> Line:
    return Line(model, *curve)
