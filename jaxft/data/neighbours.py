"""Neighbour lists on the host, in float64.

Run as a program, by its path, this file makes them for another process, see
:mod:`jaxft.data.workers`. So it imports nothing of jaxft: that would take ten times as long as all
the rest of its start, and bring JAX.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
from matscipy.neighbours import neighbour_list

if TYPE_CHECKING:
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
    return edges_of(frame.positions, frame.cell, frame.pbc, r_max, source=frame.source)


def edges_of(
    positions: np.ndarray, cell: np.ndarray, pbc: Sequence[bool], r_max: float, *, source: str
) -> Edges:
    """As :func:`neighbours`, of a frame's arrays.

    Args:
      positions: [n, 3] Å.
      cell: [3, 3] Å, rows are lattice vectors.
      pbc: [3].
      r_max: Å.
      source: for messages.
    """
    positions, cell = np.asarray(positions, np.float64), np.asarray(cell, np.float64)
    full = _full_rank_cell(positions, cell, pbc, r_max, source)
    expected = len(positions) / abs(np.linalg.det(full)) * 4 / 3 * np.pi * r_max**3
    if any(pbc) and not expected < MAX_NEIGHBOURS:
        raise ValueError(
            f"{source}: {len(positions)} atoms in a cell of {cell.tolist()} would have "
            f"about {expected:.1e} neighbours each within {r_max} Å; check the cell's unit (Å)."
        )
    i, j, d, vectors = neighbour_list(
        "ijdD", pbc=pbc, cell=full, positions=positions, cutoff=float(r_max)
    )
    inside = d < r_max
    i, j, d, vectors = i[inside], j[inside], d[inside], vectors[inside]
    if d.size and d.min() < COINCIDENT:
        k = int(d.argmin())
        raise ValueError(
            f"{source}: atoms {i[k]} and {j[k]} are {d[k]:.1e} Å apart; "
            "remove the duplicate atom or the frame."
        )
    order = np.argsort(j, kind="stable")
    return Edges(i[order], j[order], vectors[order])


def _full_rank_cell(
    positions: np.ndarray, cell: np.ndarray, pbc: Sequence[bool], r_max: float, source: str
) -> np.ndarray:
    """The cell with rows for open directions: orthogonal to the others and beyond all atoms."""
    periodic = np.array(pbc)
    if not periodic.any():
        return np.eye(3) * (np.ptp(positions, axis=0).max(initial=0.0) + 2 * r_max + 1.0)
    rows = cell[periodic]
    if np.linalg.matrix_rank(rows) < periodic.sum():
        raise ValueError(
            f"{source}: pbc={pbc} but the cell {cell.tolist()} has no "
            "independent lattice vector for every periodic direction; set the cell or pbc."
        )
    full = cell.copy()
    # Complete the periodic rows to a basis: the trailing right-singular vectors span the rest.
    spare = iter(np.linalg.svd(rows, full_matrices=True)[2][len(rows) :])
    extent = np.ptp(positions, axis=0).max(initial=0.0)
    for axis in np.flatnonzero(~periodic):
        full[axis] = next(spare) * (extent * np.sqrt(3) + 2 * r_max + 1.0)
    return full


def send(pipe: IO[bytes], *arrays: np.ndarray) -> None:
    """Write arrays as one message: its length, and each as in a .npy file."""
    body = io.BytesIO()
    for array in arrays:
        np.save(body, array, allow_pickle=False)
    pipe.write(body.tell().to_bytes(8, "little"))
    pipe.write(body.getbuffer())
    pipe.flush()


def receive(pipe: IO[bytes]) -> list[np.ndarray]:
    """The arrays of the next message.

    Raises:
      EOFError: the other end was closed.
    """
    length = int.from_bytes(_read(pipe, 8), "little")
    body = io.BytesIO(_read(pipe, length))
    arrays = []
    while body.tell() < length:
        arrays.append(np.load(body, allow_pickle=False))
    return arrays


def _read(pipe: IO[bytes], length: int) -> bytes:
    found = pipe.read(length)
    if len(found) < length:
        raise EOFError
    return found


def serve() -> None:
    """Answer requests on the standard input until it is closed.

    A request holds r_max, and of each frame the number of atoms, pbc and cell, and all positions;
    an answer the number of edges of each frame, and all senders, receivers and vectors. It ends
    before the first frame that :func:`neighbours` refuses: who asks can ask why.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end without a word if nobody listens
    while True:
        try:
            r_max, atoms, pbc, cells, positions = receive(sys.stdin.buffer)
        except EOFError:
            return
        found: list[Edges] = []
        for its_pbc, cell, own in zip(
            pbc.tolist(), cells, np.split(positions, np.cumsum(atoms)[:-1]), strict=True
        ):
            try:
                found.append(edges_of(own, cell, its_pbc, float(r_max), source=""))
            except Exception:  # whatever it is, who asked meets it too, with the frame at hand
                break
        counts = np.array([len(edges.senders) for edges in found], np.int64)
        send(answers, counts, *(np.concatenate(part) for part in zip(*found, strict=True)))


if __name__ == "__main__":
    serve()
