"""Several batches for one update, stacked along a leading axis."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jaxft.data.batches import Shape, pack
from jaxft.data.mixture import Mixture
from jaxft.graph import Batch, with_shared_totals


def updates(
    train: Mixture, count: int, number: int, *, seed: int | None, dtype: str, start: int = 0
) -> Iterator[Batch]:
    """The updates of an epoch, of ``count`` batches each; otherwise as :meth:`Mixture.epoch`.

    The arrays of ``count`` batches are stacked along a leading axis, for ``accumulate=count`` of
    :func:`jaxft.finetune`; they share their totals, so the sum of their gradients is that of one
    batch of all their frames. Where an epoch ends early, batches without weight fill
    the last update.

    Args:
      train: without alternating sources, whose batches are updates of their own.
      count: batches per update.
      number: of the epoch.
      seed: of the order.
      dtype: of the floating arrays.
      start: skip this many updates.
    """
    if train.alternate:
        raise ValueError("batches of alternating sources are updates of their own; use count=1.")
    batches = train.epoch(number, seed=seed, dtype=dtype, start=start * count)
    while group := list(itertools.islice(batches, count)):
        # Of one ladder: the largest in one size is the largest in all.
        shape = Shape(*np.max([_shape(batch) for batch in group], axis=0).tolist())
        same = [pack(train.dataset, batch.frame[batch.frame >= 0], shape, dtype) for batch in group]
        yield _stacked(with_shared_totals(same), count)


def _shape(batch: Batch) -> Shape:
    return Shape(batch.graph.n_node, len(batch.graph.receivers), batch.graph.n_graph)


def _stacked(batches: Sequence[Batch], count: int) -> Batch:
    last = batches[-1]
    nobody = last.graph._replace(
        is_graph=np.zeros_like(last.graph.is_graph), is_atom=np.zeros_like(last.graph.is_atom)
    )
    filler = last._replace(
        graph=nobody,
        weights=jax.tree.map(np.zeros_like, last.weights),
        frame=np.full_like(last.frame, -1),
    )
    filled = [*batches, *[filler] * (count - len(batches))]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *filled)
