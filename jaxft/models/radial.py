"""Radial basis and radial network."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.typing import Array


def polynomial_cutoff(r: Array, r_max: float, p: int) -> Array:
    """Smooth step from 1 at 0 to 0 at ``r_max``; exactly 0, derivatives too, beyond."""
    u = r / r_max
    step = (
        1.0
        - 0.5 * (p + 1.0) * (p + 2.0) * u**p
        + p * (p + 2.0) * u ** (p + 1)
        - 0.5 * p * (p + 1.0) * u ** (p + 2)
    )
    return jnp.where(u < 1.0, step, 0.0)


def bessel(r: Array, frequencies: Array, prefactor: Array) -> Array:
    """``prefactor · sin(w_n r) / r``: [...] -> [..., n]. ``r`` must not be 0."""
    return prefactor * jnp.sin(frequencies * r[..., None]) / r[..., None]


class RadialMLP(nn.Module):
    """The hidden layers of e3nn's ``FullyConnectedNet`` and its last matrix, left unapplied.

    The last matrix is applied path by path where the product is consumed: slices of one wide
    ``[R, K, paths · mul]`` array would be copies.
    """

    widths: tuple[int, ...]
    n_out: int
    constant: float
    """Second-moment constant of silu, from the file."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """[..., n] -> hidden features [..., h], matrix [h, n_out] with 1/sqrt(h) included."""
        for i, width in enumerate(self.widths):
            weight = self.param(f"layer{i}", nn.initializers.normal(1.0), (x.shape[-1], width))
            x = self.constant * jax.nn.silu(x @ (weight / jnp.sqrt(1.0 * x.shape[-1])))
        shape = (x.shape[-1], self.n_out)
        last = self.param(f"layer{len(self.widths)}", nn.initializers.normal(1.0), shape)
        return x, last / jnp.sqrt(1.0 * x.shape[-1])
