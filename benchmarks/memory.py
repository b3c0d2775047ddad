"""Peak resident memory of a training step and of inference, torch MACE against jaxft.

    python benchmarks/memory.py --model mp0-small --json
    python benchmarks/memory.py --atoms 50000 --json       one large system, jaxft's ASE calculator
    python benchmarks/memory.py --quick

Every figure is that of a fresh process, which imports its packages, loads the model, and does three
training steps, or three times energies, forces and stresses. jaxft's includes what its compiler
takes. Stated are the peak and what it was right after the imports. ``ratio`` is jaxft / torch of
training, peaks whole, where less is better; ``ratio_above_imports`` is that without what the
imports took, ``ratio_inference`` and so on the same of inference; ``…_tuned`` are against torch
with its allocator tuned (see ``common.py``).

With ``--atoms`` a rattled rocksalt crystal is given to the calculator twice. ``ratio`` then is the
peak as a fraction of ``--limit``; a process that needs more is ended, and the script ends with exit
code 1. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import (
    FORMS,
    MALLOCS,
    Case,
    Child,
    Jaxft,
    Side,
    TorchMace,
    build,
    crystal,
    finish,
    parse,
    parser,
    seconds,
    settings,
    structures,
)

STEPS = 3
METHODS = {"training": "step", "inference": "infer"}


class Calculator(Side):
    """jaxft's ASE calculator and one structure."""

    tunables = Jaxft.tunables

    def __init__(self, case: Case) -> None:
        import jax

        if case.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        import jaxft
        from jaxft.calculator import JaxftCalculator

        self.device = jax.devices()[0].device_kind
        super().__init__()
        model, params = jaxft.load(case.bundle, dtype=case.dtype)
        (self.atoms,) = case.frames
        self.atoms.calc = JaxftCalculator(model, params, head=model.heads[0])

    def facts(self) -> dict[str, str]:
        return {"device": self.device}

    def evaluate(self) -> float:
        """Seconds of energy, forces and stress at positions that are new."""
        self.atoms.positions += 1e-3 * np.random.default_rng(0).normal(size=(len(self.atoms), 3))
        return seconds(lambda: (self.atoms.get_forces(), self.atoms.get_stress()))


OTHERS = [f"ratio{form.removeprefix('torch')}" for form in FORMS]
Peaks = dict[str, dict[str, dict[str, float]]]
"""``{mode: {side: {peak, imports}}}`` in MB."""


def peaks(case: Case, malloc: str) -> tuple[Peaks, dict[str, object]]:
    """Peaks, and facts about the batch."""
    sides = {name: (TorchMace, FORMS[name]) for name in MALLOCS[malloc]}
    sides["jaxft"] = (Jaxft, Jaxft.tunables)
    found: Peaks = {mode: {} for mode in METHODS}
    for mode, method in METHODS.items():
        for name, (side, tunables) in sides.items():
            with Child(side, case, tunables=tunables) as child:
                for _ in range(STEPS):
                    child.call(method)
                found[mode][name] = child.call("memory")
                facts = child.call("facts")  # the last are jaxft's
    return found, facts


def compare(found: Peaks) -> dict[str, float]:
    """Ratios jaxft / torch by name."""
    ratios = {}
    for mode, sides in found.items():
        ours = sides["jaxft"]
        for name in sides.keys() - {"jaxft"}:
            suffix = ("_inference" if mode == "inference" else "") + name.removeprefix("torch")
            theirs = sides[name]
            ratios[f"ratio{suffix}"] = ours["peak"] / theirs["peak"]
            ratios[f"ratio_above_imports{suffix}"] = (ours["peak"] - ours["imports"]) / (
                theirs["peak"] - theirs["imports"]
            )
    ratios.setdefault("ratio", next(v for k, v in ratios.items() if k in OTHERS))
    return {key: round(value, 3) for key, value in sorted(ratios.items())}


def resident(pid: int) -> float:
    """GiB that a process holds now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def watched(child: Child, limit: float) -> float:
    """``evaluate`` of the child, which is ended if it holds more than ``limit`` GiB."""
    child.send("evaluate")
    while not child.answered(0.2):
        if resident(child.process.pid) > limit:
            child.process.kill()
            sys.exit(
                f"error: the calculator takes more than {limit} GiB; use fewer --atoms, or a "
                "larger --limit."
            )
    return child.answer()


def large(case: Case, args: argparse.Namespace) -> dict[str, object]:
    """The calculator's figures for one large system."""
    with Child(Calculator, case) as child:
        first, second = watched(child, args.limit), watched(child, args.limit)
        memory, facts = child.call("memory"), child.call("facts")
    n = len(case.frames[0])
    return {
        "ratio": round(memory["peak"] * 1e6 / 2**30 / args.limit, 3),
        "limit_GiB": args.limit,
        "atoms": n,
        "peak_GiB": round(memory["peak"] * 1e6 / 2**30, 3),
        "peak_MB": memory,
        "kB_per_atom_above_imports": round((memory["peak"] - memory["imports"]) * 1e3 / n, 1),
        "seconds": {"first, compiled": round(first, 2), "second": round(second, 3)},
        **facts,
    }


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--atoms", type=int, help="one system of at least so many, calculator")
    options.add_argument("--limit", type=float, default=20.0, help="GiB, with --atoms; default 20")
    args = parse(options)
    say = (lambda *_: None) if args.json else print
    if args.atoms is not None and args.atoms < 1:
        options.error("--atoms has to be at least 1.")
    frames = [crystal(args.atoms)] if args.atoms else structures(args.repeats, cells=args.cells)
    with tempfile.TemporaryDirectory() as folder:
        case = build(Case(args.model, args.dtype, Path(folder), frames, threads=args.threads))
        if args.atoms:
            result = large(case, args)
            say(f"{result['atoms']} atoms: {result['peak_GiB']} GiB, {result['seconds']} s")
        else:
            found, facts = peaks(case, args.malloc)
            result = compare(found) | {"peak_MB": found} | facts
            for mode, sides in found.items():
                for name, row in sides.items():
                    say(
                        f"{mode:10s} {name:12s} {row['peak']:8.0f} MB, imports {row['imports']:.0f}"
                    )
    result |= {"rounds": 1, "discarded": 0, "calls": 2 if args.atoms else STEPS}
    result |= settings(args, torch=not args.atoms, model=args.model)
    mode = "calculator" if args.atoms else "training and inference"
    key = f"{args.model} {args.dtype} {mode} {result['atoms']} atoms"
    finish("memory", key + ("" if args.malloc == "both" else f" {args.malloc}"), result, args)


if __name__ == "__main__":
    main()
