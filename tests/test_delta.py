"""Updates of full size beside frozen weights, and what decay makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import testing, tree
from jaxft.strategies import base, l2sp
from jaxft.strategies.delta import delta, support_of

KEY = jax.random.key(0)

ROUNDING = 1e-12
"""Two orders of the same few float64 operations, ten steps."""


@pytest.fixture(scope="module")
def start():
    rng = np.random.default_rng(0)
    return {
        "linear": {
            "0e": jnp.asarray(rng.normal(size=(3, 2))),
            "1o": jnp.asarray(rng.normal(size=(2, 2))),
        },
        "bias": jnp.asarray(rng.normal(size=2)),
    }


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(1)
    return rng.normal(size=(5, 3)), rng.normal(size=(5, 2))


def squares(params, batch):
    """½ Σ (x (W₀ W₁) + b - y)²: a gradient for every number, coupled and not constant."""
    x, y = batch
    out = x @ params["linear"]["0e"] @ params["linear"]["1o"] + params["bias"]
    return 0.5 * jnp.sum((out - y) ** 2), {}


def gradients(w, batch):
    """Of ``squares``, by hand."""
    x, y = batch
    first, second = w["linear/0e"], w["linear/1o"]
    error = x @ first @ second + w["bias"] - y
    return {
        "linear/0e": x.T @ error @ second.T,
        "linear/1o": (x @ first).T @ error,
        "bias": error.sum(0),
    }


def adamw(rate, decay):
    """Decay of the deltas and of nothing else."""

    def of_delta(trainable):
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: jax.tree_util.keystr(keys).startswith(".coords['delta']"), trainable
        )

    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(decay, of_delta),
        optax.scale_by_learning_rate(rate),
    )


def sgd(rate, decay=0.0):
    return optax.chain(optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate))


def trained(loss, recipe, tx, params, batch=None, *, steps=10):
    init, step = jaxft.finetune(loss, recipe, tx)
    state = init(KEY, params)
    for _ in range(steps):
        state, _ = step(state, batch)
    return state, tree.flatten(jaxft.merge(recipe, state))


def assert_close(found, wanted, tolerance=ROUNDING):
    assert set(found) == set(wanted)
    for path in wanted:
        np.testing.assert_allclose(found[path], wanted[path], rtol=0, atol=tolerance, err_msg=path)


def farthest(a, b):
    return max(float(np.abs(np.asarray(a[path]) - np.asarray(b[path])).max()) for path in a)


# --- the trajectory -------------------------------------------------------------------------------


def test_ten_steps_are_those_of_the_published_rule(start, example):
    """Δ ← (1 - η·wd)·Δ - η·adam(g), base frozen, a Δ for every tensor (Equitrain)."""
    rate, decay, b1, b2, eps = 0.01, 10.0, 0.9, 0.999, 1e-8
    w0 = {path: np.asarray(leaf) for path, leaf in tree.flatten(start).items()}
    change = {path: np.zeros_like(leaf) for path, leaf in w0.items()}
    m = {path: np.zeros_like(leaf) for path, leaf in w0.items()}
    v = {path: np.zeros_like(leaf) for path, leaf in w0.items()}
    for t in range(1, 11):
        g = gradients({path: w0[path] + change[path] for path in w0}, example)
        for path in w0:
            m[path] = b1 * m[path] + (1 - b1) * g[path]
            v[path] = b2 * v[path] + (1 - b2) * g[path] ** 2
            adam = (m[path] / (1 - b1**t)) / (np.sqrt(v[path] / (1 - b2**t)) + eps)
            change[path] = (1 - rate * decay) * change[path] - rate * adam
    state, merged = trained(squares, (delta(),), adamw(rate, decay), start, example)
    coords = tree.flatten(state.trainable.coords["delta"])
    assert_close(coords, {f"{path}/delta": change[path] for path in change})
    assert_close(merged, {path: w0[path] + change[path] for path in w0})
    assert farthest(w0, merged) > 0.05


def test_under_sgd_decay_is_a_penalty_on_delta_and_is_l2sp(start, example):
    rate, decay = 0.01, 3.0

    def penalised(params, batch):
        loss, info = squares(params, batch)
        pairs = zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True)
        return loss + 0.5 * decay * sum(jnp.sum((a - b) ** 2) for a, b in pairs), info

    _, decayed = trained(squares, (delta(),), sgd(rate, decay), start, example)
    _, explicit = trained(penalised, (delta(),), sgd(rate), start, example)
    _, pulled = trained(squares, (l2sp(decay),), sgd(rate), start, example)
    _, free = trained(squares, (delta(),), sgd(rate), start, example)
    assert_close(decayed, explicit)
    assert_close(decayed, pulled)
    assert farthest(decayed, free) > 0.01


def test_under_adam_decay_is_not_the_penalty(start, example):
    rate, decay = 0.01, 10.0
    _, decayed = trained(squares, (delta(),), adamw(rate, decay), start, example)
    _, pulled = trained(squares, (l2sp(decay),), optax.adam(rate), start, example)
    assert farthest(decayed, pulled) > 0.01


def test_without_decay_it_is_full_fine_tuning(start, example):
    _, found = trained(squares, (delta(),), optax.adam(0.01), start, example)
    _, wanted = trained(squares, (), optax.adam(0.01), start, example)
    assert_close(found, wanted)


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_delta_ends_at_one_over_the_decay_whatever_the_rate(start, rate):
    """Under a gradient of constant sign |adam(g)| is 1."""
    decay, slope = 10.0, 7.0

    def linear(params, batch):
        return slope * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)), {}

    state, _ = trained(linear, (delta(),), adamw(rate, decay), start, steps=200)
    for value in jax.tree.leaves(state.trainable.coords):
        np.testing.assert_allclose(value, -1 / decay, rtol=1e-6)


def test_without_a_gradient_decay_leads_back_to_the_start(start):
    recipe, decay, rate = (delta(),), 10.0, 0.01
    init, step = jaxft.finetune(lambda params, batch: (jnp.zeros(()), {}), recipe, sgd(rate, decay))
    state = init(KEY, start)
    moved = jax.tree.map(lambda x: x + 0.3, state.trainable.coords)
    state = state._replace(trainable=state.trainable._replace(coords=moved))
    for _ in range(100):
        state, _ = step(state, None)
    left = farthest(tree.flatten(jaxft.merge(recipe, state)), tree.flatten(start))
    np.testing.assert_allclose(left, 0.3 * (1 - rate * decay) ** 100, rtol=1e-9)


# --- what it is -----------------------------------------------------------------------------------


def test_base_leaves_are_frozen_and_only_the_chosen_have_a_delta(start, example):
    recipe = (delta("linear/*"),)
    assert not any(jax.tree.leaves(base.trains(recipe, start)))
    state, merged = trained(squares, recipe, optax.adam(0.1), start, example, steps=2)
    owned = tree.flatten(state.trainable.coords["delta"])
    assert set(owned) == {"linear/0e/delta", "linear/1o/delta"}
    assert merged["bias"].tobytes() == start["bias"].tobytes()


def test_it_starts_bitwise_at_the_base_even_at_minus_zero():
    params = {"w": jnp.array([-0.0, 0.0, 1e-30]), "v": jnp.array([-0.0, 1.0, 2.0])}
    ones = {"w": np.array([0, 1, 1]), "v": np.array([1, 1, 0])}
    for strategy in (delta(), delta(support=ones)):
        coords, consts = strategy.init(KEY, params)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(coords))
        effective = strategy.apply(params, coords, consts)
        assert all(effective[k].tobytes() == params[k].tobytes() for k in params)


# --- the refit of a sparse model ------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(start):
    """Three numbers of one leaf differ."""
    change = np.zeros((3, 2))
    change[0, 1], change[2] = 0.1, (-0.2, 0.3)
    linear = {**start["linear"], "0e": start["linear"]["0e"] + change}
    return {**start, "linear": linear}


def test_only_the_support_moves_and_all_of_it(start, tuned, example):
    support = support_of(start, tuned)
    assert {path: int(ones.sum()) for path, ones in tree.flatten(support).items()} == {
        "linear/0e": 3,
        "linear/1o": 0,
        "bias": 0,
    }
    tx = optax.chain(optax.adamw(0.01), optax.add_noise(0.1, 0.0, 0))  # moves everything it can
    state, merged = trained(squares, (delta(support=support),), tx, tuned, example, steps=3)
    assert set(tree.flatten(state.trainable.coords["delta"])) == {"linear/0e/delta"}
    for path, leaf in tree.flatten(tuned).items():
        moved = np.asarray(leaf) != np.asarray(merged[path])
        assert (moved == tree.flatten(support)[path]).all(), path


def test_a_refit_obeys_the_laws(start, tuned, example):
    """Those of them that need no potential."""
    recipe = (delta("linear/*", support=support_of(start, tuned)),)
    testing.assert_identity_at_init(recipe, tuned, key=KEY)
    testing.assert_keeps_structure(recipe, tuned, key=KEY)
    testing.assert_projection_idempotent(recipe, tuned, key=KEY)
    testing.assert_jit_agrees(recipe, tuned, example, key=KEY)
    finetuned = jaxft.finetune(squares, recipe, optax.adamw(1e-2, weight_decay=0.1))
    testing.assert_trains_lawfully(finetuned, jaxft.merge, recipe, tuned, example)


def test_off_the_support_coordinates_have_no_effect_and_no_gradient(start, tuned, example):
    strategy = delta(support=jax.tree.map(lambda ones: ones.astype(int), support_of(start, tuned)))
    coords, consts = strategy.init(KEY, tuned)
    wild = jax.tree.map(lambda x: x + 5.0, coords)
    gradient = jax.grad(lambda c: squares(strategy.apply(tuned, c, consts), example)[0])(wild)
    ones = consts["linear"]["0e"]["delta"]
    assert ((gradient["linear"]["0e"]["delta"] != 0) == ones).all()
    change = strategy.apply(tuned, wild, consts)["linear"]["0e"] - tuned["linear"]["0e"]
    assert ((change != 0) == ones).all()


def test_a_refit_removes_the_shrinkage(start, tuned, example):
    """A convex loss: the refit finds the least squares solution on the support."""

    def shrunk(params, batch):
        return 0.5 * jnp.sum((params["linear"]["0e"] - batch) ** 2), {}

    wanted = start["linear"]["0e"] + 1.5 * (tuned["linear"]["0e"] - start["linear"]["0e"])
    recipe = (delta("linear/*", support=support_of(start, tuned)),)
    _, merged = trained(shrunk, recipe, optax.sgd(0.5), tuned, wanted, steps=60)
    np.testing.assert_allclose(merged["linear/0e"], wanted, rtol=0, atol=ROUNDING)


# --- errors ---------------------------------------------------------------------------------------


def test_unusable_supports_are_refused(start, tuned):
    ones = jax.tree.map(np.ones_like, start)
    cases = {
        r"of another model .*\n- bias \(2,\)\n": {"linear": ones["linear"]},
        r"- bias \(2,\)\n\+ bias \(3,\)": {**ones, "bias": np.ones(3)},
        "other numbers than 0 and 1 in 'bias'": {**ones, "bias": np.full(2, 0.5)},
        "is zero in all 3 leaves of `where`": support_of(start, start),
    }
    for message, support in cases.items():
        with pytest.raises(ValueError, match=message):
            base.check((delta(support=support),), start)
    with pytest.raises(ValueError, match="is zero in all 2 leaves of `where`"):
        base.check((delta(["bias", "**/1o"], support=support_of(start, tuned)),), start)
    with pytest.raises(ValueError, match=r"not of the same model .*\n- bias"):
        support_of(start, {"linear": start["linear"]})


def test_a_misspelt_pattern_is_refused(start):
    with pytest.raises(ValueError, match=r"'linaer/\*' matches none"):
        base.check((delta("linaer/*"),), start)
