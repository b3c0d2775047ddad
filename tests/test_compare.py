"""Many models, many checks, one page: tables, fronts, failures, earlier results."""

import csv
import io
import json
from pathlib import Path

import ase.build
import ase.io
import jax
import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from typer.testing import CliRunner

from jaxft import bundle, tree
from jaxft.cli import app
from jaxft.cli.compare import _models, bound_checks, load
from jaxft.config import ConfigError
from jaxft.evaluate import checks, compare
from jaxft.evaluate.bindings import Check, Headline
from jaxft.evaluate.candidate import AseCandidate, Flag, JaxCandidate
from jaxft.evaluate.compare import Comparison, Entry
from jaxft.evaluate.finding import Finding, Row
from jaxft.evaluate.fronts import Axes, pareto_front
from jaxft.evaluate.joining import merge, read_findings

ROOT = Path(__file__).parents[1]
HOSTILE = '<script>alert("x")</script>'


def numbers(check, column, **values):
    """A check that finds one number per model."""

    def run(candidates):
        rows = [Row(c.name, "total", {column: values[c.name]}) for c in candidates]
        return Finding(check, tuple(rows), {column: "meV/Å"})

    return run


def models(*names):
    return [AseCandidate(name, EMT()) for name in names]


@pytest.fixture
def two_checks():
    return {
        "errors": numbers("errors", "forces_rmse", a=10.0, b=20.0, c=30.0),
        "forget": numbers("forget", "forces_ratio", a=3.0, b=1.5, c=2.0),
    }


def test_the_summary_has_a_headline_of_every_check_and_the_front(two_checks):
    found = compare.compare(models("a", "b", "c"), two_checks)
    summary = found.summary
    assert [row.values["errors_forces_rmse"] for row in summary.rows] == [10.0, 20.0, 30.0]
    assert [row.values["forget_forces_ratio"] for row in summary.rows] == [3.0, 1.5, 2.0]
    assert summary.units["errors_forces_rmse"] == "meV/Å"
    (picture,) = summary.pictures
    front, *points = picture.lines
    assert list(zip(front.x, front.y, strict=True)) == [(10.0, 3.0), (20.0, 1.5)]  # c is dominated
    assert [line.label for line in points] == ["a", "b", "c"]
    assert summary.flags == ()


def test_the_front_is_what_none_is_better_than():
    points = {"a": (1.0, 5.0), "b": (2.0, 2.0), "c": (2.0, 3.0), "d": (3.0, 2.0), "e": (9.0, 1.0)}
    assert pareto_front(points) == ["a", "b", "e"]
    assert pareto_front({"a": (1.0, 1.0), "b": (1.0, 1.0)}) == ["a", "b"]
    rng = np.random.default_rng(0)
    many = {str(i): tuple(map(float, rng.integers(0, 6, 2))) for i in range(40)}
    best = {
        n
        for n, p in many.items()
        if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in many.values())
    }
    assert set(pareto_front(many)) == best


def test_a_model_without_a_number_is_named_and_not_drawn(two_checks):
    two_checks["forget"] = numbers("forget", "forces_ratio", a=float("nan"), b=1.5, c=2.0)
    summary = compare.compare(models("a", "b", "c"), two_checks).summary
    assert [line.label for line in summary.pictures[0].lines] == ["Pareto front", "b", "c"]
    assert "for want of a number: a" in summary.notes[1]
    alone = Comparison((Finding("errors", (Row("a", "total"),), {"forces_rmse": ""}),)).summary
    assert alone.pictures == ()
    assert "no forget.forces_ratio" in alone.notes[0]


def test_a_check_that_raises_is_flagged_and_the_rest_is_intact(two_checks):
    def broken(candidates):
        raise KeyError("no such thing")

    def stopped(candidates):
        raise KeyboardInterrupt

    found = compare.compare(models("a", "b", "c"), {"broken": broken, **two_checks})
    by_check = {finding.check: finding for finding in found.findings}
    assert [row.model for row in by_check["broken"].flags] == ["a", "b", "c"]
    assert "KeyError: 'no such thing'" in by_check["broken"].rows[0].flag
    assert by_check["errors"].rows[0].values == {"forces_rmse": 10.0}
    assert found.summary.rows[0].flag == "flagged rows: broken (1)"
    assert "no such thing" in found.page("t")
    with pytest.raises(KeyboardInterrupt):
        compare.compare(models("a"), {"stopped": stopped})


def test_the_base_is_the_first_of_every_check():
    """rss and md compare with the first."""

    def order(candidates):
        return Finding("order", tuple(Row(c.name, "s") for c in candidates), {})

    found = compare.compare(models("a", "b", "c"), {"order": order}, base="b")
    assert found.models == ["b", "a", "c"]


def test_structures_that_a_model_threw_away_are_flagged_and_not_raised(small):
    """What an exploding relaxation leaves behind; nothing is compiled where nothing is sound."""
    gone = ase.build.bulk("NaCl", "rocksalt", 5.6)
    gone.positions[0] = np.nan
    near = ase.Atoms("Na2", np.zeros((2, 3)))
    found = JaxCandidate("a", *small).evaluate([gone, near, ase.Atoms("Fe")])
    assert all(isinstance(outcome, Flag) for outcome in found)
    assert "not finite" in found[0].reason


def test_hostile_names_are_text_everywhere(two_checks):
    names = {HOSTILE: 1.0, "=2+2": 2.0, "a,b\nc": 3.0}
    found = compare.compare(
        models(*names),
        {
            "errors": numbers("errors", "forces_rmse", **names),
            "forget": numbers("forget", "forces_ratio", **names),
        },
    )
    page = found.page(HOSTILE)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "Content-Security-Policy" in page
    rows = list(csv.reader(io.StringIO(found.to_csv())))
    assert {len(row) for row in rows} == {7}
    assert {row[1] for row in rows[1:]} >= set(names)


def test_csv_has_a_line_per_number(two_checks):
    found = compare.compare(models("a", "b", "c"), two_checks)
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    of_b = [r for r in rows if r["check"] == "forget" and r["model"] == "b"]
    assert [(r["quantity"], r["unit"], r["value"]) for r in of_b] == [
        ("forces_ratio", "meV/Å", "1.5")
    ]
    flagged = Comparison((Finding("x", (Row("a", "s", {}, "why"),), {}),))
    (row,) = [r for r in csv.DictReader(io.StringIO(flagged.to_csv())) if r["check"] == "x"]
    assert (row["value"], row["flag"]) == ("", "why")


def finding(check="errors", model="a", value=1.0, unit="meV", **settings):
    return Finding(check, (Row(model, "total", {"v": value}),), {"v": unit}, settings)


def test_saved_findings_merge_model_by_model(tmp_path):
    for name, found in (
        ("one", finding(model="a", fmax=0.1)),
        ("two", finding(model="b", fmax=0.2)),
        ("three", finding(check="forget", model="a")),
    ):
        (tmp_path / name).write_text(json.dumps(found.to_dict()))
    read = [f for name in ("one", "two", "three") for f in read_findings(tmp_path / name)]
    errors, forget = merge(read)
    assert [row.model for row in errors.rows] == ["a", "b"]
    assert "settings: fmax" in errors.notes[-1]
    assert forget.check == "forget"
    assert len(merge([errors, finding(model="a")])[0].rows) == 2  # says the same
    again = Comparison((errors, forget))
    (tmp_path / "all").write_text(json.dumps(again.to_dict()))
    assert [f.to_dict() for f in read_findings(tmp_path / "all")] == [
        errors.to_dict(),
        forget.to_dict(),
    ]


def test_saved_findings_that_contradict_are_refused(tmp_path):
    with pytest.raises(ValueError, match="differ about 'a', 'total'"):
        merge([finding(value=1.0), finding(value=2.0)])
    with pytest.raises(ValueError, match="different units"):
        merge([finding(), finding(model="b", unit="eV")])
    for text in ("no json", "[1]", '{"check": "x"}', '{"findings": [{"rows": 3}]}'):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ValueError, match="bad"):
            read_findings(tmp_path / "bad")


def test_cost_counts_parameters_and_those_that_changed(small):
    model, params = small
    flat = tree.flatten(params)
    path = next(iter(flat))
    tuned = tree.unflatten({**flat, path: flat[path] + 1.0})
    candidates = [JaxCandidate("base", model, params), JaxCandidate("tuned", model, tuned)]
    pair = ase.Atoms("NaCl", [[0, 0, 0], [0, 0, 2.4]])
    every = [*candidates, AseCandidate("lj", LennardJones()), AseCandidate("emt", EMT())]
    found = compare.compare(every, {}, base="base", probe=pair)
    rows = {(row.model, row.subject): row for row in found.findings[0].rows}
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert rows["tuned", "parameters"].values["parameters"] == size
    assert rows["tuned", "parameters"].values["changed"] == flat[path].size
    assert rows["base", "parameters"].values["changed"] == 0
    assert rows["lj", "parameters"].values == {}
    assert rows["lj", "one step of NaCl"].values["per_atom"] > 0
    assert rows["emt", "one step of NaCl"].flag is not None
    with pytest.raises(ValueError, match="'other'"):
        compare.compare(candidates, {}, base="other")


def test_options_of_a_check_are_the_arguments_of_its_function(tmp_path):
    ase.io.write(tmp_path / "cu.xyz", ase.build.bulk("Cu"))

    def run(
        candidates, structures, frames=(), *, fmax: float = 0.1, names: list[str] | None = None
    ):
        return structures, frames, fmax, names

    check = Check(run)
    bound = check.bind(
        check.options.model_validate({"structures": {"cu": tmp_path / "cu.xyz"}, "fmax": 0.5})
    )
    structures, frames, fmax, names = bound([])
    assert (list(structures), frames, fmax, names) == (["cu"], (), 0.5, None)
    for wrong in ({}, {"structures": {}, "fmx": 1}, {"structures": {}, "fmax": "soft"}):
        with pytest.raises(ValueError, match="validation error"):
            check.options.model_validate(wrong)


def test_headlines_are_means_or_one_row():
    rows = [Row("a", s, {"v": v}) for s, v in (("x", -1.0), ("y", 3.0))] + [Row("a", "z", {})]
    found = Finding("c", tuple(rows), {"v": ""})
    assert Headline("v").of(found, "a") == 1.0
    assert Headline("v", absolute=True).of(found, "a") == 2.0
    assert Headline("v", "y").of(found, "a") == 3.0
    assert Headline("v").of(found, "nobody") is None


def test_a_headline_is_a_row_the_rows_it_begins_or_all():
    rows = [Row("a", s, {"v": v}) for s, v in (("x, 1 GPa", 1.0), ("all, 1 GPa", 5.0))]
    found = Finding(
        "c", (*rows, Row("a", "all, 2 GPa", {"v": 7.0}), Row("b", "x", {"v": 2.0})), {"v": ""}
    )
    assert Headline("v", "all").of(found, "a") == 6.0
    assert Headline("v", "all").of(found, "b") == 2.0


def test_the_best_is_nearest_to_the_ideal_and_nobody_where_all_are_alike():
    def best(ideal, **values):
        return Entry("c", Headline("v", best=ideal), "", values).best

    assert best(0.0, a=1.0, b=2.0, c=None) == {"a"}
    assert best(1.0, a=0.9, b=1.3, c=0.9) == {"a", "c"}
    assert best(0.0, a=326.0, b=239.0, exploded=5e130) == {"b"}
    assert best(np.inf, a=1.0, b=2.0) == {"b"}
    assert best(None, a=1.0, b=2.0) == best(0.0, a=1e-16, b=2e-16) == best(0.0, a=None) == set()


def test_a_model_that_failed_on_the_hard_structure_is_not_the_best():
    rows = [Row("a", "easy", {"delta": 1.0}), Row("a", "hard", {"delta": 9.0})]
    rows += [Row("b", "easy", {"delta": 2.0}), Row("b", "hard", {}, "no minimum")]
    rows += [Row("c", "easy", {"delta": 3.0}), Row("c", "hard", {"delta": 9.0})]
    found = Comparison((Finding("eos", tuple(rows), {"delta": "meV/atom"}),))
    (entry,) = found.entries
    assert entry.values == {"a": 5.0, "b": 2.0, "c": 6.0}
    assert (entry.partial, entry.best) == ({"b"}, {"a"})
    assert any("eos, delta: that of b is of fewer" in note for note in found.summary.notes)


def test_frames_and_pairs_that_a_mean_leaves_out_count():
    headline = Headline("v", "total")
    rows = [Row("a", "total", {"v": 1.0, "frames": 4}), Row("b", "total", {"v": 1.0, "pairs": 3})]
    found = Finding("c", tuple(rows), {"v": "", "frames": "", "pairs": ""})
    assert [headline.subjects(found, model) for model in "abc"] == [4, 3, 0]


def test_the_front_is_of_distances_where_the_ideal_is_not_zero():
    slopes = Finding(
        "softening",
        tuple(Row(n, "s", {"slope": v}) for n, v in (("a", 1.1), ("b", 0.7))),
        {"slope": ""},
    )
    cost = Finding(
        "cost",
        tuple(Row(n, "s", {"per_atom": v}) for n, v in (("a", 3.0), ("b", 2.0))),
        {"per_atom": "µs/atom"},
    )
    axes = Axes("softening.slope", "cost.per_atom")
    (picture,) = Comparison((slopes, cost), axes).summary.pictures
    np.testing.assert_allclose([line.x[0] for line in picture.lines[1:]], [0.1, 0.3])
    assert "distance of softening: slope from 1" in picture.x


def test_rows_of_references_and_ensembles_are_no_models():
    rows = {"eos": ("reference", "a"), "uncertainty": ("ensemble",), "cost": ("b", "all models")}
    findings = [Finding(c, tuple(Row(m, "s") for m in names), {}) for c, names in rows.items()]
    assert Comparison(tuple(findings)).models == ["a", "b"]


def test_axes_name_a_check_and_a_column():
    with pytest.raises(ValueError, match=r"check\.column"):
        Axes("errors", "forget.x")


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def files(small, structures, tmp_path_factory):
    """Two bundles, labelled-looking frames and a crystal."""
    folder = tmp_path_factory.mktemp("compare")
    model, params = small
    for name, factor in (("base", 1.0), ("tuned", 1.01)):
        bundle.save(
            folder / f"{name}.jaxft", model, jax.tree.map(lambda x, f=factor: x * f, params)
        )
    ase.io.write(folder / "frames.xyz", structures[:2])
    salt = ase.build.bulk("NaCl", "rocksalt", 5.6)
    ase.io.write(folder / "salt.xyz", salt)
    return folder


def config(folder, text):
    path = folder / "compare.yaml"
    path.write_text(text.replace("@", str(folder)))
    return path


MODELS = "models: {base: '@/base.jaxft', tuned: '@/tuned.jaxft'}\n"


def test_a_comparison_is_a_page_a_table_and_a_document(files, tmp_path):
    path = config(
        files,
        MODELS
        + "base: base\nprobe: '@/salt.xyz'\nchecks:\n  uncertainty: {frames: '@/frames.xyz'}\n",
    )
    out = tmp_path / "out"
    found = run("compare", path, "-o", out, "--title", HOSTILE)
    assert found.exit_code == 0, found.output
    assert sorted(p.name for p in out.iterdir()) == [
        "findings.json",
        "numbers.csv",
        "report.html",
    ]
    assert "<script>" not in (out / "report.html").read_text()
    document = json.loads((out / "findings.json").read_text())
    assert [f["check"] for f in document["findings"]] == ["uncertainty", "cost"]
    again = run("evaluate", "compare", "--from", out / "findings.json", "-o", tmp_path / "again")
    assert again.exit_code == 0, again.output
    refused = run("compare", path, "-o", out)
    assert refused.exit_code == 1
    assert "exists" in refused.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MODELS + "checks: {phas: {}}", "did you mean 'phase'"),
        (MODELS + "checks: {phase: {structure: {}}}", "did you mean 'structures'"),
        (MODELS + "checks: {phase: {structures: {a: '@/none.xyz'}}}", "none.xyz is not a file"),
        (MODELS + "chekcs: {}", "did you mean 'checks'"),
        (MODELS + "base: other\nchecks: {phase: {}}", "'other' is none of"),
        ("models: {a=b: x}\nchecks: {phase: {}}", "no name of a model"),
        ("models: &x {a: b}\nchecks: *x", "aliases"),
    ],
)
def test_bad_configs_are_refused_before_anything_runs(files, text, message):
    found = run("compare", config(files, text))
    assert found.exit_code == 1
    assert message in found.output.replace("\n", " ")


def test_the_config_that_comes_along_asks_for_every_check(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = Path("configs/evaluate/compare.yaml")
    found = load(path)
    assert set(bound_checks(found, str(path))) == set(checks.CHECKS)
    assert found.probe.is_file()
    assert {found.pareto.x, found.pareto.y} == {Axes().x, Axes().y}


def test_the_base_is_that_of_the_comparison_and_models_have_heads(files):
    text = "models: {base: '@/base.jaxft', tuned: {file: '@/tuned.jaxft', head: Default}}\n"
    asked = "checks: {forget: {frames: '@/frames.xyz'}}\n"
    with pytest.raises(ConfigError, match="base"):
        bound_checks(load(config(files, text + asked)), "x")
    found = load(config(files, text + "base: base\n" + asked))
    (bound,) = bound_checks(found, "x").values()
    assert bound.args[1]["base"] == "base"
    assert [c.head for c in _models(found)] == [None, "Default"]
    with pytest.raises(ConfigError, match="hed"):
        load(config(files, "models: {a: {file: x, hed: y}}\nchecks: {errors: {}}"))


def test_nothing_to_compare_is_refused():
    found = run("compare")
    assert found.exit_code == 1
    assert "nothing to compare" in found.output


def test_the_other_commands_run(files, tmp_path):
    ranked = tmp_path / "ranked.xyz"
    found = run(
        "evaluate", "uncertainty", files / "base.jaxft", files / "tuned.jaxft",
        "--data", files / "frames.xyz", "--rank", ranked, "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["check"] == "uncertainty"
    assert len(ase.io.read(ranked, ":")) == 2
    found = run(
        "evaluate", "phase", files / "base.jaxft", "--structure", f"salt={files / 'salt.xyz'}",
        "--expect", "salt=Pm-5m",
    )  # fmt: skip
    assert found.exit_code == 1
    assert "no space group" in found.output
    found = run(
        "data", "rattle", files / "salt.xyz", "--model", files / "base.jaxft",
        "-o", tmp_path / "rattled.poscar",
    )  # fmt: skip
    assert found.exit_code == 1
    assert "no .xyz" in found.output
