"""A penalty on changed predictions."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import data, testing
from jaxft.graph import Weights, sum_atoms, sum_rows
from jaxft.strategies import base
from jaxft.strategies.distill import distill

KEY = jax.random.key(0)

ROUNDING = 1e-12
"""Relative; sums of a few hundred numbers in another order."""


class Said(NamedTuple):
    energy: jax.Array
    forces: jax.Array
    stress: jax.Array


def toy(params, graph):
    """Something with the shapes of a prediction, cheap to differentiate."""
    near = sum_rows(graph.vectors.sum(axis=1), graph)
    node = params["a"][graph.elements[graph.species]] * (1 + params["b"] * near[:, 0])
    forces = jnp.sin(near @ params["c"])
    volume = graph.volume[:, None, None]
    stress = params["b"] * jnp.outer(params["c"][0], params["c"][1])[None] / volume
    return Said(sum_atoms(node, graph), forces, jnp.broadcast_to(stress, (len(volume), 3, 3)))


@pytest.fixture(scope="module")
def batch(structures, model):
    """Molecules and crystals, all of them labelled with zeros, with padding."""
    dataset = data.prepare([data.from_atoms(atoms) for atoms in structures], model)
    (shape,) = data.shapes(dataset, len(structures))[-1:]
    bigger = shape._replace(n_graph=shape.n_graph + 2)
    found = data.pack(dataset, range(len(structures)), bigger, "float64")
    graphs, atoms = (jnp.asarray(x, float) for x in (found.graph.is_graph, found.graph.is_atom))
    assert graphs.sum() == len(graphs) - 3
    return found._replace(weights=Weights(energy=graphs, forces=atoms, stress=graphs))


@pytest.fixture(scope="module")
def start():
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=5)),
        "b": jnp.asarray(0.3),
        "c": jnp.asarray(rng.normal(size=(3, 3))),
    }


@pytest.fixture(scope="module")
def near(start):
    return jax.tree.map(lambda x: 1.1 * x + 0.05, start)


def value(strategy, start, near, batch):
    """The penalty, which training would add to the loss."""
    _, consts = base.init((strategy,), KEY, start)
    return base.penalties((strategy,), near, consts, batch)[strategy.name]


@pytest.fixture(scope="module")
def half(batch):
    """Two graphs lost all labels, a third has forces only."""
    n_graph, at = batch.graph.n_graph, batch.graph.graph_index
    none = np.isin(np.arange(n_graph), (1, 5))
    no_energy = none | (np.arange(n_graph) == 2)
    weights = batch.weights._replace(
        energy=jnp.where(no_energy, 0, batch.weights.energy),
        stress=jnp.where(no_energy, 0, batch.weights.stress),
        forces=jnp.where(none[at], 0, batch.weights.forces),
    )
    return batch._replace(weights=weights), np.flatnonzero(none)


def by_hand(start, near, batch, graphs):
    """Means over ``graphs``, one after the other: (energy, forces, stress)."""
    old, new = (jax.tree.map(np.asarray, toy(p, batch.graph)) for p in (start, near))
    energies, forces, stresses = [], [], []
    for g in graphs:
        atoms = np.asarray(batch.graph.is_atom & (batch.graph.graph_index == g))
        energies.append(((new.energy[g] - old.energy[g]) / atoms.sum()) ** 2)
        forces += list(((new.forces - old.forces)[atoms] ** 2).ravel())
        if batch.graph.volume[g] != 1:
            stresses += list(((new.stress - old.stress)[g] ** 2).ravel())
    return np.mean(energies), np.mean(forces), np.mean(stresses)


def test_penalty_is_the_mean_squared_change_of_predictions(start, near, batch):
    graphs = np.flatnonzero(batch.graph.is_graph)
    energy, forces, stress = by_hand(start, near, batch, graphs)
    assert min(energy, forces, stress) > 1e-6
    strategy = distill(toy, strength=3.0, energy=2.0, forces=0.5, stress=7.0)
    wanted = 3 * (2 * energy + 0.5 * forces + 7 * stress)
    np.testing.assert_allclose(value(strategy, start, near, batch), wanted, rtol=ROUNDING)


@pytest.mark.parametrize("term", ["energy", "forces", "stress"])
def test_each_term_stands_alone(start, near, batch, term):
    graphs = np.flatnonzero(batch.graph.is_graph)
    wanted = dict(
        zip(("energy", "forces", "stress"), by_hand(start, near, batch, graphs), strict=True)
    )
    weights = {"energy": 0.0, "forces": 0.0, "stress": 0.0} | {term: 1.0}
    found = value(distill(toy, strength=1.0, **weights), start, near, batch)
    np.testing.assert_allclose(found, wanted[term], rtol=ROUNDING)


def test_only_graphs_without_any_label_take_part_if_asked(start, near, half):
    batch, graphs = half
    strategy = distill(toy, strength=1.0, stress=1.0, graphs="unlabelled")
    wanted = sum(by_hand(start, near, batch, graphs))
    np.testing.assert_allclose(value(strategy, start, near, batch), wanted, rtol=ROUNDING)


def test_without_such_a_graph_the_penalty_and_its_gradient_are_zero(start, near, batch):
    strategy = distill(toy, strength=1.0, stress=1.0, graphs="unlabelled")
    found, slope = jax.value_and_grad(lambda p: value(strategy, start, p, batch))(near)
    assert found == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))


def test_what_padding_predicts_does_not_matter(start, near, batch):
    def haunted(params, graph):
        out, ghost = toy(params, graph), 1e6 * params["b"]
        return Said(
            jnp.where(graph.is_graph, out.energy, ghost),
            jnp.where(graph.is_atom[:, None], out.forces, ghost),
            jnp.where(graph.is_graph[:, None, None], out.stress, ghost),
        )

    plain = value(distill(toy, strength=1.0, stress=1.0), start, near, batch)
    assert value(distill(haunted, strength=1.0, stress=1.0), start, near, batch) == plain


def test_the_teacher_is_not_differentiated(start, near, batch):
    """Not even where teacher and student are the same arrays."""
    strategy = distill(toy, strength=1.0, stress=1.0)

    def both(params):
        return strategy.penalty(near, {"anchor": params}, batch)

    slope = jax.grad(both)(start)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))


def test_it_holds_functions_and_lets_parameters_go(start, batch):
    """Two parameters that only act by their product may change, if the product stays."""

    def product(params, graph):
        return toy({**start, "b": params["u"] * params["v"]}, graph)

    anchor = {"u": jnp.asarray(2.0), "v": jnp.asarray(0.25)}
    there = {"u": jnp.asarray(0.5), "v": jnp.asarray(1.0)}
    strategy = distill(product, strength=1.0, stress=1.0)
    assert value(strategy, anchor, there, batch) == 0
    assert value(strategy, anchor, {**there, "v": jnp.asarray(1.1)}, batch) > 0


def test_strength_0_is_plain_fine_tuning_bitwise(start, batch):
    def loss(params, batch):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(params)), {}

    ends = []
    for recipe in ((), (distill(toy, strength=0.0),)):
        init, step = jaxft.finetune(loss, recipe, optax.adam(0.1))
        state = init(KEY, start)
        for _ in range(2):
            state, _ = step(state, batch)
        ends.append(jaxft.merge(recipe, state))
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "pulls nowhere"),
        ({"strength": math.inf}, "pulls nowhere"),
        ({"strength": 1.0, "forces": -1.0}, r"distill\(forces=-1.0\) compares nothing"),
        ({"strength": 1.0, "energy": 0.0, "forces": 0.0}, "compares nothing"),
        ({"strength": 1.0, "graphs": "labelled"}, "use 'all' or 'unlabelled'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        distill(toy, **options)


# --- with a potential -----------------------------------------------------------------------------


def test_there_is_no_pull_at_the_start_of_a_potential(model, params, batch):
    @jax.jit
    def energies(params, graph):
        return Said(sum_atoms(model.node_energies(params, graph), graph), None, None)

    strategy = distill(energies, strength=2.0, forces=0.0)
    found, slope = jax.value_and_grad(lambda p: value(strategy, params, p, batch))(params)
    assert found == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))


def test_a_penalty_on_predictions_obeys_the_laws(start, batch):
    recipe = (distill(toy, strength=2.0, stress=1.0),)
    testing.assert_penalty_anchored(recipe, start, batch, key=KEY)
    testing.assert_order_free(recipe, start, batch, key=KEY)
    testing.assert_jit_agrees(recipe, start, batch, key=KEY)
