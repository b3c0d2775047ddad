"""Neighbour lists on the host, in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matscipy.neighbours import neighbour_list

from jaxft.data.frames import Frame

COINCIDENT = 1e-3
"""Å; atoms closer than this are an error in the data."""

MAX_NEIGHBOURS = 5000
"""Per atom; a frame beyond it is damaged (osmium has 110 within 6 Å) and would fill the memory."""


class Edges(NamedTuple):
    """Directed edges of one frame, sorted by receiver. Both directions of a pair are present."""

    senders: np.ndarray
    """[E] int."""
    receivers: np.ndarray
    """[E] int, ascending."""
    vectors: np.ndarray
    """[E, 3] Å, receiver minus sender, the receiver's periodic image included."""


def neighbours(frame: Frame, r_max: float) -> Edges:
    """All pairs closer than ``r_max``, periodic images included, mixed boundaries too.

    Raises:
      ValueError: two atoms coincide, a periodic direction has no lattice vector, or the cell is so
        small that an atom would have thousands of neighbours.
    """
    cell = _full_rank_cell(frame, r_max)
    expected = len(frame) / abs(np.linalg.det(cell)) * 4 / 3 * np.pi * r_max**3
    if any(frame.pbc) and not expected < MAX_NEIGHBOURS:
        raise ValueError(
            f"{frame.source}: {len(frame)} atoms in a cell of {frame.cell.tolist()} would have "
            f"about {expected:.1e} neighbours each within {r_max} Å; check the cell's unit (Å)."
        )
    i, j, d, vectors = neighbour_list(
        "ijdD", pbc=frame.pbc, cell=cell, positions=frame.positions, cutoff=float(r_max)
    )
    inside = d < r_max
    i, j, d, vectors = i[inside], j[inside], d[inside], vectors[inside]
    if d.size and d.min() < COINCIDENT:
        k = int(d.argmin())
        raise ValueError(
            f"{frame.source}: atoms {i[k]} and {j[k]} are {d[k]:.1e} Å apart; "
            "remove the duplicate atom or the frame."
        )
    order = np.argsort(j, kind="stable")
    return Edges(i[order], j[order], vectors[order])


def _full_rank_cell(frame: Frame, r_max: float) -> np.ndarray:
    """The cell with rows for open directions: orthogonal to the others and beyond all atoms."""
    periodic = np.array(frame.pbc)
    if not periodic.any():
        return np.eye(3) * (np.ptp(frame.positions, axis=0).max(initial=0.0) + 2 * r_max + 1.0)
    rows = frame.cell[periodic]
    if np.linalg.matrix_rank(rows) < periodic.sum():
        raise ValueError(
            f"{frame.source}: pbc={frame.pbc} but the cell {frame.cell.tolist()} has no "
            "independent lattice vector for every periodic direction; set the cell or pbc."
        )
    cell = frame.cell.copy()
    # Complete the periodic rows to a basis: the trailing right-singular vectors span the rest.
    spare = iter(np.linalg.svd(rows, full_matrices=True)[2][len(rows) :])
    extent = np.ptp(frame.positions, axis=0).max(initial=0.0)
    for axis in np.flatnonzero(~periodic):
        cell[axis] = next(spare) * (extent * np.sqrt(3) + 2 * r_max + 1.0)
    return cell
