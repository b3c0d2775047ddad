"""The loop: it resumes bitwise, stops early, averages, and never loses a good state."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import jaxft
from jaxft import checkpoint, data, loss, optimizer, surgery, tree
from jaxft.checkpoint import Checkpoints
from jaxft.data import Frame
from jaxft.fit import FitResult, FitSettings, NonFiniteError, fit
from jaxft.optimizer import Plateau
from jaxft.progress import Run
from jaxft.strategies import freeze
from jaxft.timing import MEASURED

pytestmark = pytest.mark.usefixtures("few_shapes")

WEIGHTS = {"energy": 1.0, "forces": 10.0, "stress": 10.0}

SCRIPT = """
import os, sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
import jax, optax
jax.config.update("jax_enable_x64", True)
import jaxft
from jaxft import data, loss
from jaxft.data import packing
from jaxft.fit import FitSettings, fit

packing.MAX_SHAPES, packing.WORTH = 2, 0.0  # several shapes, but few: compiling costs time
folder, output, epochs = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
model, params = jaxft.load(folder / "tiny.jaxft")
frames = data.prepare(data.read(folder / "frames.xyz"), model)
weights = {"energy": 1.0, "forces": 10.0, "stress": 10.0}
settings = FitSettings(
    epochs=epochs, batch_size=3, dtype="float64", loss_weights=weights, checkpoint_every=2
)
output.mkdir(exist_ok=True)
result = fit(
    model, params, train=frames, valid=frames, loss_fn=loss.weighted(model, **weights), recipe=(),
    tx=optax.adam(optax.cosine_decay_schedule(1e-3, 24)), settings=settings, directory=output,
)
jaxft.save(output / "model.jaxft", model, result.params)
"""


def start(folder: Path, output: Path, epochs: int) -> subprocess.Popen:
    arguments = [sys.executable, "-c", SCRIPT, str(folder), str(output), str(epochs)]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_that_was_killed_resumes_bitwise(
    tmp_path: Path, small: tuple, frames: list[Frame]
) -> None:
    from test_cli import write_frames

    epochs = 12
    jaxft.save(tmp_path / "tiny.jaxft", *small)
    write_frames(tmp_path / "frames.xyz", frames)
    whole = start(tmp_path, tmp_path / "whole", epochs)
    _, problems = whole.communicate()
    assert whole.returncode == 0, problems.decode()

    killed = start(tmp_path, tmp_path / "killed", epochs)
    log = tmp_path / "killed" / "metrics.jsonl"
    while len(lines(log)) < 4:
        assert killed.poll() is None, killed.communicate()[1].decode()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert len(lines(log)) <= epochs, "killed too late to show anything"
    assert not (tmp_path / "killed" / "model.jaxft").exists()

    resumed = start(tmp_path, tmp_path / "killed", epochs)
    _, problems = resumed.communicate()
    assert resumed.returncode == 0, problems.decode()
    expected = (tmp_path / "whole" / "model.jaxft" / "params.safetensors").read_bytes()
    assert (tmp_path / "killed" / "model.jaxft" / "params.safetensors").read_bytes() == expected
    rows = [
        [{k: v for k, v in row.items() if k not in MEASURED} for row in lines(tmp_path / n)]
        for n in ("whole/metrics.jsonl", "killed/metrics.jsonl")
    ]
    assert rows[0] == rows[1]
    assert rows[0][-1]["valid/loss"] < rows[0][0]["valid/loss"]


@pytest.fixture
def run(small: tuple, frames: list[Frame], tmp_path: Path) -> Callable[..., FitResult]:
    """``run(**settings) -> FitResult`` on a model of one layer, readouts only."""
    model, params = small
    prepared = data.prepare(frames, model)

    def run(
        tx: optax.GradientTransformation | None = None,
        train: data.Dataset = prepared,
        directory: Path = tmp_path,
        further: dict | None = None,
        **settings: object,
    ) -> FitResult:
        further = dict(further or {})
        return fit(
            further.pop("model", model),
            params,
            train=train,
            valid=prepared,
            loss_fn=loss.weighted(model, **WEIGHTS),
            recipe=(freeze(except_="readouts_*/**"),),
            tx=tx or optax.adam(1e-2),
            settings=FitSettings(
                **{"epochs": 4, "batch_size": 8, "dtype": "float64", "loss_weights": WEIGHTS}
                | settings
            ),
            directory=directory,
            **further,
        )

    return run


def test_the_best_epoch_is_kept_and_patience_stops_the_run(run, small) -> None:
    # Uphill: every epoch is worse than the model as it came.
    result = run(tx=optax.sgd(-1e-4), epochs=50, patience=3, ema_decay=None)
    assert result.best_epoch == 0
    assert len(result.history) == 4
    for path, leaf in tree.flatten(result.params).items():
        np.testing.assert_array_equal(leaf, tree.flatten(small[1])[path])


def test_the_metric_chooses_the_best_epoch(run) -> None:
    result = run(metric="forces", ema_decay=None)
    values = [row["valid/forces"] for row in result.history]
    assert result.best_epoch == int(np.argmin(values)) > 0


def test_without_decay_the_average_is_the_last_value(run, tmp_path: Path) -> None:
    raw = run(ema_decay=None, directory=tmp_path / "a")
    averaged = run(ema_decay=0.0, directory=tmp_path / "b")
    slow = run(ema_decay=0.9, directory=tmp_path / "c")
    leaf = "readouts_0/linear/0e"
    close, far = (tree.flatten(r.params)[leaf] for r in (averaged, slow))
    np.testing.assert_allclose(close, tree.flatten(raw.params)[leaf], rtol=1e-14)
    assert np.abs(far - close).max() > 1e-4


def test_a_checkpoint_of_another_run_is_not_resumed(run) -> None:
    run(epochs=1)
    with pytest.raises(ValueError, match=r"(?s)another run.*batch_size: 8.*batch_size: 4"):
        run(epochs=1, batch_size=4)


def test_a_checkpoint_of_other_data_is_not_resumed(run, small, frames: list[Frame]) -> None:
    run(epochs=1)
    changed = replace(frames[0], energy=frames[0].energy + 1e-9)
    with pytest.raises(ValueError, match=r"another run(?s:.*)train: 8 frames"):
        run(epochs=1, train=data.prepare([changed, *frames[1:]], small[0]))


def test_a_finished_run_returns_what_it_returned(run) -> None:
    first, second = run(epochs=2), run(epochs=2)
    assert first.best_epoch == second.best_epoch
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_labels_stop_the_run_and_name_the_frames(
    run, small: tuple, frames: list[Frame], tmp_path: Path
) -> None:

    bad = replace(frames[2], forces=np.full_like(frames[2].forces, np.nan), source="bad.xyz:2")
    train = data.prepare([*frames[:2], bad], small[0])
    with pytest.raises(NonFiniteError, match=r"(?s)epoch 1.*bad\.xyz:2"):
        run(train=train, batch_size=1)
    assert list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"metric": "force"}, "metric"), ({"epochs": 0}, "epochs"), ({"ema_decay": 1.0}, "ema_decay")],
)
def test_impossible_settings_are_refused(settings: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        FitSettings(**{"epochs": 1, "loss_weights": WEIGHTS} | settings)


def test_saving_takes_a_small_part_of_the_time(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "PART", 0.0)  # never, but at first and at the end
    run(epochs=4, keep_checkpoints=9)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*"))
    assert kept == [0, 4]


def test_a_damaged_checkpoint_is_named(run, tmp_path: Path) -> None:
    run(epochs=1)
    (record,) = (tmp_path / "checkpoints").glob("*/progress/metadata")
    record.write_text('{"identity')
    with pytest.raises(ValueError, match=r"(?s)checkpoints.*is damaged.*start a new output"):
        run(epochs=1)


def same(a: FitResult, b: FitResult) -> bool:
    pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"ema_decay": None}, lambda: optimizer.optimizer("schedule_free", 1e-2)),
        (
            {"plateau": Plateau(factor=0.5, patience=0, threshold=0.5)},
            lambda: optimizer.optimizer("amsgrad", 1e-2, clip_norm=1.0),
        ),
        ({"accumulate": 3}, lambda: optimizer.optimizer("adam", 1e-2)),
    ],
    ids=["schedule-free", "plateau", "accumulation"],
)
def test_stopping_inside_an_epoch_and_resuming_changes_nothing(
    run, settings: dict, make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"batch_size": 1, "epochs": 3, "checkpoint_every": 2} | settings
    whole = run(tx=make(), directory=tmp_path / "whole", **settings)
    saves = []
    save = Run.save

    def dying(self: Run, checkpoints: Checkpoints) -> None:
        save(self, checkpoints)
        saves.append(self)
        if len(saves) == 3:  # epoch 0, then inside and at the end of epoch 1
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tx=make(), directory=tmp_path / "cut", **settings)
    monkeypatch.setattr(Run, "save", save)
    resumed = run(tx=make(), directory=tmp_path / "cut", **settings)
    assert same(whole, resumed)
    keys = ("epoch", "valid/loss", "train/loss", "updates")
    rows = [[{k: r.get(k) for k in keys} for r in x.history] for x in (whole, resumed)]
    assert rows[0] == rows[1]


def test_a_plateau_lowers_the_learning_rate(run) -> None:
    plateau = Plateau(factor=0.5, patience=0, threshold=0.9)
    result = run(
        tx=optimizer.optimizer("sgd", 1e-5),
        plateau=plateau,
        epochs=4,
        further={"schedule": optax.constant_schedule(1e-5)},
    )
    # of the epoch: the first sets the mark, the second misses it
    rates = [row["learning_rate"] for row in result.history]
    assert rates == [1e-5, 1e-5, 1e-5, 5e-6, 2.5e-6]


def test_accumulated_batches_make_the_update_of_one_large_batch(run, tmp_path: Path) -> None:
    """Eight frames, some without stress: in one batch, or as four batches of two, or as three of
    three, the last of them filled up."""
    results = [
        run(
            tx=optax.sgd(1e-3),
            batch_size=size,
            accumulate=n,
            ema_decay=None,
            epochs=2,
            directory=tmp_path / f"{size}",
        )
        for size, n in ((8, 1), (2, 4), (3, 4))
    ]
    assert {row["updates"] for row in results[0].history} == {0, 1, 2}
    for other in results[1:]:
        for a, b in zip(
            jax.tree.leaves(results[0].params), jax.tree.leaves(other.params), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_nothing_moves_after_an_update_that_is_not_finite(
    run, small: tuple, frames: list[Frame], tmp_path: Path
) -> None:
    """Though the loop looks at what the device found only now and then."""
    bad = replace(frames[2], forces=np.full_like(frames[2].forces, np.nan), source="bad.xyz:2")
    train = data.prepare([bad, *frames[:2], *frames[3:]], small[0])
    with pytest.raises(NonFiniteError, match=r"(?s)epoch 1, update (\d).*bad\.xyz:2") as caught:
        run(train=train, batch_size=1)
    position = int(re.search(r"update (\d)", str(caught.value))[1])
    (saved,) = (tmp_path / "checkpoints").glob("[0-9]*")
    assert int(saved.name) == position - 1 < 7


def test_as_many_checkpoints_are_kept_as_asked_for(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "PART", 1e9)  # after every epoch, however short
    run(epochs=4, keep_checkpoints=3)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*"))
    assert kept == [2, 3, 4]


def test_watched_sets_are_judged_and_may_choose_the_best_epoch(
    run, small: tuple, frames: list[Frame]
) -> None:
    watched = data.prepare(frames[:2], small[0])
    result = run(metric="memory/forces", further={"watch": {"memory": watched}}, ema_decay=None)
    values = [row["memory/forces"] for row in result.history]
    assert result.best_epoch == int(np.argmin(values))
    assert {"memory/energy", "memory/loss"} <= result.history[0].keys()
    with pytest.raises(ValueError, match=r"(?s)'other/forces' is of a set .*watched: 'memory'"):
        run(metric="other/forces", further={"watch": {"memory": watched}})


def test_the_log_says_the_same_in_both_formats(run, tmp_path: Path) -> None:
    result = run(epochs=2)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["valid/forces"]) for row in rows] == [
        row["valid/forces"] for row in result.history
    ]
    assert [row["valid/forces"] for row in lines(tmp_path / "metrics.jsonl")] == [
        row["valid/forces"] for row in result.history
    ]


def test_another_potential_is_another_run(run, small: tuple, tmp_path: Path) -> None:
    """Scale and shift are no parameters, but a checkpoint belongs to them."""
    run(epochs=1)
    other = surgery.set_scale_shift(small[0], scale=2.0, shift=0.3)
    with pytest.raises(ValueError, match=r"(?s)another run.*potential: "):
        run(epochs=1, further={"model": other})


def test_a_metric_that_nothing_is_labelled_for_stops_the_run(
    run, small: tuple, frames: list[Frame], tmp_path: Path
) -> None:
    bare = data.prepare([replace(frame, forces=None) for frame in frames], small[0])
    with pytest.raises(NonFiniteError, match=r"metric memory/forces is nan after epoch 0"):
        run(metric="memory/forces", further={"watch": {"memory": bare}})
