"""What quick compilation (``jaxft/effort.py``) saves and what it costs, on a CPU.

    python benchmarks/effort.py --case ethanol --json
    python benchmarks/effort.py --case mp0-medium --rounds 24
    python benchmarks/effort.py --quick

One training step (energy + forces + stress, gradient of all parameters, Adam, float32) and one
prediction, each compiled at full effort and quickly in one process, which then runs them in turn.
``ethanol`` and ``nacl`` are four frames of these sets and the shipped model; the others are
published architectures with random weights and 256 atoms (they need torch). The last line is a JSON
object: ``ratio`` is the time of compiling the step at full effort over that of compiling it
quickly, ``slowdown`` that of the steps, medians, quick over full.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compile import restart_as_the_command_does

HERE = Path(__file__).parent
DATA = HERE / "data"
CASES = ("ethanol", "nacl", "mp0-small", "mp0-medium")
WEIGHTS = {"energy": 1.0, "forces": 10.0, "stress": 1.0}
FRAMES = 4
"""Of a batch of ``ethanol`` and ``nacl``."""


def files(case: str, folder: Path) -> tuple[Path, Path]:
    """The model and its frames."""
    if case in ("ethanol", "nacl"):
        return DATA / "gfn2_small.model", DATA / f"{case}_train.xyz"
    command = [sys.executable, str(HERE / "compile.py"), "--build", case, str(folder)]
    subprocess.run(command, check=True)
    return folder / "base.model", folder / "train.xyz"


def lowered(source: Path, structures: Path, count: int | None) -> dict[str, tuple[Any, tuple]]:
    """The two programs, not compiled yet, and their arguments."""
    import jax
    import optax

    from converters.to_jax import convert
    from jaxft import data, finetune, loss
    from jaxft.bundle import cast
    from jaxft.potential import predict

    model, params = cast(*convert(source), "float32")
    dataset = data.prepare(data.read(structures)[:count], model)
    batch = next(data.epoch(dataset, len(dataset.frames), dtype="float32"))
    init, step = finetune(loss.weighted(model, **WEIGHTS), (), optax.adam(1e-4))
    state = init(jax.random.key(0), params)
    prediction = jax.jit(lambda params, graph: predict(model, params, graph))
    return {
        "step": (step.lower(state, batch), (state, batch)),
        "prediction": (prediction.lower(params, batch.graph), (params, batch.graph)),
    }


def measured(program: Any, arguments: tuple, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of compiling and medians of running, of both ways."""
    import jax

    from jaxft.effort import effort

    ways = {"full": {}, "quick": dict(effort(0).options)}
    if not ways["quick"]:
        sys.exit("error: this platform's compiler has none of the options; nothing to compare.")
    compiled, found = {}, {}
    for way, options in ways.items():
        began = time.perf_counter()
        compiled[way] = program.compile(compiler_options=options)
        found[way] = {"compile": time.perf_counter() - began}
    run = {way: _runner(each, arguments, jax.block_until_ready) for way, each in compiled.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, call in run.items():
            began = time.perf_counter()
            call()
            seconds[way].append(time.perf_counter() - began)
    for way, values in seconds.items():
        found[way]["run"] = statistics.median(values[1:])
    return found


def _runner(program: Any, arguments: tuple, wait: Callable[[Any], Any]) -> Callable[[], None]:
    """A call that copies what the program takes over for good: a step donates its state."""
    import jax

    own = [jax.tree.map(lambda leaf: leaf.copy(), arguments[0])]

    def call() -> None:
        result = wait(program(own[0], *arguments[1:]))
        if isinstance(result, tuple) and type(result[0]) is type(own[0]):
            own[0] = result[0]

    return call


def main() -> None:
    restart_as_the_command_does()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="ethanol")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="three rounds, to try the script")
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--write", action="store_true", help="merge into results/effort.json")
    args = parser.parse_args()
    if min(args.rounds, args.threads) < 1:
        parser.error("--rounds and --threads have to be at least 1.")
    from common import commit, confine, finish, processor

    confine(args.threads)
    rounds = 3 if args.quick else args.rounds
    is_small = args.case in ("ethanol", "nacl")
    with tempfile.TemporaryDirectory() as folder:
        source, structures = files(args.case, Path(folder))
        programs = lowered(source, structures, FRAMES if is_small else None)
        found = {name: measured(*program, rounds) for name, program in programs.items()}
    for name, ways in () if args.json else found.items():
        for way, each in ways.items():
            print(f"{name:11s}{way:6s} {each['compile']:6.2f} s, {1e3 * each['run']:8.2f} ms")
    step = found["step"]
    result = {
        "ratio": round(step["full"]["compile"] / step["quick"]["compile"], 2),
        "slowdown": round(step["quick"]["run"] / step["full"]["run"], 3),
        "seconds": {
            name: {way: {k: float(f"{v:.3g}") for k, v in e.items()} for way, e in ways.items()}
            for name, ways in found.items()
        },
        "case": args.case,
        "rounds": rounds,
        "threads": args.threads,
        "dtype": "float32",
        "processor": processor(),
        "commit": commit(),
    }
    finish("effort", args.case, result, args)


if __name__ == "__main__":
    main()
