"""Studies: what is planned, that nothing is done twice, and what is collected."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import jax
import numpy as np
import pytest
import yaml
from rich.console import Console
from test_cli import run as command
from test_cli import write_frames

import jaxft
from jaxft import data, fisherfile, surgery
from jaxft.strategies.ewc import digest
from jaxft.study import cell as cells
from jaxft.study import collect, figures, lock, page, results, tables, work
from jaxft.study.config import StudyConfig, load
from jaxft.study.made import ensure
from jaxft.study.plan import plan, updates_per_epoch
from jaxft.study.results import Quantity, Result

COMMON = ["e0s=foundation", "batch_size=4", "dtype=float64", "ema_decay=null"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small, frames) -> Path:
    """``base.jaxft``, ``frames.xyz`` of eight frames, ``base.xyz``."""
    folder = tmp_path_factory.mktemp("study")
    jaxft.save(folder / "base.jaxft", *small)
    write_frames(folder / "frames.xyz", frames)
    write_frames(folder / "base.xyz", frames[:2])
    return folder


def document(folder: Path, output: Path, **changes: object) -> dict:
    found = {
        "output": str(output),
        "base": str(folder / "base.jaxft"),
        "datasets": {
            "salt": {
                "train": str(folder / "frames.xyz"),
                "valid": str(folder / "base.xyz"),
                "test": {"target": str(folder / "base.xyz")},
            }
        },
        "base_test": {"base": str(folder / "base.xyz")},
        "recipes": {"naive": {"recipe": []}},
        "set": COMMON,
        "budget": {"epochs": 1},
    }
    return found | changes


def write(path: Path, found: dict) -> Path:
    path.write_text(json.dumps(found))  # JSON is YAML
    return path


def planned(folder: Path, output: Path, **changes: object) -> list:
    return plan(StudyConfig.model_validate(document(folder, output, **changes)))


def test_a_plan_is_the_product_of_all_axes(folder: Path, tmp_path: Path) -> None:
    found = planned(
        folder,
        tmp_path,
        recipes={
            "naive": {"recipe": []},
            "lora": {
                "preset": "lora",
                "set": ["recipe.0.rank=2"],
                "vary": {"recipe.0.alpha": [0.5, 1, 2]},
            },
        },
        vary={"optimizer.learning_rate": ["1e-3", 0.01]},
        sizes=[2, 4],
        seeds=3,
    )
    assert len(found) == (2 + 2 * 3) * 2 * 3
    assert len({cell.id for cell in found}) == len(found)
    one = found[-1]
    assert dict(one.varied) == {"optimizer.learning_rate": "0.01", "recipe.0.alpha": "2"}
    assert (one.size, one.seed, one.config.train_size, one.config.seed) == (4, 2, 4, 2)
    assert one.config.recipe[0].rank == 2
    assert one.config.recipe[0].alpha == 2
    assert one.config.optimizer.name == "adamw"  # of the preset
    assert one.config.epochs == 1
    assert one.config.output == tmp_path / "cells" / one.id / "run"
    assert found[0].varied == {"optimizer.learning_rate": "0.001"}
    assert {cell.config.test["base"].e0s for cell in found} == {"base"}


def test_ids_are_those_of_the_content(folder: Path, tmp_path: Path) -> None:
    """They survive other names, places and outputs, and no change of what is inside."""
    known = [cell.id for cell in planned(folder, tmp_path / "a", seeds=2)]
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert [cell.id for cell in planned(moved, tmp_path / "b", seeds=2)] == known
    alone = planned(folder, tmp_path, seeds=2, set=[*COMMON, "workers=1"])
    assert [cell.id for cell in alone] == known
    changed = [planned(folder, tmp_path, seeds=2, budget={"epochs": 2})]
    changed.append(planned(folder, tmp_path, seeds=2, set=[*COMMON, "loss.energy=2"]))
    for name in ("frames.xyz", "base.xyz"):
        frames = ase.io.read(moved / name, ":")
        frames[0].info["REF_energy"] = frames[0].info["REF_energy"] + 1e-6
        before = (moved / name).read_bytes()
        ase.io.write(moved / name, frames)
        changed.append(planned(moved, tmp_path, seeds=2))
        (moved / name).write_bytes(before)
    model, params = jaxft.load(moved / "base.jaxft")
    for other in (
        (surgery.set_e0s(model, {1: -1.0}), params),
        (
            model,
            surgery.tree.unflatten({k: v * 2 for k, v in surgery.tree.flatten(params).items()}),
        ),
    ):
        shutil.rmtree(moved / "base.jaxft")
        jaxft.save(moved / "base.jaxft", *other)
        changed.append(planned(moved, tmp_path, seeds=2))
    ids = [cell.id for cells in changed for cell in cells]
    assert len(set(ids)) == 2 * len(changed)
    assert not set(ids) & set(known)
    shutil.rmtree(moved / "base.jaxft")  # where a bundle came from is none of its content
    jaxft.save(moved / "base.jaxft", model, params, provenance={"file": "elsewhere"})
    assert [cell.id for cell in planned(moved, tmp_path, seeds=2)] == known


def test_a_new_version_makes_new_cells(folder, tmp_path, monkeypatch) -> None:
    (before,) = planned(folder, tmp_path)
    monkeypatch.setattr("jaxft.study.identity.__version__", "99")
    (after,) = planned(folder, tmp_path)
    assert before.id != after.id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": [*COMMON, "epochs=3"]}, "would undo what the study says; use 'budget'"),
        ({"set": [*COMMON, "seed=3"]}, "use 'seeds'"),
        ({"vary": {"train_size": [2]}}, "use 'sizes'"),
        ({"vary": {"optimizer.learning_rat": [1]}}, "did you mean 'learning_rate'"),
        ({"vary": {"recipe.3.rank": [1]}}, "is no entry of a list of 0"),
        ({"vary": {"batch_size": [2, 2]}}, "two cells are the same fine-tune"),
        ({"vary": {"batch_size": []}}, "has no values"),
        ({"sizes": [9]}, "9 frames was asked for, and .* has 8"),
        ({"sizes": [8, 1.0]}, "two cells are the same"),
        ({"base": "nowhere.jaxft"}, "no bundle"),
        ({"recipes": {"x": {"preset": "lorra"}}}, "Did you mean 'lora'"),
        ({"recipes": {"x": {}}}, "give either `preset` or `recipe`"),
        ({"recipes": {"a/b": {"recipe": []}}}, "is no name"),
        ({"budget": {"epochs": 1, "steps": 3}}, "give one of"),
        ({"budget": {"seconds": 5}, "set": [*COMMON, "optimizer.schedule=cosine"]}, "constant"),
        ({"seeds": [1, 1]}, "different"),
        ({"base_test": {"target!": "base.xyz"}}, "must differ"),
        ({"dataset": {}}, "did you mean 'datasets'"),
    ],
)
def test_what_is_no_study_is_refused(folder, tmp_path, changes, message) -> None:
    path = write(tmp_path / "s.yaml", document(folder, tmp_path / "out", **changes))
    with pytest.raises(ValueError, match=message):
        plan(load(path, kind=StudyConfig))
    assert not (tmp_path / "out").exists()


def test_budgets_in_steps_and_seconds(folder: Path, tmp_path: Path) -> None:
    """Eight frames in batches of four are two updates; half of a batch replayed, four."""
    replay = {"strategy": "replay", "files": str(folder / "base.xyz"), "watch": 0}
    recipes = {
        "naive": {"recipe": []},
        "mixed": {"recipe": [{**replay, "fraction": 0.5}]},
        "alternate": {"recipe": [{**replay, "schedule": "alternate", "steps": 2}]},
    }
    found = planned(folder, tmp_path, recipes=recipes, budget={"steps": 24})
    assert [cell.config.epochs for cell in found] == [12, 6, 4]
    assert updates_per_epoch(found[0].config, 9) == 3
    for cell in found:  # what the run itself would count
        given = jaxft_inputs(cell.config)
        assert updates_per_epoch(cell.config, 8) == given.train.num_batches
    (timed,) = planned(folder, tmp_path, budget={"seconds": 5})
    assert timed.config.max_seconds == 5


def jaxft_inputs(config):
    from rich.console import Console

    from jaxft import inputs

    config = config.model_copy(update={"loss": type(config.loss)(energy=0, forces=1)})
    return inputs.read(config, Console(quiet=True))


def test_the_base_is_judged_on_its_own_head(folder: Path, tmp_path: Path) -> None:
    words = ["head=target", "add_head={}"]
    (found,) = planned(folder, tmp_path, set=[*COMMON, *words])
    assert found.config.test["base"].head == "Default"
    assert found.config.test["target"].head is None
    assert found.base_tests == ("base",)


def test_smaller_training_sets_are_parts_of_larger_ones(frames) -> None:
    sets = [{f.source for f in data.subset(frames, n, seed=3)} for n in range(1, len(frames) + 1)]
    assert all(a < b for a, b in itertools.pairwise(sets))
    assert sets[2] == {f.source for f in data.subset(frames[::-1], 3, seed=3)}
    others = {tuple(sorted(f.source for f in data.subset(frames, 3, seed=s))) for s in range(9)}
    assert len(others) > 1
    with pytest.raises(ValueError, match="ask for 1 to 8"):
        data.subset(frames, 9)


def test_the_small_form_and_overrides(folder: Path, tmp_path: Path) -> None:
    found = document(folder, tmp_path / "out", seeds=3)
    path = write(tmp_path / "s.yaml", found | {"small": ["seeds=1", "budget.epochs=2"]})
    assert load(path, kind=StudyConfig).seeds == 3
    small = load(path, ["seeds=2"], small=True, kind=StudyConfig)
    assert (small.seeds, small.budget.epochs) == (2, 2)
    with pytest.raises(ValueError, match="has no list `small:`"):
        load(write(tmp_path / "t.yaml", found), small=True, kind=StudyConfig)


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    with lock.hold(tmp_path) as held:
        assert lock.is_held(tmp_path)
        with pytest.raises(lock.Busy, match=f"process {os.getpid()}"), lock.hold(tmp_path):
            pass
        held.check()
    assert not lock.is_held(tmp_path)
    with lock.hold(tmp_path):
        pass


def test_locks_of_the_dead_are_taken_and_of_the_living_not(tmp_path, monkeypatch) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / lock.LOCK
    mine = lock._me()
    stale = [mine | {"pid": dead.pid, "token": "x"}, mine | {"born": "0", "token": "x"}]
    for holder in stale:
        path.write_text(json.dumps(holder))
        with lock.hold(tmp_path):
            pass
    path.write_text(json.dumps(mine | {"where": "another machine", "token": "x"}))
    with pytest.raises(lock.Busy), lock.hold(tmp_path):
        pass
    long_ago = time.time() - 2 * lock.STALE
    os.utime(path, (long_ago, long_ago))
    with lock.hold(tmp_path) as held:
        path.write_text(json.dumps(mine | {"token": "y"}))
        with pytest.raises(lock.Lost):
            held.check()
    path.write_text('{"pid": 1')  # cut short
    with lock.hold(tmp_path):
        pass


def test_cells_run_once_and_failures_are_rows(folder, tmp_path, few_shapes, monkeypatch) -> None:
    changes = {
        "vary": {"optimizer.learning_rate": [1e-3, 1e200]},
        "recipes": {"naive": {"recipe": [], "set": ["optimizer.clip_norm=null"]}},
    }
    found = planned(folder, tmp_path, **changes)
    bad = planned(folder, tmp_path, set=[*COMMON, "e0s={H: 1.0}"])
    said: list[str] = []
    work.work([*found, *bad], said.append)
    assert [work.status(cell) for cell in (*found, *bad)] == ["done", "diverged", "refused"]
    assert "hold no finite number for C, O" in results.read(bad[0].folder).reason
    assert len(said) == 3
    first = results.read(found[0].folder)
    numbers = {(q.set, q.name): q.value for q in first.quantities}
    assert numbers["", "updates"] == 2
    assert numbers["", "epochs"] == 1
    assert 0 < numbers["", "changed"] <= 100
    assert numbers["base", "forces_rmse"] == numbers["target", "forces_rmse"]
    ratio = numbers["base", "forces_rmse"] / numbers["base", "before_forces_rmse"]
    assert numbers["base", "forces_rmse_ratio"] == pytest.approx(ratio)
    assert not (found[0].config.output / "checkpoints").exists()
    assert (found[0].config.output / "model.jaxft").is_dir()

    ran: list[str] = []
    monkeypatch.setattr(cells.run, "finetune", lambda config, **_: ran.append(config.output))
    work.work([*found, *bad], said.append)
    assert (ran, len(said)) == ([], 3)

    def interrupted(config, **options):
        ran.append(config.output)
        raise KeyboardInterrupt

    monkeypatch.setattr(cells.run, "finetune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work.work([*found, *bad], said.append, retry=True)
    assert ran == [found[1].config.output]  # what went well is kept, what did not begins anew
    assert work.status(found[1]) == "waiting"


def test_a_pause_changes_nothing(folder, tmp_path, few_shapes) -> None:
    """Rungs of a search: a cell that pauses is bitwise the one that does not."""
    finished = []
    for name, pauses in (("whole", []), ("paused", [1])):
        (cell,) = planned(
            folder,
            tmp_path / name,
            budget={"epochs": 2},
            set=[*COMMON, "optimizer.schedule=cosine"],
        )
        for epoch in pauses:
            assert cells.run_until(cell, epoch) is None
            assert cells.epochs_done(cell) == epoch
            assert work.status(cell) == "begun"
        assert cells.run_until(cell, 2).status == "done"
        _, params, _ = jaxft.bundle.load_numpy(cell.config.output / "model.jaxft")
        finished.append(surgery.tree.flatten(params))
    for path, leaf in finished[0].items():
        np.testing.assert_array_equal(leaf, finished[1][path], err_msg=path)


def test_time_is_a_budget(folder, tmp_path, few_shapes) -> None:
    (cell,) = planned(folder, tmp_path, budget={"seconds": 1e-6})
    result = cells.run_cell(cell)
    assert {q.name: q.value for q in result.quantities if not q.set}["epochs"] == 1


def test_a_study_that_is_killed_goes_on(folder: Path, tmp_path: Path) -> None:
    """Two processes share three cells; one is killed while it works. Nothing is done twice."""
    settings = document(folder, tmp_path / "out", seeds=3, budget={"epochs": 20})
    path = write(tmp_path / "s.yaml", settings)
    found = plan(load(path, kind=StudyConfig))
    arguments = [sys.executable, "-m", "jaxft", "study", "run", str(path)]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE) for _ in range(2)]

    def held() -> list:
        """Cells that both are at, so that neither can still come to the other's; else none."""
        begun = [c for c in found if (c.config.output / "metrics.jsonl").exists()]
        at = [c for c in begun if (c.folder / lock.LOCK).exists() and work.status(c) != "done"]
        return at if len(at) == 2 else []

    killed = json.loads((wait_for(held)[0].folder / lock.LOCK).read_text())["pid"]
    os.kill(killed, signal.SIGKILL)
    outputs = [p.communicate()[0].decode() for p in processes]
    assert sum(text.count(": done") for text in outputs) == 2  # the third was the killed one's
    done = [cell for cell in found if work.status(cell) == "done"]
    assert len(done) == 2
    written = {c.id: (c.folder / results.RESULT).stat().st_mtime_ns for c in done}
    second = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert second.stdout.count(": done") == 1
    assert [work.status(cell) for cell in found] == ["done"] * 3
    now = {c.id: (c.folder / results.RESULT).stat().st_mtime_ns for c in done}
    assert now == written


def wait_for(condition, seconds: float = 300.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError


def by_hand(found: list, values: dict[str, list[tuple[float, float]]]) -> None:
    """Results of cells by recipe and seed: (target error, forgetting)."""
    for cell in found:
        if cell.recipe not in values:
            continue
        error, lost = values[cell.recipe][cell.seed]
        scale = 1.0 if cell.size is None else cell.size**-0.5
        cell.folder.mkdir(parents=True)
        quantities = (
            Quantity("target", "forces_rmse", "meV/Å", error * scale),
            Quantity("base", "forces_rmse_ratio", "", lost),
            Quantity("", "seconds", "s", 10.0),
        )
        results.save(cell.folder, Result("done", "", quantities, {"jax": "0"}))


@pytest.fixture
def collected(folder: Path, tmp_path: Path):
    recipes = {
        name: {"recipe": [], "set": [f"loss.forces={i + 1}"]} for i, name in enumerate("abcd")
    }
    study = StudyConfig.model_validate(
        document(folder, tmp_path / "out", recipes=recipes, seeds=2, sizes=[1, 4])
    )
    found = plan(study)
    by_hand(found, {"a": [(10, 4), (14, 4)], "b": [(20, 2), (20, 2)], "c": [(30, 3), (30, 3)]})
    (first, *_) = [cell for cell in found if cell.recipe == "d"]
    first.folder.mkdir(parents=True)
    results.save(first.folder, Result("diverged", "loss nan\nin epoch 3"))
    return study, collect.outcomes(found)


def test_results_are_tidy(collected) -> None:
    _, found = collected
    table = list(csv.DictReader(io.StringIO(collect.to_csv(list(collect.rows(found))))))
    assert len(table) == 3 * 4 * 3 + 4
    assert {row["status"] for row in table} == {"done", "diverged", "waiting"}
    (failed,) = [row for row in table if row["status"] == "diverged"]
    assert failed["reason"] == "loss nan in epoch 3"
    assert (failed["recipe"], failed["quantity"], failed["value"]) == ("d", "", "")
    one = next(r for r in table if r["recipe"] == "a" and r["size"] == "4" and r["seed"] == "1")
    assert (one["set"], one["quantity"], one["unit"]) == ("target", "forces_rmse", "meV/Å")
    assert float(one["value"]) == 7.0


def test_means_and_spreads_are_over_seeds(collected) -> None:
    _, found = collected
    groups = tables.grouped(found)
    assert len(groups) == 8
    (of_a,) = [g for g in groups if g.group.recipe == "a" and g.group.size == 1]
    summary = of_a.get("target", "forces_rmse")
    assert summary.mean == 12
    assert summary.spread == pytest.approx(8**0.5)
    assert str(summary) == "12 ± 2.8"
    assert tables.Summary("", (3.0,)).spread is None
    (of_d,) = [g for g in groups if g.group.recipe == "d" and g.group.size == 1]
    assert (of_d.cells, of_d.done, of_d.summaries) == (2, 0, {})
    assert "diverged: loss nan" in of_d.reasons[0]
    assert tables.columns(groups, ["base"]) == [
        ("target", "forces_rmse"),
        ("base", "forces_rmse_ratio"),
        ("", "seconds"),
    ]
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(groups))))
    assert len(rows) == 6 * 3
    assert float(rows[0]["mean"]) == 12
    assert rows[0]["n"] == "2"


def test_figures_show_efficiency_and_the_front(collected) -> None:
    _, found = collected
    efficiency, pareto = figures.pictures(tables.grouped(found), ["target"], ["base"])
    line = efficiency.lines[0]
    assert (line.label, list(line.x), list(line.y)) == ("a", [1, 4], [12, 6])
    assert sorted(efficiency.lines[1].y) == [5, 7, 10, 14]
    front = pareto.lines[0]
    assert front.is_reference
    assert list(zip(front.x, front.y, strict=True)) == [(6, 4), (10, 2)]


def test_sensitivity_is_drawn_for_numbers(folder: Path, tmp_path: Path) -> None:
    vary = {"optimizer.learning_rate": ["1e-3", 0.1], "e0s": {"x": ["e0s=average"], "y": []}}
    found = planned(folder, tmp_path, vary=vary)
    by_hand(found, {"naive": [(1, 1)]})
    drawn = figures.pictures(tables.grouped(collect.outcomes(found)), ["target"], [])
    (picture,) = drawn
    assert picture.title == "target: sensitivity to optimizer.learning_rate"
    assert [list(line.x) for line in picture.lines[::2]] == [[1e-3, 0.1]] * 2
    assert [line.label for line in picture.lines[::2]] == ["naive e0s=x", "naive e0s=y"]


def test_accuracy_is_drawn_against_what_is_changed(folder: Path, tmp_path: Path) -> None:
    """Groups that differ in a number are one line; the front passes by what is beaten."""
    recipes = {
        "a": {"recipe": [], "vary": {"λ": {"1": ["loss.forces=1"], "2": ["loss.forces=2"]}}},
        "b": {"recipe": [], "set": ["loss.forces=3"]},
    }
    found = planned(folder, tmp_path, recipes=recipes)
    for cell, (changed, error) in zip(found, [(1.0, 8.0), (3.0, 4.0), (9.0, 5.0)], strict=True):
        cell.folder.mkdir(parents=True)
        spent = [Quantity("", "changed", "%", changed), Quantity("", "trained", "", 7.0)]
        error_of = Quantity("target", "forces_rmse", "meV/Å", error)
        results.save(cell.folder, Result("done", "", (*spent, error_of)))
    drawn = figures.pictures(tables.grouped(collect.outcomes(found)), ["target"], [])
    assert [picture.title for picture in drawn] == [
        "target: sensitivity to λ",
        "target: accuracy against changed numbers",  # and not against equal ones
    ]
    front, line, *_ = drawn[1].lines
    assert sorted(zip(front.x, front.y, strict=True)) == [(1, 8), (3, 4)]
    assert (line.label, line.x, line.y) == ("a", [1, 3], [8, 4])
    assert {each.label for each in drawn[1].lines} == {"Pareto front", "a", "b"}


def with_fishers(folder: Path, **options: object) -> dict:
    """Two strengths of one Fisher, and random parameters."""
    ewc = [{"strategy": "ewc", "fisher": "old", "strength": 1}]
    return {
        "fishers": {"old": {"files": str(folder / "base.xyz"), **options}},
        "recipes": {
            "ewc": {"recipe": ewc, "vary": {"recipe.0.strength": [1, 2]}},
            "scratch": {"recipe": [], "scratch": True},
        },
    }


def test_what_is_made_is_known_before_it_exists(folder: Path, tmp_path: Path) -> None:
    one, other, random = planned(folder, tmp_path, **with_fishers(folder))
    (needed,) = one.needs
    assert needed.path == one.config.recipe[0].fisher == other.config.recipe[0].fisher
    assert not needed.path.exists()
    assert random.config.model == random.needs[0].path != one.config.model
    assert (one.base_tests, random.base_tests) == (("base",), ())
    assert set(random.config.test) == {"target"}

    def known(**changes: object) -> list[str]:
        return [cell.id for cell in planned(folder, tmp_path / "other", **changes)]

    ids = [one.id, other.id, random.id]
    assert known(**with_fishers(folder)) == ids
    changed = known(**with_fishers(folder, n=1))
    assert [a == b for a, b in zip(changed, ids, strict=True)] == [False, False, True]
    changed = known(**with_fishers(folder), set=[*COMMON, "loss.energy=3"])
    assert not set(changed) & set(ids)
    assert len(set(known(**with_fishers(folder), seeds=2))) == 6
    paths = {
        cell.needs[0].path for cell in planned(folder, tmp_path, **with_fishers(folder), seeds=2)
    }
    assert len(paths) == 3  # one Fisher, and random parameters by seed
    with pytest.raises(ValueError, match="either `base` or `scratch`"):
        StudyConfig.model_validate(
            document(
                folder,
                tmp_path,
                recipes={"a": {"recipe": [], "scratch": True, "base": str(folder / "base.jaxft")}},
            )
        )


def test_what_cells_need_is_made_once(folder: Path, tmp_path: Path) -> None:
    """Strengths share a Fisher; a cell from scratch begins at its own random parameters."""
    options = with_fishers(folder, probes=1, n=1)
    readouts = {"strategy": "freeze", "level": 6}  # little to compile
    options["recipes"]["scratch"]["recipe"] = [readouts]
    options["recipes"]["ewc"] = {"recipe": [readouts, *options["recipes"]["ewc"]["recipe"]]}
    options["recipes"]["ewc"]["vary"] = {"recipe.1.strength": [1, 2]}
    ewc, other, random = planned(folder, tmp_path, **options, set=[*COMMON, "loss.error=mse"])
    lines: list[str] = []
    work.work([ewc, random], lines.append)
    assert [": done in" in line for line in lines] == [True] * 2, lines
    made = ewc.needs[0].path
    first = made.stat().st_mtime_ns
    ensure(other.needs, Console(quiet=True))
    assert other.needs[0].path == made
    assert made.stat().st_mtime_ns == first
    found = fisherfile.load(made)
    start = jaxft.load(folder / "base.jaxft")[1]
    assert found.provenance["frames"] == 1
    assert found.parameters == digest(start)
    model, params = jaxft.load(random.config.model)
    forces = np.concatenate([f.forces.ravel() for f in data.read(folder / "frames.xyz")])
    assert model.constants.scale == pytest.approx(np.sqrt(np.mean(forces**2)), rel=1e-5)
    tuned = jaxft.load(random.config.output / "model.jaxft")[1]
    assert 0 < distance(params, tuned) < 0.1 * distance(start, tuned)
    assert {q.set for q in results.read(random.folder).quantities} == {"", "target"}


def distance(a: dict, b: dict) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(np.sqrt(sum(np.sum((np.asarray(x) - np.asarray(y)) ** 2) for x, y in pairs)))


def test_the_page_tells_all(collected) -> None:
    study, found = collected
    written = page.write(study, found)
    assert {path.name for path in written} >= {"results.csv", "summary.csv", "report.html"}
    text = (study.output / "results" / "report.html").read_text()
    assert "diverged: loss nan" in text
    assert "12 ± 2.8" in text
    assert text.count("<svg") == 2
    assert "<script" not in text
    page.write(study, found)  # what is derived is replaced


def test_the_commands(folder: Path, tmp_path: Path, small) -> None:
    path = write(tmp_path / "s.yaml", document(folder, tmp_path / "out", seeds=2))
    ids = command("study", "plan", path, "--ids").stdout.split()
    assert len(ids) == 2
    facts = json.loads(command("study", "plan", path, "seeds=1", "--json").stdout)
    assert [fact["id"] for fact in facts] == ids[:1]
    assert facts[0]["status"] == "waiting"
    assert "2 cells: 2 waiting" in command("study", "plan", path).stdout
    assert not (tmp_path / "out").exists()
    assert "is none of the plan's 2" in command("study", "run", path, "--cell", "abc").output
    assert command("study", "run", path, "--index", 2).exit_code == 1
    done = command("study", path, "seeds=1")
    assert done.exit_code == 0, done.output
    assert "1 cells: 1 done" in done.stdout
    assert (tmp_path / "out/results/report.html").is_file()
    yaml.safe_load((tmp_path / "out/cells" / ids[0] / "run/config.yaml").read_text())


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("is_small", [False, True])
def test_shipped_configs_are_planned(is_small: bool, monkeypatch, tmp_path: Path) -> None:
    """From the top of the repository, as their headers say."""
    from jaxft.study.search import TuneConfig, candidates

    monkeypatch.chdir(ROOT)
    base = ROOT / "benchmarks/data/gfn2_small.model"
    jaxft.save(tmp_path / "base.jaxft", *converted(base))
    for path in sorted((ROOT / "configs/study").glob("*.yaml")):
        kind = TuneConfig if path.stem.startswith("tune") else StudyConfig
        words = elsewhere(path)
        if words is None:
            continue
        study = load(path, words, small=is_small, kind=kind)
        study = study.model_copy(update={"base": tmp_path / "base.jaxft"})
        found = (
            plan(study)
            if isinstance(study, StudyConfig)
            else [c for d in study.datasets for r in study.recipes for c in candidates(study, d, r)]
        )
        assert len({cell.id for cell in found}) == len(found) > 1
        header = path.read_text().split("output:")[0]
        if "# Cells:" in header:
            assert f"{len(found)} {'in the small form' if is_small else '='}" in header, path


def elsewhere(path: Path) -> list[str] | None:
    """Where the data of a config are that are not shipped; None if they are not here."""
    if path.stem != "frozen-3bpa":
        return []
    folder = Path(os.environ.get("JAXFT_DATA", "")) / "raw/davkovacs+BOTNet-datasets/dataset_3BPA"
    if "JAXFT_DATA" not in os.environ or not folder.is_dir():
        return None
    train, test = folder / "train_300K.xyz", folder / "train_mixedT.xyz"
    return [f"datasets.3bpa.train=[{train}]", f"datasets.3bpa.test.mixed={test}"]


def converted(path: Path) -> tuple:
    from converters.to_jax import convert

    return convert(path)
