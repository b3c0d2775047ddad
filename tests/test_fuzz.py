"""A few hundred of the damaged files of benchmarks/fuzz_reader.py, that it sees failures, and files
that were made to exhaust the conversion."""

import dataclasses
import importlib.util
import math
import os
import random
import re
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from converters.reader import ModelFileError, Node, Reference, read
from converters.to_jax import MAX_MESSAGE, from_file

ROOT = Path(__file__).parents[1]
CASES = 300


def load():
    path = ROOT / "benchmarks" / "fuzz_reader.py"
    spec = importlib.util.spec_from_file_location("fuzz_reader", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


fuzz = load()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return list(fuzz.shipped(tmp_path_factory.mktemp("fuzz")))


def test_files_that_are_taken_apart_and_rebuilt_are_read(bases, tmp_path):
    assert len({base.name for base in bases}) == len(bases) == 4
    for base in bases:
        for data in (base.data, base.rebuild(b"".join(base.steps))):
            (tmp_path / "m").write_bytes(data)
            assert fuzz.attempt(tmp_path / "m", base.like) == "read"


def test_damaged_files_are_read_or_refused(bases, tmp_path):
    fuzz.prepare()
    path = tmp_path / "m.model"
    found = {}
    for number in range(CASES):
        base, mutation, data = fuzz.case(bases, 1, number)
        path.write_bytes(data)
        start = time.monotonic()
        outcome = fuzz.attempt(path, base.like)
        assert outcome in fuzz.SOUND, (number, base.name, mutation, outcome)
        assert time.monotonic() - start < 5, (number, base.name, mutation)
        found.setdefault(mutation, []).append(outcome)
    assert set(found) == set(fuzz.MUTATIONS)
    outcomes = [outcome for some in found.values() for outcome in some]
    assert set(outcomes) == fuzz.SOUND  # mutations reach deep, and do harm
    assert outcomes.count("read") > CASES / 20


@pytest.mark.parametrize("mutation", fuzz.MUTATIONS)
def test_every_mutation_does_harm_and_is_reproducible(bases, mutation):
    for base in bases:
        if mutation == "memo" and not any(step[:1] == b"h" for step in base.steps):
            continue  # the forged weights name every object once
        made = [fuzz.mutate(base, mutation, random.Random(f"{mutation}/{i}")) for i in range(8)]
        assert sum(data != base.rebuild(b"".join(base.steps)) for data in made) >= 4
        assert fuzz.mutate(base, mutation, random.Random(f"{mutation}/0")) == made[0]
        assert any(data != made[0] for data in made)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_a_campaign_in_workers_counts_every_case(bases, monkeypatch):
    monkeypatch.setattr(fuzz, "CASES_PER_WORKER", 7)
    document = fuzz.report(bases, 1, 20)
    assert document["failures"] == []
    assert sum(document["outcomes"].values()) == 20
    assert sum(sum(row.values()) for row in document["by_file"].values()) == 20
    seconds = document["processor_seconds"]
    assert 0 < seconds["mean"] <= seconds["max"] < fuzz.SECONDS


def raise_key_error(path, like):
    raise KeyError("x")


def import_something(path, like):
    sys.modules["smuggled"] = sys
    raise ModelFileError("no")


def hang(path, like):
    while True:
        pass


def crash(path, like):
    os._exit(3)


def hoard(path, like):
    return bytearray(3 << 30)  # never touched, so that only the limit can object


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize(
    ("function", "match"),
    [
        (raise_key_error, "KeyError"),
        (import_something, "imported.*smuggled"),
        (hang, "too slow"),
        (crash, "died"),
        (hoard, "MemoryError"),
    ],
)
def test_failures_of_the_reader_are_seen(bases, monkeypatch, function, match):
    monkeypatch.setattr(fuzz, "SECONDS", 1)

    def sometimes(path, like):
        return read(path, like=like) if path.stat().st_size % 2 else function(path, like)

    sizes = [len(fuzz.case(bases, 1, number)[2]) % 2 for number in range(6)]
    bad = sizes.count(0)
    assert 0 < bad < 6
    start = time.monotonic()
    found = list(fuzz.campaign(bases, 1, 6, sometimes))
    assert time.monotonic() - start < 15
    assert [line[0] for line in found] == list(range(6))
    failed = [line[3] for line in found if line[3] not in fuzz.SOUND]
    assert len(failed) >= (1 if function is import_something else bad)
    assert all(re.search(match, outcome) for outcome in failed), failed


# --- hostile hyper-parameters ---------------------------------------------------------------------


def irreps_node(*terms):
    return Node(
        "e3nn.o3._irreps.Irreps",
        (
            tuple(
                Node("_", ((mul, Node("_", ((degree, parity),))),)) for mul, degree, parity in terms
            ),
        ),
    )


def set_all(file, module, **state):
    """The same attributes in the module of every layer; the tree is ours alone."""
    for layer in file.root.module("interactions").children:
        node = file.root.module(f"interactions.{layer}{module}")
        node.state |= state


def with_tensors(file, tensors):
    return dataclasses.replace(file, tensors=file.tensors | tensors)


def a_million_heads(file):
    file.root.state["heads"] = ["a"] * 10**6
    return with_tensors(file, {"atomic_energies_fn.atomic_energies": np.zeros((10**6, 5))})


def a_million_elements(file):
    return with_tensors(file, {"atomic_numbers": np.full(10**6, 200)})


def elements_that_are_not_whole(file):
    return with_tensors(file, {"atomic_numbers": np.array([1.5, 6, 8, 11, 17])})


def a_long_name(file):
    file.root.state["heads"] = ["a" * 10**6]


def heads_in_a_string(file):
    file.root.state["heads"] = "D"


def ten_thousand_layers(file):
    layers = file.root.module("interactions").state["_modules"]
    layers |= {str(i): layers["0"] for i in range(10**4)}


def a_string_of_megabytes(file):
    set_all(file, "", hidden_irreps="+".join(["8x0e"] * 10**6))
    set_all(file, ".skip_tp", irreps_out="+".join(["8x0e"] * 10**6))


def a_thousand_irreps(file):
    set_all(file, ".linear_up", irreps_in=irreps_node(*[(8, 0, 1)] * 1000))


def ten_thousand_irreps(file):
    set_all(file, ".linear_up", irreps_in=irreps_node(*[(8, 0, 1)] * 10**4))


def a_huge_degree(file):
    set_all(file, ".conv_tp", irreps_in2=irreps_node((1, 255, -1)))


def degree_twelve(file):
    set_all(file, ".conv_tp", irreps_in2=irreps_node((1, 0, 1), (1, 12, 1)))


def costly_couplings(file):
    every = irreps_node(*[(1, degree, (-1) ** degree) for degree in range(12)])
    set_all(file, ".linear_up", irreps_in=every, irreps_out=every)
    set_all(file, ".linear", irreps_out=every)
    set_all(file, ".conv_tp", irreps_in2=every)


def terabytes(file):
    wide = irreps_node((10**6, 0, 1), (10**6, 1, -1))
    set_all(file, ".linear_up", irreps_in=wide)


def a_huge_multiplicity(file):
    set_all(file, ".linear_up", irreps_in=irreps_node((2**2000, 0, 1)))


def correlation_thirty(file):
    prefix = "products.0.symmetric_contractions.contractions.0"
    names = [f"{prefix}.weights.{i}" for i in range(29)]
    tensors = {name: np.zeros((5, 1, 16)) for name in names}
    file = with_tensors(file, tensors)
    return dataclasses.replace(file, parameters=file.parameters | set(names))


def a_coupling_of_another_shape(file):
    name = "products.0.symmetric_contractions.contractions.0.U_matrix_2"
    return with_tensors(file, {name: file.tensors[name][:-1]})


def embeddings(**spec):
    usual = {"type": "categorical", "per": "graph", "num_classes": 3, "offset": 1, "emb_dim": 2}

    def change(file):
        specs = {"total_charge": usual | spec}
        made = Node("mace.modules.blocks.GenericJointEmbedding", state={"specs": specs})
        file.root.state["_modules"]["joint_embedding"] = made

    change.__name__ = f"embeddings_{spec}"
    return change


def ten_thousand_embeddings(file):
    embeddings()(file)
    specs = file.root.module("joint_embedding").state["specs"]
    specs |= {f"a{i}": specs["total_charge"] for i in range(10**4)}


def neighbours(value):
    def change(file):
        set_all(file, "", avg_num_neighbors=value)

    change.__name__ = f"neighbours_{value}"
    return change


def many_instructions(file):
    linear = file.root.module("interactions.0.linear")
    linear.state["instructions"] = linear.state["instructions"] * 10**5


def shared_instructions(file):
    linear = file.root.module("interactions.0.linear")
    bias = Node(linear.get("instructions")[0].qualname, (-1, 0, (), 1.0))
    linear.state["instructions"] = linear.get("instructions") + [bias] * 2000
    file.root.state["_modules"] |= {f"a{i}": linear for i in range(10**4)}


def shared_memory(file):
    raw = np.zeros(1 << 20)
    return with_tensors(file, {f"a{i}": raw.view() for i in range(1000)})


def whole_parameters(file):
    return with_tensors(
        file, {name: np.zeros(file.tensors[name].shape, int) for name in file.parameters}
    )


def thousands_of_unknown_parameters(file):
    names = {f"{'a' * 400}{i}" for i in range(10**4)}
    file = with_tensors(file, dict.fromkeys(names, np.zeros(0)))
    return dataclasses.replace(file, parameters=file.parameters | names)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (a_million_heads, "1000000 heads; no MACE has more"),
        (a_million_elements, "1000000 elements; no MACE"),
        (elements_that_are_not_whole, "atomic_numbers are float64"),
        (a_long_name, "characters in the name of a head"),
        (heads_in_a_string, "has 1 rows, the heads are 'D'"),
        (ten_thousand_layers, "10000 layers"),
        (a_string_of_megabytes, "list of irreps has 4999999 characters"),
        (a_thousand_irreps, "1000 irreps in one list"),
        (ten_thousand_irreps, "Irreps object has 10000 terms"),
        (a_huge_degree, "too high a degree or mult.*up to 11"),
        (degree_twelve, "too high a degree or mult.*up to 11"),
        (costly_couplings, "too many irreps of too high degrees"),
        (terabytes, "path weight|expects 1000000000000"),
        (a_huge_multiplicity, "too high a degree or multiplicity"),
        (correlation_thirty, "30 orders of correlation"),
        (a_coupling_of_another_shape, r"U_matrix_2 has shape \(\d+.*expected"),
        (embeddings(num_classes=10**12), "num_classes: Input should be less than"),
        (embeddings(emb_dim=2**62), "emb_dim: Input should be less than"),
        (embeddings(emb_dim=-1), "emb_dim: Input should be greater"),
        (embeddings(offset=-(2**40)), "offset: Input should be greater"),
        (embeddings(type="other"), "kind: Input should be 'categorical'"),
        (ten_thousand_embeddings, "10001 embeddings"),
        (neighbours(0.0), "avg_num_neighbors: Input should be greater than 0"),
        (neighbours(-3), "avg_num_neighbors: Input should be greater than 0"),
        (neighbours(math.nan), "avg_num_neighbors: Input should be"),
        (neighbours("12"), "avg_num_neighbors is of the type str"),
        (neighbours(10**400), "OverflowError"),
        (many_instructions, "instructions of one product"),
        (shared_instructions, "more than 50000 instructions"),
        (shared_memory, "share .* of memory"),
        (whole_parameters, "whole numbers among its parameters"),
        (thousands_of_unknown_parameters, r"…$"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_hostile_hyper_parameters_are_refused_at_once(change, match, bases, tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(bases[0].data)
    file = read(path)
    from_file(file)  # couplings of sound degrees are computed once in a process
    file = change(file) or file
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(ModelFileError) as caught:
        from_file(file)
    seconds = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(caught.value)
    assert re.search(match, message, re.DOTALL), message[:1000]
    assert len(message) <= MAX_MESSAGE + 2
    assert seconds < 2, seconds
    assert peak < 32 << 20, peak  # some of these files would have megabytes


VALUES = (
    *(None, True, 0, 1, -1, 255, 2**62, 2**2000, 0.0, -1.0, 1e308, math.nan, math.inf),
    *("", "x", "2x0e", "1x11o", "0e+0e", b"x", (), (1,), [], [1, 2], {"a": 1}, {1, 2}),
    *(np.zeros(0), np.zeros(3), np.asarray(1.5), np.ones((2, 3, 4)), np.zeros(2, int)),
    *(Reference("torch.tanh"), Node("mace.modules.blocks.LinearReadoutBlock")),
)


def places(value, seen):
    """``(container, key)`` of all that hangs below a node, and the arguments of each."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Node):
        yield value, None
        yield from places(value.state, seen)
    elif isinstance(value, tuple):
        for item in value:
            yield from places(item, seen)
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from places(item, seen)


def test_damaged_hyper_parameters_are_converted_or_refused(bases, tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(bases[0].data)
    outcomes = []
    for number in range(CASES):
        rng = random.Random(f"hyper-parameters/{number}")
        file = read(path)
        found = list(places(file.root, set()))
        for _ in range(rng.choice((1, 1, 2, 4))):
            (owner, key), value = rng.choice(found), rng.choice(VALUES)
            if isinstance(owner, Node):
                owner.args = tuple(rng.choice((item, value)) for item in owner.args)
            else:
                owner[key] = value
        start = time.process_time()
        try:
            from_file(file)
            outcomes.append("converted")
        except ModelFileError:
            outcomes.append("refused")
        assert time.process_time() - start < 2, number
    assert min(outcomes.count("converted"), outcomes.count("refused")) > CASES / 10
