"""The teacher's Hessians, times random displacements: labels, and how near the student comes.

Of a Hessian of n atoms only its product with a few displacements is computed, [n, 3] eV/Å each.

Reference: Amin et al., arXiv:2501.09009, whose students learn random columns of Hessians of their
teachers; a Gaussian displacement tells of all columns at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ase
import numpy as np

from jaxft.data import Frame, Keys, unlabelled
from jaxft.data.curvatures import Curvatures, arrays_of, displacements
from jaxft.evaluate.candidate import JaxCandidate, ProgressFn
from jaxft.evaluate.finding import Finding, Row, Value
from jaxft.evaluate.hessian import products_of_frames
from jaxft.surrogate.config import Hessian

CHECK = "Hessian, student against teacher"

FILE_UNITS = "probe Å, REF_hvp eV/Å"

UNITS = {"frames": "", "hv_mae": "eV/Å", "hv_rmse": "eV/Å", "teacher_rms": "eV/Å"}
"""Of the differences of components, and of the teacher's own."""

NOTE = (
    "Of Hessians times random displacements v, drawn anew, with ⟨|v|²⟩ = 1 Å²: the RMSE estimates "
    "that of all entries of the Hessian, in eV/Å². teacher rms is that of no curvature."
)

LABELS, REPORT = 3, 4
"""Streams of random numbers; those of the pool are 1 and 2."""


def labelled(
    teacher: JaxCandidate,
    structures: Sequence[ase.Atoms],
    plan: Hessian,
    seed: int,
    progress: ProgressFn | None = None,
) -> list[ase.Atoms]:
    """Copies with arrays ``probe`` and ``REF_hvp``: displacements, and the teacher's Hessian times
    each, as docs/hessian.md describes them.

    Args:
      teacher: computes in its own dtype.
      structures: what they carry is kept.
      plan: how many displacements, and of what kind.
      seed: with a structure's position it determines its displacements.
      progress: told (structures done, in total).

    Raises:
      ValueError: a product is not finite.
    """
    frames = [unlabelled(atoms, source=f"structure {i}") for i, atoms in enumerate(structures)]
    given = _drawn(frames, plan, seed, LABELS)
    products = _products(teacher, frames, given, progress)
    found, keys = [], Keys()
    for frame, atoms, u, product in zip(frames, structures, given, products, strict=True):
        if not np.isfinite(product).all():
            raise ValueError(
                f"the teacher's Hessian of {frame.source} of the pool ({atoms.symbols}) is not "
                "finite;\nkeep calmer structures (keep.max_force, keep.closest), or leave hessian "
                "out."
            )
        atoms = atoms.copy()
        atoms.arrays |= arrays_of(Curvatures(u, product), (keys.probe, keys.hessian))
        found.append(atoms)
    return found


def errors(
    models: Sequence[JaxCandidate],
    sets: Sequence[tuple[str, Sequence[Frame]]],
    plan: Hessian,
    seed: int,
) -> Finding:
    """Of the student's Hessians times displacements that were in no training, by set of frames.

    A set that either model cannot compute is a flag that says why.

    Args:
      models: teacher and student.
      sets: names and structures; labels are not looked at.
      plan: how many displacements of each frame, and of what kind.
      seed: of the displacements.
    """
    teacher, student = models
    rows = []
    for name, frames in sets:
        given = _drawn(frames, plan, seed, REPORT)
        try:
            both = [_products(model, frames, given) for model in (teacher, student)]
        except ValueError as error:  # of some frame, before anything was compiled
            rows.append(Row(student.name, name, {}, str(error).splitlines()[0]))
            continue
        rows.append(_row(student.name, name, *both))
    return Finding(CHECK, tuple(rows), UNITS, plan.model_dump(), (), (NOTE,))


def _row(
    model: str, subject: str, expected: Sequence[np.ndarray], found: Sequence[np.ndarray]
) -> Row:
    theirs, ours = (np.concatenate([np.ravel(part) for part in both]) for both in (expected, found))
    off = ours - theirs
    if not np.isfinite(off).all():
        return Row(model, subject, {}, "Hessians are not finite")
    values: Mapping[str, Value] = {
        "frames": len(expected),
        "hv_mae": float(np.mean(np.abs(off))),
        "hv_rmse": float(np.sqrt(np.mean(off**2))),
        "teacher_rms": float(np.sqrt(np.mean(theirs**2))),
    }
    return Row(model, subject, values)


def _drawn(frames: Sequence[Frame], plan: Hessian, seed: int, stream: int) -> list[np.ndarray]:
    """[probes, n, 3] Å of each frame."""
    return [
        displacements(len(frame), plan.probes, plan.kind, np.random.default_rng([seed, stream, i]))
        for i, frame in enumerate(frames)
    ]


def _products(
    model: JaxCandidate,
    frames: Sequence[Frame],
    given: Sequence[np.ndarray],
    progress: ProgressFn | None = None,
) -> list[np.ndarray]:
    return products_of_frames(
        model.model,
        model.params,
        frames,
        given,
        head=model.head,
        batch_size=model.batch_size,
        dtype=model.dtype,
        progress=progress,
    )
