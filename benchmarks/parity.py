"""The parity tables of docs/conversion.md: runs tests/parity and prints what it measured.

python benchmarks/parity.py                 every published architecture at its size: 20 min, 20 GiB
python benchmarks/parity.py REPORT.xml ...  tabulate JAXFT_ALL_PARITY=1 pytest --junitxml=REPORT.xml
"""

from __future__ import annotations

import json
import os
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


def measure(reports: list[Path]) -> dict[str, dict[str, dict[str, float]]]:
    """``{model: {kind: {quantity: largest deviation}}}`` from the tests' own records."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for report in reports:
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            match = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", ""))
            if match and match[1] in KINDS:
                values = {p.get("name"): float(p.get("value")) for p in case.iter("property")}
                found.setdefault(match[2], {})[KINDS[match[1]]] = values
    return found


def run() -> dict[str, dict[str, dict[str, float]]]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
        subprocess.run(
            [*command, "tests/parity/test_parity.py"],
            cwd=ROOT,
            env=os.environ | {"JAXFT_ALL_PARITY": "1"},
            check=True,
            stdout=sys.stderr,
        )
        return measure([report])


COLUMNS = {
    "E f64": ("float64", "energy"),
    "F f64": ("float64", "forces"),
    "σ f64": ("float64", "stress"),
    "E f32": ("float32", "energy"),
    "F f32": ("float32", "forces"),
    "σ f32": ("float32", "stress"),
    "gradient f64, relative": ("gradient", "gradient"),
}


def table(found: dict[str, dict[str, dict[str, float]]]) -> None:
    print(f"| model | largest F | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}")
    for model, kinds in found.items():
        cells = [
            f"{kinds[kind][quantity]:.0e}" if kind in kinds else ""
            for kind, quantity in COLUMNS.values()
        ]
        print(f"| {model} | {kinds['float64']['size']:.3g} | {' | '.join(cells)} |")


def main() -> None:
    reports = [Path(name) for name in sys.argv[1:]]
    found = measure(reports) if reports else run()
    options = {name for name in found if name.startswith("small-")}
    table({name: kinds for name, kinds in found.items() if name not in options})
    print()
    table({name: found[name] for name in found if name in options})
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
