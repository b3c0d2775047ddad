"""Several batches for one update: one after another, and spread over devices."""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxft.data.batches import Shape, pack, shapes
from jaxft.data.mixture import Mixture
from jaxft.data.packing import ATOM_COST, ROW_COST, ladder, smallest
from jaxft.graph import Batch, with_shared_totals

LOOKED = 4096
"""Updates, at most, that :meth:`Spread.planned` looks at; a tenth of a second."""

Places = list[list[np.ndarray]]
"""Positions of frames by part and batch; empty where a part of a small batch gets none."""


@dataclass(frozen=True, eq=False)
class Spread:
    """The updates of a mixture, each of ``count`` batches, each batch in ``parts`` for devices.

    Which frames make an update follows from the mixture, the seed and the number of the epoch
    alone, so a run goes on unchanged with another number of parts, and every process knows all of
    it without asking. The frames of a batch are dealt to the parts so that they cost about the
    same, and all parts of an update have one static shape.
    """

    train: Mixture
    seed: int | None
    """Of the order; None keeps that of the frames."""
    dtype: str
    """Of the floating arrays."""
    count: int = 1
    """Batches per update; alternating sources, whose batches are updates of their own, need 1."""
    parts: int = 1
    """Devices of all processes."""
    mine: Sequence[int] | None = None
    """The parts that this process packs; None is all."""

    def __post_init__(self) -> None:
        if self.train.alternate and self.count > 1:
            raise ValueError(
                "batches of alternating sources are updates of their own; use count=1."
            )
        check_parts(self.train.size, self.parts)

    @property
    def num_updates(self) -> int:
        """Per epoch, the same in all."""
        return -(-self.train.num_batches // self.count)

    def frames(self, number: int, update: int) -> Places:
        """The frames of one update of epoch ``number``: [parts][batches, at most ``count``]."""
        first = update * self.count
        batches = range(first, min(first + self.count, self.train.num_batches))
        chosen = [self.train.indices(number, batch, seed=self.seed) for batch in batches]
        dealt = [deal(frames, self.train.dataset.costs, self.parts) for frames in chosen]
        return [list(part) for part in zip(*dealt, strict=True)]

    def batches(self, number: int, start: int = 0) -> Iterator[list[list[Batch]]]:
        """The updates of one epoch, [own parts][count], from the one numbered ``start`` on.

        Where there are fewer batches, or fewer frames than parts, batches without weight fill up.
        """
        data = self.train.dataset
        for update in range(start, self.num_updates):
            frames = self.frames(number, update)
            shape = self._shape(update, frames)
            anyone = frames[0][0]
            found = []
            for part in self.mine if self.mine is not None else range(self.parts):
                own = [
                    pack(data, chosen, shape, self.dtype, key=(self.seed or 0, number))
                    if len(chosen)
                    else _nobody(pack(data, anyone, shape, self.dtype))
                    for chosen in frames[part]
                ]
                found.append([*own, *[_nobody(own[-1])] * (self.count - len(own))])
            yield found

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Likewise as arrays [own parts, count, …], or [own parts, …] if ``count`` is 1."""
        for parts in self.batches(number, start):
            if self.count == 1:
                yield _stacked([part[0] for part in parts])
            else:
                yield _stacked([_stacked(part) for part in parts])

    def shapes(self) -> list[Shape]:
        """All static shapes, ascending: as many as :attr:`Mixture.shapes`, of one part each."""
        return sorted({shape for name in self.train.kinds for shape in self._ladder(name)})

    def planned(self, numbers: range, start: int = 0, *, most: int = LOOKED) -> list[Shape]:
        """The static shapes of the epochs ``numbers``, in the order of their first use.

        Args:
          numbers: of the epochs.
          start: of the first of them skip this many updates.
          most: only so many updates are looked at; where there are more, all other shapes follow,
            whether these use them or not.
        """
        known, found = self.shapes(), dict[Shape, None]()
        ahead = itertools.product(numbers, range(self.num_updates))
        for number, update in itertools.islice(ahead, start, start + most):
            found[self._shape(update, self.frames(number, update))] = None
            if len(found) == len(known):
                break
        is_all = start + most >= len(numbers) * self.num_updates
        return list(found if is_all else found | dict.fromkeys(known))

    def example(self, shape: Shape) -> Batch:
        """Arrays as those of :meth:`epoch`, of one of the static shapes; they mean nothing."""
        data = self.train.dataset
        fits = (data.nodes < shape.n_node) & (data.rows <= shape.n_row)
        one = _nobody(pack(data, np.flatnonzero(fits)[:1], shape, self.dtype))
        part = one if self.count == 1 else _stacked([one] * self.count)
        return _stacked([part] * (self.parts if self.mine is None else len(self.mine)))

    def _shape(self, update: int, frames: Places) -> Shape:
        sizes = [self._size(chosen) for part in frames for chosen in part]
        n_node, n_row = np.max(sizes, axis=0).tolist()
        return smallest(self._ladder(self.train.kind(update * self.count)), n_node, n_row)

    def _size(self, chosen: np.ndarray) -> tuple[int, int]:
        data = self.train.dataset
        return int(data.nodes[chosen].sum()), int(data.rows[chosen].sum())

    def _ladder(self, kind: str) -> list[Shape]:
        if kind not in self._ladders:
            self._ladders[kind] = self._new_ladder(kind)
        return self._ladders[kind]

    @functools.cached_property
    def _ladders(self) -> dict[str, list[Shape]]:
        return {}

    def _new_ladder(self, name: str) -> list[Shape]:
        """Of the mixture, or, where batches are spread, for the largest part of each."""
        train = self.train
        if self.parts == 1 and train.is_alone:
            return shapes(train.dataset, train.size, shuffled=self.seed is not None)
        if self.parts == 1:
            return train.ladders[name]
        is_fixed = train.is_alone and (self.seed is None or train.num_batches == 1)
        kind = train.kinds[name]
        examples = (
            (train.indices(0, batch, seed=self.seed) for batch in range(train.num_batches))
            if is_fixed
            else train.examples(kind)
        )
        sizes = [
            np.max([self._size(part) for part in deal(frames, train.dataset.costs, self.parts)], 0)
            for frames in examples
        ]
        return ladder(
            np.array(sizes),
            n_graph=kind.size + 1,
            row_width=train.dataset.row_width,
            most=None if is_fixed else self._most(kind.most),
            per_pass=train.num_batches,
        )

    def _most(self, most: tuple[int, int]) -> tuple[int, int]:
        """Atoms and rows that no part of a batch exceeds; those of a batch are bounded by
        ``most``. Of :func:`deal`: the last frame of a part came when it had the least."""
        data, (n_node, n_row) = self.train.dataset, most
        row_cost = data.row_width + ROW_COST
        cost = (ATOM_COST * n_node + row_cost * n_row) / self.parts + data.costs.max()
        return min(n_node, int(cost // ATOM_COST)), min(n_row, int(cost // row_cost))


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
    spread = Spread(train, seed=seed, dtype=dtype, count=count)
    for (batches,) in spread.batches(number, start):
        yield _stacked(with_shared_totals(batches))


def check_parts(size: int, parts: int) -> None:
    """Raises ValueError if batches of ``size`` frames leave devices without any."""
    if size < parts:
        raise ValueError(
            f"batch_size={size} frames, over all devices, cannot be spread over {parts} of them;\n"
            f"use a batch_size of at least {parts}, or fewer devices (--devices)."
        )


def deal(frames: np.ndarray, costs: np.ndarray, parts: int) -> list[np.ndarray]:
    """The frames in so many parts of about equal cost, each in its old order; some may be empty.

    The largest frames first, each goes to the part that costs least yet.
    """
    if parts == 1:
        return [frames]
    heap = [(0.0, part) for part in range(parts)]
    of = np.zeros(len(frames), int)
    for i in np.lexsort((frames, -costs[frames])):
        load, part = heapq.heappop(heap)
        of[i] = part
        heapq.heappush(heap, (load + float(costs[frames[i]]), part))
    return [frames[of == part] for part in range(parts)]


def _nobody(batch: Batch) -> Batch:
    """A batch without weight, of the same shape."""
    graph = batch.graph._replace(
        is_graph=np.zeros_like(batch.graph.is_graph), is_atom=np.zeros_like(batch.graph.is_atom)
    )
    return batch._replace(
        graph=graph,
        curvature=jax.tree.map(np.zeros_like, batch.curvature),
        weights=jax.tree.map(np.zeros_like, batch.weights),
        totals=jax.tree.map(np.zeros_like, batch.totals),
        frame=np.full_like(batch.frame, -1),
    )


def _stacked(batches: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
