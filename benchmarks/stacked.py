"""K fine-tunes of one base as one vmapped step, against K steps one after another.

    python benchmarks/stacked.py                 K = 4, 8; JSON to results/stacked.json

The step is that of `jaxft finetune` on batches of four frames: energy, forces and stress, gradient
of what trains, Adam, average. Members differ in their learning rate. Both take turns; medians of
rounds, after compilation, which is told apart. `difference` is the largest one between what a
member trained in either way, relative to how far it moved; `tests/test_stacked.py` has float64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxft
from converters.to_jax import convert
from jaxft import config as configs
from jaxft import data, inputs, train
from jaxft.fit import advancing
from jaxft.objective import objective
from jaxft.study import stacked

HERE = Path(__file__).parent
DATA = HERE / "data"
RECIPES: dict[str, list] = {
    "all parameters": [],
    "freeze level 5": [{"strategy": "freeze", "level": 5}],
    "freeze level 6": [{"strategy": "freeze", "level": 6}],
    "lora rank 4": [{"strategy": "lora", "rank": 4}],
}
UPDATES = 6
"""Per turn."""


def measure(name: str, recipe: list, members: int, rounds: int, base: Path) -> dict[str, float]:
    """Seconds of one update of all members, both ways, and of compiling each."""
    settings = [
        configs.validate(
            {
                "model": base,
                "output": "unused",
                "train": DATA / f"{name}_train.xyz",
                "e0s": "estimated",
                "recipe": recipe,
                "loss": {"energy": 10, "forces": 100, "stress": 1000 if name == "nacl" else 0},
                "optimizer": {"learning_rate": 1e-4 * (k + 1)},
                "batch_size": 4,
                "epochs": 1,
            },
            "benchmark",
        )
        for k in range(members)
    ]
    first = settings[0]
    given = inputs.read(first, Console(quiet=True))
    loss_fn = objective(first, given.model)
    batch = next(iter(data.epoch(given.train.dataset, 4, dtype=first.compute_dtype)))
    begun = [stacked._begun(config, given, loss_fn) for config in settings]
    axes = stacked._axes([moving.state.frozen for moving in begun])
    joined = stacked._joined(begun, axes)
    together = stacked._advance(first, given, loss_fn, axes, is_shared=True)
    rates = jnp.asarray([config.optimizer.learning_rate for config in settings])

    def alone(moving: Any, batch: Any, rate: Any) -> Any:
        _, step = train.finetune(loss_fn, given.recipe, stacked._optimizer(first, rate))
        return advancing(step, first.ema_decay)(moving, batch)

    one = jax.jit(alone, donate_argnums=0)

    def turn(is_together: bool) -> float:
        nonlocal joined
        began = time.perf_counter()
        for _ in range(UPDATES):
            if is_together:
                joined, info = together(joined, batch, rates, {})
            else:
                for k in range(members):
                    begun[k], info = one(begun[k], batch, rates[k])
        jax.block_until_ready((joined, begun, info))
        return time.perf_counter() - began

    compiling = {side: turn(side) for side in (True, False)}
    seconds = {side: [] for side in (True, False)}
    for _ in range(rounds):
        for side in (True, False):
            seconds[side].append(turn(side) / UPDATES)
    start = [stacked._begun(config, given, loss_fn) for config in settings]
    members_of = [stacked._member(joined, axes, k) for k in range(members)]
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    return {
        "together_ms": 1e3 * medians[True],
        "one_after_another_ms": 1e3 * medians[False],
        "ratio": medians[False] / medians[True],
        "difference": max(map(difference, start, members_of, begun)),
        "first_turn_together_s": compiling[True],
        "first_turn_alone_s": compiling[False],
    }


def difference(start: Any, together: Any, alone: Any) -> float:
    """Norm of the difference of two trained states over the norm of how far the second moved."""
    states = [jax.device_get(moving.state.trainable) for moving in (start, together, alone)]
    first, one, other = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state)]) for state in states
    )
    return float(np.linalg.norm(one - other) / np.linalg.norm(other - first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", choices=RECIPES, action="append")
    parser.add_argument("--set", choices=("ethanol", "nacl"), action="append")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "stacked.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = jaxft.save(Path(folder) / "base.jaxft", *convert(DATA / "gfn2_small.model"))
        for name in args.set or ("ethanol", "nacl"):
            for recipe in args.recipe or RECIPES:
                for members in args.members:
                    found = measure(name, RECIPES[recipe], members, args.rounds, base)
                    rows.append({"set": name, "recipe": recipe, "members": members, **found})
                    print(json.dumps(rows[-1]), flush=True)
                    jax.clear_caches()
    document = {
        "rows": rows,
        "settings": {"batch_size": 4, "dtype": "float32", "rounds": args.rounds},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "threads": os.cpu_count(),
        "versions": {"jaxft": jaxft.__version__, "jax": jax.__version__}
        | {"python": platform.python_version()},
    }
    args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
