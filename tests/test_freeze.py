"""Freezing by level and by named part."""

import jax
import numpy as np
import pytest

import jaxft
from jaxft import testing, tree
from jaxft.strategies import base
from jaxft.strategies.freeze import GROUPS, LEVELS, freeze, groups


def trained(strategy, params):
    return {path for path, trains in tree.flatten(strategy.trains(params)).items() if trains}


def parts(params, *prefixes):
    return {path for path in tree.flatten(params) if path.startswith(prefixes)}


@pytest.mark.parametrize(
    ("levels", "prefixes"),
    [
        ((1, 2, 3, 4), ("interactions_", "products_", "readouts_")),
        ((5,), ("products_", "readouts_")),
        ((6,), ("readouts_",)),
    ],
)
def test_a_level_leaves_the_later_parts_to_train(levels, prefixes, params):
    for level in levels:
        assert trained(freeze(level=level), params) == parts(params, *prefixes)


def test_a_level_is_the_patterns_that_it_stands_for(params):
    patterns = [pattern for word in LEVELS[5] for pattern in GROUPS[word]]
    assert freeze(level=5).trains(params) == freeze(patterns).trains(params)


def test_the_last_level_leaves_nothing_to_train(params):
    with pytest.raises(ValueError, match=r"\(freeze\) leaves nothing to train: all 35 leaves"):
        jaxft.describe((freeze(level=7),), params)


@pytest.mark.parametrize("level", [-1, 0, 8])
def test_a_level_that_does_not_exist_is_an_error(level):
    with pytest.raises(ValueError, match=rf"level={level}\) is none of .* levels 1 to 7;\nfor any"):
        freeze(level=level)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "neither of `where` and `except_`"),
        ({"where": "**", "level": 1}, "both of `where` and `level`"),
        ({"except_": "**", "level": 1}, "both of `except_` and `level`"),
        ({"where": "**", "except_": "**", "level": 1}, "all of `where` and `except_` and `level`"),
    ],
)
def test_freeze_wants_one_of_its_arguments(arguments, words):
    with pytest.raises(ValueError, match=f"freeze.. was given {words}; give the leaves to freeze"):
        freeze(**arguments)


def test_frozen_and_trained_numbers_add_up(params):
    for level in range(1, 8):
        kept, moved = tree.partition(params, freeze(level=level).trains(params))
        assert tree.size(kept) + tree.size(moved) == tree.size(params)


def test_every_named_part_is_in_every_model(params):
    for patterns in GROUPS.values():
        assert tree.select(params, patterns)


def test_the_groups_of_a_model_hold_each_leaf_once_in_forward_order(params):
    extra = {"joint_embedding": {"project": np.ones((2, 3))}}
    deep = {**extra, **params, "interactions_10": {"x": np.ones(1)}}
    found = groups(deep)
    assert list(found) == [
        "node_embedding",
        "joint_embedding",
        "interactions_0",
        "products_0",
        "interactions_1",
        "products_1",
        "interactions_10",
        "readouts",
    ]
    paths = [path for patterns in found.values() for path in tree.select(deep, patterns)]
    assert sorted(paths) == sorted(tree.flatten(deep))


def test_levels_keep_the_laws_of_masks(params):
    for level in range(1, 7):
        testing.assert_identity_at_init((freeze(level=level),), params, key=jax.random.key(0))
        testing.assert_keeps_structure((freeze(level=level),), params, key=jax.random.key(0))


def test_a_level_names_whom_to_cite():
    assert freeze("**").cites == ("radova2025frozen",)
    assert freeze(level=5).cites == ("radova2025frozen", "batatia2022mace")


def test_levels_join_other_strategies_by_and(params):
    recipe = (freeze(level=5), freeze("products_0/**", name="first"))
    mask = tree.flatten(base.trains(recipe, params))
    assert {p for p, on in mask.items() if on} == parts(params, "products_1", "readouts_")
