"""Magnetic moments of held-out DFT frames, beside predicting each element's mean.

    JAXFT_DATA=... python benchmarks/moments.py

Data: the 22 frames of ``vasp_magnetic_mix`` (Fe, Co, Li-Ni-O; several levels of theory, so moments
alone are fitted: no energies, no forces). They are few, and frames of one relaxation resemble each
other. Two kinds of splits, both without any validation set: the number of epochs is fixed.

* ``trajectory``: all frames of one config_type are held out, where the others have its elements;
* ``frames``: every fourth frame of the relaxations is held out, whose neighbours in time are not.

The base is ``benchmarks/data/gfn2_small.model``, with Fe, Co, Ni and Li added as untrained copies
of its Na. The head begins at each element's mean; ``frozen`` trains the head alone, ``trained``
all. The mean that is compared with is that of the same training frames.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import jax
import numpy as np
import optax
from ase.data import atomic_numbers

import jaxft
from converters.to_jax import convert
from jaxft import data, finetune, loss, merge, surgery
from jaxft.data import Frame
from jaxft.evaluate.errors import errors
from jaxft.evaluate.predictions import predict_frames
from jaxft.strategies import freeze

HERE = Path(__file__).parent
SET = "vasp_magnetic_mix"
ADDED = ("Li", "Fe", "Co", "Ni")
LIKE = "Na"
RECIPES = {"frozen": (freeze(except_="moments/**"),), "trained": ()}
RATES = {"frozen": 1e-2, "trained": 2e-3}
EVERY = 4
BATCH = 6
DELTA = 0.01
"""µB, of the Huber error."""


def base() -> tuple[jaxft.Potential, dict]:
    model, params = convert(HERE / "data" / "gfn2_small.model")
    for symbol in ADDED:
        if atomic_numbers[symbol] not in model.atomic_numbers:
            model, params = surgery.add_element(model, params, symbol, like=LIKE, e0s=0.0)
    model, params = surgery.select_elements(model, params, ["O", *ADDED])
    return model, jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, "float32"), params)


def folds(frames: list[Frame]) -> dict[str, list[bool]]:
    """``{name: which frames are held out}``."""
    types = list(dict.fromkeys(frame.config_type for frame in frames))
    found = {}
    for name in types:
        held = [frame.config_type == name for frame in frames]
        inside, rest = (
            {z for f, h in zip(frames, held, strict=True) if h is flag for z in f.atomic_numbers}
            for flag in (True, False)
        )
        if inside <= rest:
            found[f"trajectory {name}"] = held
    places = [
        sum(f.config_type == frame.config_type for f in frames[:i])
        for i, frame in enumerate(frames)
    ]
    long = {name for name in types if sum(f.config_type == name for f in frames) >= EVERY}
    for k in range(EVERY):
        found[f"frames {k}"] = [
            frame.config_type in long and place % EVERY == k
            for frame, place in zip(frames, places, strict=True)
        ]
    return found


def fitted(
    model: jaxft.Potential, params: dict, frames: list[Frame], recipe: str, epochs: int, seed: int
) -> tuple[jaxft.Potential, dict]:
    model, params = surgery.add_moments(model, params, means=data.mean_moments(frames), seed=seed)
    train = data.prepare(frames, model)
    steps = epochs * data.num_batches(train, BATCH)
    schedule = optax.cosine_decay_schedule(RATES[recipe], steps, alpha=0.01)
    tx = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))
    objective = loss.weighted(
        model, energy=0.0, forces=0.0, moments=1.0, error="huber", delta=DELTA
    )
    init, step = finetune(objective, RECIPES[recipe], tx)
    state = init(jax.random.key(seed), params)
    for number in range(epochs):
        for batch in data.epoch(train, BATCH, seed=seed, number=number):
            state, info = step(state, batch)
    assert bool(info["is_finite"])
    return model, merge(RECIPES[recipe], state)


def write(path: Path, rows: list[dict], settings: dict) -> None:
    """The new rows, and those of other folds that the same settings gave before."""
    known = json.loads(path.read_text()) if path.exists() else {"settings": None}
    done = {row["fold"] for row in rows}
    old = known["rows"] if known["settings"] == settings else []
    merged = [*(row for row in old if row["fold"] not in done), *rows]
    merged.sort(key=lambda row: (row["recipe"], row["fold"]))
    document = {
        "unit": "mµB, mean over the atoms of the held-out frames",
        "total": totals(merged),
        "rows": merged,
        "settings": settings,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"jaxft": jaxft.__version__, "jax": jax.__version__}
        | {"python": platform.python_version()},
    }
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def totals(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Means over the held-out atoms of all folds of a kind."""
    found = {}
    for kind in ("trajectory", "frames"):
        for recipe in RECIPES:
            own = [r for r in rows if r["fold"].startswith(kind) and r["recipe"] == recipe]
            if own:
                atoms = sum(r["atoms"] for r in own)
                found[f"{kind}, {recipe}"] = {
                    key: round(sum(r["atoms"] * r[key] for r in own) / atoms, 1)
                    for key in ("mae", "mae_of_means")
                }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", help="folds whose names begin so; others stay in the file")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "moments.json")
    args = parser.parse_args()
    frames = data.read(Path(os.environ["JAXFT_DATA"]) / "extxyz" / f"{SET}.extxyz.gz")
    model, params = base()
    settings = {
        "data": SET,
        "frames": len(frames),
        "epochs": args.epochs,
        "seeds": args.seeds,
        "batch_size": BATCH,
        "learning_rate": RATES,
        "error": f"huber, {DELTA} µB",
        "dtype": "float32",
    }
    rows = []
    for name, held in folds(frames).items():
        if not name.startswith(args.only or ""):
            continue
        train = [f for f, h in zip(frames, held, strict=True) if not h]
        test = [f for f, h in zip(frames, held, strict=True) if h]
        for recipe in RECIPES:
            start, maes = time.perf_counter(), []
            for seed in range(args.seeds):
                found = fitted(model, params, train, recipe, args.epochs, seed)
                table = errors(test, predict_frames(*found, test)).total
                maes.append(table.moments.mae)
            rows.append(
                {
                    "fold": name,
                    "recipe": recipe,
                    "atoms": table.moments.values,
                    "mae": round(1e3 * float(np.mean(maes)), 1),
                    "spread": [round(1e3 * mae, 1) for mae in maes],
                    "mae_of_means": round(1e3 * table.mean_moments.mae, 1),
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        jax.clear_caches()
        write(args.output, rows, settings)
    for name, found in json.loads(args.output.read_text())["total"].items():
        print(f"{name}: {found}")


if __name__ == "__main__":
    main()
