"""Neighbour lists made by several processes."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
from rich.console import Console

import jaxft
from jaxft import config, data, inputs
from jaxft.data import Frame, workers
from jaxft.data import neighbours as program
from jaxft.data.neighbours import neighbours
from jaxft.data.workers import neighbour_lists

R_MAX = 4.5
DEADLINE = 30.0
"""s to wait for what takes a fraction of one."""


@pytest.fixture
def eager(monkeypatch):
    """Processes are started after one frame, and sent few frames at a time."""
    monkeypatch.setattr(workers, "TRIAL", 0.0)
    monkeypatch.setattr(workers, "SHARE", 1e-9)
    monkeypatch.setattr(workers, "CHUNK", 8)


@pytest.fixture
def started(monkeypatch):
    """The processes that were started."""
    found, start = [], workers._start

    def recorded():
        found.append(start())
        return found[-1]

    monkeypatch.setattr(workers, "_start", recorded)
    return found


def boundaries():
    """Frames of 1 to 6 atoms with all kinds of boundaries, some atoms without neighbours."""
    rng = np.random.default_rng(0)
    frames = []
    for pbc in itertools.product([False, True], repeat=3):
        for n in (1, 3, 6):
            cell = np.eye(3) * rng.uniform(4.0, 7.0, 3) + rng.normal(scale=0.3, size=(3, 3))
            positions = rng.uniform(-0.2, 1.2, (n, 3)) @ cell
            frames.append(
                Frame(np.ones(n, int), positions, cell, pbc, source=f"a.xyz:{len(frames)}")
            )
    return frames


def test_lists_of_several_processes_are_bitwise_those_of_one(eager, started):
    frames = boundaries()
    found = neighbour_lists(frames, R_MAX, workers=2)
    assert len(started) == 2
    assert sum(len(edges.senders) for edges in found) > 100
    for edges, frame in zip(found, frames, strict=True):
        for made, expected in zip(edges, neighbours(frame, R_MAX), strict=True):
            assert made.dtype == expected.dtype
            assert made.shape == expected.shape
            assert made.tobytes() == expected.tobytes()
    assert all(process.poll() is not None for process in started)


def test_the_error_is_that_of_the_first_frame_that_is_refused(eager, started):
    frames = boundaries()
    twice = replace(frames[-1], positions=np.zeros((6, 3)), source="twice")
    flat = replace(frames[-2], cell=np.zeros((3, 3)), source="flat")
    frames[9], frames[20] = twice, flat
    with pytest.raises(ValueError, match="twice: atoms") as expected:
        [neighbours(frame, R_MAX) for frame in frames]
    with pytest.raises(ValueError, match="twice: atoms") as caught:
        neighbour_lists(frames, R_MAX, workers=2)
    assert str(caught.value) == str(expected.value)
    assert caught.type is expected.type
    assert [process.poll() for process in started] == [-signal.SIGKILL] * 2


def test_a_process_that_dies_is_one_error_that_says_so(eager, monkeypatch):
    start = workers._start

    def dead():
        process = start()
        process.kill()
        return process

    monkeypatch.setattr(workers, "_start", dead)
    with pytest.raises(
        ChildProcessError, match=r"lists of a\.xyz:1 to .* was killed, as .*memory.*\n.*workers: 1"
    ):
        neighbour_lists(boundaries(), R_MAX, workers=2)


def test_a_program_that_cannot_start_is_an_error_and_no_endless_wait(eager, monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(7)")
    monkeypatch.setattr(program, "__file__", str(broken))
    with pytest.raises(ChildProcessError, match="ended with exit code 7"):
        neighbour_lists(boundaries(), R_MAX, workers=2)


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, []), (0.02, [(87, 3)])])
def test_processes_are_started_where_they_pay(monkeypatch, seconds, expected):
    """Of 100 frames that take so long each, how many are shared by how many."""
    clock = itertools.count()
    monkeypatch.setattr(workers, "perf_counter", lambda: seconds * next(clock))
    monkeypatch.setattr(workers, "cores", lambda: 8)
    shared = []
    monkeypatch.setattr(workers, "_shared", lambda f, r, n: shared.append((len(f), n)) or [])
    neighbour_lists(boundaries()[:1] * 100, R_MAX)
    assert shared == expected


def test_one_worker_or_one_core_starts_nothing(eager, monkeypatch, started):
    neighbour_lists(boundaries(), R_MAX, workers=1)
    monkeypatch.setattr(workers, "cores", lambda: 1)
    neighbour_lists(boundaries(), R_MAX)
    assert not started
    with pytest.raises(ValueError, match="workers=0 leaves nobody"):
        neighbour_lists(boundaries(), R_MAX, workers=0)


@pytest.mark.parametrize("cache", [None, "lists"])
def test_datasets_and_mixtures_say_how_many(model, tmp_path, cache):
    where = None if cache is None else tmp_path / cache
    with pytest.raises(ValueError, match="workers=0 leaves nobody"):
        data.prepare(boundaries(), model, cache=where, workers=0)
    with pytest.raises(ValueError, match="workers=-1 leaves nobody"):
        data.mixture(boundaries(), model, size=2, cache=where, workers=-1)


def test_a_config_says_how_many(tiny, tmp_path, monkeypatch):
    jaxft.save(tmp_path / "base.jaxft", *tiny)
    water = ase.build.molecule("H2O")
    water.info["REF_energy"] = -1.0
    water.arrays["REF_forces"] = np.zeros((3, 3))
    ase.io.write(tmp_path / "water.xyz", [water] * 2)
    seen = []
    monkeypatch.setattr("jaxft.inputs.preflight", lambda *_, **__: None)  # would compile
    monkeypatch.setattr(
        "jaxft.data.cache.neighbour_lists",
        lambda frames, r_max, *, workers: seen.append(workers) or neighbour_lists(frames, r_max),
    )
    said = {
        "model": str(tmp_path / "base.jaxft"),
        "output": str(tmp_path / "run"),
        "train": str(tmp_path / "water.xyz"),
        "valid": str(tmp_path / "water.xyz"),
        "e0s": "foundation",
        "epochs": 1,
        "dtype": "float64",
        "workers": 3,
    }
    inputs.read(config.validate(said, "a config"), Console(quiet=True))
    assert seen == [3, 3]
    with pytest.raises(config.ConfigError, match=r"workers: .* greater than or equal to 1"):
        config.validate(said | {"workers": 0}, "a config")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_there_are_as_many_as_cores_that_may_be_used(eager, monkeypatch):
    counts = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 8})
    monkeypatch.setattr(workers, "_shared", lambda f, r, count: counts.append(count) or [])
    neighbour_lists(boundaries(), R_MAX)
    neighbour_lists(boundaries(), R_MAX, workers=2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(1000)))
    neighbour_lists(boundaries(), R_MAX)
    assert counts == [3, 2, workers.MOST]


def test_the_program_imports_neither_jax_nor_jaxft():
    code = f"import runpy, sys; runpy.run_path({program.__file__!r}); print(*sys.modules)"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    names = set(done.stdout.split())
    assert "matscipy.neighbours" in names
    assert not {name for name in names if name.startswith(("jax", "torch"))}


SCRIPT = """
import signal

import numpy as np
from jaxft.data import Frame, workers

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent ignores
print("begun", flush=True)
workers.TRIAL, workers.SHARE, workers.CHUNK = 0.0, 1e-9, 100
rng = np.random.default_rng(0)
frames = [Frame(np.ones(50, int), rng.uniform(0, 9, (50, 3)), 9 * np.eye(3), (True,) * 3)] * 50
workers.neighbour_lists(frames, 4.0, workers=2)
print("once", flush=True)
while True:
    workers.neighbour_lists(frames * 100, 4.0, workers=2)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are listed in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_script_without_main_guard_runs_once_and_leaves_no_process(tmp_path, number):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    root = Path(workers.__file__).parents[2]
    script = subprocess.Popen(
        [sys.executable, path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
        start_new_session=True,
    )
    try:
        assert script.stdout.readline() == "begun\n"
        assert script.stdout.readline() == "once\n"
        wait_for(lambda: len(children(script.pid)) == 2)
        pids = children(script.pid)
        sessions = [os.getsid(pid) for pid in pids]
        os.killpg(script.pid, number)  # as a terminal does; it must reach the script alone
        output, errors = script.communicate(timeout=DEADLINE)
    finally:
        script.kill()
        script.wait()
    assert script.pid not in sessions
    assert output == ""  # nobody began anew
    assert script.returncode == -number
    assert "BrokenPipe" not in errors
    wait_for(lambda: not any(map(runs, pids)))


def wait_for(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children(pid):
    found = [list_.read_text().split() for list_ in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for part in found for child in part]


def runs(pid):
    """Whether there is such a process and it is no zombie."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
