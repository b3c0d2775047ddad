"""Rows of tables and sums of rows: as numpy does it, and one another's transposes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxft.graph import sum_atoms, sum_rows, sum_senders, take

N = 4
SUMS = {
    sum_rows: ("receivers", np.array([0, 0, 1, 3])),
    sum_atoms: ("graph_index", np.array([0, 1, 1, 3])),
    sum_senders: ("senders", np.array([[3, 0], [1, 3], [0, 0], [2, 3]])),
}


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape))


@pytest.mark.parametrize("inner", [(), (3,), (3, 2)])
@pytest.mark.parametrize("index", [np.array([2, 0, 0]), np.array([[3, 1], [1, 1]])])
def test_take_is_indexing(inner, index):
    table = random(N, *inner)
    np.testing.assert_array_equal(take(table, index), np.asarray(table)[index])
    check_grads(lambda x: take(x, jnp.asarray(index)) ** 2, (table,), order=2)


@pytest.mark.parametrize("inner", [(), (3,), (3, 2)])
@pytest.mark.parametrize("function", SUMS)
def test_sums_add_what_has_the_same_index(function, inner):
    name, index = SUMS[function]
    graph = SimpleNamespace(n_node=N, n_graph=N, **{name: jnp.asarray(index)})
    values = random(*index.shape, *inner)
    expected = np.zeros((N, *inner))
    np.add.at(expected, index, values)
    np.testing.assert_allclose(function(values, graph), expected, rtol=1e-13, atol=1e-13)
    check_grads(lambda x: function(x, graph) ** 2, (values,), order=2)
