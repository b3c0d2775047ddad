"""Pulls towards the start: l2sp, ewc, and the Fisher that ewc needs."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import labelled
from safetensors.numpy import save_file

import jaxft
from jaxft import config, data, fisher, tree
from jaxft.fisher import load, save
from jaxft.strategies import base, ewc, freeze, l2sp, lora
from jaxft.strategies.ewc import digest

KEY = jax.random.key(0)


def linear(params, example):
    """Least squares of one frame: ½ (w·x - y)²."""
    x, y = example
    return 0.5 * (jnp.vdot(params["w"], x) - y) ** 2, {}


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(1)
    return [(rng.normal(size=4), rng.normal()) for _ in range(7)]


@pytest.fixture(scope="module")
def start():
    return {"w": jnp.array([0.3, -1.0, 2.0, 0.1])}


def one_by_one(frames, model, *, shape=None):
    """Batches of one frame, all of one static shape: one compilation for all tests."""
    dataset = data.prepare(frames, model, row_width=16)
    shape = shape or data.shapes(dataset, 1)[-1]
    return [data.pack(dataset, [i], shape, "float64") for i in range(len(frames))]


@pytest.fixture(scope="module")
def singles(frames, model):
    """Labelled by another model."""
    return one_by_one(frames, model)


def wavy(params, batch):
    """A loss with a gradient for every number of the tree; cheap to compile."""
    return sum(jnp.sum(jnp.sin(leaf + i)) for i, leaf in enumerate(jax.tree.leaves(params))), {}


@pytest.fixture(scope="module")
def found(objective, params, singles):
    return fisher(objective, params, singles)


def by_hand(examples, start):
    """Squared gradients per frame, ((w·x - y) x)², and losses."""
    w = np.asarray(start["w"])
    residuals = np.array([w @ x - y for x, y in examples])
    return (residuals[:, None] * np.array([x for x, _ in examples])) ** 2, residuals**2 / 2


def trained(recipe, loss, params, *, steps, tx=None, batch=None):
    init, step = jaxft.finetune(loss, recipe, tx or optax.adam(1e-2))
    state = init(KEY, params)
    for _ in range(steps):
        state, info = step(state, batch)
    return jaxft.merge(recipe, state), info


def assert_bitwise(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- the Fisher -----------------------------------------------------------------------------------


def test_fisher_is_the_mean_of_squared_gradients(examples, start):
    squares, losses = by_hand(examples, start)
    found = fisher(linear, start, examples)
    np.testing.assert_allclose(found.values["w"], squares.mean(0), rtol=1e-12)
    assert found.provenance["frames"] == 7
    np.testing.assert_allclose(found.provenance["mean_loss"], losses.mean(), rtol=1e-12)
    assert found.parameters == digest(start)


def test_fisher_takes_the_first_n_and_tells_its_progress(examples, start):
    squares, _ = by_hand(examples, start)
    seen = []
    found = fisher(linear, start, iter(examples), n=3, progress=lambda *at: seen.append(at))
    np.testing.assert_allclose(found.values["w"], squares[:3].mean(0), rtol=1e-12)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_fisher_leaves_frames_of_large_loss_out_of_sum_and_count(examples, start):
    squares, losses = by_hand(examples, start)
    threshold = float(np.sort(losses)[4])  # itself left out
    found = fisher(linear, start, examples, threshold=threshold)
    np.testing.assert_allclose(found.values["w"], squares[losses < threshold].mean(0), rtol=1e-12)
    assert (found.provenance["frames"], found.provenance["skipped"]) == (4, 3)
    with pytest.raises(ValueError, match=r"all 7 frames reach the threshold 1e-09; the smallest"):
        fisher(linear, start, examples, threshold=1e-9)


@pytest.mark.parametrize(("how", "of"), [("mean", np.mean), ("max", np.max)])
def test_fisher_is_normalised_on_request(how, of, examples, start):
    plain = fisher(linear, start, examples)
    found = fisher(linear, start, examples, normalise=how)
    assert of(found.values["w"]) == pytest.approx(1.0, rel=1e-12)
    back = found.values["w"] * found.provenance["scale"]
    np.testing.assert_allclose(back, plain.values["w"], rtol=1e-12)


def test_twice_the_loss_is_four_times_the_fisher(examples, start):
    once = fisher(linear, start, examples)
    twice = fisher(lambda p, b: (2 * linear(p, b)[0], {}), start, examples)
    np.testing.assert_allclose(twice.values["w"], 4 * once.values["w"], rtol=1e-12)


def test_small_float32_gradients_do_not_vanish_when_squared():
    params = {"w": np.float32(0.0)}
    found = fisher(lambda p, x: (1e-25 * p["w"] * x, {}), params, [np.float32(1.0)])
    assert float(found.values["w"]) == pytest.approx(1e-50, rel=1e-6)


def test_fisher_of_a_potential_does_not_see_the_padding(frames, model, found, objective, params):
    shape = data.Shape(24, 40, 4)
    roomy = one_by_one(frames[:2], model, shape=shape)
    tight = one_by_one(frames, model)[:2]
    assert roomy[0].graph.n_node > tight[0].graph.n_node
    a, b = (fisher(objective, params, batches).values for batches in (roomy, tight))
    for (path, x), y in zip(tree.flatten(a).items(), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-12 * np.max(y), err_msg=path)


def test_fisher_of_a_potential_is_the_mean_of_those_of_its_frames(
    found, objective, params, singles
):
    each = [fisher(objective, params, [batch]) for batch in singles]
    for path, leaf in tree.flatten(found.values).items():
        mean = np.mean([tree.flatten(e.values)[path] for e in each], axis=0)
        np.testing.assert_allclose(leaf, mean, rtol=1e-12)
        assert (leaf >= 0).all()


def test_fisher_compiles_once_per_shape():
    traced = []

    def counting(params, x):
        traced.append(x.shape)
        return jnp.sum(params["w"] * x), {}

    for _ in range(2):
        fisher(counting, {"w": jnp.ones(())}, [np.ones(2), np.ones(3), np.ones(2), np.ones(3)])
    assert traced == [(2,), (3,)]


def test_fisher_refuses_batches_of_several_frames(objective, params, batch):
    with pytest.raises(ValueError, match=r"batch 0 holds 8 frames; .*one frame per batch"):
        fisher(objective, params, [batch])


def test_fisher_refuses_labels_of_the_model_itself(
    frames, model, params, predictor, objective, start, examples
):
    own = labelled(model, params, predictor, frames)
    rounded = [
        data.Frame(
            f.atomic_numbers,
            f.positions,
            f.cell,
            f.pbc,
            energy=round(f.energy, 6),
            forces=np.round(f.forces, 8),
            source=f.source,
        )
        for f in own
    ]
    for given in (own, rounded):
        with pytest.raises(ValueError, match=r"A Fisher of self-labelled data is zero") as caught:
            fisher(objective, params, one_by_one(given, model))
        assert "labels of the pretraining data" in " ".join(str(caught.value).split())
    exact = [(x, float(np.asarray(start["w"]) @ x)) for x, _ in [(np.eye(4)[0], 0)]]
    with pytest.raises(ValueError, match=r"loss of these 1 frames is 0.0e\+00 .*by this model"):
        fisher(linear, start, exact, normalise="mean")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "takes no frame"),
        ({"normalise": "sum"}, "'sum'.* is unknown"),
        ({"batches": []}, "no batches"),
        ({"batches": [(np.ones(4), np.nan)]}, "the loss of batch 0 is nan"),
    ],
)
def test_fisher_refuses(arguments, message, examples, start):
    with pytest.raises(ValueError, match=message):
        fisher(linear, start, **{"batches": examples} | arguments)


def test_fisher_names_a_gradient_that_is_not_finite():
    def root(params, x):
        return jnp.sqrt(params["w"] * x).sum(), {}

    with pytest.raises(ValueError, match="gradient of batch 1 at 'w' is not finite"):
        fisher(root, {"w": jnp.ones(2)}, [np.ones(2), np.array([1.0, 0.0]) * 0.0])


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


def test_strength_zero_is_plain_fine_tuning_bitwise(found, objective, params, singles):
    recipe = (ewc(found, strength=0.0), l2sp(0.0))
    plain, _ = trained((), objective, params, steps=3, batch=singles[0])
    leashed, info = trained(recipe, objective, params, steps=3, batch=singles[0])
    assert_bitwise(plain, leashed)
    assert float(info["penalty/ewc"]) == float(info["penalty/l2sp"]) == 0.0
    infinite = jax.tree.map(lambda x: np.full(x.shape, np.inf), params)
    _, consts = base.init(recipe, KEY, params)
    assert all(float(p) == 0.0 for p in base.penalties(recipe, infinite, consts, None).values())


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


def test_the_fisher_of_another_model_is_refused_before_compilation(found, objective, params):
    other = jax.tree.map(lambda x: x, params)
    leaf = other["readouts_0"]["linear"]["0e"]
    other["readouts_0"]["linear"]["0e"] = leaf.at[0].multiply(1.001)
    recipe = (ewc(found, strength=1.0, name="memory"),)
    with pytest.raises(ValueError, match="'memory' has the Fisher of another model") as caught:
        jaxft.describe(recipe, other)
    assert digest(params) in str(caught.value)
    assert digest(other) in str(caught.value)
    with pytest.raises(ValueError, match="'memory' has the Fisher of another model"):
        jaxft.finetune(objective, recipe, optax.sgd(1.0))[0](KEY, other)


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


# --- files ----------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(found, tmp_path, objective, params, singles):
    given = fisher(objective, params, singles, n=2, provenance={"loss": {"energy": 1.0}})
    path = save(tmp_path / "new" / "base.fisher", given)
    again = load(path)
    assert_bitwise(given.values, again.values)
    assert set(tree.flatten(given.values)) == set(tree.flatten(again.values))
    assert again.parameters == given.parameters == digest(params)
    assert again.provenance == given.provenance
    assert again.provenance["loss"] == {"energy": 1.0}
    assert [p.name for p in path.parent.iterdir()] == ["base.fisher"]


def test_saving_overwrites_nothing(found, tmp_path):
    path = tmp_path / "base.fisher"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        save(path, found)
    assert path.read_text() == "mine"


def header(record):
    return {"format": "jaxft-fisher", "version": "1", "record": record}


RECORD = json.dumps({"parameters": None, "provenance": {}})
ONES = {"w": np.ones(2)}


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        (ONES, None, "says format None"),
        (ONES, header(RECORD) | {"version": "2"}, "version '2'"),
        (ONES, header("{"), "is not a Fisher"),
        (ONES, header("[" * 100_000), "is not a Fisher"),
        (ONES, header("{}"), "is not a Fisher"),
        (ONES, header(json.dumps({"parameters": None, "provenance": 3})), "is not a Fisher"),
        ({"w": -np.ones(2)}, header(RECORD), "negative or non-finite numbers in 'w'"),
        ({"w": np.ones(2), "w/x": np.ones(2)}, header(RECORD), "is not a Fisher"),
        ({"w": np.zeros(2)}, header(RECORD), "zero everywhere"),
    ],
)
def test_files_that_are_no_fisher_are_refused(arrays, metadata, message, tmp_path):
    save_file(arrays, tmp_path / "x.fisher", metadata=metadata)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "x.fisher")
    assert str(caught.value).startswith(f"{tmp_path / 'x.fisher'} is not a Fisher")


def test_absent_and_cut_files_are_refused(found, tmp_path):
    with pytest.raises(ValueError, match="is not a Fisher"):
        load(tmp_path / "none.fisher")
    whole = save(tmp_path / "base.fisher", found).read_bytes()
    (tmp_path / "cut.fisher").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a Fisher"):
        load(tmp_path / "cut.fisher")


def test_a_config_names_l2sp_and_a_fisher_by_its_file(found, params, tmp_path):
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
    recipe = config.strategies(settings)
    near, consts = moved(params, recipe)
    got = base.penalties(recipe, near, consts, None)
    expected = (ewc(found, strength=1e3), l2sp(0.1, where="readouts_*/**", name="readouts"))
    assert got == base.penalties(expected, near, base.init(expected, KEY, params)[1], None)
    assert f"fisher: {path}" in config.to_yaml(settings)
    document["recipe"][0]["fisher"] = str(tmp_path / "none.fisher")
    with pytest.raises(ValueError, match=re.escape("none.fisher is not a Fisher")):
        config.strategies(config.validate(document, "the test"))
