"""Magnetic moments of frames, as a model's head is to learn them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxft.data.frames import Frame
from jaxft.typing import MomentHead


def magnitudes(moments: np.ndarray) -> np.ndarray:
    """|µ|: [n] or [n, 3] -> [n]."""
    return np.abs(moments) if moments.ndim == 1 else np.linalg.norm(moments, axis=-1)


def mean_moments(frames: Iterable[Frame]) -> dict[int, float]:
    """``{atomic number: mean of |µ| in µB}`` over the atoms of labelled frames, each counted once
    and as its frame weighs."""
    sums: dict[int, np.ndarray] = {}
    for frame in frames:
        weight = frame.weight * frame.moments_weight
        if frame.moments is None or weight == 0:
            continue
        sizes = magnitudes(frame.moments)
        for z in np.unique(frame.atomic_numbers).tolist():
            own = sizes[frame.atomic_numbers == z]
            sums[z] = sums.get(z, np.zeros(2)) + weight * np.array([own.sum(), len(own)])
    return {z: float(total / count) for z, (total, count) in sorted(sums.items())}


def moment_labels(frame: Frame, head: MomentHead | None) -> tuple[np.ndarray, ...]:
    """Moments [n], or [n, 3] for a head of vectors, and weights [n]; () without a head.

    A ``collinear`` head learns magnitudes, of whatever the frame has.

    Raises:
      ValueError: the head needs signs, or vectors, that the label does not have.
    """
    if head is None:
        return ()
    shape = (len(frame), 3) if head.kind == "vector" else (len(frame),)
    if frame.moments is None:
        return np.zeros(shape), np.zeros(len(frame))
    found = magnitudes(frame.moments) if head.kind == "collinear" else frame.moments
    if found.shape != shape:
        other = "kind: collinear" if head.kind == "vector" else "kind: collinear or vector"
        raise ValueError(
            f"{frame.source} has magnetic moments of shape {found.shape}, the model's head is for "
            f"{head.kind} ones of shape {shape};\nuse a head of {other}, or leave the labels out."
        )
    return found, np.full(len(frame), frame.weight * frame.moments_weight)
