r"""Magnetic moments of the atoms in µB, and the energy that they add.

From the scalars :math:`s_i` of an atom after all layers, a hidden layer
:math:`h_i = \mathrm{silu}(W s_i)` and a readout of each element,
:math:`y_i = A_{z_i} h_i + b_{z_i}`:

=============  ===========================================================================
``collinear``  :math:`m_i = \log(1 + e^{y_i})`, a magnitude, never negative
``signed``     :math:`m_i = y_i`
``vector``     :math:`\mu_i = \sum_c y_{ic}\, u_{ic} \times v_{ic}`, where u and v are mixtures
               of the atom's hidden vectors: an axial vector, unchanged under inversion
=============  ===========================================================================

The energy is even in the moments, and 0 at initialisation:

.. math:: E = \sum_i \left(a_{z_i} |\mu_i|^2 + b_{z_i} |\mu_i|^4\right)
          + \tfrac12 \sum_{i \neq j} \varepsilon_{ij}\, \mu_i \cdot \mu_j, \quad
          \varepsilon_{ij} = \sum_k R_k(r_{ij})\, p_{ik}\, p_{jk}

with :math:`p_i = B_{z_i} h_i + c_{z_i}` and a radial network R that vanishes at the cutoff. For
magnitudes the scalar product is that of the magnitudes: atoms are as in the labels' own order.

The moments are functions of the positions: nothing breaks a symmetry that the structure has. A
vector is zero wherever the site allows no axial vector, such as in perfect bcc iron.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.graph import Graph, sum_rows, take
from jaxft.models.config import MACEConfig, MomentsConfig
from jaxft.models.dots import times
from jaxft.models.irreps import Features
from jaxft.models.linear import ElementLinear, Linear
from jaxft.models.parameter import parameter
from jaxft.models.precision import Precision
from jaxft.models.radial import RadialMLP
from jaxft.typing import Array


class Seen(NamedTuple):
    """What the layers left behind."""

    scalars: tuple[Array, ...] = ()
    """[N, C] of every layer."""
    vectors: Array | None = None
    """[N, 3, C] of the last layer that has any; most models' last layer has none."""

    def after(self, x: Features) -> Seen:
        """With one layer more."""
        vectors = x.get("1o")
        enough = vectors is not None and vectors.shape[-1] > 1
        return Seen((*self.scalars, x["0e"][:, 0]), vectors if enough else self.vectors)


class Moments(nn.Module):
    """The head; tables hold a row per element."""

    config: MomentsConfig
    model: MACEConfig
    precision: Precision

    def setup(self) -> None:
        config, num_elements = self.config, self.model.num_elements
        width = config.channels if config.kind == "vector" else 1
        self.linear_1 = Linear(f"{config.hidden}x0e")
        self.linear_2 = ElementLinear(f"{width}x0e", num_elements)
        self.bias = parameter(self, "bias", nn.initializers.zeros, (num_elements, width))
        if config.kind == "vector":
            self.linear_u = Linear(f"{config.channels}x1o")
            self.linear_v = Linear(f"{config.channels}x1o")
        if config.energy:
            shape = (num_elements, config.channels)
            self.polynomial = parameter(self, "onsite", nn.initializers.zeros, (num_elements, 2))
            self.exchange_linear = ElementLinear(f"{config.channels}x0e", num_elements)
            self.exchange_bias = parameter(self, "exchange_bias", nn.initializers.ones, shape)
            self.exchange_radial = RadialMLP(
                (config.hidden,), config.channels, self.model.silu_constant
            )

    def __call__(self, seen: Seen, graph: Graph, one_hot: Array) -> tuple[Array, Array]:
        """Hidden scalars [N, h] and moments: [N], or [N, 3] of vectors.

        Args:
          seen: of the layers.
          graph: tells the elements.
          one_hot: [N, S].
        """
        scalars = jnp.concatenate(seen.scalars, axis=-1)
        hidden = jax.nn.silu(self.linear_1({"0e": scalars[:, None]})["0e"][:, 0])
        y = self._per_element(self.linear_2, self.bias, hidden, graph, one_hot)
        if self.config.kind == "collinear":
            return hidden, jax.nn.softplus(y[:, 0])
        if self.config.kind == "signed":
            return hidden, y[:, 0]
        assert seen.vectors is not None
        u, v = (linear({"1o": seen.vectors})["1o"] for linear in (self.linear_u, self.linear_v))
        return hidden, (jnp.cross(u, v, axis=1) * y[:, None]).sum(axis=-1)

    def send(self, hidden: Array, moments: Array, graph: Graph, one_hot: Array) -> Array:
        """[N, k, d], the moments of d components times k scalars p; for the exchange."""
        scalars = self._per_element(
            self.exchange_linear, self.exchange_bias, hidden, graph, one_hot
        )
        return scalars[:, :, None] * moments.reshape(len(moments), 1, -1)

    def onsite(self, moments: Array, graph: Graph, one_hot: Array) -> Array:
        """[N] eV."""
        square = (moments.reshape(len(moments), -1) ** 2).sum(axis=-1)
        a, b = times(one_hot, take(self.polynomial, graph.elements)).T
        return a * square + b * square**2

    def exchange(
        self, own: Array, everyone: Array, basis: Array, factor: Array, graph: Graph
    ) -> Array:
        """[n] eV, half the pair energies of some atoms.

        Args:
          own, everyone: :meth:`send` of these atoms, and of all.
          basis: radial functions [R, K, n] of their edges.
          factor: [R, K], the cutoff where the radial functions do not vanish there.
          graph: its rows are theirs; senders are positions among all atoms.
        """
        with jax.default_matmul_precision(self.precision.radial):
            hidden, matrix = self.exchange_radial(basis)
            weights = (hidden * factor[..., None]) @ matrix
        field = (weights[..., None] * take(everyone, graph.senders)).sum(axis=1)
        return 0.5 * (own * sum_rows(field, graph)).sum(axis=(1, 2))

    def _per_element(
        self, linear: ElementLinear, bias: Array, x: Array, graph: Graph, one_hot: Array
    ) -> Array:
        """[N, h] -> [N, width]."""
        mapped = linear({"0e": x[:, None]}, graph.elements, one_hot)["0e"][:, 0]
        return mapped + times(one_hot, take(bias, graph.elements))
