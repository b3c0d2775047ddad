"""The loop: it resumes bitwise, stops early, averages, and never loses a good state."""

from __future__ import annotations

import json
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
from jaxft import data, loss, tree
from jaxft.data import Frame
from jaxft.fit import FitResult, FitSettings, NonFiniteError, fit
from jaxft.strategies import freeze

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
from jaxft.fit import FitSettings, fit
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
    tmp_path: Path, tiny: tuple, frames: list[Frame]
) -> None:
    from test_cli import write_frames

    epochs = 8
    jaxft.save(tmp_path / "tiny.jaxft", *tiny)
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
        [{k: v for k, v in row.items() if k != "seconds"} for row in lines(tmp_path / n)]
        for n in ("whole/metrics.jsonl", "killed/metrics.jsonl")
    ]
    assert rows[0] == rows[1]
    assert rows[0][-1]["valid/loss"] < rows[0][0]["valid/loss"]


@pytest.fixture
def run(tiny: tuple, frames: list[Frame], tmp_path: Path) -> Callable[..., FitResult]:
    """``run(**settings) -> FitResult`` on the tiny model, readouts only."""
    model, params = tiny
    prepared = data.prepare(frames, model)

    def run(
        tx: optax.GradientTransformation | None = None,
        train: data.Dataset = prepared,
        directory: Path = tmp_path,
        **settings: object,
    ) -> FitResult:
        return fit(
            model,
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
        )

    return run


def test_the_best_epoch_is_kept_and_patience_stops_the_run(run, params) -> None:
    # Uphill: every epoch is worse than the model as it came.
    result = run(tx=optax.sgd(-1e-4), epochs=50, patience=3, ema_decay=None)
    assert result.best_epoch == 0
    assert len(result.history) == 4
    for path, leaf in tree.flatten(result.params).items():
        np.testing.assert_array_equal(leaf, tree.flatten(params)[path])


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


def test_a_checkpoint_of_other_data_is_not_resumed(run, tiny, frames: list[Frame]) -> None:
    run(epochs=1)
    changed = replace(frames[0], energy=frames[0].energy + 1e-9)
    with pytest.raises(ValueError, match=r"another run(?s:.*)train: 8 frames"):
        run(epochs=1, train=data.prepare([changed, *frames[1:]], tiny[0]))


def test_a_finished_run_returns_what_it_returned(run) -> None:
    first, second = run(epochs=2), run(epochs=2)
    assert first.best_epoch == second.best_epoch
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_labels_stop_the_run_and_name_the_frames(
    run, tiny: tuple, frames: list[Frame], tmp_path: Path
) -> None:

    bad = replace(frames[2], forces=np.full_like(frames[2].forces, np.nan), source="bad.xyz:2")
    train = data.prepare([*frames[:2], bad], tiny[0])
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


def test_a_damaged_checkpoint_is_named(run, tmp_path: Path) -> None:
    run(epochs=1)
    (record,) = (tmp_path / "checkpoints").glob("*/progress/metadata")
    record.write_text('{"identity')
    with pytest.raises(ValueError, match=r"(?s)checkpoints.*is damaged.*start a new output"):
        run(epochs=1)
