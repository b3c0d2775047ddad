"""Time and memory to read, convert and save a torch file, each repeat in a process of its own.

python benchmarks/convert.py [MODEL ...]          names of tests/parity/reference.py; needs torch

Peak memory is the growth of the process's resident set over what it had after its imports.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "convert.json"
REPEATS = 5
CHILD = """
import json, resource, sys, time
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
from converters.to_jax import convert_with_provenance
from jaxft import bundle
imported, before = time.perf_counter(), peak()
model, params, provenance = convert_with_provenance(sys.argv[1])
converted = time.perf_counter()
bundle.save(sys.argv[2], model, params, provenance=provenance)
saved = time.perf_counter()
print(json.dumps({"import": imported - start, "convert": converted - imported,
                  "save": saved - converted, "memory": peak() - before}))
"""


BUILD = """
import sys
from parity import reference
model = reference.build(sys.argv[1])
reference.save(model, sys.argv[2])
print(sum(parameter.numel() for parameter in model.parameters()))
"""


def child(code: str, *arguments: str | Path) -> str:
    """The last line that a Python process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment
    )
    return done.stdout.splitlines()[-1]


def main() -> None:
    names = sys.argv[1:] or ["mp0-medium", "0b3-medium", "mh-1"]
    rows = {}
    headings = ("model", "parameters", "file, MB", "read + convert, s", "save, s")
    headings += ("memory / file", "imports, s")
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder) / f"{name}.model"
            count = int(child(BUILD, name, path))
            size = path.stat().st_size
            outs = [Path(folder) / f"{name}-{i}" for i in range(REPEATS)]
            runs = [json.loads(child(CHILD, path, out)) for out in outs]
            row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            rows[name] = row | {"parameters": count, "bytes": size}
            print(
                f"| {name} | {count:,} | {size / 1e6:.0f} | {row['convert']:.2f} | "
                f"{row['save']:.2f} | {row['memory'] / size:.1f} | {row['import']:.1f} |"
            )
    document = {
        "settings": f"medians of {REPEATS} processes; random float64 weights",
        "units": "seconds, bytes",
        "models": rows,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "numpy", "safetensors")}
        | {"python": platform.python_version()},
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
