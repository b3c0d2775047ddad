"""Cells trained as one step give the numbers that they give alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_study import COMMON, folder, planned  # noqa: F401

import jaxft
from jaxft import tree
from jaxft.study import results, work
from jaxft.study.stacking import key_of, stacks

RECIPES = {
    "lora": {
        "recipe": [
            {
                "strategy": "lora",
                "rank": 1,
                "where": "products_*/linear/**",
                "also_train": "readouts_*/**",
            },
            {"strategy": "l2sp", "strength": 1.0},
        ],
        "vary": {
            "point": {
                "weak": ["recipe.1.strength=0.5", "optimizer.learning_rate=1e-3"],
                "strong": ["recipe.1.strength=20", "optimizer.learning_rate=1e-2"],
            }
        },
    }
}
"""Coordinates, a penalty, and both numbers that may differ."""

ROUNDING = 1e-10
"""Relative; float64, a few updates."""


def test_stacked_cells_are_those_that_run_alone(folder, tmp_path, few_shapes) -> None:  # noqa: F811
    """Rates, strengths and seeds at once: four members."""
    words = ["optimizer.schedule=cosine", "ema_decay=0.9", "batch_size=3"]
    changes = {"recipes": RECIPES, "seeds": 2, "set": [*COMMON, *words], "budget": {"epochs": 2}}
    together = planned(folder, tmp_path / "together", **changes)
    assert [len(stack) for stack in stacks(together)] == [4]
    said: list[str] = []
    work.work(together, said.append, together=True)
    assert said[0].startswith("4 cells in one step")
    assert len(said) == 1  # nothing was left to do
    alone = planned(folder, tmp_path / "alone", **changes)
    chosen = [0, 3]
    work.work([alone[i] for i in chosen], said.append)
    for i in chosen:
        of_stack, own = (history(cells[i]) for cells in (together, alone))
        assert len(own) == 3
        for a, b in zip(of_stack, own, strict=True):
            for name in ("train/loss", "valid/loss", "valid/forces", "valid/energy"):
                if name in b:
                    assert a[name] == pytest.approx(b[name], rel=ROUNDING), (i, name)
            assert a["is_best"] == b["is_best"]
        for path, leaf in tuned(alone[i]).items():
            np.testing.assert_allclose(tuned(together[i])[path], leaf, rtol=ROUNDING, atol=1e-12)
        numbers = [
            {
                (q.set, q.name): q.value
                for q in results.read(c.folder).quantities
                if "seconds" not in q.name
            }
            for c in (together[i], alone[i])
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-7)
    ends = [history(cell)[-1]["valid/loss"] for cell in together]
    assert len(set(ends)) == 4  # every number has an effect


def history(cell) -> list[dict]:
    return [json.loads(x) for x in (cell.config.output / "metrics.jsonl").read_text().splitlines()]


def tuned(cell) -> dict:
    _, params, _ = jaxft.bundle.load_numpy(cell.config.output / "model.jaxft")
    return tree.flatten(params)


def test_a_member_that_diverges_leaves_the_others_alone(folder, tmp_path, few_shapes) -> None:  # noqa: F811
    found = planned(
        folder,
        tmp_path,
        set=[*COMMON, "optimizer.clip_norm=null"],
        vary={"optimizer.learning_rate": [1e-3, 1e200]},
    )
    work.work(found, lambda line: None, together=True)
    assert [work.status(cell) for cell in found] == ["done", "diverged"]


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([], 1),
        (["patience=3"], 0),
        (["accumulate=2"], 0),
        (["optimizer.plateau={factor: 0.5}"], 0),
    ],
)
def test_who_can_be_stacked(folder: Path, tmp_path: Path, words, count) -> None:  # noqa: F811
    found = planned(folder, tmp_path, seeds=2, set=[*COMMON, *words])
    assert len(stacks(found)) == count
    batches = planned(folder, tmp_path, vary={"batch_size": [2, 3]})
    assert stacks(batches) == []
    drawn = planned(folder, tmp_path, seeds=2, sizes=[4])  # of each seed another training set
    assert len({key_of(cell.config) for cell in drawn}) == 2
