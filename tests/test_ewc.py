"""Pulls towards the start: l2sp and ewc, and whose Fisher it is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import config, tree
from jaxft.data import Keys
from jaxft.fisher import save
from jaxft.recipe import Setting
from jaxft.strategies import base, ewc, freeze, l2sp, lora
from jaxft.strategies.ewc import Fisher, digest

KEY = jax.random.key(0)


def wavy(params, batch):
    """A loss with a gradient for every number of the tree; cheap to compile."""
    return sum(jnp.sum(jnp.sin(leaf + i)) for i, leaf in enumerate(jax.tree.leaves(params))), {}


@pytest.fixture(scope="module")
def found(params):
    """A Fisher of the tiny model over several decades; an eighth of it is zero."""
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda x: 10.0 ** rng.uniform(-6, 0, x.shape), params)
    holes = jax.tree.map(lambda x: np.where(rng.random(x.shape) < 0.125, 0.0, x), values)
    return Fisher(holes, digest(params), {"kind": "made up"})


def trained(recipe, loss, params, *, steps, tx=None, batch=None):
    init, step = jaxft.finetune(loss, recipe, tx or optax.adam(1e-2))
    state = init(KEY, params)
    for _ in range(steps):
        state, info = step(state, batch)
    return jaxft.merge(recipe, state), info


def assert_bitwise(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_fisher_is_not_negative_not_infinite_and_not_zero():
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="negative or non-finite numbers in 'a/x'"):
            ewc({"a": {"x": np.array([1.0, bad])}, "b": np.ones(2)}, strength=1.0)
    with pytest.raises(ValueError, match="A Fisher of self-labelled data is zero"):
        ewc({"a": np.zeros(3)}, strength=1.0)


# --- penalties ------------------------------------------------------------------------------------


def moved(params, recipe):
    """Parameters near the start, and the recipe's constants there."""
    _, consts = base.init(recipe, KEY, params)
    return jax.tree.map(lambda x: x + 0.1 * np.cos(50 * np.asarray(x)), params), consts


def test_penalty_is_half_the_weighted_square(found, params):
    recipe = (
        ewc(found, strength=3.0),
        l2sp(2.0),
        l2sp(5.0, where="readouts_*/**", name="readouts"),
    )
    near, consts = moved(params, recipe)
    squares = {
        path: np.asarray(leaf - tree.flatten(params)[path]) ** 2
        for path, leaf in tree.flatten(near).items()
    }
    importance = tree.flatten(found.values)
    got = base.penalties(recipe, near, consts, None)
    assert got["ewc"] == pytest.approx(
        1.5 * sum((importance[path] * s).sum() for path, s in squares.items()), rel=1e-12
    )
    assert got["l2sp"] == pytest.approx(sum(s.sum() for s in squares.values()), rel=1e-12)
    held = sum(s.sum() for path, s in squares.items() if path.startswith("readouts_"))
    assert got["readouts"] == pytest.approx(2.5 * held, rel=1e-12)


def test_ewc_with_a_fisher_of_ones_is_l2sp(params):
    recipe = (ewc(jax.tree.map(np.ones_like, params), strength=0.7), l2sp(0.7))
    near, consts = moved(params, recipe)
    got = base.penalties(recipe, near, consts, None)
    assert got["ewc"] == pytest.approx(float(got["l2sp"]), rel=1e-12)


def test_penalty_and_its_gradient_are_zero_at_the_start(found, params):
    for strategy in (ewc(found, strength=1e6), l2sp(1e6)):
        _, consts = strategy.init(KEY, params)
        value, gradient = jax.jit(jax.value_and_grad(strategy.penalty))(params, consts, None)
        assert float(value) == 0.0
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_strength_zero_is_plain_fine_tuning_bitwise(found, params):
    recipe = (ewc(found, strength=0.0), l2sp(0.0))
    plain, _ = trained((), wavy, params, steps=3, tx=optax.sgd(0.1, 0.9))
    leashed, info = trained(recipe, wavy, params, steps=3, tx=optax.sgd(0.1, 0.9))
    assert_bitwise(plain, leashed)
    assert float(info["penalty/ewc"]) == float(info["penalty/l2sp"]) == 0.0
    infinite = jax.tree.map(lambda x: np.full(x.shape, np.inf), params)
    _, consts = base.init(recipe, KEY, params)
    assert all(float(p) == 0.0 for p in base.penalties(recipe, infinite, consts, None).values())


def test_the_leash_is_there_in_every_step_of_two_that_take_turns():
    """reEWC: target and memory alternate, the first update is plain, strength 0 is replay."""
    params, importance = {"w": jnp.array([0.2, 0.5])}, {"w": np.array([10.0, 0.1])}
    turns = [np.array([1.0, -1.0]), np.array([-2.0, 3.0])] * 5

    def towards(params, batch):
        return 0.5 * jnp.sum((params["w"] - batch) ** 2), {}

    def path(recipe):
        init, step = jaxft.finetune(towards, recipe, optax.adam(0.05))
        state, seen = init(KEY, params), []
        for batch in turns:
            state, info = step(state, batch)
            seen.append((np.asarray(jaxft.merge(recipe, state)["w"]), info))
        return seen

    plain, slack, leashed = (
        path(recipe)
        for recipe in ((), (ewc(importance, strength=0.0),), (ewc(importance, strength=5.0),))
    )
    for (a, _), (b, _) in zip(plain, slack, strict=True):
        assert a.tobytes() == b.tobytes()
    assert leashed[0][0].tobytes() == plain[0][0].tobytes()
    before = np.asarray(params["w"])
    for w, info in leashed:
        way = before - np.asarray(params["w"])
        expected = 2.5 * float(np.sum(importance["w"] * way**2))
        assert float(info["penalty/ewc"]) == pytest.approx(expected, rel=1e-9, abs=1e-18)
        before = w
    assert all(float(info["penalty/ewc"]) > 0 for _, info in leashed[1:])


def test_what_matters_is_pinned_and_the_rest_is_free():
    r"""Loss ½ a (θ - t)² with penalty ½ λ F (θ - θ*)² ends at (a t + λ F θ*) / (a + λ F)."""
    a, target = np.array([1.0, 2.0, 1.0, 0.5]), np.array([1.0, -1.0, 2.0, 3.0])
    params, importance = {"w": jnp.array([0.2, 0.5, 0.0, 1.0])}, np.array([10.0, 0.1, 0.0, 1.0])

    def quadratic(params, batch):
        return 0.5 * jnp.sum(a * (params["w"] - target) ** 2), {}

    recipe = (ewc({"w": importance}, strength=5.0),)
    end, _ = trained(recipe, quadratic, params, steps=600, tx=optax.sgd(0.03))
    pull = 5.0 * importance
    expected = (a * target + pull * np.asarray(params["w"])) / (a + pull)
    np.testing.assert_allclose(end["w"], expected, atol=1e-6)
    progress = np.abs(end["w"] - params["w"]) / np.abs(target - params["w"])
    assert progress[0] < 0.02
    assert progress[2] > 0.999


def test_with_sgd_l2sp_is_decay_towards_the_start():
    params = {"w": jnp.array([0.2, -1.0])}
    gradient, rate, strength = np.array([1.0, -2.0]), 0.1, 0.5
    end, _ = trained(
        (l2sp(strength),),
        lambda p, b: (jnp.vdot(p["w"], gradient), {}),
        params,
        steps=5,
        tx=optax.sgd(rate),
    )
    delta = np.zeros(2)
    for _ in range(5):
        delta = (1 - rate * strength) * delta - rate * gradient
    np.testing.assert_allclose(end["w"] - params["w"], delta, rtol=1e-12)


def test_under_lora_the_penalty_is_that_of_the_merged_parameters(found, params):
    recipe = (lora(rank=2, also_train="readouts_*/**"), ewc(found, strength=10.0))
    init, step = jaxft.finetune(wavy, recipe, optax.adam(1e-2))
    state, _ = step(init(KEY, params), None)
    merged, consts = jaxft.merge(recipe, state), base.init(recipe, KEY, params)[1]
    _, info = step(state, None)
    wanted = base.penalties(recipe, merged, consts, None)["ewc"]
    assert float(wanted) > 0
    assert float(info["penalty/ewc"]) == pytest.approx(float(wanted), rel=1e-9)


def test_under_freeze_a_strong_leash_shortens_the_way(found, params):
    largest = max(np.max(leaf) for leaf in jax.tree.leaves(found.values))

    def way(*more):
        recipe = (freeze("interactions_*/**"), *more)
        end, _ = trained(recipe, wavy, params, steps=50, tx=optax.sgd(0.02))
        delta = jax.tree.map(lambda x, y: x - y, end, params)
        frozen = {p: d for p, d in tree.flatten(delta).items() if p.startswith("interactions_")}
        assert not any(np.any(d) for d in frozen.values())
        weighted = jax.tree.map(lambda f, d: float(np.sum(f * d**2)), found.values, delta)
        return sum(jax.tree.leaves(weighted))

    assert way(ewc(found, strength=50 / largest)) < 0.1 * way()


@pytest.mark.parametrize("strength", [-1.0, np.nan, np.inf])
def test_strength_is_finite_and_not_negative(strength, params):
    with pytest.raises(ValueError, match=r"ewc\(strength=.*use a finite number >= 0"):
        ewc(params, strength=strength)
    with pytest.raises(ValueError, match=r"l2sp\(strength=.*use a finite number >= 0"):
        l2sp(strength)


def test_l2sp_refuses_patterns_that_match_nothing(params):
    with pytest.raises(ValueError, match="matches none of 35 parameter leaves;\nclosest: "):
        base.check((l2sp(1.0, where="readout_*/**"),), params)


# --- whose Fisher it is ---------------------------------------------------------------------------


def test_the_fisher_of_another_model_is_refused_before_compilation(found, params):
    other = jax.tree.map(lambda x: x, params)
    leaf = other["readouts_0"]["linear"]["0e"]
    other["readouts_0"]["linear"]["0e"] = leaf.at[0].multiply(1.001)
    recipe = (ewc(found, strength=1.0, name="memory"),)
    with pytest.raises(ValueError, match="'memory' has the Fisher of another model") as caught:
        jaxft.describe(recipe, other)
    assert digest(params) in str(caught.value)
    assert digest(other) in str(caught.value)
    with pytest.raises(ValueError, match="'memory' has the Fisher of another model"):
        jaxft.finetune(wavy, recipe, optax.sgd(1.0))[0](KEY, other)


def test_a_fisher_of_other_leaves_is_refused_with_their_difference(params):
    flat = {path: np.ones(leaf.shape) for path, leaf in tree.flatten(params).items()}
    flat["extra"] = np.ones(2)
    flat["readouts_0/linear/0e"] = np.ones((4, 3))
    with pytest.raises(ValueError, match="Fisher of other parameters") as caught:
        jaxft.describe((ewc(tree.unflatten(flat), strength=1.0),), params)
    lines = str(caught.value).splitlines()
    assert lines[1:4] == [
        "- readouts_0/linear/0e (4, 1)",
        "+ extra (2,)",
        "+ readouts_0/linear/0e (4, 3)",
    ]


def test_a_fisher_too_large_for_the_dtype_is_refused():
    with pytest.raises(ValueError, match=r"'w' reaches 1.0e\+50, which is infinite in float32"):
        base.trains((ewc({"w": np.array([1e50])}, strength=1.0),), {"w": np.ones(1, np.float32)})


def test_a_fisher_fits_its_model_in_both_dtypes(found, params):
    single = jax.tree.map(lambda x: x.astype("float32"), params)
    assert digest(single) == digest(params)
    _, consts = base.init((ewc(found, strength=1.0),), KEY, single)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(consts)} == {"float32"}


def test_digest_knows_names_shapes_and_numbers():
    tree = {"a": np.arange(6.0)}
    others = [
        {"b": np.arange(6.0)},
        {"a": np.arange(6.0).reshape(2, 3)},
        {"a": np.arange(6.0) + 1e-3},
    ]
    assert len({digest(tree), *map(digest, others)}) == 4
    assert digest({"x": np.ones(1), "a": np.ones(2)}) == digest({"a": np.ones(2), "x": np.ones(1)})


def test_a_config_names_l2sp_and_a_fisher_by_its_file(found, model, params, tmp_path):
    path = save(tmp_path / "base.fisher", found)
    document = {
        "model": "base.jaxft",
        "output": "run",
        "train": "train.xyz",
        "e0s": "estimated",
        "epochs": 1,
        "recipe": [
            {"strategy": "ewc", "fisher": str(path), "strength": 1e3},
            {"strategy": "l2sp", "strength": 0.1, "where": "readouts_*/**", "name": "readouts"},
        ],
    }
    settings = config.validate(document, "the test")
    setting = Setting(model, params, Keys())
    recipe = config.strategies(settings, setting)
    near, consts = moved(params, recipe)
    got = base.penalties(recipe, near, consts, None)
    expected = (ewc(found, strength=1e3), l2sp(0.1, where="readouts_*/**", name="readouts"))
    assert got == base.penalties(expected, near, base.init(expected, KEY, params)[1], None)
    assert f"fisher: {path}" in config.to_yaml(settings)
    document["recipe"][0]["fisher"] = str(tmp_path / "none.fisher")
    with pytest.raises(ValueError, match=re.escape("none.fisher is not a Fisher")):
        config.strategies(config.validate(document, "the test"), setting)


def test_a_fisher_of_jax_arrays_serves_as_well(params):
    recipe = (ewc(jax.tree.map(jax.numpy.ones_like, params), strength=1.0),)
    init, _ = jaxft.finetune(lambda p, b: (0.0, {}), recipe, optax.sgd(1e-3))
    state = init(jax.random.key(0), params)
    fisher = state.frozen.consts["ewc"]["fisher"]
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(fisher))
