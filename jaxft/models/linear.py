"""Linear maps of features, and tables of elements; normalised as e3nn's."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp

from jaxft.graph import take
from jaxft.models.dots import times
from jaxft.models.irreps import Features, multiplicities
from jaxft.models.parameter import parameter
from jaxft.typing import Array


class Linear(nn.Module):
    """Mixes channels of equal irrep: e3nn's ``o3.Linear`` with 1/sqrt(fan-in) normalisation."""

    irreps_out: str
    has_bias: bool = False
    """On scalars."""

    @nn.compact
    def __call__(self, x: Features) -> Features:
        out = {}
        for name, mul in multiplicities(self.irreps_out).items():
            if name in x:
                fan_in = x[name].shape[-1]
                weight = parameter(self, name, nn.initializers.normal(1.0), (fan_in, mul))
                out[name] = times(x[name], weight / math.sqrt(fan_in))
        if self.has_bias:
            out["0e"] += parameter(self, "bias", nn.initializers.zeros, out["0e"].shape[-1:])
        return out


class ElementLinear(nn.Module):
    """A linear map per element: e3nn's ``FullyConnectedTensorProduct`` with one-hot elements."""

    irreps_out: str
    num_elements: int

    @nn.compact
    def __call__(self, x: Features, elements: Array, one_hot: Array) -> Features:
        """{irrep: [N, 2l + 1, C]}, [S] rows of the element table, [N, S] -> [N, 2l + 1, C']."""
        out = {}
        for name, mul in multiplicities(self.irreps_out).items():
            if name in x:
                fan_in = x[name].shape[-1]
                shape = (self.num_elements, fan_in, mul)
                weight = parameter(self, name, nn.initializers.normal(1.0), shape)
                weight = take(weight, elements) / math.sqrt(fan_in * self.num_elements)
                maps = jnp.einsum("nmi,sio->snmo", x[name], weight)
                out[name] = jnp.einsum("ns,snmo->nmo", one_hot, maps)
        return out


class ElementTable(nn.Module):
    """Scalars of each element: e3nn's ``o3.Linear`` on one-hot elements."""

    mul: int
    num_elements: int

    @nn.compact
    def __call__(self, elements: Array) -> Array:
        """[S] rows of the element table -> [S, mul]."""
        table = parameter(self, "0e", nn.initializers.normal(1.0), (self.num_elements, self.mul))
        return take(table, elements) / math.sqrt(self.num_elements)
