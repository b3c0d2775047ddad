"""Bundles: bit for bit there and back; damaged ones are refused with the reason."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft import bundle, tree
from jaxft.bundle import ARRAYS, MODEL, BundleError


@pytest.fixture
def saved(tmp_path, tiny):
    return jaxft.save(tmp_path / "tiny.jaxft", *tiny)


def refuse(path, match):
    """Loading is a BundleError that names the file and says ``match``."""
    with pytest.raises(BundleError, match=match) as caught:
        jaxft.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def edit_json(path, **changes):
    document = json.loads((path / MODEL).read_text())
    document.update(changes)
    (path / MODEL).write_text(json.dumps(document))


def edit_arrays(path, change):
    arrays = load_file(path / ARRAYS)
    change(arrays)
    save_file(arrays, path / ARRAYS)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_bundle_comes_back_bit_for_bit(tmp_path, model, params, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    path = jaxft.save(tmp_path / "deep" / "a.jaxft", model, params, provenance={"from": "tiny"})
    again, loaded = jaxft.load(path)
    assert again.config == model.config
    assert bundle.read_model(path)[1] == {"from": "tiny"}
    before, after = tree.flatten(params), tree.flatten(loaded)
    assert set(before) == set(after)
    for name, leaf in before.items():
        assert isinstance(after[name], jax.Array)
        assert after[name].dtype == leaf.dtype == dtype
        assert np.asarray(after[name]).tobytes() == np.asarray(leaf).tobytes(), name
    assert set(again.buffers) == set(model.buffers)
    for name, array in model.buffers.items():
        assert again.buffers[name].dtype == array.dtype
        assert again.buffers[name].shape == array.shape
        assert again.buffers[name].tobytes() == array.tobytes(), name


def test_a_loaded_model_predicts_the_same(saved, batch, params, predictor):
    model, loaded = jaxft.load(saved)
    a = predictor(params, batch.graph)
    b = jax.jit(lambda p, g: jaxft.predict(model, p, g))(loaded, batch.graph)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_bundle_is_a_readable_folder_of_two_files(saved):
    assert sorted(p.name for p in saved.iterdir()) == sorted([MODEL, ARRAYS])
    assert stat.S_IMODE(saved.stat().st_mode) == 0o755
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_parameters_are_cast_on_request_and_constants_are_not(saved, model, params):
    again, loaded = jaxft.load(saved, dtype="float32")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {"float32"}
    np.testing.assert_array_equal(again.e0s, model.e0s)
    with pytest.raises(ValueError, match="dtype 'float16' is not supported; use one of float32, f"):
        jaxft.load(saved, dtype="float16")


def test_nothing_is_overwritten(saved, tiny, tmp_path):
    with pytest.raises(FileExistsError, match=r"tiny\.jaxft exists; nothing was overwritten. Give"):
        jaxft.save(saved, *tiny)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file exists"):
        jaxft.save(tmp_path / "file", *tiny)
    assert (tmp_path / "file").read_text() == "mine"
    jaxft.load(saved)


def test_a_failed_save_leaves_nothing_behind(tmp_path, tiny):
    with pytest.raises(TypeError):
        jaxft.save(tmp_path / "a.jaxft", *tiny, provenance={"when": object()})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle_is_refused(tmp_path, saved):
    for name in (MODEL, ARRAYS):
        (saved / name).rename(tmp_path / name)
        assert "jaxft convert" in refuse(saved, f"is not a jaxft bundle: .*{MODEL} and {ARRAYS}")
        (tmp_path / name).rename(saved / name)
    refuse(tmp_path / "gone.jaxft", "is not a jaxft bundle")
    refuse(saved / MODEL, "is not a jaxft bundle")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not JSON"),
        ('{"format": "jaxft-bundle", ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "does not describe a model"),
        ("null", "does not describe a model"),
        ('{"format": "jaxft-bundle", "version": 1}', "does not describe a model: 'model'"),
        ('{"format": "jaxft-bundle", "version": 2}', "version 2; this jaxft reads .* version 1"),
        ('{"format": "other", "version": 1}', "says format 'other'"),
        ("{}", "says format None"),
    ],
    ids=["empty", "cut", "deep", "list", "null", "no model", "version", "format", "nothing"],
)
def test_a_damaged_description_is_refused(saved, text, match):
    (saved / MODEL).write_text(text)
    refuse(saved, match)


def test_a_description_that_is_not_text_or_huge_is_refused(saved):
    (saved / MODEL).write_bytes(b"\xff\xfe\x00{}")
    refuse(saved, "is not JSON")
    with (saved / MODEL).open("wb") as file:
        file.truncate(bundle.MAX_JSON + 1)
    refuse(saved, f"has {bundle.MAX_JSON + 1} bytes; expected less than {bundle.MAX_JSON}")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"r_max": -1.0}, "r_max"),
        ({"surprise": 1}, "surprise"),
        ({"edge_irreps": "lots"}, "is not a list of irreps such as"),
        ({"atomic_numbers": [1, 6, 8, 11, 500]}, "atomic_numbers"),
        ({"family": "Other"}, "family"),
    ],
    ids=["negative", "unknown", "irreps", "element", "family"],
)
def test_an_impossible_architecture_is_refused(saved, change, match):
    document = json.loads((saved / MODEL).read_text())
    edit_json(saved, model=document["model"] | change)
    refuse(saved, rf"does not describe a model: (?s:.*){match}")


def test_missing_and_unknown_leaves_are_listed(saved):
    def change(arrays):
        arrays["params/readouts_0/linear/9e"] = arrays.pop("params/readouts_0/linear/0e")
        arrays["params/node_embedding/linear/0e"] = arrays["params/node_embedding/linear/0e"][:3]

    edit_arrays(saved, change)
    message = refuse(saved, "does not hold this architecture's parameters")
    assert message.splitlines()[1:] == [
        "- node_embedding/linear/0e (5, 4)",
        "- readouts_0/linear/0e (4, 1)",
        "+ node_embedding/linear/0e (3, 4)",
        "+ readouts_0/linear/9e (4, 1)",
    ]


def test_missing_constants_are_named(saved):
    edit_arrays(saved, lambda arrays: arrays.pop(f"buffers/{bundle.E0_BUFFER}"))
    refuse(saved, f"lacks the constant {bundle.E0_BUFFER}")


def test_a_missing_coupling_is_refused(saved):
    name = "products_0/symmetric_contractions/1o/U_matrix_3"
    edit_arrays(saved, lambda arrays: arrays.pop(f"buffers/{name}"))
    refuse(saved, f"architecture and constants disagree .*{name}")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(saved, value):
    def change(arrays):
        arrays["params/readouts_0/linear/0e"][2, 0] = value

    edit_arrays(saved, change)
    refuse(saved, "holds non-finite numbers in readouts_0/linear/0e")


def test_damaged_arrays_are_refused(saved):
    whole = (saved / ARRAYS).read_bytes()
    for damaged in (b"", whole[:100], whole[:-8], b"\xff" * 64):
        (saved / ARRAYS).write_bytes(damaged)
        refuse(saved, "cannot be read")


def test_float64_needs_x64(saved):
    """A process that computes in float32 neither loads float64 silently nor half of it."""
    code = (
        "import sys, jaxft\n"
        "try:\n    jaxft.load(sys.argv[1])\n"
        "except ValueError as error:\n    print(error)\n"
        "_, params = jaxft.load(sys.argv[1], dtype='float32')\n"
        "print(params['readouts_0']['linear']['0e'].dtype)\n"
    )
    root = Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said, instead, dtype = done.stdout.splitlines()
    assert said == "float64 was asked for, but JAX computes in float32 only;"
    assert 'jax.config.update("jax_enable_x64", True)' in instead
    assert 'dtype="float32"' in instead
    assert dtype == "float32"


def test_params_of_jax_and_numpy_are_saved_alike(tmp_path, model, params):
    a = jaxft.save(tmp_path / "a.jaxft", model, params)
    b = jaxft.save(tmp_path / "b.jaxft", model, jax.tree.map(np.asarray, params))
    assert (a / ARRAYS).read_bytes() == (b / ARRAYS).read_bytes()
