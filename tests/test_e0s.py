"""Isolated-atom energies: estimated, averaged, and what each choice starts from."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from rich.console import Console

from jaxft import surgery
from jaxft.data import ISOLATED_ATOM, Frame
from jaxft.e0s import (
    Undetermined,
    average,
    correct,
    energies_of,
    estimate,
    explain,
    undetermined,
)
from jaxft.evaluate.errors import errors
from jaxft.evaluate.predictions import predict_energies, predict_frames
from jaxft.potential import Potential
from jaxft.preflight import Choice, Preflight, _best, preflight


def moved(frames: list[Frame], shift: dict[int, float]) -> list[Frame]:
    """The frames at a level of theory whose atoms are ``shift`` eV away."""
    return [
        replace(f, energy=f.energy + sum(shift.get(int(z), 0.0) for z in f.atomic_numbers))
        for f in frames
    ]


def test_a_shift_of_the_atoms_is_found_exactly(
    model: Potential, params: dict, frames: list[Frame]
) -> None:
    shift = {1: -2.5, 6: 1000.0, 8: -30.0, 11: 4.0, 17: -7.0}
    before, after = (estimate(model, params, f) for f in (frames, moved(frames, shift)))
    assert before.rank == 4  # NaCl always holds as much Na as Cl
    for z in (1, 6, 8):
        assert after.e0s[z] - before.e0s[z] == pytest.approx(shift[z], abs=1e-8)
    pair = sum(after.e0s[z] - before.e0s[z] for z in (11, 17))
    assert pair == pytest.approx(shift[11] + shift[17], abs=1e-8)
    assert after.residual == pytest.approx(before.residual, abs=1e-8)
    assert "rank 4 of 5" in explain(after)
    assert "only sums are determined" in explain(after)


def test_one_molecule_gets_the_smallest_change(
    model: Potential, params: dict, frames: list[Frame]
) -> None:
    water = [frames[0]]
    found = estimate(surgery.set_e0s(model, {1: 0.0, 8: 0.0}), params, water)
    # Minimum norm: the change is proportional to the composition, H2O.
    assert found.rank == 1
    assert found.e0s[1] == pytest.approx(2 * found.e0s[8], rel=1e-9)
    assert found.residual < 1e-9


def test_frames_without_energy_say_nothing(
    model: Potential, params: dict, frames: list[Frame]
) -> None:
    silent = replace(frames[1], energy=None)
    both, one = (estimate(model, params, f) for f in ([frames[0], silent], [frames[0]]))
    assert both.e0s == one.e0s
    with pytest.raises(ValueError, match="no frame has an energy"):
        estimate(model, params, [silent])


# --- what is not determined -----------------------------------------------------------------------


def test_what_no_frame_tells_apart_is_named_with_what_is_known_of_it(
    model: Potential, params: dict, frames: list[Frame]
) -> None:
    found = estimate(model, params, frames)
    assert found.undetermined == (Undetermined((11, 17), ({11: 1, 17: 1},)),)
    assert "of Na and Cl only Na + Cl." in explain(found)
    alone = estimate(model, params, [frames[0]])
    assert alone.undetermined == (Undetermined((1, 8), ({1: 2, 8: 1},)),)
    assert "of H and O only 2 H + O." in explain(alone)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[2, 0, 1], [0, 1, 1], [1, 1, 1]], ()),
        ([[6, 2, 1], [12, 4, 2]], (((1, 6, 8), ({1: 6, 6: 2, 8: 1},)),)),
        # Methane and carbon monoxide: H and O follow from C.
        ([[4, 1, 0], [0, 1, 1]], (((1, 6, 8), ({1: 4, 8: -1}, {6: 1, 8: 1})),)),
        ([[1, 1, 1], [1, 2, 0]], (((1, 6, 8), ({1: 1, 8: 2}, {6: 1, 8: -1})),)),
        ([[1, 1, 0], [2, 2, 0], [0, 0, 5]], (((1, 6), ({1: 1, 6: 1},)),)),
        ([[50_000, 0, 1], [0, 3, 0]], (((1, 8), ({1: 50_000, 8: 1},)),)),
    ],
)
def test_the_known_sums_are_exact(counts: list, expected: tuple) -> None:
    got = undetermined((1, 6, 8), np.array(counts))
    assert got == tuple(Undetermined(*group) for group in expected)


def test_two_pairs_are_two_groups() -> None:
    salts = [[1, 1, 0, 0], [0, 0, 2, 1], [3, 3, 2, 1]]
    found = undetermined((11, 17, 20, 35), np.array(salts))
    assert [group.elements for group in found] == [(11, 17), (20, 35)]
    assert found[1].sums == ({20: 2, 35: 1},)


def test_known_sums_do_not_depend_on_where_one_starts(
    model: Potential, params: dict, frames: list[Frame]
) -> None:
    """Other E0s of the model change single ones of the salt; no sum, and not the residual."""
    found = estimate(model, params, frames)
    shifted = surgery.set_e0s(model, {11: 123.0, 17: -45.0})
    again = estimate(shifted, params, frames)
    assert abs(again.e0s[11] - found.e0s[11]) > 1.0
    assert again.residual == pytest.approx(found.residual, abs=1e-9)
    for z in (1, 6, 8):
        assert again.e0s[z] == pytest.approx(found.e0s[z], abs=1e-8)
    pair = found.e0s[11] + found.e0s[17]
    assert again.e0s[11] + again.e0s[17] == pytest.approx(pair, abs=1e-8)


# --- weights, averages ----------------------------------------------------------------------------


def test_weighting_per_atom_minimises_the_error_per_atom(
    model: Potential, params: dict, frames: list[Frame]
) -> None:
    total = estimate(model, params, frames)
    each = estimate(model, params, frames, weighting="per_atom")
    assert each.residual < total.residual
    large = [f for f in frames if len(f) == max(map(len, frames))]
    assert estimate(model, params, large, weighting="per_atom").e0s == pytest.approx(
        estimate(model, params, large).e0s, abs=1e-8
    )
    with pytest.raises(ValueError, match="weighting='atoms' is unknown"):
        estimate(model, params, frames, weighting="atoms")  # type: ignore[arg-type]


def gas(*formulas: str, values: dict[int, float], cohesion: float = 0.0) -> list[Frame]:
    """Frames whose energy is the sum of ``values``, less ``cohesion`` eV per atom."""
    numbers = [Atoms(formula).numbers for formula in formulas]
    return [
        Frame(
            n,
            np.zeros((len(n), 3)),
            np.zeros((3, 3)),
            (False,) * 3,
            energy=sum(values[int(z)] for z in n) - cohesion * len(n),
        )
        for n in numbers
    ]


def test_an_average_finds_the_atoms_and_swallows_the_cohesion() -> None:
    values = {1: -13.6, 6: -1030.0, 8: -2040.0}
    free = average(gas("H2O", "CH4", "CO2", "C2H6O", values=values))
    assert free.e0s == pytest.approx(values, abs=1e-9)
    bound = average(gas("H2O", "CH4", "CO2", "C2H6O", values=values, cohesion=3.0))
    assert bound.e0s == pytest.approx({z: e - 3.0 for z, e in values.items()}, abs=1e-9)
    assert (bound.rank, bound.undetermined) == (3, ())
    assert "averaged E0s hold the cohesive energy" in explain(bound)
    with pytest.raises(ValueError, match="no frame has an energy"):
        average([])


def test_energies_that_are_not_finite_are_refused() -> None:
    given = energies_of(gas("H2O", "H2", values={1: -1.0, 8: -2.0}))
    with pytest.raises(ValueError, match="of 1 of 2 frames are not finite"):
        correct(given, [0.0, np.nan], {1: 0.0, 8: 0.0})


# --- before training ------------------------------------------------------------------------------


def isolated(model: Potential, shift: dict[int, float]) -> list[Frame]:
    own = dict(zip(model.atomic_numbers, model.e0s[0].tolist(), strict=True))
    return [
        Frame(
            np.array([z]),
            np.zeros((1, 3)),
            np.zeros((3, 3)),
            (False,) * 3,
            energy=own[z] + shift[z],
            config_type=ISOLATED_ATOM,
        )
        for z in own
    ]


SHIFT = {1: -2.5, 6: 1000.0, 8: -30.0, 11: 4.0, 17: -7.0}


@pytest.fixture(scope="module")
def report(model: Potential, params: dict, frames: list[Frame]) -> Preflight:
    """Data of another level of theory, with its isolated atoms."""
    data = moved(frames, SHIFT) + isolated(model, SHIFT)
    own = dict(zip(model.atomic_numbers, model.e0s[0].tolist(), strict=True))
    given = {z: own[z] + SHIFT[z] + 0.01 for z in SHIFT}
    return preflight(model, params, data, given=given)


def test_each_choice_starts_with_the_error_of_the_model_with_those_e0s(
    report: Preflight, model: Potential, params: dict, frames: list[Frame]
) -> None:
    """Against a model that really has them."""
    given = moved(frames, SHIFT)
    assert report.frames == len(frames)
    for choice in (report["isolated_atoms"], report["average"]):
        changed = surgery.set_e0s(model, choice.e0s)
        results = predict_frames(changed, params, given)
        found = errors(given, results).total
        assert 1e3 * choice.rmse == pytest.approx(found.rmse()["energy"], rel=1e-7)
        each = [abs(r.energy - f.energy) / len(f) for f, r in zip(given, results, strict=True)]
        assert choice.mae == pytest.approx(np.mean(each), rel=1e-7)
        assert choice.worst == pytest.approx(max(each), rel=1e-7)
        assert choice.worst_frame == given[int(np.argmax(each))].source


def test_the_foundations_e0s_are_warned_of_and_isolated_atoms_recommended(
    report: Preflight,
) -> None:
    assert [c.name for c in report.choices] == [
        "foundation",
        "isolated_atoms",
        "given",
        "estimated",
        "average",
    ]
    assert report.recommendation == "isolated_atoms"
    assert report["foundation"].rmse > 100
    assert report["isolated_atoms"].rmse < 0.5
    warned = [line.split(":")[0] for line in report.warnings]
    assert warned == [c.name for c in report.choices if c.rmse > 0.5]
    assert "meV/atom off, more than 500" in report.warnings[0]
    # A shift of 10 meV of each atom is one of 10 meV/atom, if all errors have one sign.
    difference = abs(report["given"].rmse - report["isolated_atoms"].rmse)
    assert 0 < difference <= 0.01 + 1e-9


def test_a_preflight_is_read_by_people_and_programs(report: Preflight) -> None:
    again = json.loads(json.dumps(report.to_dict()))
    assert again["recommendation"] == "isolated_atoms"
    assert again["choices"]["estimated"]["e0s"].keys() == {"H", "C", "O", "Na", "Cl"}
    assert again["choices"]["estimated"]["rmse"] == 1e3 * report["estimated"].rmse
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.render())
    text = console.export_text()
    for expected in (
        "recommended",
        "never recommended",
        "only Na + Cl",
        "warning: foundation",
        "?",
    ):
        assert expected in text
    (row,) = [line for line in text.splitlines() if line.startswith("│ Na ")]
    assert row.count("?") == 2


def test_without_all_isolated_atoms_the_estimate_is_recommended(
    model: Potential, params: dict, frames: list[Frame]
) -> None:
    data = moved(frames, SHIFT)
    found = preflight(model, params, data + isolated(model, SHIFT)[:2])
    assert found.recommendation == "estimated"
    assert found.missing["isolated_atoms"].startswith("O, Na, Cl not among")
    assert "no frame is marked" in preflight(model, params, data).missing["isolated_atoms"]


def test_data_of_the_models_own_level_keep_its_e0s(
    model: Potential, params: dict, frames: list[Frame]
) -> None:
    """Labels of the model, with noise of 1 meV/atom: an estimate can only fit the noise."""
    rng = np.random.default_rng(0)
    results = predict_frames(model, params, frames)
    noisy = [
        replace(f, energy=r.energy + 1e-3 * len(f) * noise)
        for f, r, noise in zip(frames, results, rng.normal(size=len(frames)), strict=True)
    ]
    many = [
        replace(f, energy=f.energy + 1e-3 * len(f) * e) for f in noisy for e in rng.normal(size=20)
    ]
    assert preflight(model, params, many).recommendation == "foundation"


def test_an_average_is_never_recommended() -> None:
    def choice(name: str, rmse: float) -> Choice:
        return Choice(name, {1: 0.0}, rmse, rmse, rmse, "frame 0")

    errors = {"foundation": 9.0, "estimated": 0.7, "average": 0.1}
    assert _best([choice(*item) for item in errors.items()]) == "estimated"
    errors |= {"isolated_atoms": 0.9, "given": 0.4}
    assert _best([choice(*item) for item in errors.items()]) == "given"


def test_preflight_evaluates_the_model_once(
    model: Potential, params: dict, frames: list[Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counting(*args, **options):
        calls.append(1)
        return predict_energies(*args, **options)

    monkeypatch.setattr("jaxft.preflight.predict_energies", counting)
    monkeypatch.setattr("jaxft.e0s.predict_energies", counting)
    preflight(model, params, frames)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({1: -13.6, 8: -2040.0}, "hold no finite number for C, Na, Cl"),
        ({z: np.nan if z == 8 else 0.0 for z in SHIFT}, "hold no finite number for O"),
    ],
)
def test_given_numbers_that_do_not_suffice_are_refused(
    given: dict, message: str, model: Potential, params: dict, frames: list[Frame]
) -> None:
    with pytest.raises(ValueError, match=message):
        preflight(model, params, frames, given=given)


@pytest.mark.parametrize("weighting", ["total", "per_atom"])
def test_weight_two_is_the_frame_twice_and_zero_is_none(
    frames: list[Frame], weighting: str
) -> None:
    # a crystal: each molecule has a composition of its own, which any weight fits exactly
    heavy = [*frames[:-1], replace(frames[-1], weight=2.0)]
    spoilt = [*frames, replace(frames[1], energy=frames[1].energy + 100.0, energy_weight=0.0)]
    for given, same in ((heavy, [*frames, frames[-1]]), (spoilt, frames)):
        a, b = (average(f, weighting=weighting) for f in (given, same))
        assert a.residual == pytest.approx(b.residual, rel=1e-9)
        for z in a.e0s:
            assert a.e0s[z] == pytest.approx(b.e0s[z], abs=1e-8)
