"""Molecular dynamics of several models: do they survive, conserve energy, and agree?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import ase
import numpy as np

from jaxft.bundle import refuse_existing
from jaxft.evaluate.candidate import Candidate, check_names
from jaxft.evaluate.finding import Finding, Row, Value
from jaxft.evaluate.layout import grouped
from jaxft.evaluate.mdlooks import Look, look_at, pictures_of
from jaxft.evaluate.mdruns import Job, Outcome, Plan, jobs_of, outcomes_of
from jaxft.md.diffusion import arrhenius
from jaxft.md.rdf import earth_mover, largest_radius, rdf_error
from jaxft.md.spectrum import spectrum_error

UNITS = {
    "replicas": "",
    "survived": "",
    "survival_time": "ps",
    "temperature": "K",
    "pressure": "GPa",
    "volume": "Å³/atom",
    "energy_drift": "meV/atom/ps",
    "energy_fluctuation": "meV/atom",
    "diffusion": "Å²/ps",
    "diffusion_error": "Å²/ps",
    "activation_energy": "eV",
    "activation_energy_error": "eV",
    "rdf_error": "%",
    "rdf_earth_mover": "Å",
    "vdos_error": "%",
    "steps_per_second": "1/s",
    "lists": "",
    "compilations": "",
}

GROUPS = {
    "md: survival": "replicas survived survival_time",
    "md: state": "temperature pressure volume",
    "md: conservation": "energy_drift energy_fluctuation",
    "md: structure and motion": "rdf_error rdf_earth_mover vdos_error diffusion diffusion_error",
    "md: activation": "activation_energy activation_energy_error",
    "md: cost": "steps_per_second lists compilations",
}
"""Columns of the tables of a terminal."""


def md(
    candidates: Sequence[Candidate],
    structures: Sequence[ase.Atoms],
    plan: Plan | None = None,
    *,
    reference: Sequence[ase.Atoms] | None = None,
    trajectories: Path | None = None,
    stride: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Finding:
    """Run every model from the same structures with the same velocities, and measure.

    A :class:`JaxCandidate` runs its replicas in batches on the device, others through ASE's
    integrators one by one. Replicas that fail are flagged with time and reason; what the others
    did is in the row.

    Args:
      candidates: models. Radial distribution functions and spectra are compared with those of the
        first, unless ``reference`` is given.
      structures: to start from; near a minimum, since half of the kinetic energy soon is potential.
      plan: how to run.
      reference: frames of a trajectory of the only structure, to compare radial distribution
        functions with, such as one of ab initio molecular dynamics.
      trajectories: a new folder for ``MODEL-SUBJECT-REPLICA.xyz`` (extended XYZ, with velocities).
      stride: of the frames that are looked at, every ``stride``-th is written.
      progress: called with (steps done, steps) of the batch that runs.

    Returns:
      A row per model, structure and temperature, means over replicas; with several temperatures,
      one more per model and structure for Arrhenius' law.

    Raises:
      ValueError: no or ambiguous models, no structure, a reference for several structures, or a
        stride below 1.
      FileExistsError: the folder exists.
    """
    plan = plan or Plan()
    _check(candidates, structures, plan, reference, stride)
    if trajectories is not None:
        refuse_existing(trajectories)
        trajectories.mkdir()
    jobs = jobs_of(structures, plan)
    rows: list[Row] = []
    looks: dict[tuple[str, str], Look] = {}
    for candidate in candidates:
        outcomes = outcomes_of(candidate, jobs, plan, progress)
        if trajectories is not None:
            _write(trajectories, candidate.name, outcomes, stride)
        own = {name: look_at(o.replicas, plan, reference) for name, o in outcomes.items()}
        looks |= {(candidate.name, subject): look for subject, look in own.items()}
        for subject, outcome in outcomes.items():
            look, base = own[subject], looks[candidates[0].name, subject]
            values = _values(outcome, look, plan)
            values |= _compared(look, base, is_given=reference is not None)
            rows.append(Row(candidate.name, subject, values, _flag(outcome, look)))
        if len(plan.temperatures) > 1:
            rows += _laws(candidate.name, jobs, own)
    settings = asdict(plan) | {"reference": "given" if reference else candidates[0].name}
    return Finding("md", tuple(rows), UNITS, settings, pictures_of(looks), _notes(plan))


def tables(finding: Finding) -> list[Finding]:
    """For a terminal: the columns in groups."""
    return grouped(finding, GROUPS)


def _check(
    candidates: Sequence[Candidate],
    structures: Sequence[ase.Atoms],
    plan: Plan,
    reference: Sequence[ase.Atoms] | None,
    stride: int,
) -> None:
    check_names(candidates)
    is_ambiguous = reference is not None and len(structures) * len(plan.temperatures) != 1
    if not structures or is_ambiguous or stride < 1:
        raise ValueError(
            f"{len(structures)} structures at {len(plan.temperatures)} temperatures, "
            f"{'a' if reference else 'no'} reference and a stride of {stride} are not possible; "
            "give at least one structure, only one and one temperature where there is a "
            "reference, and a stride of 1 or more."
        )
    if reference is not None:
        largest_radius(reference)
    if plan.ensemble == "npt" and not all(atoms.pbc.all() for atoms in structures):
        raise ValueError(
            "npt needs structures that are periodic in three directions; leave the others out, or "
            "use another ensemble."
        )
    if plan.element is not None and not all(plan.element in a.symbols for a in structures):
        raise ValueError(f"not every structure holds {plan.element}; give an element of them all.")


def _values(outcome: Outcome, look: Look, plan: Plan) -> dict[str, Value]:
    replicas = outcome.replicas
    alive = [t for t in replicas if len(t)]

    def mean(found: list[np.ndarray]) -> float | None:
        numbers = np.concatenate(found) if found else np.zeros(0)
        return float(numbers.mean()) if len(numbers) and np.isfinite(numbers).all() else None

    steps = sum(t.steps for t in replicas) + plan.equilibration * len(alive)
    volumes = [np.abs(np.linalg.det(t.cells)) / len(t.start) for t in alive if t.start.pbc.all()]
    values: dict[str, Value] = {
        "replicas": len(replicas),
        "survived": sum(t.ended is None for t in replicas),
        "survival_time": float(np.mean([t.survival for t in replicas])),
        "temperature": mean([t.temperature for t in alive]),
        "pressure": mean([t.pressure for t in alive]),
        "volume": mean(volumes) if plan.ensemble == "npt" else None,
        "steps_per_second": steps / outcome.seconds if outcome.seconds > 0 else None,
        "lists": outcome.lists,
        "compilations": outcome.compilations,
    }
    if plan.ensemble == "nve" and look.drifts:
        slopes = [d.slope for d in look.drifts]
        values["energy_drift"] = float(slopes[np.argmax(np.abs(slopes))])
        values["energy_fluctuation"] = float(np.mean([d.fluctuation for d in look.drifts]))
    if look.diffusion is not None:
        values["diffusion"] = look.diffusion.value
        values["diffusion_error"] = look.diffusion.error
    return values


def _compared(look: Look, base: Look, *, is_given: bool) -> dict[str, Value]:
    found: dict[str, Value] = {}
    if look is base and not is_given:
        return found
    pairs = base.expected if is_given else base.rdf
    if pairs is not None and look.rdf is not None:
        found["rdf_error"] = rdf_error(pairs, look.rdf)
        found["rdf_earth_mover"] = earth_mover(pairs, look.rdf)
    if look is not base and look.spectrum is not None and base.spectrum is not None:
        found["vdos_error"] = spectrum_error(base.spectrum, look.spectrum)
    return found


def _flag(outcome: Outcome, look: Look) -> str | None:
    """What happened to the replicas that ended, and why numbers are missing."""
    count = len(outcome.replicas)
    said = [
        f"replica {i + 1} of {count} ended at {t.ended.time:.4g} ps: {t.ended.reason}"
        for i, t in enumerate(outcome.replicas)
        if t.ended is not None
    ]
    return "; ".join([*said, *look.missing]) or None


def _laws(model: str, jobs: Sequence[Job], looks: Mapping[str, Look]) -> list[Row]:
    """Arrhenius' of every structure."""
    rows = []
    for name in dict.fromkeys(job.structure for job in jobs):
        of = {job.kelvin: looks[job.subject].diffusion for job in jobs if job.structure == name}
        found = {kelvin: d for kelvin, d in of.items() if d is not None}
        subject = f"{name}, Arrhenius"
        try:
            law = arrhenius(list(found), list(found.values()))
        except ValueError as error:
            rows.append(Row(model, subject, {}, str(error).splitlines()[0]))
            continue
        values = {"activation_energy": law.energy, "activation_energy_error": law.error}
        rows.append(Row(model, subject, values))
    return rows


def _write(folder: Path, model: str, outcomes: Mapping[str, Outcome], stride: int) -> None:
    for subject, outcome in outcomes.items():
        for i, trajectory in enumerate(outcome.replicas):
            name = f"{model}-{subject}-{i + 1}.xyz".replace(", ", "-").replace(" ", "")
            trajectory.write(folder / name.replace("/", "_"), stride=stride)


def _notes(plan: Plan) -> tuple[str, ...]:
    limits = plan.limits
    found = (
        f"A replica ends where energy or forces are not finite, above {limits.temperature:g} K, or "
        f"with two atoms closer than {limits.distance:g} of the sum of their covalent radii.",
        "Numbers but survival are of frames after equilibration, means over replicas; the drift is "
        "the largest of them. Steps per second are of all replicas together, compilation included.",
    )
    if plan.ensemble == "langevin":
        return (*found, "Langevin's friction changes diffusion and spectra; use bussi for these.")
    return found
