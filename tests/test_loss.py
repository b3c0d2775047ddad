"""The weighted loss: zero at the labels, weights count frames, missing labels do not count."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxft import data, loss
from jaxft.graph import totals_of, with_shared_totals

EXACT = 1e-11


@pytest.fixture(scope="module")
def value(objective):
    return jax.jit(objective)


@pytest.fixture(scope="module")
def gradient(objective):
    return jax.jit(jax.grad(lambda params, batch: objective(params, batch)[0]))


@pytest.fixture(scope="module")
def solved(batch, params, predictor):
    """The batch, labelled by the parameters themselves."""
    out = predictor(params, batch.graph)
    return batch._replace(labels=type(batch.labels)(out.energy, out.forces, out.stress))


def weighted(batch, **weights):
    found = batch.weights._replace(**weights)
    return batch._replace(weights=found, totals=totals_of(found))


def test_loss_and_gradient_are_zero_at_the_labels(value, gradient, solved, params):
    total, info = value(params, solved)
    assert float(total) == 0.0
    assert {float(term) for term in info.values()} == {0.0}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient(params, solved)))


def test_the_terms_are_means_over_what_is_labelled(value, batch, params, predictor):
    """Written out with numpy: energies per atom, components of forces, nine of a stress."""
    total, info = value(params, batch)
    out = jax.tree.map(np.asarray, predictor(params, batch.graph))
    graphs, atoms = batch.graph.is_graph, batch.graph.is_atom
    periodic = batch.weights.stress > 0
    assert 0 < periodic.sum() < graphs.sum()
    counts = np.bincount(batch.graph.graph_index[atoms], minlength=len(graphs))[graphs]
    expected = {
        "energy": np.mean(((out.energy - batch.labels.energy)[graphs] / counts) ** 2),
        "forces": np.mean((out.forces - batch.labels.forces)[atoms] ** 2),
        "stress": np.mean((out.stress - batch.labels.stress)[periodic] ** 2),
    }
    for name, term in expected.items():
        assert float(info[name]) == pytest.approx(term, rel=1e-12), name
    sum_ = expected["energy"] + expected["forces"] + 10 * expected["stress"]
    assert float(total) == pytest.approx(sum_, rel=1e-12)


def test_weight_two_is_the_frame_twice(frames, model, params, value):
    dataset = data.prepare(frames, model, row_width=8)
    shape = data.Shape(64, 96, 11)
    twice = data.pack(dataset, [0, 1, 4, 4], shape, "float64")
    once = data.pack(dataset, [0, 1, 4], shape, "float64")
    energy, forces, stress = (w.copy() for w in once.weights)
    energy[2], stress[2] = 2.0, 2.0
    forces[once.graph.graph_index == 2] = 2.0
    doubled = weighted(once, energy=energy, forces=forces, stress=stress)
    (a, info_a), (b, info_b) = value(params, twice), value(params, doubled)
    assert float(a) == pytest.approx(float(b), rel=1e-12)
    for name in info_a:
        assert float(info_a[name]) == pytest.approx(float(info_b[name]), rel=1e-12)
    assert float(value(params, once)[0]) != pytest.approx(float(a), rel=1e-3)


def test_a_missing_label_is_neither_a_zero_nor_counted(batch, params, value):
    """Only the energy of frame 0 is left: the mean is its own error, whatever the others hold."""
    energy = np.zeros_like(batch.weights.energy)
    energy[0] = 1.0
    alone = weighted(
        batch,
        energy=energy,
        forces=np.zeros_like(batch.weights.forces),
        stress=np.zeros_like(batch.weights.stress),
    )
    labels = batch.labels._replace(
        energy=np.where(energy, batch.labels.energy, 1e6), forces=batch.labels.forces + 1e3
    )
    total, info = value(params, alone)
    assert float(info["forces"]) == float(info["stress"]) == 0.0
    assert float(total) == float(info["energy"]) > 0
    assert float(value(params, alone._replace(labels=labels))[0]) == float(total)


def test_a_batch_without_labels_has_no_loss_and_no_gradient(batch, params, value, gradient):
    zeros = jax.tree.map(np.zeros_like, batch.weights)
    nothing = batch._replace(weights=zeros, totals=totals_of(zeros))
    assert float(value(params, nothing)[0]) == 0.0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient(params, nothing)))


def test_parameter_gradients_are_those_of_finite_differences(batch, params, value, gradient):
    """Through forces and stresses: the gradient of a gradient."""
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(params)))
    leaves, structure = jax.tree.flatten(params)
    direction = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    step = 1e-6

    def at(sign):
        moved = [x + sign * step * d for x, d in zip(leaves, direction, strict=True)]
        return float(value(jax.tree.unflatten(structure, moved), batch)[0])

    numeric = (at(1) - at(-1)) / (2 * step)
    exact = sum(
        float(np.sum(g * d))
        for g, d in zip(jax.tree.leaves(gradient(params, batch)), direction, strict=True)
    )
    assert abs(exact) > 0.1
    assert numeric == pytest.approx(exact, rel=1e-5)


def test_term_weights_scale_the_terms(model, batch, params):
    total, info = jax.jit(loss.weighted(model, energy=0.0, forces=0.0, stress=3.0))(params, batch)
    assert float(total) == pytest.approx(3.0 * float(info["stress"]), rel=1e-12)
    assert float(info["energy"]) > 0


def micro_batches(frames, model, batch):
    """Two batches with unequal numbers of labels, and one of all frames, in one static shape."""
    partly = [replace(frame, weight=1.0 + i % 3) for i, frame in enumerate(frames)]
    partly[0] = replace(partly[0], forces=None)
    partly[4] = replace(partly[4], energy=None, stress=None)
    dataset = data.prepare(partly, model)
    graph = batch.graph
    shape = data.Shape(graph.n_node, len(graph.receivers), graph.n_graph)
    chosen = ([0, 3, 4], [5, 1, 2, 6, 7], range(8))
    one, two, whole = (data.pack(dataset, order, shape, "float64") for order in chosen)
    return [one, two], whole


def test_losses_and_gradients_of_micro_batches_add_up(
    frames, model, batch, params, value, gradient
):
    parts, whole = micro_batches(frames, model, batch)
    shared = with_shared_totals(parts)
    total = sum(float(value(params, part)[0]) for part in shared)
    assert total == pytest.approx(float(value(params, whole)[0]), rel=1e-12)
    added = jax.tree.map(lambda *leaves: sum(leaves), *(gradient(params, p) for p in shared))
    for a, b in zip(jax.tree.leaves(added), jax.tree.leaves(gradient(params, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    averaged = np.mean([float(value(params, part)[0]) for part in parts])
    assert averaged != pytest.approx(total, rel=1e-3)


def test_sharing_totals_twice_changes_nothing(frames, model, batch):
    once = with_shared_totals(micro_batches(frames, model, batch)[0])
    again = with_shared_totals(once)
    assert [b.totals for b in again] == [b.totals for b in once]
    assert once[0].totals == once[1].totals
