"""Radial functions, distance transforms, repulsion, and the networks on top of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.models.dots import apply
from jaxft.models.parameter import parameter
from jaxft.typing import Array

Pair = tuple[Array, Array]


def polynomial_cutoff(r: Array, r_max: float | Array, p: int) -> Array:
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


def gaussian(r: Array, centers: Array, coefficient: float) -> Array:
    """``exp(coefficient · (r - center)²)``: [...] -> [..., n]."""
    return jnp.exp(coefficient * (r[..., None] - centers) ** 2)


def chebyshev(r: Array, n: int) -> Array:
    """Polynomials T_1 … T_n of r itself, by recurrence: [...] -> [..., n]."""
    terms = [jnp.ones_like(r), r]
    for _ in range(n - 1):
        terms.append(2 * r * terms[-1] - terms[-2])
    return jnp.stack(terms[1:], axis=-1)


def agnesi(r: Array, radii: Array, a: Array, q: Array, p: Array) -> Array:
    """Distances onto (0, 1); ``radii`` are sums of covalent radii, Å.

    Reference: Witt et al., J. Chem. Phys. 159, 164101 (2023).
    """
    u = r / (0.5 * radii)
    return 1.0 / (1.0 + a * u**q / (1.0 + u ** (q - p)))


def soft(r: Array, radii: Array, alpha: Array) -> Array:
    """Distances that stop falling inside the bond length; ``radii`` as in :func:`agnesi`."""
    inner, outer = 0.75 * radii, 4.0 / 3.0 * radii
    step = 0.5 * (1.0 + jnp.tanh(alpha / (outer - inner) * (r - 0.5 * (inner + outer))))
    return inner + (r - inner) * step


def soft_0_3_6(r: Array, radii: Array, a: Array, b: Array) -> Array:
    """What mace-torch called Soft before :func:`soft`."""
    u = r / (0.25 * radii)
    return r + 0.5 * jnp.tanh(-u - a * u**b) + 0.5


def zbl(r: Array, z: tuple[Array, Array], radii: Array, p: int, c: Mapping[str, Array]) -> Array:
    """Half the Ziegler-Biersack-Littmark energy of each pair, eV: what one of its atoms gets.

    Args:
      r: distances, Å.
      z: charges of the nuclei.
      radii: sums of covalent radii, Å, beyond which it is exactly zero.
      p: power of the cutoff.
      c: ``c`` [4], ``a_exp``, ``a_prefactor``.

    Reference: Ziegler, Biersack, Littmark, *The Stopping and Range of Ions in Matter* (1985).
    """
    length = c["a_prefactor"] * 0.529 / (z[0] ** c["a_exp"] + z[1] ** c["a_exp"])
    decay = jnp.asarray([3.2, 0.9423, 0.4028, 0.2016], r.dtype)
    screening = jnp.sum(c["c"] * jnp.exp(-decay * (r / length)[..., None]), axis=-1)
    return 0.5 * 14.3996 * z[0] * z[1] / r * screening * polynomial_cutoff(r, radii, p)


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
            weight = parameter(self, f"layer{i}", nn.initializers.normal(1.0), (x.shape[-1], width))
            x = self.constant * jax.nn.silu(apply(weight / math.sqrt(x.shape[-1]), x))
        shape = (x.shape[-1], self.n_out)
        last = parameter(self, f"layer{len(self.widths)}", nn.initializers.normal(1.0), shape)
        return x, last / math.sqrt(x.shape[-1])


class EdgeMLP(nn.Module):
    """mace-torch's ``RadialMLP`` on radial functions and the two elements of each edge.

    Affine maps, LayerNorm, silu. The first matrix acts on the concatenation [basis, source,
    target]; the parts of source and target are tables with a row per element. The last map is left
    unapplied, as in :class:`RadialMLP`, its bias as the last row of the matrix.
    """

    widths: tuple[int, ...]
    n_out: int
    eps: float
    """Of LayerNorm."""

    @nn.compact
    def __call__(self, basis: Array, source: Array, target: Array, elements: Pair) -> Pair:
        """Basis [R, K, n], tables [S, C] and [S, C] -> features [R, K, h + 1], [h + 1, n_out].

        ``elements`` are one-hot: of senders [R, K, S] and of receivers [R, S].
        """
        n, c = basis.shape[-1], source.shape[-1]
        x = basis
        for i, (fan_in, width) in enumerate(itertools.pairwise((n + 2 * c, *self.widths))):
            weight, bias = Affine(fan_in, width, name=f"net_{3 * i}")()
            if i == 0:
                onto, of_source, of_target = jnp.split(weight, (n, n + c))
                receivers = elements[1] @ (target @ of_target + bias)
                x = apply(onto, x) + elements[0] @ (source @ of_source) + receivers[:, None, :]
            else:
                x = apply(weight, x) + bias
            x = jax.nn.silu(LayerNorm(self.eps, name=f"net_{3 * i + 1}")(x))
        weight, bias = Affine(x.shape[-1], self.n_out, name=f"net_{3 * len(self.widths)}")()
        ones = jnp.ones_like(x[..., :1])
        return jnp.concatenate([x, ones], axis=-1), jnp.concatenate([weight, bias[None]])


class Affine(nn.Module):
    """The arrays of a torch ``Linear``, the matrix as [in, out]."""

    n_in: int
    n_out: int
    has_bias: bool = True

    @nn.compact
    def __call__(self) -> Pair:
        """-> weight, bias; zeros without one."""
        limit = self.n_in**-0.5

        def uniform(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, minval=-limit, maxval=limit)

        weight = parameter(self, "weight", uniform, (self.n_in, self.n_out))
        if not self.has_bias:
            return weight, jnp.zeros_like(weight[0])
        return weight, parameter(self, "bias", uniform, (self.n_out,))


class LayerNorm(nn.Module):
    """torch's, over the last axis."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = parameter(self, "weight", nn.initializers.ones, x.shape[-1:])
        bias = parameter(self, "bias", nn.initializers.zeros, x.shape[-1:])
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        return centred / jnp.sqrt(variance + self.eps) * weight + bias
