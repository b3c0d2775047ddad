"""Logs of a run: what a reader finds after any sequence of starts, rows and kills."""

import csv
import json
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.logs import Csv, JsonLines, Logs, TensorBoard, Wandb

ROWS = [
    {"epoch": 0, "is_best": True, "valid/energy": 0.5, "seconds": 1.0},
    {"epoch": 1, "is_best": False, "valid/energy": 0.25, "seconds": 2.0, "train/loss": 3.5},
    {"epoch": 2, "is_best": True, "valid/energy": 0.125, "seconds": 2.0, "replay/forces": 0.75},
]


def read_json(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


FILES = {"metrics.jsonl": (JsonLines, read_json), "metrics.csv": (Csv, read_csv)}


@pytest.fixture(params=FILES)
def log(request, tmp_path):
    """(a new logger of the same file, the rows now in the file)"""
    kind, read = FILES[request.param]
    path = tmp_path / "deep" / request.param
    return lambda: kind(path), lambda: read(path)


def test_rows_can_be_read_while_the_run_goes_on(log):
    make, read = log
    logger = make()
    logger.start(())
    for i, row in enumerate(ROWS):
        logger.log(row)
        assert len(read()) == i + 1
    logger.close()
    logger.close()


def test_a_resumed_run_leaves_the_same_file_as_one_that_was_not_killed(log, tmp_path):
    make, read = log
    logger = make()
    logger.start(())
    for row in ROWS:
        logger.log(row)
    whole = read()
    logger.log({"epoch": 3, "seconds": 9.0, "never/again": 1.0})  # then killed, not checkpointed
    again = make()
    again.start(ROWS[:2])
    assert len(read()) == 2
    again.log(ROWS[2])
    assert read() == whole
    assert [path.name for path in (tmp_path / "deep").iterdir() if path.name.startswith(".")] == []


def test_a_log_that_was_not_started_refuses_rows(log):
    make, _ = log
    with pytest.raises(ValueError, match=r"has not been started.*\n.*start\(history\)"):
        make().log(ROWS[0])
    make().close()


def test_json_lines_hold_what_was_logged(tmp_path):
    logger = JsonLines(tmp_path / "log.jsonl")
    logger.start(ROWS[:1])
    logger.log(ROWS[1])
    assert read_json(logger.path) == ROWS[:2]


def test_numbers_that_json_lacks_become_null_and_arrays_become_numbers(tmp_path):
    logger = JsonLines(tmp_path / "log.jsonl")
    logger.start(())
    logger.log({"epoch": np.int64(4), "a": np.nan, "b": -np.inf, "c": jnp.float32(0.5)})
    assert read_json(logger.path) == [{"epoch": 4, "a": None, "b": None, "c": 0.5}]


def test_a_column_that_appears_later_is_empty_in_earlier_rows(tmp_path):
    logger = Csv(tmp_path / "log.csv")
    logger.start(ROWS[:1])
    for row in ROWS[1:]:
        logger.log(row)
    logger.log({"epoch": 3})
    rows = read_csv(logger.path)
    columns = ["epoch", "is_best", "valid/energy", "seconds", "train/loss", "replay/forces"]
    assert list(rows[0]) == columns
    assert [row["train/loss"] for row in rows] == ["", "3.5", "", ""]
    assert [row["replay/forces"] for row in rows] == ["", "", "0.75", ""]
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]


def test_a_name_with_a_comma_stays_one_column(tmp_path):
    logger = Csv(tmp_path / "log.csv")
    logger.start([{"epoch": 0, 'Pt, "111"/forces': 0.5}])
    assert read_csv(logger.path) == [{"epoch": "0", 'Pt, "111"/forces': "0.5"}]


class Recorder:
    def __init__(self, *, fails=False):
        self.fails, self.calls = fails, []

    def start(self, history):
        if self.fails:
            raise OSError("disk full")
        self.calls.append(("start", len(history)))

    def log(self, row):
        self.calls.append(("log", row["epoch"]))

    def close(self):
        self.calls.append(("close",))


def test_logs_pass_everything_to_every_logger():
    both = Recorder(), Recorder()
    logs = Logs(both)
    logs.start(ROWS[:1])
    logs.log(ROWS[1])
    logs.close()
    for logger in both:
        assert logger.calls == [("start", 1), ("log", 1), ("close",)]


def test_a_logger_that_cannot_start_stops_the_run_and_the_started_ones_are_closed():
    first, last = Recorder(), Recorder()
    with pytest.raises(OSError, match="disk full"):
        Logs([first, Recorder(fails=True), last]).start()
    assert first.calls == [("start", 0), ("close",)]
    assert last.calls == []


@pytest.mark.parametrize(
    ("package", "extra", "make"),
    [
        ("tensorboardX", "tensorboard", lambda path: TensorBoard(path)),
        ("wandb", "wandb", lambda path: Wandb("project", None, path)),
    ],
)
def test_an_absent_package_is_an_error_before_the_run_that_names_the_extra(
    package, extra, make, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}.*\n.*jaxft\[{extra}\]"):
        make(tmp_path)


def test_a_package_that_lacks_one_of_its_own_is_not_called_absent(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("import module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ModuleNotFoundError, match="module_that_is_not_there, which wandb imports"):
        Wandb("project", None, tmp_path)


def scalars(directory):
    """{(name, step): value} of all event files, read record by record."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in directory.glob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [((v.tag, event.step), v.simple_value) for v in event.summary.value]
            data = data[12 + length + 4 :]
    assert len(dict(found)) == len(found), "a scalar was written twice"
    return dict(found)


def test_tensorboard_holds_each_epoch_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboardX")
    first = TensorBoard(tmp_path)
    first.start(())
    for row in ROWS:
        first.log(row)
    foreign = tmp_path / "events.out.tfevents.1.other"
    foreign.write_bytes(b"")
    again = TensorBoard(tmp_path)
    again.start(ROWS[:2])
    again.log(ROWS[2])
    again.close()
    assert foreign.exists()
    expected = {(k, row["epoch"]): v for row in ROWS for k, v in row.items() if k != "epoch"}
    assert scalars(tmp_path) == expected


def test_wandb_keeps_the_id_of_a_run_that_is_resumed(tmp_path):
    pytest.importorskip("wandb")
    ids = []
    for history in ((), ROWS[:2]):
        logger = Wandb("tests", "a run", tmp_path, {"x": 1}, "offline")
        logger.start(history)
        logger.log(ROWS[len(history)])
        ids.append(logger.id)
        logger.close()
        logger.close()
    assert ids[0] == ids[1]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) >= 1


class FakeRun:
    """What we use of a run of wandb, whose server has the first ``step`` epochs."""

    def __init__(self, step):
        self.step, self.rows = step, []

    def log(self, row, step, commit):
        assert commit
        self.rows.append((step, row))
        self.step = step + 1

    def finish(self):
        self.rows.append("finished")


def test_wandb_is_not_sent_what_the_server_has(tmp_path, monkeypatch):
    run, asked = FakeRun(step=1), {}
    fake = type("Fake", (), {"init": staticmethod(lambda **kw: asked.update(kw) or run)})
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger = Wandb("project", "a run", tmp_path, {"epochs": 3})
    logger.start(ROWS[:2])
    logger.log({**ROWS[2], "array": jnp.float32(0.5)})
    logger.close()
    assert [entry[0] for entry in run.rows[:-1]] == [1, 2]
    assert run.rows[1][1] == {**ROWS[2], "array": 0.5}
    assert run.rows[-1] == "finished"
    assert (asked["resume"], asked["id"], asked["mode"]) == ("allow", logger.id, "online")
