"""What a model costs: parameters, those that changed, time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import ase
import jax

from jaxft import tree
from jaxft.evaluate.candidate import Candidate, Flag, JaxCandidate
from jaxft.evaluate.finding import Finding, Row, Value
from jaxft.strategies.delta import support_of

COST = "cost"
EVERY = "all models"
"""Whose the time of a check is."""

UNITS = {
    "parameters": "",
    "changed": "",
    "changed_share": "%",
    "atoms": "",
    "step": "ms",
    "per_atom": "µs/atom",
    "seconds": "s",
}
NOTES = (
    "changed: parameters that differ at all from those of the base. step: energy, forces and "
    "stress of the structure named, compiled before, the shortest of several, on the machine that "
    "ran the comparison; per atom the same over its atoms. seconds: a check, for all models, with "
    "compilation.",
)
REPEATS = 5
UNTIMED = "No structure to take the time of was given (probe), so time per atom is not known."


def cost(
    candidates: Sequence[Candidate],
    base: Candidate | None,
    probe: ase.Atoms | None,
    seconds: Mapping[str, float],
) -> Finding:
    """Parameters, parameters that changed, and time; of models that are not ours, the time.

    Args:
      candidates: models.
      base: whose parameters the others' are compared with.
      probe: a structure to take the time of.
      seconds: that checks took, by name.
    """
    rows = []
    for candidate in candidates:
        values: dict[str, Value] = {}
        if isinstance(candidate, JaxCandidate):
            values["parameters"] = tree.size(candidate.params)
            if isinstance(base, JaxCandidate):
                values |= _changed(base, candidate)
        rows.append(Row(candidate.name, "parameters", values))
    if probe is not None:
        rows += _timed(candidates, probe)
    rows += [Row(EVERY, f"check {name}", {"seconds": s}) for name, s in seconds.items()]
    notes = NOTES if probe is not None else (*NOTES, UNTIMED)
    return Finding(COST, tuple(rows), UNITS, {}, (), notes)


def _changed(base: JaxCandidate, candidate: JaxCandidate) -> dict[str, Value]:
    try:
        support = support_of(base.params, candidate.params)
    except ValueError:  # another architecture
        return {}
    changed = sum(int(leaf.sum()) for leaf in jax.tree.leaves(support))
    return {"changed": changed, "changed_share": 100 * changed / tree.size(candidate.params)}


def _timed(candidates: Sequence[Candidate], probe: ase.Atoms) -> list[Row]:
    """The shortest of several evaluations after a first, as whatever else the machine does only
    adds to it; in turns, so that it adds to all. Atoms move slightly each time, as a calculator
    does not compute a structure twice."""
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    flags: dict[str, str] = {}
    for i in range(REPEATS + 1):
        moved = probe.copy()
        moved.rattle(1e-4, seed=i)
        for candidate in candidates:
            if candidate.name in flags:
                continue
            start = time.perf_counter()
            (outcome,) = candidate.evaluate([moved])
            times[candidate.name].append(time.perf_counter() - start)
            if isinstance(outcome, Flag):
                flags[candidate.name] = outcome.reason
    subject = f"one step of {probe.symbols}"
    rows = []
    for name, found in times.items():
        if name in flags:
            rows.append(Row(name, subject, {}, flags[name]))
            continue
        step = min(found[1:])
        values = {"atoms": len(probe), "step": 1e3 * step, "per_atom": 1e6 * step / len(probe)}
        rows.append(Row(name, subject, values))
    return rows
