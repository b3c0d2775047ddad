"""Optimisers, decay, schedules, plateaus and alternation, on a tiny tree with a toy loss."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.citation import works
from jaxft.optimizer import (
    OPTIMIZERS,
    SCHEDULES,
    Plateau,
    add_previous,
    cites,
    decay,
    evaluated,
    get_factor,
    is_averaging,
    optimizer,
    project_gradients,
    scale_by_amsgrad,
    schedule,
    set_factor,
)
from jaxft.strategies import freeze
from jaxft.train import Trainable

ROUNDING = 1e-13
"""Relative, float64, of a few dozen operations."""
PARAMS = {
    "skip": {"0e": jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)},
    "linear": {
        "0e": jnp.linspace(0.5, 1.5, 6).reshape(3, 2),
        "1o": jnp.linspace(-0.7, -0.4, 4).reshape(2, 2),
    },
    "alpha": jnp.array(1.3, float),
}
TRAINABLE = Trainable(
    {**PARAMS, "frozen": None}, {"delta": {"skip/0e": jnp.full((2, 3, 4), 0.1, float)}}
)


def toy(params, batch):
    """A bowl about ``batch``, steeper in some directions."""
    leaves = jax.tree.leaves(params)
    steep = [1.0 + jnp.arange(leaf.size).reshape(leaf.shape) for leaf in leaves]
    return sum(jnp.sum(s * (x - batch) ** 2) for x, s in zip(leaves, steep, strict=True)), {}


def trained(tx, trainable, gradients):
    """The tree after one update per gradient."""
    state, update = tx.init(trainable), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return trainable


def is_same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def close(a, b, rtol=ROUNDING):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


def random_like(tree, seed, scale=1.0):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(scale * rng.normal(size=x.shape)) for x in leaves])


# Every optimiser


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_goes_downhill_and_keeps_holes_and_dtypes(name):
    tx = optimizer(name, 1e-3, weight_decay=1e-3, decay_towards="start", clip_norm=10.0)
    start = jax.tree.map(lambda x: x.astype(jnp.float32), TRAINABLE)

    @jax.jit
    def step(trainable, state):
        gradient = jax.grad(lambda t: toy(t, 2.0)[0])(trainable)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state

    trainable, state = start, tx.init(start)
    for _ in range(5):
        trainable, state = step(trainable, state)
    for end in (trainable, evaluated(state, trainable)):
        assert toy(end, 2.0)[0] < toy(start, 2.0)[0]
        assert jax.tree.structure(end) == jax.tree.structure(start)
        assert {leaf.dtype for leaf in jax.tree.leaves(end)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_of_zero_changes_nothing(name):
    tx = optimizer(name, 0.0, weight_decay=1.0)
    gradients = [random_like(TRAINABLE, i) for i in range(3)]
    after = trained(tx, TRAINABLE, gradients)
    if name == "schedule_free":  # the point of the gradient is computed anew from two others
        close(after, TRAINABLE)
    else:
        assert is_same(after, TRAINABLE)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_engine_takes_every_optimiser_without_compiling_twice(name):
    tx = optimizer(name, 1e-3, clip_norm=1.0, alternation="project")
    init, step = jaxft.finetune(toy, (freeze("skip/**"),), tx)
    state = init(jax.random.key(0), PARAMS)
    for _ in range(3):
        state, info = step(state, 2.0)
    assert step._cache_size() == 1
    assert info["is_finite"]
    assert state.trainable.params["skip"]["0e"] is None


def test_frozen_leaves_do_not_enter_the_clipped_norm():
    """Same steps whether the frozen leaf's would-be gradient is nothing or overwhelming."""

    def loss(params, batch):
        return toy({"linear": params["linear"]}, 2.0)[0] + batch * jnp.sum(params["skip"]["0e"]), {}

    init, step = jaxft.finetune(
        loss, (freeze(except_="linear/**"),), optimizer("sgd", 0.1, clip_norm=1.0)
    )
    ends = []
    for steepness in (0.0, 1e6):
        state, info = step(init(jax.random.key(0), PARAMS), steepness)
        ends.append(state.trainable)
        assert info["gradient_norm"] > 1.0
    assert is_same(*ends)
    moved = jax.tree.map(jnp.subtract, ends[0].params["linear"], PARAMS["linear"])
    assert optax.tree.norm(moved) == pytest.approx(0.1, rel=ROUNDING)


def test_the_order_is_clip_then_alternation_then_optimiser_then_decay_then_rate_then_factor():
    """Against the same updates written out with numpy."""
    tx = optimizer("momentum", 0.1, weight_decay=0.5, clip_norm=2.0, alternation="sum", b1=0.8)
    theta = np.array([1.0, -2.0])
    gradients = np.array([[3.0, 4.0], [0.3, 0.4], [-6.0, 8.0]])
    ours, state = jnp.asarray(theta), tx.init(jnp.asarray(theta))
    state = set_factor(state, 0.25)
    trace = np.zeros(2)
    kept = np.zeros(2)
    for i, gradient in enumerate(gradients):
        updates, state = tx.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        clipped = gradient * min(1.0, 2.0 / np.linalg.norm(gradient))
        total = clipped + kept if i % 2 else clipped
        kept = clipped
        trace = total + 0.8 * trace
        theta = theta - 0.25 * 0.1 * (trace + 0.5 * theta)
    np.testing.assert_allclose(ours, theta, rtol=ROUNDING)


# AMSGrad, schedule-free, Muon


def test_amsgrad_follows_its_formula():
    gradients = np.random.default_rng(0).normal(size=(40, 3)) / np.arange(1, 41)[:, None]
    ours = trained(scale_by_amsgrad(), jnp.zeros(3), map(jnp.asarray, gradients))
    m = v = top = expected = np.zeros(3)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        top = np.maximum(top, v)
        expected = expected + m / (1 - 0.9**t) / (np.sqrt(top / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(ours, expected, rtol=ROUNDING)


def test_schedule_free_follows_its_update_rule_and_is_judged_by_the_average():
    """AdamW of Defazio et al., arXiv:2405.15682, algorithm 1, with warm-up."""
    rate, b1, b2, wd = 0.05, 0.9, 0.999, 0.3
    tx = optimizer(
        "schedule_free", lambda t: rate * jnp.minimum(t.astype(float) / 3, 1.0), weight_decay=wd
    )
    start = np.random.default_rng(0).normal(size=3)
    y, state = jnp.asarray(start), tx.init(jnp.asarray(start))
    assert is_averaging(state)
    x = z = start
    v = total = np.zeros(3)
    for t in range(1, 31):
        point = (1 - b1) * z + b1 * x
        gradient = np.array([1.0, 4.0, 9.0]) * point
        updates, state = tx.update(jnp.asarray(gradient), state, y)
        y = optax.apply_updates(y, updates)
        v = b2 * v + (1 - b2) * gradient**2
        step = gradient / (np.sqrt(v / (1 - b2**t)) + 1e-8) + wd * point
        z = z - rate * min((t - 1) / 3, 1.0) * step
        weight = (rate * min(t / 3, 1.0)) ** 2
        total = total + weight
        x = x + weight / total * (z - x)
    np.testing.assert_allclose(evaluated(state, y), x, rtol=ROUNDING * 1e2)
    assert np.abs(np.asarray(y) - x).max() > 1e-4


def test_what_is_judged_is_what_is_trained_unless_it_is_averaged():
    for name in set(OPTIMIZERS) - {"schedule_free"}:
        state = optimizer(name, 0.1).init(TRAINABLE)
        assert not is_averaging(state)
        assert evaluated(state, TRAINABLE) is TRAINABLE


def test_before_the_first_update_the_average_is_the_start_bitwise():
    start = jnp.asarray(np.random.default_rng(0).normal(size=100))
    assert is_same(evaluated(optimizer("schedule_free", 0.1).init(start), start), start)


def test_the_average_is_found_inside_the_chain_of_a_recipe():
    recipe = (freeze("skip/**"),)
    init, step = jaxft.finetune(toy, recipe, optimizer("schedule_free", 0.1))
    state = init(jax.random.key(0), PARAMS)
    for _ in range(4):
        state, _ = step(state, 2.0)
    judged = evaluated(state.opt_state, state.trainable)
    assert jax.tree.structure(judged) == jax.tree.structure(state.trainable)
    assert not is_same(judged, state.trainable)


def test_muon_orthogonalises_each_matrix_of_a_stack_and_leaves_scalars_to_adam():
    tx = optimizer("muon", 1.0)
    gradient = random_like(PARAMS, 0)
    updates, _ = tx.update(gradient, tx.init(PARAMS), PARAMS)
    for path in (("skip", "0e"), ("linear", "0e"), ("linear", "1o")):
        update = np.asarray(updates[path[0]][path[1]])
        for matrix in update.reshape(-1, *update.shape[-2:]):
            singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
            # five Newton-Schulz iterations bring singular values to about 1
            assert ((singular > 0.4) & (singular < 1.4)).all()
    assert updates["alpha"] == pytest.approx(-np.sign(gradient["alpha"]), rel=1e-6)
    alone = {"m": PARAMS["skip"]["0e"][1]}
    first = tx.update({"m": gradient["skip"]["0e"][1]}, tx.init(alone), alone)[0]["m"]
    close(updates["skip"]["0e"][1], first)


# Decay


def test_under_gradient_descent_decay_is_a_quadratic_penalty():
    gradient = jax.grad(lambda t, anchor: toy(t, 2.0)[0] + 0.5 * 0.7 * _square(t, anchor))
    for towards, anchor in (
        ("zero", jax.tree.map(jnp.zeros_like, TRAINABLE)),
        ("start", TRAINABLE),
    ):
        tx = optimizer("sgd", 1e-3, weight_decay=0.7, decay_towards=towards)
        state, ours, theirs = tx.init(TRAINABLE), TRAINABLE, TRAINABLE
        for _ in range(5):
            updates, state = tx.update(jax.grad(lambda t: toy(t, 2.0)[0])(ours), state, ours)
            ours = optax.apply_updates(ours, updates)
            theirs = jax.tree.map(lambda x, g: x - 1e-3 * g, theirs, gradient(theirs, anchor))
        close(ours, theirs)


def _square(a, b):
    return optax.tree.norm(jax.tree.map(jnp.subtract, a, b), squared=True)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"schedule_free"}))
def test_decay_is_decoupled_for_every_optimiser(name):
    """It adds -rate * decay * theta to an update, whatever the gradient."""
    gradient = random_like(TRAINABLE, 0, 1e-3)
    plain = trained(optimizer(name, 0.01), TRAINABLE, [gradient])
    decayed = trained(optimizer(name, 0.01, weight_decay=2.0), TRAINABLE, [gradient])
    close(jax.tree.map(jnp.subtract, plain, decayed), jax.tree.map(lambda x: 0.02 * x, TRAINABLE))


def test_the_delta_of_equitrain_is_bounded_by_one_over_its_decay():
    """Under Adam and a gradient of constant sign, and it forgets when the gradient ends."""
    tx = optimizer("adamw", 0.01, weight_decay={"coords/delta/**": 10.0})
    push = jax.tree.map(lambda x: jnp.full_like(x, 1e3), TRAINABLE)
    far = trained(tx, TRAINABLE, [push] * 200)
    close(far.coords, jax.tree.map(lambda x: jnp.full_like(x, -0.1), TRAINABLE.coords), 1e-6)
    assert (far.params["skip"]["0e"] < TRAINABLE.params["skip"]["0e"] - 1.9).all()
    rest = jax.tree.map(jnp.zeros_like, TRAINABLE)
    back = trained(tx, TRAINABLE, [rest] * 10)
    close(back.coords, jax.tree.map(lambda x: x * 0.9**10, TRAINABLE.coords))
    assert is_same(back.params, TRAINABLE.params)


def test_decay_by_pattern_acts_where_it_says_and_nowhere_else():
    rates = {"params/linear/*": 0.5, "coords/**": 0.25}
    rest = jax.tree.map(jnp.zeros_like, TRAINABLE)
    after = trained(optimizer("sgd", 1.0, weight_decay=rates), TRAINABLE, [rest])
    assert is_same(after.params["skip"], TRAINABLE.params["skip"])
    close(after.params["linear"], jax.tree.map(lambda x: 0.5 * x, TRAINABLE.params["linear"]))
    close(after.coords, jax.tree.map(lambda x: 0.75 * x, TRAINABLE.coords))


def test_decay_towards_the_start_leads_back_and_keeps_only_what_decays():
    tx = decay({"params/alpha": 0.5}, towards="start")
    state = tx.init(TRAINABLE)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [()]
    away = jax.tree.map(lambda x: x + 1.0, TRAINABLE)
    pulled, _ = tx.update(jax.tree.map(jnp.zeros_like, away), state, away)
    assert float(pulled.params["alpha"]) == pytest.approx(0.5, rel=ROUNDING)
    assert not pulled.params["skip"]["0e"].any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_decay": {"coords/dleta/**": 1.0}}, ["coords/dleta/**", "coords/delta/skip/0e"]),
        ({"weight_decay": {"params/frozen": 1.0}}, ["params/frozen", "none of 5"]),
        ({"weight_decay": {"params/**": 1.0, "**/alpha": 2.0}}, ["params/alpha", "overlap"]),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused_at_init(options, words):
    tx = optimizer("adam", 1e-3, **options)
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        tx.init(TRAINABLE)
    for word in words[1:]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("adma", {}, ["adma", "amsgrad"]),
        ("adam", {"weight_decay": -1.0}, ["-1.0", "not negative"]),
        ("adam", {"weight_decay": {"**": float("nan")}}, ["nan", "finite"]),
        ("adam", {"decay_towards": "start"}, ["decay_towards", "weight_decay"]),
        ("adam", {"weight_decay": 1.0, "decay_towards": "end"}, ["end", "start"]),
        ("adam", {"clip_norm": 0.0}, ["clip_norm", "None"]),
        ("adam", {"alternation": "add"}, ["add", "project"]),
        ("adam", {"alternation": "sum", "period": 1}, ["period=1", "2 or more"]),
        ("adam", {"b1": 1.0}, ["b1", "b1 < 1"]),
        ("sgd", {"b1": 0.9}, ["b1", "sgd"]),
        ("schedule_free", {"b1": 0.0}, ["b1", "average"]),
    ],
)
def test_options_without_sense_are_refused(name, options, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        optimizer(name, 1e-3, **options)
    for word in words[1:]:
        assert word in str(error.value)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_a_learning_rate_is_finite_and_not_negative(rate):
    with pytest.raises(ValueError, match="learning_rate"):
        optimizer("adam", rate)
    with pytest.raises(ValueError, match="learning_rate"):
        schedule("constant", rate, steps=10)


# Schedules


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_rise_to_the_peak_and_end_where_they_say(kind):
    rate = schedule(kind, 0.5, steps=110, warmup=10, final=0.02)
    assert [float(rate(t)) for t in (0, 5, 10)] == pytest.approx([0.0, 0.25, 0.5])
    middle = {"constant": 0.5, "cosine": 0.255, "linear": 0.255, "exponential": 0.5 * 0.02**0.5}
    assert float(rate(60)) == pytest.approx(middle[kind], rel=1e-6)
    assert float(rate(110)) == pytest.approx(0.5 if kind == "constant" else 0.01, rel=1e-6)


def test_an_exponential_schedule_takes_a_factor_per_update():
    rate = schedule("exponential", 1.0, steps=10, decay=0.99 ** (1 / 5))
    assert [float(rate(5 * epoch)) for epoch in range(4)] == pytest.approx(
        [0.99**epoch for epoch in range(4)], rel=1e-6
    )


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("cosin", {}, ["cosin", "cosine"]),
        ("cosine", {"warmup": 10}, ["warmup=10", "fewer than 10"]),
        ("cosine", {"final": 1.5}, ["final=1.5"]),
        ("exponential", {"final": 0.0}, ["final=0.0", "> 0"]),
        ("exponential", {"decay": 1.5}, ["decay=1.5"]),
        ("cosine", {"decay": 0.9}, ["decay=0.9", "exponential"]),
    ],
)
def test_schedules_without_sense_are_refused(kind, options, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        schedule(kind, 1e-3, steps=10, **options)
    for word in words[1:]:
        assert word in str(error.value)


# Plateaus


@pytest.mark.parametrize("name", ["adam", "schedule_free"])
def test_the_factor_scales_updates_without_compiling_again(name):
    traces = []

    def counted(params, batch):
        traces.append(None)
        return toy(params, batch)

    init, step = jaxft.finetune(counted, (), optimizer(name, 0.01))
    after = {}
    for factor in (None, 0.5, 0.0):
        state = init(jax.random.key(0), PARAMS)
        if factor is not None:
            state = state._replace(opt_state=set_factor(state.opt_state, factor))
        state, _ = step(state, 2.0)
        assert get_factor(state.opt_state) == (1.0 if factor is None else factor)
        after[factor] = jax.tree.map(jnp.subtract, state.trainable.params, PARAMS)
    assert len(traces) == 1
    close(after[0.5], jax.tree.map(lambda x: 0.5 * x, after[None]), 1e-7)
    close(after[0.0], jax.tree.map(jnp.zeros_like, PARAMS))


def test_a_factor_of_one_changes_no_bit():
    gradients = [random_like(TRAINABLE, i) for i in range(3)]
    scale = optax.scale_by_adam()
    found = trained(optimizer("adam", 0.01), TRAINABLE, gradients)
    rate = optax.scale_by_learning_rate(0.01)
    assert is_same(found, trained(optax.chain(optax.flatten(scale), rate), TRAINABLE, gradients))
    close(found, trained(optax.chain(scale, rate), TRAINABLE, gradients), 1e-14)


def test_a_state_without_a_factor_is_refused():
    with pytest.raises(ValueError, match="scale_by_factor"):
        set_factor(optax.adam(0.1).init(PARAMS), 0.5)


def test_a_plateau_waits_reduces_and_stops_at_its_least():
    plateau = Plateau(factor=0.5, patience=2, min_factor=0.3)
    scales = []
    for value in (1.0, 0.9, 0.9, 0.9, 0.9, 0.8, np.nan, np.inf, 0.8, 0.8):
        plateau = plateau.update(value)
        scales.append(plateau.scale)
    assert scales == [1.0] * 4 + [0.5] * 4 + [0.3] * 2
    assert plateau.best == 0.8


def test_a_plateau_resumes_from_json():
    plateau = Plateau(patience=1)
    for value in (3.0, 3.0):
        plateau = plateau.update(value)
    stored = json.dumps(dataclasses.asdict(plateau), allow_nan=False)
    assert Plateau(**json.loads(stored)) == plateau
    assert json.dumps(dataclasses.asdict(Plateau()), allow_nan=False)


@pytest.mark.parametrize(
    "wrong", [{"factor": 1.0}, {"patience": -1}, {"threshold": -0.1}, {"min_factor": 2.0}]
)
def test_a_plateau_without_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Plateau(**wrong)


# Alternation

TARGET, MEMORY = jnp.array([1.0, 0.4]), jnp.array([-1.0, 0.8])


def test_a_conflict_is_projected_away_and_the_memory_is_not_hurt_to_first_order():
    """Linear losses: what remains of the target's gradient is orthogonal to the memory's."""
    tx = project_gradients()
    state = tx.init(TARGET)
    first, state = tx.update(TARGET, state)
    memory, state = tx.update(MEMORY, state)
    target, state = tx.update(TARGET, state)
    assert is_same(first, TARGET)
    assert float(TARGET @ MEMORY) < 0
    for projected, other, own in ((memory, TARGET, MEMORY), (target, MEMORY, TARGET)):
        assert abs(float(projected @ other)) < ROUNDING
        assert float(projected @ own) > 0


@pytest.mark.parametrize(("alternation", "rises"), [("separate", True), ("project", False)])
def test_projection_keeps_what_a_target_update_would_undo(alternation, rises):
    """Two bowls; the memory's loss over the third update, the target's second, as the rate → 0."""
    centres = jnp.array([[3.0, 1.0], [-1.0, 1.5]])

    def loss(theta, kind):
        return jnp.sum((theta - centres[kind]) ** 2)

    slopes = []
    for rate in (1e-4, 1e-5):
        tx = optimizer("sgd", rate, alternation=alternation)
        theta, losses = jnp.zeros(2), []
        state = tx.init(theta)
        for kind in (0, 1, 0):
            losses.append(loss(theta, 1))
            updates, state = tx.update(jax.grad(loss)(theta, kind), state, theta)
            theta = optax.apply_updates(theta, updates)
        slopes.append(float(loss(theta, 1) - losses[-1]) / rate)
    if rises:
        assert min(slopes) > 1.0
    else:
        assert abs(slopes[1]) < 0.11 * abs(slopes[0])  # second order: the slope goes with the rate


def test_without_a_conflict_gradients_are_unchanged_bitwise():
    same = [random_like(TRAINABLE, 0), random_like(TRAINABLE, 0, 3.0)]
    tx = project_gradients()
    state = tx.init(TRAINABLE)
    for gradient in same * 2:
        projected, state = tx.update(gradient, state)
        assert is_same(projected, gradient)


def test_the_dot_product_runs_over_all_leaves():
    """A conflict in one leaf that another outweighs is none."""
    tx = project_gradients()
    state = tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)})
    _, state = tx.update({"a": jnp.ones(1), "b": jnp.ones(1)}, state)
    gradient = {"a": jnp.full(1, -1.0), "b": jnp.full(1, 2.0)}
    assert is_same(tx.update(gradient, state)[0], gradient)


def test_in_a_longer_period_the_memory_meets_the_target_and_the_target_the_last_memory():
    tx = project_gradients(period=3)
    e = jnp.eye(3)
    given = [e[0], e[1] - 0.5 * e[0], e[2] - 0.5 * e[0], e[0] - e[1] - e[2]]
    state, found = tx.init(e[0]), []
    for gradient in given:
        projected, state = tx.update(gradient, state)
        found.append(projected)
    np.testing.assert_allclose(found[:3], e, atol=ROUNDING)
    share = (given[3] @ given[2]) / (given[2] @ given[2])
    np.testing.assert_allclose(found[3], given[3] - share * given[2], rtol=ROUNDING)
    assert abs(float(found[3] @ given[1])) > 0.1  # the memory before the last plays no part


def test_the_second_update_of_the_research_version_uses_both_gradients():
    """And each pair begins anew."""
    g = [random_like(TRAINABLE, i) for i in range(4)]
    tx = add_previous()
    state, found = tx.init(TRAINABLE), []
    for gradient in g:
        total, state = tx.update(gradient, state)
        found.append(total)
    for i in (0, 2):
        assert is_same(found[i], g[i])
        assert is_same(found[i + 1], jax.tree.map(jnp.add, g[i], g[i + 1]))


# Citations


def test_an_optimiser_says_whom_to_cite():
    assert cites("sgd") == ()
    assert cites("amsgrad") == ("kingma2015adam", "reddi2018amsgrad")
    assert cites("adamw", weight_decay=1.0) == ("kingma2015adam", "loshchilov2019adamw")
    assert cites("sgd", weight_decay={"**": 1.0}, alternation="project") == (
        "loshchilov2019adamw",
        "chaudhry2019agem",
        "yu2020pcgrad",
    )
    assert "li2018l2sp" in cites("adam", weight_decay=1.0, decay_towards="start")
    assert "defazio2024schedulefree" in cites("schedule_free")
    assert "jordan2024muon" in cites("muon")


def test_every_work_to_cite_is_in_the_bibliography():
    options = {"weight_decay": 1.0, "decay_towards": "start"}
    for name in OPTIMIZERS:
        for alternation in ("separate", "project", "sum"):
            works(also=cites(name, alternation=alternation, **options))
