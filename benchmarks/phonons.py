"""Phonons of the small foundation model, as it is and fine-tuned with ten frames, against DFT's.

    python benchmarks/phonons.py table                  all sets; needs $JAXFT_DATA
    python benchmarks/phonons.py table --set NaCl --preset lora
    python benchmarks/phonons.py speed                  batched against one cell after the other
    python benchmarks/phonons.py agreement              finite, exact, torch: one model
    python benchmarks/phonons.py memory                 exact Hessian of 64 atoms

``table``: ten frames of random displacements (phonopy's and phono3py's published sets) train all
parameters with the preset ``naive``, through the command ``jaxft finetune``. References:

  NaCl     FORCE_SETS of example/NaCl with BORN; the frames are example/NaCl-rd, another calculation
  KCl      harmonic force constants of example/KCl-SSCHA; frames of its set with forces below 2 eV/Å
  diamond  fitted by symfc to the 90 frames of test/phonon4 that were not trained on
  Si       the same, 990 frames of 8 atoms: a cell smaller than the interactions, alike for all
  MgO      the same, 90 frames; the base knows no Mg, which starts as a copy of Li: its row is no
           model of MgO, and all that "tuned" knows of Mg are the ten frames

Frequencies in THz and C_V in J/mol/K come from ``jaxft evaluate phonons``; force errors in meV/Å
are those on the frames of the set that were not trained on, and for NaCl those in the displaced
cells of FORCE_SETS.

``speed``: finite displacements of a 64-atom NaCl cell without symmetry, 48 cells of the model in
``--model``, float64: all of them in
batches, against ASE's loop with jaxft's calculator, and with mace-torch's on the same weights.
``ratio`` is torch / batched. One process, turns alternate, medians; compilation is not counted.

``agreement``: phonons of NaCl (2x2x2 primitive cells, float64) of the model in ``--model`` by
finite displacements, by the exact Hessian, and by phonopy driven by ASE calculators, jaxft's and
mace-torch's on the same file. Largest differences of frequencies over a 5x5x5 mesh, THz; residuals
of the acoustic sum rule before it is imposed, eV/Å²; and group velocities next to Γ against ω / q
there, km/s. ``ratio`` is torch's difference over 1e-4 THz. Exits with 1 where a limit is broken.

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
from common import MODELS, Case, build, confine, finish, output_options, settings

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


def fitted(
    path: Path, name: str, rng: np.random.Generator
) -> tuple[Any, list[ase.Atoms], list[ase.Atoms]]:
    """As :func:`nacl`; the reference is fitted to the frames that are not trained on."""
    from dataclasses import replace

    from jaxft.evaluate.crystals import read_crystal, solve
    from jaxft.evaluate.lattices import like

    crystal = read_crystal(path, name=name)
    phonons, frames = random_set(path)
    order = rng.permutation(len(frames))
    train, rest = order[:FRAMES], order[FRAMES:]
    harmonic = like(phonons)
    harmonic.dataset = {
        "displacements": phonons.displacements[rest],
        "forces": phonons.forces[rest],
    }
    solve(harmonic)
    chosen = replace(crystal, reference=harmonic)
    return chosen, [frames[i] for i in train], [frames[i] for i in rest]


def diamond(data: Path, rng: np.random.Generator) -> tuple[Any, list[ase.Atoms], list[ase.Atoms]]:
    """As :func:`fitted`."""
    folder = data / "raw" / "phonopy+phono3py" / "test" / "phonon4"
    return fitted(folder / "phonopy_params-C-diamond.yaml.xz", "diamond", rng)


def silicon(data: Path, rng: np.random.Generator) -> tuple[Any, list[ase.Atoms], list[ase.Atoms]]:
    """As :func:`fitted`, in cells of eight atoms."""
    folder = data / "raw" / "phonopy+phono3py" / "test"
    return fitted(folder / "phono3py_params-Si111-rd.yaml.xz", "Si", rng)


def mgo(data: Path, rng: np.random.Generator) -> tuple[Any, list[ase.Atoms], list[ase.Atoms]]:
    """As :func:`fitted`."""
    folder = data / "raw" / "phonopy+phono3py" / "test"
    return fitted(folder / "phono3py_params_MgO-222rd-444rd.yaml.xz", "MgO", rng)


SETS = {"NaCl": nacl, "KCl": kcl, "diamond": diamond, "Si": silicon, "MgO": mgo}
NEW = {"MgO": ("Mg", "Li")}
"""An element that the base lacks, and the one that it starts as a copy of."""


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
    from jaxft import surgery
    from jaxft.evaluate.candidate import JaxCandidate
    from jaxft.evaluate.phonons import phonons

    data = os.environ.get("JAXFT_DATA")
    if not data:
        sys.exit("error: the references are read from $JAXFT_DATA, which is not set.")
    model, params = convert(FOUNDATION)
    for name in args.set or SETS:
        crystal, train, rest = SETS[name](Path(data), np.random.default_rng(0))
        start = model, params
        if name in NEW:
            new, old = NEW[name]
            start = surgery.add_element(model, params, new, like=old, e0s=0.0)
        with tempfile.TemporaryDirectory() as folder:
            base = jaxft.save(Path(folder) / "base.jaxft", *start)
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
            "new_element": NEW.get(name),
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

    model, params = convert(args.model)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    unit = ase.build.bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (2, 2, 2)
    cells = []
    for i in range(args.cells):
        atoms = unit.copy()
        atoms.positions[i // 6 % len(atoms), i % 3] += 0.01 * (-1) ** (i // 3)
        cells.append(atoms)
    theirs = torch_calculator(args.model, dtype="float64", head=None)
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
        "cells": args.cells,
        "atoms": len(unit),
        "batch": args.batch,
        "rounds": args.rounds,
        "largest_force_difference_eV_per_Å": off,
        "model": args.model.stem,
    }
    finish(
        "phonons", f"speed 64 atoms {args.model.stem}", result | made(args, dtype="float64"), args
    )


LIMITS = {"finite_exact_THz": 1e-3, "jaxft_torch_THz": 1e-4, "velocity_km/s": 1e-2}


def agreement(args: argparse.Namespace) -> None:
    """One model's phonons by every way, with the limits that they must keep."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from converters.to_jax import convert
    from converters.verify import torch_calculator
    from jaxft.calculator import JaxftCalculator
    from jaxft.evaluate.candidate import AseCandidate, JaxCandidate
    from jaxft.evaluate.crystals import crystal_of
    from jaxft.evaluate.phonon_tasks import Options, ground_of, solve_all
    from jaxft.evaluate.spectra import DIRECTIONS, NEAR, acoustic_velocities, spectrum

    model, params = convert(args.model)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    own = JaxCandidate("batched", model, params, batch_size=args.batch)
    serial = AseCandidate("serial", JaxftCalculator(model, params))
    theirs = AseCandidate("torch", torch_calculator(args.model, dtype="float64", head=None))
    crystal = crystal_of(ase.build.bulk("NaCl", "rocksalt", a=5.64), "NaCl", (2, 2, 2))
    plans = {
        "finite": (own, Options(distance=args.distance)),
        "exact": (own, Options(method="hessian")),
        "serial": (serial, Options()),
        "torch": (theirs, Options()),
    }
    solved = {}
    for name, (candidate, options) in plans.items():
        solved[name] = solve_all(candidate, {"NaCl": ground_of(crystal, options)}, options)["NaCl"]
    found = {name: spectrum(one.phonons, [5, 5, 5]).frequencies for name, one in solved.items()}

    def off(a: str, b: str) -> float:
        return float(abs(found[a] - found[b]).max())

    exact = solved["exact"].phonons
    velocities = acoustic_velocities(exact)
    units = DIRECTIONS / np.linalg.norm(DIRECTIONS, axis=1)[:, None]
    near = exact.run_qpoints(NEAR * units @ np.asarray(exact.primitive.cell).T).frequencies
    acoustic = np.sort(near[:, :3], axis=1)
    is_real = acoustic > 0  # of imaginary ones phonopy says 0
    slopes = abs(velocities - 0.1 * acoustic / NEAR)[is_real]
    result = {
        "ratio": off("serial", "torch") / LIMITS["jaxft_torch_THz"],
        "finite_exact_THz": off("finite", "exact"),
        "jaxft_torch_THz": off("serial", "torch"),
        "velocity_km/s": float(slopes.max(initial=0)),
        "acoustic_modes_compared": int(is_real.sum()),
        "sum_rule_eV_per_Å2": {name: one.sum_rule for name, one in solved.items()},
        "omega_max_THz": float(found["exact"].max()),
        "omega_min_THz": float(found["exact"].min()),
        "sound_km/s": [float(velocities.min()), float(velocities.max())],
        "distance_Å": args.distance,
        "model": Path(args.model).name,
        "limits": LIMITS,
    }
    name = f"agreement {Path(args.model).stem}"
    finish("phonons", name, result | made(args, dtype="float64"), args)
    broken = [key for key, limit in LIMITS.items() if not result[key] < limit]
    if broken:
        sys.exit(f"error: beyond the limits: {', '.join(broken)}.")


def memory(args: argparse.Namespace) -> None:
    """Peak of a fresh process."""
    if not args.child:
        command = [sys.executable, __file__, "memory", "--child", f"--threads={args.threads}"]
        command.append(f"--model={args.model}")
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(text.splitlines()[-1])
        result = {"ratio": round(found["peak_GiB"] / args.limit, 3), "limit_GiB": args.limit}
        own = args.model == FOUNDATION
        name = "memory 64 atoms" if own else f"memory 64 atoms {args.model.stem}"
        finish("phonons", name, result | found | made(args, dtype="float64"), args)
        return
    import jax

    jax.config.update("jax_enable_x64", True)
    from converters.to_jax import convert
    from jaxft.evaluate.hessian import hessian

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    model, params = convert(args.model)
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
    parser.add_argument("part", choices=("table", "speed", "agreement", "memory"))
    parser.add_argument("--set", choices=sorted(SETS), action="append")
    parser.add_argument("--preset", default="naive")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="cells per batch; default 4")
    parser.add_argument(
        "--model", default=FOUNDATION, help=f"torch file; or random weights of {', '.join(MODELS)}"
    )
    parser.add_argument("--distance", type=float, default=1e-3, help="finite, Å; default 0.001")
    parser.add_argument("--cells", type=int, default=CELLS, help="of speed; default 48")
    parser.add_argument("--limit", type=float, default=2.0, help="GiB; default 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    output_options(parser)
    args = parser.parse_args()
    confine(args.threads)
    part = {"table": table, "speed": speed, "agreement": agreement, "memory": memory}[args.part]
    with tempfile.TemporaryDirectory() as folder:
        if args.model in MODELS:
            built = build(Case(args.model, "float32", Path(folder))).torch_file
            args.model = built.rename(built.with_stem(args.model))
        args.model = Path(args.model)
        part(args)


if __name__ == "__main__":
    main()
