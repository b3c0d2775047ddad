"""Reading torch files: equal to torch for good ones, only ModelFileError for bad ones."""

import argparse
import codecs
import contextlib
import gzip
import hashlib
import os
import pickle
import random
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch_files as tf

from converters import container, reader, unpickle
from converters.reader import ModelFileError, irreps, read

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "benchmarks" / "data" / "gfn2_small.model"
COMPILED = "._compiled_main"  # inside e3nn's compiled code, which is never opened


for codec in ("cp437", "raw-unicode-escape"):
    codecs.lookup(codec)  # Python loads them for old names in archives and old instructions


def refuse(path, match):
    """Reading ``path`` is a ModelFileError that names the file and says ``match``, and is quick."""
    start = time.monotonic()
    modules = set(sys.modules)
    with pytest.raises(ModelFileError) as caught:
        read(path)
    assert set(sys.modules) == modules
    name, message = str(caught.value)[: len(str(path))], str(caught.value)[len(str(path)) :]
    assert name == str(path)
    assert re.search(match, message), message  # not in the path, which names the test
    assert len(message) < 1500
    assert time.monotonic() - start < 10


# --- good files -----------------------------------------------------------------------------------


def assert_as_torch_reads_it(path, model):
    modules = set(sys.modules)
    file = read(path)
    assert set(sys.modules) == modules
    expected = {name: t for name, t in model.state_dict().items() if COMPILED not in name}
    assert list(file.tensors) == list(expected)
    assert file.parameters == {name for name, _ in model.named_parameters()}
    for name, theirs in expected.items():
        ours, theirs = file.tensors[name], theirs.detach().cpu()
        assert str(theirs.dtype) == f"torch.{ours.dtype}"
        assert ours.shape == tuple(theirs.shape)
        raw = theirs.contiguous().flatten().view(dtype=_bytes_dtype()).numpy().tobytes()
        assert ours.tobytes() == raw, name
        assert not ours.flags.writeable
    return file


def _bytes_dtype():
    import torch

    return torch.uint8


@pytest.mark.torch
@pytest.mark.parametrize(("dtype", "correlation"), [("float64", 2), ("float32", 3)])
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_equal_the_state_dict_bit_for_bit(tmp_path, dtype, correlation, protocol):
    model = tf.mace_model(dtype=dtype, correlation=correlation)
    tf.save(model, tmp_path / "a.model", pickle_protocol=protocol)
    (tmp_path / "a.model").rename(tmp_path / "renamed.model")  # the stem inside stays "a"
    file = assert_as_torch_reads_it(tmp_path / "renamed.model", model)

    first = file.root.module("interactions.0")
    assert first.name == "RealAgnosticResidualInteractionBlock"
    assert first.get("avg_num_neighbors") == 9.5
    assert irreps(first.get("hidden_irreps")) == ((8, 0, 1), (8, 1, -1))
    assert irreps(file.root.module("interactions.1").get("hidden_irreps")) == ((8, 0, 1),)
    instruction = first.module("linear").get("instructions")[0]
    weight = model.interactions[0].linear.instructions[0].path_weight
    assert instruction.get("path_weight") == weight


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_as_it_is(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    model = tf.mace_model().to(getattr(torch, dtype))
    tf.save(model, tmp_path / "a.model")
    assert_as_torch_reads_it(tmp_path / "a.model", model)


@pytest.mark.torch
def test_parameters_may_be_views_of_one_storage(tmp_path):
    torch = pytest.importorskip("torch")
    model = tf.mace_model()
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    parts = torch.split(flat, [p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part.view(parameter.shape[::-1]).permute(*range(parameter.ndim)[::-1])
    tf.save(model, tmp_path / "a.model")
    assert_as_torch_reads_it(tmp_path / "a.model", model)


@pytest.mark.torch
@pytest.mark.parametrize("function", ["tanh", "abs"])
def test_activations_are_references(tmp_path, function):
    torch = pytest.importorskip("torch")
    tf.save(tf.mace_model(gate=getattr(torch, function)), tmp_path / "a.model")
    found = read(tmp_path / "a.model").root.module("readouts.1.non_linearity.acts.0").get("f")
    assert found == reader.Reference(f"torch.{function}")


@pytest.mark.torch
def test_published_model_equals_its_state_dict():
    torch = pytest.importorskip("torch")
    pytest.importorskip("mace")
    model = torch.load(PUBLISHED, map_location="cpu", weights_only=False)
    assert_as_torch_reads_it(PUBLISHED, model)


def test_published_model_is_read_without_torch():
    file = read(PUBLISHED)
    assert file.root.name == "ScaleShiftMACE"
    assert len(file.tensors) > 50


def test_forged_file_is_read(tmp_path):
    child = tf.new(
        "torch.nn.modules.linear.Linear",
        state=tf.module(parameters={"weight": tf.tensor(), "bias": None}),
    )
    buffers = {"kept": tf.tensor((2, 1), (1, 2)), "scratch": tf.tensor()}
    hidden = tf.call("__builtin__.set", ["scratch"])
    root = tf.mace(
        buffers=buffers, modules={"child": child, "none": None}, _non_persistent_buffers_set=hidden
    )
    file = read(tf.forge(tmp_path / "m.model", root))
    assert list(file.tensors) == ["kept", "child.weight"]
    assert file.parameters == {"child.weight"}
    assert file.tensors["kept"].shape == (2, 1)
    assert np.shares_memory(file.tensors["kept"], file.tensors["child.weight"])
    assert file.root.has("child")
    assert not file.root.has("none")
    assert list(file.root.children) == ["child"]
    with pytest.raises(ModelFileError, match=r"no module 'child\.x'.*Linear lacks 'x'"):
        file.root.module("child.x")
    with pytest.raises(ModelFileError, match="no attribute 'heads'"):
        file.root.get("heads")
    assert file.root.get("heads", None) is None


def test_reading_imports_no_torch(tmp_path):
    """Nor anything else: what a file holds does not reach the import system."""
    paths = [
        tf.forge(tmp_path / "m.model", tf.mace(buffers={"r_max": tf.tensor()})),
        tf.forge_legacy(tmp_path / "old.model", legacy_mace(tf.legacy_storage())),
        tf.forge(tmp_path / "w.pt", {"r_max": tf.tensor()}),
        tf.forge(tmp_path / "bad.model", tf.mace(x=tf.call("wave.open", "x"))),
    ]
    script = """
        import sys

        class Forbid:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {"torch", "mace", "e3nn"}:
                    raise AssertionError(f"imports {name}")

        sys.meta_path.insert(0, Forbid())
        from converters.reader import ModelFileError, read
        "".encode("cp437")  # the one codec that zipfile itself looks up
        before = set(sys.modules)
        model, old, weights, bad = sys.argv[1:]
        assert list(read(model).tensors) == ["r_max"]
        assert list(read(old).tensors) == ["x"]
        assert list(read(weights, like=model).tensors) == ["r_max"]
        try:
            read(bad)
        except ModelFileError as error:
            assert "wave.open" in str(error)
        assert set(sys.modules) == before, set(sys.modules) - before
        assert not {"torch", "mace", "e3nn", "wave"} & sys.modules.keys()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_irreps_of_strings():
    assert irreps("8x0e + 8x1o+2e") == ((8, 0, 1), (8, 1, -1), (1, 2, 1))
    assert irreps("") == ()
    for bad in ("8x", "8x0e+", "0z", "-1x0e", None, 3, unpickle.Node("x", ((1,),))):
        with pytest.raises(ModelFileError):
            irreps(bad)


# --- files from before torch 1.6 ------------------------------------------------------------------


def assert_same(file, other):
    """Two files hold the same model: tensors bit for bit, parameters and all attributes."""
    assert list(file.tensors) == list(other.tensors)
    assert file.parameters == other.parameters
    for name, array in file.tensors.items():
        assert_same_value(array, other.tensors[name])
    assert_same_value(file.root, other.root)


def assert_same_value(left, right):
    pending = [(left, right)]
    while pending:
        left, right = pending.pop()
        assert type(left) is type(right)
        if isinstance(left, np.ndarray):
            assert (left.dtype, left.shape) == (right.dtype, right.shape)
            assert left.tobytes() == right.tobytes()
            assert not left.flags.writeable
        elif isinstance(left, unpickle.Node):
            assert left.qualname == right.qualname
            pending += [(left.args, right.args), (left.state, right.state)]
        elif isinstance(left, dict):
            assert list(left) == list(right)
            pending += zip(left.values(), right.values(), strict=True)
        elif isinstance(left, list | tuple):
            pending += zip(left, right, strict=True)
        else:
            assert left == right


def test_the_old_format_holds_what_the_new_one_does(tiny_file, tmp_path):
    old = tf.to_legacy(tiny_file, tmp_path / "old.model")
    assert old.read_bytes()[:2] != b"PK"
    assert_same(read(old), read(tiny_file))


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_old_format_as_torch_writes_it(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    model = tf.mace_model(dtype="float32")
    shared = torch.arange(12.0).view(3, 4)
    model.register_buffer("view", shared.T[1:])
    model.register_buffer("same", shared)
    tf.save(model, tmp_path / "new.model")
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": False}
    tf.save(model, tmp_path / "old.model", **options)
    file = assert_as_torch_reads_it(tmp_path / "old.model", model)
    assert np.shares_memory(file.tensors["view"], file.tensors["same"])
    assert_same(file, read(tmp_path / "new.model"))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_old_format_in_half_precision(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    model = tf.mace_model().to(getattr(torch, dtype))
    tf.save(model, tmp_path / "a.model", _use_new_zipfile_serialization=False)
    assert_as_torch_reads_it(tmp_path / "a.model", model)


@pytest.mark.parametrize("write", [tf.forge, tf.forge_legacy])
def test_large_files_are_held_once(tmp_path, write):
    size = 8 << 20
    of = tf.storage(size=size) if write is tf.forge else tf.legacy_storage(size=size)
    root = tf.mace(buffers={"x": tf.tensor((size,), of=of), "y": tf.tensor((size,), of=of)})
    content = bytes(4 * size)
    path = tmp_path / "m.model"
    if write is tf.forge:
        write(path, root, members={"m/data/0": content})
    else:
        write(path, root, storages={"0": (size, content)})
    tracemalloc.start()
    try:
        file = read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert file.tensors["x"].size == size
    # The new format's reader checks a member while it joins its parts; the old one fills in place.
    # Its pickles are looked for in the first 32 MiB, of which one copy comes and goes.
    assert peak < 1.1 * len(content) + (container.MAX_PICKLE if write is tf.forge_legacy else 0)


def test_classes_come_with_their_source_in_the_old_format(tmp_path):
    cls = tf.legacy_class(tf.named("mace.modules.models.MACE"))
    made = tf.Code(cls + b")\x81" + tf.code(tf.module()) + b"b")
    path = tf.forge_legacy(tmp_path / "m.model", made, storages={})
    assert read(path).root.name == "MACE"
    refuse(tf.forge(tmp_path / "m.model", made), "intact|not a torch storage")


def legacy_mace(of):
    return tf.mace(buffers={"x": tf.tensor(of=of)})


SOUND = legacy_mace(tf.legacy_storage())
TWO = tf.mace(
    buffers={"x": tf.tensor(of=tf.legacy_storage()), "y": tf.tensor(of=tf.legacy_storage("1"))}
)


@pytest.mark.parametrize(
    ("root", "options", "match"),
    [
        (SOUND, {"magic": [tf.MAGIC]}, "magic number"),
        (SOUND, {"version": 1002}, "version"),
        (SOUND, {"version": "1001"}, "version"),
        (SOUND, {"machine": {"little_endian": False}}, "big-endian"),
        (SOUND, {"machine": [1]}, "big-endian"),
        (SOUND, {"machine": {str(i): i for i in range(100)}}, "more than 100 instructions"),
        (SOUND, {"keys": ["1"]}, "intact"),
        (SOUND, {"keys": [("0",)]}, "intact"),
        (SOUND, {"keys": []}, "list of storages"),
        (SOUND, {"keys": "0"}, "list of storages"),
        (SOUND, {"keys": ["0", "0"]}, "list of storages"),
        (TWO, {"keys": ["0", "0"], "storages": {"0": (2, bytes(8)), "1": (2, bytes(8))}}, "intact"),
        (SOUND, {"tail": b"x"}, "goes on"),
        (SOUND, {"storages": {"0": (2, bytes(7))}}, "truncated"),
        (SOUND, {"storages": {"0": (3, bytes(8))}}, "size that is declared"),
        (SOUND, {"storages": {"0": (-1, bytes(8))}}, "size that is declared"),
        (SOUND, {"storages": {"0": (1 << 62, bytes(8))}}, "size that is declared"),
        (legacy_mace(tf.legacy_storage(size=1 << 60)), {}, "claim more bytes"),
        (legacy_mace(tf.legacy_storage(size=300)), {}, "claim more bytes"),
        (legacy_mace(tf.legacy_storage(size=-1)), {}, "claim more bytes"),
        (legacy_mace(tf.legacy_storage(size=True)), {}, "where a int"),
        (legacy_mace(tf.legacy_storage(key=0)), {}, "where a str"),
        (legacy_mace(tf.legacy_storage(kind="x")), {}, "not a torch storage"),
        (legacy_mace(tf.legacy_storage(kind=tf.named("collections.OrderedDict"))), {}, "the type"),
        (legacy_mace(tf.legacy_storage(view=("0", 0, 2))), {}, "views another"),
        (legacy_mace(tf.storage()), {}, "views another"),
        (legacy_mace(tf.legacy_class(tf.named("torch.FloatStorage"))), {}, "not a class"),
        (legacy_mace(tf.legacy_class("mace.modules.models.MACE")), {}, "not a class"),
        (tf.legacy_class(tf.named("os.system")), {}, "names 'os.system'"),
        (tf.Code(tf.code(()) + b"Q"), {}, "intact"),
        (tf.Code(tf.code(("module",)) + b"Q"), {}, "intact"),
        (
            tf.mace(
                buffers={
                    "x": tf.tensor(of=tf.legacy_storage()),
                    "y": tf.tensor(of=tf.legacy_storage(kind=tf.named("torch.IntStorage"))),
                }
            ),
            {},
            "two types",
        ),
    ],
)
def test_damaged_files_of_the_old_format_are_refused(tmp_path, root, options, match):
    read(tf.forge_legacy(tmp_path / "sound.model", SOUND))
    refuse(tf.forge_legacy(tmp_path / "m.model", root, **options), match)


def test_storages_in_the_headers_of_the_old_format_are_refused(tmp_path):
    path = tf.forge_legacy(tmp_path / "m.model", SOUND)
    data = path.read_bytes()
    machine = pickle.dumps(tf.MACHINE, 2)
    forged = b"\x80\x02" + tf.storage() + b"."
    path.write_bytes(data.replace(machine, forged))
    refuse(path, "header has a storage")


def test_truncated_files_of_the_old_format_are_refused(tmp_path):
    path = tf.forge_legacy(tmp_path / "m.model", SOUND)
    whole = path.read_bytes()
    for size in range(14, len(whole)):
        path.write_bytes(whole[:size])
        refuse(path, "truncated|intact|declared|claim more|list of storages")


def test_claims_of_the_old_format_allocate_nothing(tmp_path):
    """Many storages, each as large as the file, are refused before they take memory."""
    size = 1 << 20
    buffers = {str(i): tf.tensor(of=tf.legacy_storage(str(i), size)) for i in range(500)}
    storages = {"0": (size, bytes(4 * size))}
    path = tf.forge_legacy(tmp_path / "m.model", tf.mace(buffers=buffers), storages=storages)
    tracemalloc.start()
    try:
        refuse(path, "claim more bytes")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20


# --- state dicts and checkpoints ------------------------------------------------------------------


def assert_takes_the_weights(file, tensors, like, path):
    """The tensors are those given, everything else is the like file's; root says the same."""
    original = read(like)
    assert file.path == path
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.parameters == original.parameters
    assert list(file.tensors) == list(original.tensors)
    for name, array in file.tensors.items():
        assert_same_value(array, tensors[name])
        module, _, leaf = name.rpartition(".")
        assert (file.root.module(module) if module else file.root).get(leaf) is array
    assert irreps(file.root.module("interactions.0").get("hidden_irreps")) == irreps(
        original.root.module("interactions.0").get("hidden_irreps")
    )


def changed(tensors, dtype=None):
    """Other numbers under the same names, read-only as read's are; floats as ``dtype`` if given."""
    made = {}
    for name, array in tensors.items():
        if array.dtype.kind == "f":
            dtype = dtype or array.dtype
            array = np.array(array + np.arange(array.size).reshape(array.shape), dtype)
        made[name] = array.copy()
        made[name].flags.writeable = False
    return made


def checkpoint(weights):
    return {"model": weights, "optimizer": {"state": {}}, "lr_scheduler": {"last_epoch": 3}}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("wrap", [None, checkpoint])
@pytest.mark.parametrize("old", [False, True])
def test_like_supplies_what_a_state_dict_lacks(tiny_file, tmp_path, dtype, wrap, old):
    weights = changed(read(tiny_file).tensors, dtype)
    path = tf.state_dict(weights, tmp_path / "w.pt", wrap=wrap)
    if old:
        path = tf.to_legacy(path, tmp_path / "old.pt")
    refuse(path, r"(?s)irreps, average number.*activations.*instructions.*--like FILE\.model")
    file = read(path, like=tiny_file)
    assert_takes_the_weights(file, weights, tiny_file, path)
    assert file.tensors["interactions.0.linear_up.weight"].dtype == dtype


@pytest.mark.torch
@pytest.mark.parametrize("scheduler", ["ExponentialLR", "ReduceLROnPlateau", "SWALR"])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_checkpoints_of_mace_are_read_with_like(tmp_path, scheduler, amsgrad):
    model, path = mace_checkpoint(tmp_path, scheduler, amsgrad)
    tf.save(tf.mace_model(dtype="float32"), tmp_path / "like.model")
    refuse(path, "training checkpoint")
    file = read(path, like=tmp_path / "like.model")
    for name, theirs in model.state_dict().items():
        if COMPILED not in name:
            assert file.tensors[name].tobytes() == theirs.numpy().tobytes(), name
    assert {array.dtype.name for array in file.tensors.values()} <= {
        *("float64", "int64", "int32", "bool")
    }
    tf.save(model, tmp_path / "whole.model")
    assert list(file.tensors) == list(read(tmp_path / "whole.model").tensors)


def mace_checkpoint(folder, scheduler, amsgrad):
    """A model after a step, and the checkpoint that mace's own code makes of it."""
    torch = pytest.importorskip("torch")
    model = tf.mace_model()
    from mace.tools.checkpoint import CheckpointHandler, CheckpointState
    from mace.tools.scripts_utils import LRScheduler

    groups = [{"name": "all", "params": list(model.parameters()), "weight_decay": 5e-7}]
    optimizer = torch.optim.Adam(groups, lr=0.01, amsgrad=amsgrad)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    if scheduler == "SWALR":
        schedule = torch.optim.swa_utils.SWALR(optimizer, 1e-3, anneal_epochs=1)
        schedule.anneal_func = schedule._linear_anneal  # as torch pickled it until 2.2
    else:
        options = {"scheduler": scheduler, "optimizer": "adam", "lr_scheduler_gamma": 0.9}
        options |= {"lr_factor": 0.8, "scheduler_patience": 5}
        schedule = LRScheduler(optimizer, argparse.Namespace(**options))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates the epoch that mace passes
            schedule.step(metrics=torch.tensor(0.5), epoch=1)
    handler = CheckpointHandler(directory=str(folder / "checkpoints"), tag="run", keep=True)
    handler.save(CheckpointState(model, optimizer, schedule), epochs=1)
    (path,) = (folder / "checkpoints").glob("*.pt")
    return model, path


def test_versions_may_differ_in_what_the_architecture_implies(tiny_file, tmp_path):
    weights = changed(read(tiny_file).tensors, "float32")
    implied = [
        name
        for name, array in weights.items()
        if array.size == 0 or name.endswith(("output_mask", "_zeroed"))
    ]
    assert any(name.endswith("conv_tp.weight") for name in implied)
    assert any(name.endswith("_zeroed") for name in implied)
    few = {name: array for name, array in weights.items() if name not in implied}
    more = few | {
        "interactions.0.conv_tp._compiled_main_left_right._w3j_1_1_0": np.ones((3, 3, 1)),
        "interactions.0.skip_tp.empty": np.ones(0),
        "products.0.linear.new_zeroed": np.array(True),
    }
    original = read(tiny_file).tensors
    for given in (few, more):
        file = read(tf.state_dict(given, tmp_path / "w.pt"), like=tiny_file)
        assert list(file.tensors) == list(original)
        for name in few:
            assert file.tensors[name].tobytes() == few[name].tobytes()
        for name in implied:
            kept = file.tensors[name]
            assert np.array_equal(kept, original[name])
            assert not kept.flags.writeable
            assert kept.dtype == ("float32" if original[name].dtype.kind == "f" else kept.dtype)


def test_other_architectures_are_refused_with_their_differences(tiny_file, tmp_path):
    def refused(weights):
        path = tf.state_dict(weights, tmp_path / "w.pt")
        with pytest.raises(ModelFileError) as caught:
            read(path, like=tiny_file)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(tiny_file) in str(caught.value)
        return [line for line in str(caught.value).splitlines() if line[:4] in ("  - ", "  + ")]

    original = read(tiny_file).tensors
    name = "interactions.0.linear_up.weight"
    shape = original[name].shape
    wrong = {**original, name: np.ones(3), "a.new": np.ones((2, 2))}
    assert refused(wrong) == [
        "  + a.new: float (2, 2)",
        f"  - {name}: float {shape}",
        f"  + {name}: float (3,)",
    ]
    assert refused({n: a for n, a in original.items() if n != name}) == [
        f"  - {name}: float {shape}"
    ]
    assert refused({**original, name: np.ones(shape, np.int64)})[1] == f"  + {name}: int {shape}"
    mask = next(n for n in original if n.endswith("output_mask"))
    assert refused({**original, mask: np.ones(999)})[1] == f"  + {mask}: float (999,)"
    lines = refused({f"{i:04d}": np.ones(1) for i in range(2000)})
    assert len(lines) == 12
    assert lines == sorted(lines)


def test_like_is_asked_for_only_where_it_helps(tiny_file, tmp_path):
    weights = tf.state_dict(read(tiny_file).tensors, tmp_path / "w.pt")

    def refused(path, like, blamed, match):
        with pytest.raises(ModelFileError, match=match) as caught:
            read(path, like=like)
        assert str(caught.value).startswith(f"{blamed}: ")

    refused(tiny_file, tiny_file, tiny_file, "whole model.*leave out --like")
    refused(weights, weights, weights, "like must be a whole model, but it is a bare state_dict")
    refused(weights, tmp_path / "absent", tmp_path / "absent", "no such file")
    (tmp_path / "text").write_text("hello")
    refused(weights, tmp_path / "text", tmp_path / "text", "text file")
    path = tmp_path / "m.pt"
    for value, match in [
        ([1], "holds a list"),
        ({}, "empty"),
        (checkpoint({}), "empty"),
        (checkpoint([]), "expected a state_dict"),
        (checkpoint(tf.mace()), "whole model under 'model'"),
        ({"weights": 3}, "entry 'weights' is a int"),
        ({3: tf.tensor()}, "entry '3' is a ndarray"),
        (tf.tensor(), "holds a tensor"),
    ]:
        refused(tf.forge(path, value), tiny_file, path, match)
    with pytest.raises(ModelFileError, match="max_bytes"):
        read(weights, like=tiny_file, max_bytes=100)
    again = tf.Code(b"h\x00")
    many = {"0": memoised(tf.tensor((9000,), of=tf.storage(size=9000)))}
    many |= {str(i): again for i in range(1, 400)}
    tf.forge(path, many, members={"m/data/0": bytes(36_000)})
    with pytest.raises(ModelFileError, match="tensors have more than max_bytes"):
        read(path, like=tiny_file, max_bytes=2 << 20)


# --- other kinds of file --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("cuequivariance_torch.operations.linear.Linear", "mace_cueq_to_e3nn"),
        ("openequivariance.TensorProduct", "OpenEquivariance"),
        ("mace.modules.extensions.PolarMACE", "not supported yet; give a"),
        ("mace.modules.extensions.MACELES", "not supported yet; give a"),
        ("mace.modules.field_blocks.Field", "not supported yet"),
        ("mace.modules.models.AtomicDipolesMACE", "not supported yet"),
        ("mace.modules.models.AtomicDielectricMACE", "not supported yet"),
        ("mace.modules.blocks.LinearDipoleReadoutBlock", "not supported yet"),
        ("mace.modules.blocks.NonLinearDipolePolarReadoutBlock", "not supported yet"),
        ("mace.modules.models.EnergyDipolesMACE", "not supported yet"),
        ("mace.modules.lora.LoRAO3Linear", "merge"),
        ("mace.calculators.lammps_mliap_mace.LAMMPS_MLIAP_MACE", "wrapper"),
        ("mace.calculators.lammps_mace.LAMMPS_MACE", r"wrapper.*original \.model"),
        ("mace_jax.modules.models.ScaleShiftMACE", "mace-jax; give the torch"),
        ("torch._dynamo.eval_frame.OptimizedModule", "_orig_mod"),
        ("torch.nn.parallel.distributed.DistributedDataParallel", "model.module"),
        ("torch.optim.swa_utils.AveragedModel", "save its .module"),
        ("numpy.core.multiarray.scalar", "NumPy scalar"),
        ("numpy._core.multiarray.scalar", "NumPy scalar"),
        ("macer.models.ScaleShiftMACE", "report"),
        ("mace.modules.models.ScaleShiftMACE2", "report"),
    ],
)
def test_other_globals_are_refused_by_name(tmp_path, name, advice):
    path = tf.forge(tmp_path / "m.model", tf.mace(buffers={}, x=tf.new(name)))
    refuse(path, rf"(?s){name}.*{advice}")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty.*download"),
        (b"hello", "is a text file.*mace_run_train"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer.*git lfs"),
        (b"<!DOCTYPE html>\n<html>", "web page.*failed download"),
        (b"\xef\xbb\xbf \n<HTML><head>", "web page.*failed download"),
        (b"<?xml version='1.0'?><Error>", "XML page.*failed download"),
        (gzip.compress(b"x", mtime=0), "gzip; unpack"),
        (b"BZh91AY&SY", "bzip2; unpack"),
        (b"\xfd7zXZ\x00", "xz; unpack"),
        (b"\x28\xb5\x2f\xfd\x04", "zstd; unpack"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (pickle.dumps([1]), r"pickle that torch\.save did not write"),
        (b"\x00\x01\x02", "not a torch file"),
        (b"\x93NUMPY\x01\x00", "not a torch file"),
        (b"PK\x05\x06" + bytes(18), "not a torch file"),
        (b"PK\x03\x04" + bytes(18), "truncated or damaged"),
        (b"x" + tf.MAGIC.to_bytes(10, "little"), "intact"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, content, match):
    path = tmp_path / "m.model"
    path.write_bytes(content)
    refuse(path, match)


@pytest.mark.torch
def test_wrappers_of_models_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.model"
    model = tf.mace_model()
    from e3nn.util import jit
    from mace.calculators import LAMMPS_MACE
    from mace.calculators.lammps_mliap_mace import LAMMPS_MLIAP_MACE
    from mace.modules.lora import inject_LoRAs

    for wrapper in (LAMMPS_MACE(model), LAMMPS_MLIAP_MACE(model)):
        for new in (True, False):
            tf.save(wrapper, path, _use_new_zipfile_serialization=new)
            refuse(path, rf"contains 'mace\.calculators\.\w+\.{type(wrapper).__name__}'.*original")
    tf.save(torch.compile(model), path)
    refuse(path, "_orig_mod")
    tf.save(torch.optim.swa_utils.AveragedModel(model), path)
    refuse(path, "save its .module")
    inject_LoRAs(model, rank=2, alpha=1)
    tf.save(model, path)
    refuse(path, r"'mace\.modules\.lora\.\w+'.*merge_lora_weights")
    tf.save(model.state_dict(), path)
    tf.save(tf.mace_model(), tmp_path / "like.model")
    with pytest.raises(ModelFileError, match=r"(?s)  \+ \S*lora_A.*LoRA adapters"):
        read(path, like=tmp_path / "like.model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        for program in (tf.mace_model(), LAMMPS_MACE(tf.mace_model())):
            jit.compile(program).save(path)
            refuse(path, "TorchScript program; give the .model file saved beside it")


@pytest.mark.torch
def test_other_kinds_of_mace_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    tf.mace_model()  # sets what e3nn needs to be imported
    from e3nn import o3
    from mace import modules

    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    options = {
        "r_max": 4.5,
        "num_bessel": 8,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": block,
        "interaction_cls_first": block,
        "num_interactions": 2,
        "num_elements": 3,
        "hidden_irreps": o3.Irreps("8x0e+8x1o+8x2e"),
        "MLP_irreps": o3.Irreps("4x0e+4x1o+4x2e"),
        "atomic_energies": None,
        "avg_num_neighbors": 9.5,
        "atomic_numbers": [1, 6, 8],
        "correlation": 2,
        "gate": torch.nn.functional.silu,
    }
    for cls, changes in (
        (modules.AtomicDipolesMACE, {}),
        (modules.EnergyDipolesMACE, {"atomic_energies": np.zeros(3)}),
        (modules.AtomicDielectricMACE, {"use_polarizability": True}),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates TorchScript
            model = cls(**options | changes)
        tf.save(model, tmp_path / "m.model")
        refuse(tmp_path / "m.model", rf"'mace\.modules\.models\.{cls.__name__}'.*not supported yet")


@pytest.mark.torch
def test_other_things_that_torch_saves_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.model"
    model = tf.mace_model()
    for new in (True, False):
        for value, match in [
            (torch.nn.Linear(2, 2), r"holds a torch\.nn\.modules\.linear\.Linear, not a MACE"),
            (torch.nn.ReLU(), r"names 'torch\.nn\.modules\.activation\.ReLU'.*please report"),
            (torch.ones(3), "holds a tensor"),
            ([torch.ones(3)], "holds a list"),
            (3, "holds a int"),
            ({"model": model}, "whole model under 'model'; save that alone"),
            ({"a": 1, "b": "x"}, r"dict with the keys \['a', 'b'\]"),
            ({"rng": torch.get_rng_state(), "epoch": 1}, "dict with the keys"),
        ]:
            tf.save(value, path, _use_new_zipfile_serialization=new)
            refuse(path, match)
    model.interactions[0].avg_num_neighbors = np.float64(3.0)
    tf.save(model, path)
    refuse(path, r"'numpy\S*scalar'.*Python number.*float\(")


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX")
def test_pipes_sockets_and_devices_do_not_hang(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    within(5, lambda: refuse(pipe, "pipe, socket or device"))
    within(5, lambda: refuse(Path("/dev/zero"), "pipe, socket or device"))
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # since names of sockets are short
        server.bind("socket")
        within(5, lambda: refuse(tmp_path / "socket", "pipe, socket or device"))
    # It may be put in the file's place after the checks.
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    within(5, lambda: refuse(pipe, "no longer a regular file"))


def within(seconds, function):
    failures = []

    def run():
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    if failures:
        raise failures[0]


def test_files_of_others_are_refused(tmp_path, monkeypatch):
    def forbidden(path, flags):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(container.os, "open", forbidden)  # root may read everything
    refuse(tf.forge(tmp_path / "m.model", tf.mace()), r"cannot be opened \(Permission denied\)")


def test_names_too_long_for_the_system_are_refused(tmp_path):
    with pytest.raises(ModelFileError):
        read(tmp_path / ("a" * 5000))
    with pytest.raises(ModelFileError):
        read("a\0b")


def test_files_that_are_no_models_are_refused(tmp_path):
    path = tmp_path / "m.model"
    refuse(tmp_path / "absent.model", "no such file")
    refuse(tmp_path, "directory")
    for content, match in [
        (b"", "is empty"),
    ]:
        path.write_bytes(content)
        refuse(path, match)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.png", b"")
    refuse(path, "not a torch file")
    refuse(tf.forge(path, tf.mace(), members={"m/constants.pkl": b""}), "TorchScript")
    refuse(tf.forge(path, tf.mace(), members={"m/code/__torch__.py": b""}), "TorchScript")
    refuse(tf.forge(path, tf.mace(), members={"n/data.pkl": b""}), "2 members")
    refuse(tf.forge(path, tf.mace(), members={"m/byteorder": b"big"}), "big-endian")
    refuse(tf.forge(path, {"w": tf.tensor()}), "state_dict")
    refuse(tf.forge(path, {"model": {}, "optimizer": {}}), "training checkpoint")
    refuse(tf.forge(path, [1]), "holds a list")
    refuse(tf.forge(path, tf.new("torch.nn.modules.linear.Linear")), r"holds a .*Linear")


@pytest.mark.torch
def test_checkpoints_of_torch_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "m.pt"
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters(), amsgrad=True)
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    state = {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict()}
    torch.save({"model": layer.state_dict(), **state}, path)
    refuse(path, "training checkpoint")
    torch.save(layer.state_dict(), path)
    refuse(path, "bare state_dict")
    torch.save(layer, path, _use_new_zipfile_serialization=False)
    refuse(path, "Linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.jit.script(layer).save(path)
    refuse(path, "TorchScript")


# --- hostile archives -----------------------------------------------------------------------------


def test_truncated_files_are_refused(tmp_path):
    path = tf.forge(tmp_path / "m.model", tf.mace(buffers={"r_max": tf.tensor()}))
    whole = path.read_bytes()
    for size in range(7, len(whole), 7):
        path.write_bytes(whole[:size])
        refuse(path, "not a torch file|truncated|intact")


def test_compressed_members_are_refused(tmp_path):
    members = {"m/data/0": bytes(1 << 20)}
    path = tf.forge(tmp_path / "m", tf.mace(), members=members, compression=zipfile.ZIP_DEFLATED)
    refuse(path, "compressed")


def test_members_inside_members_are_refused(tmp_path):
    inner = tf.forge(tmp_path / "inner", tf.mace(), members={"m/data/1": bytes(100_000)})
    path = tf.forge(tmp_path / "m", tf.mace(), members={"m/data/2": inner.read_bytes()})
    with zipfile.ZipFile(inner) as archive:
        info = archive.getinfo("m/data/1")
    with zipfile.ZipFile(path, "a") as archive:
        outer = archive.getinfo("m/data/2")
        info.header_offset += outer.header_offset + 30 + len(outer.filename)
        archive.filelist.append(info)
        archive._didModify = True
    with zipfile.ZipFile(path) as archive:
        assert archive.read("m/data/1") == bytes(100_000)  # zipfile itself is happy
    refuse(path, "claim more bytes")


def test_duplicate_members_are_refused(tmp_path):
    path = tf.forge(tmp_path / "m.model", tf.mace())
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("m/data.pkl", b"")
    refuse(path, "distinct")


def test_crowds_of_members_are_refused(tmp_path):
    crowd = {f"m/data/{i}": b"" for i in range(container.MAX_MEMBERS)}
    refuse(tf.forge(tmp_path / "m.model", tf.mace(), members=crowd), "at most")


def test_large_directories_are_not_loaded(tmp_path):
    path = tf.forge(tmp_path / "m.model", tf.mace())
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(40):
            info = zipfile.ZipInfo(f"m/data/{i + 1}")
            info.comment = bytes(60_000)
            archive.writestr(info, b"")
    refuse(path, "a part of the archive")


def test_encrypted_members_are_refused(tmp_path):
    path = tf.forge(tmp_path / "m.model", tf.mace())
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    path.write_bytes(data[: start + 8] + b"\x01\x00" + data[start + 10 :])
    refuse(path, "intact")


def test_sizes_are_capped(tmp_path, monkeypatch):
    path = tf.forge(
        tmp_path / "m.model", tf.mace(buffers={str(i): tf.tensor() for i in range(999)})
    )
    with pytest.raises(ModelFileError, match=r"it has \d+ bytes, more than max_bytes"):
        read(path, max_bytes=100)
    first = memoised(tf.tensor((9000,), of=tf.storage(size=9000)))
    buffers = {"first": first} | {str(i): tf.Code(b"h\x00") for i in range(400)}
    repeated = tmp_path / "repeated.model"
    tf.forge(repeated, tf.mace(buffers=buffers), members={"m/data/0": bytes(36_000)})
    with pytest.raises(ModelFileError, match=r"tensors have more than max_bytes"):
        read(repeated, max_bytes=1 << 20)
    monkeypatch.setattr(container, "MAX_PICKLE", 10)
    refuse(path, "more than 10")


@pytest.mark.parametrize(
    "stem",
    ["../../x", "/etc/x", "..", "C:\\x", "a\\..\\b", "a b", "é", "a\nb", "-", "data", "a/data"],
)
def test_names_of_members_are_only_names(tmp_path, stem, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    path = tf.forge(tmp_path / "m.model", tf.mace(buffers={"x": tf.tensor()}), stem=stem)
    assert list(read(path).tensors) == ["x"]
    assert sorted(found.name for found in tmp_path.rglob("*")) == ["inside", "m.model"]


def test_names_of_members_that_end_at_a_zero_do_not_stand_for_others(tmp_path):
    path = tf.forge(tmp_path / "m.model", tf.mace(), members={"m/data.pkl_x": b"N."})
    path.write_bytes(path.read_bytes().replace(b"m/data.pkl_x", b"m/data.pkl\0x"))
    refuse(path, "distinct|intact")


def test_directories_that_lie_are_refused(tmp_path):
    """Sizes and offsets of the central directory at their extremes."""
    path = tf.forge(tmp_path / "m.model", tf.mace(buffers={"x": tf.tensor()}))
    whole = path.read_bytes()
    entry, end = whole.rindex(b"PK\x01\x02"), whole.rindex(b"PK\x05\x06")
    fields = [(entry + at, size) for at, size in ((20, 4), (24, 4), (28, 2), (30, 2), (42, 4))]
    fields += [(end + at, size) for at, size in ((8, 2), (10, 2), (12, 4), (16, 4))]
    for start, size in fields:
        for value in (0, 1, 127, (1 << 8 * size - 1) - 1, (1 << 8 * size) - 2, (1 << 8 * size) - 1):
            raw = value.to_bytes(size, "little")
            path.write_bytes(whole[:start] + raw + whole[start + size :])
            with contextlib.suppress(ModelFileError):
                assert list(read(path).tensors) == ["x"]


# --- hostile pickles ------------------------------------------------------------------------------


def test_payloads_are_not_executed(tmp_path):
    proof = tmp_path / "proof"
    for name in ("os.system", "posix.system", "nt.system", "subprocess.call", "builtins.exec"):
        payload = tf.call(name, f"touch {proof}")
        refuse(tf.forge(tmp_path / "m.model", payload), f"names '{name}'")
    refuse(tf.forge(tmp_path / "m.model", tf.mace(x=tf.call("builtins.eval", "1"))), "eval")
    assert not proof.exists()


def test_functions_cannot_be_changed(tmp_path):
    names = [f"{f.__module__}.{f.__qualname__}" for f in unpickle.REDUCERS.values()]
    slots = (None, {"__name__": "renamed"})
    for name in unpickle.ALLOWED:
        for state in (slots, {"__name__": "renamed"}):
            changed = tf.Code(tf.named(name) + tf.code(state) + b"b")
            refuse(tf.forge(tmp_path / "m.model", tf.mace(x=changed)), "sets the state")
    refuse(tf.forge(tmp_path / "m", tf.new("mace.modules.models.MACE", state=slots)), "state")
    assert names == [f"{f.__module__}.{f.__qualname__}" for f in unpickle.REDUCERS.values()]


def test_loads_share_nothing(tmp_path):
    path = tf.forge(tmp_path / "m.model", tf.mace(x=tf.call("collections.OrderedDict")))
    read(path).root.get("x")["poison"] = 1
    assert read(path).root.get("x") == {}


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "match"),
    [
        ((1 << 28,), (0,), 0, "does not fit"),  # 8 bytes that would become 1 GiB when copied
        ((3,), (0,), 0, "does not fit"),
        ((3,), (1,), 0, "does not fit"),
        ((2,), (2,), 0, "does not fit"),
        ((1,), (1,), 2, "does not fit"),
        ((1,), (1 << 62,), 1 << 62, "does not fit"),
        ((2, 1), (1,), 0, "natural"),
        ((-1,), (1,), 0, "natural"),
        ((2,), (-1,), 1, "natural"),
        ((1,), (1,), -1, "natural"),
        ((True,), (1,), 0, "natural"),
        ((1,) * 33, (1,) * 33, 0, "natural"),
        ((1 << 1000,), (1,), 0, "natural"),
        ((1,), (1 << 1000,), 0, "natural"),
        ((0, 1 << 62), (1, 1), 0, "intact"),
        ("ab", "ab", 0, "where a tuple"),
    ],
)
def test_views_outside_their_storage_are_refused(tmp_path, shape, strides, offset, match):
    bad = tf.tensor(shape, strides, offset)
    refuse(tf.forge(tmp_path / "m.model", tf.mace(buffers={"x": bad})), match)


@pytest.mark.parametrize(
    ("of", "match"),
    [
        (tf.storage("1"), "no member"),
        (tf.storage("../data.pkl"), "no member"),
        (tf.storage(7), "where a str"),
        (tf.storage(size=1), "elements of float32"),
        (tf.storage(size=1 << 60), "elements of float32"),
        (tf.storage(size="2"), "where a int"),
        (tf.storage(size=-2), "elements of float32"),
        (tf.storage(kind="torch.nn.functional.silu"), "has the type"),
        (tf.Code(tf.code("storage") + b"Q"), "where a tuple"),
        (tf.Code(tf.code(("storage", "x", "0", "cpu", 2)) + b"Q"), "not a torch storage"),
        (tf.Code(tf.code(("module", tf.named("torch.FloatStorage"), "0", "", 2)) + b"Q"), "not a"),
        (tf.Code(tf.code(("storage",)) + b"Q"), "intact"),
        (tf.tensor(), "where a Storage"),
        (tf.code(None), "where a Storage"),
    ],
)
def test_false_storages_are_refused(tmp_path, of, match):
    bad = tf.tensor(of=of)
    refuse(tf.forge(tmp_path / "m.model", tf.mace(buffers={"x": bad})), match)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (tf.Code(tf.code("collections") + tf.code("OrderedDict.fromkeys") + b"\x93"), "fromkeys"),
        (tf.Code(b"ccollections\nOrderedDict.fromkeys\n"), "fromkeys"),
        (tf.Code(tf.code("torch") + tf.code(3) + b"\x93"), "a int where"),
        (tf.Code(b"\x82\x01"), "EXT1"),
        (tf.Code(b"I1\n"), "INT"),
        (tf.Code(b"N0N"), "POP"),
        (tf.Code(b"(i__main__\nx\n"), "INST"),
        (tf.call("mace.modules.models.MACE"), "calls 'mace"),
        (tf.call("torch.nn.functional.silu", 1), "calls 'torch"),
        (tf.new("_codecs.encode", "x"), "not a class"),
        (tf.new("collections.OrderedDict"), "not a class"),
        (tf.call("__builtin__.getattr", tf.named("collections.OrderedDict"), "tanh"), "getattr"),
        (
            tf.call("builtins.getattr", tf.named("torch._C._VariableFunctionsClass"), "save"),
            "getattr",
        ),
        (tf.call("_codecs.encode", "x", "utf-7"), "latin1"),
        (tf.call("_codecs.encode", "x", "zip"), "latin1"),
        (tf.call("collections.OrderedDict", [("a", 1)]), "intact"),
        (tf.call("torch._utils._rebuild_parameter", None, True, None), "ndarray"),
        (tf.call("torch.fx.graph_module.reduce_graph_module", "import os", ""), "a str where"),
        (tf.Code(tf.new("e3nn.o3._irreps.Irreps") + b"(Ne"), "list belongs"),
        (tf.Code(tf.new("e3nn.o3._irreps.Irreps") + tf.code("a") + b"Ns"), "dict belongs"),
        (tf.Code(b"j\x09\x00\x00\x00"), "intact"),
        (tf.Code(b"\x87" * 30), "intact"),
        (tf.Code(b"t" * 30), "intact"),
        (tf.Code(b"X\xff\xff\xff\xff"), "intact"),
        (tf.Code(b"\x8d" + b"\xff" * 8), "intact"),
        (tf.Code(b"\xff"), "intact"),
        (tf.Code(b"S'\\m'\n"), "STRING|intact"),  # Python warns of this escape
        ({tf.Code(b")" + b"\x85" * 200_000): 1}, "key"),  # hash() would overflow the C stack
        ({1 << 61: 1}, "key"),  # keys that all have the same hash
        ({(1,): 1}, "key"),
        (tf.call("builtins.set", [tf.code(("a",))]), "set element"),
        (tf.Code(b"\x8f(" + tf.code(()) + b"\x90"), "set element"),
    ],
)
def test_hostile_instructions_are_refused(tmp_path, value, match):
    refuse(tf.forge(tmp_path / "m.model", tf.mace(x=value)), match)


def test_long_pickles_are_refused(tmp_path):
    endless = b"\x80\x02" + b"N" * (unpickle.MAX_OPCODES + 1) + b"."
    refuse(tf.forge(tmp_path / "m.model", endless), "instructions")


def test_deep_values_are_harmless(tmp_path):
    deep = tf.Code(b")" + b"\x85" * 300_000)
    file = read(tf.forge(tmp_path / "m.model", tf.mace(x=deep)))
    assert isinstance(file.root.get("x"), tuple)
    with pytest.raises(ModelFileError):
        irreps(file.root.get("x"))
    del file


def deep_objects(count):
    """Irreps(Irreps(Irreps(...)))."""
    cls = tf.named("e3nn.o3._irreps.Irreps")
    return tf.Code(cls + b"q\x00" + b"h\x00" * count + b")" + b"\x81\x85" * count + b"\x81")


def deep_states(count):
    """Objects in the states of objects."""
    cls = tf.named("e3nn.o3._irreps.Irreps")
    begin = b"h\x00)\x81}" + tf.code("x")
    return tf.Code(cls + b"q\x00)\x81}" + tf.code("x") + begin * count + b"N" + b"sb" * (count + 1))


@pytest.mark.parametrize(
    "deep",
    [
        tf.Code(b"]" * 200_000 + b"a" * 199_999),
        tf.Code((b"}" + tf.code("a")) * 100_000 + b"N" + b"s" * 100_000),
        tf.Code(b"(" * 100_000 + b"t" * 100_000),
        deep_objects(100_000),
        deep_states(50_000),
    ],
    ids=["lists", "dicts", "marks", "arguments", "states"],
)
def test_deep_nesting_is_harmless(tmp_path, deep):
    file = read(tf.forge(tmp_path / "m.model", tf.mace(x=deep)))
    with pytest.raises(ModelFileError):
        irreps(file.root.get("x"))
    del file
    refuse(tf.forge(tmp_path / "m.model", deep), "holds a|intact")
    refuse(tf.forge(tmp_path / "m.model", {"model": deep}), "training checkpoint|whole model")
    refuse(tf.forge(tmp_path / "m.model", tf.mace(buffers={"x": deep})), "tensor x is a")
    refuse(tf.forge(tmp_path / "m.model", tf.mace(modules=deep)), "not a dict|sub-module|cannot be")


@pytest.mark.parametrize(
    "cycle",
    [
        tf.Code(b"]q\x00h\x00a"),
        tf.Code(b"}q\x00" + tf.code("a") + b"h\x00s"),
        tf.Code(b"]q\x00h\x00\x85a"),
    ],
    ids=["list", "dict", "tuple"],
)
def test_cycles_are_harmless(tmp_path, cycle):
    file = read(tf.forge(tmp_path / "m.model", tf.mace(x=cycle)))
    with pytest.raises(ModelFileError):
        irreps(file.root.get("x"))
    refuse(tf.forge(tmp_path / "m.model", cycle), "holds a")
    refuse(tf.forge(tmp_path / "m.model", tf.mace(buffers={"x": cycle})), "tensor x is a")


def many(count, instructions):
    return tf.Code(b"](" + instructions * count + b"e")


@pytest.mark.parametrize(
    "costly",
    [
        many(400_000, b"X\x01\x00\x00\x00a"),
        many(300_000, b"]"),
        many(200_000, b"}"),
        many(200_000, b"\x8f"),
        many(250_000, b")\x85"),
        # One long tuple or list behind many references to it
        tf.Code(
            b"(" + b"N" * 300_000 + b"tq\x00" + b"\x85" + b"](" + b"h\x00" * 300_000 + b"e\x86"
        ),
        # Integers that fall into one another's place in a hash table
        tf.Code(b"\x8f(" + b"".join(tf.code(i << 12) for i in range(300_000)) + b"\x90"),
        tf.Code(tf.code("a" * (8 << 20)) + b"q\x00](" + b"h\x00" * 300_000 + b"e\x86"),
    ],
)
def test_reading_takes_time_in_proportion_to_size(tmp_path, costly):
    start = time.monotonic()
    read(tf.forge(tmp_path / "m.model", tf.mace(x=costly)))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (tf.Code(b"I" + b"9" * (8 << 20) + b"\n"), "intact|INT"),
        (tf.Code(b"L" + b"9" * (8 << 20) + b"L\n"), "intact|LONG"),
        (tf.Code(b"\x8b" + (8 << 20).to_bytes(4, "little") + b"\x7f" * (8 << 20)), "LONG4"),
        (tf.Code(b"\x8b\xff\xff\xff\x7f"), "intact"),
        (tf.Code(b"F" + b"x" * (8 << 20) + b"\n"), "intact.*could not convert"),
        (tf.Code(b"c" + b"a" * (8 << 20) + b"\nb\n"), "names 'aaaa"),
        (tf.Code(tf.code("a" * (8 << 20)) + b"q\x00h\x00\x93"), "names 'aaaa"),
        (tf.Code(tf.code("(" + "9" * (8 << 20)) + b"Q"), "where a tuple"),
        ({"a" * (8 << 20): 1, "b": tf.Code(b"\xff")}, "intact"),
        (tf.new("e3nn.o3._irreps.Irreps", state=tf.Code(b"\x8b\xff\xff\xff\xff")), "intact"),
    ],
)
def test_large_arguments_are_refused_soon_and_in_few_words(tmp_path, value, match):
    refuse(tf.forge(tmp_path / "m.model", tf.mace(x=value)), match)


def test_messages_about_the_tree_are_short(tmp_path):
    """What :func:`convert` asks of a file with very many names."""
    modules = {f"{i:0100d}": linear({}) for i in range(10_000)}
    root = read(tf.forge(tmp_path / "m.model", tf.mace(modules=modules))).root
    with pytest.raises(ModelFileError, match="and 9960 more") as caught:
        root.module("absent")
    assert len(str(caught.value)) < 10_000
    attributes = {f"a{i}": None for i in range(10_000)}
    root = read(tf.forge(tmp_path / "m.model", tf.mace(**attributes))).root
    with pytest.raises(ModelFileError, match="and 9960 more"):
        root.get("absent")


def test_names_cannot_act_on_the_terminal(tmp_path):
    path = tmp_path / "m.model"
    for name in ("\x1b[2J", "a\nb", "\u202e", "\x00"):
        refuse(tf.forge(path, tf.mace(buffers={name: tf.tensor()})), "cannot be the name")
        refuse(tf.forge(path, tf.mace(buffers={name: 3})), "cannot be the name")
        like = tf.forge(tmp_path / "like.model", tf.mace(buffers={"x": tf.tensor()}))
        with pytest.raises(ModelFileError) as caught:
            read(tf.forge(path, {name: tf.tensor()}), like=like)
        assert name not in str(caught.value).replace("\n  ", "").replace("\ngive", "")
        assert ascii(name) in str(caught.value)


def test_the_stages_of_schedules_are_references(tmp_path):
    """torch before 2.3 keeps a function in the schedule of stage two; it stays a name."""
    schedule = tf.named("torch.optim.swa_utils.SWALR")
    found = tf.call("__builtin__.getattr", schedule, "_linear_anneal")
    path = tf.forge(tmp_path / "m.pt", {"model": {}, "lr_scheduler": {"anneal_func": found}})
    refuse(path, "training checkpoint")
    for name in ("__init__", "step", "tanh"):
        bad = tf.call("__builtin__.getattr", schedule, name)
        refuse(tf.forge(path, {"model": {}, "lr_scheduler": {"anneal_func": bad}}), "getattr")


def test_huge_memo_indices_cost_nothing(tmp_path):
    memo = tf.Code(tf.code("a") + b"r\xff\xff\xff\xff")
    assert read(tf.forge(tmp_path / "m.model", tf.mace(x=memo))).root.get("x") == "a"


def memoised(value, index=0):
    return tf.Code(tf.code(value) + b"q" + bytes([index]))


@pytest.mark.parametrize(
    ("value", "call"),
    [
        ("a" * (1 << 20), lambda arg: tf.call("_codecs.encode", arg, "latin1")),
        ([0] * 10_000, lambda arg: tf.call("builtins.set", arg)),
        (
            {str(i): None for i in range(10_000)},
            lambda arg: tf.new("torch.nn.modules.linear.Linear", state=arg),
        ),
    ],
)
def test_copies_are_counted(tmp_path, value, call):
    again = tf.Code(b"h\x00")
    copies = [call(memoised(value)), *(call(again) for _ in range(100))]
    refuse(tf.forge(tmp_path / "m.model", tf.mace(x=copies)), "copies")


def linear(modules, **tables):
    return tf.new("torch.nn.modules.linear.Linear", state=tf.module(modules=modules, **tables))


def test_module_trees_are_bounded(tmp_path):
    path = tmp_path / "m.model"
    deep = linear({})
    for _ in range(reader.MAX_DEPTH + 1):
        deep = linear({"x": deep})
    refuse(tf.forge(path, tf.mace(modules={"x": deep})), "nested deeper")

    bomb = linear({})
    for _ in range(25):  # 2^25 paths to 25 modules
        bomb = linear({"a": memoised(bomb), "b": tf.Code(b"h\x00")})
    refuse(tf.forge(path, tf.mace(modules={"x": bomb})), "entries")

    cycle = tf.named("mace.modules.models.MACE") + b")\x81q\x00"
    cycle += tf.code(tf.module(modules={"x": tf.Code(b"h\x00")})) + b"b"
    refuse(tf.forge(path, tf.Code(cycle)), "nested deeper")

    wide = memoised({str(i): None for i in range(1000)})
    crowd = [linear({}, buffers=wide)] + [linear({}, buffers=tf.Code(b"h\x00"))] * 200
    refuse(tf.forge(path, tf.mace(modules={str(i): m for i, m in enumerate(crowd)})), "entries")

    long = linear({})
    for _ in range(8):
        long = linear({"a" * 100: long})
    refuse(tf.forge(path, tf.mace(modules={"x": long})), "more than 500 characters")

    for name in ("a.b", "", "a" * 101, 3):
        refuse(tf.forge(path, tf.mace(modules={name: linear({})})), "cannot be the name")
        refuse(tf.forge(path, tf.mace(buffers={name: tf.tensor()})), "cannot be the name")
    refuse(tf.forge(path, tf.mace(modules={"x": 3})), "sub-module 'x.' is a int")
    refuse(tf.forge(path, tf.mace(buffers={"x": 3})), "tensor x is a int")
    refuse(tf.forge(path, tf.mace(buffers=[])), "not a dict")
    refuse(tf.forge(path, tf.mace(_non_persistent_buffers_set=["x"])), "set is a list")


# --- fuzz -----------------------------------------------------------------------------------------


def mutate(data, rng):
    data = bytearray(data)
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    for _ in range(rng.randint(1, 4)):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def survive(path):
    try:
        read(path)
    except ModelFileError:
        return 0
    return 1


def fuzz(path, count):
    """Mutate the archive, then the pickle inside a sound archive (where no checksum helps)."""
    rng = random.Random(0)
    whole, broken = path.read_bytes(), path.with_name("broken.model")
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in content if name.endswith("/data.pkl"))
    survivors, start = 0, time.monotonic()
    for _ in range(count):
        broken.write_bytes(mutate(whole, rng))
        survive(broken)
        with zipfile.ZipFile(broken, "w") as archive:
            for key, data in content.items():
                archive.writestr(key, mutate(data, rng) if key == name else data)
        survivors += survive(broken)
    assert time.monotonic() - start < 0.2 * count
    assert 0 < survivors < count  # so that mutations reach deep, and do harm


def test_mutations_of_a_forged_file_are_read_or_refused(tmp_path):
    child = linear({}, parameters={"weight": tf.tensor()})
    irrep = tf.new("e3nn.o3._irreps.Irrep", (1, -1))
    root = tf.mace(buffers={"r_max": tf.tensor()}, modules={"child": child}, ir=irrep, x=1.5 < 2)
    fuzz(tf.forge(tmp_path / "m.model", root), 300)


@pytest.mark.torch
def test_mutations_of_a_real_file_are_read_or_refused(tmp_path):
    tf.save(tf.mace_model(), tmp_path / "m.model")
    fuzz(tmp_path / "m.model", 60)
