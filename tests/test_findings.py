"""What every check stands on: candidates, findings, pictures and their page; errors of several."""

import io
import json
import math
import re
from dataclasses import replace

import ase
import ase.build
import ase.io
import jax
import numpy as np
import pytest
import typer
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from rich.console import Console
from typer.testing import CliRunner

import jaxft
from jaxft import surgery
from jaxft.cli import app
from jaxft.cli.candidates import show
from jaxft.data import from_atoms
from jaxft.evaluate import accuracy, forget, softening
from jaxft.evaluate.bindings import Headline
from jaxft.evaluate.candidate import NOT_FINITE, AseCandidate, Flag, JaxCandidate, check_names
from jaxft.evaluate.drawing import _in_scale, picture_svg
from jaxft.evaluate.finding import Finding, Line, Picture, Row, from_dict, scatter, shown_value
from jaxft.evaluate.layout import fitted
from jaxft.report.findings import findings_page


class Scaled(Calculator):
    """EMT with forces times a factor; NaN for gold."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, factor=1.0, offset=0.0):
        super().__init__()
        self.factor, self.offset = factor, offset

    def calculate(self, atoms=None, properties=(), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        copy = atoms.copy()
        copy.calc = EMT()
        forces = self.factor * copy.get_forces() + self.offset
        if "Au" in atoms.symbols:
            forces[0] = np.nan
        self.results = {
            "energy": self.factor * copy.get_potential_energy(),
            "forces": forces,
            "stress": self.factor * copy.get_stress(),
        }


def candidate(name, *arguments):
    return AseCandidate(name, Scaled(*arguments))


def labelled(symbol, count, *, seed=0, config_type="Default", amplitude=0.05, first=None):
    found = []
    for i in range(count):
        atoms = ase.build.bulk(symbol, cubic=True)
        atoms.symbols[0] = first or symbol
        atoms.rattle(amplitude, seed=seed + i)
        (result,) = candidate("truth").evaluate([atoms])
        found.append(
            replace(
                from_atoms(atoms, source=f"{symbol}:{i}"),
                energy=result.energy,
                forces=result.forces,
                stress=result.stress,
                config_type=config_type,
            )
        )
    return found


# candidates


def test_flags_stand_in_the_place_of_their_structures():
    gold, copper = ase.build.bulk("Au", cubic=True), ase.build.bulk("Cu", cubic=True)
    steps = []
    found = candidate("a").evaluate(
        [copper, gold, ase.Atoms("Xe"), copper], lambda *state: steps.append(state)
    )
    assert [isinstance(outcome, Flag) for outcome in found] == [False, True, True, False]
    assert found[1].reason == NOT_FINITE
    assert "EMT" in found[2].reason or "Xe" in found[2].reason
    assert found[0].energy == found[3].energy
    assert steps[-1] == (4, 4)


class Failing(Scaled):
    """With a stress, forces or per-atom energies of its own."""

    def __init__(self, error=None, forces=None):
        super().__init__()
        self.error, self.forces = error, forces

    def get_stress(self, atoms=None):
        raise self.error

    def get_forces(self, atoms=None):
        return super().get_forces(atoms) if self.forces is None else self.forces


@pytest.mark.parametrize(
    ("calculator", "reason"),
    [
        (Failing(RuntimeError("no stress\ntoday")), "RuntimeError: no stress"),
        (Failing(RuntimeError()), "RuntimeError"),
        (Failing(forces=np.zeros((2, 3))), "forces of shape (2, 3) for 4 atoms"),
    ],
)
def test_whatever_a_calculator_raises_or_returns_is_its_structures_flag(calculator, reason):
    (found,) = AseCandidate("a", calculator).evaluate([ase.build.bulk("Cu", cubic=True)])
    assert found == Flag(reason)


def test_a_calculator_without_stress_and_fixed_atoms_gives_all_its_forces():
    free = ase.build.bulk("Cu", cubic=True)
    free.rattle(0.1, seed=0)
    fixed = free.copy()
    fixed.set_constraint(FixAtoms([0, 1]))
    model = AseCandidate("a", Failing(NotImplementedError("no stress")))
    one, other = model.evaluate([free, fixed])
    assert one.stress is None
    np.testing.assert_array_equal(one.forces, other.forces)
    assert abs(other.forces[0]).max() > 0.01


def test_a_potential_of_ours_flags_what_it_cannot_compute_and_goes_on(small):
    ours = JaxCandidate("ours", *small)
    water, silane = ase.build.molecule("H2O"), ase.build.molecule("SiH4")
    on_top = ase.Atoms("H2", [[0, 0, 0], [0, 0, 0]])
    found = ours.evaluate([silane, water, on_top, water])
    assert isinstance(found[0], Flag)
    assert "Si" in found[0].reason
    assert isinstance(found[2], Flag)
    np.testing.assert_allclose(found[1].forces, found[3].forces, atol=1e-12)
    nan = jax.tree.map(lambda leaf: leaf * np.nan, small[1])
    broken = replace(ours, params=nan).evaluate([silane, water, on_top, water])
    assert broken[1] == broken[3] == Flag(NOT_FINITE)
    assert "Si" in broken[0].reason


def test_names_must_differ():
    with pytest.raises(ValueError, match="several models are called 'a'"):
        check_names([candidate("a"), candidate("b"), candidate("a")])
    with pytest.raises(ValueError, match="at least one"):
        check_names([])


# findings


@pytest.fixture
def finding():
    rows = (
        Row("<b>a</b>", "x & y", {"size": 1.5, "count": 3, "good": True, "word": "Fm-3m"}),
        Row("b", "x", {"size": float("nan"), "count": np.int64(2)}, "it <exploded>"),
        Row("b", "z", {}, None),
    )
    units = {"size": "Å", "count": "", "good": "", "word": "", "never": "eV"}
    lines = (
        Line("_a $b$", [0.0, 1.0, 2.0], [1.0, np.nan, 3.0]),
        Line("b", np.arange(3), np.arange(3), is_scatter=True),
        Line("", [0, 2], [0, 2], is_reference=True),
    )
    picture = Picture("<i>sizes</i>", "x, Å", "y, eV", lines, ticks={"Γ": 0.0}, diagonal=True)
    settings = {"limits": np.array([1.0, np.inf]), "span": (1, 2)}
    return Finding("toy", rows, units, settings, (picture, picture), ("a note",))


def test_json_has_no_numbers_that_are_none(finding):
    document = json.loads(json.dumps(finding.to_dict(), allow_nan=False))
    assert document["rows"][1]["size"] is None
    assert document["rows"][1]["flag"] == "it <exploded>"
    assert document["settings"] == {"limits": [1.0, None], "span": [1, 2]}
    again = from_dict(document)
    assert again.to_dict() == document
    assert again.rows[0].values["good"] is True
    with pytest.raises(ValueError, match="no result of jaxft evaluate"):
        from_dict({"rows": []})
    with pytest.raises(TypeError, match="no place in JSON"):
        Finding("toy", (), {}, {"x": object()}).to_dict()


def test_columns_need_units(finding):
    with pytest.raises(ValueError, match=r"\['weight'\] of toy have no unit"):
        replace(finding, rows=(Row("a", "x", {"weight": 1.0}),))


def test_flags_and_means(finding):
    assert [row.flag for row in finding.flags] == ["it <exploded>"]
    assert finding.mean("b", "size") is None
    assert finding.mean("b", "never") is None
    assert finding.mean("<b>a</b>", "size") == 1.5
    assert shown_value(None) == "–"
    assert shown_value(True) == "yes"
    assert shown_value(12345.678) == "1.235e+04"


def test_tables_leave_out_columns_without_values(finding):
    headings = [str(column.header) for column in finding.render().columns]
    assert headings == ["model", "subject", "size\nÅ", "count", "good", "word"]
    console = Console(width=200, file=io.StringIO())
    for part in fitted(finding, console):
        console.print(part)
    assert console.file.getvalue().rstrip().endswith("! b, x: it <exploded>")
    heading, first, *_ = finding.csv_rows()
    assert heading[:4] == ["check", "model", "subject", "size [Å]"]
    assert first[3:] == ["1.5", "3", "True", "Fm-3m", "", ""]


def test_the_page_escapes_names_and_its_ids_are_unique(finding):
    page = findings_page("all of <it>", [finding, replace(finding, check="other")])
    assert "<b>a</b>" not in page
    assert "&lt;b&gt;a&lt;/b&gt;" in page
    assert "<i>sizes" not in page
    assert "it <exploded>" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert page.count("<svg") == 4
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {a or b for a, b in used} <= set(ids)
    assert "<script" not in page


@pytest.mark.parametrize("times", [3, 9])
def test_of_many_forces_all_components_are_drawn(times):
    number = np.arange(2000 * times)
    drawn = scatter("a", number, -number)
    assert len(drawn.x) == len(set(drawn.x)) == 2000
    assert set(np.unique(drawn.x % 3)) == {0, 1, 2}
    np.testing.assert_array_equal(drawn.y, -np.asarray(drawn.x))
    assert len(scatter("a", number[:5], number[:5]).x) == 5


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_model_that_exploded_does_not_hide_the_others(diagonal):
    sound, boom = Line("sound", [-1.0, 2.0], [-1.1, 2.1]), Line("boom", [-1.0, 2.0], [0.5, 1e130])
    drawn = _in_scale(Picture("p", "x", "y", (sound, boom), diagonal=diagonal))
    assert drawn.lines[0].label == "sound"
    assert np.isfinite(drawn.lines[0].y).all()
    assert "beyond" in drawn.lines[1].label
    np.testing.assert_array_equal(drawn.lines[1].y, [0.5, np.nan])
    alone = Picture("p", "x", "y", (replace(boom, x=[1.0], y=[1e130]),))
    assert _in_scale(alone) is alone


def test_a_picture_without_points_is_none():
    empty = Picture("t", "x", "y", (Line("a", [1.0], [np.nan]),))
    assert picture_svg(empty, ids="p") == ""
    assert picture_svg(Picture("t", "x", "y", ()), ids="p") == ""


# errors of several models


def test_errors_of_several_models_are_those_of_each():
    frames = labelled("Cu", 2, config_type="cu") + labelled("Al", 1, config_type="al")
    found = accuracy.check([candidate("exact"), candidate("soft", 0.9)], frames)
    assert {row.values["forces_rmse"] for row in found.of("exact")} == {0.0}
    soft = {row.subject: row.values for row in found.of("soft")}
    assert list(soft) == ["cu", "al", "total", "element Al", "element Cu"]
    forces = np.concatenate([f.forces.ravel() for f in frames])
    assert soft["total"]["forces_rmse"] == pytest.approx(100 * np.sqrt((forces**2).mean()))
    assert soft["total"]["forces_cosine"] == pytest.approx(1.0)
    assert soft["element Al"]["forces_rmse"] == pytest.approx(soft["al"]["forces_rmse"])
    assert "energy_rmse" not in {k for k, v in soft["element Al"].items() if v is not None}
    assert {p.title for p in found.pictures} == {"energy", "forces", "stress"}


def test_errors_are_what_a_plain_loop_says():
    """Every column, in its unit, from known noise on the labels."""
    rng = np.random.default_rng(0)
    frames = labelled("Cu", 3, first="Al")
    noisy = [
        replace(
            f,
            energy=f.energy + rng.normal(),
            forces=f.forces + rng.normal(size=f.forces.shape),
            stress=f.stress + rng.normal(size=(3, 3)),
        )
        for f in frames
    ]
    found = accuracy.check([candidate("exact")], noisy)
    rows = {r["subject"]: r for r in found.to_dict()["rows"]}
    total = rows["total"]
    pairs = list(zip(frames, noisy, strict=True))
    wrong = {
        "energy": [(f.energy - n.energy) / len(f) for f, n in pairs],
        "forces": [f.forces - n.forces for f, n in pairs],
        "stress": [f.stress - n.stress for f, n in pairs],
    }
    for name, differences in wrong.items():
        assert total[f"{name}_mae"] == pytest.approx(1e3 * np.abs(differences).mean())
        assert total[f"{name}_rmse"] == pytest.approx(1e3 * np.sqrt(np.square(differences).mean()))
    assert total["stress_rmse_gpa"] == pytest.approx(total["stress_rmse"] * 0.1602176634)
    aluminium = np.array([difference[0] for difference in wrong["forces"]])  # the first atom
    for name, own in (("mae", abs(aluminium).mean()), ("rmse", np.sqrt((aluminium**2).mean()))):
        assert rows["element Al"][f"forces_{name}"] == pytest.approx(1e3 * own)
    assert rows["element Al"]["atoms"] == 3
    assert rows["element Cu"]["atoms"] == 9
    lengths = np.linalg.norm(np.concatenate(wrong["forces"]), axis=1)
    assert total["forces_p95"] == pytest.approx(1e3 * np.quantile(lengths, 0.95))
    cosines = [
        a @ b / np.sqrt(a @ a * (b @ b))
        for f, n in pairs
        for a, b in zip(f.forces, n.forces, strict=True)
    ]
    assert total["forces_cosine"] == pytest.approx(np.mean(cosines))
    assert (total["frames"], total["atoms"]) == (3, 12)
    assert total["flag"] is None
    units = found.to_dict()["units"]
    assert units["energy_rmse"] == "meV/atom"
    assert units["forces_p95"] == "meV/Å"
    assert units["stress_mae"] == "meV/Å³"


def test_labels_that_frames_lack_are_told_and_the_rest_stays():
    full, bare = labelled("Cu", 1, config_type="full"), labelled("Cu", 3, config_type="bare")
    bare = [replace(bare[0], energy=None), replace(bare[1], forces=None, stress=None), bare[2]]
    rows = {r.subject: r for r in accuracy.check([candidate("a", 0.9)], full + bare).rows}
    told = "no energy on 1, no forces on 1, no stress on 1"
    assert rows["bare"].flag == f"labels: {told} of 3 frames"
    assert rows["total"].flag == f"labels: {told} of 4 frames"
    assert rows["full"].flag is None
    alone = accuracy.check([candidate("a", 0.9)], [*full, bare[2]])
    for name in ("energy", "forces", "stress"):
        assert rows["total"].values[f"{name}_rmse"] > 0
    assert all(row.flag is None for row in alone.rows)
    # a molecule has no stress to lack; what nobody has is said once
    molecule = [from_atoms(ase.build.molecule("H2O")), *labelled("Cu", 1)]
    assert accuracy.missing(molecule, ["stress"]) is None
    nowhere = [replace(f, stress=None) for f in [*full, bare[2]]]
    flags = {r.subject: r.flag for r in accuracy.check([candidate("a")], nowhere).rows}
    assert flags["total"] == "labels: no stress on 2 of 2 frames"
    assert flags["full"] is flags["bare"] is None


def test_a_model_without_stress_is_told():
    class NoStress(EMT):
        implemented_properties = ("energy", "forces")

        def get_property(self, name, *arguments, **options):
            if name == "stress":
                raise PropertyNotImplementedError
            return super().get_property(name, *arguments, **options)

    (total, _) = accuracy.check([AseCandidate("a", NoStress())], labelled("Cu", 2)).rows
    assert "no stress of 2 frames" in total.flag
    assert total.values["stress_rmse"] is None
    assert total.values["forces_rmse"] == pytest.approx(0.0, abs=1e-9)


def test_frames_that_a_model_cannot_compute_are_counted():
    frames = [*labelled("Cu", 2), from_atoms(ase.build.bulk("Au", cubic=True), source="gold:7")]
    (total,) = [r for r in accuracy.check([candidate("a")], frames).rows if r.subject == "total"]
    assert total.flag == f"1 of 3 frames left out, first gold:7: {NOT_FINITE}"
    assert total.values["frames"] == 2
    (lost,) = accuracy.check([candidate("a")], frames[2:]).rows
    assert lost.values["frames"] == 0
    assert "left out" in lost.flag


# forgetting


def test_ratios_and_drift_of_known_models():
    frames = labelled("Cu", 2)
    found = forget.check(candidate("base", 0.9), [candidate("worse", 0.7)], frames)
    base, worse, parameters = found.rows
    assert "forces_ratio" not in base.values
    for quantity in ("energy", "forces", "stress"):
        assert worse.values[f"{quantity}_ratio"] == pytest.approx(3.0)
        drift = 2 * base.values[f"{quantity}_rmse"]  # 0.2 instead of 0.1 of the labels
        assert worse.values[f"{quantity}_drift"] == pytest.approx(drift)
    assert "ours alone" in parameters.flag


def test_without_labels_there_is_a_drift_and_no_ratio():
    frames = [replace(f, energy=None, forces=None, stress=None) for f in labelled("Cu", 2)]
    row = forget.check(candidate("base"), [candidate("tuned", 0.7)], frames).rows[1]
    assert row.flag == "labels: no energy on 2, no forces on 2, no stress on 2 of 2 frames"
    assert row.values["forces_ratio"] is None
    assert row.values["forces_drift"] > 0


def test_weights_are_as_far_as_they_were_moved(small):
    model, params = small
    moved = {**params, "readouts_0": jax.tree.map(lambda x: 1.5 * x, params["readouts_0"])}
    base, tuned = JaxCandidate("base", model, params), JaxCandidate("tuned", model, moved)
    water = from_atoms(ase.build.molecule("H2O"))
    found = forget.check(base, [tuned], [water])
    rows = {row.subject: row for row in found.rows}
    assert rows["parameters readouts_0"].values["weight_distance"] == pytest.approx(0.5)
    assert rows["parameters interactions_0"].values["weight_distance"] == 0.0
    fewer = {k: v for k, v in moved.items() if k != "readouts_0"}
    cut = JaxCandidate("cut", model, {**fewer, "new": {"0e": moved["readouts_0"]}})
    total = forget._distances(base, cut)[-1]
    assert "other names or shapes" in total.flag


def test_isolated_atom_energies_of_another_level_are_no_forgetting(small):
    model, params = small
    other = surgery.set_e0s(model, {1: -50.0, 8: 7.0})
    base, tuned = JaxCandidate("base", model, params), JaxCandidate("tuned", other, params)
    water = from_atoms(ase.build.molecule("H2O"))
    found = forget.check(base, [tuned], [water])
    assert found.rows[1].values["energy_drift"] == pytest.approx(0.0, abs=1e-9)
    assert any("tuned: energies with the isolated-atom" in note for note in found.notes)
    own = forget.check(base, [tuned], [water], own_e0s=True)
    e0s = dict(zip(model.atomic_numbers, np.asarray(model.e0s[0]), strict=True))
    shift = abs(2 * (-50.0 - e0s[1]) + 7.0 - e0s[8]) / 3
    assert own.rows[1].values["energy_drift"] == pytest.approx(1e3 * shift)
    assert not any("isolated-atom" in note for note in own.notes)


# softening


def test_scaled_forces_have_their_factor_as_slope():
    frames = labelled("Cu", 2) + labelled("Al", 2, config_type="hot")
    found = softening.check([candidate("soft", 0.8)], frames)
    rows = {row.subject: row.values for row in found.rows}
    assert list(rows) == ["Cu", "Al, hot", softening.ALL]
    for name in rows:
        assert rows[name]["slope"] == pytest.approx(0.8, rel=1e-12)
    assert rows["Cu"]["r2"] == pytest.approx(1.0)
    assert rows["Cu"]["rmse_corrected"] == pytest.approx(0.0, abs=1e-9)
    assert rows[softening.ALL]["slope_spread"] == pytest.approx(0.0, abs=1e-12)


def test_a_line_with_scatter_is_the_least_squares_line():
    rng = np.random.default_rng(0)
    d = rng.normal(size=300)
    p = 0.7 * d + rng.normal(scale=0.2, size=300)
    line = softening.slope_of(p, d)
    best = np.linalg.lstsq(d[:, None], p, rcond=None)[0][0]
    assert line.slope == pytest.approx(best)
    assert line.r2 == pytest.approx(1 - ((p - best * d) ** 2).sum() / (p**2).sum())
    assert softening.slope_of(p, 0 * d) is None


def test_a_wrong_equilibrium_does_not_count_as_curvature():
    """Forces are 0.8 of the true ones plus a constant: the slope suffers, the curvature not."""
    frames = labelled("Cu", 3, amplitude=0.02)
    rest = labelled("Cu", 1, amplitude=0.0)
    far = labelled("Cu", 1, seed=9, amplitude=0.3)
    off = candidate("off", 0.8, np.array([[0.3, 0, 0], [-0.3, 0, 0], [0, 0.2, 0], [0, -0.2, 0]]))
    row = softening.check([off], frames + far, equilibrium=rest).rows[0]
    assert row.values["curvature_ratio"] == pytest.approx(0.8, rel=1e-9)
    assert row.values["curvature_frames"] == 3
    assert softening.check([off], frames).rows[0].values["r2"] < 0.9


def test_frames_above_the_limit_are_left_out_and_counted():
    frames = labelled("Cu", 2) + labelled("Cu", 1, seed=5, amplitude=0.3)
    limit = max(abs(f.forces).max() for f in frames[:2])
    found = softening.check([candidate("a")], frames, max_force=limit)
    assert found.settings["frames_left_out_by_max_force"] == 1
    assert found.rows[0].values["frames"] == 2
    assert any(note.startswith("1 of 3 frames have forces above") for note in found.notes)
    bare = softening.check([candidate("a")], [*frames, replace(frames[0], forces=None)])
    assert bare.rows[-1].flag == "labels: no forces on 1 of 4 frames"
    assert bare.rows[0].values["slope"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="none of 3 frames"):
        softening.check([candidate("a")], frames, max_force=1e-9)


def test_a_result_without_any_number_ends_with_1(capsys):
    lost, found = Row("a", "x", {}, "no label"), Row("a", "y", {"n": 1.0})
    show(Finding("toy", (lost, found), {"n": ""}), as_json=True, save=None, report=None)
    with pytest.raises(typer.Exit) as ended:
        show(Finding("toy", (lost,), {"n": ""}), as_json=True, save=None, report=None)
    assert ended.value.exit_code == 1
    assert "no label" in capsys.readouterr().out


def test_a_headline_may_leave_out_what_is_flagged():
    rows = Row("a", "x", {"rmsd": 0.0}, "not converged"), Row("a", "y", {"rmsd": 0.3})
    finding = Finding("relax", rows, {"rmsd": ""})
    assert Headline("rmsd", flagged=False).of(finding, "a") == 0.3
    assert Headline("rmsd").of(finding, "a") == pytest.approx(0.15)


def test_finite_numbers_beyond_all_bounds_are_an_explosion():
    cell = ase.build.bulk("Cu", cubic=True)
    cell.rattle(0.05, seed=0)
    (sound,) = candidate("sound", 1e5).evaluate([cell])
    (exploded,) = candidate("huge", 1e130).evaluate([cell])
    assert np.abs(sound.forces).max() > 1e4
    assert "explodes" in exploded.reason


def test_a_model_that_explodes_is_flagged_and_the_rest_stays():
    sound = labelled("Cu", 2)
    gold = [replace(f, atomic_numbers=np.full(4, 79), source="gold") for f in labelled("Cu", 1)]
    copper, lost, mean = softening.check([candidate("a", 0.9)], sound + gold).rows
    assert copper.values["slope"] == mean.values["slope"] == pytest.approx(0.9)
    assert "slope" not in lost.values
    assert lost.flag == f"1 of 1 frames left out, first gold: {NOT_FINITE}"
    assert "1 of 3 frames left out" in mean.flag
    found = forget.check(candidate("base", 0.9), [candidate("worse", 0.7)], sound + gold)
    assert [row.flag is None for row in found.rows] == [False] * 3
    assert found.rows[1].values["forces_ratio"] == pytest.approx(3.0)
    nothing = forget.check(candidate("base"), [candidate("worse")], gold)
    assert nothing.rows[1].values == {"frames": 0}
    assert "1 of 1 frames left out" in nothing.rows[1].flag


def test_numbers_of_a_finding_are_plain():
    found = softening.check([candidate("a", 0.5)], labelled("Cu", 1))
    for row in found.to_dict()["rows"]:
        assert all(v is None or not isinstance(v, float) or math.isfinite(v) for v in row.values())


# the commands


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """Two bundles and frames with labels of nobody."""
    folder = tmp_path_factory.mktemp("checks")
    model, params = small
    jaxft.save(folder / "base.jaxft", model, params)
    tuned = jax.tree.map(lambda leaf: 1.01 * leaf, params)
    jaxft.save(folder / "tuned.jaxft", model, tuned)
    rng = np.random.default_rng(0)
    images = [ase.build.molecule(name) for name in ("H2O", "CH4", "CH3OH")]
    for atoms in images:
        atoms.rattle(0.05, seed=1)
        atoms.info["REF_energy"] = rng.normal()
        atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
    ase.io.write(folder / "frames.xyz", images)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_commands_print_keep_and_draw(folder, tmp_path):
    base, tuned, frames = (folder / n for n in ("base.jaxft", "tuned.jaxft", "frames.xyz"))
    alone = json.loads(run("errors", base, frames, "--json").output)
    assert alone["total"]["forces"]["rmse"] > 0  # as it always was
    kept, page = tmp_path / "kept.json", tmp_path / "page.html"
    done = run("errors", base, frames, "--model", tuned, "--save", kept, "--report", page)
    assert done.exit_code == 0, done.output
    found = from_dict(json.loads(kept.read_text()))
    (total,) = [row for row in found.of("base") if row.subject == "total"]
    assert total.values["forces_rmse"] == pytest.approx(alone["total"]["forces"]["rmse"])
    assert {row.model for row in found.rows} == {"base", "tuned"}
    assert "<svg" in page.read_text()
    again = run("errors", base, frames, "--model", tuned, "--save", kept)
    assert again.exit_code == 1
    forgot = json.loads(run("forget", base, tuned, "--data", frames, "--json").output)
    distances = [r["weight_distance"] for r in forgot["rows"] if r["weight_distance"] is not None]
    assert distances == pytest.approx([0.01] * len(distances))
    soft = json.loads(run("softening", f"a={tuned}", "--data", frames, "--json").output)
    assert {row["model"] for row in soft["rows"]} == {"a"}


def test_wrong_input_is_one_error(folder):
    base = folder / "base.jaxft"
    twice = run("softening", base, base, "--data", folder / "frames.xyz")
    assert twice.exit_code == 1
    unknown = run("diatomics", base, "--element", "Xy")
    assert unknown.exit_code == 1
    assert run("rss", base).exit_code == 1


def test_heads_are_judged_one_by_one(small, folder, tmp_path):
    model, params = small
    both, params = surgery.add_head(model, params, "other", like=model.heads[0])
    jaxft.save(tmp_path / "two.jaxft", both, params)
    found = json.loads(
        run(
            "errors", tmp_path / "two.jaxft", folder / "frames.xyz", "--json",
            "--every-head", model.heads[0], "--every-head", "other",
        ).output
    )  # fmt: skip
    names = {f"two ({head})" for head in both.heads}
    assert {row["model"] for row in found["rows"]} == names
    first, second = (
        [row["forces_rmse"] for row in found["rows"] if row["model"] == name] for name in names
    )
    assert first == pytest.approx(second)  # a copied head says the same


# on a terminal


def test_wide_results_are_split_into_tables_that_fit_and_flags_are_told_in_full():
    units = {f"column{k}_mae": "meV/atom" for k in range(9)} | {"rare": ""}
    reason = "exploded after a long and winding road of several hundred steps"
    rows = (
        Row("base", "x", {c: 1.0 for c in units if c != "rare"}),
        Row("base", "y", {"rare": 2.0}, reason),
    )
    console = Console(width=80, file=io.StringIO())
    parts = fitted(Finding("toy", rows, units), console)
    for part in parts:
        console.print(part)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert all(text.count(f"column{k}") == 1 for k in range(9))
    assert text.count("toy") == 1
    assert f"! base, y: {reason}" in " ".join(text.split())
    assert len(parts) == 3
    assert text.count(" x ") == 2
    assert text.count(" y ") == 1  # only where it has something
    narrow = Finding("toy", rows[:1], {c: u for c, u in units.items() if c != "rare"})
    assert len(fitted(narrow, Console(width=200))) == 1
