"""The engine: it learns, it stops at NaN, padding is invisible, frozen means untouched."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import data, tree
from jaxft.strategies import Strategy, freeze, lora

KEY = jax.random.key(0)
LEARNED = {"energy": 7e-3, "forces": 4e-2, "stress": 4.5e-3}
"""RMSE after 200 steps in eV/atom, eV/Å and eV/Å³: 1.5 times what was found (4.5e-3, 2.7e-2,
3.0e-3; equal in both precisions). Before the first step: 0.25, 1.2, 0.024."""


@pytest.fixture(scope="module")
def full(objective):
    """Full fine-tuning, compiled once per shape and dtype for all tests of this file."""
    return jaxft.finetune(objective, (), optax.adam(4e-3))


@pytest.fixture(scope="module")
def few(params):
    """The first layer's parameters: what compiles twice as fast."""
    names = ("node_embedding", "interactions_0", "products_0", "readouts_0")
    return {name: params[name] for name in names}


def wavy(params, batch):
    """A loss with a gradient for every number of the tree and of the batch; cheap to compile."""
    waves = [jnp.sum(jnp.sin(leaf + i)) for i, leaf in enumerate(jax.tree.leaves(params))]
    return sum(waves) * jnp.mean(batch.weights.energy), {}


def host(state):
    return [np.array(leaf) for leaf in jax.tree.leaves(state)]


def cast(values, dtype):
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, values
    )


def is_same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(host(a), host(b), strict=True))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_it_learns(full, params, batch, dtype):
    """With energies, forces and stresses, padding atoms, padding edges and padding graphs."""
    init, step = full
    batch = cast(batch, dtype)
    state = init(KEY, cast(params, dtype))
    first = None
    for _ in range(200):
        state, info = step(state, batch)
        first = first or info
    rmse = {name: float(info[name]) ** 0.5 for name in LEARNED}
    assert all(rmse[name] < limit for name, limit in LEARNED.items()), rmse
    assert all(float(first[name]) ** 0.5 > 5 * limit for name, limit in LEARNED.items()), first
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.trainable)} == {dtype}


def test_padding_changes_neither_loss_nor_gradient(full, frames, model, params, batch):
    init, step = full
    dataset = data.prepare(frames, model)
    n_node, n_row, n_graph = (
        batch.graph.n_node + 24,
        batch.graph.receivers.size + 16,
        batch.graph.n_graph + 3,
    )
    more = data.pack(dataset, range(len(frames)), data.Shape(n_node, n_row, n_graph), "float64")
    results = [step(init(KEY, params), b) for b in (batch, more)]
    (a, info), (b, padded_info) = results
    for name, value in info.items():
        assert np.isclose(value, padded_info[name], rtol=1e-12), name
    gradients = (host(state.opt_state[0][0].mu) for state in (a, b))  # Adam's mean: a tenth of it
    for x, y in zip(*gradients, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * max(np.abs(x).max(), 1.0))
    assert float(info["gradient_norm"]) > 0.1


def test_a_batch_with_nan_changes_nothing_and_says_so(full, params, batch):
    init, step = full
    forces = batch.labels.forces.copy()
    forces[3, 1] = np.nan
    bad = batch._replace(labels=batch.labels._replace(forces=forces))
    state, _ = step(init(KEY, params), batch)
    before = host(state)
    state, info = step(state, bad)
    assert not bool(info["is_finite"])
    assert all(x.tobytes() == y.tobytes() for x, y in zip(before, host(state), strict=True))
    state, info = step(state, batch)
    assert bool(info["is_finite"])
    assert int(state.step) == 2


def test_an_infinite_gradient_of_a_finite_loss_changes_nothing(few, batch):
    def kinked(params, batch):
        leaf = params["readouts_0"]["linear"]["0e"]
        return jnp.sum(jnp.sqrt(leaf - jax.lax.stop_gradient(leaf))), {}

    init, step = jaxft.finetune(kinked, (), optax.sgd(1e-2))
    state, info = step(init(KEY, few), batch)
    assert bool(jnp.isfinite(info["loss"]))
    assert not bool(info["is_finite"])
    assert is_same(tree.combine(state.trainable.params, state.frozen.params), few)


def test_the_callers_parameters_stay_readable_and_unchanged(few, batch):
    mine = tree.copy(few)
    init, step = jaxft.finetune(wavy, (lora(rank=2, also_train="**"),), optax.adam(1e-2))
    state = init(KEY, mine)
    for _ in range(3):
        state, _ = step(state, batch)
    assert is_same(mine, few)
    merged = jaxft.merge((lora(rank=2, also_train="**"),), state)
    kept = host(merged)
    state, _ = step(state, batch)
    assert all(x.tobytes() == y.tobytes() for x, y in zip(kept, host(merged), strict=True))


def test_weight_decay_does_not_reach_frozen_leaves(few, batch):
    tx = optax.adamw(1e-2, weight_decay=10.0)
    init, step = jaxft.finetune(wavy, (freeze("interactions_*/**"),), tx)
    state, _ = step(init(KEY, few), batch)
    merged = tree.flatten(jaxft.merge((freeze("interactions_*/**"),), state))
    for path, leaf in tree.flatten(few).items():
        if path.startswith("interactions_"):
            assert is_same(merged[path], leaf), path
        else:  # lr · decay = 10 %, and Adam's first step is at most lr
            shrunk = np.abs(merged[path] - 0.9 * leaf).max()
            assert shrunk < 1.01e-2, path


def test_frozen_leaves_do_not_count_in_the_gradient_norm(few, batch):
    def norm(recipe):
        init, step = jaxft.finetune(lambda p, b: (_half_square(p), {}), recipe, optax.sgd(0.0))
        return float(step(init(KEY, few), batch)[1]["gradient_norm"])

    readouts = {path: x for path, x in tree.flatten(few).items() if path.startswith("readouts")}
    expected = np.sqrt(sum(float(jnp.sum(x**2)) for x in readouts.values()))
    assert np.isclose(norm((freeze(except_="readouts_*/**"),)), expected, rtol=1e-12)
    assert norm(()) > 2 * expected


def _half_square(params):
    return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def test_info_holds_the_terms_and_the_loss_is_their_sum(few, batch):
    def loss(params, batch):
        return jnp.asarray(3.0), {"energy": jnp.asarray(1.5)}

    leash = Strategy(name="leash", penalty=lambda params, consts, batch: jnp.asarray(0.25))
    init, step = jaxft.finetune(loss, (leash, lora(rank=1)), optax.sgd(1e-3))
    _, info = step(init(KEY, few), batch)
    assert {k: float(v) for k, v in info.items()} == {
        "energy": 1.5,
        "penalty/leash": 0.25,
        "loss": 3.25,
        "gradient_norm": 0.0,
        "is_finite": 1.0,
    }


def test_penalties_and_projections_act_in_the_step(few, batch):
    strategy = Strategy(
        name="box",
        init=lambda key, params: ({"x": jnp.asarray(0.5)}, {"limit": jnp.asarray(0.55)}),
        apply=lambda params, coords, consts: {
            **params,
            "readouts_0": {"linear": {"0e": params["readouts_0"]["linear"]["0e"] - coords["x"]}},
        },
        penalty=lambda params, consts, batch: jnp.sum(params["readouts_0"]["linear"]["0e"]),
        project=lambda coords, consts: {"x": jnp.minimum(coords["x"], consts["limit"])},
        trains=lambda params: tree.constant_mask(params, False),
    )
    init, step = jaxft.finetune(lambda p, b: (jnp.zeros(()), {}), (strategy,), optax.sgd(0.01))
    state, info = step(init(KEY, few), batch)
    size = few["readouts_0"]["linear"]["0e"].size
    assert float(info["gradient_norm"]) == size  # d penalty / dx = -size
    assert np.isclose(float(state.trainable.coords["box"]["x"]), 0.5 + 0.01 * size)
    for _ in range(3):
        state, info = step(state, batch)
    assert float(state.trainable.coords["box"]["x"]) == 0.55


def test_a_recipe_that_leaves_nothing_to_train_is_refused(params):
    init, _ = jaxft.finetune(wavy, (freeze("**"),), optax.sgd(1e-3))
    with pytest.raises(ValueError, match=r"\(freeze\) leaves nothing to train: all 35") as caught:
        init(KEY, params)
    assert "train at least one leaf" in str(caught.value)


def test_two_strategies_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"more than one strategy named 'lora'(?s:.*)pass name="):
        jaxft.finetune(wavy, (lora(rank=2), freeze("**"), lora(rank=3)), optax.sgd(1e-3))


def test_the_step_compiles_once_per_shape(few, frames, model):
    traces = []

    def counted(params, batch):
        traces.append(batch.graph.vectors.shape)
        return wavy(params, batch)

    dataset = data.prepare(frames * 3, model)
    init, step = jaxft.finetune(counted, (lora(rank=2),), optax.adam(1e-3))
    state = init(KEY, few)
    seen = set()
    for number in range(3):
        for batch in data.epoch(dataset, 5, seed=1, number=number):
            state, _ = step(state, batch)
            seen.add((batch.graph.vectors.shape, batch.graph.n_node))
    assert int(state.step) == 15
    assert len(traces) == len(seen) <= len(data.shapes(dataset, 5))


def test_the_jitted_step_is_the_plain_one(few, batch):
    recipe = (freeze("interactions_*/linear*/**"), lora("**/conv_tp_weights/*", rank=2))
    init, step = jaxft.finetune(wavy, recipe, optax.adamw(1e-2))
    jitted, _ = step(init(KEY, few), batch)
    with jax.disable_jit():
        plain, _ = step(init(KEY, few), batch)
    for a, b in zip(host(jitted), host(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_strategies_transform_the_updates_after_the_optimiser(few, batch):
    double = Strategy(name="double", tx=optax.scale(2.0))
    moved = []
    for recipe in ((), (double,)):
        init, step = jaxft.finetune(wavy, recipe, optax.sgd(1e-3))
        state, _ = step(init(KEY, few), batch)
        moved.append(jax.tree.map(lambda a, b: a - b, state.trainable.params, few))
    for once, twice in zip(*map(host, moved), strict=True):
        np.testing.assert_allclose(twice, 2 * once, rtol=1e-9, atol=1e-13)


def test_refusals_name_what_was_given(params):
    """Errors of strategies reach the caller of ``init`` as they are."""
    init, _ = jaxft.finetune(wavy, (freeze("readout_*/**"),), optax.sgd(1e-3))
    with pytest.raises(ValueError, match=re.escape("'readout_*/**' matches none of 35")):
        init(KEY, params)


def test_means_over_a_batch_are_not_accumulated():
    mean = Strategy(name="mean", penalty=lambda p, c, b: jnp.zeros(()), reads_batch=True)
    with pytest.raises(ValueError, match=r"'mean' takes a mean over each batch(?s:.*)accumulate=1"):
        jaxft.finetune(wavy, (mean,), optax.sgd(1e-3), accumulate=2)


def test_filler_batches_hold_nobody(frames, model):
    train = data.alone(data.prepare(frames, model), 3)
    (update,) = data.updates(train, 4, 0, seed=0, dtype="float64")
    assert update.graph.is_graph.sum() == len(frames)
    assert update.graph.is_atom.sum() == sum(len(frame) for frame in frames)
    assert not update.weights.energy[3].any()
    assert not update.graph.is_graph[3].any()
    assert sorted(update.frame[update.frame >= 0]) == list(range(len(frames)))
    totals = jax.tree.leaves(update.totals)
    assert all((total == total[0]).all() for total in totals)
