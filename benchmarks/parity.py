"""The parity table of docs/conversion.md: runs tests/parity and prints what it measured.

python benchmarks/parity.py
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "parity.json"
KINDS = {
    "test_energies_forces_and_stresses_agree_in_float64": "float64",
    "test_energies_forces_and_stresses_agree_in_float32": "float32",
    "test_loss_and_its_gradient_in_every_parameter_agree": "gradient",
}


def measure() -> dict[str, dict[str, dict[str, float]]]:
    """``{model: {kind: {quantity: largest deviation}}}`` from the tests' own records."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "tests/parity"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        found: dict[str, dict[str, dict[str, float]]] = {}
        for case in cases:
            match = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", ""))
            if match and match[1] in KINDS:
                values = {p.get("name"): float(p.get("value")) for p in case.iter("property")}
                found.setdefault(match[2], {})[KINDS[match[1]]] = values
    return found


def main() -> None:
    found = measure()
    print("| model | E f64 | F f64 | σ f64 | E f32 | F f32 | σ f32 | gradient f64, relative |")
    print("|---|---|---|---|---|---|---|---|")
    for model, kinds in found.items():
        cells = [
            f"{kinds[dtype][quantity]:.0e}"
            for dtype in ("float64", "float32")
            for quantity in ("energy", "forces", "stress")
        ]
        print(f"| {model} | {' | '.join(cells)} | {kinds['gradient']['gradient']:.0e} |")
    document = {
        "units": "eV/atom, eV/Å, eV/Å^3; gradients relative to the largest entry of each leaf",
        "largest_absolute_deviation": found,
        "versions": {name: version(name) for name in ("jax", "torch", "mace-torch", "e3nn")}
        | {"python": platform.python_version()},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
