"""MACE, as flax modules on plain parameter trees.

Module and parameter names are mace-torch's (``interactions_0/linear_up/1o``); parameters are
torch's own, unscaled numbers, one leaf per irrep with the matrix in the last two axes. Path
normalisations are applied here. Node features are ``{irrep: [N, 2l + 1, C]}``.

Letters in shapes are those of :mod:`jaxft.graph`, and H heads.

Reference: Batatia et al., NeurIPS 2022 (arXiv:2206.07697); block semantics after mace-torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.graph import Graph, sum_rows, take
from jaxft.models import radial
from jaxft.models.backend import XLA, Backend
from jaxft.models.config import (
    EmbeddingConfig,
    InteractionConfig,
    MACEConfig,
    ProductConfig,
    ReadoutConfig,
)
from jaxft.models.contraction import SymmetricContraction
from jaxft.models.dots import times
from jaxft.models.harmonics import spherical_harmonics
from jaxft.models.irreps import (
    Features,
    Path,
    concatenate,
    multiplicities,
    tensor_product_paths,
)
from jaxft.models.linear import ElementLinear, ElementTable, Linear
from jaxft.models.moments import Moments, Seen
from jaxft.models.parameter import parameter
from jaxft.models.radial import Affine, EdgeMLP, RadialMLP
from jaxft.typing import Array

GATES = {"silu": jax.nn.silu, "tanh": jnp.tanh, "abs": jnp.abs, "None": lambda x: x}


class Constants(NamedTuple):
    """Numbers of the model that are never trained; all from the model file."""

    basis: Mapping[str, Array]
    """Of the radial functions: ``bessel_weights`` [n] 1/Å and ``prefactor``, or
    ``gaussian_weights`` [n] Å, or none."""
    transform: Mapping[str, Array]
    """Of the distance transform, if there is one; ``covalent_radii`` [elements] Å among them."""
    repulsion: Mapping[str, Array]
    """Of the pair repulsion, likewise."""
    charges: Array
    """[elements] atomic numbers."""
    scale: Array
    """[H] eV."""
    shift: Array
    """[H] eV per atom."""
    couplings: tuple[Any, ...]
    """Per product block, what the backend made of them."""


class Edges(NamedTuple):
    """What the edges tell every layer. K slots in each of R rows."""

    lengths: Array
    """[R, K] Å."""
    harmonics: Features
    """{irrep: [R, K, 2l + 1]}."""
    basis: Array
    """[R, K, n]."""
    factor: Array
    """[R, K], on messages whose radial weights do not vanish at the cutoff by themselves."""
    elements: tuple[Array, Array]
    """One-hot elements of senders [R, K, S] and receivers [R, S]."""


class Atoms(NamedTuple):
    """All atoms of a graph, or those of one block."""

    graph: Graph
    """Its rows are theirs; senders are positions among all atoms, receivers among these."""
    one_hot: Array
    """[n, S] elements."""
    heads: Array
    """[n, H] one-hot."""
    everyone: tuple[Array, Array]
    """Species [N] and elements [N, S] of all atoms."""


class Interaction(nn.Module):
    """All blocks but the non-linear one: the message, and the self-connection."""

    config: InteractionConfig
    model: MACEConfig
    backend: Backend

    def setup(self) -> None:
        config, num_elements = self.config, self.model.num_elements
        constant = self.model.silu_constant
        _, width = _paths(config, self.model.edge_irreps)
        skipped = config.hidden_irreps if config.is_residual else config.target_irreps
        self.skip_tp = ElementLinear(skipped, num_elements)
        self.linear_up = Linear(config.sent_irreps)
        self.conv_tp_weights = RadialMLP(config.radial_mlp, width, constant)
        self.linear = Linear(config.target_irreps)
        if config.has_density:
            self.density_fn = RadialMLP((), 1, constant)

    def send(self, x: Features) -> Features:
        """What atoms tell their neighbours."""
        return self.linear_up(x)

    def __call__(
        self, x: Features, sent: Features, everyone: Features, edges: Edges, atoms: Atoms
    ) -> tuple[Features, Features]:
        """Message by irrep and self-connection (of residual blocks) of some of the atoms.

        Args:
          x: features of these atoms.
          sent: what they send.
          everyone: what all atoms send.
          edges: of these atoms.
          atoms: who they are.
        """
        config, graph = self.config, atoms.graph
        connected = self.skip_tp(x, graph.elements, atoms.one_hot) if config.is_residual else {}
        paths, _ = _paths(config, self.model.edge_irreps)
        with jax.default_matmul_precision(self.backend.precision.radial):
            hidden, matrix = self.conv_tp_weights(edges.basis)
        if not self.model.apply_cutoff:
            hidden = hidden * edges.factor[..., None]
        message = self.backend.convolve(everyone, edges.harmonics, (hidden, matrix), paths, graph)
        message = self.linear(message)
        if config.has_density:
            x_last, column = self.density_fn(edges.basis)
            divisor = _density(x_last @ column, edges, graph, self.model.apply_cutoff) + 1.0
        else:
            divisor = config.avg_num_neighbors
        message = {name: block / divisor for name, block in message.items()}
        if not config.is_residual:
            message = self.skip_tp(message, graph.elements, atoms.one_hot)
        return message, connected


@functools.cache
def _paths(config: InteractionConfig, edge_irreps: str) -> tuple[tuple[Path, ...], int]:
    """Paths of a block's tensor product, and how many radial weights an edge has for them."""
    paths = tensor_product_paths(config.sent_irreps, edge_irreps, config.target_irreps)
    sent = multiplicities(config.sent_irreps)
    return tuple(paths), sum(sent[path.node] for path in paths)


def _density(values: Array, edges: Edges, graph: Graph, vanishes: bool) -> Array:
    """Σ tanh(values²) over the edges of each atom: [R, K, 1] -> [N, 1, 1]."""
    density = jnp.tanh(values[..., 0] ** 2)
    if not vanishes:
        density = density * edges.factor
    return sum_rows(density.sum(axis=1), graph)[:, None, None]


class NonLinearInteraction(nn.Module):
    """``RealAgnosticResidualNonLinearInteractionBlock``: edges see elements; gated messages."""

    config: InteractionConfig
    model: MACEConfig
    backend: Backend

    def setup(self) -> None:
        config, num_elements = self.config, self.model.num_elements
        _, width = _paths(config, self.model.edge_irreps)
        mul = multiplicities(config.node_feats_irreps)["0e"]
        eps = config.layer_norm_eps
        self.skip_tp = Linear(config.hidden_irreps)
        self.linear_up = Linear(config.sent_irreps)
        self.linear_res = Linear(config.gated_irreps)
        self.source_embedding = ElementTable(mul, num_elements)
        self.target_embedding = ElementTable(mul, num_elements)
        self.conv_tp_weights = EdgeMLP(config.radial_mlp, width, eps)
        self.density_fn = EdgeMLP(config.density_mlp, 1, eps)
        self.alpha = parameter(self, "alpha", nn.initializers.constant(20.0), ())
        self.beta = parameter(self, "beta", nn.initializers.zeros, ())
        self.linear_1 = Linear(config.gated_irreps)
        self.linear_2 = Linear(config.target_irreps)

    def send(self, x: Features) -> Features:
        """As :meth:`Interaction.send`."""
        return self.linear_up(x)

    def __call__(
        self, x: Features, sent: Features, everyone: Features, edges: Edges, atoms: Atoms
    ) -> tuple[Features, Features]:
        """As :class:`Interaction`."""
        graph = atoms.graph
        connected = self.skip_tp(x)
        residual = self.linear_res(sent)
        paths, _ = _paths(self.config, self.model.edge_irreps)
        source = self.source_embedding(graph.elements)
        target = self.target_embedding(graph.elements)
        with jax.default_matmul_precision(self.backend.precision.radial):
            hidden, matrix = self.conv_tp_weights(edges.basis, source, target, edges.elements)
            last, column = self.density_fn(edges.basis, source, target, edges.elements)
        hidden = hidden * edges.factor[..., None]
        density = _density(last @ column, edges, graph, vanishes=False)
        message = self.backend.convolve(everyone, edges.harmonics, (hidden, matrix), paths, graph)
        message = {
            name: block / (density * self.beta + self.alpha) + residual.get(name, 0.0)
            for name, block in self.linear_1(message).items()
        }
        return self.linear_2(self._gated(message)), connected

    def _gated(self, x: Features) -> Features:
        config = self.config
        assert config.gate is not None
        target = multiplicities(config.target_irreps)
        start = target["0e"]
        out = {"0e": config.gate.scalar_constant * jax.nn.silu(x["0e"][..., :start])}
        for name, mul in list(target.items())[1:]:
            gates = jax.nn.sigmoid(x["0e"][..., start : start + mul])
            start += mul
            if name in x:
                out[name] = x[name] * (config.gate.gate_constant * gates)
        return out


class Product(nn.Module):
    """Symmetric contraction, linear map, plus the self-connection."""

    config: ProductConfig
    num_elements: int
    backend: Backend

    @nn.compact
    def __call__(
        self,
        message: Array,
        connected: Features,
        graph: Graph,
        one_hot: Array,
        couplings: Any,
    ) -> Features:
        config = self.config
        elements, num_elements = graph.elements, self.num_elements
        if config.is_agnostic:
            elements, num_elements = jnp.zeros_like(elements[:1]), 1
            one_hot = jnp.ones_like(one_hot[:, :1])
        contract = SymmetricContraction(
            config.irreps_out,
            config.paths,
            num_elements,
            self.backend.contract,
            name="symmetric_contractions",
        )
        x = contract(message, elements, one_hot, couplings)
        x = Linear(config.irreps_out, name="linear")(x)
        if not config.use_sc:
            return x
        return {name: x[name] + connected[name] if name in connected else x[name] for name in x}


class Readout(nn.Module):
    """Scalars of one layer to an energy per atom and head."""

    config: ReadoutConfig
    model: MACEConfig

    @nn.compact
    def __call__(self, x: Features, heads: Array) -> Array:
        """Features, one-hot heads [N, H] -> [N, H], before scale and shift.

        Only the column of an atom's own head means anything.
        """
        num_heads = heads.shape[-1]
        out = f"{num_heads}x0e"
        if self.config.kind == "linear":
            return Linear(out, name="linear")(x)["0e"][:, 0]
        hidden = self.config.hidden_irreps
        width = multiplicities(hidden)["0e"] // num_heads
        mask = jnp.repeat(heads, width, axis=-1)[:, None, :]

        def activate(x: Features) -> Features:
            y = self.model.gate_constant * GATES[self.model.gate](x["0e"])
            return {"0e": y if num_heads == 1 else y * mask}

        x = activate(Linear(hidden, name="linear_1")(x))
        has_bias = self.config.kind == "bias"
        if has_bias:
            x = activate(Linear(hidden, has_bias=True, name="linear_mid")(x))
        return Linear(out, has_bias=has_bias, name="linear_2")(x)["0e"][:, 0]


class JointEmbedding(nn.Module):
    """Features of graphs and atoms, such as total charge and spin, as scalars of the atoms."""

    config: tuple[EmbeddingConfig, ...]
    mul: int

    @nn.compact
    def __call__(self, graph: Graph) -> Array:
        """-> [N, mul]."""
        found = []
        for spec in self.config:
            given = graph.features[spec.name]
            embedder = Embedder(spec, name=f"embedders_{spec.name}")
            rows = embedder(given)
            found.append(rows[graph.graph_index] if spec.per == "graph" else rows)
        x = jnp.concatenate(found, axis=-1)
        limit = x.shape[-1] ** -0.5

        def uniform(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, minval=-limit, maxval=limit)

        return jax.nn.silu(x @ parameter(self, "project", uniform, (x.shape[-1], self.mul)))


class Embedder(nn.Module):
    """One feature: a row of a table, or a small network."""

    config: EmbeddingConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[M] (or [M, in_dim]) -> [M, emb_dim]."""
        config = self.config
        if config.kind == "categorical":
            shape = (config.num_classes, config.emb_dim)
            table = parameter(self, "weight", nn.initializers.normal(1.0), shape)
            return table[x.reshape(x.shape[0]).astype(jnp.int32) + config.offset]
        x = x.reshape(x.shape[0], config.in_dim)
        for i, width in enumerate((config.in_dim, config.emb_dim)):
            affine = Affine(width, config.emb_dim, config.use_bias, name=f"net_{2 * i}")
            weight, bias = affine()
            x = x @ weight + bias
            x = jax.nn.silu(x) if i == 0 else x
        return x


BlockFn = Callable[["MACE", Any, Edges, Atoms], Any]
"""``(model, what some atoms have, their edges, who they are) -> trees of [n, ...]``."""


class MACE(nn.Module):
    """Interaction energy per atom."""

    config: MACEConfig
    backend: Backend = XLA

    def setup(self) -> None:
        config = self.config
        mul = multiplicities(config.interactions[0].node_feats_irreps)["0e"]
        self.node_embedding = NodeEmbedding(mul, config.num_elements)
        if config.embeddings:
            self.joint_embedding = JointEmbedding(config.embeddings, mul)
        if config.embedding_readout:
            linear = ReadoutConfig(kind="linear", irreps_in=f"{mul}x0e")
            self.embedding_readout = Readout(linear, config)
        self.interactions = [
            (NonLinearInteraction if block.is_nonlinear else Interaction)(
                block, config, self.backend
            )
            for block in config.interactions
        ]
        self.products = [
            Product(product, config.num_elements, self.backend) for product in config.products
        ]
        self.readouts = [Readout(readout, config) for readout in config.readouts]
        if config.moments is not None:
            self.moments = Moments(config.moments, config, self.backend.precision)

    def __call__(self, graph: Graph, constants: Constants) -> Array:
        """-> [N] eV: everything but the isolated-atom energies; padding atoms hold the shift."""
        config = self.config
        one_hot = jax.nn.one_hot(graph.species, graph.elements.shape[0], dtype=graph.vectors.dtype)
        head = take(graph.head, graph.graph_index)
        heads = jax.nn.one_hot(head, len(config.heads), dtype=graph.vectors.dtype)
        scalars = times(one_hot, self.node_embedding(graph.elements))
        outside = jnp.zeros_like(graph.vectors, shape=(graph.n_node,))
        if config.embeddings:
            scalars = scalars + self.joint_embedding(graph)
        x = {"0e": scalars[:, None, :]}
        if config.embedding_readout:
            outside = outside + (self.embedding_readout(x, heads) * heads).sum(axis=-1)
        energy = jnp.zeros_like(outside)
        atoms = Atoms(graph, one_hot, heads, (graph.species, one_hot))
        count = graph.blocks.count
        edges = _edges(config, atoms, constants) if count == 1 else None
        seen = Seen()
        for i in range(len(config.interactions)):
            sent = self.interactions[i].send(x)
            if edges is not None:
                x, energy = self._layer(i, (x, sent, energy), sent, edges, atoms, constants)
            else:
                x, energy = self._layer_in_blocks(i, (x, sent, energy), atoms, constants)
            # kept only where asked for, by Potential.invariants
            self.sow("intermediates", "invariants", x["0e"][:, 0])
            seen = seen.after(x)
        energy = outside + constants.scale[head] * energy + constants.shift[head]
        if config.moments is not None:
            energy = energy + self._of_moments(seen, edges, atoms, constants)
        return energy

    def _of_moments(
        self, seen: Seen, edges: Edges | None, atoms: Atoms, constants: Constants
    ) -> Array:
        """[N] eV that the moments add; the moments are kept for who asks for them."""
        hidden, moments = self.moments(seen, atoms.graph, atoms.one_hot)
        self.sow("intermediates", "magnetic_moments", moments)
        if not self.moments.config.energy:
            return jnp.zeros_like(hidden[:, 0])
        sent = self.moments.send(hidden, moments, atoms.graph, atoms.one_hot)
        onsite = self.moments.onsite(moments, atoms.graph, atoms.one_hot)

        def exchange(model: MACE, own: Array, near: Edges, some: Atoms) -> Array:
            return model.moments.exchange(own, sent, near.basis, near.factor, some.graph)

        if edges is not None:
            return onsite + exchange(self, sent, edges, atoms)
        found: Array = self._in_blocks(exchange, sent, atoms, constants)
        return onsite + found

    def _layer(
        self,
        i: int,
        own: tuple[Features, Features, Array],
        everyone: Features,
        edges: Edges,
        atoms: Atoms,
        constants: Constants,
    ) -> tuple[Features, Array]:
        """Features and energy [n] of some atoms after layer ``i``.

        Args:
          i: the layer.
          own: features of these atoms, what they send, and their energy [n], before it.
          everyone: what all atoms send.
          edges: of these atoms.
          atoms: who they are.
          constants: of the model.
        """
        config = self.config
        x, sent, energy = own
        if i == 0 and config.pair_repulsion:
            energy = energy + _repulsion(config, edges, atoms, constants)
        message, connected = self.interactions[i](x, sent, everyone, edges, atoms)
        packed = concatenate(message, config.products[i].irreps_in)
        couplings = constants.couplings[i]
        x = self.products[i](packed, connected, atoms.graph, atoms.one_hot, couplings)
        # a single readout belongs to the last layer
        j = i - len(config.interactions) + len(config.readouts)
        if j >= 0:
            energy = energy + (self.readouts[j](x, atoms.heads) * atoms.heads).sum(axis=-1)
        return x, energy

    def _layer_in_blocks(
        self,
        i: int,
        own: tuple[Features, Features, Array],
        atoms: Atoms,
        constants: Constants,
    ) -> tuple[Features, Array]:
        """As :meth:`_layer`, one block after the other."""

        def layer(model: MACE, mine: Any, edges: Edges, some: Atoms) -> tuple[Features, Array]:
            return model._layer(i, mine, own[1], edges, some, constants)

        found: tuple[Features, Array] = self._in_blocks(layer, own, atoms, constants)
        return found

    def _in_blocks(self, function: BlockFn, own: Any, atoms: Atoms, constants: Constants) -> Any:
        """``function`` of the atoms of one block after the other: trees of [N, ...] arrays.

        Derivatives evaluate every block again, so that no array of edges and channels outlives it.
        """
        graph, count = atoms.graph, atoms.graph.blocks.count
        first = jnp.arange(count, dtype=graph.receivers.dtype) * (graph.n_node // count)

        def divided(array: Array) -> Array:
            return array.reshape(count, -1, *array.shape[1:])

        parts = (
            divided(graph.vectors),
            divided(graph.senders),
            divided(graph.receivers) - first[:, None],
            divided(graph.species),
            divided(atoms.one_hot),
            divided(atoms.heads),
            jax.tree.map(divided, own),
        )

        def one(model: MACE, carry: None, part: Any) -> tuple[None, Any]:
            vectors, senders, receivers, species, one_hot, heads, mine = part
            block = graph._replace(
                vectors=vectors, senders=senders, receivers=receivers, species=species
            )
            some = atoms._replace(graph=block, one_hot=one_hot, heads=heads)
            return None, function(model, mine, _edges(model.config, some, constants), some)

        scan = nn.scan(
            nn.remat(one, prevent_cse=False),  # a scan is barrier enough
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        _, found = scan(self, None, parts)
        return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), found)


class NodeEmbedding(nn.Module):
    """Scalar features of each element."""

    mul: int
    num_elements: int

    @nn.compact
    def __call__(self, elements: Array) -> Array:
        """[S] rows of the element table -> [S, C]."""
        return ElementTable(self.mul, self.num_elements, name="linear")(elements)


def _edges(config: MACEConfig, atoms: Atoms, constants: Constants) -> Edges:
    graph, (_, one_hot) = atoms.graph, atoms.everyone
    r = jnp.linalg.norm(graph.vectors, axis=-1)
    cutoff = radial.polynomial_cutoff(r, config.r_max, config.cutoff_power)
    # Padding edges lie beyond the cutoff, where steep radial functions could overflow.
    x = jnp.minimum(r, config.r_max)
    if config.distance_transform != "None":
        x = _transformed(config, x, atoms, constants.transform)
    numbers = constants.basis
    if config.radial_type == "bessel":
        basis = radial.bessel(x, numbers["bessel_weights"], numbers["prefactor"])
    elif config.radial_type == "gaussian":
        assert config.gaussian_coefficient is not None
        basis = radial.gaussian(x, numbers["gaussian_weights"], config.gaussian_coefficient)
    else:
        basis = radial.chebyshev(x, config.num_bessel)
    if config.apply_cutoff:
        basis, factor = basis * cutoff[..., None], (r < config.r_max).astype(r.dtype)
    else:
        factor = cutoff
    harmonics = spherical_harmonics(config.edge_irreps, graph.vectors / r[..., None])
    elements = take(one_hot, graph.senders), take(atoms.one_hot, graph.receivers)
    return Edges(r, harmonics, basis, factor, elements)


def _transformed(config: MACEConfig, r: Array, atoms: Atoms, numbers: Mapping[str, Array]) -> Array:
    radii = sum(_of_pairs(numbers["covalent_radii"], atoms))
    if config.distance_transform == "Agnesi":
        return radial.agnesi(r, radii, numbers["a"], numbers["q"], numbers["p"])
    if config.distance_transform == "Soft":
        return radial.soft(r, radii, numbers["alpha"])
    return radial.soft_0_3_6(r, radii, numbers["a"], numbers["b"])


def _of_pairs(table: Array, atoms: Atoms) -> tuple[Array, Array]:
    """Rows of a table over elements, of senders [R, K] and of receivers [R, 1]."""
    graph, (species, _) = atoms.graph, atoms.everyone
    values = table[graph.elements]
    return values[species][graph.senders], values[graph.species][graph.receivers][:, None]


def _repulsion(config: MACEConfig, edges: Edges, atoms: Atoms, constants: Constants) -> Array:
    """[n] eV."""
    numbers = constants.repulsion
    pair = _of_pairs(constants.charges, atoms)
    radii = sum(_of_pairs(numbers["covalent_radii"], atoms))
    values = radial.zbl(edges.lengths, pair, radii, config.repulsion_power, numbers)
    # torch sees no pair beyond the model's cutoff, where padding lies
    values = jnp.where(edges.lengths < config.r_max, values, 0.0)
    return sum_rows(values.sum(axis=1), atoms.graph)
