"""The studies that are shipped, in their small forms: from one command to tables and a page.

Minutes each; all but one run where ``JAXFT_ALL_STUDIES=1``.
"""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.study.config import StudyConfig, load

ROOT = Path(__file__).parents[1]


ALL = os.environ.get("JAXFT_ALL_STUDIES") == "1"


@pytest.mark.parametrize("name", ["frozen", *(["seven", "reewc", "sparse", "phonons"] * ALL)])
def test_the_small_form_runs_to_its_end(name: str, tmp_path: Path) -> None:
    path = ROOT / "configs" / "study" / f"{name}.yaml"
    words = [sys.executable, "-m", "jaxft", "study", str(path), "--small", f"output={tmp_path}"]
    plain = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(words, cwd=ROOT, env=plain, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    study = load(path, small=True, kind=StudyConfig)
    with (tmp_path / "results/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["status"], row["reason"]) for row in rows} == {("done", "")}
    assert {row["recipe"] for row in rows} == set(study.recipes)
    assert all(math.isfinite(float(row["value"])) for row in rows)
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        found.setdefault(row["cell"], {})[row["set"], row["quantity"]] = float(row["value"])
    recipes = {row["cell"]: row["recipe"] for row in rows}
    tests = {test for dataset in study.datasets.values() for test in dataset.test}
    for cell, values in found.items():
        assert values["", "trained"] > 0
        assert tests <= {subject for subject, quantity in values if quantity == "forces_rmse"}
        is_judged = {f"{base}" for base in study.base_test} <= {
            subject for subject, quantity in values if quantity == "forces_rmse_ratio"
        }
        assert is_judged is not study.recipes[recipes[cell]].scratch
        if name == "phonons":
            assert values["NaCl", "omega_mae"] > 0
    if name in ("frozen", "seven", "sparse"):
        trained = {recipes[cell]: values["", "trained"] for cell, values in found.items()}
        assert trained["freeze 6"] < trained["freeze 5"] < trained["naive"]
    assert (tmp_path / "results/report.html").stat().st_size > 10_000
