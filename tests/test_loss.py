"""The weighted loss: zero at the labels, weights count frames, missing labels do not count."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import data, loss
from jaxft.graph import Labels, totals_of, with_shared_totals

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
    energy, forces, stress = (w.copy() for w in once.weights[:3])
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


@pytest.fixture
def precompiled(monkeypatch, predictor):
    """Losses use the predictor that is compiled already."""
    monkeypatch.setattr(loss, "predict", lambda model, params, graph: predictor(params, graph))


def test_term_weights_scale_the_terms(model, batch, params, precompiled):
    total, info = loss.weighted(model, energy=0.0, forces=0.0, stress=3.0)(params, batch)
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


# --- laws of every error, on predictions that are given -------------------------------------------

KINDS = tuple(loss.ERRORS)
TERMS = ("energy", "forces", "stress", "virials")
WIDTH = 0.3
"""δ, in the middle of the errors that ``guess`` makes."""


def guess(theta, batch):
    """Predictions that depend on what a frame holds, not on its place in the batch."""
    labels = [label for label in batch.labels if label is not None]
    waves = [jnp.sin(7 * label + 1) for label in labels]
    return Labels(*(x + t * w for x, t, w in zip(labels, theta, waves, strict=True)))


THETA = jnp.array([5.0, 0.5, 0.4])


def measured(batch, kind, theta=THETA):
    """{term: value} of one kind of error."""
    return loss.terms(guess(theta, batch), batch, error=kind, delta=WIDTH)


def slope(batch, kind):
    """[4, 3], gradients of the four terms."""
    found = jax.jacobian(lambda theta: measured(batch, kind, theta))(THETA)
    return np.array([found[term] for term in TERMS])


@pytest.fixture(scope="module")
def packed(model):
    """``frames, order -> batch`` in one static shape."""

    def pack(frames, order):
        dataset = data.prepare(frames, model, row_width=8)
        return data.pack(dataset, order, data.Shape(80, 120, 12), "float64")

    return pack


def same(a, b):
    for term in TERMS:
        assert float(a[term]) == pytest.approx(float(b[term]), rel=1e-12, abs=1e-15), term


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["weight", "energy_weight", "forces_weight", "stress_weight"])
def test_weight_two_is_the_frame_twice_for_every_error(packed, frames, kind, name):
    doubled = [replace(f, **{name: 2.0}) if i == 4 else f for i, f in enumerate(frames)]
    once = measured(packed(frames, [0, 1, 4]), kind)
    found = measured(packed(doubled, [0, 1, 4]), kind)
    twice = measured(packed(frames, [0, 1, 4, 4]), kind)
    touched = {"energy_weight": TERMS[:1], "forces_weight": TERMS[1:2], "stress_weight": TERMS[2:]}
    for term in TERMS:
        # frame 4 is the only one with a stress: its weight there cancels
        expected = twice if term in touched.get(name, TERMS) else once
        assert float(found[term]) == pytest.approx(float(expected[term]), rel=1e-12), term
    assert all(float(value) > 1e-3 for value in once.values())
    assert float(once["forces"]) != pytest.approx(float(twice["forces"]), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_of_an_atom_is_that_of_its_force_alone(packed, frames, kind):
    """Weights 2, 0, 1 on the atoms of water are the mean over three forces: twice one, not one."""
    weights = np.array([2.0, 0.0, 1.0])
    weighed = [replace(frames[0], atom_weights=weights), *frames[1:]]
    found, plain = (measured(packed(f, [0]), kind) for f in (weighed, frames))
    alone = [
        measured(packed([replace(frames[0], atom_weights=np.eye(3)[i])], [0]), kind)["forces"]
        for i in range(3)
    ]
    assert float(found["forces"]) == pytest.approx(float(2 * alone[0] + alone[2]) / 3, rel=1e-12)
    assert float(sum(alone)) / 3 == pytest.approx(float(plain["forces"]), rel=1e-12)
    assert float(found["forces"]) != pytest.approx(float(plain["forces"]), rel=1e-3)
    same({**found, "forces": 0.0}, {**plain, "forces": 0.0})


@pytest.mark.parametrize("kind", KINDS)
def test_weight_zero_and_a_missing_label_are_the_frame_left_out(packed, frames, kind):
    without = measured(packed(frames, [0, 1, 4]), kind)
    silent = {"energy": None, "forces": None, "stress": None}
    for change in ({"weight": 0.0}, silent):
        changed = [replace(f, **change) if i in (2, 5) else f for i, f in enumerate(frames)]
        same(measured(packed(changed, [2, 0, 1, 5, 4]), kind), without)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stress_of_a_molecule_does_not_count(packed, frames, kind):
    told = [replace(f, stress=np.ones((3, 3))) if i == 0 else f for i, f in enumerate(frames)]
    same(measured(packed(told, [0, 4]), kind), measured(packed(frames, [0, 4]), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_for_every_error(packed, frames, kind):
    partly = [replace(frame, weight=1.0 + i % 3) for i, frame in enumerate(frames)]
    partly[0] = replace(partly[0], forces=None, atom_weights=None)
    partly[4] = replace(partly[4], energy=None, stress=None)
    parts = with_shared_totals([packed(partly, order) for order in ([0, 3, 4], [5, 1, 2, 6, 7])])
    whole = packed(partly, range(8))
    np.testing.assert_allclose(
        sum(slope(part, kind) for part in parts), slope(whole, kind), rtol=1e-11, atol=1e-13
    )
    added = {term: sum(measured(part, kind)[term] for part in parts) for term in TERMS}
    same(added, measured(whole, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_wrong_there_is_neither_loss_nor_gradient(packed, frames, kind):
    """Also where absolute values and lengths have a corner: no NaN, exactly 0."""
    batch = packed(frames, range(8))
    found, gradient = jax.value_and_grad(
        lambda labels: sum(loss.terms(labels, batch, error=kind).values())
    )(jax.tree.map(jnp.asarray, batch.labels))
    assert float(found) == 0.0
    assert not any(np.any(leaf) for leaf in gradient)


def test_the_conditional_factor_looks_at_the_reference_force_whatever_its_weight(packed, frames):
    """Weight 1/4 of a force of 150 eV/Å does not make it one of 40."""
    strong = replace(frames[0], forces=np.array([[150.0, 0, 0], [0, 0, 0], [0, 0, 0]]))
    values = []
    for weight in (1.0, 0.25):
        one = replace(strong, atom_weights=np.array([weight, 0.0, 0.0]))
        batch = packed([one], [0])
        off = batch.labels._replace(forces=batch.labels.forces + 2.0)
        values.append(float(loss.terms(off, batch, error="universal", delta=0.1)["forces"]))
    expected = 0.07 * (2.0 - 0.035)
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_the_squared_loss_is_the_distance_of_outputs_from_labels(batch, model, params, precompiled):
    batch = weighted(batch, forces=batch.weights.forces * (1 + np.arange(len(batch.graph.species))))
    lambdas = {"energy": 2.0, "forces": 3.0, "stress": 50.0, "virials": 0.5}
    value, info = loss.weighted(model, **lambdas)(params, batch)
    assert all(float(term) > 0 for term in info.values())
    vector = loss.outputs(model, **lambdas, labelled_only=True)(params, batch)
    labels = loss.scaled(batch.labels, batch, lambdas)
    assert float(((vector - labels) ** 2).sum()) == pytest.approx(float(value), rel=1e-12)


def test_outputs_need_no_labels(packed, frames):
    """All weights 1 and stresses of crystals alone, as if every label existed."""
    bare = [replace(f, energy=None, forces=None, stress=None, weight=3.0) for f in frames]
    lambdas = dict.fromkeys(TERMS, 1.0)
    whole, silent = packed(frames, range(8)), packed(bare, range(8))
    found = loss.all_labelled(silent)
    pairs = [jax.tree.leaves((batch.weights, batch.totals)) for batch in (found, whole)]
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_array_equal(a, b)
    vector = loss.scaled(whole.labels, found, lambdas)
    np.testing.assert_array_equal(vector, loss.scaled(whole.labels, whole, lambdas))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error": "rmse"}, "error='rmse' is unknown; expected one of 'mse', 'mae', 'huber'"),
        ({"delta": 0.0}, "delta=0.0 is no width; expected a number above 0"),
        ({"energy": -1.0}, "the weight energy=-1.0 is impossible; use a number >= 0"),
        ({"forces": float("nan")}, "the weight forces=nan is impossible"),
        ({"energy": 0.0, "forces": 0.0}, "all terms of the loss have weight 0; give one of them"),
    ],
)
def test_impossible_losses_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        loss.weighted(model, **options)
