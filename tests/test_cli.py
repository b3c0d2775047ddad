"""The command: what it writes, what it refuses, and with which exit code."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import ase
import ase.io
import jax
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import jaxft
from converters import registry
from jaxft import bundle, surgery, tree
from jaxft.cli import app
from jaxft.data import Frame

MODEL = Path(__file__).parents[1] / "benchmarks" / "data" / "gfn2_small.model"


def run(*arguments: object) -> object:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_frames(path: Path, frames: list[Frame]) -> Path:
    images = []
    for frame in frames:
        atoms = ase.Atoms(frame.atomic_numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
        atoms.info["REF_energy"] = frame.energy
        atoms.arrays["REF_forces"] = frame.forces
        if frame.stress is not None:
            atoms.info["REF_stress"] = frame.stress
        images.append(atoms)
    ase.io.write(path, images)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: tuple, frames: list[Frame]) -> Path:
    """A folder with a bundle ``tiny.jaxft`` and labelled frames ``frames.xyz``."""
    folder = tmp_path_factory.mktemp("cli")
    jaxft.save(folder / "tiny.jaxft", *tiny)
    write_frames(folder / "frames.xyz", frames)
    return folder


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> dict:
    return {
        "model": str(folder / "tiny.jaxft"),
        "output": str(tmp_path / "run"),
        "train": str(folder / "frames.xyz"),
        "valid": str(folder / "frames.xyz"),
        "e0s": "foundation",
        "recipe": [{"strategy": "freeze", "except": "readouts_*/**"}],
        "epochs": 2,
        "batch_size": 4,
        "dtype": "float64",
    }


def config_file(folder: Path, settings: dict) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_convert_info_and_convert_again(tiny_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.jaxft"
    assert run("convert", tiny_file, out).exit_code == 0
    of_bundle = json.loads(run("info", out, "--json").stdout)
    of_file = json.loads(run("info", tiny_file, "--json").stdout)
    assert {key for key in of_file if of_file[key] != of_bundle[key]} == {"file", "writer"}
    assert of_file["heads"] == ["Default"]
    assert set(of_file["e0s"]["Default"]) == {"H", "C", "O", "Na", "Cl"}
    assert "ScaleShiftMACE" in run("info", out).stdout
    again = run("convert", tiny_file, out)
    assert again.exit_code == 1
    assert "exists; nothing was overwritten" in again.output


def test_convert_casts_parameters_and_keeps_the_isolated_atoms(
    tiny_file: Path, tmp_path: Path
) -> None:
    assert run("convert", tiny_file, tmp_path / "b", "--dtype", "float32").exit_code == 0
    model, params = jaxft.load(tmp_path / "b")
    original, _, _ = bundle.load_numpy(tmp_path / "b")
    assert {leaf.dtype.name for leaf in tree.flatten(params).values()} == {"float32"}
    assert model.buffers["atomic_energies_fn/atomic_energies"].dtype == np.float64
    assert original.config == model.config


def test_predict_writes_what_ase_reads_back(folder: Path, tmp_path: Path, tiny: tuple) -> None:
    out = tmp_path / "out.xyz"
    result = run("predict", folder / "tiny.jaxft", folder / "frames.xyz", out)
    assert result.exit_code == 0, result.output
    predicted, given = ase.io.read(out, ":"), ase.io.read(folder / "frames.xyz", ":")
    assert len(predicted) == len(given)
    for new, old in zip(predicted, given, strict=True):
        assert np.isfinite(new.get_potential_energy())
        assert new.get_forces().shape == (len(new), 3)
        assert new.info["REF_energy"] == old.info["REF_energy"]
        if all(new.pbc):
            assert new.get_stress().shape == (6,)
    assert run("predict", folder / "tiny.jaxft", folder / "frames.xyz", out).exit_code == 1


def test_evaluate_errors_prints_a_table_or_json(folder: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", "errors", folder / "tiny.jaxft", folder / "frames.xyz")
    assert "F RMSE" in run(*arguments).stdout
    plot = tmp_path / "parity.png"
    found = json.loads(run(*arguments, "--json", "--plot", plot).stdout)
    assert found["total"]["forces"]["rmse"] > 0
    assert plot.stat().st_size > 1000


def test_finetune_leaves_a_better_bundle_and_its_record(
    settings: dict, folder: Path, tmp_path: Path
) -> None:
    settings["test"] = {"same frames": {"files": settings["train"], "e0s": "base"}}
    settings["ema_decay"] = None
    settings["optimizer"] = {"learning_rate": 1e-2}
    result = run("finetune", config_file(tmp_path, settings), "epochs=4")
    assert result.exit_code == 0, result.output
    output = tmp_path / "run"
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    assert min(row["valid/loss"] for row in rows) < rows[0]["valid/loss"]
    assert yaml.safe_load((output / "config.yaml").read_text())["epochs"] == 4
    assert (output / "parity-same-frames.png").is_file()
    assert "same frames" in result.stdout
    provenance = json.loads(run("info", output / "model.jaxft", "--json").stdout)["provenance"]
    assert provenance["config"]["epochs"] == 4
    again = run("finetune", config_file(tmp_path, settings))
    assert again.exit_code == 1
    assert "exists; nothing was overwritten" in again.output


def test_describe_counts_what_trains(settings: dict, tmp_path: Path) -> None:
    lines = run("describe", config_file(tmp_path, settings)).stdout.splitlines()
    assert any("interactions_0/linear_up/0e" in line and "frozen" in line for line in lines)
    assert lines[-1].startswith("trainable params: ")


def test_init_and_schema() -> None:
    assert {"freeze", "lora", "naive"} <= set(run("init").stdout.split())
    assert yaml.safe_load(run("init", "--preset", "lora").stdout)["recipe"]
    assert json.loads(run("schema").stdout)["properties"]["epochs"]


def no_zip(path: Path) -> None:
    path.write_bytes(b"this is no model" * 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def torchscript(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("m/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("m/code/__torch__.py", "")


def state_dict(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({"a": 1.0}, protocol=2))
        archive.writestr("m/version", "3\n")


class Payload:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


def hostile(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps(Payload(), protocol=2))
        archive.writestr("m/version", "3\n")


def truncated(path: Path) -> None:
    path.write_bytes(MODEL.read_bytes()[:200_000])


@pytest.mark.parametrize("make", [no_zip, empty, torchscript, state_dict, hostile, truncated])
@pytest.mark.parametrize("command", ["convert", "info"])
def test_files_that_are_no_model_are_refused(command: str, make: object, tmp_path: Path) -> None:
    path = tmp_path / "file.model"
    make(path)
    arguments = [path, tmp_path / "out.jaxft"] if command == "convert" else [path]
    result = run(command, *arguments)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert "executed" not in result.output.splitlines()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file.model"]


def break_element(frames: list[ase.Atoms]) -> None:
    frames[1].numbers[0] = 92


def break_labels(frames: list[ase.Atoms]) -> None:
    for atoms in frames:
        del atoms.info["REF_energy"]


def break_numbers(frames: list[ase.Atoms]) -> None:
    frames[2].arrays["REF_forces"][0, 0] = np.nan


@pytest.mark.parametrize(
    ("break_", "words"),
    [
        (break_element, ["frames.xyz:1", "U", "H C O Na Cl"]),
        (break_labels, ["REF_energy", "none of"]),
        (break_numbers, ["frames.xyz:2", "REF_forces", "NaN"]),
    ],
)
def test_frames_that_cannot_be_used_stop_the_run_before_it_starts(
    break_: object, words: list[str], settings: dict, folder: Path, tmp_path: Path
) -> None:
    images = ase.io.read(folder / "frames.xyz", ":")
    break_(images)
    ase.io.write(tmp_path / "frames.xyz", images)
    settings["train"] = str(tmp_path / "frames.xyz")
    result = run("finetune", config_file(tmp_path, settings))
    assert result.exit_code == 1
    for word in words:
        assert word in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epoch": 3}, ["unknown key 'epoch'", "'epochs'"]),
        ({"model": "absent.jaxft"}, ["absent.jaxft", "jaxft convert"]),
        ({"train": "absent.xyz"}, ["absent.xyz"]),
        ({"recipe": [{"strategy": "freeze", "where": "readout_*/**"}]}, ["closest"]),
        ({"recipe": [{"strategy": "lora", "rank": 400}]}, ["rank=400", "use rank <"]),
        ({"e0s": "isolated_atoms"}, ["no isolated-atom energy", "foundation"]),
        ({"e0s": dict.fromkeys(["H", "C", "O", "Na", "Cl", "U"], -1.0)}, ["for U", "H C O"]),
        ({"recipe": [{"strategy": "freeze", "where": "**"}]}, ["leaves nothing to train"]),
        ({"loss": {"energy": 0, "forces": 0}}, ["loss", "no weight"]),
        ({"optimizer": {"weight_decay": -0.1}}, ["weight_decay", "negative"]),
        ({"optimizer": {"learning_rate": float("inf")}}, ["learning_rate", "finite"]),
        ({"seed": 10**20}, ["seed", "less than"]),
        ({"output": "run [x]"}, ["output", "* ? [ ]"]),
        ({"test": {"a b": {"files": "x"}, "a-b": {"files": "x"}}}, ["names of test sets"]),
        ({"metric": "stress", "valid": "molecules.xyz"}, ["stress", "REF_stress"]),
        ({"loss": {"stress": 1.0}, "train": "molecules.xyz"}, ["stress", "three directions"]),
        ({"valid": "uranium.xyz"}, ["uranium.xyz:0", "does not know"]),
        ({"loss": {"stress": 1.0, "energy": 0.0, "forces": 0.0}, "keys": {"stress": "s"}}, ["'s'"]),
    ],
)
def test_settings_that_cannot_be_used_stop_the_run_before_it_starts(
    changes: dict,
    words: list[str],
    settings: dict,
    frames: list[Frame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_frames(tmp_path / "molecules.xyz", [f for f in frames if not f.is_periodic])
    uranium = ase.Atoms("U", info={"REF_energy": 0.0})
    uranium.arrays["REF_forces"] = np.zeros((1, 3))
    ase.io.write("uranium.xyz", uranium)
    result = run("finetune", config_file(tmp_path, settings | changes))
    assert result.exit_code == 1
    for word in words:
        assert word in result.output
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run [x]").exists()


@pytest.mark.parametrize("name", ["out.traj", "out.xyz.gz", "absent/out.xyz"])
def test_predict_refuses_names_that_it_cannot_write(
    name: str, folder: Path, tmp_path: Path
) -> None:
    result = run("predict", folder / "tiny.jaxft", folder / "frames.xyz", tmp_path / name)
    assert result.exit_code == 1
    assert "NAME.xyz" in result.output
    assert not list(tmp_path.iterdir())


def test_a_plot_is_never_overwritten(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    picture.write_text("precious")
    arguments = ("evaluate", "errors", folder / "tiny.jaxft", folder / "frames.xyz", "--plot")
    assert run(*arguments, picture).exit_code == 1
    assert picture.read_text() == "precious"
    assert run(*arguments, tmp_path / "plot.doc").exit_code == 1


def test_names_with_brackets_are_printed_as_they_are(folder: Path, tmp_path: Path) -> None:
    images = ase.io.read(folder / "frames.xyz", ":")
    for atoms, name in zip(images, ["a[/b]", "[c] d"] * 4, strict=False):
        atoms.info["config_type"] = name
    ase.io.write(tmp_path / "named.xyz", images)
    result = run("evaluate", "errors", folder / "tiny.jaxft", tmp_path / "named.xyz")
    assert result.exit_code == 0
    assert "a[/b]" in result.stdout
    assert "[c] d" in result.stdout


@pytest.mark.parametrize("name", ["broken.db", "vasprun.xml", "broken.cif", "POSCAR", "a.xyz.gz"])
def test_damaged_structure_files_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"SQLite format 3\x00<a>data_x loop_" * 3)
    result = run("predict", folder / "tiny.jaxft", tmp_path / name, tmp_path / "out.xyz")
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert name in result.output


def edit_r_max(document: dict) -> None:
    document["model"]["r_max"] = 4.0


def edit_elements(document: dict) -> None:
    document["model"]["atomic_numbers"].reverse()


def edit_products(document: dict) -> None:
    document["model"]["products"] = []


def edit_constant(document: dict) -> None:
    document["model"]["silu_constant"] = float("nan")


def edit_provenance(document: dict) -> None:
    document["provenance"] = "abc"


@pytest.mark.parametrize(
    "edit", [edit_r_max, edit_elements, edit_products, edit_constant, edit_provenance]
)
def test_an_edited_bundle_is_refused(edit: object, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "edited.jaxft"
    shutil.copytree(folder / "tiny.jaxft", path)
    document = json.loads((path / "model.json").read_text())
    edit(document)
    (path / "model.json").write_text(json.dumps(document))
    result = run("info", path)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")


def test_predict_refuses_unknown_elements_heads_and_names(folder: Path, tmp_path: Path) -> None:
    ase.io.write(tmp_path / "uranium.xyz", ase.Atoms("U"))
    model = folder / "tiny.jaxft"
    element = run("predict", model, tmp_path / "uranium.xyz", tmp_path / "out.xyz")
    head = run("predict", model, folder / "frames.xyz", tmp_path / "out.xyz", "--head", "other")
    assert (element.exit_code, head.exit_code) == (1, 1)
    assert "U" in element.output
    assert "'Default'" in head.output
    assert not (tmp_path / "out.xyz").exists()


def test_a_diverged_run_exits_with_3_names_the_frames_and_keeps_a_good_state(
    settings: dict, tmp_path: Path
) -> None:
    settings["optimizer"] = {"name": "sgd", "learning_rate": 1e300, "clip_norm": None}
    settings["ema_decay"] = None
    result = run("finetune", config_file(tmp_path, settings))
    assert result.exit_code == 3
    assert "not finite" in result.output
    assert "frames.xyz:" in result.output
    assert any((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "model.jaxft").exists()


@pytest.fixture
def two_heads(tiny: tuple, folder: Path, tmp_path: Path) -> Path:
    """A bundle with the heads ``Default`` and ``dft``, which differ by their E0s."""
    model, params = surgery.add_head(*tiny, "dft", e0s={1: -20.0})
    return jaxft.save(tmp_path / "two.jaxft", model, params)


def test_a_head_must_be_chosen_where_there_are_several(
    two_heads: Path, folder: Path, settings: dict, tmp_path: Path
) -> None:
    settings |= {"model": str(two_heads), "epochs": 1}
    for words in (
        ("predict", two_heads, folder / "frames.xyz", tmp_path / "out.xyz"),
        ("evaluate", "errors", two_heads, folder / "frames.xyz"),
        ("finetune", config_file(tmp_path, settings)),
    ):
        result = run(*words)
        assert result.exit_code == 1
        assert "the model's heads are 'Default', 'dft'" in result.output
    assert not (tmp_path / "run").exists()
    errors = {
        head: json.loads(
            run(
                "evaluate", "errors", two_heads, folder / "frames.xyz", "--head", head, "--json"
            ).stdout
        )["total"]["energy"]["mae"]
        for head in ("Default", "dft")
    }
    assert errors["dft"] != errors["Default"]


def test_a_head_is_fine_tuned_and_the_other_stays_in_the_bundle(
    two_heads: Path, settings: dict, tmp_path: Path
) -> None:
    settings |= {"model": str(two_heads), "head": "dft", "e0s": {"H": -21.0}}
    settings["e0s"] |= dict.fromkeys(("C", "O", "Na", "Cl"), 0.0)
    result = run("finetune", config_file(tmp_path, settings), "epochs=1")
    assert result.exit_code == 0, result.output
    base, tuned = (bundle.load(path)[0] for path in (two_heads, tmp_path / "run" / "model.jaxft"))
    assert tuned.heads == ("Default", "dft")
    np.testing.assert_array_equal(tuned.e0s[0], base.e0s[0])
    assert tuned.e0s[1, tuned.atomic_numbers.index(1)] == -21.0


def test_convert_keeps_the_head_and_the_elements_that_are_asked_for(
    tiny_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "h2o.jaxft"
    assert run("convert", tiny_file, out, "--elements", "O, H", "--head", "Default").exit_code == 0
    model, _ = bundle.load(out)
    assert model.atomic_numbers == (1, 8)
    provenance = json.loads(run("info", out, "--json").stdout)["provenance"]
    assert (provenance["elements"], provenance["head"]) == (["O", "H"], "Default")
    for wrong, reason in (("--head", "Xx"), ("--elements", "Xx")):
        result = run("convert", tiny_file, tmp_path / "no.jaxft", wrong, "Xx")
        assert result.exit_code == 1
        assert re.search(reason, result.output)
    assert not (tmp_path / "no.jaxft").exists()


def test_convert_by_name_asks_for_the_licence_first(tmp_path: Path) -> None:
    result = run("convert", "mace-mh-1", tmp_path / "a.jaxft")
    assert result.exit_code == 1
    assert "--accept-license" in result.output
    result = run("convert", "mace-mp-0b3-mediun", tmp_path / "a.jaxft")
    assert result.exit_code == 1
    assert "mace-mp-0b3-medium" in result.output


def test_convert_by_name_uses_the_cache_and_says_the_licence(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = replace(
        registry.resolve("mace-mp-0b3-medium"),
        sha256=hashlib.sha256(tiny_file.read_bytes()).hexdigest(),
        size=None,
    )
    monkeypatch.setattr(registry, "PUBLISHED", {entry.name: entry})
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    shutil.copy(tiny_file, tmp_path / entry.file)
    result = run("convert", "medium-0b3", tmp_path / "a.jaxft")
    assert result.exit_code == 0, result.output
    assert "licence MIT" in result.output
    assert "arXiv:2401.00096" in result.output
    listed = json.loads(run("models", "--json").stdout)
    assert [(row["name"], row["cached"]) for row in listed] == [
        (entry.name, str(tmp_path / entry.file))
    ]
    assert "mace-mp-0b3-medium" in run("models").stdout


def test_verify_golden_without_figures_says_for_what_there_are_some(tiny_file: Path) -> None:
    result = run("verify", "--golden", tiny_file)
    assert result.exit_code == 1
    assert "MACE-MPA-0 medium" in result.output


@pytest.mark.torch
def test_verify_and_export_a_state_dict(tiny_file: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("mace")
    result = run("verify", tiny_file)
    assert result.exit_code == 0
    assert "triclinic crystal" in result.output
    assert run("convert", tiny_file, tmp_path / "a.jaxft").exit_code == 0
    assert run("export", tmp_path / "a.jaxft", tmp_path / "a.pt", "--state-dict").exit_code == 0
    weights = torch.load(tmp_path / "a.pt", weights_only=True)
    assert weights["interactions.0.linear_up.weight"].dtype == torch.float64
    result = run("convert", tmp_path / "a.pt", tmp_path / "b.jaxft")
    assert result.exit_code == 1
    assert "--like" in result.output
    assert (
        run("convert", tmp_path / "a.pt", tmp_path / "b.jaxft", "--like", tiny_file).exit_code == 0
    )
    for one, other in zip(
        *(jax.tree.leaves(bundle.load(tmp_path / name)[1]) for name in ("a.jaxft", "b.jaxft")),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
