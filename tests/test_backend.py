"""Backends: the policy that chooses one, and cueq against xla."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import loss, predict, tree
from jaxft.models.cueq import Cueq

RTOL = 1e-10
"""Of the largest value; sums in another order, in float64."""


@pytest.fixture(scope="module")
def naive():
    """The same polynomials, evaluated by plain JAX: as the library does without a GPU."""
    pytest.importorskip("cuequivariance_jax")
    return Cueq(method="naive")


def by(model, backend):
    return replace(model, backend=backend)


def close(found, expected):
    scale = max(float(jnp.abs(expected).max()), 1e-300)
    np.testing.assert_allclose(found / scale, expected / scale, atol=RTOL, rtol=0)


def test_energies_forces_and_stresses_are_those_of_xla(model, params, batch, predictor, naive):
    expected = predictor(params, batch.graph)
    found = jax.jit(functools.partial(predict, by(model, naive)))(params, batch.graph)
    jax.tree.map(close, found, expected)


def test_gradients_of_a_loss_are_those_of_xla(model, params, batch, naive):
    """All parameters, through forces and stress: derivatives of derivatives."""
    weights = {"energy": 1.0, "forces": 1.0, "stress": 10.0}

    def gradient(model):
        objective = loss.weighted(model, **weights)
        return tree.flatten(jax.jit(jax.grad(lambda p: objective(p, batch)[0]))(params))

    expected, found = gradient(model), gradient(by(model, naive))
    assert found.keys() == expected.keys()
    for name in found:
        close(found[name], expected[name])
