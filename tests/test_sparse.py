"""Soft thresholding: what survives, what decay prunes, and the published update."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import tree
from jaxft.strategies import base
from jaxft.strategies.delta import delta, support_of
from jaxft.strategies.sparse import o3_linears, pruned, soft_threshold, sparse, sparsity

KEY = jax.random.key(3)

ROUNDING = 1e-12
"""Two orders of the same few float64 operations, ten steps."""


@pytest.fixture(scope="module")
def start():
    rng = np.random.default_rng(0)
    return {
        "linear": {
            "0e": jnp.asarray(rng.normal(size=(30, 20))),
            "1o": jnp.asarray(rng.normal(size=(20, 10))),
        },
        "conv_tp_weights": {"layer0": jnp.asarray(rng.normal(size=(3, 3)))},
    }


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(1)
    return rng.normal(size=(5, 30)), rng.normal(size=(5, 10))


def squares(params, batch):
    """½ Σ (x W₀ W₁ - y)²."""
    x, y = batch
    return 0.5 * jnp.sum((x @ params["linear"]["0e"] @ params["linear"]["1o"] - y) ** 2), {}


def gradients(w, batch):
    """Of ``squares``, by hand."""
    x, y = batch
    error = x @ w["0e"] @ w["1o"] - y
    return {"0e": x.T @ error @ w["1o"].T, "1o": (x @ w["0e"]).T @ error}


def adamw(rate, *, on_delta, on_score):
    """Decoupled decays of their own for the deltas and for the scores."""

    def called(name):
        return lambda trainable: jax.tree_util.tree_map_with_path(
            lambda keys, _: jax.tree_util.keystr(keys).endswith(f"['{name}']"), trainable
        )

    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(on_delta, called("delta")),
        optax.add_decayed_weights(on_score, called("score")),
        optax.scale_by_learning_rate(rate),
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["layer", "leaf"])
def test_ten_steps_are_those_of_the_published_rule(start, example, per):
    """AdamW on δ and on s, each with its own decay, gradients in closed form."""
    rate, decays, b1, b2, eps = 0.01, {"delta": 0.1, "score": 0.5}, 0.9, 0.999, 1e-8
    recipe = (sparse("linear/*", threshold=0.02, init_std=0.05, per=per),)
    init, step = jaxft.finetune(
        squares, recipe, adamw(rate, on_delta=decays["delta"], on_score=decays["score"])
    )
    state = init(KEY, start)
    w0 = {name: np.asarray(leaf) for name, leaf in start["linear"].items()}
    x = {k: np.array(v) for k, v in tree.flatten(state.trainable.coords["sparse"]).items()}
    score_of = {n: "linear/score" if per == "layer" else f"linear/{n}/score" for n in ("0e", "1o")}
    assert set(x) == {"linear/0e/delta", "linear/1o/delta", *score_of.values()}
    m, v = ({key: np.zeros_like(value) for key, value in x.items()} for _ in range(2))

    def thresholded():
        found = {}
        for name in w0:
            values, d = x[f"linear/{name}/delta"], sigmoid(x[score_of[name]])
            found[name] = np.sign(values) * np.maximum(np.abs(values) - d, 0)
        return found

    for t in range(1, 11):
        s = thresholded()
        at = gradients({name: w0[name] + s[name] for name in w0}, example)
        g = {key: np.zeros_like(value) for key, value in x.items()}
        for name in w0:
            values, d = x[f"linear/{name}/delta"], sigmoid(x[score_of[name]])
            survives = np.abs(values) > d
            g[f"linear/{name}/delta"] += at[name] * survives
            g[score_of[name]] += -np.sum((np.sign(values) * at[name])[survives]) * d * (1 - d)
        for key in x:
            m[key] = b1 * m[key] + (1 - b1) * g[key]
            v[key] = b2 * v[key] + (1 - b2) * g[key] ** 2
            adam = (m[key] / (1 - b1**t)) / (np.sqrt(v[key] / (1 - b2**t)) + eps)
            decay = decays[key.rpartition("/")[2]]
            x[key] = (1 - rate * decay) * x[key] - rate * adam
        state, _ = step(state, example)
    found = tree.flatten(state.trainable.coords["sparse"])
    for key in x:
        np.testing.assert_allclose(found[key], x[key], rtol=0, atol=ROUNDING, err_msg=key)
    merged = jaxft.merge(recipe, state)["linear"]
    for name, change in thresholded().items():
        np.testing.assert_allclose(merged[name], w0[name] + change, rtol=0, atol=ROUNDING)
        assert 0.01 < np.mean(change == 0) < 0.9, "the test should prune some and not all"


def test_gradients_are_the_closed_forms(start, example):
    strategy = sparse("linear/*", threshold=0.02, init_std=0.05)
    coords, consts = strategy.init(KEY, start)
    found = jax.grad(lambda c: squares(strategy.apply(start, c, consts), example)[0])(coords)
    at = gradients(strategy.apply(start, coords, consts)["linear"], example)
    d = 0.02
    expected = 0.0
    for name in ("0e", "1o"):
        values = np.asarray(coords["linear"][name]["delta"])
        survives = np.abs(values) > d
        wanted = np.where(survives, at[name], 0)
        np.testing.assert_allclose(found["linear"][name]["delta"], wanted, rtol=1e-12)
        assert (np.asarray(found["linear"][name]["delta"])[~survives] == 0).all()
        expected -= np.sum((np.sign(values) * at[name])[survives]) * d * (1 - d)
    np.testing.assert_allclose(found["linear"]["score"], expected, rtol=1e-12)


def test_a_delta_of_zero_never_moves(start, example):
    strategy = sparse("linear/*")
    coords, consts = strategy.init(KEY, start)
    nothing = {"linear": {**jax.tree.map(jnp.zeros_like, coords["linear"])}}
    nothing["linear"]["score"] = coords["linear"]["score"]
    gradient = jax.grad(lambda c: squares(strategy.apply(start, c, consts), example)[0])(nothing)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_soft_threshold_is_the_proximal_map_of_the_1_norm():
    """argmin_y ½ (y - x)² + d |y|, by search."""
    x = np.linspace(-2, 2, 41)
    y = np.linspace(-2, 2, 4001)
    best = y[np.argmin(0.5 * (y - x[:, None]) ** 2 + 0.7 * np.abs(y), axis=1)]
    np.testing.assert_allclose(soft_threshold(x, 0.7), best, atol=6e-4)


# --- where it starts ------------------------------------------------------------------------------


def test_a_threshold_above_every_delta_gives_the_base_exactly(start):
    strategy = sparse("linear/*", threshold=0.06, init_std=0.01)
    coords, consts = strategy.init(KEY, start)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(coords["linear"]["0e"])) < 0.06
    effective = strategy.apply(start, coords, consts)
    for a, b in zip(jax.tree.leaves(effective), jax.tree.leaves(start), strict=True):
        assert a.tobytes() == b.tobytes()
    assert sparsity(coords).total == 1.0


@pytest.mark.parametrize("threshold", [1e-3, 1e-4])
def test_it_does_not_start_at_the_base(threshold):
    """erf(d / σ√2) of the numbers are pruned, the others are off by |δ| - d."""
    params = {"linear": {"0e": jnp.ones((400, 500))}}
    strategy = sparse(threshold=threshold)
    assert not strategy.is_identity_at_init
    coords, consts = strategy.init(KEY, params)
    values = np.asarray(coords["linear"]["0e"]["delta"])
    np.testing.assert_allclose(values.std(), 0.01, rtol=0.01)
    change = np.asarray(strategy.apply(params, coords, consts)["linear"]["0e"]) - 1
    np.testing.assert_allclose(
        np.abs(change), np.maximum(np.abs(values) - threshold, 0), atol=1e-12
    )
    share = math.erf(threshold / 0.01 / math.sqrt(2))  # 8 % and 0.8 %
    drawn = math.sqrt(share * (1 - share) / values.size)
    np.testing.assert_allclose(sparsity(coords).total, share, atol=4 * drawn)


def test_a_leaf_draws_the_same_delta_wherever_the_others_are(start):
    together, _ = sparse("linear/*").init(KEY, start)
    alone, _ = sparse("linear/1o").init(KEY, start)
    assert together["linear"]["1o"]["delta"].tobytes() == alone["linear"]["1o"]["delta"].tobytes()
    shapes = {leaf.shape for leaf in jax.tree.leaves(together)}
    assert shapes == {(30, 20), (20, 10), ()}
    assert together["linear"]["0e"]["delta"][0, 0] != together["linear"]["1o"]["delta"][0, 0]


def test_by_default_the_matrices_of_torch_o3_linears_are_chosen(params):
    chosen = tree.select(params, o3_linears)
    modules = {path.split("/")[-2] for path in chosen}
    assert modules == {"linear", "linear_up", "linear_1", "linear_2"}
    assert "node_embedding/linear/0e" in chosen
    other = {
        "interactions_0": {
            "skip_tp": {"0e": jnp.ones((4, 4)), "1o": jnp.ones((5, 4, 4))},
            "source_embedding": {"0e": jnp.ones((5, 4))},
            "conv_tp_weights": {"layer0": jnp.ones((4, 4))},
            "linear_2": {"bias": jnp.ones(4), "1o": jnp.ones((4, 4))},
        }
    }
    assert tree.select(other, o3_linears) == [
        "interactions_0/skip_tp/0e",
        "interactions_0/source_embedding/0e",
        "interactions_0/linear_2/1o",
    ]


def test_base_leaves_are_frozen_but_those_to_train_in_full(start):
    trained = tree.flatten(base.trains((sparse(),), start))
    assert not any(trained.values())
    also = sparse(also_train="conv_tp_weights/*")
    trained = tree.flatten(base.trains((also,), start))
    assert [path for path in trained if trained[path]] == ["conv_tp_weights/layer0"]


# --- what becomes of it ---------------------------------------------------------------------------


def test_with_decay_and_no_gradient_sparsity_rises_to_one(start):
    recipe = (sparse("linear/*", threshold=1e-3, init_std=0.05),)
    init, step = jaxft.finetune(
        lambda params, batch: (jnp.zeros(()), {}), recipe, adamw(0.01, on_delta=0.0, on_score=5.0)
    )
    state, seen, thresholds = init(KEY, start), [], []
    for _ in range(60):
        state, _ = step(state, None)
        found = sparsity(state.trainable.coords["sparse"])
        seen.append(found.total)
        thresholds.append(found.thresholds["linear"])
    assert all(np.diff(seen) >= 0)
    assert all(np.diff(thresholds) > 0)
    score = np.log(1e-3 / (1 - 1e-3)) * (1 - 0.01 * 5.0) ** 60
    np.testing.assert_allclose(thresholds[-1], sigmoid(score), rtol=1e-9)
    assert seen[0] < 0.1
    assert seen[-1] == 1.0
    merged = jaxft.merge(recipe, state)
    assert merged["linear"]["0e"].tobytes() == start["linear"]["0e"].tobytes()


def test_pruning_then_adding_is_the_merge(start, example):
    recipe = (sparse("linear/*", threshold=0.02, init_std=0.05),)
    init, step = jaxft.finetune(squares, recipe, adamw(0.01, on_delta=0.0, on_score=0.3))
    state = init(KEY, start)
    for _ in range(3):
        state, _ = step(state, example)
    updates = tree.flatten(pruned(state.trainable.coords["sparse"]))
    merged = tree.flatten(jaxft.merge(recipe, state))
    for path, leaf in tree.flatten(start).items():
        wanted = leaf + updates[path] if path in updates else leaf
        assert merged[path].tobytes() == np.asarray(wanted).tobytes()


def test_sparsity_is_counted_on_what_survives(start):
    coords = {
        "linear": {
            "0e": {"delta": jnp.array([[0.3, -0.3, 0.1], [0.0, 0.2, -0.1]])},
            "1o": {"delta": jnp.array([[0.9, 0.0]]), "score": jnp.array(0.0)},
            "score": jnp.log(0.25 / 0.75),
        }
    }
    found = sparsity(coords)
    assert found.leaves == pytest.approx({"linear/0e": 4 / 6, "linear/1o": 0.5})
    assert found.total == pytest.approx(5 / 8)
    assert found.thresholds == pytest.approx({"linear": 0.25, "linear/1o": 0.5})


def test_debiasing_refits_the_survivors_and_keeps_the_sparsity(start, example):
    recipe = (sparse("linear/*", threshold=0.05, init_std=0.05),)
    init, _ = jaxft.finetune(squares, recipe, optax.adam(1e-3))
    state = init(KEY, start)
    merged = jaxft.merge(recipe, state)
    support = support_of(start, merged)
    refit = (delta(support=support),)
    init, step = jaxft.finetune(squares, refit, optax.adam(1e-3))
    again, before = init(KEY, merged), float(squares(merged, example)[0])
    for _ in range(5):
        again, info = step(again, example)
    assert float(info["loss"]) < before
    final = jaxft.merge(refit, again)
    for a, b in zip(
        jax.tree.leaves(support_of(start, final)), jax.tree.leaves(support), strict=True
    ):
        assert (a == b).all()
    kept = sum(int(ones.sum()) for ones in jax.tree.leaves(support)) / 800
    np.testing.assert_allclose(1 - kept, sparsity(state.trainable.coords["sparse"]).total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "is no threshold"),
        ({"threshold": 1.0}, "is no threshold"),
        ({"threshold": float("nan")}, "is no threshold"),
        ({"init_std": 0.0}, "would never move"),
        ({"per": "path"}, "use 'layer' or 'leaf'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sparse(**options)


def test_misspelt_patterns_are_refused(start):
    for strategy in (sparse("linaer/*"), sparse(also_train="linaer/*")):
        with pytest.raises(ValueError, match=r"'linaer/\*' matches none"):
            base.check((strategy,), start)
