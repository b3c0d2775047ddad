"""The low-rank family: LoRA and its scalings, torch MACE's LoRA, ELoRA, DoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import jaxft
from jaxft import testing, tree
from jaxft.strategies import base
from jaxft.strategies.dora import dora
from jaxft.strategies.elora import elora
from jaxft.strategies.lora import layer_kind, lora, lora_torch

KEY = jax.random.key(3)
FAMILY = {
    "lora-classic": lora(rank=2, alpha=2.0, scaling="classic"),
    "lora-rslora": lora("**/skip_tp/*", rank=1, scaling="rslora", init_std=0.1),
    "lora-torch": lora_torch(rank=2, name="torch"),
    "elora": elora(rank=2, alpha=3.0),
    "dora": dora(rank=2),
    "dora-per-element": dora("**/skip_tp/*", rank=1, also_train="readouts_*/**", name="elements"),
}
family = pytest.mark.parametrize("strategy", FAMILY.values(), ids=FAMILY.keys())

SHAPES = {
    "node_embedding/linear/0e": (2, 4),
    "interactions_0/linear_up/0e": (4, 4),
    "interactions_0/conv_tp_weights/layer0": (4, 4),
    "interactions_0/linear/0e": (4, 4),
    "interactions_0/skip_tp/0e": (2, 4, 4),
    "products_0/symmetric_contractions/0e/weights_max": (2, 4, 4),
    "products_0/symmetric_contractions/0e/weights_0": (2, 4, 4),
    "products_0/linear/0e": (4, 4),
    "readouts_0/linear/0e": (4, 1),
}
TOY = tree.unflatten(
    {path: jnp.asarray(np.random.default_rng(7).normal(size=s)) for path, s in SHAPES.items()}
)
"""A leaf of each kind; where only numbers matter."""

MATRIX = {"x": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5)))}}
"""A leaf of two elements, six inputs and five outputs."""


def factors(strategy, params, key=KEY):
    coords, _ = base.init((strategy,), key, params)
    return tree.flatten(coords[strategy.name])


def shapes_of(strategy, params):
    return jax.eval_shape(lambda: factors(strategy, params))


def drawn(strategy, params):
    """Coordinates as after a training."""
    found = shapes_of(strategy, params)
    rng = np.random.default_rng(1)
    return {path: jnp.asarray(rng.normal(size=value.shape)) for path, value in found.items()}


def applied(strategy, params, coords):
    return tree.flatten(strategy.apply(params, tree.unflatten(coords), {}))


# --- laws -----------------------------------------------------------------------------------------


def test_the_family_is_lawful_together(predictor, params, batch):
    recipe = tuple(FAMILY[name] for name in ("lora-torch", "elora", "dora"))
    testing.assert_lawful(recipe, predictor, params, batch)


@family
def test_the_family_is_the_identity_at_init_compiled_or_not(strategy):
    coords = tree.unflatten(factors(strategy, TOY))
    plain = tree.flatten(strategy.apply(TOY, coords, {}))
    compiled = tree.flatten(jax.jit(strategy.apply)(TOY, coords, {}))
    for path, leaf in tree.flatten(TOY).items():
        assert np.array_equal(plain[path], leaf), path
        assert np.array_equal(compiled[path], leaf), path


@family
def test_the_family_trains_lawfully(strategy):
    def distance(params, target):
        return sum(jnp.sum((leaf - target) ** 2) for leaf in jax.tree.leaves(params)), {}

    finetuned = jaxft.finetune(distance, (strategy,), optax.adamw(1e-3, weight_decay=0.1))
    testing.assert_trains_lawfully(finetuned, jaxft.merge, (strategy,), TOY, jnp.ones(()))


@family
def test_at_init_b_learns_and_a_does_not(strategy):
    def loss(coords):
        leaves = jax.tree.leaves(strategy.apply(TOY, coords, {}))
        return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in leaves)

    gradient = jax.jit(jax.grad(loss))(tree.unflatten(factors(strategy, TOY)))
    for path, value in tree.flatten(gradient).items():
        assert bool(jnp.any(value)) != path.endswith("/A"), path


@family
def test_the_trained_numbers_are_those_of_the_shapes_of(strategy, params):
    found = shapes_of(strategy, params)
    given = tree.flatten(params)
    expected = sum(
        leaf.size for path, leaf in given.items() if tree.flatten(strategy.trains(params))[path]
    )
    for path in (key.removesuffix("/A") for key in found if key.endswith("/A")):
        *lead, n_in, n_out = given[path].shape
        a, b = found[f"{path}/A"], found[f"{path}/B"]
        rank, is_shared = a.shape[-1], b.ndim < a.ndim
        expected += rank * (np.prod(lead, dtype=int) * n_in)
        expected += rank * n_out * (1 if is_shared else np.prod(lead, dtype=int))
        expected += np.prod(lead, dtype=int) * n_out if f"{path}/g" in found else 0
    (last,) = jaxft.describe((strategy,), params).splitlines()[-1:]
    assert last.startswith(f"trainable params: {expected:,} ||")


@family
def test_the_family_names_whom_to_cite(strategy):
    wanted = {
        "lora-classic": ("hu2021lora",),
        "lora-rslora": ("hu2021lora", "kalajdzievski2023rslora"),
        "lora-torch": ("hu2021lora", "batatia2022mace"),
        "elora": ("wang2025elora",),
    }
    name = next(name for name, member in FAMILY.items() if member is strategy)
    assert strategy.cites == wanted.get(name, ("liu2024dora",))


# --- scalings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaling", "scale"), [("torch", 3 / 8), ("classic", 3 / 4), ("rslora", 3 / 2)]
)
@pytest.mark.parametrize("make", [lora, dora])
def test_a_scaling_is_a_power_of_the_rank(make, scaling, scale):
    strategy = make("x/w", rank=4, alpha=3.0, scaling=scaling)
    w, coords = np.asarray(MATRIX["x"]["w"]), drawn(strategy, MATRIX)
    change = np.asarray(coords["x/w/A"] @ coords["x/w/B"])
    if make is lora:
        expected = w + scale * change
    else:
        v = w + scale * change
        length, turned = (np.sqrt((m**2).sum(axis=-2, keepdims=True)) for m in (w, v))
        expected = (1 + np.asarray(coords["x/w/g"])[:, None, :]) * length / turned * v
    found = applied(strategy, MATRIX, coords)["x/w"]
    np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize("std", [1.0, 0.01])
@pytest.mark.parametrize("make", [lora, dora])
def test_a_starts_with_the_std_asked_for(make, std, params):
    found = factors(make("**/layer1", rank=60, init_std=std), params)
    a = np.asarray(found["interactions_0/conv_tp_weights/layer1/A"])
    assert abs(a.std() / std - 1) < 0.05  # of 3840 numbers: four times its own deviation
    assert not found["interactions_0/conv_tp_weights/layer1/B"].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora(scaling="linear"), r"lora\(scaling='linear'\).*\nuse one of 'torch', 'cl"),
        (lambda: dora(scaling="linear"), r"dora\(scaling='linear'\)"),
        (lambda: lora(alpha=0.0), r"lora\(alpha=0.0\) would never learn .*; use a positive"),
        (lambda: lora(init_std=0.0), r"lora\(init_std=0.0\) would never learn"),
        (lambda: elora(alpha=float("inf")), r"elora\(alpha=inf\)"),
        (lambda: elora(rank=0), r"elora\(rank=0\) is not a rank"),
        (lambda: lora(rank=2.5), r"lora\(rank=2.5\) is not a rank"),
        (lambda: lora_torch(rank=0), r"lora_torch\(rank=0\) is not a rank"),
        (
            lambda: lora_torch(init="e3nn"),
            r"lora_torch\(init='e3nn'\).*; use 'torch' .* or 'small'",
        ),
    ],
)
def test_numbers_and_names_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dora_refuses_what_lora_refuses(params):
    with pytest.raises(ValueError, match=r"dora\(rank=4\) is not low rank for 'readouts_0/linear/"):
        base.check((dora("readouts_*/**", rank=4),), params)
    with pytest.raises(ValueError, match=r"dora\(\) was asked to adapt 'b' of shape \(3,\), which"):
        base.check((dora("b", rank=1),), {"b": jnp.ones(3)})


# --- torch MACE's LoRA ----------------------------------------------------------------------------


def test_torch_lora_scales_by_the_kind_of_layer():
    strategy = lora_torch(rank=4, alpha=3.0)
    coords = drawn(strategy, TOY)
    found, given = applied(strategy, TOY, coords), tree.flatten(TOY)
    scales = {"equivariant": 3 * 4**-1.5, "dense": 3 / 4}
    for path, leaf in given.items():
        kind = layer_kind(path, leaf)
        if kind is None:
            assert found[path] is leaf
            continue
        change = scales[kind] * coords[f"{path}/A"] @ coords[f"{path}/B"]
        np.testing.assert_allclose(found[path], leaf + change, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("init", "std"), [("torch", 1.0), ("small", 1e-3)])
def test_torch_lora_starts_as_torchs_does_or_small_everywhere(init, std):
    square = np.ones((64, 64))
    layer = {"conv_tp_weights": {"layer0": square}, "linear_up": {"0e": square}}
    found = factors(lora_torch(rank=64, init=init), {"interactions_0": layer})
    dense, equivariant = (np.asarray(value) for key, value in found.items() if key.endswith("A"))
    assert abs(dense.std() / 1e-3 - 1) < 0.05  # of 4096 numbers: four times its own deviation
    assert abs(equivariant.std() / std - 1) < 0.05


def test_torch_lora_adapts_readouts_at_any_rank_and_no_tensor_product(params):
    adapted = {path.rpartition("/")[0] for path in shapes_of(lora_torch(rank=16), params)}
    assert {"readouts_0/linear/0e", "readouts_1/linear_2/0e"} <= adapted
    assert not [path for path in adapted if "skip_tp" in path or "contractions" in path]


def test_layers_are_told_apart_by_name_and_shape():
    matrix, vector, table = (np.ones(shape) for shape in ((2, 3), (3,), (4, 2, 3)))
    for path in (
        "node_embedding/linear/0e",
        "interactions_1/source_embedding/0e",
        "interactions_0/linear_res/1o",
        "interactions_0/skip_tp/0e",
        "readouts_1/linear_mid/0e",
        "embedding_readout/linear/0e",
    ):
        assert layer_kind(path, matrix) == "equivariant"
    for path in (
        "interactions_0/density_fn/layer0",
        "interactions_0/conv_tp_weights/net_3/weight",
        "joint_embedding/project",
        "joint_embedding/embedders_field/net_2/weight",
    ):
        assert layer_kind(path, matrix) == "dense"
    assert layer_kind("joint_embedding/embedders_total_charge/weight", matrix) is None
    assert layer_kind("interactions_0/skip_tp/0e", table) is None
    for path in ("readouts_1/linear_mid/bias", "interactions_0/conv_tp_weights/net_1/weight"):
        assert layer_kind(path, vector) is None


# --- ELoRA ----------------------------------------------------------------------------------------


def test_elora_updates_a_table_of_elements_by_low_rank_as_a_whole():
    strategy = elora(rank=2, alpha=3.0)
    coords = drawn(strategy, TOY)
    found, given = applied(strategy, TOY, coords), tree.flatten(TOY)
    tables = [path for path, leaf in given.items() if leaf.ndim == 3 and f"{path}/A" in coords]
    assert len(tables) == 2
    for path in tables:
        a, b = (np.asarray(coords[f"{path}/{factor}"]) for factor in "AB")
        change = np.asarray(found[path] - given[path]).reshape(-1, b.shape[-1])
        assert np.linalg.matrix_rank(change, tol=1e-10) == 2
        np.testing.assert_allclose(change, 1.5 * a.reshape(-1, 2) @ b, atol=1e-13)


def test_elora_trains_lower_orders_in_full_and_adapts_all_else(params):
    strategy = elora(rank=2)
    given = tree.flatten(params)
    whole = {path for path, trains in tree.flatten(strategy.trains(params)).items() if trains}
    adapted = {path.rpartition("/")[0] for path in shapes_of(strategy, params)}
    assert whole == {path for path in given if "/weights_" in path and "max" not in path}
    assert whole | adapted == set(given)
    assert not whole & adapted


def test_elora_starts_contractions_smaller_by_their_number_of_paths():
    params = {
        "products_0": {"symmetric_contractions": {"0e": {"weights_max": jnp.ones((9, 23, 4))}}}
    }
    a = factors(elora(rank=16), params)["products_0/symmetric_contractions/0e/weights_max/A"]
    assert a.shape == (9, 23, 16)
    assert abs(float(a.std()) * 23 - 1) < 0.07  # of 3312 numbers


def test_elora_is_content_with_contractions_of_order_one():
    params = {
        "products_0": {"symmetric_contractions": {"0e": {"weights_max": jnp.ones((2, 1, 3))}}}
    }
    base.check((elora(),), params)


# --- DoRA -----------------------------------------------------------------------------------------


def test_dora_sets_lengths_by_g_and_directions_by_the_factors():
    strategy = dora("x/w", rank=2)
    w, coords = np.asarray(MATRIX["x"]["w"]), drawn(strategy, MATRIX)
    found = np.asarray(applied(strategy, MATRIX, coords)["x/w"])
    lengths = np.linalg.norm(found, axis=-2) / np.linalg.norm(w, axis=-2)
    np.testing.assert_allclose(lengths, np.abs(1 + np.asarray(coords["x/w/g"])), rtol=1e-13)
    turned = w + 2**-1.5 * np.asarray(coords["x/w/A"] @ coords["x/w/B"])
    cosines = (found * turned).sum(axis=-2) / (
        np.linalg.norm(found, axis=-2) * np.linalg.norm(turned, axis=-2)
    )
    np.testing.assert_allclose(cosines, np.sign(1 + np.asarray(coords["x/w/g"])), rtol=1e-13)


def test_dora_without_an_update_scales_columns():
    strategy = dora("x/w", rank=2)
    coords = {**factors(strategy, MATRIX), "x/w/g": jnp.full((2, 5), 0.5)}
    np.testing.assert_array_equal(applied(strategy, MATRIX, coords)["x/w"], 1.5 * MATRIX["x"]["w"])


def test_dora_gradients_are_those_of_finite_differences():
    strategy = dora("x/w", rank=2)
    weights = jnp.asarray(np.random.default_rng(4).normal(size=MATRIX["x"]["w"].shape))

    @jax.jit
    def value(coords):
        return jnp.sum(weights * applied(strategy, MATRIX, coords)["x/w"])

    check_grads(value, (drawn(strategy, MATRIX),), order=1, modes=("rev",), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dora_is_finite_where_a_column_is_zero_or_vanishes(dtype):
    """The first column is zero; the update cancels the second one exactly."""
    w = jnp.asarray([[0.0, 1.0, 3.0], [0.0, 2.0, 1.0], [0.0, -1.0, 1.0]], dtype)
    strategy = dora("w", rank=1, scaling="classic")
    coords = {
        "w/A": jnp.asarray([[1.0], [2.0], [-1.0]], dtype),
        "w/B": jnp.asarray([[2.0, -1.0, 0.5]], dtype),
        "w/g": jnp.asarray([0.5, 0.0, 0.0], dtype),
    }

    @jax.jit
    def value(coords):
        return jnp.sum(jnp.sin(applied(strategy, {"w": w}, coords)["w"]))

    found = applied(strategy, {"w": w}, coords)["w"]
    assert found.dtype == dtype
    np.testing.assert_allclose(
        found[:, 0], 1.5 * np.array([2.0, 4.0, -2.0])
    )  # as LoRA, times 1 + g
    np.testing.assert_array_equal(found[:, 1], 0.0)
    for leaf in jax.tree.leaves(jax.grad(value)(coords)):
        assert np.isfinite(leaf).all()
    at_init = factors(strategy, {"w": w})
    np.testing.assert_array_equal(applied(strategy, {"w": w}, at_init)["w"], w)
    for leaf in jax.tree.leaves(jax.grad(value)(at_init)):
        assert np.isfinite(leaf).all()
