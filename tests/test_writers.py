"""Files as nine releases of mace-torch wrote them: read without torch, they say what those said.

The files and the answers were made by ``benchmarks/writers.py``, which checks more of them, and
models of published size, than are kept here.
"""

import functools
import json
import lzma
from pathlib import Path

import ase
import jax
import numpy as np
import pytest

from converters.to_jax import convert
from jaxft import data, predict

FOLDER = Path(__file__).parent / "data" / "writers"
FIXTURES = sorted(path.name.removesuffix(".model.xz") for path in FOLDER.glob("*.model.xz"))

BOUNDS = {"energy": 1e-10, "node_energy": 1e-10, "forces": 1e-9, "stress": 1e-10}
"""eV/atom, eV, eV/Å, eV/Å³; as in tests/parity: room for other BLAS libraries."""


def deviations(path, document):
    """The largest absolute differences to a writer's answers, over frames and heads."""
    model, params = convert(path)
    predictor = jax.jit(functools.partial(predict, model))
    frames = [
        data.from_atoms(
            ase.Atoms(
                frame["numbers"],
                frame["positions"],
                cell=frame["cell"],
                pbc=frame["pbc"],
                info={"charge": frame["charge"], "spin": frame["spin"]},
            )
        )
        for frame in document["frames"]
    ]
    assert document["heads"] is None or list(model.heads) == document["heads"]
    np.testing.assert_array_equal(model.e0s, document["e0s"])
    found = dict.fromkeys(BOUNDS, 0.0)
    largest = 0.0
    for head, answers in zip(document["heads"] or [None], document["answers"], strict=True):
        dataset = data.prepare(frames, model, head=head)
        (batch,) = data.epoch(dataset, len(frames), dtype="float64")
        out = jax.tree.map(np.asarray, predictor(params, batch.graph))
        table = dict(
            zip(model.atomic_numbers, model.e0s[model.head_index(head)].tolist(), strict=True)
        )
        start = 0
        for g, (frame, theirs) in enumerate(zip(frames, answers, strict=True)):
            rows = slice(start, start + len(frame))
            start = rows.stop
            e0 = np.array([table[z] for z in frame.atomic_numbers.tolist()])
            differences = {
                "energy": (out.energy[g] + e0.sum() - theirs["energy"]) / len(frame),
                "node_energy": out.node_energy[rows] + e0 - theirs["node_energy"],
                "forces": out.forces[rows] - theirs["forces"],
            }
            if theirs["stress"] is not None:
                differences["stress"] = out.stress[g] - theirs["stress"]
            for name, difference in differences.items():
                found[name] = max(found[name], float(np.abs(difference).max()))
            largest = max(largest, float(np.abs(theirs["forces"]).max()))
    return found | {"largest force": largest}


def unpacked(name, folder):
    """The model file as its writer left it, and what is known about it."""
    path = folder / f"{name}.model"
    path.write_bytes(lzma.decompress((FOLDER / f"{name}.model.xz").read_bytes()))
    return path, json.loads((FOLDER / f"{name}.json").read_text())


def test_there_are_files_of_every_release_that_changed_them():
    releases = {name.split("-")[0] for name in FIXTURES}
    assert releases >= {"0.3.4", "0.3.6", "0.3.8", "0.3.10", "0.3.13", "0.3.14", "0.3.15", "0.3.16"}


@pytest.mark.parametrize("name", FIXTURES)
def test_a_release_of_mace_is_reproduced(name, tmp_path, record_property):
    found = deviations(*unpacked(name, tmp_path))
    for quantity, value in found.items():
        record_property(quantity, value)
    assert found["largest force"] > 0.5  # eV/Å: absolute bounds mean something
    assert {quantity: found[quantity] <= bound for quantity, bound in BOUNDS.items()} == (
        dict.fromkeys(BOUNDS, True)
    ), found
