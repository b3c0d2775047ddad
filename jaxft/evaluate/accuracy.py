"""Errors of several models on the same labelled frames; definitions in :mod:`.errors`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ase
import numpy as np
from ase.data import chemical_symbols
from ase.units import GPa

from jaxft.data import Frame
from jaxft.evaluate.candidate import Candidate, Flag, Outcome, check_names
from jaxft.evaluate.errors import MILLI, TOTAL, GroupErrors, errors
from jaxft.evaluate.finding import Finding, Picture, Row, Value, scatter
from jaxft.evaluate.predictions import FrameResult

UNITS = {
    "frames": "",
    "atoms": "",
    "energy_mae": "meV/atom",
    "energy_rmse": "meV/atom",
    "forces_mae": "meV/Å",
    "forces_rmse": "meV/Å",
    "forces_p95": "meV/Å",
    "forces_cosine": "",
    "stress_mae": "meV/Å³",
    "stress_rmse": "meV/Å³",
    "stress_rmse_gpa": "GPa",
}

MOMENT_UNITS = {
    "moments_mae": "mµB",
    "moments_rmse": "mµB",
    "moments_mean_mae": "mµB",
}
"""Columns that are there if a model and the frames have moments; the last is of predicting each
element's mean."""

LABELS = ("energy", "forces", "stress")

Pair = tuple[Frame, FrameResult]


def check(candidates: Sequence[Candidate], frames: Sequence[Frame]) -> Finding:
    """Errors per config_type, in total, and of the forces per element.

    A frame that a model cannot compute is left out of that model's numbers alone, and its ``total``
    row says how many and why; it also says how many labels the frames lack.

    Args:
      candidates: who is judged.
      frames: with labels; isolated atoms count like any frame.

    Raises:
      ValueError: there are no candidates, two have one name, or there are no frames.
    """
    check_names(candidates)
    if not frames:
        raise ValueError("no frames to compare; give at least one.")
    judged = {c.name: outcomes_of(c, frames) for c in candidates}
    rows = [row for name, found in judged.items() for row in _rows(name, frames, found)]
    return Finding(
        "errors",
        tuple(rows),
        UNITS | (MOMENT_UNITS if any("moments_mae" in row.values for row in rows) else {}),
        {"frames": len(frames), "energy_shift": "none"},
        _pictures(frames, judged),
        ("Energies are compared as they are: no shift per composition is fitted.",),
    )


def outcomes_of(candidate: Candidate, frames: Sequence[Frame]) -> list[Outcome]:
    """What a candidate says of frames, in their order."""
    return candidate.evaluate([atoms_of(frame) for frame in frames])


def atoms_of(frame: Frame) -> ase.Atoms:
    """The structure with the features that a model may read, without labels."""
    atoms = ase.Atoms(
        frame.atomic_numbers, frame.positions, cell=frame.cell, pbc=frame.pbc, info=frame.features
    )
    for name, array in frame.atom_features.items():
        atoms.set_array(name, array)
    return atoms


def sound_pairs(frames: Sequence[Frame], outcomes: Sequence[Outcome]) -> list[Pair]:
    """The frames that have a result, with it."""
    return [
        (frame, outcome)
        for frame, outcome in zip(frames, outcomes, strict=True)
        if not isinstance(outcome, Flag)
    ]


def left_out(frames: Sequence[Frame], outcomes: Sequence[Outcome]) -> str | None:
    """How many frames have no result and why not; None if all have one."""
    lost = [(f, o) for f, o in zip(frames, outcomes, strict=True) if isinstance(o, Flag)]
    if not lost:
        return None
    frame, flag = lost[0]
    return f"{len(lost)} of {len(frames)} frames left out, first {frame.source}: {flag.reason}"


def missing(frames: Sequence[Frame], quantities: Sequence[str] = LABELS) -> str | None:
    """How many frames lack which label; None if all have all. Only crystals have a stress."""
    lacking = {
        quantity: sum(
            getattr(frame, quantity) is None and (quantity != "stress" or frame.is_periodic)
            for frame in frames
        )
        for quantity in quantities
    }
    told = [f"no {quantity} on {count}" for quantity, count in lacking.items() if count]
    return f"labels: {', '.join(told)} of {len(frames)} frames" if told else None


def _without_stress(pairs: Sequence[Pair]) -> str | None:
    lost = sum(frame.stress is not None and result.stress is None for frame, result in pairs)
    return f"the model gives no stress of {lost} frames with that label" if lost else None


def joined(*reasons: str | None) -> str | None:
    """All that is said; None if nothing is."""
    return "; ".join(reason for reason in reasons if reason) or None


def _rows(name: str, frames: Sequence[Frame], outcomes: Sequence[Outcome]) -> list[Row]:
    pairs, flag = sound_pairs(frames, outcomes), left_out(frames, outcomes)
    if not pairs:
        return [Row(name, TOTAL, {"frames": 0}, flag)]
    table = errors(*zip(*pairs, strict=True))
    groups = table.groups if len(table.groups) > 1 else ()
    # what no frame at all is labelled with is said once, in the total
    known = [label for label in LABELS if any(getattr(f, label) is not None for f, _ in pairs)]
    rows = []
    for group in groups:
        members = [frame for frame, _ in pairs if frame.config_type == group.name]
        rows.append(Row(name, group.name, values_of(group), missing(members, known)))
    flag = joined(flag, missing([frame for frame, _ in pairs]), _without_stress(pairs))
    rows.append(Row(name, TOTAL, values_of(table.total), flag))
    for element in table.elements:
        z = chemical_symbols.index(element.symbol)
        only = [_only(z, *pair) for pair in pairs if z in pair[0].atomic_numbers]
        group = errors(*zip(*only, strict=True)).total
        rows.append(Row(name, f"element {element.symbol}", values_of(group)))
    return rows


def values_of(group: GroupErrors) -> dict[str, Value]:
    """In the columns and units of ``UNITS``, None where nothing is labelled; those of
    ``MOMENT_UNITS`` where moments are."""

    def times(value: float | None, factor: float = MILLI) -> float | None:
        return None if value is None else factor * value

    found: dict[str, Value] = {
        "frames": group.frames,
        "atoms": group.atoms,
        "energy_mae": times(group.energy.mae),
        "energy_rmse": times(group.energy.rmse),
        "forces_mae": times(group.forces.mae),
        "forces_rmse": times(group.forces.rmse),
        "forces_p95": times(group.force_p95),
        "forces_cosine": group.force_cosine,
        "stress_mae": times(group.stress.mae),
        "stress_rmse": times(group.stress.rmse),
        "stress_rmse_gpa": times(group.stress.rmse, 1 / GPa),
    }
    if group.moments.frames:
        found["moments_mae"] = times(group.moments.mae)
        found["moments_rmse"] = times(group.moments.rmse)
        found["moments_mean_mae"] = times(group.mean_moments.mae)
    return found


def _only(z: int, frame: Frame, result: FrameResult) -> Pair:
    """The atoms of one element, of which only forces and moments are labels."""
    chosen = frame.atomic_numbers == z

    def own(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array[chosen]

    part = replace(
        frame,
        atomic_numbers=frame.atomic_numbers[chosen],
        positions=frame.positions[chosen],
        energy=None,
        forces=own(frame.forces),
        stress=None,
        moments=own(frame.moments),
        atom_features={},
        atom_weights=None,
    )
    zeros = np.zeros(chosen.sum())
    moments, means = own(result.moments), own(result.mean_moments)
    return part, FrameResult(0.0, zeros, result.forces[chosen], None, moments, means)


QUANTITIES: dict[str, tuple[str, Callable[[Any, int], np.ndarray]]] = {
    "energy": ("eV/atom", lambda item, count: np.array([item.energy]) / count),
    "forces": ("eV/Å", lambda item, _: np.ravel(item.forces)),
    "stress": ("GPa", lambda item, _: np.ravel(item.stress) / GPa),
}
"""Unit and flat numbers of a frame or result."""


def _pictures(frames: Sequence[Frame], judged: dict[str, list[Outcome]]) -> tuple[Picture, ...]:
    found = []
    for quantity, (unit, numbers) in QUANTITIES.items():
        lines = []
        for name, outcomes in judged.items():
            pairs = [
                (f, r)
                for f, r in sound_pairs(frames, outcomes)
                if getattr(f, quantity) is not None and getattr(r, quantity) is not None
            ]
            if pairs:
                x = np.concatenate([numbers(f, len(f)) for f, _ in pairs])
                y = np.concatenate([numbers(r, len(f)) for f, r in pairs])
                lines.append(scatter(name, x, y))
        if lines:
            across, up = f"reference, {unit}", f"model, {unit}"
            found.append(Picture(quantity, across, up, tuple(lines), diagonal=True))
    return tuple(found)
