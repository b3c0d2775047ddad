"""The batch: padded atoms, edges and graphs, with labels and weights.

Letters used in shapes: N atoms, R edge rows, K slots per row, G graphs, S elements that occur.

*Edge rows.* The edges of each atom fill one or more rows of K slots, so that a sum over
neighbours is a matrix product inside a row and a short sum over rows; nothing scatters edges.

*Padding is physics.* A free slot holds a neighbour at ``PADDING_DISTANCE`` times the cutoff:
its radial features, and every derivative of them, are exactly zero and no norm is. The last graph
holds the padding atoms. No mask is needed to keep padding out of a real atom's energy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxft.typing import Array

PADDING_DISTANCE = 2.0
"""Length of a padding edge, in units of the cutoff."""


class Graph(NamedTuple):
    """What the model sees. Arrays are numpy on the host and jax on the device."""

    vectors: Array
    """[R, K, 3] Å, receiver minus sender; the only differentiated geometry."""
    senders: Array
    """[R, K] int32, atom index."""
    receivers: Array
    """[R] int32, atom index, ascending."""
    species: Array
    """[N] int32, index into ``elements``."""
    elements: Array
    """[S] int32, index into the model's element table."""
    graph_index: Array
    """[N] int32, the graph of each atom."""
    volume: Array
    """[G] Å³; 1 for graphs that are not periodic in three directions."""
    is_atom: Array
    """[N] bool, False for padding."""
    is_graph: Array
    """[G] bool, False for padding."""
    head: Array
    """[G] int32, which of the model's heads speaks."""
    features: Mapping[str, Array]
    """What the model embeds besides elements: [G] per graph (total charge, …), [N, …] per atom."""

    @property
    def n_node(self) -> int:
        return self.species.shape[0]

    @property
    def n_graph(self) -> int:
        return self.volume.shape[0]


class Labels(NamedTuple):
    """Reference values; entries without a label hold zeros and have weight 0."""

    energy: Array
    """[G] eV, isolated-atom energies removed (on the host, in float64)."""
    forces: Array
    """[N, 3] eV/Å."""
    stress: Array
    """[G, 3, 3] eV/Å³, ASE sign."""


class Weights(NamedTuple):
    """Non-negative weights of the labels: 0 for a missing label and for padding.

    Weight 2 is the label twice. The same names hold their sums in :attr:`Batch.totals`.
    """

    energy: Array
    """[G]."""
    forces: Array
    """[N]."""
    stress: Array
    """[G]."""


class Batch(NamedTuple):
    """A graph with what it should reproduce."""

    graph: Graph
    labels: Labels
    weights: Weights
    totals: Weights
    """Scalars: what a loss divides by, the sums of the weights over the whole update. Those of the
    batch itself, unless the update is spread over several; see :func:`with_shared_totals`."""
    n_atoms: Array
    """[G] int32, atoms per graph; 1 for an empty padding graph, so that dividing is safe."""
    frame: Array
    """[G] int32, position of the frame in its dataset; -1 for padding."""


def totals_of(weights: Weights) -> Weights:
    """The sums of the weights of one batch, as scalars."""
    return Weights(*(array.sum() for array in weights))


def with_shared_totals(batches: Sequence[Batch]) -> list[Batch]:
    """The batches of *one* update, each with the sums of the weights of them all.

    Each loss then is its share of the loss of one batch of all the frames: losses and gradients are
    to be added, not averaged. So it does not matter how frames with missing labels or of unequal
    size fall into the micro-batches of an accumulated gradient, or onto devices.

    Args:
      batches: at least one; static shapes may differ. Their weights count, not their totals.
    """
    own = [totals_of(batch.weights) for batch in batches]
    shared = Weights(*(sum(sums[1:], sums[0]) for sums in zip(*own, strict=True)))
    return [batch._replace(totals=shared) for batch in batches]


def sum_rows(rows: Array, graph: Graph) -> Array:
    """Sum edge rows onto their receivers: [R, ...] -> [N, ...]."""
    zeros = jnp.zeros((graph.n_node, *rows.shape[1:]), rows.dtype)
    return zeros.at[graph.receivers].add(rows, indices_are_sorted=True)


def sum_senders(slots: Array, graph: Graph) -> Array:
    """Sum edge slots onto their senders: [R, K, ...] -> [N, ...]."""
    flat = slots.reshape(-1, *slots.shape[2:])
    zeros = jnp.zeros((graph.n_node, *flat.shape[1:]), flat.dtype)
    return zeros.at[graph.senders.reshape(-1)].add(flat)


def sum_atoms(atoms: Array, graph: Graph) -> Array:
    """Sum atoms onto their graphs: [N, ...] -> [G, ...]."""
    zeros = jnp.zeros((graph.n_graph, *atoms.shape[1:]), atoms.dtype)
    return zeros.at[graph.graph_index].add(atoms, indices_are_sorted=True)
