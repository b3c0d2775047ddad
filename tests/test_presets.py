"""Every preset runs on the project's own data, in a form small enough for a test."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import ase.io
import jax
import numpy as np
import pytest
from conftest import first_layer
from rich.console import Console

import jaxft
from converters.to_jax import convert
from jaxft import adapter, config, presets, run, surgery, tree
from jaxft.fisherrun import estimate_fisher
from jaxft.train import Trainable

DATA = Path(__file__).parents[1] / "benchmarks" / "data"
ELEMENTS = ["H", "C", "O"]

SHORT = ["epochs=2", "batch_size=2", "dtype=float64"]
"""Overrides: float64, so that an adapter merges to the very numbers that the run saved."""

OTHER_LEVEL = {"estimated", "average"}
"""Settings of ``e0s`` for labels that the foundation model does not share."""


RUNS_PER_MEMORY = 6
"""After which compiled programs are forgotten: a process may only have so many mappings."""


@pytest.fixture(autouse=True)
def forget_programs_now_and_then(counter=itertools.count(1)):  # noqa: B008
    yield
    if next(counter) % RUNS_PER_MEMORY == 0:
        jax.clear_caches()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What presets name: base.jaxft, train.xyz of both levels of theory, replay.xyz, base.fisher,
    sparse.jaxft."""
    folder = tmp_path_factory.mktemp("presets")
    model, params = convert(DATA / "gfn2_small.model")
    small = surgery.select_elements(*first_layer(model, params), ELEMENTS)
    jaxft.save(folder / "base.jaxft", *small)
    ethanol = ase.io.read(DATA / "ethanol_train.xyz", ":10")
    known = [a for a in ase.io.read(DATA / "base_train.xyz", ":") if set(a.symbols) <= {*ELEMENTS}]
    molecules = [atoms for atoms in known if 3 < len(atoms) < 10]
    for atoms in molecules[:10]:  # a label of the Hessian that means nothing
        unit = np.eye(len(atoms), 3)
        atoms.arrays |= {"probe": unit, "REF_hvp": unit}
    ase.io.write(folder / "pbe.xyz", ethanol)
    ase.io.write(folder / "gfn2.xyz", molecules[:10])
    ase.io.write(folder / "replay.xyz", molecules[10:18])
    return folder


def load(name: str, folder: Path, output: Path, **changes: str) -> config.Config:
    path = folder / f"{name}.yaml"
    path.write_text(presets.text(name))
    first = config.load(path)
    train = "pbe.xyz" if first.e0s in OTHER_LEVEL else "gfn2.xyz"
    found = {"train": str(folder / train), "output": str(output), "valid": "0.2", **changes}
    found.setdefault("model", str(folder / first.model))
    overrides = [f"{key}={value}" for key, value in found.items()]
    document = first.model_dump(mode="json", by_alias=True, exclude_unset=True)
    for entry in document["recipe"]:
        for key in {"files", "fisher", "support"} & set(entry):
            entry[key] = str(folder / entry[key])
        if "head" in entry:
            entry["head"] = "Default"
        if "select" in entry:
            entry["select"]["n"] = 6
    path.write_text(json.dumps(document))  # JSON is YAML
    return config.load(path, [*SHORT, *overrides])


@pytest.fixture(scope="module")
def fisher(folder: Path) -> None:
    settings = load("ewc", folder, folder / "unused")
    estimate_fisher(
        settings,
        [folder / "replay.xyz"],
        folder / "base.fisher",
        n=4,
        probes=None,
        threshold=None,
        normalise=None,
        head=None,
        strength=None,
        seed=0,
        console=Console(quiet=True),
    )


@pytest.fixture(scope="module")
def sparse_model(folder: Path) -> None:
    """As a sparse run leaves it: some numbers changed, most not."""
    model, params = jaxft.load(folder / "base.jaxft", dtype="float64")
    changed = {"readouts_0/linear/0e", "products_0/linear/0e"}
    flat = tree.flatten(params)
    tuned = {k: v * (1.01 if k in changed else 1.0) for k, v in flat.items()}
    jaxft.save(folder / "sparse.jaxft", model, tree.unflatten(tuned))


def test_an_adapter_belongs_to_its_potential(folder: Path, tmp_path: Path) -> None:
    """Not to its parameters alone."""
    model, params = jaxft.load(folder / "base.jaxft", dtype="float64")
    trained = Trainable({"readouts_0": {"linear": {"0e": np.ones((32, 1))}}}, {})
    own = adapter.Adapter(adapter.digest_of(model, params), [], trained, model.heads, model.e0s)
    read = adapter.load(adapter.save(tmp_path / "adapter", own))
    _, merged = adapter.merge(read, model, params)
    assert (np.asarray(merged["readouts_0"]["linear"]["0e"]) == 1).all()
    with pytest.raises(ValueError, match=r"(?s)trained on the model .* started from"):
        adapter.merge(read, surgery.set_scale_shift(model, scale=2.0, shift=0.0), params)
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        adapter.save(tmp_path / "adapter", own)


@pytest.mark.parametrize("damage", ["no json", "other format", "truncated", "stranger"])
def test_a_damaged_adapter_is_named_and_runs_nothing(damage: str, tmp_path: Path) -> None:
    trained = Trainable({"readouts_0": {"linear": {"0e": np.ones((32, 1))}}}, {})
    path = adapter.save(
        tmp_path / "adapter", adapter.Adapter("abc", [], trained, ("Default",), np.zeros((1, 3)))
    )
    document = path / "adapter.json"
    if damage == "truncated":
        arrays = path / "adapter.safetensors"
        arrays.write_bytes(arrays.read_bytes()[:40])
    elif damage == "no json":
        document.write_text("{")
    elif damage == "other format":
        document.write_text(document.read_text().replace("jaxft-adapter", "else"))
    else:
        recipe = [{"strategy": "os.system", "name": "x"}]
        document.write_text(json.dumps(json.loads(document.read_text()) | {"recipe": recipe}))
    with pytest.raises(ValueError, match="is not an adapter that this jaxft reads"):
        adapter.load(path)


ELSEWHERE = {"quickstart", "moments", "phonon-hessian"}
"""Presets that other tests run: ``moments`` needs labels of its own, see test_moments.py, and the
third derivatives of ``phonon-hessian`` compile for half a minute, see test_curvature.py."""


@pytest.mark.parametrize("name", [n for n in presets.names() if n not in ELSEWHERE])
def test_preset_runs(name: str, folder: Path, fisher, sparse_model, tmp_path: Path) -> None:
    settings = load(name, folder, tmp_path / "run")
    result = run.finetune(settings)
    base_model, base = jaxft.load(settings.model, dtype="float64")
    model, tuned = jaxft.load(result.path, dtype="float64")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    numbers = [v for row in rows for v in row.values() if isinstance(v, float)]
    assert np.isfinite(numbers).all()
    watched = {entry.name for entry in settings.sources if entry.labels != "none"}
    assert {key.split("/")[0] for key in rows[0] if "/" in key} == {"valid", *watched}
    last = {k: np.asarray(v) for k, v in tree.flatten(result.fit.params).items()}
    assert all(np.array_equal(last[k], v) for k, v in tree.flatten(tuned).items())
    if settings.add_head is None:
        assert jax.tree.structure(base) == jax.tree.structure(tuned)
    else:
        assert model.heads == (*base_model.heads, "target")
    assert "<title>jaxft run</title>" in (tmp_path / "run/report.html").read_text()
    assert "@" in (tmp_path / "run/citations.bib").read_text()

    path = tmp_path / "run/adapter"
    owns = {"lora", "lora_torch", "elora", "dora", "delta", "sparse"}
    assert path.exists() == bool(owns & {entry.strategy for entry in settings.recipe})
    if path.exists():
        merged_model, merged = adapter.merge(adapter.load(path), base_model, base)
        assert merged_model.heads == model.heads
        np.testing.assert_array_equal(merged_model.e0s, model.e0s)
        for key, leaf in tree.flatten(merged).items():
            np.testing.assert_allclose(leaf, last[key], rtol=1e-13, atol=1e-15, err_msg=key)


def test_the_quickstart_is_a_valid_config(tmp_path: Path) -> None:
    (tmp_path / "q.yaml").write_text(presets.text("quickstart"))
    assert config.load(tmp_path / "q.yaml").recipe == []


def test_every_preset_says_what_it_is_and_how_to_run_it() -> None:
    for name in presets.names():
        text = presets.text(name)
        assert text.startswith("# "), name
        assert f"jaxft finetune {name}.yaml" in text or name == "quickstart", name
