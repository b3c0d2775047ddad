"""The three products, and the picking of rows: values and derivatives of every kind."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxft.models.dots import add_up, apply, match, mix, pick, spread, times

R, K, M, C = 3, 4, 2, 5
FORMS = {
    mix: ("rkm,rkc->rmc", (R, K, M), (R, K, C)),
    spread: ("rkm,rmc->rkc", (R, K, M), (R, M, C)),
    match: ("rkc,rmc->rkm", (R, K, C), (R, M, C)),
}


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


@pytest.mark.parametrize("function", FORMS)
def test_products_and_derivatives(function):
    formula, *shapes = FORMS[function]
    a, b = (random(*shape, seed=i) for i, shape in enumerate(shapes))
    np.testing.assert_allclose(function(a, b), jnp.einsum(formula, a, b), rtol=1e-13, atol=1e-13)
    check_grads(function, (a, b), order=3, modes=("fwd", "rev"))


@pytest.mark.parametrize("function", FORMS)
def test_jit_and_vmap(function):
    formula, *shapes = FORMS[function]
    a, b = (random(2, *shape, seed=i) for i, shape in enumerate(shapes))
    for axes in itertools.product((0, None), repeat=2):
        if axes == (None, None):
            continue
        args = [x if axis == 0 else x[0] for x, axis in zip((a, b), axes, strict=True)]
        expected = jax.vmap(lambda x, y: jnp.einsum(formula, x, y), in_axes=axes)(*args)
        found = jax.jit(jax.vmap(function, in_axes=axes))(*args)
        np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


def test_precision_of_the_surroundings_is_that_of_the_derivatives():
    a, b = random(R, K, M), random(R, K, C)

    def total(a, b):
        with jax.default_matmul_precision("highest"):
            return mix(a, b).sum()

    text = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(a, b))
    assert text.count("precision=highest") == 3
    assert "precision=None" not in text


def test_pick():
    rows = np.array([2, 0, 2, 1])
    selector, x = jnp.eye(3)[rows], random(3, C)
    np.testing.assert_array_equal(pick(selector, x), x[rows])
    check_grads(lambda x: pick(selector, x) ** 2, (x,), order=3, modes=("fwd", "rev"))
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(lambda x: pick(selector, x).sum()))(x))


def test_apply():
    matrix, x = random(C, M), random(R, K, C, seed=1)
    np.testing.assert_allclose(apply(matrix, x), x @ matrix, rtol=1e-13, atol=1e-13)
    check_grads(apply, (matrix, x), order=3, modes=("fwd", "rev"))


def test_times():
    x, matrix = random(R, K, M), random(M, C, seed=1)
    np.testing.assert_allclose(times(x, matrix), x @ matrix, rtol=1e-13, atol=1e-13)
    check_grads(times, (x, matrix), order=2, modes=("fwd", "rev"))
    assert times(x.astype("float32"), matrix).dtype == "float64"


def test_add_up():
    x = random(R, K, C)
    np.testing.assert_allclose(add_up(x), x.sum(axis=1), rtol=1e-13, atol=1e-13)
    check_grads(lambda x: add_up(x**2), (x,), order=3, modes=("fwd", "rev"))
    for axis in range(4):
        many = jnp.moveaxis(random(2, R, K, C), 0, axis)
        found = jax.jit(jax.vmap(add_up, in_axes=axis))(many)
        np.testing.assert_allclose(found, jnp.moveaxis(many, axis, 0).sum(axis=2), atol=1e-13)
    text = str(jax.make_jaxpr(jax.grad(lambda x: add_up(x).sum()))(x))
    assert "broadcast_in_dim" in text
    assert "pad" not in text
