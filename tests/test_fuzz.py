"""A few hundred of the damaged files of benchmarks/fuzz_reader.py, and that it sees failures."""

import importlib.util
import os
import random
import re
import sys
import time
from pathlib import Path

import pytest

from converters.reader import ModelFileError, read

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
