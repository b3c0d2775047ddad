"""Learning rates per group: soft freezing and gradual unfreezing."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import tree
from jaxft.strategies import base, freeze, lora
from jaxft.strategies.delta import delta
from jaxft.strategies.rates import rates
from jaxft.strategies.sparse import sparse

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def start():
    rng = np.random.default_rng(0)
    shapes = {
        "interactions_0/linear/0e": (3, 4),
        "interactions_0/linear/1o": (3, 3),
        "products_0/linear/0e": (4, 4),
        "readouts_0/linear/0e": (4, 1),
    }
    return tree.unflatten({path: jnp.asarray(rng.normal(size=s)) for path, s in shapes.items()})


def wavy(params, batch):
    """A loss with a gradient for every number, of its own at every step."""
    return sum(jnp.sum(jnp.sin(leaf + i)) for i, leaf in enumerate(jax.tree.leaves(params))), {}


def adamw():
    return optax.adamw(1e-2, weight_decay=0.1)


def path_of(recipe, params, *, steps=4, tx=None):
    """Merged parameters after 0, 1, … updates, flat, on the host."""
    init, step = jaxft.finetune(wavy, recipe, tx or adamw())
    state = init(KEY, params)
    found = [host(jaxft.merge(recipe, state))]
    for _ in range(steps):
        state, _ = step(state, None)
        found.append(host(jaxft.merge(recipe, state)))
    return found


def host(params):
    return {path: np.array(leaf) for path, leaf in tree.flatten(params).items()}


def moved(before, after):
    return {path for path in before if (before[path] != after[path]).any()}


def test_factor_1_is_plain_fine_tuning_bitwise(start):
    everything = rates({"interactions_0/**": 1.0, "products_0/**": {"from": 0, "factor": 1}})
    for found, wanted in zip(path_of((everything,), start), path_of((), start), strict=True):
        assert all(found[path].tobytes() == wanted[path].tobytes() for path in wanted)


def test_factor_0_is_freezing_in_value_unless_the_norm_is_clipped(start):
    """What does not move still has a gradient, which enters the norm."""
    still, frozen = (rates({"interactions_0/**": 0}),), (freeze("interactions_0/**"),)
    *_, found = path_of(still, start)
    *_, wanted = path_of(frozen, start)
    assert all(found[path].tobytes() == wanted[path].tobytes() for path in wanted)
    assert moved(host(start), found) == {"products_0/linear/0e", "readouts_0/linear/0e"}
    clip = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))
    *_, found = path_of(still, start, tx=clip)
    *_, wanted = path_of(frozen, start, tx=clip)
    assert moved(found, wanted) == {"products_0/linear/0e", "readouts_0/linear/0e"}


def test_it_scales_the_step_of_adam_and_not_its_gradient(start):
    """The first update of a leaf is the factor times what it would have been."""
    half = (rates({"**/0e": 0.5}),)
    plain, scaled = path_of((), start, steps=1), path_of(half, start, steps=1)
    for path, before in plain[0].items():
        factor = 0.5 if path.endswith("0e") else 1.0
        wanted = before + factor * (plain[1][path] - before)
        np.testing.assert_allclose(scaled[1][path], wanted, rtol=0, atol=1e-15)


def test_groups_thaw_one_after_the_other(start):
    recipe = (
        rates(
            {
                "interactions_0/**": {"from": 2, "factor": 0.1},
                "products_0/**": {"from": 1, "factor": 1},
            }
        ),
    )
    at = path_of(recipe, start)
    new = [moved(a, b) for a, b in itertools.pairwise(at)]
    readouts, products = {"readouts_0/linear/0e"}, {"products_0/linear/0e"}
    interactions = {"interactions_0/linear/0e", "interactions_0/linear/1o"}
    assert new == [readouts, readouts | products, *[readouts | products | interactions] * 2]


def test_a_schedule_is_a_function_of_the_updates_made(start):
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    at = path_of((rates({"**": schedule}),), start, tx=optax.sgd(1.0))
    params = start
    for count in range(4):
        slope = jax.grad(lambda p: wavy(p, None)[0])(params)
        params = jax.tree.map(lambda x, g, f=1 - count / 4: x - f * g, params, slope)
        for path, leaf in tree.flatten(params).items():
            np.testing.assert_allclose(at[count + 1][path], leaf, rtol=0, atol=1e-14)


def test_its_count_resumes_with_the_optimiser_and_survives_a_bad_step(start):
    recipe = (rates({"**": {"from": 2, "factor": 1}}),)
    init, step = jaxft.finetune(lambda p, scale: (scale * wavy(p, None)[0], {}), recipe, adamw())
    state, _ = step(init(KEY, start), 1.0)
    state, info = step(state, float("nan"))
    assert not info["is_finite"]
    leaves, structure = jax.tree.flatten(state)
    saved = jax.tree.unflatten(structure, [jnp.array(np.asarray(leaf)) for leaf in leaves])
    counts = []
    for resumed in (state, saved):
        now = resumed
        for _ in range(2):
            now, _ = step(now, 1.0)
            counts.append(moved(host(start), host(jaxft.merge(recipe, now))))
    assert counts == [set(), set(host(start)), set(), set(host(start))]


# --- coordinates of other strategies --------------------------------------------------------------


def test_coordinates_of_a_leaf_follow_it(start):
    recipe = (
        lora(
            ["interactions_0/linear/*", "products_0/linear/*"], rank=2, also_train="readouts_0/**"
        ),
        rates({"interactions_0/**": 0.0, "readouts_0/**": 0.0}),
    )
    *_, found = path_of(recipe, start)
    assert moved(host(start), found) == {"products_0/linear/0e"}
    *_, found = path_of((delta("interactions_0/**"), rates({"**/1o": 0.0})), start)
    assert moved(host(start), found) == {"interactions_0/linear/0e"}


def test_it_acts_on_coordinates_whatever_its_place_in_the_recipe(start):
    members = (lora("interactions_0/linear/*", rank=2), rates({"**/1o": 0.25}))
    here, there = path_of(members, start), path_of(members[::-1], start)
    for a, b in zip(here, there, strict=True):
        assert all(a[path].tobytes() == b[path].tobytes() for path in a)


def test_coordinates_of_a_module_follow_its_leaves_which_must_agree(start):
    init, step = jaxft.finetune(
        wavy, (sparse("interactions_0/linear/*"), rates({"interactions_0/**": 0.0})), adamw()
    )
    state = init(KEY, start)
    before = host(state.trainable.coords["sparse"])
    state, _ = step(state, None)
    assert not moved(before, host(state.trainable.coords["sparse"]))
    init, _ = jaxft.finetune(wavy, (sparse(), rates({"interactions_0/**/1o": 0.0})), adamw())
    with pytest.raises(ValueError, match=r"several factors for leaves of 'interactions_0/linear'"):
        init(KEY, start)
    recipe = (sparse(per="leaf"), rates({"interactions_0/**/1o": 0.0}))
    assert "interactions_0/linear/1o" not in moved(*path_of(recipe, start, steps=1))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({}, "given no factors"),
        ({"**": -0.1}, "of '**' is -0.1"),
        ({"**": float("nan")}, "is nan; use a finite number"),
        ({"**": "0.1"}, "is '0.1'"),
        ({"**": True}, "is True"),
        ({"**": {"from": 3}}, "has the keys from;"),
        ({"**": {"from": 3, "factor": 1, "to": 5}}, "has the keys factor, from, to;"),
        ({"**": {"from": -1, "factor": 1}}, "starts from -1"),
        ({"**": {"from": 1.5, "factor": 1}}, "starts from 1.5"),
        ({"**": {"from": 1, "factor": float("inf")}}, "is inf"),
        ({"**": lambda count: jnp.ones(3)}, "values of shape (3,)"),
        ({lambda path, leaf: True: 0.1}, "use a string"),
    ],
)
def test_impossible_factors_are_refused(factors, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rates(factors)


def test_patterns_must_match_and_share_no_leaf(start):
    with pytest.raises(ValueError, match=r"'product_0/\*\*' matches none of 4 parameter leaves"):
        base.check((rates({"product_0/**": 0.1}),), start)
    with pytest.raises(
        ValueError, match="two factors for 'interactions_0/linear/0e': of"
    ) as caught:
        base.check((rates({"interactions_0/**": 0.1, "**/0e": 1.0}),), start)
    assert "share no leaf" in str(caught.value)
