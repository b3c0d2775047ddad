"""Configs are strict, explain their mistakes and cannot run code."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jaxft import config, presets
from jaxft.data import Keys
from jaxft.recipe import Setting

MINIMAL = {
    "model": "base.jaxft",
    "output": "run",
    "train": "train.xyz",
    "e0s": "isolated_atoms",
    "epochs": 3,
}


SETTING = Setting(None, {}, Keys())  # type: ignore[arg-type]
"""For strategies that look neither at the model nor at data."""


def write(folder: Path, **changes: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    return path


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_a_valid_config(name: str, tmp_path: Path) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text(presets.text(name))
    assert config.load(path).epochs > 0
    assert presets.text(name).startswith("# ")


def test_the_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    path = write(tmp_path, recipe=[{"strategy": "freeze", "except": "readouts_*/**"}])
    first = config.load(path)
    path.write_text(config.to_yaml(first))
    assert config.load(path) == first


def test_overrides_are_dotted_and_typed(tmp_path: Path) -> None:
    overrides = ["optimizer.learning_rate=1e-4", "epochs=7", "loss.stress=2"]
    found = config.load(write(tmp_path), overrides)
    assert found.optimizer.learning_rate == 1e-4
    assert (found.epochs, found.loss.stress) == (7, 2.0)


def test_a_recipe_becomes_strategies_in_order(tmp_path: Path) -> None:
    entries = [
        {"strategy": "lora", "rank": 2},
        {"strategy": "freeze", "where": "node_embedding/**", "name": "keep"},
    ]
    recipe = config.strategies(config.load(write(tmp_path, recipe=entries)), SETTING)
    assert [strategy.name for strategy in recipe] == ["lora", "keep"]


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({"epoch": 3}, [], ["unknown key 'epoch'", "did you mean 'epochs'"]),
        ({"loss": {"force": 1.0}}, [], ["unknown key 'force'", "did you mean 'forces'"]),
        ({"optimizer": {"lr": 1.0}}, [], ["unknown key 'lr'", "learning_rate"]),
        (
            {"recipe": [{"strategy": "lora", "ranks": 4}]},
            [],
            ["unknown key 'ranks'", "did you mean 'rank'"],
        ),
        ({"recipe": [{"strategy": "lorra"}]}, [], ["lorra", "'freeze', 'rates', 'lora'"]),
        ({"epochs": 0}, [], ["epochs", "greater than or equal to 1"]),
        ({"e0s": {"Xx": -1.0}}, [], ["'Xx'", "no chemical symbol"]),
        ({"dtype": "float16"}, [], ["dtype", "float32"]),
        ({}, ["epochs"], ["'epochs' is no override", "key=value"]),
        ({}, ["model.name=1"], ["model.name=1", "has no keys of its own"]),
        ({}, ["loss.force=1"], ["did you mean 'forces'"]),
    ],
)
def test_mistakes_name_the_key_and_the_closest_match(
    changes: dict, overrides: list[str], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(config.ConfigError) as caught:
        config.load(write(tmp_path, **changes), overrides)
    for word in words:
        assert word in str(caught.value)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: a\noutput: b\n")
    with pytest.raises(config.ConfigError, match=r"(?s)train: Field required.*epochs"):
        config.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {marker}']",
        "model: !!python/object/apply:os.system ['touch {marker}']",
        "[1, 2",
        "- a\n- list",
        "just text",
        "",
        "a: &x [1,1]\nb: [*x, *x]",
        "[" * 5000,
        "epochs: 1\nepochs: 7",
    ],
)
def test_yaml_from_a_stranger_is_refused_and_runs_nothing(text: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "config.yaml"
    path.write_text(text.replace("{marker}", str(marker)))
    with pytest.raises(config.ConfigError):
        config.load(path)
    assert not marker.exists()


def test_absent_and_oversized_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match="is not a file"):
        config.load(tmp_path / "none.yaml")
    large = tmp_path / "large.yaml"
    large.write_text("a: 1\n" * config.MAX_BYTES)
    with pytest.raises(config.ConfigError, match="small YAML"):
        config.load(large)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"(?s)'lorra'.*freeze, .*lora, .*naive.*'lora'"):
        presets.text("lorra")
