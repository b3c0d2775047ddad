"""One training step, torch MACE against jaxft: same weights, same batch, alternating rounds.

    python benchmarks/train_step.py --model mp0-medium --dtype float32 --json
    python benchmarks/train_step.py --train products+readouts
    python benchmarks/train_step.py --quick

The step is: energy, forces and stress of a batch, gradient of the weighted E+F+S loss, Adam. Both
sides are given ready batches; compilation is timed apart. Loss and gradients of both are compared
before anything is timed, and if they differ the script ends with exit code 1.

With ``--train products+readouts`` embedding and interactions are frozen. ``ratio`` then sets
jaxft's frozen step beside torch's *full* step, which is what torch users run; the keys that end in
``_frozen`` set it beside a torch step with ``requires_grad`` off for the same parameters.

torch runs in two processes, with glibc's default allocator (``ratio``) and tuned in its favour
(``ratio_tuned``, the settings ``TUNED`` in ``common.py``). The last line is a JSON object: medians
of the rounds that were steady, ratios torch time / jaxft time, and the settings. Models that do not
fit into memory three times: ``--malloc default`` and ``--malloc tuned``, one after the other.

``limit_seconds`` is the roofline: the larger of the floating-point operations that XLA counts over
this machine's best rate in a large matrix product, and of the bytes over its best rate in a sum of
two long vectors. ``share_of_limit`` is how much of a step that is.
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

TRAINED = ("all", "products+readouts")


def compare(ours: Child, reference: Child, dtype: str) -> tuple[dict[str, float], set[str]]:
    """Relative differences of loss and gradient, and torch's names of what jaxft trains."""
    expected, theirs = reference.call("gradient")
    loss, gradient = ours.call("gradient")
    deviations = {"loss": abs(loss / expected - 1), "gradient": worst(gradient, theirs)}
    require_parity(deviations, dtype)
    return deviations, set(gradient)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--train", choices=TRAINED, default="all")
    args = parse(options)
    say = (lambda *_: None) if args.json else print
    frames = structures(args.repeats, cells=args.cells)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        case = build(
            Case(args.model, args.dtype, Path(folder), frames, args.train, args.threads, args.wrong)
        )
        ours = stack.enter_context(Child(Jaxft, case))
        references = torch_children(case, args.malloc)
        for child in references.values():
            stack.enter_context(child)
        reference = next(iter(references.values()))
        deviations, trained = compare(ours, reference, args.dtype)
        say("relative difference:", ", ".join(f"{k} {v:.1e}" for k, v in deviations.items()))
        first = ours.turn().seconds
        runners = {name: child.turn for name, child in references.items()}
        if args.train != "all":
            for name, child in references.items():
                child.call("freeze", trained)
                runners[f"{name}_frozen"] = functools.partial(child.turn, "frozen_step")
        timing = alternate(runners | {"jaxft": ours.turn}, args.rounds)
        facts = reference.call("facts") | ours.call("facts")
        roofline = ours.call("roofline")
        memory = {n: c.call("memory")["peak"] for n, c in {**references, "jaxft": ours}.items()}
    for name, value in timing.medians.items():
        say(f"{name:20s} {value:8.3f} s per step, {value / timing.medians['jaxft']:.2f} of jaxft's")
    result = {
        **ratios(timing.medians),
        **(ratios(timing.medians, suffix="_frozen") if args.train != "all" else {}),
        **timing.summary(),
        "jaxft_first_step_seconds": round(first, 2),
        **roofline,
        "share_of_limit": round(roofline["limit_seconds"] / timing.medians["jaxft"], 2),
        "deviation": {name: float(f"{value:.1e}") for name, value in deviations.items()},
        "peak_MB_comparison_included": memory,
        **settings(args, model=args.model, trained=args.train, loss="E+F+S, Adam", **facts),
    }
    key = f"{args.model} {args.dtype} {args.train} {facts['atoms']} atoms"
    finish("train_step", key + ("" if args.malloc == "both" else f" {args.malloc}"), result, args)


if __name__ == "__main__":
    main()
