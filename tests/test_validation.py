"""What is judged after every epoch, against errors worked out one frame at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest

from jaxft import data, loss, parallel
from jaxft.evaluate import predict_frames
from jaxft.validation import METRICS, validator


@pytest.fixture(scope="module")
def labelled(structures):
    """Frames with random labels, one without forces, of different weight."""
    rng = np.random.default_rng(0)
    found = []
    for i, atoms in enumerate(structures[:4]):
        frame = data.from_atoms(atoms)
        stress = np.diag(rng.normal(size=3)) / 100 if frame.is_periodic else None
        forces = None if i == 1 else rng.normal(size=(len(frame), 3))
        found.append(replace(frame, energy=-1.0 - i, forces=forces, stress=stress, weight=1.0 + i))
    return found


@pytest.fixture(scope="module")
def judge(tiny, labelled):
    """``loss_fn -> metrics`` of the labelled frames."""
    model, params = tiny
    dataset = data.prepare(labelled, model)

    def judged(loss_fn):
        validate = validator(
            model,
            loss_fn,
            {"valid": dataset},
            weights={"energy": 1.0, "forces": 10.0},
            batch_size=4,
            dtype="float64",
            mesh=parallel.mesh(1),
        )
        return validate(params)

    return judged


def test_a_loss_of_ones_own_is_judged_like_ours(tiny, judge):
    ours = loss.weighted(tiny[0], energy=1.0, forces=10.0, error="huber")

    def own(params, batch):
        total, info = ours(params, batch)
        return total, {name: info[name] for name in ("energy", "forces")}

    found, expected = judge(own), judge(ours)
    assert found.keys() == expected.keys() == {f"valid/{name}" for name in (*METRICS, "loss")}
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-12), name


@pytest.mark.parametrize("error", ["mse", "universal"])
def test_metrics_are_root_mean_squares_whatever_the_loss(tiny, labelled, judge, error):
    model, params = tiny
    squares = {name: [] for name in METRICS}
    for frame, result in zip(labelled, predict_frames(model, params, labelled), strict=True):
        difference = {"energy": (result.energy - frame.energy) / len(frame)}
        if frame.forces is not None:
            difference["forces"] = result.forces - frame.forces
        if frame.stress is not None:
            difference["stress"] = result.stress - frame.stress
        for name, x in difference.items():
            count = len(frame) if name == "forces" else 1
            squares[name].append((count * frame.weight, np.mean(np.square(x))))
    found = judge(loss.weighted(model, energy=1.0, forces=10.0, error=error))
    for name, pairs in squares.items():
        mean = sum(w * x for w, x in pairs) / sum(w for w, _ in pairs)
        assert found[f"valid/{name}"] == pytest.approx(math.sqrt(mean), rel=1e-9), name
