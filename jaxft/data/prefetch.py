"""An iterator that a thread keeps ahead of its user."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

END = object()


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The same items in the same order, up to ``depth`` of them made while one is in use.

    One thread makes them, from the first request on. What it raises is raised here, in its place
    among the items. Closing the iterator, or leaving it, ends the thread once the item that it is
    at is made, and closes ``items`` if they are a generator.

    Args:
      items: e.g. ``map(jax.device_put, data.epoch(dataset, 8))``.
      depth: items, at least 1, that wait at most; so many are held in memory besides the one in
        use.

    Raises:
      ValueError: ``depth`` is below 1.
    """
    if depth < 1:
        raise ValueError(f"prefetch(depth={depth}) makes nothing ahead; use depth >= 1.")
    return _prefetched(items, depth)


def _prefetched(items: Iterable[T], depth: int) -> Iterator[T]:
    source = iter(items)
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        waiting = deque(pool.submit(next, source, END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not END:
            waiting.append(pool.submit(next, source, END))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
        if hasattr(source, "close"):  # generators have it, other iterators need none
            source.close()
