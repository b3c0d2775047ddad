r"""Is the potential too soft? Slope of predicted against reference forces, material by material.

.. math:: s = \frac{\sum F_p\cdot F_d}{\sum F_d\cdot F_d},\qquad
          R^2 = 1 - \frac{\sum (F_p - s F_d)^2}{\sum F_p^2}

over all components of a material's frames: a line through the origin, on which forces of a sum of
zero lie; s < 1 is soft. The curvature ratio is the same slope of :math:`F - F_\mathrm{eq}`, the
forces that small displacements from an equilibrium frame add, so that a wrong equilibrium does not
count.

Reference: Deng et al., npj Comput. Mater. 11, 9 (2025), arXiv:2405.07105. Whether their line has an
intercept is not stated; ours has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from ase.data import chemical_symbols
from ase.formula import Formula
from ase.geometry import find_mic

from jaxft.data import Frame
from jaxft.evaluate.accuracy import joined, left_out, missing, outcomes_of, sound_pairs
from jaxft.evaluate.candidate import Candidate, Outcome, check_names
from jaxft.evaluate.finding import Finding, Line, Picture, Row, Value, scatter
from jaxft.evaluate.predictions import FrameResult

UNITS = {
    "frames": "",
    "slope": "",
    "slope_spread": "",
    "r2": "",
    "curvature_ratio": "",
    "curvature_frames": "",
    "rmse": "meV/Å",
    "rmse_corrected": "meV/Å",
}
ALL = "mean of materials"

Pair = tuple[Frame, FrameResult]


@dataclass(frozen=True)
class Slope:
    """Of a line through the origin."""

    slope: float
    r2: float | None
    """None where everything predicted is zero."""


def slope_of(predicted: np.ndarray, reference: np.ndarray) -> Slope | None:
    """The least-squares line through the origin; None where all references are zero.

    Example:
      >>> slope_of(np.array([0.5, -1.0]), np.array([1.0, -2.0]))
      Slope(slope=0.5, r2=1.0)
    """
    p, d = np.ravel(predicted), np.ravel(reference)
    if not np.any(d):
        return None
    slope = float(p @ d / (d @ d))
    left = p - slope * d
    return Slope(slope, float(1 - left @ left / (p @ p)) if np.any(p) else None)


def check(
    candidates: Sequence[Candidate],
    frames: Sequence[Frame],
    *,
    equilibrium: Sequence[Frame] = (),
    max_force: float | None = None,
    max_displacement: float = 0.1,
) -> Finding:
    """Slopes per material (reduced formula and config_type), their mean and spread.

    Args:
      candidates: who is judged.
      frames: off equilibrium, with forces.
      equilibrium: frames with the same atoms in the same order and cell, for the curvature; their
        forces are labels or, if absent, zero.
      max_force: eV/Å; frames with a larger reference force are left out, and counted.
      max_displacement: Å; frames with an atom farther from its place in the equilibrium frame do
        not enter the curvature.

    Raises:
      ValueError: no frame has forces below the limit, or names occur twice.
    """
    check_names(candidates)
    labelled = [f for f in frames if f.forces is not None]
    limit = np.inf if max_force is None else max_force
    chosen = [f for f in labelled if f.forces is not None and np.abs(f.forces).max() <= limit]
    if not chosen:
        raise ValueError(
            f"none of {len(frames)} frames has forces of at most {limit} eV/Å to compare with "
            f"({len(labelled)} have forces); give labelled frames or another limit."
        )
    materials: dict[str, list[Frame]] = {}
    for frame in chosen:
        materials.setdefault(material_of(frame), []).append(frame)
    rows: list[Row] = []
    lines: list[Line] = []
    lost = missing(frames, ["forces"])
    for candidate in candidates:
        found = _judge(candidate, materials, equilibrium, max_displacement)
        *some, mean = found.rows
        rows += [*some, replace(mean, flag=joined(mean.flag, lost))]
        lines.append(found.line)
    above = len(labelled) - len(chosen)
    settings = {
        "max_force": max_force,
        "max_displacement": max_displacement,
        "frames_left_out_by_max_force": above,
        "frames_without_forces": len(frames) - len(labelled),
        "equilibrium_frames": len(equilibrium),
    }
    picture = Picture(
        "softening", "reference force, eV/Å", "model force, eV/Å", tuple(lines), diagonal=True
    )
    told = (f"{above} of {len(labelled)} frames have forces above {limit} eV/Å and are left out.",)
    notes = (NOTES + told) if above else NOTES
    return Finding("softening", tuple(rows), UNITS, settings, (picture,), notes)


NOTES = (
    "slope: of predicted against reference forces through the origin; below 1 is soft. The spread "
    "is the standard deviation over materials.",
    "rmse_corrected: after division by the slope. The same correction of a whole model is one "
    "number: surgery.set_scale_shift with the scale divided by the mean slope; it changes energies "
    "too, so fine-tune or refit E0s after it.",
)


def material_of(frame: Frame) -> str:
    """Reduced formula, and the config_type where there is one."""
    symbols = [chemical_symbols[z] for z in frame.atomic_numbers]
    reduced, _ = Formula.from_list(symbols).reduce()
    name = f"{reduced:metal}"
    return name if frame.config_type == "Default" else f"{name}, {frame.config_type}"


@dataclass(frozen=True)
class _Judged:
    rows: list[Row]
    line: Line


def _judge(
    candidate: Candidate,
    materials: Mapping[str, Sequence[Frame]],
    equilibrium: Sequence[Frame],
    max_displacement: float,
) -> _Judged:
    every = [frame for frames in materials.values() for frame in frames]
    outcomes = outcomes_of(candidate, [*every, *equilibrium])
    at_rest = sound_pairs(equilibrium, outcomes[len(every) :])
    rows, slopes, start = [], [], 0
    for name, frames in materials.items():
        some = outcomes[start : (start := start + len(frames))]
        row = _row(candidate.name, name, frames, some, at_rest, max_displacement)
        rows.append(row)
        if isinstance(value := row.values.get("slope"), float):
            slopes.append(value)
    spread = float(np.std(slopes, ddof=1)) if len(slopes) > 1 else None
    mean: dict[str, Value] = {"frames": len(sound_pairs(every, outcomes[: len(every)]))}
    if slopes:
        mean |= {"slope": float(np.mean(slopes)), "slope_spread": spread}
    rows.append(Row(candidate.name, ALL, mean, left_out(every, outcomes[: len(every)])))
    predicted, reference = _forces(sound_pairs(every, outcomes[: len(every)]))
    return _Judged(rows, scatter(candidate.name, reference, predicted))


def _row(
    model: str,
    name: str,
    frames: Sequence[Frame],
    outcomes: Sequence[Outcome],
    at_rest: Sequence[Pair],
    max_displacement: float,
) -> Row:
    pairs = sound_pairs(frames, outcomes)
    predicted, reference = _forces(pairs)
    line = slope_of(predicted, reference)
    flag = left_out(frames, outcomes)
    if line is None:
        return Row(model, name, {"frames": len(pairs)}, flag or "all reference forces are zero")
    values: dict[str, Value] = {
        "frames": len(pairs),
        "slope": line.slope,
        "r2": line.r2,
        "rmse": _rmse(predicted - reference),
        "rmse_corrected": _rmse(predicted / line.slope - reference) if line.slope else None,
    }
    if at_rest:
        added = [d for pair in pairs if (d := _added(pair, at_rest, max_displacement)) is not None]
        curvature = slope_of(*(np.concatenate(side) for side in zip(*added))) if added else None
        values["curvature_frames"] = len(added)
        if curvature is None:
            flag = flag or f"no frame within {max_displacement} Å of an equilibrium frame"
        else:
            values["curvature_ratio"] = curvature.slope
    return Row(model, name, values, flag)


def _forces(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Flat: predicted, reference."""
    empty = np.zeros(0)
    predicted = np.concatenate([empty, *(r.forces.ravel() for _, r in pairs)])
    return predicted, np.concatenate([empty, *(_labels(f).ravel() for f, _ in pairs)])


def _added(
    pair: Pair, at_rest: Sequence[Pair], most: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Forces beyond those at rest, predicted and reference; None if no frame at rest is near."""
    frame, result = pair
    for rest, at in at_rest:
        if len(rest) != len(frame) or (rest.atomic_numbers != frame.atomic_numbers).any():
            continue
        if not np.allclose(rest.cell, frame.cell, atol=1e-4) or rest.pbc != frame.pbc:
            continue
        _, lengths = find_mic(frame.positions - rest.positions, frame.cell, frame.pbc)
        if lengths.max() <= most:
            reference = _labels(frame) - (0.0 if rest.forces is None else rest.forces)
            return (result.forces - at.forces).ravel(), reference.ravel()
    return None


def _labels(frame: Frame) -> np.ndarray:
    assert frame.forces is not None  # only such frames were chosen
    return frame.forces


def _rmse(difference: np.ndarray) -> float:
    return 1e3 * float(np.sqrt(np.mean(difference**2)))
