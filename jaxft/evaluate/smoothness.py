"""Is it a potential? Continuity at the cutoff, symmetries, and derivatives that are derivatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ase

from jaxft.evaluate.candidate import Candidate, Flag, JaxCandidate, Outcome, check_names
from jaxft.evaluate.finding import Finding, Row, Value
from jaxft.evaluate.predictions import FrameResult
from jaxft.evaluate.probes import CROSSING_STEP, Probe, probes

STEPS = {"float64": 1e-4, "float32": 1e-2}
"""Å and strain, of finite differences: shorter ones drown in rounding."""

LIMITS = {
    "energy_jump": 1e-3,
    "force_jump": 1e-2,
    "net_force": 1e-3,
    "torque": 1e-2,
    "force_difference": 2e-2,
    "stress_difference": 2e-3,
    "extensivity": 1e-3,
    "supercell": 1e-4,
    **{
        f"{name}_{quantity}": limit
        for name in ("rotation", "inversion", "translation", "permutation")
        for quantity, limit in (("energy", 1e-4), ("forces", 1e-3), ("stress", 1e-4))
        if quantity != "stress" or name in ("rotation", "inversion")
    },
}
"""In eV and Å. What is larger is flagged; float32 stays below on structures of some dozen atoms."""
FLOAT64 = {"force_difference": 1e-3, "stress_difference": 1e-4}
"""Limits of float64 that are narrower: rounding hides less there."""

_BASIC = {"energy": "meV/atom", "forces": "meV/Å", "stress": "meV/Å³"}
_SPECIAL = {
    "energy_jump": "meV",
    "force_jump": "meV/Å",
    "net_force": "meV/Å",
    "torque": "meV",
    "force_difference": "meV/Å",
    "stress_difference": "meV/Å³",
    "extensivity": "meV",
    "supercell": "meV/atom",
}
UNITS = {name: _SPECIAL.get(name) or _BASIC[name.rpartition("_")[2]] for name in LIMITS}
NOTES = (
    "all are errors, ideally 0. jumps: the largest second difference of energy and forces as an "
    f"atom passes the cutoff of another in steps of {CROSSING_STEP:g} Å. force and stress "
    "difference: central differences of the energy against forces and stress.",
)


def check(
    candidates: Sequence[Candidate],
    structures: Mapping[str, ase.Atoms],
    *,
    r_max: float | None = None,
    seed: int = 0,
) -> Finding:
    """Ask every model about every structure; what is above ``LIMITS`` is flagged.

    Args:
      candidates: who is judged; float64 tells more than float32.
      structures: by name; rattled ones tell more than symmetric ones.
      r_max: Å, the cutoff of candidates that are not ours.
      seed: of directions, rotations and permutations.

    Raises:
      ValueError: names occur twice, or there are no structures.
    """
    check_names(candidates)
    if not structures:
        raise ValueError("no structures to ask about; give at least one.")
    rows = [row for c in candidates for row in _judge(c, structures, r_max, seed)]
    settings = {
        "steps": {c.name: _step(c) for c in candidates},
        "seed": seed,
        "limits": {name: 1e3 * limit for name, limit in LIMITS.items()},
        "limits of float64": {name: 1e3 * limit for name, limit in FLOAT64.items()},
    }
    return Finding("smoothness", tuple(rows), UNITS, settings, (), NOTES)


def _dtype(candidate: Candidate) -> str:
    return candidate.working_dtype if isinstance(candidate, JaxCandidate) else "float64"


def _step(candidate: Candidate) -> float:
    return STEPS[_dtype(candidate)]


def _judge(
    candidate: Candidate, structures: Mapping[str, ase.Atoms], r_max: float | None, seed: int
) -> list[Row]:
    cutoff = candidate.model.r_max if isinstance(candidate, JaxCandidate) else r_max
    asked = {
        name: probes(atoms, r_max=cutoff, step=_step(candidate), seed=seed)
        for name, atoms in structures.items()
    }
    every = []
    for name, atoms in structures.items():
        every += [atoms, *(s for probe in asked[name].values() for s in probe.structures)]
    outcomes = iter(candidate.evaluate(every))
    limits = LIMITS | (FLOAT64 if _dtype(candidate) == "float64" else {})
    rows = []
    for name, found in asked.items():
        own = next(outcomes)
        answers = {k: [next(outcomes) for _ in p.structures] for k, p in found.items()}
        rows.append(_row(candidate.name, name, own, found, answers, limits))
        if cutoff is None and rows[-1].flag is None:
            reason = "the cutoff is not known, so it was not crossed; give r_max"
            rows[-1] = Row(candidate.name, name, rows[-1].values, reason)
    return rows


def _row(
    model: str,
    subject: str,
    own: Outcome,
    asked: Mapping[str, Probe],
    answers: Mapping[str, Sequence[Outcome]],
    limits: Mapping[str, float],
) -> Row:
    if isinstance(own, Flag):
        return Row(model, subject, {}, own.reason)
    values: dict[str, Value] = {}
    wrong = []
    for name, probe in asked.items():
        flags = [o.reason for o in answers[name] if isinstance(o, Flag)]
        if flags:
            wrong.append(f"{name}: {flags[0]}")
            continue
        results: list[FrameResult] = [o for o in answers[name] if not isinstance(o, Flag)]
        numbers = probe.read(own, results)
        values |= {key: 1e3 * value for key, value in numbers.items()}
        above = [key for key, value in numbers.items() if not value <= limits[key]]
        wrong += [f"{key} {1e3 * numbers[key]:.3g} {UNITS[key]}" for key in above]
    return Row(model, subject, values, "; ".join(wrong) or None)
