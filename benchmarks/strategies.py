"""One training step under each strategy: what it costs beside full fine-tuning.

    python benchmarks/strategies.py --model mp0-medium --json

The step is: energy, forces and stress of a batch, gradient of the weighted E+F+S loss with respect
to what trains, Adam. Frozen leaves are not differentiated and have no optimiser state. All
strategies take turns in every round; printed are medians, and ratios to full fine-tuning. The last
line is a JSON object with the settings.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))

import jax
import optax
import torch
from common import WEIGHTS, structures
from reference import ARCHITECTURES, build

from converters.to_jax import convert
from jaxft import data, finetune, loss, tree
from jaxft.strategies import delta, elora, ewc, freeze, lora, sparse


def recipes(params: dict) -> dict[str, tuple]:
    """What is timed; the Fisher of ewc is made up, which changes no cost."""
    ones = jax.tree.map(lambda leaf: jax.numpy.ones_like(leaf), params)
    return {
        "all parameters": (),
        "freeze level 5 (products, readouts train)": (freeze(level=5),),
        "freeze level 6 (readouts train)": (freeze(level=6),),
        "lora rank 4": (lora(rank=4),),
        "elora rank 16": (elora(),),
        "delta": (delta(),),
        "sparse": (sparse(),),
        "ewc": (ewc(ones, strength=1.0),),
    }


class Run:
    """A jitted step and its state."""

    def __init__(self, objective, recipe: tuple, params: dict, batch) -> None:
        init, self._step = finetune(objective, recipe, optax.adam(1e-4))
        self.state, self.batch = init(jax.random.key(0), params), batch
        self.trained = sum(leaf.size for leaf in jax.tree.leaves(self.state.trainable))
        self.optimizer_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.opt_state))
        self.compile_seconds = self.seconds()

    def seconds(self) -> float:
        start = time.perf_counter()
        self.state, info = self._step(self.state, self.batch)
        jax.block_until_ready((self.state, info))
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="mp0-medium")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=1, help="times four crystals of 64 atoms")
    parser.add_argument("--json", action="store_true", help="only the last line")
    args = parser.parse_args()
    frames = structures(args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.model"
        torch.save(build(args.model, dtype="float32"), path)
        model, params = convert(path)
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, "float32"), params)
    dataset = data.prepare([data.from_atoms(atoms) for atoms in frames], model)
    batch = jax.device_put(next(data.epoch(dataset, len(frames))))
    objective = loss.weighted(model, **WEIGHTS)
    runs = {name: Run(objective, recipe, params, batch) for name, recipe in recipes(params).items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(run.seconds())
    medians = {name: statistics.median(values) for name, values in times.items()}
    full = medians["all parameters"]
    rows = {
        name: {
            "seconds": round(medians[name], 4),
            "ratio": round(medians[name] / full, 3),
            "spread": [round(min(times[name]), 4), round(max(times[name]), 4)],
            "trained": run.trained,
            "optimizer_MB": round(run.optimizer_bytes / 1e6, 2),
            "compile_seconds": round(run.compile_seconds, 1),
        }
        for name, run in runs.items()
    }
    if not args.json:
        print(
            f"| strategy | s per step | of full | trained numbers | optimiser MB |\n{'|---' * 5}|"
        )
        for name, row in rows.items():
            print(
                f"| {name} | {row['seconds']:.2f} | {row['ratio']:.2f} | {row['trained']:,} | "
                f"{row['optimizer_MB']:.1f} |"
            )
    settings = {
        "model": args.model,
        "parameters": tree.size(params),
        "dtype": "float32",
        "loss": "E+F+S, Adam",
        "atoms": sum(len(atoms) for atoms in frames),
        "rounds": args.rounds,
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    print(json.dumps({"settings": settings, "strategies": rows}))


if __name__ == "__main__":
    main()
