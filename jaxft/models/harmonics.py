"""Real spherical harmonics of unit vectors, in e3nn's order and component normalisation."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from jaxft.models.e3nn import e3nn
from jaxft.models.irreps import Features, multiplicities
from jaxft.typing import Array


def spherical_harmonics(irreps: str, directions: Array) -> Features:
    """{irrep: [..., 2l + 1]} of unit vectors [..., 3], with Σ_m Y_lm² = 2l + 1.

    By coupling the harmonics of degree l - 1 with the vector itself.
    """
    degrees = {name: int(name[:-1]) for name in multiplicities(irreps)}
    values = [jnp.ones_like(directions[..., :1])]
    for degree in range(1, max(degrees.values()) + 1):
        step = jnp.asarray(_step(degree), directions.dtype)
        values.append(jnp.einsum("...i,...j,ijm->...m", values[-1], directions, step))
    return {name: values[degree] for name, degree in degrees.items()}


SOME = np.array([0.6, 0.0, 0.8])
"""A direction: lengths are the same in all of them."""


@functools.cache
def _step(degree: int) -> np.ndarray:
    """[2l - 1, 3, 2l + 1]: harmonics of degree l - 1 and a unit vector -> harmonics of degree l."""
    coupling = np.asarray(e3nn.clebsch_gordan(degree - 1, 1, degree), np.float64)
    length = np.linalg.norm(np.einsum("i,j,ijm->m", _of_some(degree - 1), SOME, coupling))
    return coupling * np.sqrt(2 * degree + 1) / length


def _of_some(degree: int) -> np.ndarray:
    values = np.ones(1)
    for each in range(1, degree + 1):
        values = np.einsum("i,j,ijm->m", values, SOME, _step(each))
    return values
