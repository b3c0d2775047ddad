"""Time from the start of a process to its first finished training step, and where it goes.

    python benchmarks/compile.py --model mp0-medium --json

Every measurement is a fresh process that does what ``jaxft finetune`` does up to the first update:
imports, conversion of a torch ``.model`` (random weights, written beforehand by another process,
untimed), frames and neighbour lists, state, trace, lower, compile, first run. *Cold* finds an empty
cache of programs, *warm* the one that the cold one left. Both are repeated in turns. The last line
is a JSON object with ``ratio`` (cold / warm, medians) and the settings.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
WEIGHTS = {"energy": 1.0, "forces": 10.0, "stress": 1.0}
MODELS = ("mp0-small", "mp0-medium", "mp0-large", "0b3-medium", "mh-1", "small")
PHASES = {
    "python": "the interpreter",
    "import": "everything that `jaxft finetune` imports",
    "convert": "the torch file to arrays",
    "data": "frames, neighbour lists, one batch",
    "state": "parameters and optimiser state on the device",
    "constants": "couplings, compressed",
    "trace": "Python to jaxpr",
    "lower": "jaxpr to StableHLO",
    "compile": "StableHLO to machine code, or the cache",
    "run": "the first step",
}


def build(model: str, folder: Path) -> None:
    """Write ``base.model`` and ``train.xyz``; needs torch and mace-torch."""
    sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "parity")]
    import ase.io
    import reference
    from common import structures

    reference.save(reference.build(model, dtype="float32"), folder / "base.model")
    ase.io.write(folder / "train.xyz", structures())


def first_step(folder: Path, cache: Path, began: float) -> dict[str, object]:
    """Seconds by phase, what was compiled and how large the batch was, of this process."""
    marks = [_now()]
    import jax
    import optax

    import jaxft.cli
    import jaxft.run  # noqa: F401 (all that the command imports)
    from converters.to_jax import convert
    from jaxft import compilation, data, finetune, loss

    compilation.enable_cache(cache)
    marks.append(_now())
    with compilation.counting() as count:
        model, params = convert(folder / "base.model")
        marks.append(_now())
        frames = data.read([folder / "train.xyz"])
        dataset = data.prepare(frames, model)
        batch = next(data.epoch(dataset, len(frames), dtype="float32"))
        marks.append(_now())
        init, step = finetune(loss.weighted(model, **WEIGHTS), (), optax.adam(1e-4))
        state = init(jax.random.key(0), params)
        marks.append(_now())
        _ = model.constants
        marks.append(_now())
        traced = step.trace(state, batch)
        marks.append(_now())
        lowered = traced.lower()
        marks.append(_now())
        program = lowered.compile()
        marks.append(_now())
        jax.block_until_ready(program(state, batch))
        marks.append(_now())
    steps = list(zip(PHASES, [(began, 0.0), *marks], marks, strict=False))
    return {
        "total": round(marks[-1][0] - began, 3),
        "phases": {name: round(later[0] - earlier[0], 3) for name, earlier, later in steps},
        "cpu": {name: round(later[1] - earlier[1], 3) for name, earlier, later in steps},
        "programs": {"compiled": count.compiled, "loaded": count.loaded},
        "stablehlo_lines": lowered.as_text().count("\n"),
        "atoms": int(batch.graph.is_atom.sum()),
        "cache_megabytes": round(
            sum(file.stat().st_size for file in cache.glob("*-cache")) / 1e6, 1
        ),
    }


def _now() -> tuple[float, float]:
    """Clock and CPU time of all threads, s; the second suffers less from a busy machine."""
    return time.time(), time.process_time()


def restart_as_the_command_does() -> None:
    """With huge pages, once; before jaxft is imported, which takes seconds."""
    file = HERE.parent / "jaxft" / "hugepages.py"
    spec = importlib.util.spec_from_file_location("hugepages", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.restart()


def measured(folder: Path, cache: Path, threads: int) -> dict[str, object]:
    """The same in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment |= {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "")}
    environment |= {"PYTHONPATH": str(HERE.parent)}  # this checkout, whichever is installed
    command = [sys.executable, __file__, "--process", str(folder), str(cache), str(time.time())]
    if threads < len(os.sched_getaffinity(0)):
        command = ["taskset", "-c", f"0-{threads - 1}", *command]
    found = subprocess.run(command, env=environment, cwd=HERE.parent, check=True, text=True,
                           stdout=subprocess.PIPE)  # fmt: skip
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--process"]:
        restart_as_the_command_does()
        folder, cache, began = sys.argv[2:]
        print(json.dumps(first_step(Path(folder), Path(cache), float(began))))
        return
    if sys.argv[1:2] == ["--build"]:
        build(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="mp0-medium")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="only the last line")
    parser.add_argument("--write", action="store_true", help="merge into results/compile.json")
    args = parser.parse_args()
    if min(args.rounds, args.threads) < 1:
        parser.error("--rounds and --threads have to be at least 1.")
    runs: dict[str, list[dict]] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, __file__, "--build", args.model, name], check=True)
        for number in range(args.rounds):
            cache = folder / f"cache{number}"
            for kind, found in runs.items():
                found.append(measured(folder, cache, args.threads))
                if not args.json:
                    print(f"{kind} {found[-1]['total']:.1f} s {found[-1]['phases']}")
    if any(run["programs"]["compiled"] for run in runs["warm"]):
        sys.exit("error: a warm run compiled, so it was none; did the source change meanwhile?")
    totals = {
        kind: statistics.median(run["total"] for run in found) for kind, found in runs.items()
    }
    phases, cpu = (
        {
            kind: {p: round(statistics.median(run[what][p] for run in found), 3) for p in PHASES}
            for kind, found in runs.items()
        }
        for what in ("phases", "cpu")
    )
    if not args.json:
        print(f"{'':<10}    cold    warm    cold    warm  s by the clock, s of CPU")
        for name, meaning in PHASES.items():
            columns = [t[kind][name] for t in (phases, cpu) for kind in runs]
            print(
                f"{name:<10}" + "".join(f"{seconds:8.2f}" for seconds in columns) + f"  {meaning}"
            )
        print(f"{'total':<10} {totals['cold']:8.2f}{totals['warm']:8.2f}")
    result = {
        "ratio": round(totals["cold"] / totals["warm"], 2),
        "cold_seconds": round(totals["cold"], 2),
        "warm_seconds": round(totals["warm"], 2),
        "spread": {k: sorted(round(r["total"], 2) for r in found) for k, found in runs.items()},
        "phases": phases,
        "cpu_phases": cpu,
        "programs": {kind: found[0]["programs"] for kind, found in runs.items()},
        "stablehlo_lines": runs["cold"][0]["stablehlo_lines"],
        "cache_megabytes": runs["cold"][0]["cache_megabytes"],
        "model": args.model,
        "dtype": "float32",
        "trained": "all parameters, Adam, E+F+S loss",
        "atoms": runs["cold"][0]["atoms"],
        "rounds": args.rounds,
        "threads": args.threads,
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "jax": version("jax")},
    }
    sys.path.insert(0, str(HERE))
    from common import commit, finish, processor  # its imports take longer than what is measured

    finish("compile", args.model, result | {"processor": processor(), "commit": commit()}, args)


if __name__ == "__main__":
    main()
