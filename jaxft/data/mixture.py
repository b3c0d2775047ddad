"""Frames of the target and of further sources, in one stream of batches with exact shares."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np

from jaxft.data.batches import SIMULATED, Dataset, epoch, num_batches, pack, shapes
from jaxft.data.packing import WINDOW, Shape, balance, ladder, plan, smallest
from jaxft.data.shares import Slots, counts, largest_draw, most, passes
from jaxft.graph import Batch

TARGET = "target"
"""The name of the frames that no source brought."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Frames of one origin and their place in a mixture."""

    name: str
    told: str
    """How many frames, and of which head, for people."""
    indices: range
    """Positions in the mixture's dataset; empty for a source of fraction 0."""
    schedule: Literal["mixed", "alternate"] = "mixed"
    share: Fraction = Fraction(0)
    """``mixed``: of the frames of every batch."""
    size: int = 0
    """``alternate``: frames per update."""
    steps: int = 0
    """``alternate``: updates after each batch of the target."""

    def row(self, seed: int | None, start: int, stop: int) -> np.ndarray:
        """Entries ``start`` to ``stop`` of the endless row of shuffled passes over the part."""
        key = None if seed is None else (seed, zlib.crc32(self.name.encode()))
        return self.indices.start + passes(key, len(self.indices), start, stop)


class Kind(NamedTuple):
    """Batches of the target, or of one alternating source."""

    first: int
    """Position of the first one in a period."""
    size: int
    """Frames of the largest."""
    most: tuple[int, int]
    """Atoms and rows that none exceeds."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Batches of target and sources; made by :func:`jaxft.data.mixture`.

    An epoch is one pass over the target: each of its frames occurs exactly once. A source is an
    endless row of shuffled passes over its own frames, so that all of them were seen k or k + 1
    times by the end of each epoch. Neighbouring batches trade frames of one origin until they are
    about equally large, as in :mod:`jaxft.data.packing`.
    """

    dataset: Dataset
    """The frames of the target, then those of each source."""
    size: int
    """Most frames per batch of the target, mixed sources included."""
    parts: tuple[Part, ...]
    """The target first."""

    def __len__(self) -> int:
        """Frames of the target."""
        return len(self.parts[0].indices)

    @property
    def num_batches(self) -> int:
        """Per epoch, the same in all; each is one update."""
        if self.is_alone:
            return num_batches(self.dataset, self.size)
        return self._slots.num_batches * self._period

    @property
    def alternate(self) -> tuple[Part, ...]:
        """Sources whose batches are updates of their own."""
        return tuple(part for part in self.parts if part.schedule == "alternate")

    @property
    def is_alone(self) -> bool:
        """Whether no source brings frames."""
        return len(self) == len(self.dataset)

    @functools.cached_property
    def _slots(self) -> Slots:
        return Slots(len(self), self.parts[0].share, self.size)

    @functools.cached_property
    def _mixed(self) -> tuple[Part, ...]:
        """Those that share batches, the target first."""
        return tuple(p for p in self.parts if p.schedule == "mixed" and len(p.indices))

    @functools.cached_property
    def _updates(self) -> tuple[tuple[Part, int], ...]:
        """(part, step) of the updates that follow a batch of the target."""
        return tuple((part, step) for part in self.alternate for step in range(part.steps))

    @property
    def _period(self) -> int:
        return 1 + len(self._updates)

    def composition(self, number: int, batch: int, *, seed: int | None = None) -> dict[str, int]:
        """``{name: frames}`` of one batch of epoch ``number``; all names.

        Seeds matter without sources alone, where they also say which batches have a frame less.
        """
        found = dict.fromkeys((part.name for part in self.parts), 0)
        if self.is_alone:
            return found | {TARGET: len(self.indices(number, batch, seed=seed))}
        cycle, update = divmod(batch, self._period)
        if update:
            part, _ = self._updates[update - 1]
            return found | {part.name: part.size}
        shares = [part.share for part in self._mixed]
        start, stop = (counts(n, shares) for n in self._slots.of(number, cycle))
        held = zip(self._mixed, start, stop, strict=True)
        return found | {part.name: end - begin for part, begin, end in held}

    def indices(self, number: int, batch: int, *, seed: int | None) -> np.ndarray:
        """Positions in ``dataset`` of one batch; arguments as :meth:`epoch`."""
        if self.is_alone:
            return _batches_alone(self.dataset, self.size, number, seed)[batch]
        cycle, update = divmod(batch, self._period)
        if not update:
            total = self._slots.num_batches
            edges = np.linspace(0, total, max(1, total // WINDOW) + 1).astype(int)
            window = int(np.searchsorted(edges, cycle, side="right")) - 1
            start, stop = int(edges[window]), int(edges[window + 1])
            return _mixed_batches(self, number, start, stop, seed)[cycle - start]
        part, step = self._updates[update - 1]
        done = (number * self._slots.num_batches + cycle) * part.steps + step
        return _own_batches(self, part, done // WINDOW, seed)[done % WINDOW]

    def epoch(
        self, number: int, *, seed: int | None = None, dtype: str = "float32", start: int = 0
    ) -> Iterator[Batch]:
        """The batches of one epoch; without sources those of :func:`jaxft.data.epoch`, bitwise.

        Args:
          number: of the epoch.
          seed: with names and numbers it determines every order; None keeps those of the frames.
          dtype: of the floating arrays.
          start: skip this many batches (to resume inside an epoch).
        """
        data, size = self.dataset, self.size
        if self.is_alone:
            yield from epoch(data, size, dtype=dtype, seed=seed, number=number, start=start)
            return
        for batch in range(start, self.num_batches):
            chosen = self.indices(number, batch, seed=seed)
            sizes = data.nodes[chosen].sum(), data.rows[chosen].sum()
            shape = smallest(self.ladders[self.kind(batch)], *sizes)
            yield pack(data, chosen, shape, dtype, key=(seed or 0, number))

    def kind(self, batch: int) -> str:
        """What a batch is called: the target's, or that of its alternating source."""
        update = batch % self._period
        return self._updates[update - 1][0].name if update else TARGET

    @property
    def shapes(self) -> list[Shape]:
        """All static shapes, ascending: at most six for the target's batches and for each
        alternating source."""
        return sorted({shape for ladder in self.ladders.values() for shape in ladder})

    @functools.cached_property
    def kinds(self) -> dict[str, Kind]:
        """By :meth:`kind`."""
        largest = self._slots.largest
        if self.is_alone:
            sizes = np.sort(self._sizes, axis=0)[-largest:].sum(axis=0)
            return {TARGET: Kind(0, largest, (int(sizes[0]), int(sizes[1])))}
        bounds = most(largest, [part.share for part in self._mixed])
        held = list(zip(self._mixed, bounds, strict=True))
        found = {TARGET: Kind(0, largest, self._most(held))}
        for update, (part, step) in enumerate(self._updates, start=1):
            if step == 0:
                found[part.name] = Kind(update, part.size, self._most([(part, part.size)]))
        return found

    @functools.cached_property
    def ladders(self) -> dict[str, list[Shape]]:
        """Static shapes by :meth:`kind`."""
        if self.is_alone:
            return {TARGET: shapes(self.dataset, self.size)}
        return {name: self._ladder(kind) for name, kind in self.kinds.items()}

    def examples(self, kind: Kind) -> Iterator[np.ndarray]:
        """Positions of the frames of batches as they will come, to choose static shapes by."""
        looks = max(1, min(SIMULATED, 64 * SIMULATED // kind.size))
        for look in range(looks):
            number, cycle = divmod(look, self._slots.num_batches)
            yield self.indices(number, cycle * self._period + kind.first, seed=0)

    def _ladder(self, kind: Kind) -> list[Shape]:
        """As :func:`jaxft.data.shapes`, for batches of one kind."""
        seen = np.array([self._sizes[chosen].sum(axis=0) for chosen in self.examples(kind)])
        width = self.dataset.row_width
        return ladder(
            seen,
            n_graph=kind.size + 1,
            row_width=width,
            most=kind.most,
            per_pass=self._slots.num_batches,
        )

    @property
    def _sizes(self) -> np.ndarray:
        """[frames, 2] atoms and rows."""
        return np.stack([self.dataset.nodes, self.dataset.rows], axis=1)

    def _most(self, held: Sequence[tuple[Part, int]]) -> tuple[int, int]:
        """Atoms and rows of batches of at most so many frames of each part."""
        n_node, n_row = (
            sum(largest_draw(column[list(p.indices)], n, 2 * WINDOW * n) for p, n in held)
            for column in self._sizes.T
        )
        return n_node, n_row

    def describe(self) -> list[str]:
        """What is mixed how, a line per part."""
        return [f"{part.name}: {part.told}{self._how(part)}" for part in self.parts]

    def _how(self, part: Part) -> str:
        if not len(part.indices):
            return ", fraction 0: in no batch"
        if part.schedule == "alternate":
            seen = self._slots.num_batches * part.steps * part.size / len(part.indices)
            updates = "an update" if part.steps == 1 else f"{part.steps} updates"
            share = f"{updates} of {part.size} frames after each one of the target"
        else:
            seen = len(self) * float(part.share / self.parts[0].share) / len(part.indices)
            share = f"{100 * float(part.share):.3g} % of every batch"
        often = "once" if part.name == TARGET else f"~{seen:.3g} times"
        return f" ({share}, each seen {often} per epoch)"


def alone(dataset: Dataset, size: int) -> Mixture:
    """A dataset without sources, as a mixture of one part."""
    return Mixture(dataset, size, (target_part(len(dataset), Fraction(1), None),))


def target_part(count: int, share: Fraction, head: str | None) -> Part:
    """The first part of a mixture."""
    told = f"{count} frames" + (f" of head {head!r}" if head else "")
    return Part(name=TARGET, told=told, indices=range(count), share=share)


@functools.lru_cache(maxsize=2)
def _batches_alone(dataset: Dataset, size: int, number: int, seed: int | None) -> list[np.ndarray]:
    """Those of :func:`jaxft.data.epoch`."""
    rng = None if seed is None else np.random.default_rng([seed, number])
    return list(plan(dataset.costs, size, rng))


@functools.lru_cache(maxsize=8)
def _mixed_batches(
    mixture: Mixture, number: int, start: int, stop: int, seed: int | None
) -> list[np.ndarray]:
    """Positions of the frames of neighbouring batches of the target, which trade."""
    parts, batches = mixture._mixed, []
    for batch in range(start, stop):
        edges = mixture._slots.of(number, batch)
        ends = zip(*(counts(n, [part.share for part in parts]) for n in edges), strict=True)
        rows = [part.row(seed, *end) for part, end in zip(parts, ends, strict=True)]
        batches.append(np.concatenate(rows))
    return _traded(mixture.dataset, parts, batches, seed, (number, start))


@functools.lru_cache(maxsize=8)
def _own_batches(mixture: Mixture, part: Part, window: int, seed: int | None) -> list[np.ndarray]:
    """Likewise of an alternating source, counted from the first of all."""
    first = window * WINDOW
    batches = [
        part.row(seed, i * part.size, (i + 1) * part.size) for i in range(first, first + WINDOW)
    ]
    return _traded(mixture.dataset, (part,), batches, seed, (window, 0))


def _traded(
    dataset: Dataset,
    parts: Sequence[Part],
    batches: list[np.ndarray],
    seed: int | None,
    key: tuple[int, int],
) -> list[np.ndarray]:
    if seed is None:
        return batches
    kinds = np.zeros(len(dataset), int)
    for kind, part in enumerate(parts):
        kinds[list(part.indices)] = kind
    # the first batches get the largest frames, so which are first is drawn
    rng = np.random.default_rng([seed, zlib.crc32(parts[-1].name.encode()), *key, 1])
    order = rng.permutation(len(batches))
    traded = balance([batches[i] for i in order], dataset.costs, kinds)
    return [traded[i] for i in np.argsort(order)]
