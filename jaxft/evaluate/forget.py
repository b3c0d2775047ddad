r"""What fine-tuning forgot: errors on data of the base's domain before and after.

.. math:: \rho_F = \frac{\mathrm{RMSE}_F(\theta; T)}{\mathrm{RMSE}_F(\theta^\ast; T)}

on the same frames T, likewise for energy per atom and stress; 1 forgot nothing. The drift is the
RMSE between the predictions of the two models and needs no labels. The weight distance is
:math:`\lVert\theta-\theta^\ast\rVert_2/\lVert\theta^\ast\rVert_2` per group of parameters.

Reference: the ratio as in arXiv:2606.12704.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from jaxft import tree
from jaxft.changes import changes
from jaxft.data import Frame
from jaxft.evaluate.accuracy import joined, left_out, missing, outcomes_of, sound_pairs, values_of
from jaxft.evaluate.candidate import Candidate, Flag, JaxCandidate, Outcome, check_names
from jaxft.evaluate.errors import TOTAL, GroupErrors, errors
from jaxft.evaluate.finding import Finding, Line, Picture, Row, Value, scatter
from jaxft.surgery import set_e0s

QUANTITIES = {"energy": "meV/atom", "forces": "meV/Å", "stress": "meV/Å³"}
UNITS = {
    "frames": "",
    **{f"{q}_rmse": unit for q, unit in QUANTITIES.items()},
    **{f"{q}_ratio": "" for q in QUANTITIES},
    **{f"{q}_drift": unit for q, unit in QUANTITIES.items()},
    "weight_distance": "",
    "numbers": "",
}
PARAMETERS = "parameters "
"""Subjects that begin so are groups of parameters."""

NOTES = (
    "ratio: RMSE over that of the base on the same frames; 1 forgot nothing. drift: RMSE between "
    "the predictions of model and base, without labels. weight distance: ‖θ − θ*‖/‖θ*‖.",
)


def check(
    base: Candidate,
    tuned: Sequence[Candidate],
    frames: Sequence[Frame],
    *,
    heads: str = "",
    own_e0s: bool = False,
) -> Finding:
    """Errors, forgetting ratios, drift and weight distances, by config_type and in total.

    Model and base are compared on the frames that both can compute; what either cannot is counted
    in the flag of ``total``.

    Args:
      base: before.
      tuned: after, by several recipes say.
      frames: of the base's domain; labels may be missing, then only the drift is told.
      heads: in words, which were judged; for the reader.
      own_e0s: keep the isolated-atom energies of tuned models. By default potentials of ours are
        judged with those of ``base``: another level of theory's are no forgetting.

    Raises:
      ValueError: names occur twice, or there are no frames or no tuned models.
    """
    check_names([base, *tuned])
    if not tuned or not frames:
        raise ValueError("nothing to compare; give a base, at least one tuned model, and frames.")
    before = outcomes_of(base, frames)
    rows = _rows(base, base, frames, before, before)
    drifts = []
    judged = [model if own_e0s else with_e0s_of(base, model) for model in tuned]
    changed = [new.name for new, given in zip(judged, tuned, strict=True) if new is not given]
    for model in judged:
        after = outcomes_of(model, frames)
        rows += _rows(base, model, frames, before, after)
        drifts.append(_drift_line(model.name, before, after))
    pictures = (
        Picture(
            "drift of the base's own predictions",
            f"force of {base.name}, eV/Å",
            "change of the force, eV/Å",
            tuple(drifts),
        ),
    )
    settings = {"base": base.name, "frames": len(frames), "own_e0s": own_e0s}
    settings |= {"heads": heads} if heads else {}
    told = (f"{', '.join(changed)}: energies with the isolated-atom energies of {base.name}.",)
    return Finding("forget", tuple(rows), UNITS, settings, pictures, NOTES + told * bool(changed))


def with_e0s_of(base: Candidate, model: Candidate) -> Candidate:
    """``model`` with the isolated-atom energies of ``base``, of the elements that both know.

    The same object if nothing changes, or if either is no potential of ours.
    """
    if not isinstance(base, JaxCandidate) or not isinstance(model, JaxCandidate):
        return model
    old, new = (_e0s(candidate) for candidate in (base, model))
    differing = {z: e0 for z, e0 in old.items() if new.get(z, e0) != e0}
    if not differing:
        return model
    return replace(model, model=set_e0s(model.model, differing, head=model.head))


def _e0s(candidate: JaxCandidate) -> dict[int, float]:
    model = candidate.model
    row = np.asarray(model.e0s[model.head_index(candidate.head)], np.float64)
    return dict(zip(model.atomic_numbers, row.tolist(), strict=True))


def _rows(
    base: Candidate,
    model: Candidate,
    frames: Sequence[Frame],
    before: Sequence[Outcome],
    after: Sequence[Outcome],
) -> list[Row]:
    both = [b if isinstance(b, Flag) else a for b, a in zip(before, after, strict=True)]
    chosen = [i for i, outcome in enumerate(both) if not isinstance(outcome, Flag)]
    flag = left_out(frames, both)
    names = list(dict.fromkeys(frames[i].config_type for i in chosen))
    groups = [(n, [i for i in chosen if frames[i].config_type == n]) for n in names]
    groups = (groups if len(groups) > 1 else []) + ([(TOTAL, chosen)] if chosen else [])
    is_base = model is base
    rows = []
    for group, members in groups:
        some = [frames[i] for i in members]
        old, new = ([side[i] for i in members] for side in (before, after))
        values = _values(some, old, new, with_ratios=not is_base)
        told = joined(flag, missing(some)) if group == TOTAL else None
        rows.append(Row(model.name, group, values, told))
    if not chosen:
        rows.append(Row(model.name, TOTAL, {"frames": 0}, flag))
    return rows if is_base else rows + _distances(base, model)


def _values(
    frames: Sequence[Frame], old: Sequence[Outcome], new: Sequence[Outcome], *, with_ratios: bool
) -> dict[str, Value]:
    before, after = (_total(frames, outcomes) for outcomes in (old, new))
    told = values_of(after)
    values: dict[str, Value] = {"frames": after.frames}
    values |= {f"{q}_rmse": told[f"{q}_rmse"] for q in QUANTITIES}
    if not with_ratios:
        return values
    values |= {f"{q}_ratio": _ratio(after.rmse()[q], before.rmse()[q]) for q in QUANTITIES}
    drift = _total([_labelled(f, r) for f, r in sound_pairs(frames, old)], new).rmse()
    return values | {f"{q}_drift": drift[q] for q in QUANTITIES}


def _total(frames: Sequence[Frame], outcomes: Sequence[Outcome]) -> GroupErrors:
    return errors(*zip(*sound_pairs(frames, outcomes), strict=True)).total


def _labelled(frame: Frame, result: Outcome) -> Frame:
    """The frame with a model's predictions in the place of labels."""
    assert not isinstance(result, Flag)
    return replace(frame, energy=result.energy, forces=result.forces, stress=result.stress)


def _ratio(after: float | None, before: float | None) -> float | None:
    return None if after is None or not before else after / before


def _drift_line(name: str, before: Sequence[Outcome], after: Sequence[Outcome]) -> Line:
    pairs = [
        (b.forces.ravel(), a.forces.ravel())
        for b, a in zip(before, after, strict=True)
        if not isinstance(b, Flag) and not isinstance(a, Flag)
    ]
    old, new = (np.concatenate([np.zeros(0), *(p[k] for p in pairs)]) for k in (0, 1))
    return scatter(name, old, new - old)


def _distances(base: Candidate, model: Candidate) -> list[Row]:
    """Per group of parameters; leaves of other shapes, as of an added head, are flagged."""
    if not isinstance(base, JaxCandidate) or not isinstance(model, JaxCandidate):
        unknown = "parameters are known of potentials of ours alone"
        return [Row(model.name, PARAMETERS + TOTAL, {}, unknown)]
    old, new = _shared(base.params, model.params)
    lost = len(tree.flatten(model.params)) - len(new)
    reason = f"{lost} leaves have other names or shapes than in {base.name}" if lost else None
    if not old:
        return [Row(model.name, PARAMETERS + TOTAL, {}, reason)]
    found = changes(tree.unflatten(old), tree.unflatten(new))
    return [
        Row(
            model.name,
            PARAMETERS + change.name,
            {"weight_distance": change.relative, "numbers": change.numbers},
            reason if change is found.total else None,
        )
        for change in (*found.groups, found.total)
    ]


def _shared(old: Mapping, new: Mapping) -> tuple[dict, dict]:
    a, b = tree.flatten(old), tree.flatten(new)
    common = [path for path in a if path in b and a[path].shape == b[path].shape]
    return {path: a[path] for path in common}, {path: b[path] for path in common}
