"""Phonons of the small foundation model, as it is and fine-tuned with ten frames, against DFT's.

    python benchmarks/phonons.py table                  NaCl, KCl, diamond; needs $JAXFT_DATA
    python benchmarks/phonons.py table --set NaCl --preset lora
    python benchmarks/phonons.py speed                  batched against one cell after the other
    python benchmarks/phonons.py memory                 exact Hessian of 64 atoms

``table``: ten frames of random displacements (phonopy's and phono3py's published sets) train all
parameters with the preset ``naive``, through the command ``jaxft finetune``. References:

  NaCl     FORCE_SETS of example/NaCl with BORN; the frames are example/NaCl-rd, another calculation
  KCl      harmonic force constants of example/KCl-SSCHA; frames of its set with forces below 2 eV/Å
  diamond  fitted by symfc to the frames of test/phonon4 that were not trained on

Frequencies in THz and C_V in J/mol/K come from ``jaxft evaluate phonons``; force errors in meV/Å
are those on the frames of the set that were not trained on, and for NaCl those in the displaced
cells of FORCE_SETS.

``speed``: finite displacements of a 64-atom NaCl cell without symmetry, 48 cells: all of them in
batches, against ASE's loop with jaxft's calculator, and with mace-torch's on the same weights.
``ratio`` is torch / batched. One process, turns alternate, medians; compilation is not counted.

``memory``: the peak of a fresh process that computes the exact Hessian twice, float64. ``ratio`` is
that peak over ``--limit`` GiB. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ase
import ase.build
import ase.io
import numpy as np
from common import confine, finish, output_options, settings

HERE = Path(__file__).parent
FOUNDATION = HERE / "data" / "gfn2_small.model"
FRAMES = 10
LARGEST = 2.0
"""eV/Å: frames of KCl with larger forces are left out, they are no vibrations."""

TRAINING = (
    "valid=0.1",
    "e0s=foundation",
    "loss.energy=0.0",
    "epochs=150",
    "batch_size=2",
    "ema_decay=0.99",
)
"""What is changed of a preset; the sets are given without energies, as NaCl's has none."""

CELLS = 48


def frame(cell: Any, displacement: np.ndarray, forces: np.ndarray) -> ase.Atoms:
    """A displaced supercell of phonopy with its forces as labels."""
    from jaxft.evaluate.crystals import to_ase

    atoms = to_ase(cell)
    atoms.positions += displacement
    atoms.arrays["REF_forces"] = np.asarray(forces)
    return atoms


def random_set(path: Path) -> tuple[Any, list[ase.Atoms]]:
    """phonopy's object of a set of random displacements, and its frames."""
    from jaxft.evaluate.crystals import read_crystal

    phonons = read_crystal(path).reference
    parts = zip(phonons.displacements, phonons.forces, strict=True)
    return phonons, [frame(phonons.supercell, d, f) for d, f in parts]


def nacl(data: Path, rng: np.random.Generator) -> tuple[Any, list[ase.Atoms], list[ase.Atoms]]:
    """The crystal with its reference, frames to train on, and others."""
    from jaxft.evaluate.crystals import read_crystal

    examples = data / "raw" / "phonopy+phonopy" / "example"
    _, frames = random_set(examples / "NaCl-rd")
    reference = read_crystal(examples / "NaCl", name="NaCl")
    return reference, frames[:FRAMES], []


def kcl(data: Path, rng: np.random.Generator) -> tuple[Any, list[ase.Atoms], list[ase.Atoms]]:
    """As :func:`nacl`."""
    from jaxft.evaluate.crystals import read_crystal

    folder = data / "raw" / "phonopy+phonopy" / "example" / "KCl-SSCHA"
    every = ase.io.read(data / "extxyz" / "phonopy_KCl_rd120.extxyz.gz", ":")
    calm = [a for a in every if abs(a.arrays["REF_forces"]).max() < LARGEST]
    for atoms in calm:
        atoms.info.pop("REF_energy")  # as in the other sets
    order = rng.permutation(len(calm))
    train, rest = order[:FRAMES], order[FRAMES:]
    reference = read_crystal(folder / "phonopy_fc222_JPCM2022.yaml.xz", name="KCl")
    return reference, [calm[i] for i in train], [calm[i] for i in rest]


def diamond(data: Path, rng: np.random.Generator) -> tuple[Any, list[ase.Atoms], list[ase.Atoms]]:
    """As :func:`nacl`; the reference is fitted to the frames that are not trained on."""
    from dataclasses import replace

    from jaxft.evaluate.crystals import read_crystal, solve
    from jaxft.evaluate.lattices import like

    path = data / "raw" / "phonopy+phono3py" / "test" / "phonon4"
    path = path / "phonopy_params-C-diamond.yaml.xz"
    crystal = read_crystal(path, name="diamond")
    phonons, frames = random_set(path)
    order = rng.permutation(len(frames))
    train, rest = order[:FRAMES], order[FRAMES:]
    fitted = like(phonons)
    fitted.dataset = {
        "displacements": phonons.displacements[rest],
        "forces": phonons.forces[rest],
    }
    solve(fitted)
    chosen = replace(crystal, reference=fitted)
    return chosen, [frames[i] for i in train], [frames[i] for i in rest]


SETS = {"NaCl": nacl, "KCl": kcl, "diamond": diamond}


def tune(base: Path, frames: list[ase.Atoms], preset: str, folder: Path) -> tuple[Path, float]:
    """``jaxft finetune`` with the preset; the bundle and the wall time in seconds."""
    train, config = folder / "train.xyz", folder / f"{preset}.yaml"
    ase.io.write(train, frames)
    jaxft = [sys.executable, "-m", "jaxft"]
    text = subprocess.run(
        [*jaxft, "init", "--preset", preset], check=True, capture_output=True, text=True
    ).stdout
    config.write_text(text)
    output = folder / "run"
    given = [f"model={base}", f"train={train}", f"output={output}", *TRAINING]
    start = time.perf_counter()
    subprocess.run([*jaxft, "finetune", str(config), *given], check=True, stdout=sys.stderr)
    return output / "model.jaxft", time.perf_counter() - start


def force_rmse(candidate: Any, frames: list[ase.Atoms]) -> float | None:
    """meV/Å."""
    if not frames:
        return None
    found = candidate.evaluate(frames)
    off = [o.forces - a.arrays["REF_forces"] for o, a in zip(found, frames, strict=True)]
    return 1e3 * float(np.sqrt(np.mean(np.square(off))))


def table(args: argparse.Namespace) -> None:
    """Base against fine-tuned, one result per set."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from rich.console import Console

    import jaxft
    from converters.to_jax import convert
    from jaxft.evaluate.candidate import JaxCandidate
    from jaxft.evaluate.phonons import phonons

    data = os.environ.get("JAXFT_DATA")
    if not data:
        sys.exit("error: the references are read from $JAXFT_DATA, which is not set.")
    model, params = convert(FOUNDATION)
    for name in args.set or SETS:
        crystal, train, rest = SETS[name](Path(data), np.random.default_rng(0))
        with tempfile.TemporaryDirectory() as folder:
            base = jaxft.save(Path(folder) / "base.jaxft", model, params)
            tuned, seconds = tune(base, train, args.preset, Path(folder))
            judged = [
                JaxCandidate(label, *jaxft.load(path, dtype="float64"), batch_size=4)
                for label, path in (("base", base), ("tuned", tuned))
            ]
        finding = phonons(judged, [crystal])
        if not args.json:
            Console(stderr=True).print(finding.render())
        rows: dict[str, dict[str, Any]] = {}
        for row in finding.to_dict()["rows"]:
            found = {k: v for k, v in row.items() if k not in ("model", "subject")}
            kept = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
            rows.setdefault(row["model"], {}).update(
                {k: v for k, v in kept.items() if v is not None}
            )
        for candidate in judged:
            found = force_rmse(candidate, rest)
            if found is not None:
                rows[candidate.name]["held_out_force_rmse"] = round(found, 2)
        result = {
            "ratio": round(rows["base"]["mae"] / rows["tuned"]["mae"], 2),
            "set": name,
            "models": rows,
            "units": finding.to_dict()["units"] | {"held_out_force_rmse": "meV/Å"},
            "train_frames": len(train),
            "held_out_frames": len(rest),
            "preset": args.preset,
            "changed": TRAINING,
            "seconds": round(seconds, 1),
        }
        finish("phonons", f"table {name} {args.preset}", result | made(args), args)


def speed(args: argparse.Namespace) -> None:
    """Batched against serial."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from converters.to_jax import convert
    from converters.verify import torch_calculator
    from jaxft.calculator import JaxftCalculator
    from jaxft.evaluate.candidate import AseCandidate, JaxCandidate

    model, params = convert(FOUNDATION)
    unit = ase.build.bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (2, 2, 2)
    cells = []
    for i in range(CELLS):
        atoms = unit.copy()
        atoms.positions[i // 6 % len(atoms), i % 3] += 0.01 * (-1) ** (i // 3)
        cells.append(atoms)
    theirs = torch_calculator(FOUNDATION, dtype="float64", head=None)
    sides = {
        "batched": JaxCandidate("batched", model, params, batch_size=args.batch),
        "serial": AseCandidate("serial", JaxftCalculator(model, params)),
        "torch": AseCandidate("torch", theirs),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    forces: dict[str, np.ndarray] = {}
    for round_ in range(args.rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            found = side.evaluate(cells)
            if round_:  # the first one compiles
                times[name].append(time.perf_counter() - start)
            forces[name] = np.array([one.forces for one in found])
    seconds = {name: float(np.median(found)) for name, found in times.items()}
    off = max(float(abs(forces[name] - forces["torch"]).max()) for name in sides)
    result = {
        "ratio": round(seconds["torch"] / seconds["batched"], 2),
        "ratio_serial": round(seconds["serial"] / seconds["batched"], 2),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "cells": CELLS,
        "atoms": len(unit),
        "batch": args.batch,
        "rounds": args.rounds,
        "largest_force_difference_eV_per_Å": off,
    }
    finish("phonons", "speed 64 atoms", result | made(args, dtype="float64"), args)


def memory(args: argparse.Namespace) -> None:
    """Peak of a fresh process."""
    if not args.child:
        command = [sys.executable, __file__, "memory", "--child", f"--threads={args.threads}"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(text.splitlines()[-1])
        result = {"ratio": round(found["peak_GiB"] / args.limit, 3), "limit_GiB": args.limit}
        finish("phonons", "memory 64 atoms", result | found | made(args, dtype="float64"), args)
        return
    import jax

    jax.config.update("jax_enable_x64", True)
    from converters.to_jax import convert
    from jaxft.evaluate.hessian import hessian

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    model, params = convert(FOUNDATION)
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (2, 2, 2)
    atoms.rattle(0.05, seed=0)
    before = peak()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        matrix = hessian(model, params, atoms)
        seconds.append(round(time.perf_counter() - start, 2))
    found = {
        "peak_GiB": round(peak(), 3),
        "before_GiB": round(before, 3),
        "seconds": {"first, compiled": seconds[0], "second": seconds[1]},
        "atoms": len(atoms),
        "asymmetry_eV_per_Å2": float(abs(matrix - matrix.T).max()),
    }
    print(json.dumps(found))


def made(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Settings and versions."""
    found = settings(args, torch=False, **more)
    found["versions"] |= {name: version(name) for name in ("phonopy", "symfc", "ase")}
    return found | more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("table", "speed", "memory"))
    parser.add_argument("--set", choices=sorted(SETS), action="append")
    parser.add_argument("--preset", default="naive")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="cells per batch; default 4")
    parser.add_argument("--limit", type=float, default=2.0, help="GiB; default 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    output_options(parser)
    args = parser.parse_args()
    confine(args.threads)
    {"table": table, "speed": speed, "memory": memory}[args.part](args)


if __name__ == "__main__":
    main()
