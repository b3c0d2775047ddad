"""What a config cannot ask for: one clear error each, before anything is compiled or written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from test_cli import run, write_frames

import jaxft
from jaxft import tree
from jaxft.data import Frame
from jaxft.fisherfile import save as save_fisher
from jaxft.strategies import Fisher


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny: tuple, frames: list[Frame]) -> Path:
    """A bundle, frames, frames without labels, and Fishers of this model and of another."""
    folder = tmp_path_factory.mktemp("refusals")
    model, params = tiny
    jaxft.save(folder / "tiny.jaxft", model, params)
    write_frames(folder / "frames.xyz", frames)
    text = (folder / "frames.xyz").read_text()
    (folder / "bare.xyz").write_text(text.replace("REF_", "DFT_"))
    ones = jax.tree.map(np.ones_like, params)
    save_fisher(folder / "own.fisher", Fisher(ones, "0123456789abcdef"))
    fewer = {path: leaf for path, leaf in tree.flatten(ones).items() if "readouts_1" not in path}
    save_fisher(folder / "smaller.fisher", Fisher(tree.unflatten(fewer)))
    return folder


LORA = {"strategy": "lora", "rank": 2}
REPLAY = {"strategy": "replay", "files": "{folder}/frames.xyz"}
ALTERNATE = {**REPLAY, "schedule": "alternate"}
EWC = {"strategy": "ewc", "fisher": "{folder}/own.fisher", "strength": 1.0}
HEAD = {"head": "target", "add_head": {}}

MISTAKES = {
    "misspelt pattern": (
        {"recipe": [{"strategy": "freeze", "where": "interaction_*/**"}]},
        ["'interaction_*/**' matches none of 35", "closest: 'interactions_"],
    ),
    "misspelt pattern of rates": (
        {"recipe": [{"strategy": "rates", "factors": {"product_*/**": 0.1}}]},
        ["'product_*/**' matches none", "closest: 'products_"],
    ),
    "misspelt pattern of a decay": (
        {
            "recipe": [{"strategy": "delta"}],
            "optimizer": {"weight_decay": {"coords/dleta/**": 1.0}},
        },
        ["coords/dleta/**", "coords/delta/"],
    ),
    "rank too large": (
        {"recipe": [{"strategy": "lora", "rank": 4}]},
        ["rank=4) is not low rank for 'interactions_0/", "(4, 4)", "use rank < 4"],
    ),
    "unknown head": ({"head": "pbe"}, ["head 'pbe' was asked for", "'Default'"]),
    "unknown head of a source": (
        {"recipe": [{**REPLAY, "strategy": "multihead_replay", "head": "mp"}], **HEAD},
        ["head 'mp' was asked for", "'Default', 'target'"],
    ),
    "source without the head it needs": (
        {"recipe": [{**REPLAY, "strategy": "multihead_replay"}], **HEAD},
        ["multihead_replay", "set `head`"],
    ),
    "head that exists": ({"head": "Default", "add_head": {}}, ["Default"]),
    "zero labelled frames": (
        {"train": "{folder}/bare.xyz"},
        ["none of 8 frames", "has energy under the key 'REF_energy'", "set the key"],
    ),
    "zero labelled frames of a source": (
        {"recipe": [{**REPLAY, "files": "{folder}/bare.xyz"}]},
        ["has energy under the key 'REF_energy'", "bare.xyz"],
    ),
    "no energies to estimate from": (
        {
            "train": "{folder}/bare.xyz",
            "keys": {"forces": "DFT_forces", "energy": "none"},
            "loss": {"energy": 0.0, "forces": 1.0},
            "valid": 0.3,
            "e0s": "estimated",
        },
        ["e0s: estimated needs energies"],
    ),
    "Fisher of another model": (
        {"recipe": [EWC]},
        ["Fisher of another model", "0123456789abcdef"],
    ),
    "Fisher of other leaves": (
        {"recipe": [{**EWC, "fisher": "{folder}/smaller.fisher"}]},
        ["Fisher of other parameters", "- readouts_1/linear_1/0e"],
    ),
    "no Fisher": (
        {"recipe": [{**EWC, "fisher": "{folder}/frames.xyz"}]},
        ["is not a Fisher that this jaxft reads"],
    ),
    "two strategies with one name": (
        {"recipe": [LORA, {"strategy": "freeze", "level": 1}, LORA]},
        ["two strategies", "name"],
    ),
    "nothing left to train": (
        {"recipe": [{"strategy": "freeze", "level": 7}]},
        ["leaves nothing to train"],
    ),
    "replay at two levels of theory": (
        {"recipe": [REPLAY], "e0s": "estimated"},
        ["two levels of theory", "e0s: foundation"],
    ),
    "labels of no weight": (
        {"config_types": {"Default": 0.0}},
        ["none of 8 frames", "has energy"],
    ),
    "metric without labels": (
        {
            "recipe": [{**REPLAY, "keys": {"energy": "none"}}],
            "loss": {"energy": 1.0, "forces": 1.0},
            "metric": "replay/energy",
        },
        ["has energy under the key"],
    ),
    "a source called like a set of the run": (
        {"recipe": [{**REPLAY, "name": "valid"}]},
        ["'valid' is the name of a set of the run"],
    ),
    "labels for pseudolabels": (
        {"recipe": [{**REPLAY, "strategy": "pseudolabel_replay", "labels": "given"}]},
        ["makes its own labels"],
    ),
    "accumulation of a mean over the batch": (
        {"recipe": [{"strategy": "distill", "strength": 1.0}], "accumulate": 2},
        ["'distill' takes a mean over each batch", "accumulate=1"],
    ),
    "metric of nobody": (
        {"metric": "memory/forces"},
        ["'memory/forces' is of a set that is not watched"],
    ),
    "schedule-free with an average": (
        {"optimizer": {"name": "schedule_free"}},
        ["ema_decay: null"],
    ),
    "schedule-free with late changes": (
        {
            "optimizer": {"name": "schedule_free"},
            "ema_decay": None,
            "recipe": [{"strategy": "rates", "factors": {"readouts_*/**": 0.1}}],
        },
        ["'rates' changes updates", "use adamw"],
    ),
    "accumulation of alternating updates": (
        {"recipe": [ALTERNATE], "accumulate": 2},
        ["accumulate does not go with"],
    ),
    "projection without a second gradient": (
        {"optimizer": {"alternation": "project"}},
        ["alternation: project needs a replay"],
    ),
    "too few frames to select": (
        {"recipe": [{**REPLAY, "select": {"n": 100}}]},
        ["100", "8"],
    ),
    "warm-up that never ends": (
        {"optimizer": {"warmup": 1000}},
        ["warmup=1000"],
    ),
}


AFTER_PREFLIGHT = (
    "misspelt pattern of a decay",
    "schedule-free with late",
    "warm-up",
    "accumulation of a mean",
)
"""Found after energies were predicted, but before a training step is compiled."""


def filled(value: Any, folder: Path) -> Any:
    return json.loads(json.dumps(value).replace("{folder}", str(folder)))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_error(
    mistake: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, words = MISTAKES[mistake]
    settings = {
        "model": str(folder / "tiny.jaxft"),
        "output": str(tmp_path / "run"),
        "train": str(folder / "frames.xyz"),
        "valid": str(folder / "frames.xyz"),
        "e0s": "foundation",
        "epochs": 1,
        "dtype": "float64",
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings | filled(changes, folder)))

    def compiled(*_: Any, **__: Any) -> None:
        raise AssertionError("a potential would be compiled")

    is_late = mistake.startswith(AFTER_PREFLIGHT)
    monkeypatch.setattr("jaxft.inputs.preflight", (lambda *_, **__: None) if is_late else compiled)
    monkeypatch.setattr("jaxft.run.fit", compiled)
    result = run("finetune", path)
    assert result.exit_code == 1, result.output
    assert not (tmp_path / "run").exists()
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr, result.stderr
