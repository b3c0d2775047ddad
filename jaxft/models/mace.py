"""ScaleShiftMACE with residual interaction blocks, as flax modules on plain parameter trees.

Module and parameter names are mace-torch's (``interactions_0/linear_up/1o``); parameters are
torch's own, unscaled numbers, one leaf per irrep with the matrix in the last two axes. Path
normalisations are applied here. Node features are ``{irrep: [N, 2l + 1, C]}``.

Reference: Batatia et al., NeurIPS 2022 (arXiv:2206.07697); block semantics after mace-torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import e3nn_jax as e3nn
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.graph import Graph
from jaxft.models.config import InteractionConfig, MACEConfig, ProductConfig, ReadoutConfig
from jaxft.models.contraction import Coupling, SymmetricContraction
from jaxft.models.conv import convolve
from jaxft.models.irreps import Features, concatenate, multiplicities, tensor_product_paths
from jaxft.models.radial import RadialMLP, bessel, polynomial_cutoff
from jaxft.typing import Array


class Constants(NamedTuple):
    """Numbers of the model that are never trained; all from the model file."""

    frequencies: Array
    """[n] Bessel frequencies, 1/Å."""
    prefactor: Array
    """[] Bessel prefactor."""
    scale: Array
    """[] eV."""
    shift: Array
    """[] eV per atom."""
    couplings: tuple[Mapping[str, Coupling], ...]
    """One mapping {output irrep: coupling} per product block."""


class Linear(nn.Module):
    """Mixes channels of equal irrep: e3nn's ``o3.Linear`` with 1/sqrt(fan-in) normalisation."""

    irreps_out: str

    @nn.compact
    def __call__(self, x: Features) -> Features:
        out = {}
        for name, mul in multiplicities(self.irreps_out).items():
            if name in x:
                fan_in = x[name].shape[-1]
                weight = self.param(name, nn.initializers.normal(1.0), (fan_in, mul))
                out[name] = x[name] @ (weight / jnp.sqrt(1.0 * fan_in))
        return out


class ElementLinear(nn.Module):
    """A linear map per element: e3nn's ``FullyConnectedTensorProduct`` with one-hot elements."""

    irreps_out: str
    num_elements: int

    @nn.compact
    def __call__(self, x: Features, elements: Array) -> Features:
        """{irrep: [A, 2l + 1, C]} -> {irrep: [S, A, 2l + 1, C']}, the map of every element."""
        out = {}
        for name, mul in multiplicities(self.irreps_out).items():
            if name in x:
                fan_in = x[name].shape[-1]
                shape = (self.num_elements, fan_in, mul)
                weight = self.param(name, nn.initializers.normal(1.0), shape)
                weight = weight[elements] / jnp.sqrt(1.0 * fan_in * self.num_elements)
                out[name] = jnp.einsum("ami,sio->samo", x[name], weight)
        return out


class Interaction(nn.Module):
    """Residual block: the message, and the self-connection taken from the block's input."""

    config: InteractionConfig
    edge_irreps: str
    num_elements: int
    silu_constant: float

    @nn.compact
    def __call__(
        self, x: Features, harmonics: Features, basis: Array, graph: Graph, one_hot: Array
    ) -> tuple[Array, Features]:
        """Features of the atoms -> message [N, lm, C], self-connection."""
        config = self.config
        skip = ElementLinear(config.hidden_irreps, self.num_elements, name="skip_tp")
        connected = {
            name: jnp.einsum("ns,snmo->nmo", one_hot, block)
            for name, block in skip(x, graph.elements).items()
        }
        sent = Linear(config.node_feats_irreps, name="linear_up")(x)
        paths = tensor_product_paths(
            config.node_feats_irreps, self.edge_irreps, config.target_irreps
        )
        channels = next(iter(sent.values())).shape[-1]
        radial = RadialMLP(
            config.radial_mlp, len(paths) * channels, self.silu_constant, name="conv_tp_weights"
        )(basis)
        message = convolve(sent, harmonics, radial, paths, graph)
        message = Linear(config.target_irreps, name="linear")(message)
        message = {name: block / config.avg_num_neighbors for name, block in message.items()}
        return concatenate(message, config.target_irreps), connected


class Product(nn.Module):
    """Symmetric contraction, linear map, plus the self-connection."""

    config: ProductConfig
    num_elements: int

    @nn.compact
    def __call__(
        self,
        message: Array,
        connected: Features,
        graph: Graph,
        one_hot: Array,
        couplings: Mapping[str, Coupling],
    ) -> Features:
        config = self.config
        contract = SymmetricContraction(
            config.irreps_out, config.paths, self.num_elements, name="symmetric_contractions"
        )
        x = contract(message, graph.elements, one_hot, couplings)
        x = Linear(config.irreps_out, name="linear")(x)
        return {name: x[name] + connected[name] if name in connected else x[name] for name in x}


class Readout(nn.Module):
    """Scalars of one layer to an energy per atom."""

    config: ReadoutConfig
    silu_constant: float

    @nn.compact
    def __call__(self, x: Features) -> Array:
        """-> [N], before scale and shift."""
        if self.config.kind == "linear":
            return Linear("1x0e", name="linear")(x)["0e"][:, 0, 0]
        hidden = Linear(self.config.hidden_irreps, name="linear_1")(x)["0e"]
        hidden = self.silu_constant * jax.nn.silu(hidden)
        return Linear("1x0e", name="linear_2")({"0e": hidden})["0e"][:, 0, 0]


class ScaleShiftMACE(nn.Module):
    """Interaction energy per atom."""

    config: MACEConfig

    @nn.compact
    def __call__(self, graph: Graph, constants: Constants) -> Array:
        """-> [N] eV: everything but the isolated-atom energies; padding atoms hold the shift."""
        config = self.config
        one_hot = jax.nn.one_hot(graph.species, graph.elements.shape[0], dtype=graph.vectors.dtype)
        r = jnp.linalg.norm(graph.vectors, axis=-1)
        cutoff = polynomial_cutoff(r, config.r_max, config.cutoff_power)
        basis = bessel(r, constants.frequencies, constants.prefactor) * cutoff[..., None]
        harmonics = _harmonics(config.edge_irreps, graph.vectors / r[..., None])

        scalars = config.interactions[0].node_feats_irreps
        embedding = NodeEmbedding(scalars, config.num_elements, name="node_embedding")
        x = {"0e": (one_hot @ embedding(graph.elements))[:, None, :]}
        energy = jnp.zeros_like(graph.vectors, shape=(graph.n_node,))
        for i, interaction in enumerate(config.interactions):
            message, connected = Interaction(
                interaction,
                config.edge_irreps,
                config.num_elements,
                config.silu_constant,
                name=f"interactions_{i}",
            )(x, harmonics, basis, graph, one_hot)
            x = Product(config.products[i], config.num_elements, name=f"products_{i}")(
                message, connected, graph, one_hot, constants.couplings[i]
            )
            readout = Readout(
                config.readouts[i], config.readout_silu_constant, name=f"readouts_{i}"
            )
            energy = energy + readout(x)
        return constants.scale * energy + constants.shift


class NodeEmbedding(nn.Module):
    """Scalar features of each element."""

    irreps_out: str
    num_elements: int

    @nn.compact
    def __call__(self, elements: Array) -> Array:
        """[S] rows of the element table -> [S, C]."""
        (mul,) = multiplicities(self.irreps_out).values()
        table = ElementTable(mul, self.num_elements, name="linear")()
        return table[elements] / jnp.sqrt(1.0 * self.num_elements)


class ElementTable(nn.Module):
    """One row per element."""

    mul: int
    num_elements: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("0e", nn.initializers.normal(1.0), (self.num_elements, self.mul))


def _harmonics(irreps: str, directions: Array) -> Features:
    """Real harmonics of unit vectors, e3nn's component normalisation: [R, K, 3] -> [R, K, 2l+1]."""
    values = e3nn.spherical_harmonics(
        e3nn.Irreps(irreps), directions, normalize=False, normalization="component"
    )
    blocks = zip(values.irreps, values.chunks, strict=True)
    return {str(ir): block[..., 0, :] for (_, ir), block in blocks}
