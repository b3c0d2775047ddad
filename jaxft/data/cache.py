"""Neighbour lists on disk, one file per set of structures and cutoff.

A file is named by the content that it belongs to, so a changed set has another file, and stale
ones are merely unused. It holds arrays and no code.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxft.data.frames import Frame
from jaxft.data.neighbours import Edges
from jaxft.data.workers import neighbour_lists

VERSION = 1
"""Part of every name; to be raised when neighbour lists change."""


def cached_neighbours(
    frames: Sequence[Frame], r_max: float, folder: Path | None, *, workers: int | None = None
) -> list[Edges]:
    """The neighbour lists of all frames, from ``folder`` or else computed and written there.

    Args:
      frames: structures; only their geometry counts.
      r_max: Å.
      folder: made if it is absent. Files in it may be deleted at any time. None keeps nothing.
      workers: as in :func:`jaxft.data.workers.neighbour_lists`.

    Returns:
      Bitwise those of :func:`jaxft.data.neighbours.neighbours`.

    Raises:
      ValueError: ``folder`` is a file; the file of this set is damaged or not of this kind; or a
        geometry is impossible.
      ChildProcessError: a process that made some of them has died.
    """
    if folder is None:
        return neighbour_lists(frames, r_max, workers=workers)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name one where neighbour lists may be kept.")
    if not frames:
        return []
    path = folder / f"{digest(frames, r_max)}.npz"
    if path.exists():
        return _read(path, frames)
    found = neighbour_lists(frames, r_max, workers=workers)
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, found)
    return found


def digest(frames: Sequence[Frame], r_max: float) -> str:
    """32 hexadecimal digits that change with any bit of a geometry, their order, or the cutoff."""
    total = hashlib.blake2b(f"{VERSION} {r_max!r} {len(frames)}".encode(), digest_size=16)
    for frame in frames:
        total.update(f"{len(frame)} {frame.pbc}".encode())
        total.update(np.asarray(frame.cell, np.float64).tobytes())
        total.update(np.asarray(frame.positions, np.float64).tobytes())
    return total.hexdigest()


def _write(path: Path, edges: Sequence[Edges]) -> None:
    """Whole or not at all, also if several processes write the same file."""
    parts: dict[str, list[np.ndarray]] = {
        "counts": [np.array([len(e.senders) for e in edges], np.int64)],
        "senders": [e.senders.astype(np.int32) for e in edges],
        "receivers": [e.receivers.astype(np.int32) for e in edges],
        "vectors": [e.vectors for e in edges],
    }
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                allow_pickle=False,
                **{name: np.concatenate(part) for name, part in parts.items()},
            )
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def _read(path: Path, frames: Sequence[Frame]) -> list[Edges]:
    try:
        with np.load(path, allow_pickle=False) as file:
            counts, senders, receivers, vectors = (
                file[name] for name in ("counts", "senders", "receivers", "vectors")
            )
        _check(counts, senders, receivers, vectors, frames)
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(
            f"{path} is damaged, or no file of neighbour lists ({error});\n"
            f"expected those of {len(frames)} frames. Delete it, and it is made anew."
        ) from error
    cuts = np.cumsum(counts)[:-1]
    pieces = (np.split(array, cuts) for array in (senders, receivers, vectors))
    return [Edges(*arrays) for arrays in zip(*pieces, strict=True)]


def _check(
    counts: np.ndarray,
    senders: np.ndarray,
    receivers: np.ndarray,
    vectors: np.ndarray,
    frames: Sequence[Frame],
) -> None:
    """Raises ValueError unless these can be the neighbour lists of ``frames``."""
    kinds = [array.dtype.str[1:] for array in (counts, senders, receivers, vectors)]
    if kinds != ["i8", "i4", "i4", "f8"] or counts.shape != (len(frames),) or counts.min() < 0:
        raise ValueError(f"types {kinds}, {counts.shape} counts")
    total = int(counts.sum())
    if senders.shape != (total,) or receivers.shape != (total,) or vectors.shape != (total, 3):
        raise ValueError(f"{total} edges, {len(senders)} senders, {len(receivers)} receivers")
    atoms = np.repeat([len(frame) for frame in frames], counts)
    for array in (senders, receivers):
        if ((array < 0) | (array >= atoms)).any():
            raise ValueError("an atom that does not exist")
