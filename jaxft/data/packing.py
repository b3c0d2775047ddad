"""Which frames share a batch, and in which of a few static shapes.

A batch has a fixed number of frames; what varies is their atoms and edge rows, and every slot that
they leave empty costs as much as a filled one. Two things keep that small. Batches that follow one
another in the shuffled order *trade* frames until all are about equally large. And the static
shapes are those that waste least over batches as they will come, not a fixed ladder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_SHAPES = 6
"""Static shapes of one dataset; the model is compiled for each that occurs."""

NEGLIGIBLE = 0.01
"""Another shape must save this part of the cost, or it is not worth compiling."""

WORTH = 2000.0
"""Edge slots of one pass that another shape must save, too: compiling takes 5 to 10 s, and thirty
passes over so many slots take 1 to 2 s, with a small and a medium model on 2 CPU cores."""

WINDOW = 32
"""Batches, at least, that trade frames with one another."""

ATOM_COST = 16
"""What an atom costs beside its edges, in edge slots; measured on a CPU: 15 with scalar
features (MACE-MP small), 14 with vectors (medium)."""

ROW_COST = 0.5
"""What a row costs beside its slots, in slots; measured on a CPU: 0.6 and 0.0 of the same."""

RESOLUTION = 256
"""Groups of similar batches that the choice of shapes tells apart."""


class Shape(NamedTuple):
    """A static shape: atoms, edge rows and graphs, padding included."""

    n_node: int
    n_row: int
    n_graph: int


def plan(
    costs: np.ndarray, size: int, rng: np.random.Generator | None = None
) -> Iterator[np.ndarray]:
    """Positions of the frames of each batch of one pass; every frame occurs exactly once.

    There are ⌈frames / size⌉ batches, and their numbers of frames differ by at most one: no batch
    is a small remainder, whose few frames would weigh more than others.

    Args:
      costs: [frames], what a frame adds to the size of a batch.
      size: most frames per batch.
      rng: of the order; None keeps it as it is, and nothing trades places.
    """
    count = -(-len(costs) // size)
    if not count:
        return
    order = np.arange(len(costs)) if rng is None else rng.permutation(len(costs))
    batches = np.array_split(order, count)
    if rng is None:
        yield from batches
        return
    edges = np.linspace(0, count, max(1, count // WINDOW) + 1).astype(int)
    for start, stop in itertools.pairwise(edges):
        traded = balance(batches[start:stop], costs)
        # the first batches got the largest frames
        yield from (traded[i] for i in rng.permutation(stop - start))


def balance(
    batches: Sequence[np.ndarray], costs: np.ndarray, kinds: np.ndarray | None = None
) -> list[np.ndarray]:
    """The same frames in as many batches of as many frames each, with about equal sums of cost.

    The largest frames first, each goes where least lies yet. Equally large frames keep their order.

    Args:
      batches: positions of frames.
      costs: by position.
      kinds: by position, small integers: a batch keeps its number of frames of each kind.
    """
    frames = np.concatenate(batches)
    of = np.zeros(len(costs), int) if kinds is None else kinds
    seats = np.array([np.bincount(of[batch], minlength=of.max() + 1) for batch in batches])
    load = np.zeros(len(batches))
    found: list[list[int]] = [[] for _ in batches]
    for frame in frames[np.argsort(-costs[frames], kind="stable")]:
        kind = of[frame]
        chosen = int(np.where(seats[:, kind] > 0, load, np.inf).argmin())
        found[chosen].append(int(frame))
        load[chosen] += costs[frame]
        seats[chosen, kind] -= 1
    return [np.array(batch) for batch in found]


def ladder(
    batches: np.ndarray,
    *,
    n_graph: int,
    row_width: int,
    most: tuple[int, int] | None = None,
    per_pass: int | None = None,
) -> list[Shape]:
    """The few static shapes in which these batches cost least, ascending.

    Args:
      batches: [batches, 2], atoms and rows of batches as they will come.
      n_graph: of all shapes, the padding graph included.
      row_width: slots per row.
      most: atoms and rows that no batch exceeds; the last shape holds them. By default the largest
        of ``batches``.
      per_pass: how many batches a pass has, if ``batches`` are a sample or several of them.
    """
    if not len(batches):
        batches = np.array([most or (0, 0)])
    batches = batches[np.lexsort(batches.T)]
    parts = np.array_split(np.arange(len(batches)), max(1, min(RESOLUTION, len(batches))))
    share = (per_pass or len(batches)) / len(batches)
    counts = share * np.array([len(part) for part in parts])
    nodes, rows = np.array([batches[part].max(axis=0) for part in parts]).T
    runs = [0, *_cuts(counts, nodes, rows, row_width, MAX_SHAPES - (most is not None))]
    sizes = [(nodes[i:j].max(), rows[i:j].max()) for i, j in itertools.pairwise(runs)]
    if most is not None:
        last = counts[runs[-2] :].sum() * (_cost(*most, row_width) - _cost(*sizes[-1], row_width))
        sizes[len(sizes) - (last < WORTH) :] = [most]
    # one atom more: edges that are padding need one to belong to
    return sorted({Shape(_roomy(n + 1), _roomy(max(r, 1)), n_graph) for n, r in sizes})


def smallest(shapes: Sequence[Shape], n_node: int, n_row: int) -> Shape:
    """The one with the fewest rows, then atoms, that holds so many atoms and rows and padding."""
    fits = [shape for shape in shapes if shape.n_node > n_node and shape.n_row >= n_row]
    return min(fits, key=lambda shape: (shape.n_row, shape.n_node))


def _cuts(
    counts: np.ndarray, nodes: np.ndarray, rows: np.ndarray, row_width: int, most: int
) -> list[int]:
    """Ends of the runs, at most ``most``, that the batches in order of rows are cut into.

    All batches of a run take the shape of its largest. Exact, by dynamic programming: the best cut
    of the first j batches into k runs is that of the first i into k - 1, for the best i.
    """
    m = len(counts)
    run = np.full((m + 1, m + 1), np.inf)
    for i in range(m):
        shape = _cost(np.maximum.accumulate(nodes[i:]), rows[i:], row_width)
        run[i, i + 1 :] = np.cumsum(counts[i:]) * shape
    best, came = [np.where(np.arange(m + 1) == 0, 0.0, np.inf)], []
    for _ in range(most):
        total = best[-1][:, None] + run
        came.append(total.argmin(axis=0))
        best.append(total.min(axis=0))
    final = np.array([cost[m] for cost in best[1:]])
    priced = final + WORTH * np.arange(len(final))
    final, enough = final[: priced.argmin() + 1], (1 + NEGLIGIBLE) * final[priced.argmin()]
    k = int(np.flatnonzero(final <= enough)[0])
    ends = [m]
    while ends[0] > 0:
        ends.insert(0, int(came[k][ends[0]]))
        k -= 1
    return ends[1:]


def _cost(nodes: Any, rows: Any, row_width: int) -> Any:
    """In edge slots."""
    return nodes * ATOM_COST + rows * (row_width + ROW_COST)


def _roomy(count: int) -> int:
    """Up to a multiple of the power of two that is 1 or 2 % of it: room for larger batches."""
    step = max(1, 2 ** (int(count).bit_length() - 7))
    return int(-(-count // step)) * step
