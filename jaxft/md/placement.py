"""Replicas laid out as one graph, with the room that they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import ase
import jax
import jax.numpy as jnp
import numpy as np
from ase.data import covalent_radii

from jaxft.data import Dataset, Frame, Shape, pack, prepare
from jaxft.graph import edges_per_block, fullest, num_blocks
from jaxft.md.limits import PADDING
from jaxft.md.motion import State, Still
from jaxft.md.pairs import Layout
from jaxft.potential import Potential

HEADROOM = 1.08
"""Free room in a static shape when a list is made."""


class Placed(NamedTuple):
    """Of G replicas."""

    layout: Layout
    still: Still
    state: State
    """At step -1, before the forces are known."""
    starts: np.ndarray
    """[G], the first atom of each."""
    e0: np.ndarray
    """[G] eV, isolated-atom energies of each."""


def place(
    model: Potential,
    structures: Sequence[ase.Atoms],
    frames: Sequence[Frame],
    *,
    head: str,
    dtype: str,
    closest: float,
    seeds: Sequence[int],
) -> Placed:
    """All replicas, one after the other, and padding.

    Args:
      model: the potential.
      structures: with the velocities to start from.
      frames: the same structures.
      head: of the model.
      dtype: of the device's numbers.
      closest: least distance of two atoms, in sums of their covalent radii.
      seeds: of each replica.
    """
    dataset = prepare(frames, model, head=head)
    counts = dataset.nodes
    n_row, width = max(int(dataset.rows.sum()), 1), dataset.row_width
    blocks = num_blocks(int(HEADROOM * n_row) * width, int(counts.sum()), edges_per_block(None))
    n_node = blocks * -(-(int(counts.sum()) + 1) // blocks)
    starts = np.cumsum([0, *counts])[:-1]
    owners = np.concatenate(
        [sample.receivers + start for sample, start in zip(dataset.samples, starts, strict=True)]
    )
    needed = blocks * fullest(owners, n_node, blocks)
    layout = Layout(width, roomy(needed, HEADROOM, blocks), blocks)
    shape = Shape(n_node=n_node, n_row=n_row, n_graph=len(counts) + 1)
    still = _still(dataset, shape, structures, dtype, closest, seeds)
    e0s = model.e0s[model.head_index(head), dataset.elements]
    e0 = np.array([e0s[sample.species].sum() for sample in dataset.samples])
    return Placed(layout, still, _at_rest(structures, n_node, dtype), starts, e0)


def _still(
    dataset: Dataset,
    shape: Shape,
    structures: Sequence[ase.Atoms],
    dtype: str,
    closest: float,
    seeds: Sequence[int],
) -> Still:
    graph = pack(dataset, range(len(dataset)), shape, dtype).graph
    spare = shape.n_node - int(dataset.nodes.sum())
    masses = np.concatenate([atoms.get_masses() for atoms in structures])
    radii = covalent_radii[np.concatenate([atoms.numbers for atoms in structures])]
    ranks = [np.arange(n) for n in (*dataset.nodes, spare)]
    still = Still(
        graph._replace(vectors=None, senders=None, receivers=None),
        np.pad(masses, (0, spare), constant_values=1.0).astype(dtype),
        np.pad(closest * radii, (0, spare)).astype(dtype),
        jax.vmap(jax.random.key)(jnp.array([*seeds, 0], jnp.uint32)),
        np.concatenate(ranks).astype(np.int32),
    )
    return jax.device_put(still)


def _at_rest(structures: Sequence[ase.Atoms], n_node: int, dtype: str) -> State:
    n_graph = len(structures) + 1
    velocities = np.concatenate([atoms.get_velocities() for atoms in structures])
    velocities = np.pad(velocities, ((0, n_node - len(velocities)), (0, 0))).astype(dtype)
    reason = np.zeros(n_graph, np.int32)
    reason[-1] = PADDING
    return State(
        step=np.int32(-1),
        displacements=np.zeros((n_node, 3), dtype),
        velocities=velocities,
        strain=np.zeros(n_graph, dtype),
        forces=np.zeros((n_node, 3), dtype),
        energies=np.zeros(n_node, dtype),
        stress=np.zeros((n_graph, 3, 3), dtype),
        reason=reason,
        ended=np.zeros(n_graph, np.int32),
        moved=np.zeros(n_graph, bool),
        n_row=np.int32(0),
    )


def roomy(count: float, factor: float, blocks: int = 1) -> int:
    """With room to spare, up to a multiple of 8 in every block."""
    return blocks * max(int(-(-(factor * count / blocks) // 8)) * 8, 8)
