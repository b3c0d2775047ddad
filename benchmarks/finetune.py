"""Fine-tuning against its baselines: same frames, epochs, batch size, loss and dtype.

    python benchmarks/finetune.py                        all sets and methods, JSON to results/
    python benchmarks/finetune.py --set ethanol --skip mace

For each target set (DFT; see benchmarks/data/README.md) the table compares, on held-out frames,

  base      the foundation model with E0s estimated on the training frames, nothing trained
  scratch   the same architecture from random parameters, E0s of isolated atoms, scale and shift
            from the training frames
  naive, freeze, lora   jaxft's recipes from the foundation model
  mace      mace-torch's mace_run_train from the same foundation model, all parameters

and the forgetting: force errors on the foundation's own held-out set. All jaxft runs are the
command ``jaxft finetune`` with the settings below; mace_run_train gets the same ones. Its result is
converted and judged by the same code.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

import jaxft
from converters.to_jax import convert
from converters.to_torch import export
from jaxft import data, surgery
from jaxft.bundle import cast
from jaxft.e0s import estimate
from jaxft.evaluate.errors import errors
from jaxft.evaluate.predictions import predict_frames

HERE = Path(__file__).parent
DATA = HERE / "data"
RESULT = HERE / "results" / "finetune.json"
FOUNDATION = DATA / "gfn2_small.model"

COMMON = {"epochs": 30, "batch_size": 4, "dtype": "float32", "seed": 0}
SETS = {
    "ethanol": {"energy": 10.0, "forces": 100.0, "stress": 0.0},
    "nacl": {"energy": 10.0, "forces": 100.0, "stress": 1000.0},
}
"""Loss weights; NaCl is periodic and has stresses."""

RECIPES = {
    "naive": ([], 5e-3),
    "freeze": ([{"strategy": "freeze", "where": ["node_embedding/**", "interactions_*/**"]}], 5e-3),
    "lora": ([{"strategy": "lora", "rank": 4}], 1e-2),
}
"""Recipe and learning rate."""

SCRATCH_RATE = 1e-2
EMA = 0.99


def config(
    name: str, model: Path, output: Path, recipe: list, rate: float, e0s: str = "estimated"
) -> dict:
    """The settings of a jaxft run on the set ``name``."""
    return {
        "model": str(model),
        "output": str(output),
        "train": str(DATA / f"{name}_train.xyz"),
        "valid": 0.1,
        "e0s": e0s,
        "recipe": recipe,
        "loss": SETS[name],
        "optimizer": {
            "name": "amsgrad",
            "learning_rate": rate,
            "schedule": "cosine",
            "clip_norm": 10.0,
        },
        "ema_decay": EMA,
        **COMMON,
    }


def run_jaxft(settings: dict, folder: Path) -> float:
    """Run ``jaxft finetune``; its wall time in seconds, compilation included."""
    path = folder / f"{Path(settings['output']).name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "jaxft", "finetune", str(path)], check=True)
    return time.perf_counter() - start


def from_scratch(name: str, model: jaxft.Potential, folder: Path) -> Path:
    """A bundle of the architecture with random parameters; mace-torch's initial statistics."""
    frames = data.read([DATA / f"{name}_train.xyz", DATA / f"{name}_atoms.xyz"])
    model = surgery.set_e0s(model, data.isolated_atom_energies(frames))
    table = dict(zip(model.atomic_numbers, model.e0s[0], strict=True))
    frames = data.without_isolated_atoms(frames)
    rms = np.sqrt(np.mean(np.concatenate([f.forces.ravel() for f in frames]) ** 2))
    mean = np.mean([(f.energy - sum(table[z] for z in f.atomic_numbers)) / len(f) for f in frames])
    model = surgery.set_scale_shift(model, scale=float(rms), shift=float(mean))
    return jaxft.save(folder / f"{name}-random.jaxft", model, model.init(jax.random.key(0)))


def run_mace(name: str, folder: Path) -> tuple[Path, float]:
    """mace_run_train with the same frames, split, epochs, batch size, loss, rate and dtype."""
    train, valid = data.split(
        data.read([DATA / f"{name}_train.xyz"]), valid=0.1, seed=COMMON["seed"]
    )
    import ase.io

    images = ase.io.read(DATA / f"{name}_train.xyz", index=":")
    chosen = {frame.source for frame in valid}
    parts = {"train": [], "valid": []}
    for i, atoms in enumerate(images):
        source = f"{DATA / f'{name}_train.xyz'}:{i}"
        parts["valid" if source in chosen else "train"].append(atoms)
    assert len(parts["train"]) == len(train)
    for part, frames in parts.items():
        ase.io.write(folder / f"{name}-{part}.xyz", frames)
    # its own estimate of E0s fails on a float64 file under --default_dtype=float32
    narrow = folder / f"{name}-float32.model"
    export(cast(*convert(FOUNDATION), COMMON["dtype"]), narrow)
    weights = SETS[name]
    flags = {
        "name": name,
        "foundation_model": narrow,
        "multiheads_finetuning": False,
        "E0s": "estimated",
        "train_file": folder / f"{name}-train.xyz",
        "valid_file": folder / f"{name}-valid.xyz",
        "energy_key": "REF_energy",
        "forces_key": "REF_forces",
        "stress_key": "REF_stress",
        "loss": "stress" if weights["stress"] else "weighted",
        "energy_weight": weights["energy"],
        "forces_weight": weights["forces"],
        "stress_weight": weights["stress"],
        "compute_stress": bool(weights["stress"]),
        "lr": RECIPES["naive"][1],
        "weight_decay": 0.0,
        # the nearest to a cosine that it has: the same final rate
        "scheduler": "ExponentialLR",
        "lr_scheduler_gamma": 0.01 ** (1 / COMMON["epochs"]),
        "clip_grad": 10.0,
        "ema_decay": EMA,
        "batch_size": COMMON["batch_size"],
        "valid_batch_size": COMMON["batch_size"],
        "max_num_epochs": COMMON["epochs"],
        "default_dtype": COMMON["dtype"],
        "device": "cpu",
        "seed": COMMON["seed"],
        "work_dir": folder / f"{name}-mace",
        "model_dir": folder / f"{name}-mace",
    }
    command = [f"--{key}={value}" for key, value in flags.items()]
    start = time.perf_counter()
    program = "from mace.cli.run_train import main; main()"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *command, "--amsgrad", "--ema"], check=True
    )
    return folder / f"{name}-mace" / f"{name}.model", time.perf_counter() - start


def judge(name: str, model: jaxft.Potential, params: dict, base: jaxft.Potential) -> dict:
    """RMSE on the target's held-out frames, and of forces on the foundation's own."""
    target = data.read(DATA / f"{name}_test.xyz")
    domain = [
        frame
        for frame in data.read(DATA / "base_test.xyz")
        if set(frame.atomic_numbers.tolist()) <= set(model.atomic_numbers)
    ]
    found = errors(target, predict_frames(model, params, target)).total.rmse()
    own = surgery.set_e0s(
        model, {z: e for z, e in zip(base.atomic_numbers, base.e0s[0]) if z in model.atomic_numbers}
    )
    kept = errors(domain, predict_frames(own, params, domain)).total.rmse()
    return {**found, "base_forces": kept["forces"], "base_frames": len(domain)}


def experiment(name: str, skip: set[str], folder: Path) -> dict[str, dict]:
    """All methods on one set."""
    base, params = convert(FOUNDATION)
    bundle = jaxft.save(folder / f"{name}-base.jaxft", base, params)
    train, _ = data.split(data.read(DATA / f"{name}_train.xyz"), valid=0.1, seed=COMMON["seed"])
    shifted = surgery.set_e0s(base, estimate(base, params, train).e0s)
    found = {"base": judge(name, shifted, params, base)}
    runs = {key: (bundle, *value) for key, value in RECIPES.items()}
    runs["scratch"] = (from_scratch(name, base, folder), [], SCRATCH_RATE)
    for method, (start, recipe, rate) in runs.items():
        if method in skip:
            continue
        output = folder / f"{name}-{method}"
        # the random model's own E0s are those of isolated atoms at the target's level
        e0s = "foundation" if method == "scratch" else "estimated"
        seconds = run_jaxft(config(name, start, output, recipe, rate, e0s), folder)
        found[method] = judge(name, *jaxft.load(output / "model.jaxft"), base)
        found[method]["seconds"] = round(seconds, 1)
    if "mace" not in skip:
        path, seconds = run_mace(name, folder)
        found["mace"] = judge(name, *convert(path), base) | {"seconds": round(seconds, 1)}
    return found


def table(name: str, found: dict[str, dict], frames: int) -> Table:
    """The results of one set."""
    shown = Table(
        title=f"{name}: {frames} training frames, {COMMON['epochs']} epochs, held-out RMSE",
        title_justify="left",
    )
    for heading in ("method", "E meV/atom", "F meV/Å", "σ meV/Å³", "F on base set", "wall s"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for method, row in found.items():
        numbers = [row["energy"], row["forces"], row["stress"], row["base_forces"]]
        cells = ["–" if number is None else f"{number:.1f}" for number in numbers]
        shown.add_row(method, *cells, f"{row['seconds']:.0f}" if "seconds" in row else "–")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=sorted(SETS), action="append")
    parser.add_argument("--skip", choices=(*RECIPES, "scratch", "mace"), action="append")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    console = Console()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.set or SETS:
            found = experiment(name, set(args.skip or ()), Path(scratch))
            frames = len(data.split(data.read(DATA / f"{name}_train.xyz"), valid=0.1)[0])
            results[name] = {"train_frames": frames, "loss": SETS[name], "rmse": found}
    for name, result in results.items():
        console.print(table(name, result["rmse"], result["train_frames"]))
        rmse = result["rmse"]
        if {"naive", "scratch"} <= rmse.keys():
            for other in ("base", "scratch"):
                factor = rmse[other]["forces"] / rmse["naive"]["forces"]
                console.print(f"{name}: force RMSE of {other} / naive = {factor:.1f}")
    document = {
        "settings": COMMON
        | {"ema_decay": EMA, "optimizer": "amsgrad, cosine to 1 %, clip 10"}
        | {"recipes": RECIPES, "scratch_rate": SCRATCH_RATE},
        "results": results,
        "units": "energy meV/atom, forces meV/Å, stress meV/Å^3, seconds of wall time",
        "device": jax.devices()[0].device_kind,
        "threads": os.cpu_count(),
        "versions": {"jaxft": jaxft.__version__, "jax": jax.__version__}
        | {"python": platform.python_version()},
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
