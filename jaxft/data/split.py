"""A split into training and validation that knows structures, not positions in a list."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from jaxft.data.frames import ISOLATED_ATOM, Frame

SAME = 1e-5
"""Å; coordinates that agree after rounding to it are the same: files differ in their digits."""


def structure_key(frame: Frame, *, seed: int | None = None) -> bytes:
    """16 bytes that depend on elements, positions, cell and periodicity, and on no label.

    The order of atoms counts; so do rotations and the choice of periodic images.

    Args:
      frame: of any kind.
      seed: makes another, unrelated key.
    """
    numbers = np.asarray(frame.atomic_numbers, np.int32)
    # + 0.0 turns -0.0 into 0.0, which has other bytes
    lengths = np.round(np.concatenate([frame.positions, frame.cell]) / SAME) + 0.0
    parts = (repr(seed).encode(), numbers.tobytes(), lengths.tobytes(), bytes(frame.pbc))
    return hashlib.blake2b(b"|".join(parts), digest_size=16).digest()


def split(
    frames: Sequence[Frame], *, valid: float, seed: int = 0
) -> tuple[list[Frame], list[Frame]]:
    """Split into training and validation frames by a hash of each structure and the seed.

    Validation gets the structures of smallest hash, ``round(valid * frames)`` frames in all, at
    least one. So the order of ``frames`` does not matter, a new label changes nothing, and each
    frame that is added or removed displaces one other frame at most, save among duplicates.
    Frames of one structure stay together, whatever their labels: nothing is validated that was
    trained on. If they fill the number of frames in no other way, validation gets fewer.

    Args:
      frames: to split; isolated atoms stay in the training part.
      valid: fraction for validation, in (0, 1).
      seed: of the hash.

    Returns:
      Training (isolated atoms first) and validation frames, each in the order given.

    Raises:
      ValueError: ``valid`` is no fraction, or the frames are too few or too much alike.
    """
    if not 0 < valid < 1:
        raise ValueError(f"valid={valid} is not a fraction; use a number between 0 and 1.")
    atoms = [frame for frame in frames if frame.config_type == ISOLATED_ATOM]
    rest = [frame for frame in frames if frame.config_type != ISOLATED_ATOM]
    count = max(1, round(valid * len(rest)))
    if count >= len(rest):
        raise ValueError(
            f"{len(rest)} frames cannot be split with valid={valid}; give more frames."
        )
    alike: dict[bytes, list[int]] = {}
    for i, frame in enumerate(rest):
        alike.setdefault(structure_key(frame, seed=seed), []).append(i)
    chosen: set[int] = set()
    for key in sorted(alike):
        if len(chosen) + len(alike[key]) <= count:
            chosen.update(alike[key])
    if not chosen:
        raise ValueError(
            f"{len(rest)} frames hold {len(alike)} different structures, the rarest "
            f"{min(map(len, alike.values()))} times; {count} for validation (valid={valid}) cannot "
            "be set apart.\nRemove the duplicates, or give validation frames of their own."
        )
    train = [frame for i, frame in enumerate(rest) if i not in chosen]
    return atoms + train, [rest[i] for i in sorted(chosen)]


def subset(frames: Sequence[Frame], n: int, *, seed: int = 0) -> list[Frame]:
    """``n`` of the frames, by a hash of each structure and the seed; isolated atoms beside them.

    The order of ``frames`` does not matter, and a smaller subset is part of a larger one.

    Args:
      frames: to choose from.
      n: how many, isolated atoms not counted.
      seed: of the hash.

    Returns:
      All isolated atoms, then the chosen frames, each in the order given.

    Raises:
      ValueError: there are fewer frames than ``n``.
    """
    atoms = [frame for frame in frames if frame.config_type == ISOLATED_ATOM]
    rest = [frame for frame in frames if frame.config_type != ISOLATED_ATOM]
    if not 1 <= n <= len(rest):
        raise ValueError(
            f"{n} training frames were asked for and {len(rest)} are there, validation frames set "
            f"aside; ask for 1 to {len(rest)}."
        )
    order = sorted(range(len(rest)), key=lambda i: structure_key(rest[i], seed=seed))
    return atoms + [rest[i] for i in sorted(order[:n])]
