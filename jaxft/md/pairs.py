"""Pairs that may interact until the next list, and the edges of a graph among them.

The host lists all pairs within the cutoff and a skin, in float64 from positions that are never
wrapped. The device finds at every step which of them are within the cutoff and lays these out in
rows, so a step costs what its edges cost, and a thick skin costs little.

Positions are ``scale * (reference + displacement)``, where the reference is that of the list. So a
vector is its float64 value at the list plus a small difference, and float32 loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data import Frame
from jaxft.data.neighbours import Edges, neighbours
from jaxft.graph import PADDING_DISTANCE, Blocks, Graph
from jaxft.typing import Array

WIDEST = 1000.0
"""Å; atoms further apart in a direction without periodicity have evaporated."""


class Layout(NamedTuple):
    """Static shape of the edge rows; a program is compiled for each."""

    row_width: int
    n_row: int
    blocks: int = 1


class Pairs(NamedTuple):
    """Of all replicas, sorted by receiver. Free places lie far beyond the cutoff."""

    vectors: Array
    """[E, 3] Å, receiver minus sender where the list was made."""
    senders: Array
    """[E] int32."""
    receivers: Array
    """[E] int32, ascending."""


def candidates_of(frame: Frame, reach: float) -> Edges:
    """Pairs of one replica within ``reach`` (Å).

    Raises:
      ValueError: as :func:`jaxft.data.neighbours.neighbours`, or atoms have evaporated.
    """
    open_ = ~np.array(frame.pbc)
    extent = np.ptp(frame.positions, axis=0)[open_].max(initial=0.0)
    if not extent < WIDEST:
        raise ValueError(f"atoms are {extent:.0f} Å apart; expected less than {WIDEST:.0f} Å")
    return neighbours(frame, reach)


def join(found: Sequence[Edges | None], starts: Sequence[int]) -> Edges:
    """Pairs of several replicas whose first atoms are ``starts``; None is a replica that ended."""
    parts = [(e, s) for e, s in zip(found, starts, strict=True) if e is not None]
    if not parts:
        return Edges(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 3)))
    return Edges(
        np.concatenate([e.senders + s for e, s in parts]),
        np.concatenate([e.receivers + s for e, s in parts]),
        np.concatenate([e.vectors for e, _ in parts]),
    )


def padded(edges: Edges, capacity: int, *, n_node: int, reach: float, dtype: str) -> Pairs:
    """With free places up to ``capacity``, between the last atom, which is padding, and itself."""
    n = len(edges.senders)
    vectors = np.zeros((capacity, 3), dtype)
    vectors[n:, 0] = PADDING_DISTANCE * reach
    senders = np.full(capacity, n_node - 1, np.int32)
    receivers = senders.copy()
    vectors[:n], senders[:n], receivers[:n] = edges.vectors, edges.senders, edges.receivers
    return jax.device_put(Pairs(vectors, senders, receivers))


class Located(NamedTuple):
    """Pairs as they are now."""

    vectors: Array
    """[E, 3] Å."""
    squares: Array
    """[E] Å²."""


def locate(pairs: Pairs, displacements: Array, scale: Array) -> Located:
    """Where the atoms are, with ``displacements`` [N, 3] Å and ``scale`` [N]."""
    shift = displacements[pairs.receivers] - displacements[pairs.senders]
    vectors = scale[pairs.receivers, None] * (pairs.vectors + shift)
    return Located(vectors, (vectors * vectors).sum(1))


def edge_rows(
    pairs: Pairs, located: Located, layout: Layout, graph: Graph, r_max: float
) -> tuple[Graph, Array]:
    """The graph with the edges among the pairs, and the rows that they need [] int32: if these are
    more than ``layout`` has, the graph is not to be used.

    Args:
      pairs: candidates.
      located: their vectors now.
      layout: the rows.
      graph: of which everything but vectors, senders and receivers is taken; the last of its atoms
        is padding, and their number a multiple of that of the blocks.
      r_max: Å.
    """
    width, n_row, blocks = layout
    n_node = graph.n_node
    is_edge = located.squares < r_max**2
    degree = jnp.zeros(n_node, jnp.int32).at[pairs.receivers].add(is_edge, indices_are_sorted=True)
    rows = (-(-degree // width)).reshape(blocks, -1)
    ends = jnp.cumsum(rows, axis=1)
    base = jnp.arange(blocks, dtype=jnp.int32)[:, None]
    first_row = (ends - rows + base * (n_row // blocks)).reshape(-1)
    first_edge = jnp.cumsum(degree) - degree
    rank = jnp.cumsum(is_edge.astype(jnp.int32)) - 1 - first_edge[pairs.receivers]
    place = first_row[pairs.receivers] * width + rank
    n_pair, n_slot = len(pairs.senders), n_row * width
    chosen = (
        jnp.full(n_slot, n_pair, jnp.int32)
        .at[jnp.where(is_edge, place, n_slot)]
        .set(jnp.arange(n_pair, dtype=jnp.int32), mode="drop")
    )
    free = jnp.zeros((1, 3), located.vectors.dtype).at[0, 0].set(PADDING_DISTANCE * r_max)
    vectors = jnp.concatenate([located.vectors, free])[chosen]
    senders = jnp.append(pairs.senders, n_node - 1)[chosen]
    # free rows belong to the last atom of their block, so that receivers ascend
    here = jnp.arange(n_row // blocks)
    owner = jnp.stack([jnp.searchsorted(e, here, side="right") for e in ends])
    receivers = jnp.minimum(owner, n_node // blocks - 1) + base * (n_node // blocks)
    laid = graph._replace(
        vectors=vectors.reshape(n_row, width, 3),
        senders=senders.reshape(n_row, width),
        receivers=receivers.reshape(-1).astype(jnp.int32),
        blocks=Blocks(blocks),
    )
    return laid, blocks * ends[:, -1].max().astype(jnp.int32)
