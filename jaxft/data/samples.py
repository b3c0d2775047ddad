"""One frame as rows of edges, labels and weights, ready to be packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxft.data.curvatures import Curvatures
from jaxft.data.frames import Frame
from jaxft.data.neighbours import Edges
from jaxft.data.packing import ROW_COST
from jaxft.graph import PADDING_DISTANCE

ROW_WIDTHS = (*range(4, 17), 18, 20, 22, 24, 28, 32, 40, 48, 56, 64)
"""Slots per edge row; a dataset uses the one that costs least."""


class Sample(NamedTuple):
    """n atoms, r rows of K slots."""

    species: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    vectors: np.ndarray
    n_edge: int
    volume: float
    energy: float
    """Without E0s."""
    forces: np.ndarray
    stress: np.ndarray
    energy_weight: float
    """0 for a missing label, which itself is 0; likewise the next two."""
    forces_weight: np.ndarray
    stress_weight: float
    head: int
    features: dict[str, np.ndarray]
    """[] or [in_dim] per graph, [n, …] per atom."""
    hessian: Curvatures | None = None
    hessian_weight: float = 0.0
    moments: tuple[np.ndarray, ...] = ()
    """Magnetic moments and their weights [n], for models with a head for them."""


def best_width(degrees: Sequence[np.ndarray]) -> int:
    """The row width of least cost for atoms with so many neighbours; the wider of equals."""
    counts = np.concatenate(list(degrees) or [np.zeros(0, int)])

    def cost(width: int) -> float:
        return int((-(-counts // width)).sum()) * (width + ROW_COST)

    return min(reversed(ROW_WIDTHS), key=cost)


def sample_of(
    frame: Frame,
    edges: Edges,
    species: np.ndarray,
    e0: float,
    head: int,
    features: dict[str, np.ndarray],
    r_max: float,
    width: int,
    moments: tuple[np.ndarray, ...] = (),
) -> Sample:
    """Lay the edges of each atom out in rows of ``width`` slots; free slots hold padding."""
    degree = np.bincount(edges.receivers, minlength=len(frame))
    rows_of = -(-degree // width)
    first_row = np.cumsum(rows_of) - rows_of
    first_edge = np.cumsum(degree) - degree
    rank = np.arange(len(edges.receivers)) - first_edge[edges.receivers]
    row, slot = first_row[edges.receivers] + rank // width, rank % width
    receivers = np.repeat(np.arange(len(frame)), rows_of)
    senders = np.repeat(receivers[:, None], width, axis=1)
    vectors = np.zeros((len(receivers), width, 3))
    vectors[..., 0] = PADDING_DISTANCE * r_max
    senders[row, slot] = edges.senders
    vectors[row, slot] = edges.vectors
    return Sample(
        species,
        senders,
        receivers,
        vectors,
        len(edges.receivers),
        frame.volume if frame.is_periodic else 1.0,
        *_labels(frame, e0),
        head,
        features,
        frame.hessian,
        frame.weight * frame.hessian_weight * (frame.hessian is not None),
        moments,
    )


def _labels(
    frame: Frame, e0: float
) -> tuple[float, np.ndarray, np.ndarray, float, np.ndarray, float]:
    """Energy without E0s, forces, stress, and their weights; zeros where a label is missing."""
    has_energy, has_forces = frame.energy is not None, frame.forces is not None
    has_stress = frame.stress is not None and frame.is_periodic
    atoms = np.ones(len(frame)) if frame.atom_weights is None else frame.atom_weights
    return (
        frame.energy - e0 if frame.energy is not None else 0.0,
        frame.forces if frame.forces is not None else np.zeros((len(frame), 3)),
        frame.stress if frame.stress is not None else np.zeros((3, 3)),
        frame.weight * frame.energy_weight * has_energy,
        frame.weight * frame.forces_weight * has_forces * atoms,
        frame.weight * frame.stress_weight * has_stress,
    )
