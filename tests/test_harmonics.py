"""Spherical harmonics against e3nn's."""

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np

from jaxft.models.harmonics import spherical_harmonics


def test_as_e3nn():
    directions = np.random.default_rng(0).normal(size=(4, 7, 3))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    irreps = "1x0e+1x1o+1x2e+1x3o+1x4e+1x5o"
    found = spherical_harmonics(irreps, jnp.asarray(directions))
    expected = e3nn.spherical_harmonics(
        e3nn.Irreps(irreps), directions, normalize=False, normalization="component"
    )
    for (_, ir), block in zip(expected.irreps, expected.chunks, strict=True):
        np.testing.assert_allclose(found[str(ir)], block[..., 0, :], atol=1e-13)
        np.testing.assert_allclose((found[str(ir)] ** 2).sum(axis=-1), 2 * ir.l + 1, rtol=1e-13)
