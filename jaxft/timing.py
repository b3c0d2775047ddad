"""Where the time of an epoch's updates goes: the device, the host's batches, the compiler."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax

from jaxft.compilation import Ahead

T = TypeVar("T")

MEASURED = (
    "seconds",
    "atoms_per_second",
    "edges_per_second",
    "computing",
    "waiting",
    "compiling",
    "compilations",
    "recompilations",
)
"""Columns of a run's log that differ when it is repeated or resumed; all others are the same."""


class Timing(NamedTuple):
    """Of some updates, in seconds."""

    total: float
    """From the request for the first batch until the device had finished the last update."""
    computing: float
    """The device had an update to work at."""
    waiting: float
    """The device had none, since the next batch was not made yet."""
    compiling: float
    """The loop waited for a program; looking one up is counted too."""


class _Update(NamedTuple):
    asked: float
    """For its batch."""
    arrived: float
    launched: float
    done: Future[float]


class Stopwatch:
    """Measures updates without waiting for them: a thread notes when each is finished.

    Example:
      >>> add = Ahead(jax.jit(lambda state, batch: (state + batch, {"loss": state})))
      >>> with Stopwatch() as watch:
      ...     for batch in watch.batches([np.ones(3), np.ones(3)]):
      ...         state, info = watch.update(add, np.zeros(3), batch)
      ...     found = watch.timing()
      >>> bool(0 < found.computing <= found.total)
      True
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stopwatch")
        self._updates: list[_Update] = []
        self._asked = self._arrived = self._compiling = 0.0

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batches(self, batches: Iterable[T]) -> Iterator[T]:
        """The same, noting when each was asked for and when it came."""
        self._asked = time.perf_counter()
        for batch in batches:
            self._arrived = time.perf_counter()
            yield batch
            self._asked = time.perf_counter()

    def update(self, step: Ahead, *args: Any) -> Any:
        """``step(*args)``, whose last result is not donated by what follows."""
        begun = time.perf_counter()
        program = step.program(*args)
        launched = time.perf_counter()
        results = program(*args)
        done = self._pool.submit(_finished, results[-1])
        self._updates.append(_Update(self._asked, self._arrived, launched, done))
        self._compiling += launched - begun
        return results

    def timing(self) -> Timing:
        """Of all updates until now, which it waits for."""
        if not self._updates:
            return Timing(0.0, 0.0, 0.0, 0.0)
        computing = waiting = before = 0.0
        for update in self._updates:
            done = update.done.result()
            waiting += max(0.0, update.arrived - max(update.asked, before))
            computing += max(0.0, done - max(update.launched, before))
            before = done
        return Timing(before - self._updates[0].asked, computing, waiting, self._compiling)


def _finished(results: Any) -> float:
    jax.block_until_ready(results)
    return time.perf_counter()
