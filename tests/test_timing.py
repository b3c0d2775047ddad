"""What a run tells of its speed, and that its programs are made before they are needed."""

import functools
import json
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_display import shown

from jaxft import compilation, data, loss
from jaxft.compilation import Ahead
from jaxft.data import packing
from jaxft.display import Display
from jaxft.fit import FitSettings, fit
from jaxft.strategies import freeze
from jaxft.timing import MEASURED, Stopwatch

WEIGHTS = {"energy": 1.0, "forces": 10.0}


class Noting(Display):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    warn = say


@pytest.fixture(scope="module")
def prepared(small, frames):
    return data.prepare(frames, small[0])


@pytest.fixture
def run(small, prepared, tmp_path, few_shapes) -> Callable:
    """A fit of three epochs in batches of two; its history and what the display was told."""

    def run(train=prepared, **options):
        display = Noting()
        result = fit(
            *small,
            train=train,
            valid=prepared,
            loss_fn=loss.weighted(small[0], **WEIGHTS),
            recipe=(freeze(except_="readouts_*/**"),),
            tx=optax.sgd(1e-3),
            settings=FitSettings(epochs=3, batch_size=2, loss_weights=WEIGHTS),
            directory=tmp_path,
            display=display,
            **options,
        )
        return result.history, display.said

    return run


def used(prepared, size, numbers, seed) -> list:
    """The shapes of all updates, in the order of their first use."""
    spread = data.Spread(data.alone(prepared, size), seed=seed, dtype="float32")
    batches = (batch for number in numbers for batch in spread.epoch(number))
    return list(dict.fromkeys(batch.graph.senders.shape for batch in batches))


def test_a_run_compiles_the_shapes_that_it_uses_and_none_after_the_first_epoch(run, prepared):
    compiled = []

    def stop(updates):
        compiled.append((updates, count.compiled + count.loaded))
        return False

    with compilation.counting() as count:
        history, said = run(stop=stop)
    shapes = len(used(prepared, 2, range(1, 4), 0)) + len(used(prepared, 2, range(1), None))
    assert [row["recompilations"] for row in history] == [0, 0, 0, 0]
    assert history[-1]["compilations"] == shapes
    assert not any("after the first epoch" in text for text in said)
    assert "programs compiled" in said[-1]
    # not only of the two functions that count their own: of the whole process
    updates = len(compiled) // 3
    assert compiled[-1][1] == compiled[2 * updates - 1][1]


def test_a_batch_of_another_dtype_is_compiled_and_reported(run, prepared, monkeypatch):
    epoch = data.Spread.epoch

    def changed(self, number, start=0):
        for batch in epoch(self, number, start):
            wrong = batch.frame.astype(np.int16)
            yield batch._replace(frame=wrong) if number == 2 else batch

    monkeypatch.setattr(data.Spread, "epoch", changed)
    history, said = run()
    found = [row["recompilations"] for row in history]
    assert found[:2] == [0, 0]
    assert found[2] == found[3] > 0
    (text,) = {text for text in said if "after the first epoch" in text and "update" in text}
    assert text.startswith("after the first epoch an update was compiled once more, for [1].frame:")
    assert "int16[1, 3], not int32[1, 3]" in text


def test_what_time_decides_is_in_every_row_of_the_log_and_nothing_else_is(run, tmp_path):
    history, _ = run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == history
    for row in rows[1:]:
        assert set(MEASURED) <= row.keys()
        assert row["atoms_per_second"] > 0
        assert row["edges_per_second"] > row["atoms_per_second"]
        assert 0 < row["computing"] <= row["seconds"]
        assert 0 <= row["waiting"] <= row["seconds"]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_planned_shapes_are_those_of_the_batches_in_their_order(
    prepared, parts, count, monkeypatch
):
    monkeypatch.setattr(packing, "WORTH", 0.0)  # several shapes even of a small set
    spread = data.Spread(data.alone(prepared, 2), seed=3, dtype="float64", parts=parts, count=count)
    epochs = [list(spread.epoch(number, 1 if number == 2 else 0)) for number in (2, 3)]
    batches = [batch for epoch in epochs for batch in epoch]
    planned = spread.planned(range(2, 4), 1)
    examples = [jax.tree.map(lambda x: (x.shape, x.dtype), spread.example(s)) for s in planned]
    expected = []
    for batch in batches:
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), batch)
        if shapes not in expected:
            expected.append(shapes)
    assert examples == expected
    assert len(planned) > 1
    first = spread.planned(range(2, 4), 1, most=1)
    assert first[0] == planned[0]
    assert sorted(first) == spread.shapes()


@functools.partial(jax.jit, donate_argnums=0)
def add(state, batch):
    return state + batch, {"sum": batch.sum()}


def test_a_loop_whose_host_is_slow_waits_and_one_whose_host_is_ahead_does_not():
    """No clock is slept on: a batch comes once the device was seen idle, or at once."""
    gate = threading.Event()

    def slow():
        for _ in range(3):
            gate.wait(0.05)
            yield jnp.ones(3)

    found = []
    for source in (slow(), [jnp.ones(3)] * 3):
        with Stopwatch() as watch:
            state, step = jnp.zeros(3), Ahead(add)
            for batch in watch.batches(source):
                state, _ = watch.update(step, state, batch)
            found.append(watch.timing())
        assert state.tolist() == [3, 3, 3]
    starved, fed = found
    assert starved.waiting >= 0.1
    assert fed.waiting < starved.waiting
    for timing in found:
        assert timing.compiling > 0
        assert timing.computing + timing.waiting <= timing.total + 1e-6


def test_nothing_was_updated_in_no_time():
    with Stopwatch() as watch:
        assert list(watch.batches([])) == []
        assert set(watch.timing()) == {0.0}


ROW = {"epoch": 1, "train/loss": 1.0, "valid/energy": 0.01, "seconds": 9.0, "computing": 4.0}


def test_waiting_is_told_where_it_is_more_than_a_little():
    def lines(waiting, **options):
        return shown(ROW | {"waiting": waiting, "atoms_per_second": 12345.6}, **options)

    heading, quiet = lines(0.1)
    assert heading.split()[-2:] == ["s/epoch", "atoms/s"]
    assert quiet.split()[-2:] == ["9.0", "12346"]
    _, told = lines(1.0)
    assert told.endswith("12346  waited for batches 20 %")
    narrow = lines(1.0, width=64)
    assert narrow[1].split()[-1] in ("9.0", "12346")
    assert narrow[2].strip() == "waited for batches 20 %"
