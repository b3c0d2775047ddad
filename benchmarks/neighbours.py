"""Neighbour lists of a large set: one process alone, and shared by several.

    python benchmarks/neighbours.py --json
    python benchmarks/neighbours.py --frames 20000 --workers 8
    python benchmarks/neighbours.py --quick

Rattled rocksalt crystals of 64 atoms, 6 Å, float64. Both ways take turns, processes are started
anew each time, and what they make is compared first, bit by bit. The last line is a JSON object:
``ratio`` is the time of one process over that of several, medians; ``ms`` is per frame.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

from common import commit, confine, finish, processor, structures

from jaxft import data
from jaxft.data.workers import neighbour_lists

R_MAX = 6.0
"""Å, that of the published MACE-MP models."""

QUICK = 1000
"""Frames; with fewer nobody is started."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, help="a multiple of 4")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="to try the script")
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--write", action="store_true", help="merge into results/neighbours.json")
    args = parser.parse_args()
    count = args.frames or (QUICK if args.quick else 4000)
    rounds = args.rounds or (1 if args.quick else 5)
    if count < 4 or rounds < 1 or args.workers < 2:
        parser.error("--frames has to be at least 4, --rounds 1 and --workers 2.")
    confine(args.workers)
    atoms = structures(count // 4)
    frames = [data.unlabelled(each, source=f"crystal {i}") for i, each in enumerate(atoms)]
    ways = {"alone": 1, "shared": args.workers}
    lists = {way: neighbour_lists(frames, R_MAX, workers=n) for way, n in ways.items()}
    for alone, shared in zip(lists["alone"], lists["shared"], strict=True):
        if any(a.tobytes() != b.tobytes() for a, b in zip(alone, shared, strict=True)):
            raise SystemExit("error: several processes make other lists than one; nothing to time.")
    edges = sum(len(each.senders) for each in lists["alone"])
    lists.clear()
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, n in ways.items():
            began = time.perf_counter()
            neighbour_lists(frames, R_MAX, workers=n)
            times[way].append(time.perf_counter() - began)
    medians = {way: statistics.median(values) for way, values in times.items()}
    for way, median in () if args.json else medians.items():
        print(f"{way:7s}{median:7.2f} s, {1e3 * median / len(frames):6.3f} ms per frame")
    result: dict[str, Any] = {
        "ratio": round(medians["alone"] / medians["shared"], 2),
        "seconds": {way: float(f"{median:.3g}") for way, median in medians.items()},
        "ms": {way: float(f"{1e3 * s / len(frames):.3g}") for way, s in medians.items()},
        "frames": len(frames),
        "atoms": len(frames[0]),
        "neighbours": round(edges / sum(map(len, frames)), 1),
        "r_max": R_MAX,
        "workers": args.workers,
        "rounds": rounds,
        "processor": processor(),
        "commit": commit(),
    }
    finish("neighbours", f"{len(frames)} frames, {args.workers} processes", result, args)


if __name__ == "__main__":
    main()
