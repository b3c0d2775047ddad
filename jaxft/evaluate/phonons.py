"""Phonons of models: frequencies, modes and what follows from them, against a reference.

Supercells, displacements, symmetry, dynamical matrices and thermal properties are phonopy's; the
forces are the models', batched. Definitions and units: ``docs/evaluate/phonons.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from jaxft.evaluate.candidate import Candidate, Flag, JaxCandidate, ProgressFn, check_names
from jaxft.evaluate.crystals import Crystal, phonopy_api
from jaxft.evaluate.finding import Finding, Picture, Row, Value
from jaxft.evaluate.kappa import Conductivity, conductivities, kappa_values, phono3py_api
from jaxft.evaluate.layout import grouped
from jaxft.evaluate.phonon_tasks import Ground, Options, Solved, ground_of, solve_all
from jaxft.evaluate.thermal import CUTOFF, debye_temperature, expansion, gruneisen, slack
from jaxft.evaluate.zones import (
    REFERENCE,
    UNITS,
    View,
    compared,
    own_values,
    pictures,
    thermal_values,
    view_of,
)

ALL = "all crystals"
GROUPS = {
    "phonons": "omega_max omega_mean omega_min stable sum_rule",
    "against the reference": "mae omega_max_bias w1 dos_error curvature_slope force_rmse",
    "imaginary modes": "crystals imaginary_precision imaginary_recall",
    "sound": "slowest_sound fastest_sound gruneisen debye",
    "harmonic": "heat_capacity entropy free_energy",
    "harmonic, against the reference": "heat_capacity_error entropy_error free_energy_error",
    "anharmonic": "slack_kappa expansion volume bulk_modulus",
    "thermal conductivity": "kappa kappa_lowest kappa_highest kappa_srd kappa_srme",
}
"""Columns that are shown together."""

AVERAGED = ("mae", "omega_max_bias", "w1", "dos_error", "curvature_slope", "force_rmse")
"""Columns whose means over crystals the summary shows; of the bias, that of its size."""


def phonons(
    candidates: Sequence[Candidate],
    crystals: Sequence[Crystal],
    options: Options | None = None,
    *,
    reference: str | None = None,
    progress: ProgressFn | None = None,
) -> Finding:
    """Phonons of every model in every crystal, compared where there is a reference.

    The displaced supercells of all crystals and volumes are one batched call of a model. Where a
    crystal's reference has displacements, the models' forces are those in the same displaced cells.

    Args:
      candidates: models.
      crystals: see :func:`jaxft.evaluate.crystals.read_crystal`; names are unique.
      options: by default :class:`Options`.
      reference: the name of a model that is the reference, instead of the crystals' own.
      progress: told (supercells done, in total) of each model in turn.

    Returns:
      For each crystal and model a row, one more per temperature, and a summary over the crystals;
      what cannot be computed is flagged with its reason.

    Raises:
      ValueError: names collide, no crystal, an unknown reference, or exact Hessians of a
        calculator.
      ModuleNotFoundError: phonopy, seekpath or spglib is not installed; phono3py, for kappa.
    """
    phonopy_api()
    options = options or Options()
    if options.kappa:
        phono3py_api()
    _check(candidates, crystals, options, reference)
    grounds = {crystal.name: ground_of(crystal, options) for crystal in crystals}
    solved = {one.name: solve_all(one, grounds, options, progress) for one in candidates}
    heat = {
        one.name: conductivities(one, solved[one.name], options, progress)
        for one in candidates
        if options.kappa
    }
    rows: list[Row] = []
    drawn: list[Picture] = []
    for name, ground in grounds.items():
        views = {
            model: view_of(one.phonons, one.ground.zone, options.temperatures)
            for model, found in solved.items()
            if isinstance(one := found[name], Solved)
        }
        standard = _standard(ground, views, options, reference)
        if isinstance(standard, View) and reference is None:
            rows += _rows(REFERENCE, name, standard, None, options)
        for model, found in solved.items():
            one = found[name]
            if isinstance(one, Flag):
                rows.append(Row(model, name, flag=one.reason))
            else:
                against = None if model == reference else standard
                own_rows = _rows(model, name, views[model], against, options, one)
                if options.kappa:
                    theirs = None if reference in (None, model) else heat[reference][name]
                    own_rows = _with_kappa(own_rows, heat[model][name], theirs)
                rows += own_rows
        if isinstance(ground, Ground):
            own = standard if isinstance(standard, View) and reference is None else None
            drawn += pictures(name, views, own, ground.zone)
    if len(crystals) > 1:
        judged = [one.name for one in candidates if one.name != reference]
        rows += [_summary(name, rows, reference or REFERENCE) for name in judged]
    settings = asdict(options) | {"reference": reference, "thermal_cutoff_THz": CUTOFF}
    return Finding("phonons", tuple(rows), UNITS, settings, tuple(drawn), _notes(rows, crystals))


def _check(
    candidates: Sequence[Candidate],
    crystals: Sequence[Crystal],
    options: Options,
    reference: str | None,
) -> None:
    check_names(candidates)
    names = [one.name for one in candidates]
    if REFERENCE in names:
        raise ValueError(f"a model is called {REFERENCE!r}; that is a row's, use another name.")
    if reference is not None and reference not in names:
        raise ValueError(
            f"the reference {reference!r} is none of the models {', '.join(map(repr, names))}."
        )
    subjects = [crystal.name for crystal in crystals]
    if not subjects:
        raise ValueError("there is no crystal; give at least one.")
    twice = sorted({name for name in subjects if subjects.count(name) > 1})
    if twice:
        raise ValueError(f"several crystals are called {', '.join(map(repr, twice))}; rename them.")
    strangers = [one.name for one in candidates if not isinstance(one, JaxCandidate)]
    if options.method == "hessian" and strangers:
        raise ValueError(
            f"{', '.join(map(repr, strangers))} cannot be differentiated twice, only a bundle can;"
            "\nuse the method 'displacements'."
        )


def _standard(
    ground: Ground | Flag, views: Mapping[str, View], options: Options, reference: str | None
) -> View | Flag | None:
    """What a crystal's models are compared with, or why there is nothing."""
    if isinstance(ground, Flag):
        return ground
    if reference is not None:
        return views.get(reference, Flag(f"no reference: {reference} failed"))
    if ground.crystal.reference is not None:
        return view_of(ground.crystal.reference, ground.zone, options.temperatures)
    return Flag(ground.crystal.missing) if ground.crystal.missing else None


def _rows(
    model: str,
    name: str,
    view: View,
    against: View | Flag | None,
    options: Options,
    solved: Solved | None = None,
) -> list[Row]:
    """Of one model and crystal: what has no temperature, then what has one."""
    flags = [against.reason] if isinstance(against, Flag) else []
    values = own_values(view, options.tolerance)
    theirs = against if isinstance(against, View) and solved is not None else None
    if solved is not None and theirs is not None:
        values |= compared(view, theirs, solved.ground.zone)
        if theirs.phonons is solved.ground.crystal.reference:
            values["force_rmse"] = solved.force_rmse
    thermals = [thermal_values(view, i, theirs) for i in range(len(options.temperatures))]
    if solved is not None:
        flags += solved.flags
        values["sum_rule"] = solved.sum_rule
        if options.slack:
            found = _slack(solved, view, options, thermals)
            values |= found
            flags += [] if found else ["no Slack conductivity: no acoustic mode is real"]
        if options.expansion:
            flags += _expand(solved, view, options, thermals)
    flag = "; ".join(flags) or None
    return [Row(model, name, values, flag)] + [
        Row(model, f"{name} at {t:g} K", found)
        for t, found in zip(options.temperatures, thermals, strict=True)
    ]


def _with_kappa(
    rows: Sequence[Row], ours: Conductivity | Flag, theirs: Conductivity | Flag | None
) -> list[Row]:
    """Rows of one model and crystal with their thermal conductivity, or why there is none."""
    first, *thermals = rows
    if isinstance(ours, Flag):
        flag = ours.reason if first.flag is None else f"{first.flag}; {ours.reason}"
        return [replace(first, flag=flag), *thermals]
    return [first] + [
        replace(row, values={**row.values, **kappa_values(ours, i, theirs)})
        for i, row in enumerate(thermals)
    ]


def _slack(
    solved: Solved, view: View, options: Options, thermals: list[dict[str, Value]]
) -> dict[str, Value]:
    smaller, larger = (solved.at[v].phonons for v in options.gruneisen_volumes)
    primitive = view.phonons.primitive
    gamma = gruneisen(view.phonons, larger, smaller, solved.ground.zone.mesh)
    if not np.isfinite(gamma):
        return {}
    debye = debye_temperature(view.spectrum.frequencies, view.spectrum.weights)
    for found, temperature in zip(thermals, options.temperatures, strict=True):
        found["slack_kappa"] = slack(
            gamma,
            debye,
            mass=float(np.mean(primitive.masses)),
            volume=primitive.volume / len(primitive),
            atoms=len(primitive),
            temperature=temperature,
        )
    return {"gruneisen": gamma, "debye": debye}


def _expand(
    solved: Solved, view: View, options: Options, thermals: list[dict[str, Value]]
) -> list[str]:
    """Adds what the quasi-harmonic approximation says; returns what it cannot say, and why."""
    if view.lowest < -options.tolerance:
        return ["no thermal expansion: there are imaginary modes"]
    every = [solved.at[v] for v in options.qha_volumes]
    flags = []
    for found, temperature in zip(thermals, options.temperatures, strict=True):
        result = expansion(
            [one.phonons for one in every],
            [one.energy for one in every],
            solved.ground.zone.mesh,
            temperature,
        )
        if result is None:
            flags.append(f"no thermal expansion: F(V) has no minimum at {temperature:g} K")
        else:
            found |= {
                "expansion": result.volumetric,
                "volume": result.volume,
                "bulk_modulus": result.bulk_modulus,
            }
    return flags


def _summary(model: str, rows: Sequence[Row], reference: str) -> Row:
    """Means over crystals, and how well imaginary modes are foreseen."""
    truth = {
        row.subject: not row.values["stable"]
        for row in rows
        if row.model == reference and "stable" in row.values
    }
    own = [row for row in rows if row.model == model and "stable" in row.values]
    values: dict[str, Value] = {"crystals": len(own)}
    for column in AVERAGED:
        found = [abs(float(v)) for row in own if (v := row.values.get(column)) is not None]
        if found:
            values[column] = float(np.mean(found))
    pairs = [(not row.values["stable"], truth[row.subject]) for row in own if row.subject in truth]
    hits = sum(said and true for said, true in pairs)
    said, true = sum(said for said, _ in pairs), sum(true for _, true in pairs)
    values["imaginary_precision"] = hits / said if said else None
    values["imaginary_recall"] = hits / true if true else None
    return Row(model, ALL, values)


def tables(finding: Finding) -> list[Finding]:
    """For a terminal: the columns in groups."""
    return grouped(finding, GROUPS)


def _notes(rows: Sequence[Row], crystals: Sequence[Crystal]) -> tuple[str, ...]:
    notes = ["thermal quantities are per mole of primitive cells; negative ω are imaginary"]
    bare = [c.name for c in crystals if c.nac is None and len(set(c.cell.symbols)) > 1]
    if bare:
        notes.append(
            f"no Born charges are known of {', '.join(bare)}: no non-analytic correction there, so "
            "optical modes do not split at Γ"
        )
    soft = sorted({row.subject for row in rows if row.values.get("stable") is False})
    if soft:
        notes.append(
            f"imaginary modes, as in {', '.join(soft)}, have no part in C_V, S and F: there they "
            "mean little"
        )
    return tuple(notes)
