"""Energies, forces and stresses, torch MACE against jaxft: same weights, same batch, alternating.

    python benchmarks/inference.py --model mp0-medium --dtype float32 --json
    python benchmarks/inference.py --quick

Both sides are given a ready batch; compilation is timed apart. All three results are compared
before anything is timed, and if they differ the script ends with exit code 1. torch's two
allocator settings, ``ratio`` and ``ratio_tuned`` are as in ``train_step.py``. The last line is a
JSON object. Other JAX codes are not compared here.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path

from common import (
    Case,
    Child,
    Jaxft,
    alternate,
    build,
    finish,
    parse,
    parser,
    ratios,
    require_parity,
    settings,
    structures,
    torch_children,
    worst,
)


def main() -> None:
    args = parse(parser(__doc__.splitlines()[0]))
    say = (lambda *_: None) if args.json else print
    frames = structures(args.repeats, cells=args.cells)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        case = build(
            Case(
                args.model,
                args.dtype,
                Path(folder),
                frames,
                threads=args.threads,
                wrong=args.wrong,
            )
        )
        ours = stack.enter_context(Child(Jaxft, case))
        first = ours.turn("infer").seconds
        references = torch_children(case, args.malloc)
        for child in references.values():
            stack.enter_context(child)
        reference = next(iter(references.values()))
        found, expected = ours.call("results"), reference.call("results")
        deviations = {name: worst({name: found[name]}, expected) for name in expected}
        say("relative difference:", ", ".join(f"{k} {v:.1e}" for k, v in deviations.items()))
        require_parity(deviations, args.dtype)
        children = {**references, "jaxft": ours}
        timing = alternate(
            {name: functools.partial(child.turn, "infer") for name, child in children.items()},
            args.rounds,
        )
        facts = reference.call("facts") | ours.call("facts")
        memory = {name: child.call("memory")["peak"] for name, child in children.items()}
    for name, value in timing.medians.items():
        say(f"{name:20s} {value:8.3f} s, {value / timing.medians['jaxft']:.2f} of jaxft's")
    result = {
        **ratios(timing.medians),
        **timing.summary(),
        "jaxft_first_seconds": round(first, 2),
        "deviation": {name: float(f"{value:.1e}") for name, value in deviations.items()},
        "peak_MB": memory,
        **settings(args, model=args.model, results="E+F+S", **facts),
    }
    key = f"{args.model} {args.dtype} {facts['atoms']} atoms"
    finish("inference", key + ("" if args.malloc == "both" else f" {args.malloc}"), result, args)


if __name__ == "__main__":
    main()
