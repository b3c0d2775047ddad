"""A whole fine-tune, ``jaxft finetune`` against ``mace_run_train``, from process start to exit.

    python benchmarks/end_to_end.py --set ethanol --seeds 3 --json
    python benchmarks/end_to_end.py --set nacl --foundation mp0-medium      timing only
    python benchmarks/end_to_end.py --quick

Both get the same training and validation frames (files of DFT labels, see benchmarks/data), the
same foundation model, epochs, batch size, dtype, seed, loss, optimiser (amsgrad), rate with
exponential decay to 1 %, EMA and "estimated" E0s; all parameters train. Gradients are not clipped:
mace_run_train makes the Bessel frequencies of a foundation a parameter that no optimiser moves and
whose gradient nothing zeroes, and that growing number is part of the norm which it clips by
(``--clip`` to see it). The last frames are left out that would not fill a batch, since it drops
them. jaxft's foundation is restricted to the elements of the frames first, as mace_run_train does
by itself: that rescales tables over elements by the root of their number, and Adam moves small
weights further. Its rate falls after every epoch, ours with every update; ours starts half an epoch
higher, so that both have the same mean of its logarithm. What is timed is
what a user waits for: imports, data, compilation, training, validation, whatever each writes at the
end. jaxft finds no compiled programs on disk, unless ``--warm`` does the same run once before.
The test errors of both are judged by the same code, that of ``jaxft evaluate errors``, on frames
that neither has seen.

Runs alternate, seed by seed; ``mace_run_train`` runs with glibc's default allocator (``ratio``) and
tuned in its favour (``ratio_tuned``, see ``common.py``). The last line is a JSON object: medians
over the seeds, and errors with their standard deviation over the seeds. With a foundation other
than ``shipped`` weights are random and errors mean nothing; they are not computed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import yaml
from common import (
    FORMS,
    MALLOCS,
    MODELS,
    Case,
    Child,
    Side,
    build,
    confine,
    finish,
    output_options,
    ratios,
    seconds,
    settings,
)

DATA = Path(__file__).parent / "data"
SHIPPED = DATA / "gfn2_small.model"
LOSSES = {
    "ethanol": {"energy": 10.0, "forces": 100.0, "stress": 0.0},
    "nacl": {"energy": 10.0, "forces": 100.0, "stress": 1000.0},
}
"""Loss weights by set; NaCl is periodic and has stresses."""

RATES = {"shipped": 5e-3, "random": 1e-4}
"""Learning rates at the start."""

FINAL = 0.01
"""Of the rate, in the last epoch."""

EMA, VALID = 0.99, 0.1
JUDGED = 10
"""Epochs; in fewer, rates that fall by the epoch or by the update are not much alike."""
QUICK = {"epochs": 2, "frames": 24, "seeds": 1}
FULL = {"epochs": 30, "frames": None, "seeds": 1}


@dataclass(frozen=True)
class Run:
    """What both sides are told."""

    name: str
    """Of the set."""
    folder: Path
    model: Path
    """The foundation as torch file, in the dtype of the run."""
    bundle: Path
    """The same as bundle."""
    epochs: int
    batch_size: int
    dtype: str
    seed: int
    rate: float
    clip: float | None

    def part(self, kind: str) -> Path:
        """The file of training or validation frames."""
        return self.folder / f"{self.name}-{kind}-{self.seed}.xyz"


class Desk(Side):
    """What is not timed: models are prepared and results judged, in a process that has jaxft."""

    def __init__(self) -> None:
        import jaxft  # noqa: F401

        super().__init__()

    def foundation(self, source: Path, name: str, dtype: str, folder: Path) -> tuple[Path, Path]:
        """The model as torch file, and with a set's elements alone as bundle, both in ``dtype``.

        mace_run_train's own estimate of E0s fails on a float64 file under --default_dtype=float32,
        and is not used if a file has the elements of the frames alone.
        """
        import jaxft
        from converters.to_jax import convert
        from converters.to_torch import export
        from jaxft import surgery
        from jaxft.bundle import cast

        elements = {
            z for atoms in ase.io.read(DATA / f"{name}_train.xyz", ":") for z in atoms.numbers
        }
        paths = folder / "foundation.model", folder / "foundation.jaxft"
        model, params = cast(*convert(source), dtype)
        export((model, params), paths[0])
        jaxft.save(paths[1], *surgery.select_elements(model, params, sorted(map(int, elements))))
        return paths

    def split(self, run: Run, frames: int | None) -> dict[str, int]:
        """Write the files of :meth:`Run.part`; how many frames each holds."""
        from jaxft import data

        source = DATA / f"{run.name}_train.xyz"
        images = ase.io.read(source, index=":" if frames is None else f":{frames}")
        chosen = {
            frame.source
            for frame in data.split(data.read(source)[: len(images)], valid=VALID, seed=run.seed)[1]
        }
        parts: dict[str, list] = {"train": [], "valid": []}
        for i, atoms in enumerate(images):
            parts["valid" if f"{source}:{i}" in chosen else "train"].append(atoms)
        del parts["train"][len(parts["train"]) // run.batch_size * run.batch_size :]
        for kind, members in parts.items():
            ase.io.write(run.part(kind), members)
        return {kind: len(members) for kind, members in parts.items()}

    def judge(self, name: str, path: Path) -> dict[str, float]:
        """RMSE on the test set: meV/atom, meV/Å, meV/Å³."""
        import jaxft
        from converters.to_jax import convert
        from jaxft import data
        from jaxft.evaluate.errors import errors
        from jaxft.evaluate.predictions import predict_frames

        model, params = convert(path) if path.is_file() else jaxft.load(path)
        frames = data.without_isolated_atoms(data.read(DATA / f"{name}_test.xyz"))
        found = errors(frames, predict_frames(model, params, frames)).total.rmse()
        return {key: value for key, value in found.items() if value is not None}


def jaxft_command(run: Run, output: Path) -> list[str]:
    """``jaxft finetune``, its config written."""
    config = {
        "model": str(run.bundle),
        "output": str(output),
        "train": str(run.part("train")),
        "valid": str(run.part("valid")),
        "e0s": "estimated",
        "loss": LOSSES[run.name],
        "optimizer": {
            "name": "amsgrad",
            "learning_rate": run.rate * FINAL ** (-0.5 / run.epochs),
            "schedule": "exponential",
            "final": FINAL,
            "clip_norm": run.clip,
        },
        "ema_decay": EMA,
        "epochs": run.epochs,
        "batch_size": run.batch_size,
        "dtype": run.dtype,
        "seed": run.seed,
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "jaxft", "finetune", str(path)]


def mace_command(run: Run, output: Path) -> list[str]:
    """``mace_run_train`` with the same settings, without its plots."""
    weights = LOSSES[run.name]
    flags = {
        "name": run.name,
        "foundation_model": run.model,
        "multiheads_finetuning": False,
        "E0s": "estimated",
        "train_file": run.part("train"),
        "valid_file": run.part("valid"),
        "energy_key": "REF_energy",
        "forces_key": "REF_forces",
        "stress_key": "REF_stress",
        "loss": "stress" if weights["stress"] else "weighted",
        "energy_weight": weights["energy"],
        "forces_weight": weights["forces"],
        "stress_weight": weights["stress"],
        "compute_stress": bool(weights["stress"]),
        "lr": run.rate,
        "weight_decay": 0.0,
        "scheduler": "ExponentialLR",
        "lr_scheduler_gamma": FINAL ** (1 / run.epochs),
        "clip_grad": run.clip,
        "ema_decay": EMA,
        "batch_size": run.batch_size,
        "valid_batch_size": run.batch_size,
        "max_num_epochs": run.epochs,
        "default_dtype": run.dtype,
        "device": "cpu",
        "seed": run.seed,
        "plot": False,
        "work_dir": output,
        "model_dir": output,
    }
    program = "from mace.cli.run_train import main; main()"
    options = [f"--{key}={value}" for key, value in flags.items()]
    return [sys.executable, "-W", "ignore", "-c", program, *options, "--amsgrad", "--ema"]


def wall(command: Sequence[str], log: Path, **environment: str) -> float:
    """Seconds that a process takes, whose allocator settings are those given; output to ``log``."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GLIBC_TUNABLES", "MALLOC_"))}
    with log.open("w") as file:

        def call() -> None:
            done = subprocess.run(
                command,
                env=clean | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
            if done.returncode:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                sys.exit(f"{tail}\nerror: {command[:4]} … ended with {done.returncode}; see above.")

        return seconds(call)


def runs_of(run: Run, malloc: str, *, warm: bool) -> dict[str, tuple[float, Path]]:
    """Wall seconds and result of every side, one after another."""
    threads = str(len(os.sched_getaffinity(0)))
    found = {}
    for side in MALLOCS[malloc]:
        output = run.folder / f"{side}-{run.seed}"
        environment = {"OMP_NUM_THREADS": threads}
        if FORMS[side]:
            environment["GLIBC_TUNABLES"] = FORMS[side]
        took = wall(mace_command(run, output), run.folder / f"{side}.log", **environment)
        found[side] = took, output / f"{run.name}.model"
    cache = run.folder / f"cache-{run.seed}"
    cache.mkdir(mode=0o700)
    output = run.folder / f"jaxft-{run.seed}"
    for _ in range(2 if warm else 1):  # another seed has other batches, and so other programs
        shutil.rmtree(output, ignore_errors=True)
        command = jaxft_command(run, output)
        took = wall(command, run.folder / "jaxft.log", JAXFT_XLA_CACHE=str(cache))
    found["jaxft"] = took, output / "model.jaxft"
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation, None of a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "mean": round(statistics.fmean(values), 3),
        "std": None if deviation is None else round(deviation, 3),
        "values": [round(value, 3) for value in values],
    }


def arguments() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--set", choices=sorted(LOSSES), default="ethanol")
    found.add_argument("--foundation", choices=("shipped", *MODELS), default="shipped")
    found.add_argument("--epochs", type=int, help=f"default {FULL['epochs']}")
    found.add_argument("--frames", type=int, help="only the first so many; default all")
    found.add_argument("--batch-size", type=int, default=4)
    found.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    found.add_argument("--seeds", type=int, help="0, 1, …; default 1 of them")
    found.add_argument("--malloc", choices=MALLOCS, default="both")
    found.add_argument("--clip", type=float, help="norm of gradients; default no clipping")
    found.add_argument("--warm", action="store_true", help="jaxft's programs are on disk already")
    found.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    found.add_argument("--quick", action="store_true", help="tiny, to try the script")
    output_options(found)
    args = found.parse_args()
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(args.epochs, args.seeds, args.batch_size, args.frames or 10) < 1:
        found.error("--epochs, --seeds, --batch-size and --frames have to be at least 1.")
    confine(args.threads)
    return args


def main() -> None:
    args = arguments()
    say = (lambda *_: None) if args.json else print
    is_shipped = args.foundation == "shipped"
    is_judged = is_shipped and args.epochs >= JUDGED
    walls: dict[str, list[float]] = {}
    rmse: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch, Child(Desk) as desk:
        folder = Path(scratch)
        source = SHIPPED
        if not is_shipped:
            source = build(Case(args.foundation, args.dtype, folder)).torch_file
        model, bundle = desk.call("foundation", source, args.set, args.dtype, folder)
        rate = RATES["shipped" if is_shipped else "random"]
        # files of both packages into the system's cache: else the first run alone would read them
        warm_up = [sys.executable, "-c", "import mace.cli.run_train, jaxft.cli"]
        wall(warm_up, folder / "imports.log")
        for seed in range(args.seeds):
            run = Run(
                args.set,
                folder,
                model,
                bundle,
                args.epochs,
                args.batch_size,
                args.dtype,
                seed,
                rate,
                args.clip,
            )
            frames = desk.call("split", run, args.frames)
            for side, (took, path) in runs_of(run, args.malloc, warm=args.warm).items():
                walls.setdefault(side, []).append(took)
                say(f"seed {seed}: {side:12s} {took:8.1f} s")
                if is_judged:
                    for name, value in desk.call("judge", args.set, path).items():
                        rmse.setdefault(name, {}).setdefault(side, []).append(value)
                        say(f"    {name:8s} {value:8.2f}")
    medians = {side: statistics.median(values) for side, values in walls.items()}
    errors: dict[str, Any] | str = {
        name: {side: spread(values) for side, values in sides.items()}
        for name, sides in rmse.items()
    }
    if not is_shipped:
        errors = "not judged: the foundation's weights are random, this is timing only"
    elif not is_judged:
        errors = f"not judged: in fewer than {JUDGED} epochs the two schedules differ"
    result = {
        **ratios(medians),
        "wall_seconds": {side: round(value, 2) for side, value in medians.items()},
        "wall_seconds_by_seed": {s: [round(v, 2) for v in values] for s, values in walls.items()},
        "test_rmse": errors,
        "units": "meV/atom, meV/Å, meV/Å³",
        "set": args.set,
        "foundation": args.foundation,
        "frames": frames,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "optimizer": f"amsgrad, {rate:g} falling exponentially to {FINAL:.0%}",
        "clip_norm": args.clip,
        "ema_decay": EMA,
        "loss": LOSSES[args.set],
        "seeds": args.seeds,
        "rounds": args.seeds,
        "discarded": 0,
        "jaxft_programs": "on disk already" if args.warm else "compiled in the run",
        "device": "cpu",
        **settings(args),
    }
    key = f"{args.set} {args.foundation} {args.dtype} {args.epochs} epochs"
    key += " warm" if args.warm else ""
    key += f" clip {args.clip:g}" if args.clip else ""
    finish("end_to_end", key + ("" if args.malloc == "both" else f" {args.malloc}"), result, args)


if __name__ == "__main__":
    main()
