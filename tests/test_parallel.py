"""Many devices, many processes: the same updates as one, and a run that moves between them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import jaxft
from jaxft import data, parallel, run
from jaxft.cli import app
from jaxft.data import Frame, Spread
from jaxft.data.accumulate import deal
from jaxft.fit import Preempted

SAME = 1e-10
"""Relative: other sums of the same float64 numbers, after 21 updates."""

UPDATES = 21

SCRIPT = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
import numpy as np, optax
import jaxft
from jaxft import data, loss, parallel, tree
from jaxft.data import packing
from jaxft.fit import FitSettings, Preempted, fit
from jaxft.progress import Run
from jaxft.strategies import l2sp
from jaxft.timing import MEASURED

packing.MAX_SHAPES, packing.WORTH = 2, 0.0  # several shapes, but few: compiling costs time
folder, runs, address = Path(sys.argv[1]), json.loads(sys.argv[3]), sys.argv[4:]
if address:
    group = parallel.group(
        coordinator=address[0], num_processes=2, process_id=int(address[1]), timeout=60,
        environment={},
    )
    print(parallel.start(group))
    me, said = jax.process_index(), ["", ""]
    try:
        with parallel.together("trying"):
            if me == 1:
                raise OSError("nothing there")
    except parallel.Refused as error:
        said[0] = str(error)
    parallel.check_agreement({"seed": 1})
    try:
        parallel.check_agreement({"seed": me})
    except parallel.Refused as error:
        said[1] = str(error)
    assert said[0] == ("trying failed in process 1; its message says why.", "nothing there")[me]
    assert said[1].startswith("process 1 has other settings")
jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
model, params = jaxft.load(folder / "small.jaxft")
weights = {"energy": 1.0, "forces": 10.0, "stress": 10.0}
frames = data.read(folder / "frames.xyz") * 2
frames = [
    replace(
        frame,
        energy=None if i % 5 == 2 else frame.energy,
        forces=None if i % 4 == 1 else frame.forces,
        weight=1 + i % 3,
    )
    for i, frame in enumerate(frames)
]
train, valid = (data.prepare(part, model) for part in (frames[:13], frames[11:]))
save, losses = Run.save, {}

def noting(run, checkpoints):
    before = run.progress.epoch * 3
    losses.update({before + i: x for i, x in enumerate(run.progress.losses)})
    if is_saved and is_stopping:
        save(run, checkpoints)

Run.save = noting
for name, devices, cut, ends in runs:
    output, is_saved, is_stopping = folder / name, name.startswith("moved"), False
    if not output.exists() or not is_saved:
        losses.clear()
    output.mkdir(exist_ok=True)
    settings = FitSettings(
        epochs=7, batch_size=5, dtype="float64", loss_weights=weights, checkpoint_every=1
    )
    with parallel.preemption() as asked:
        def stop(updates):
            if updates == cut and jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            globals()["is_stopping"] = asked(updates)
            return is_stopping
        try:
            result = fit(
                model, params, train=train, valid=valid, recipe=(l2sp(1e-2),), directory=output,
                loss_fn=loss.weighted(model, **weights), tx=optax.adam(1e-3), settings=settings,
                mesh=parallel.mesh(devices), stop=stop,
            )
        except Preempted as error:
            print(f"{name} stopped at {cut}: {error}")
            assert ends == "stops"
            continue
    assert ends == "finishes"
    found = {
        "losses": [losses[i] for i in range(len(losses))],
        "history": [{k: v for k, v in r.items() if k not in MEASURED} for r in result.history],
        "params": {k: np.ravel(v).tolist() for k, v in tree.flatten(result.params).items()},
    }
    (folder / f"{name}-{jax.process_index()}.json").write_text(json.dumps(found))
"""

ACCUMULATED = """
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)
import sys
from pathlib import Path
import jax.numpy as jnp, numpy as np, optax
import jaxft
from jaxft import data, parallel
from jaxft.data import Spread
from jaxft.strategies import Strategy

def loss(params, batch):
    energy = (params["a"] * batch.n_atoms - batch.labels.energy) ** 2
    forces = jnp.sum((params["b"] * batch.graph.species[:, None] - batch.labels.forces) ** 2, -1)
    terms = {
        "energy": jnp.sum(batch.weights.energy * energy) / batch.totals.energy,
        "forces": jnp.sum(batch.weights.forces * forces) / batch.totals.forces,
    }
    return sum(terms.values()), terms

folder = Path(sys.argv[1])
model, _ = jaxft.load(folder / "small.jaxft")
train = data.alone(data.prepare(data.read(folder / "frames.xyz") * 3, model), 5)
leash = Strategy(name="leash", penalty=lambda params, consts, batch: 0.5 * params["a"] ** 2)
params, key = {"a": jnp.array(0.3), "b": jnp.array(0.1)}, jax.random.key(0)
mesh = parallel.mesh()
assert mesh.size == 4
spread = Spread(train, seed=1, dtype="float64", count=3, parts=4, mine=parallel.mine(mesh))
init, step = jaxft.finetune(loss, (leash,), optax.sgd(1e-4), accumulate=3, mesh=mesh)
plain_init, plain = jaxft.finetune(loss, (leash,), optax.sgd(1e-4))
state, like = parallel.replicated(mesh, init(key, params)), plain_init(key, params)
for number in range(3):
    for update, batch in enumerate(spread.epoch(number)):
        chosen = np.concatenate([x for part in spread.frames(number, update) for x in part])
        whole = data.pack(train.dataset, chosen, data.Shape(400, 3000, 25), "float64")
        state, info = step(state, parallel.spread(mesh, batch))
        like, expected = plain(like, whole)
        assert info.keys() == expected.keys()
        for name in info:
            np.testing.assert_allclose(info[name], expected[name], rtol=1e-12, err_msg=name)
assert int(state.step) == 6
mean = Strategy(name="mean", penalty=lambda p, c, b: jnp.zeros(()), reads_batch=True)
try:
    jaxft.finetune(loss, (mean,), optax.sgd(1e-4), mesh=mesh)
except ValueError as error:
    assert "accumulate=1 on 4 devices" in str(error)
else:
    raise AssertionError("a mean over a batch was spread")
"""


def start(folder: Path, devices: int, runs: list, *address: object) -> subprocess.Popen:
    """``runs``: (name, devices of each process, update to be stopped after, how it ends)."""
    arguments = [str(folder), str(devices), json.dumps(runs), *map(str, address)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small: tuple, frames: list[Frame]) -> Path:
    from test_cli import write_frames

    folder = tmp_path_factory.mktemp("parallel")
    jaxft.save(folder / "small.jaxft", *small)
    write_frames(folder / "frames.xyz", frames)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict:
    """The run on one device, and those on several of one process."""
    runs = [
        ("one", 1, None, "finishes"),
        ("four", 4, None, "finishes"),
        ("moved", 4, 5, "stops"),
        ("moved", 2, 11, "stops"),
        ("moved", 1, None, "finishes"),
    ]
    finished = start(folder, 4, runs)
    output, _ = finished.communicate()
    assert finished.returncode == 0, output
    return read(folder / "one-0.json")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def assert_same(found: dict, expected: dict) -> None:
    assert len(expected["losses"]) == UPDATES
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=SAME)
    for row, like in zip(found["history"], expected["history"], strict=True):
        assert row.keys() == like.keys()
        np.testing.assert_allclose(list(row.values()), list(like.values()), rtol=SAME)
    for path, leaf in expected["params"].items():
        np.testing.assert_allclose(
            found["params"][path], leaf, rtol=SAME, atol=SAME * np.abs(leaf).max(), err_msg=path
        )


def test_four_devices_follow_the_curve_of_one(folder: Path, one: dict) -> None:
    """Frames of unequal size, with missing labels and weights, and a penalty."""
    assert one["history"][-1]["valid/loss"] < 0.5 * one["history"][0]["valid/loss"]
    assert_same(read(folder / "four-0.json"), one)


def test_a_run_moves_from_four_devices_to_two_to_one(folder: Path, one: dict) -> None:
    """SIGTERM ends it after five and eleven updates, inside an epoch; another number goes on."""
    assert_same(read(folder / "moved-0.json"), one)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_of_two_devices_follow_the_curve_of_one(folder: Path, one: dict) -> None:
    """SIGTERM to the second stops both after the same update."""
    runs = [("moved-processes", 2, 8, "stops"), ("moved-processes", 2, None, "finishes")]
    address = f"127.0.0.1:{free_port()}"
    both = [start(folder, 2, runs, address, i) for i in (0, 1)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
    first, second = (read(folder / f"moved-processes-{i}.json") for i in (0, 1))
    assert first == second
    assert_same(first, one)
    log = (folder / "moved-processes" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == list(range(8))


def test_accumulated_and_spread_the_update_is_that_of_one_batch(folder: Path) -> None:
    """Three batches on four devices; the last update of an epoch is filled up."""
    finished = subprocess.run(
        [sys.executable, "-c", ACCUMULATED, str(folder)], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def many(small: tuple, frames: list[Frame]) -> data.Mixture:
    return data.alone(data.prepare(frames * 5, small[0]), 8)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2])
def test_an_update_has_the_same_frames_on_any_number_of_devices(
    many: data.Mixture, parts: int, count: int
) -> None:
    spread, alone = (Spread(many, 3, "float32", count=count, parts=n) for n in (parts, 1))
    assert spread.num_updates == alone.num_updates
    for number in range(2):
        seen = []
        for update in range(spread.num_updates):
            places, expected = (s.frames(number, update) for s in (spread, alone))
            assert [len(part) for part in places] == [len(expected[0])] * parts
            for batch, whole in enumerate(expected[0]):
                dealt = np.concatenate([part[batch] for part in places])
                assert sorted(dealt) == sorted(whole)
                seen += dealt.tolist()
        assert sorted(seen) == list(range(len(many)))


@pytest.mark.parametrize("parts", [2, 8])
def test_all_parts_of_an_update_have_one_of_six_shapes(many: data.Mixture, parts: int) -> None:
    spread = Spread(many, 0, "float32", parts=parts)
    shapes = set()
    for number in range(3):
        for batches in spread.batches(number):
            own = {(b.graph.n_node, *b.graph.senders.shape, b.graph.n_graph) for (b,) in batches}
            assert len(own) == 1
            shapes |= own
    known = {(s.n_node, s.n_row, many.dataset.row_width, s.n_graph) for s in spread.shapes()}
    assert shapes <= known
    assert len(known) <= 6


def test_a_process_packs_its_own_parts_of_the_same_plan(many: data.Mixture) -> None:
    whole, first, second = (
        Spread(many, 0, "float32", parts=4, mine=mine) for mine in (None, [0, 1], [2, 3])
    )
    for batch, *halves in zip(*(s.epoch(1) for s in (whole, first, second)), strict=True):
        np.testing.assert_array_equal(batch.frame, np.concatenate([h.frame for h in halves]))
        np.testing.assert_array_equal(
            batch.graph.vectors, np.concatenate([h.graph.vectors for h in halves])
        )


def test_parts_cost_about_the_same_and_none_exceeds_its_bound() -> None:
    """The last frame of the largest part came when that part had least: (sum / n + largest)."""
    rng = np.random.default_rng(0)
    for parts in (2, 3, 7):
        costs = rng.lognormal(sigma=1.5, size=60)
        frames = rng.permutation(60)[:40]
        dealt = deal(frames, costs, parts)
        assert sorted(np.concatenate(dealt)) == sorted(frames)
        loads = [costs[part].sum() for part in dealt]
        assert max(loads) <= costs[frames].sum() / parts + costs[frames].max()
        assert max(loads) - min(loads) <= costs[frames].max()


def test_more_devices_than_frames_are_refused(many: data.Mixture) -> None:
    with pytest.raises(ValueError, match=r"batch_size=8 .* over 9 of them(?s:.*)at least 9"):
        Spread(many, 0, "float32", parts=9)
    with pytest.raises(ValueError, match=r"devices=2, but process 0 has 1 \(cpu\); use 1 to 1"):
        parallel.mesh(2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator", "a:1"], "--coordinator without --num-processes, --process-id"),
        (["--num-processes", "2", "--process-id", "0"], "without --coordinator"),
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"], "ids 0 to 1"),
        (["--coordinator", "a:1", "--num-processes", "0", "--process-id", "0"], "no group"),
        (["--coordinator", "here", "--num-processes", "2", "--process-id", "1"], "HOST:PORT"),
        (
            [
                "--coordinator",
                "a:1",
                "--num-processes",
                "2",
                "--process-id",
                "1",
                "--no-distributed",
            ],
            "contradict --no-distributed",
        ),
        (["--start-timeout", "0"], "waits for nobody"),
    ],
)
def test_flags_that_name_no_group_are_refused_first(flags: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["finetune", "no-such-config.yaml", *flags])
    assert result.exit_code == 1
    assert message in result.output


def test_a_coordinator_that_does_not_answer_is_named(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    result = CliRunner().invoke(app, ["init", "--preset", "naive"])
    config.write_text(result.output)
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    result = CliRunner().invoke(
        app, ["finetune", str(config), *flags, "--process-id", "1", "--start-timeout", "1"]
    )
    assert result.exit_code == 1
    assert "no answer from the coordinator 127.0.0.1:" in result.output


@pytest.mark.parametrize(
    ("environment", "distributed", "found_by"),
    [
        ({}, None, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None, None),
        ({"SLURM_STEP_NUM_TASKS": "4"}, None, "SLURM, SLURM_STEP_NUM_TASKS=4"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, False, None),
        ({"SLURM_NTASKS": "4"}, None, None),  # a batch script that starts no step
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None, "Open MPI, OMPI_COMM_WORLD_SIZE=2"),
        ({}, True, "--distributed"),
    ],
)
def test_several_processes_are_found_where_a_launcher_started_them(
    environment: dict[str, str], distributed: bool | None, found_by: str | None
) -> None:
    group = parallel.group(distributed=distributed, environment=environment)
    assert (group.found_by if group else None) == found_by


def test_a_run_that_was_asked_to_stop_exits_with_143(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise Preempted("asked to stop")

    monkeypatch.setattr(run, "finetune", stopped)
    config = tmp_path / "config.yaml"
    config.write_text(CliRunner().invoke(app, ["init", "--preset", "naive"]).output)
    result = CliRunner().invoke(app, ["finetune", str(config)])
    assert result.exit_code == 143
    assert "stopped: asked to stop" in result.output
