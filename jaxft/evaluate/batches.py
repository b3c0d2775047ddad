"""Which frames share a batch, and the one static shape of all batches."""

from __future__ import annotations

import numpy as np

from jaxft.data import Dataset, Shape
from jaxft.graph import fullest, num_blocks

GRID = 1.25
"""Ratio of neighbouring capacities, so that similar sets of frames share compiled programs."""


def plan_batches(
    dataset: Dataset, batch_size: int, limit: int
) -> tuple[Shape, list[list[int]], int]:
    """The static shape of all batches, which frames share one, and in how many blocks of about
    ``limit`` edge slots each is evaluated."""
    shape, batches = _plan(dataset, batch_size)
    blocks = num_blocks(shape.n_row * dataset.row_width, shape.n_node, limit)
    if blocks > 1:
        shape = _divisible(dataset, batches, shape, blocks)
    return shape, batches, blocks


def _plan(dataset: Dataset, batch_size: int) -> tuple[Shape, list[list[int]]]:
    """The static shape, and which frames share a batch: filled in order of size, largest first."""
    nodes = [len(sample.species) for sample in dataset.samples]
    rows = [len(sample.receivers) for sample in dataset.samples]
    n_node = _capacity(sum(sorted(nodes)[-batch_size:]))
    n_row = _capacity(sum(sorted(rows)[-batch_size:]))
    n_graph = min(n_node, _capacity(len(nodes)))
    batches: list[list[int]] = [[]]
    node = row = 0
    for i in sorted(range(len(nodes)), key=lambda i: -rows[i]):
        is_full = node + nodes[i] > n_node or row + rows[i] > n_row or len(batches[-1]) == n_graph
        if is_full:
            batches.append([])
            node = row = 0
        batches[-1].append(i)
        node, row = node + nodes[i], row + rows[i]
    # one more atom and graph for the padding
    return Shape(n_node + 1, n_row, n_graph + 1), batches


def _divisible(dataset: Dataset, batches: list[list[int]], shape: Shape, blocks: int) -> Shape:
    """The smallest shape that holds all batches in so many blocks."""
    atoms = 1 + max(int(dataset.nodes[chosen].sum()) for chosen in batches)
    n_node = blocks * -(-atoms // blocks)
    most = 1
    for chosen in batches:
        first = np.cumsum(dataset.nodes[chosen]) - dataset.nodes[chosen]
        found = [dataset.samples[i].receivers + n for i, n in zip(chosen, first, strict=True)]
        most = max(most, fullest(np.concatenate(found), n_node, blocks))
    return Shape(n_node, blocks * most, shape.n_graph)


def _capacity(count: int) -> int:
    """``count``, rounded up to the grid."""
    steps = np.ceil(np.log(max(count, 8) / 8) / np.log(GRID) - 1e-9)
    return int(np.ceil(8 * GRID**steps))
