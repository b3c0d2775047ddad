"""One training step, torch MACE against jaxft: same weights, same batch, alternating rounds.

    python benchmarks/train_step.py --model mp0-medium --dtype float32 --json

The step is: energy, forces and stress of a batch, gradient of the weighted E+F+S loss with respect
to all parameters, Adam. Both sides are given ready batches; compilation is timed apart. Losses and
gradients of both are compared before anything is timed. The last line is a JSON object with
``ratio`` (torch time / jaxft time, medians of alternating rounds) and the settings.

torch eager spends much of its time in page faults of glibc's allocator; run once more under
``GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456``
for the ratio that a careful torch user would see.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))

import ase.build
import jax
import numpy as np
import optax
import torch
from reference import ARCHITECTURES, batch_of, build

from converters.rules import parameter_rules
from converters.to_jax import convert
from jaxft import data, finetune, loss, tree

WEIGHTS = {"energy": 1.0, "forces": 10.0, "stress": 1.0}
CRYSTALS = {"NaCl": 5.64, "LiCl": 5.13, "MgO": 4.21, "KF": 5.34}
"""Rocksalt lattice constants, Å."""


def structures(repeats: int, seed: int = 0) -> list[ase.Atoms]:
    """Rattled rocksalt crystals of 64 atoms with random labels."""
    rng = np.random.default_rng(seed)
    frames = []
    for name, a in list(CRYSTALS.items()) * repeats:
        atoms = ase.build.bulk(name, "rocksalt", a=a, cubic=True) * (2, 2, 2)
        atoms.positions += rng.normal(scale=0.08, size=atoms.positions.shape)
        atoms.info["REF_energy"] = -5.0 * len(atoms) + rng.normal()
        atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
        atoms.info["REF_stress"] = 0.01 * rng.normal(size=(3, 3))
        frames.append(atoms)
    return frames


class Torch:
    """torch MACE eager with Adam."""

    def __init__(self, model: torch.nn.Module, frames: list[ase.Atoms]) -> None:
        self.model, self.dtype = model, next(model.parameters()).dtype
        torch.set_default_dtype(self.dtype)
        self.batch = batch_of(model, frames).to_dict()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        self.counts = torch.tensor([len(atoms) for atoms in frames], dtype=self.dtype)
        self.labels = [
            torch.tensor(np.array(values), dtype=self.dtype)
            for values in (
                [atoms.info["REF_energy"] for atoms in frames],
                np.concatenate([atoms.arrays["REF_forces"] for atoms in frames]),
                [atoms.info["REF_stress"] for atoms in frames],
            )
        ]

    def loss(self) -> torch.Tensor:
        # a copy: the model stores strained positions, and with them the old graph, in its input
        out = self.model(dict(self.batch), training=True, compute_force=True, compute_stress=True)
        energy, forces, stress = self.labels
        return (
            WEIGHTS["energy"] * ((out["energy"] - energy) / self.counts).square().mean()
            + WEIGHTS["forces"] * (out["forces"] - forces).square().mean()
            + WEIGHTS["stress"] * (out["stress"] - stress).square().mean()
        )

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()


class Jaxft:
    """The same step, jitted."""

    def __init__(self, path: Path, frames: list[ase.Atoms], dtype: str) -> None:
        model, params = convert(path)
        self.rules = parameter_rules(model.config)
        self.params = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, dtype), params)
        dataset = data.prepare([data.from_atoms(atoms) for atoms in frames], model)
        self.fill = dataset.fill
        self.batch = jax.device_put(next(data.epoch(dataset, len(frames), dtype=dtype)))
        self.loss = jax.jit(jax.value_and_grad(loss.weighted(model, **WEIGHTS), has_aux=True))
        init, self._step = finetune(loss.weighted(model, **WEIGHTS), (), optax.adam(1e-4))
        self.state = init(jax.random.key(0), self.params)

    def step(self) -> None:
        self.state, info = self._step(self.state, self.batch)
        jax.block_until_ready((self.state, info))


def deviation(reference: Torch, ours: Jaxft) -> tuple[float, float]:
    """Relative differences of the loss and of the worst parameter gradient."""
    reference.optimizer.zero_grad(set_to_none=True)
    expected = reference.loss()
    expected.backward()
    (value, _), gradient = ours.loss(ours.params, ours.batch)
    flat = tree.flatten(gradient)
    named = dict(reference.model.named_parameters())
    worst = 0.0
    for rule in ours.rules:
        theirs = named[rule.name].grad.numpy()
        difference = np.abs(rule.to_tensor(flat).reshape(theirs.shape) - theirs).max()
        worst = max(worst, float(difference / np.abs(theirs).max()))
    return abs(float(value) / expected.item() - 1), worst


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="mp0-medium")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=1, help="times four crystals of 64 atoms")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true", help="only the last line")
    args = parser.parse_args()
    say = (lambda *_: None) if args.json else print
    if args.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    torch.set_num_threads(args.threads)
    frames = structures(args.repeats)
    model = build(args.model, dtype=args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.model"
        torch.save(model, path)
        ours = Jaxft(path, frames, args.dtype)
    reference = Torch(model, frames)
    loss_error, gradient_error = deviation(reference, ours)
    say(f"relative difference: loss {loss_error:.1e}, worst gradient {gradient_error:.1e}")
    limit = 1e-8 if args.dtype == "float64" else 1e-2
    if not gradient_error < limit:
        sys.exit(f"error: gradients differ by {gradient_error:.1e}; a wrong step is not timed.")
    compile_seconds = seconds(ours.step)
    reference.step(), ours.step()
    times: dict[str, list[float]] = {"torch": [], "jaxft": []}
    for _ in range(args.rounds):
        times["torch"].append(seconds(reference.step))
        times["jaxft"].append(seconds(ours.step))
    medians = {name: statistics.median(values) for name, values in times.items()}
    say(f"torch {medians['torch']:.3f} s, jaxft {medians['jaxft']:.3f} s per step")
    result = {
        "ratio": round(medians["torch"] / medians["jaxft"], 2),
        "torch_seconds": round(medians["torch"], 4),
        "jaxft_seconds": round(medians["jaxft"], 4),
        "spread": {k: [round(min(v), 4), round(max(v), 4)] for k, v in times.items()},
        "jaxft_compile_seconds": round(compile_seconds, 1),
        "gradient_deviation": float(f"{gradient_error:.1e}"),
        "model": args.model,
        "dtype": args.dtype,
        "matmul_precision": "highest",
        "trained": "all parameters, Adam, E+F+S loss",
        "atoms": sum(len(atoms) for atoms in frames),
        "edges": int(reference.batch["edge_index"].shape[1]),
        "slot_fill": round(ours.fill, 3),
        "rounds": args.rounds,
        "threads": args.threads,
        "device": jax.devices()[0].device_kind,
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
        "versions": {"python": platform.python_version(), "jax": jax.__version__}
        | {"torch": torch.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
