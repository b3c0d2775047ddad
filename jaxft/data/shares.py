"""Exact shares of several sets of frames in one endless row of slots, in integers.

Of the first n slots ``round(n f)`` belong to the first set, which has the share f; those that
remain are split among the others in the same way. No count ever shrinks with n, each is within one
of what its share asks for (of up to three sets; within 1.5 of more), and all of it is closed
form: any batch of any epoch is known without those before it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


def counts(n: int, shares: Sequence[Fraction]) -> list[int]:
    """How many of the first ``n`` slots belong to each set; their sum is n."""
    first = rounded(n * shares[0])
    return [first, *_split(n - first, shares[1:])]


def most(n: int, shares: Sequence[Fraction]) -> list[int]:
    """Bounds of what ``n`` neighbouring slots hold of each set, wherever they lie."""
    rest = 1 - shares[0]
    return [ceiling(n * shares[0]), *_split_at_most(ceiling(n * rest), shares[1:])]


def _split(n: int, shares: Sequence[Fraction]) -> list[int]:
    if len(shares) < 2:
        return [n] * len(shares)
    half = len(shares) // 2
    left = rounded(n * _sum(shares[:half]) / _sum(shares))
    return [*_split(left, shares[:half]), *_split(n - left, shares[half:])]


def _split_at_most(n: int, shares: Sequence[Fraction]) -> list[int]:
    if len(shares) < 2:
        return [n] * len(shares)
    parts = shares[: len(shares) // 2], shares[len(shares) // 2 :]
    bounds = (ceiling(n * _sum(part) / _sum(shares)) for part in parts)
    left, right = (_split_at_most(n, part) for n, part in zip(bounds, parts, strict=True))
    return [*left, *right]


def _sum(shares: Sequence[Fraction]) -> Fraction:
    return sum(shares, Fraction(0))


def rounded(value: Fraction) -> int:
    """To the nearest integer, halves up; ``value`` is not negative."""
    return int(value + Fraction(1, 2))


def ceiling(value: Fraction) -> int:
    """The smallest integer that is not smaller."""
    return -int(-value // 1)


@dataclass(frozen=True)
class Slots:
    """Epochs and batches of the row: an epoch holds each of ``count`` target frames once."""

    count: int
    """Frames of the first set."""
    share: Fraction
    """Of the first set, in (0, 1]."""
    size: int
    """Most slots per batch."""

    @property
    def num_batches(self) -> int:
        """Per epoch, the same in all."""
        return ceiling(ceiling(self.count / self.share) / Fraction(self.size))

    @property
    def largest(self) -> int:
        """Slots of the largest batch: batches are equally large, or one less."""
        return -(-ceiling(self.count / self.share) // self.num_batches)

    def of(self, number: int, batch: int) -> tuple[int, int]:
        """The slots of one batch of one epoch: the first, and the first that follows."""
        first, end = (rounded(epoch * self.count / self.share) for epoch in (number, number + 1))
        length, more = divmod(end - first, self.num_batches)
        start, stop = (first + k * length + min(k, more) for k in (batch, batch + 1))
        return start, stop


def passes(key: tuple[int, ...] | None, length: int, start: int, stop: int) -> np.ndarray:
    """Entries ``start`` to ``stop`` of an endless row of passes over ``range(length)``.

    Each pass is shuffled on its own, as (key, number of the pass) determines; None shuffles none.
    """
    found = []
    while start < stop:
        number, first = divmod(start, length)
        taken = min(length - first, stop - start)
        found.append(_pass(key, number, length)[first : first + taken])
        start += taken
    return np.concatenate(found) if found else np.zeros(0, int)


@functools.lru_cache(maxsize=32)
def _pass(key: tuple[int, ...] | None, number: int, length: int) -> np.ndarray:
    order = np.arange(length)
    if key is not None:
        order = np.random.default_rng([*key, number]).permutation(order)
    order.setflags(write=False)
    return order


def largest_draw(sizes: np.ndarray, n: int, stretch: int) -> int:
    """A bound of the summed ``sizes`` [M] of ``n`` entries among any ``stretch`` that follow one
    another in such a row, where none occurs more than ⌈stretch / M⌉ + 1 times."""
    copies = min(n, 1 - (-stretch // len(sizes)))
    return int(np.repeat(np.sort(sizes)[::-1][:n], copies)[:n].sum())
