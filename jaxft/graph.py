"""The batch: padded atoms, edges and graphs, with labels and weights.

Letters used in shapes: N atoms, R edge rows, K slots per row, G graphs, S elements that occur.

*Edge rows.* The edges of each atom fill one or more rows of K slots, so that a sum over
neighbours is a matrix product inside a row and a short sum over rows; nothing scatters edges.

*Padding is physics.* A free slot holds a neighbour at ``PADDING_DISTANCE`` times the cutoff:
its radial features, and every derivative of them, are exactly zero and no norm is. The last graph
holds the padding atoms. No mask is needed to keep padding out of a real atom's energy.

*Blocks.* For some of the atoms a layer needs their rows, and of all atoms what they send. A graph
whose rows :func:`in_blocks` laid out is evaluated block by block, so that memory holds the features
of all atoms but the messages of one block. To everything else it is an ordinary graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from jaxft.typing import Array

PADDING_DISTANCE = 2.0
"""Length of a padding edge, in units of the cutoff."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class Blocks:
    """A promise about a graph's layout. Compiled programs depend on it as on a shape.

    Atoms and rows are ``count`` blocks of equal size, and the rows of a block belong to its atoms.
    """

    count: int = 1


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
    blocks: Blocks = Blocks()
    """In how many parts the model is to evaluate it."""

    @property
    def n_node(self) -> int:
        return self.species.shape[0]

    @property
    def n_graph(self) -> int:
        return self.volume.shape[0]


EDGES_PER_BLOCK = {"cpu": 1 << 14}
"""Edge slots of a block, by platform. On CPUs blocks of this size are also fastest: what they hold
stays in the caches."""

EDGES_PER_BLOCK_ELSEWHERE = 1 << 18
"""What keeps an accelerator busy; not measured."""


def edges_per_block(given: int | None) -> int:
    """``given``, or what suits the platform in use.

    Raises:
      ValueError: it is less than 1.
    """
    if given is None:
        return EDGES_PER_BLOCK.get(jax.default_backend(), EDGES_PER_BLOCK_ELSEWHERE)
    if given < 1:
        raise ValueError(
            f"blocks of {given} edges are not possible; use max_edges_per_block >= 1, or None for "
            "what suits the platform."
        )
    return given


def num_blocks(n_slot: int, n_node: int, most: int) -> int:
    """How many blocks of at most ``most`` edge slots, about; each has an atom at least."""
    return max(1, min(-(-n_slot // most), n_node))


class Labels(NamedTuple):
    """Reference values; entries without a label hold zeros and have weight 0."""

    energy: Array
    """[G] eV, isolated-atom energies removed (on the host, in float64)."""
    forces: Array
    """[N, 3] eV/Å."""
    stress: Array
    """[G, 3, 3] eV/Å³, ASE sign."""
    moments: Array | None = None
    """[N] or [N, 3] µB, as the model's head predicts them; None for models without one."""


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
    moments: Array | None = None
    """[N]; None where there are no such labels."""


class Curvature(NamedTuple):
    """One displacement of the atoms of every graph, and what the Hessian makes of it."""

    probe: Array
    """[N, 3] Å; zeros where there is no label."""
    product: Array
    """[N, 3] eV/Å, Hessian times ``probe``: the derivative of minus the forces along it."""
    weight: Array
    """[N], non-negative: 0 for a missing label and for padding."""
    total: Array
    """Scalar; as in :attr:`Batch.totals`."""


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
    curvature: Curvature | None = None
    """None if no loss asks for it; then the batch is what it would be without such labels."""


def totals_of(weights: Weights) -> Weights:
    """The sums of the weights of one batch, as scalars."""
    totals: Weights = jax.tree.map(lambda array: array.sum(), weights)
    return totals


def with_totals(batch: Batch, totals: Weights, curvature: Array) -> Batch:
    """The batch with other totals; ``curvature`` is that of :class:`Curvature`, if it has one."""
    if batch.curvature is None:
        return batch._replace(totals=totals)
    return batch._replace(totals=totals, curvature=batch.curvature._replace(total=curvature))


def with_shared_totals(batches: Sequence[Batch]) -> list[Batch]:
    """The batches of *one* update, each with the sums of the weights of them all.

    Each loss then is its share of the loss of one batch of all the frames: losses and gradients are
    to be added, not averaged. So it does not matter how frames with missing labels or of unequal
    size fall into the micro-batches of an accumulated gradient, or onto devices.

    Args:
      batches: at least one; static shapes may differ. Their weights count, not their totals.
    """
    own = [totals_of(batch.weights) for batch in batches]
    shared = jax.tree.map(lambda *sums: sum(sums[1:], sums[0]), *own)
    curvature = sum(b.curvature.weight.sum() for b in batches if b.curvature is not None)
    return [with_totals(batch, shared, curvature) for batch in batches]


def fullest(receivers: np.ndarray, n_node: int, blocks: int) -> int:
    """Most rows that one of the ``blocks`` equal parts of ``n_node`` atoms has."""
    return int(np.bincount(receivers // (n_node // blocks), minlength=1).max())


def in_blocks(graph: Graph, blocks: int, *, r_max: float, n_row: int | None = None) -> Graph:
    """The same graph with its rows in ``blocks`` parts; energies and forces differ by rounding.

    Nothing but rows moves, and rows only past padding: atoms, graphs and labels stay as they are.
    To be called on the host; the last of the atoms must be padding, as in every batch.

    Args:
      graph: numpy, from :func:`jaxft.data.pack`.
      blocks: how many; they divide the number of atoms.
      r_max: the model's cutoff, Å; free rows lie beyond it.
      n_row: rows of all blocks together; by default as few as possible, as many in every block as
        the fullest has.

    Raises:
      ValueError: the atoms cannot be divided so, or the rows do not fit.
    """
    if blocks < 1 or graph.n_node % blocks:
        raise ValueError(
            f"{graph.n_node} atoms cannot be divided into {blocks} equal blocks; pack them into a "
            "shape whose n_node is a multiple of the number of blocks."
        )
    n_node = graph.n_node // blocks
    is_row = np.asarray(graph.is_atom)[graph.receivers]
    receivers = np.asarray(graph.receivers)[is_row]
    most = fullest(receivers, graph.n_node, blocks)
    n_row = blocks * max(most, 1) if n_row is None else n_row
    if n_row % blocks or n_row < blocks * most:
        raise ValueError(
            f"{n_row} rows in {blocks} equal blocks do not hold the {most} rows of the fullest "
            f"one;\nuse n_row={blocks * most}, or a larger multiple of {blocks}."
        )
    block = receivers // n_node
    first = np.searchsorted(block, np.arange(blocks))
    place = block * (n_row // blocks) + np.arange(len(block)) - first[block]
    # free rows belong to the last atom of their block, so that receivers ascend
    last = np.repeat(np.arange(1, blocks + 1, dtype=np.int32) * n_node - 1, n_row // blocks)
    senders = np.repeat(last[:, None], graph.senders.shape[1], axis=1)
    vectors = np.zeros((n_row, *graph.vectors.shape[1:]), graph.vectors.dtype)
    vectors[..., 0] = PADDING_DISTANCE * r_max
    last[place] = receivers
    senders[place] = graph.senders[is_row]
    vectors[place] = graph.vectors[is_row]
    return graph._replace(vectors=vectors, senders=senders, receivers=last, blocks=Blocks(blocks))


def take(table: Array, index: Array) -> Array:
    """``table[index]`` for indices that are rows of it: [N, ...], [...] -> [..., ...].

    jnp's indexing would count negative ones from the end, and takes ten times as long to trace.
    """
    kept = tuple(range(index.ndim, index.ndim + table.ndim - 1))
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=kept, collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    rows = jax.lax.expand_dims(index, (index.ndim,))
    sizes = (1, *table.shape[1:])
    return jax.lax.gather(table, rows, numbers, sizes, mode="promise_in_bounds")


def _sum_onto(values: Array, index: Array, n: int, *, is_sorted: bool = False) -> Array:
    """Sum rows with the same index, of 0 … n - 1: [M, ...], [M] -> [n, ...]."""
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, values.ndim)),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0,),
    )
    zeros = jax.lax.full((n, *values.shape[1:]), 0, values.dtype)
    rows = jax.lax.expand_dims(index, (1,))
    return jax.lax.scatter_add(zeros, rows, values, numbers, indices_are_sorted=is_sorted)


def sum_rows(rows: Array, graph: Graph) -> Array:
    """Sum edge rows onto their receivers: [R, ...] -> [N, ...]."""
    return _sum_onto(rows, graph.receivers, graph.n_node, is_sorted=True)


def sum_senders(slots: Array, graph: Graph) -> Array:
    """Sum edge slots onto their senders: [R, K, ...] -> [N, ...]."""
    flat = slots.reshape(-1, *slots.shape[2:])
    return _sum_onto(flat, graph.senders.reshape(-1), graph.n_node)


def sum_atoms(atoms: Array, graph: Graph) -> Array:
    """Sum atoms onto their graphs: [N, ...] -> [G, ...]."""
    return _sum_onto(atoms, graph.graph_index, graph.n_graph, is_sorted=True)
