"""What each strategy does and refuses, and the table that describes a recipe."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import tree
from jaxft.describe import rows_of
from jaxft.strategies import Strategy, base, freeze, lora

KEY = jax.random.key(0)


def trained(recipe, params):
    mask = tree.flatten(base.trains(recipe, params))
    return {path for path, trains in mask.items() if trains}


# --- freeze ---------------------------------------------------------------------------------------


def test_freeze_keeps_what_matches_or_all_but_what_matches(params):
    everything = set(tree.flatten(params))
    readouts = {path for path in everything if path.startswith("readouts_")}
    assert trained((freeze("readouts_*/**"),), params) == everything - readouts
    assert trained((freeze(except_="readouts_*/**"),), params) == readouts
    assert trained((), params) == everything


def test_masks_of_several_strategies_are_joined_by_and(params):
    recipe = (freeze("interactions_*/**"), freeze("**/linear/**", name="linears"))
    assert trained(recipe, params) == {
        path
        for path in tree.flatten(params)
        if not path.startswith("interactions_") and "/linear/" not in path
    }


@pytest.mark.parametrize(
    ("arguments", "word"), [({}, "neither"), ({"where": "a", "except_": "b"}, "both")]
)
def test_freeze_wants_exactly_one_of_its_arguments(arguments, word):
    with pytest.raises(ValueError, match=f"{word} of `where` and `except_`; give the leaves"):
        freeze(**arguments)


def test_freeze_of_nothing_is_an_error(params):
    with pytest.raises(ValueError, match="matches none of 35 parameter leaves"):
        base.trains((freeze("interactions_7/**"),), params)


# --- lora -----------------------------------------------------------------------------------------


def test_lora_adds_a_low_rank_product_to_each_matrix_that_matches(params):
    recipe = (lora("interactions_*/skip_tp/*", rank=2, alpha=3.0),)
    coords, consts = base.init(recipe, KEY, params)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(coords["lora"]).items()}
    assert shapes == {
        "interactions_0/skip_tp/0e/A": (5, 4, 2),
        "interactions_0/skip_tp/0e/B": (5, 2, 4),
        "interactions_1/skip_tp/0e/A": (5, 4, 2),
        "interactions_1/skip_tp/0e/B": (5, 2, 4),
    }
    moved = jax.tree.map(lambda x: x + 0.5, coords)
    before = tree.flatten(params)
    after = tree.flatten(base.apply(recipe, params, moved, consts))
    for path, leaf in before.items():
        delta = np.asarray(after[path] - leaf)
        if "skip_tp" in path:
            a, b = (np.asarray(tree.flatten(moved["lora"])[f"{path}/{x}"]) for x in "AB")
            np.testing.assert_allclose(delta, 3.0 * 2**-1.5 * a @ b, atol=1e-14)
            assert set(np.linalg.matrix_rank(delta)) == {1}  # B is constant here
        else:
            assert after[path] is leaf


def test_lora_trains_its_factors_and_also_train_alone(params):
    assert trained((lora(rank=2),), params) == set()
    assert trained((lora(rank=2, also_train="readouts_0/**"),), params) == {"readouts_0/linear/0e"}


def test_lora_starts_normal_times_zero(params):
    coords, _ = base.init((lora("**/layer1", rank=60),), KEY, params)
    flat = {path: np.asarray(x) for path, x in tree.flatten(coords["lora"]).items()}
    assert not flat["interactions_0/conv_tp_weights/layer1/B"].any()
    a = flat["interactions_0/conv_tp_weights/layer1/A"]
    assert abs(a.std() - 1) < 0.05
    assert not np.array_equal(a, flat["interactions_1/conv_tp_weights/layer1/A"])


def test_lora_refuses_a_rank_that_is_not_low(params):
    with pytest.raises(ValueError, match="is not low rank") as caught:
        base.trains((lora("readouts_*/**", rank=4),), params)
    assert str(caught.value) == (
        "lora(rank=4) is not low rank for 'readouts_0/linear/0e' of shape (4, 1);\n"
        "use rank < 1, or leave this leaf out of `where`."
    ) or re.search(r"'readouts_1/linear_1/0e' of shape \(4, 4\);\nuse rank < 4", str(caught.value))


@pytest.mark.parametrize("rank", [0, -3])
def test_lora_refuses_a_rank_below_one(rank):
    with pytest.raises(ValueError, match=rf"lora\(rank={rank}\) is not a rank; use an integer >= "):
        lora(rank=rank)


def test_lora_refuses_what_is_no_matrix(params):
    flat = {"bias": jnp.ones(3), **tree.flatten(params)}
    with pytest.raises(ValueError, match=r"'bias' of shape \(3,\), which is no matrix") as caught:
        base.trains((lora("bias", rank=1),), tree.unflatten(flat))
    assert "leave this leaf out of `where`, or add it to `also_train`" in str(caught.value)


def test_lora_refuses_patterns_that_match_nothing(params):
    for arguments in ({"where": "interaction_*/**"}, {"where": "**/layer1", "also_train": "x/**"}):
        with pytest.raises(ValueError, match="matches none of 35 parameter leaves;\nclosest: "):
            base.trains((lora(**arguments, rank=1),), params)


# --- recipes --------------------------------------------------------------------------------------


def test_strategies_apply_from_left_to_right():
    double = Strategy(name="double", apply=lambda p, c, k: {"x": 2 * p["x"]})
    plus = Strategy(name="plus", apply=lambda p, c, k: {"x": p["x"] + 1})
    empty = {"double": {}, "plus": {}}
    assert base.apply((double, plus), {"x": 3}, empty, empty) == {"x": 7}
    assert base.apply((plus, double), {"x": 3}, empty, empty) == {"x": 8}


def test_only_strategies_with_a_penalty_are_asked(params):
    leash = Strategy(name="leash", penalty=lambda params, consts, batch: consts["x"] * batch)
    found = base.penalties((freeze("**"), leash), params, {"freeze": {}, "leash": {"x": 2.0}}, 3.0)
    assert found == {"leash": 6.0}


def test_coordinates_depend_on_the_key_and_the_name(params):
    def drawn(key, name):
        coords, _ = base.init((lora("**/layer1", rank=1, name=name),), key, params)
        return np.asarray(jax.tree.leaves(coords)[0])

    a = drawn(KEY, "a")
    assert np.array_equal(a, drawn(KEY, "a"))
    assert not np.array_equal(a, drawn(KEY, "b"))
    assert not np.array_equal(a, drawn(jax.random.key(1), "a"))


# --- describe -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        (),
        (freeze(except_="readouts_*/**"),),
        (lora(rank=2, also_train="readouts_*/**"),),
        (lora(rank=2), lora("**/layer1", rank=3, name="more", also_train="**/1o")),
    ],
    ids=["full", "freeze", "lora", "two"],
)
def test_described_numbers_are_those_that_the_optimiser_moves(recipe, params):
    init, _ = jaxft.finetune(lambda p, b: (0.0, {}), recipe, optax.sgd(1e-3))
    moved, total = tree.size(init(KEY, params).trainable), tree.size(params)
    rows = rows_of(recipe, params)
    assert sum(row[3] for row in rows) == moved
    assert [(row[0], row[1]) for row in rows] == [
        (path, leaf.shape) for path, leaf in tree.flatten(params).items()
    ]
    *lines, last = jaxft.describe(recipe, params).splitlines()
    assert last == (
        f"trainable params: {moved:,} || all params: {total:,} || "
        f"trainable%: {100 * moved / total:.2f}"
    )
    assert len(lines) == 1 + len(rows)


def test_described_states_name_the_strategies(params):
    recipe = (lora("**/layer1", rank=2, also_train="readouts_*/**"),)
    states = {row[0]: (row[2], row[3]) for row in rows_of(recipe, params)}
    assert states["interactions_0/conv_tp_weights/layer1"] == ("lora", 2 * (64 + 64))
    assert states["readouts_0/linear/0e"] == ("trained", 4)
    assert states["node_embedding/linear/0e"] == ("frozen", 0)
    assert states["interactions_0/conv_tp_weights/layer3"] == ("frozen", 0)


def test_describe_refuses_what_training_would(params):
    with pytest.raises(ValueError, match="more than one strategy named 'freeze'"):
        jaxft.describe((freeze("**"), freeze("readouts_*/**")), params)
    with pytest.raises(ValueError, match="matches none of 35"):
        jaxft.describe((freeze("nothing"),), params)
