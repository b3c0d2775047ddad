"""How the cost per atom of jaxft depends on atoms, neighbours, channels and batch.

    python benchmarks/scaling.py --model mp0-medium --json
    python benchmarks/scaling.py --sweep atoms --mode inference
    python benchmarks/scaling.py --quick

Four sweeps over rattled NaCl crystals: atoms of one crystal; its neighbours per atom, by the
model's cutoff; channels of the model; crystals of 32 atoms per batch. The points of a sweep take
turns in one process, in every round; compilation is timed apart. ``ratio`` is the slowest over the
fastest time per atom of the atoms sweep (of the first sweep that ran): 1 is a flat cost. The last
line is a JSON object.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import (
    MODELS,
    Case,
    Child,
    Jaxft,
    Side,
    Timing,
    alternate,
    build,
    crystal,
    finish,
    parse,
    parser,
    settings,
)

SWEEPS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "atoms": ((64, 128, 256, 512, 1024, 2048), (8, 16)),
    "cutoff": ((4.0, 5.0, 6.0, 7.0), (3.0, 4.0)),
    "channels": ((32, 64, 128, 256), (4, 8)),
    "batch": ((1, 2, 4, 8, 16), (1, 2)),
}
"""Points, and those of ``--quick``: atoms; Å; channels; crystals."""

ATOMS = (256, 16)
"""Of the crystals in the sweeps over cutoff and channels, and of those of ``--quick``."""

SIZE = 32
"""Atoms per crystal in the sweep over batches."""

IRREPS = {"mp0-small": "0e", "mp0-medium": "0e 1o", "mp0-large": "0e 1o 2e", "small": "0e 1o"}
"""Of the hidden features, by model."""

METHODS = {"training": "step", "inference": "infer"}


class Points(Side):
    """One jaxft side per point, in one process."""

    tunables = Jaxft.tunables

    def __init__(self, cases: dict[float, Case]) -> None:
        self.sides = {point: Jaxft(case) for point, case in cases.items()}
        super().__init__()

    def gemm(self) -> None:
        next(iter(self.sides.values())).gemm()

    def run(self, point: float, method: str) -> None:
        getattr(self.sides[point], method)()

    def facts(self, point: float) -> dict[str, Any]:
        return self.sides[point].facts()


def cases(sweep: str, points: Sequence[float], base: Case, n_atoms: int) -> dict[float, Case]:
    """A case per point; models that differ are built, each in a folder of its own."""
    if sweep == "atoms":
        return {n: dataclasses.replace(base, frames=[crystal(int(n))]) for n in points}
    if sweep == "batch":
        frames = [crystal(SIZE, seed) for seed in range(int(max(points)))]
        return {n: dataclasses.replace(base, frames=frames[: int(n)]) for n in points}
    found = {}
    for point in points:
        folder = base.folder / f"{sweep}-{point}"
        folder.mkdir()
        hidden = "+".join(f"{point}x{irrep}" for irrep in IRREPS[base.model].split())
        changes = {"r_max": point} if sweep == "cutoff" else {"hidden": hidden}
        frames = [crystal(n_atoms)]
        found[point] = build(
            dataclasses.replace(base, folder=folder, frames=frames, changes=changes)
        )
    return found


def measure(
    chosen: dict[float, Case], method: str, rounds: int
) -> tuple[list[dict[str, Any]], Timing]:
    """One row per point."""
    with Child(Points, chosen) as child:
        runners = {
            str(point): functools.partial(child.turn, "run", point, method) for point in chosen
        }
        first = {name: run().seconds for name, run in runners.items()}
        timing = alternate(runners, rounds, together=False)
        rows = []
        for point in chosen:
            facts, median = child.call("facts", point), timing.medians[str(point)]
            rows.append(
                {
                    "point": point,
                    "atoms": facts["atoms"],
                    "neighbours": round(facts["edges"] / facts["atoms"], 1),
                    "fill": facts["fill"],
                    "seconds": round(median, 5),
                    "us_per_atom": round(1e6 * median / facts["atoms"], 2),
                    "us_per_edge": round(1e6 * median / max(facts["edges"], 1), 3),
                    "spread": [round(f(timing.seconds[str(point)]), 5) for f in (min, max)],
                    "first_seconds": round(first[str(point)], 1),
                    "device": facts["device"],
                }
            )
    return rows, timing


def table(sweep: str, rows: list[dict[str, Any]]) -> str:
    """For people, in Markdown."""
    lines = [f"| {sweep} | atoms | neighbours | fill | s | µs/atom | µs/edge |", "|---" * 7 + "|"]
    lines += [
        f"| {r['point']} | {r['atoms']} | {r['neighbours']} | {r['fill']:.2f} | {r['seconds']:.4f} "
        f"| {r['us_per_atom']:.1f} | {r['us_per_edge']:.2f} |"
        for r in rows
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    options = parser(
        __doc__.splitlines()[0],
        models=[m for m in MODELS if m in IRREPS],
        sides=("jaxft",),
    )
    options.add_argument("--sweep", choices=sorted(SWEEPS), action="append")
    options.add_argument("--mode", choices=sorted(METHODS), default="training")
    args = parse(options)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = build(Case(args.model, args.dtype, Path(folder), threads=args.threads))
        for sweep in args.sweep or SWEEPS:
            points = SWEEPS[sweep][args.quick]
            chosen = cases(sweep, points, base, ATOMS[args.quick])
            rows, timing = measure(chosen, METHODS[args.mode], args.rounds)
            costs = [row["us_per_atom"] for row in rows]
            found[sweep] = {
                "ratio": round(max(costs) / min(costs), 2),
                "rows": rows,
                "discarded": timing.discarded,
                "gemm_milliseconds": timing.summary()["gemm_milliseconds"],
            }
            if not args.json:
                print(table(sweep, rows))
    first = "atoms" if "atoms" in found else next(iter(found))
    result = {
        "ratio": found[first]["ratio"],
        "ratio_of": f"slowest / fastest time per atom, {first} sweep",
        "sweeps": found,
        "discarded": sum(sweep["discarded"] for sweep in found.values()),
        "rounds": args.rounds,
        "device": found[first]["rows"][0]["device"],
        **settings(args, torch=False, model=args.model, mode=args.mode),
    }
    finish("scaling", f"{args.model} {args.dtype} {args.mode} {' '.join(found)}", result, args)


if __name__ == "__main__":
    main()
