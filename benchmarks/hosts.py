"""One device against several, and against several processes: the same update, the same batch.

    python benchmarks/hosts.py --json                  # 1 device, 2 devices, 2 processes of 1
    python benchmarks/hosts.py --devices 4 --cells 3

CPU devices are forced ones, and every device has one core: a side of n devices is pinned to n
cores, so one device is not faster for having more. Sides are processes that wait in a read while
another has its turn. Before anything is timed all sides make the same updates, and their losses are
compared. ``ratio`` is the median time of an update on one device over that on several; efficiency
is that divided by the number of devices. Batch and frames stay the same (strong scaling).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import common
import numpy as np

MODEL = common.HERE / "data" / "gfn2_small.model"
UPDATES = 3
"""Of a turn; each ends with a look at the loss."""

SAME = {"float32": 1e-4, "float64": 1e-10}
"""Relative difference of losses beyond which nothing is timed."""


class Side:
    """Devices in one process, or in several processes of one device."""

    def __init__(self, name: str, case: argparse.Namespace, devices: int, processes: int) -> None:
        self.name, self.devices = name, devices
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        cores = sorted(os.sched_getaffinity(0))[:devices]
        self.children = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    "--child",
                    json.dumps(
                        vars(case)
                        | {
                            "own": devices // processes,
                            "processes": processes,
                            "id": i,
                            "port": port,
                            "cores": cores if processes == 1 else [cores[i % len(cores)]],
                        }
                    ),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(processes)
        ]

    def ask(self, what: str) -> list[Any]:
        """All processes of the side do it; the slowest one's time counts."""
        for child in self.children:
            assert child.stdin is not None
            child.stdin.write(what + "\n")
            child.stdin.flush()
        return [self._answer(child) for child in self.children]

    def _answer(self, child: subprocess.Popen[str]) -> Any:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit(f"a process of {self.name!r} ended; its message is above.")

    def close(self) -> None:
        for child in self.children:
            assert child.stdin is not None
            child.stdin.close()
        for child in self.children:
            child.wait()


def child(case: dict[str, Any]) -> None:
    """Make updates when told so."""
    os.sched_setaffinity(0, case["cores"])
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(common.HERE.parent))
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", case["own"])
    if case["dtype"] == "float64":
        jax.config.update("jax_enable_x64", True)
    import optax

    import jaxft
    from converters.to_jax import convert
    from jaxft import data, loss, parallel

    if case["processes"] > 1:
        address = f"127.0.0.1:{case['port']}"
        parallel.start(
            parallel.group(
                coordinator=address,
                num_processes=case["processes"],
                process_id=case["id"],
                environment={},
            )
        )
    model, params = convert(MODEL)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, case["dtype"]), params)
    frames = [data.from_atoms(atoms) for atoms in crystals(case["frames"], case["cells"])]
    mesh = parallel.mesh()
    spread = data.Spread(
        data.alone(data.prepare(frames, model), len(frames)),
        0,
        case["dtype"],
        parts=mesh.size,
        mine=parallel.mine(mesh),
    )
    weights = {"energy": 1.0, "forces": 10.0, "stress": 1.0}
    init, step = jaxft.finetune(loss.weighted(model, **weights), (), optax.adam(1e-4), mesh=mesh)
    state = parallel.replicated(mesh, init(jax.random.key(0), params))
    batch = parallel.spread(mesh, next(spread.epoch(0)))
    for _ in sys.stdin:
        losses, start = [], time.perf_counter()
        for _ in range(UPDATES):
            state, info = step(state, batch)
            losses.append(float(info["loss"]))
        seconds = (time.perf_counter() - start) / UPDATES
        shape = batch.graph.senders.shape
        print("answer " + json.dumps({"s": seconds, "losses": losses, "shape": shape}), flush=True)


def crystals(count: int, cells: int) -> list[Any]:
    """Rattled rocksalt crystals of unequal size, with random labels."""
    import ase.build

    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        repeats = (cells, cells, max(1, cells - i % 2))
        atoms = ase.build.bulk("NaCl", "rocksalt", a=5.64, cubic=True) * repeats
        atoms.positions += rng.normal(scale=0.08, size=atoms.positions.shape)
        atoms.info["REF_energy"] = -3.0 * len(atoms) + rng.normal()
        atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
        atoms.info["REF_stress"] = 0.01 * rng.normal(size=(3, 3))
        found.append(atoms)
    return found


def measure(case: argparse.Namespace) -> dict[str, Any]:
    """Seconds per update of every side, alternating, and what follows from them."""
    n = case.devices
    sides = [
        Side("1 device", case, 1, 1),
        Side(f"{n} devices", case, n, 1),
        Side(f"{n} processes", case, n, n),
    ]
    try:
        first = [side.ask("updates") for side in sides]
        expected = np.array(first[0][0]["losses"])
        for side, answers in zip(sides, first, strict=True):
            found = np.array([answer["losses"] for answer in answers])
            error = float(np.abs(found / expected - 1).max())
            if not error < SAME[case.dtype]:
                raise SystemExit(f"{side.name}: losses differ by {error:.1e}; nothing was timed.")
        rounds: dict[str, list[float]] = {side.name: [] for side in sides}
        for _ in range(case.rounds):
            for side in sides:
                rounds[side.name].append(max(answer["s"] for answer in side.ask("updates")))
    finally:
        for side in sides:
            side.close()
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    one = medians["1 device"]
    return {
        "ratio": round(one / medians[f"{n} devices"], 3),
        "ratio_processes": round(one / medians[f"{n} processes"], 3),
        "efficiency": {
            side.name: round(one / medians[side.name] / side.devices, 3) for side in sides
        },
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "spread": {name: [round(min(v), 4), round(max(v), 4)] for name, v in rounds.items()},
        "slots": {side.name: a[0]["shape"] for side, a in zip(sides, first, strict=True)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--frames", type=int, default=8, help="of a batch, over all devices")
    parser.add_argument("--cells", type=int, default=2, help="unit cells along each side")
    parser.add_argument("--dtype", choices=sorted(SAME), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    common.output_options(parser)
    case = parser.parse_args()
    if min(case.rounds, case.cells, case.frames, case.devices) < 1:
        parser.error("--rounds, --cells, --frames and --devices have to be at least 1.")
    if case.child:
        child(json.loads(case.child))
        return
    cores = len(os.sched_getaffinity(0))
    if not 2 <= case.devices <= case.frames:
        parser.error(f"--devices {case.devices} of {case.frames} frames; use 2 or more, no more.")
    if case.devices > cores and not case.json:
        print(f"warning: {case.devices} devices share {cores} cores; efficiency means little.")
    found = measure(case)
    for name, seconds in found["seconds"].items() if not case.json else ():
        print(f"{name:<14} {seconds:8.3f} s/update   efficiency {found['efficiency'][name]:.2f}")
    case.threads = min(case.devices, cores)
    more = {name: getattr(case, name) for name in ("devices", "frames", "cells", "rounds")}
    facts = common.settings(case, torch=False, model=MODEL.name, cores=cores, **more)
    key = f"{case.devices} devices {case.dtype}"
    common.finish("hosts", key, found | {"settings": facts}, case)


if __name__ == "__main__":
    main()
