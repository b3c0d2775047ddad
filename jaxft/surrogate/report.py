"""What a surrogate is worth: its errors beside its teacher's, and how much faster it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ase

from jaxft import tree
from jaxft.data import Frame
from jaxft.evaluate import accuracy
from jaxft.evaluate.candidate import Flag, JaxCandidate
from jaxft.evaluate.finding import Finding, Row, Value
from jaxft.evaluate.predictions import FrameResult
from jaxft.md import Simulation, nve, thermal
from jaxft.surrogate import hessians
from jaxft.surrogate.config import Speed

KELVIN = 300.0
"""Of the velocities that dynamics is timed with."""

POOL_UNITS = {"frames": ""}
SPEED_UNITS = {"atoms": "", "parameters": "", "time": "ms", "speedup": ""}


def pool(counts: Mapping[str, int], teacher: str) -> Finding:
    """How the pool came about."""
    rows = tuple(Row(teacher, name.replace("_", " "), {"frames": n}) for name, n in counts.items())
    return Finding("pool", rows, POOL_UNITS)


def errors(models: Sequence[JaxCandidate], tests: Mapping[str, Sequence[Frame]]) -> list[Finding]:
    """Of teacher and student against the reference, and of the student against the teacher."""
    teacher, student = models
    found = []
    for name, frames in tests.items():
        against = accuracy.check(models, frames)
        found.append(replace(against, check=f"errors on {name}"))
        said = _relabelled(frames, teacher)
        apart = accuracy.check([student], said)
        found.append(replace(apart, check=f"student against teacher on {name}"))
    return found


def _relabelled(frames: Sequence[Frame], teacher: JaxCandidate) -> list[Frame]:
    outcomes = accuracy.outcomes_of(teacher, frames)
    return [
        replace(frame, energy=said.energy, forces=said.forces, stress=said.stress)
        for frame, said in zip(frames, outcomes, strict=True)
        if isinstance(said, FrameResult)
    ]


def speed(models: Sequence[JaxCandidate], probe: ase.Atoms, plan: Speed) -> Finding:
    """Medians of turns that teacher and student take in one process, compiled before.

    Three subjects: energy, forces and stress of one structure (its neighbour list included) and of
    a batch of replicas, and a step of dynamics of those replicas (all of them together).

    Args:
      models: teacher and student.
      probe: the structure.
      plan: sizes and turns.
    """
    replicas = [thermal(probe, KELVIN, seed=i) for i in range(plan.replicas)]
    name, many = probe.get_chemical_formula(), len(replicas)
    subjects = (
        Subject(f"E, F, stress of {name}", 1, 1, lambda model: _evaluating(model, [probe])),
        Subject(
            f"E, F, stress of {many} x {name}", many, 1, lambda model: _evaluating(model, replicas)
        ),
        Subject(
            f"MD step of {many} x {name}",
            many,
            plan.steps,
            lambda model: _moving(model, replicas, plan),
        ),
    )
    rows = []
    for subject in subjects:
        try:
            times = _in_turns([subject.prepare(model) for model in models], plan.turns)
        except Unmeasured as error:
            rows.append(Row(models[-1].name, subject.name, {}, str(error)))
            continue
        for model, own in zip(models, times, strict=True):
            values: dict[str, Value] = {
                "atoms": len(probe) * subject.structures,
                "parameters": tree.size(model.params),
                "time": 1e3 * own / subject.steps,
                "speedup": times[0] / own,
            }
            rows.append(Row(model.name, subject.name, values))
    settings = plan.model_dump() | {"dtypes": [model.working_dtype for model in models]}
    notes = ("Medians of alternating turns in one process; compilation is not counted.",)
    return Finding("speed", tuple(rows), SPEED_UNITS, settings, (), notes)


class Subject(NamedTuple):
    """Something that is timed."""

    name: str
    structures: int
    steps: int
    """Per turn."""
    prepare: Callable[[JaxCandidate], Callable[[int], None]]
    """Of a model: what a turn calls, with its number."""


class Unmeasured(RuntimeError):
    """A time cannot be taken."""


def _in_turns(calls: Sequence[Callable[[int], None]], turns: int) -> list[float]:
    """Median seconds of each; the first two turns compile and settle."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(turns + 2):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call(turn)
            own.append(time.perf_counter() - start)
    return [statistics.median(own[2:]) for own in times]


def _evaluating(model: JaxCandidate, structures: Sequence[ase.Atoms]) -> Callable[[int], None]:
    """Atoms move slightly in each turn, as nothing computes a structure twice."""
    steady = replace(model, batch_size=len(structures)).steady()

    def call(turn: int) -> None:
        shaken = [atoms.copy() for atoms in structures]
        for i, atoms in enumerate(shaken):
            atoms.rattle(1e-4, seed=turn * len(shaken) + i)
        for outcome in steady.evaluate(shaken):
            if isinstance(outcome, Flag):
                raise Unmeasured(f"{model.name}: {outcome.reason}")

    return call


def _moving(
    model: JaxCandidate, replicas: Sequence[ase.Atoms], plan: Speed
) -> Callable[[int], None]:
    simulation = Simulation(
        model.model, model.params, replicas, head=model.head, dtype=model.working_dtype
    )

    def call(turn: int) -> None:
        simulation.run(nve(), timestep=plan.timestep, steps=plan.steps, interval=plan.steps)
        gone = [ended.reason for ended in simulation.ended if ended is not None]
        if gone:
            raise Unmeasured(f"{model.name}: {len(gone)} replicas ended: {gone[0]}")

    return call


def headline(findings: Sequence[Finding], models: Sequence[JaxCandidate]) -> dict[str, Any]:
    """The numbers that matter: RMSE of both models on each test set, those of the Hessians, and the
    speed-ups."""
    student = models[-1].name
    found: dict[str, Any] = {}
    for finding in findings:
        for row in finding.rows:
            if (
                finding.check.startswith(("errors on", "student against"))
                and row.subject == "total"
            ):
                kept = {k: v for k, v in row.values.items() if k.endswith("_rmse")}
                found.setdefault(finding.check, {})[row.model] = kept
            elif finding.check == hessians.CHECK and row.flag is None:
                kept = {name: row.values[name] for name in ("hv_rmse", "teacher_rms")}
                found.setdefault(finding.check, {})[row.subject] = kept
            elif finding.check == "speed" and row.model == student and row.flag is None:
                found.setdefault("speedup", {})[row.subject] = row.values["speedup"]
    return found
