"""The README's code and commands run as written there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft import bundle, data
from jaxft.data import Frame

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "benchmarks" / "data" / "gfn2_small.model"
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, frames: list[Frame], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the README speaks of."""
    from test_cli import write_frames

    shutil.copy(SHIPPED, tmp_path / "mace.model")
    write_frames(tmp_path / "train.xyz", frames)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jaxft(*arguments: str) -> None:
    command = [sys.executable, "-m", "jaxft", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_code_on_the_first_screen_runs(folder: Path, capsys: pytest.CaptureFixture) -> None:
    from converters.to_jax import convert

    bundle.save(folder / "base.jaxft", *convert(SHIPPED))
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 14  # imports are two
    exec(compile(code, "README.md", "exec"), {})
    assert "trainable params" in capsys.readouterr().out
    assert (folder / "tuned.jaxft" / "model.json").is_file()


@pytest.mark.torch
def test_the_commands_on_the_first_screen_run(folder: Path) -> None:
    pytest.importorskip("mace")
    commands = [
        line.split("#")[0].split() for line in blocks("bash")[0].splitlines() if line.strip()
    ]
    assert [words[1] for words in commands] == ["convert", "finetune", "export"]
    text = subprocess.run(
        [sys.executable, "-m", "jaxft", "init", "--preset", "lora"], capture_output=True, text=True
    ).stdout
    (folder / "config.yaml").write_text(text)
    for words in commands:
        jaxft(*words[1:], *(["epochs=1"] if words[1] == "finetune" else []))
    exported = commands[-1][-1]
    assert (folder / exported).is_file()


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in name:
            assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:docs|configs|benchmarks|tests)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_the_quickstart_data_are_there() -> None:
    folder = ROOT / "benchmarks" / "data"
    frames = data.without_isolated_atoms(data.read(folder / "ethanol_train.xyz"))
    assert len(frames) >= 200
    assert all(frame.energy is not None and frame.forces is not None for frame in frames)
