"""Searches: what is drawn, who goes on, and that nothing is trained twice."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_cli import run as command
from test_cli import write_frames
from test_study import document, write

import jaxft
from jaxft import config as configs
from jaxft.study import results, tune
from jaxft.study.config import load
from jaxft.study.results import Result
from jaxft.study.search import Range, TuneConfig, candidates, rungs


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small, frames) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    jaxft.save(folder / "base.jaxft", *small)
    write_frames(folder / "frames.xyz", frames)
    write_frames(folder / "base.xyz", frames[:2])
    return folder


RANGES = {"optimizer.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}}


def searched(folder: Path, output: Path, **changes: object) -> TuneConfig:
    recipes = {"naive": {"recipe": [], "ranges": changes.pop("ranges", RANGES)}}
    given = {"samples": 9, "first": 1, "keep": 3, "budget": {"epochs": 9}, "recipes": recipes}
    return TuneConfig.model_validate(document(folder, output, **(given | changes)))


def test_rungs_end_with_the_budget() -> None:
    assert rungs(1, 9, 3) == [1, 3, 9]
    assert rungs(2, 9, 2) == [2, 4, 8, 9]
    assert rungs(5, 5, 3) == [5]


def test_draws_stay_in_their_range_and_fill_it() -> None:
    rng = np.random.default_rng(0)
    drawn = [Range(low=1e-4, high=1, log=True).draw(rng) for _ in range(400)]
    assert min(drawn) >= 1e-4
    assert max(drawn) <= 1
    below = np.mean(np.log10(drawn) < -2)
    assert 0.4 < below < 0.6  # half of four decades
    whole = {Range(low=1, high=4, integer=True).draw(rng) for _ in range(200)}
    assert whole == {1, 2, 3, 4}
    with pytest.raises(ValueError, match="low > 0 with log"):
        Range(low=0, high=1, log=True)


def test_a_longer_search_holds_the_shorter(folder: Path, tmp_path: Path) -> None:
    few = candidates(searched(folder, tmp_path, samples=4), "salt", "naive")
    many = candidates(searched(folder, tmp_path, samples=8), "salt", "naive")
    assert [c.id for c in many[:4]] == [c.id for c in few]
    assert len({c.id for c in many}) == 8
    assert many[0].varied == {}
    rate = float(many[1].varied["optimizer.learning_rate"])
    assert many[1].config.optimizer.learning_rate == rate
    assert {c.config.epochs for c in many} == {9}
    only = searched(folder, tmp_path, samples=9, ranges={"batch_size": [2, 3]})
    assert len(candidates(only, "salt", "naive")) == 3  # 4, as it is, and these


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"steps": 9}}, "needs `budget: {epochs"),
        ({"first": 10}, "exceed the budget"),
        ({"ranges": {}}, "at least 1"),
        ({"ranges": {"batch_size": []}}, "no values to choose from"),
        ({"ranges": {"loss.energy": [1, 2]}}, "by which candidates are compared"),
        ({"ranges": {"batch_siz": [1]}}, "did you mean 'batch_size'"),
        ({"ranges": {"epochs": [1]}}, "would undo what the study says"),
        ({"size": 1.5}, "at most 1"),
    ],
)
def test_what_is_no_search_is_refused(folder, tmp_path, changes, message) -> None:
    recipes = {"naive": {"recipe": [], "ranges": changes.pop("ranges", RANGES)}}
    given = {"samples": 9, "first": 1, "keep": 3, "budget": {"epochs": 9}, "recipes": recipes}
    path = write(tmp_path / "t.yaml", document(folder, tmp_path / "out", **(given | changes)))
    with pytest.raises(ValueError, match=message):
        candidates(load(path, kind=TuneConfig), "salt", "naive")


@pytest.fixture
def pretended(monkeypatch):
    """Runs that only write logs: the score is the distance of log10 rate from -3, and falls with
    the epochs. Tells what was asked for."""
    asked: list[tuple[str, int]] = []

    def run_until(cell, epochs):
        asked.append((cell.id, epochs))
        rate = cell.config.optimizer.learning_rate
        cell.config.output.mkdir(parents=True, exist_ok=True)
        if rate > 1e-2:
            results.save(cell.folder, Result("diverged", "loss nan"))
            return
        far = abs(math.log10(rate) + 3)
        rows = [{"epoch": e, "valid/loss": far + 1 / (1 + e)} for e in range(epochs + 1)]
        log = "".join(json.dumps(row) + "\n" for row in rows)
        (cell.config.output / "metrics.jsonl").write_text(log)
        return

    monkeypatch.setattr(tune, "run_until", run_until)
    return asked


def test_halving_keeps_the_best_and_trains_nobody_twice(folder, tmp_path, pretended) -> None:
    settings = searched(folder, tmp_path)
    planned = candidates(settings, "salt", "naive")
    (found,) = tune.search(settings, lambda line: None)
    scores = {c.id: abs(math.log10(c.config.optimizer.learning_rate) + 3) for c in planned}
    sound = [c.id for c in planned if c.config.optimizer.learning_rate <= 1e-2]
    ranked = sorted(sound, key=scores.__getitem__)
    assert found.best.cell.id == ranked[0]
    by_rung = {e: [i for i, epochs in pretended if epochs == e] for e in (1, 3, 9)}
    assert sorted(by_rung[1]) == sorted(c.id for c in planned)
    assert sorted(by_rung[3]) == sorted(ranked[:3])
    assert by_rung[9] == ranked[:1]
    assert len(found.trials) == 9
    failed = [t for t in found.trials if t.reason]
    assert len(failed) == 9 - len(sound)
    count = len(pretended)
    (again,) = tune.search(settings, lambda line: None)
    assert len(pretended) == count
    assert [t.cell.id for t in again.trials] == [t.cell.id for t in found.trials]


def test_a_search_without_survivors_says_so(folder, tmp_path, pretended) -> None:
    words = ["optimizer.learning_rate=1"]
    base = document(folder, tmp_path)["set"]
    settings = searched(folder, tmp_path, set=[*base, *words], ranges={"batch_size": [2, 3]})
    (found,) = tune.search(settings, lambda line: None)
    assert found.best is None
    assert {t.reason for t in found.trials} == {"diverged: loss nan"}


def test_the_command_writes_the_winner(folder: Path, tmp_path: Path, few_shapes) -> None:
    recipes = {"naive": {"recipe": [], "ranges": {"optimizer.learning_rate": [1e-3, 1e-4]}}}
    given = {"samples": 2, "first": 1, "keep": 2, "budget": {"epochs": 2}, "recipes": recipes}
    path = write(tmp_path / "t.yaml", document(folder, tmp_path / "out", **given))
    done = command("tune", path)
    assert done.exit_code == 0, done.output
    table = list(csv.DictReader((tmp_path / "out/results/search.csv").open()))
    assert [(row["rank"], row["epochs"]) for row in table] == [("1", "2"), ("2", "1")]
    best = configs.load(tmp_path / "out/results/best-salt-naive.yaml")
    assert best.epochs == 2
    assert results.read(tmp_path / "out/cells" / table[0]["cell"]).status == "done"
