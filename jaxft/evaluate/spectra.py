"""Frequencies of phonons with force constants: on a mesh, along the standard path, near Γ; and how
far two sets of them are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxft.evaluate.crystals import Phonons

NEAR = 1e-3
"""1/Å, without 2π: where group velocities are taken, on the way to Γ."""

DOS_POINTS = 401
PATH_POINTS = 51
"""Of the longest segment of the path."""

DIRECTIONS = np.array(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], float
)
"""Cartesian, towards which group velocities are taken."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Frequencies over the Brillouin zone."""

    qpoints: np.ndarray
    """[q, 3] in units of the primitive cell's reciprocal vectors."""
    weights: np.ndarray
    """[q], their sum is 1."""
    frequencies: np.ndarray
    """[q, branches] THz, ascending; imaginary ones are negative."""

    @property
    def average(self) -> float:
        """THz, over the zone."""
        return float(self.weights @ self.frequencies.mean(axis=1))


@dataclass(frozen=True, eq=False)
class Bands:
    """Frequencies along the standard path."""

    distances: np.ndarray
    """[points] 1/Å, without 2π."""
    frequencies: np.ndarray
    """[points, branches] THz; rows of NaN part segments that do not join."""
    ticks: Mapping[str, float]


def mesh_numbers(phonons: Phonons, length: float) -> list[int]:
    """Odd, of a q mesh whose points are about 2π/``length`` apart (Å, phonopy's measure).

    Odd meshes hold Γ. Where a mesh would not have the crystal's symmetry, as in centred lattices,
    all three numbers are the largest.
    """
    inverse = np.linalg.inv(np.asarray(phonons.primitive.cell))
    numbers = np.maximum(np.rint(length * np.linalg.norm(inverse, axis=0)).astype(int), 1) | 1
    turned = [
        numbers[:, None] * np.asarray(r) / numbers[None]
        for rotation in phonons.primitive_symmetry.pointgroup_operations
        for r in (rotation, rotation.T)
    ]
    if not np.allclose(turned, np.rint(turned)):
        numbers[:] = numbers.max()
    return [int(n) for n in numbers]


def spectrum(phonons: Phonons, mesh: list[int]) -> Spectrum:
    """Frequencies on the irreducible points of a mesh."""
    found = phonons.run_mesh(mesh)
    weights = np.asarray(found.weights, float)
    return Spectrum(np.array(found.qpoints), weights / weights.sum(), np.array(found.frequencies))


def at_points_of(phonons: Phonons, reference: Spectrum) -> Spectrum:
    """Frequencies at the points of another spectrum, so that the two can be compared."""
    found = phonons.run_qpoints(reference.qpoints)
    return Spectrum(reference.qpoints, reference.weights, np.array(found.frequencies))


def standard_path(phonons: Phonons) -> tuple[list, list[str], list[bool]]:
    """Segments of q points, their labels, and which of them join the next: seekpath's, by phonopy.

    Reference: Hinuma et al., Comput. Mater. Sci. 128, 140 (2017).
    """
    from phonopy.phonon.band_structure import get_band_qpoints_by_seekpath

    return get_band_qpoints_by_seekpath(phonons.primitive, PATH_POINTS, is_const_interval=True)


def bands(phonons: Phonons, path: tuple[list, list[str], list[bool]]) -> Bands:
    """Frequencies along a path."""
    qpoints, labels, joins = path
    found = phonons.run_band_structure(qpoints, path_connections=joins, labels=labels)
    x, y, ticks = [], [], dict[str, float]()
    names = iter(_plain(label) for label in labels)
    start = next(names)
    for distance, frequency, joined in zip(found.distances, found.frequencies, joins, strict=True):
        _mark(ticks, start, float(distance[0]))
        start = next(names)
        x.append(np.asarray(distance))
        y.append(np.asarray(frequency))
        if not joined:
            _mark(ticks, start, float(distance[-1]))
            x.append(np.array([distance[-1]]))
            y.append(np.full((1, frequency.shape[1]), np.nan))
            start = next(names, "")
    return Bands(np.concatenate(x), np.concatenate(y), ticks)


def _mark(ticks: dict[str, float], name: str, place: float) -> None:
    """A name can come back: later ones get spaces that nobody sees."""
    known = [old for old, at in ticks.items() if abs(at - place) < 1e-9]
    if known:
        if known[0].strip() == name:
            return
        name = f"{known[0].strip()}|{name}"
        del ticks[known[0]]
    while name in ticks:
        name += "\u200b"
    ticks[name] = place


GREEK = {"\\Gamma": "Γ", "\\Sigma": "Σ", "\\Delta": "Δ", "\\Lambda": "Λ"}


def _plain(label: str) -> str:
    text = label.replace("\\mathrm{", "").replace("}", "").replace("$", "")
    for command, letter in GREEK.items():
        text = text.replace(command, letter)
    return text.replace("_", "").replace("{", "")


def density_of_states(phonons: Phonons, mesh: list[int], grid: np.ndarray) -> np.ndarray:
    """[len(grid)] states per THz and primitive cell, by the tetrahedron method of phonopy."""
    phonons.run_mesh(mesh)
    pitch = float(grid[1] - grid[0])
    found = phonons.run_total_dos(
        freq_min=float(grid[0]), freq_max=float(grid[-1]) + 0.5 * pitch, freq_pitch=pitch
    )
    return np.array(found.dos)[: len(grid)]


def common_grid(*spectra: Spectrum) -> np.ndarray:
    """THz, equally spaced over all frequencies of the spectra."""
    low = min(float(s.frequencies.min()) for s in spectra)
    high = max(float(s.frequencies.max()) for s in spectra)
    room = 0.02 * (high - low) + 1e-3
    return np.linspace(low - room, high + room, DOS_POINTS)


def dos_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Half the area between two densities on one grid, in % of the area below the reference.

    0 is agreement and 100 are spectra that do not overlap.
    """
    return float(50 * abs(ours - theirs).sum() / theirs.sum())


def distance(ours: Spectrum, theirs: Spectrum) -> float:
    """THz: Wasserstein-1 of all frequencies, weighted as their points are."""
    from scipy.stats import wasserstein_distance

    a, b = (s.frequencies.ravel() for s in (ours, theirs))
    u, v = (np.repeat(s.weights, s.frequencies.shape[1]) for s in (ours, theirs))
    return float(wasserstein_distance(a, b, u, v))


def mean_error(ours: Spectrum, theirs: Spectrum) -> float:
    """THz: mean |Δω| over the zone, branches in order."""
    return float(theirs.weights @ abs(ours.frequencies - theirs.frequencies).mean(axis=1))


def curvature_slope(ours: Phonons, theirs: Phonons, points: Spectrum) -> float:
    """Curvature along the reference's modes, ours against theirs: below 1 is soft.

    With the reference's eigenvectors e and the dynamical matrices D the curvatures are e†De; this
    is the slope of the line through the origin, over all modes of the zone. Frequencies may agree
    with modes exchanged; this does not.
    """
    other = theirs.run_qpoints(points.qpoints, with_eigenvectors=True, with_dynamical_matrices=True)
    own = ours.run_qpoints(points.qpoints, with_dynamical_matrices=True)
    modes = np.array(other.eigenvectors)

    def along(matrices: np.ndarray) -> np.ndarray:
        return np.einsum("qij,qik,qkj->qj", modes.conj(), np.array(matrices), modes).real

    a, b = along(own.dynamical_matrices), along(other.dynamical_matrices)
    weights = points.weights[:, None]
    return float((weights * a * b).sum() / (weights * b * b).sum())


def acoustic_velocities(phonons: Phonons) -> np.ndarray:
    """[7, 3] km/s: group velocities of the acoustic branches as q goes to Γ, along ``DIRECTIONS``.

    At Γ itself they depend on the direction; they are taken at ``NEAR``, ascending.
    """
    units = DIRECTIONS / np.linalg.norm(DIRECTIONS, axis=1)[:, None]
    qpoints = NEAR * units @ np.asarray(phonons.primitive.cell).T
    found = phonons.run_qpoints(qpoints, with_group_velocities=True)
    velocities = np.array(found.group_velocities)[:, :3]
    along = np.einsum("dbi,di->db", velocities, units)
    return np.sort(0.1 * along, axis=1)  # Å THz = 0.1 km/s
