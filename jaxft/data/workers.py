"""Neighbour lists of many frames, by as many processes as pay.

matscipy holds Python's lock while it works, so two threads take longer than one. And
``multiprocessing`` either forks, which is not safe beside the threads of JAX, or runs the user's
script again unless that is guarded. The processes here are plain children that run
:mod:`jaxft.data.neighbours` by its path, see its ``serve``. A thread for each sends it frames and
waits for their edges.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from time import perf_counter

import numpy as np

from jaxft.data import neighbours as program
from jaxft.data.frames import Frame
from jaxft.data.neighbours import Edges, neighbours, receive, send

TRIAL = 0.25
"""s that this process works alone before it looks how much is left; most sets are done by then."""

SHARE = 0.5
"""s of work, at least, for each process that is started: a start takes a tenth of a second."""

MOST = 24
"""Processes; to take the edges of a frame costs about a twentieth of making them."""

CHUNK = 2000
"""Atoms, about, that a process is sent at once: less than 0.1 s of work and some 5 MB of edges. Two
such chunks for each process are under way at most."""

ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}


def neighbour_lists(
    frames: Sequence[Frame], r_max: float, *, workers: int | None = None
) -> list[Edges]:
    """The neighbour lists of all frames, in their order, bitwise those of :func:`neighbours`.

    Args:
      frames: structures.
      r_max: Å.
      workers: most processes to start, 1 being none: this one does it all. By default one for each
        core that this process may use, and ``MOST`` at most. Fewer are started, or none, where
        there is too little to do.

    Raises:
      ValueError: as :func:`neighbours`, of the first frame that it refuses; or ``workers`` is not
        positive.
      ChildProcessError: a process that was started has died.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} leaves nobody to work; use 1 for this process alone.")
    most = workers or min(cores(), MOST)
    found: list[Edges] = []
    started = 1
    began, done, total = perf_counter(), 0, sum(map(len, frames))
    for frame in frames:
        found.append(neighbours(frame, r_max))
        done += len(frame)
        spent = perf_counter() - began
        if most > 1 and spent > TRIAL:
            started = min(most, int(spent * (total / max(done, 1) - 1) / SHARE))
            if started > 1:
                break
    if len(found) < len(frames):
        found.extend(_shared(frames[len(found) :], r_max, started))
    return found


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shared(frames: Sequence[Frame], r_max: float, count: int) -> Iterator[Edges]:
    """The same in order, made by ``count`` processes, which end with this iterator."""
    free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def made(chunk: Sequence[Frame]) -> list[np.ndarray]:
        process = free.get()
        try:
            return _ask(process, chunk, r_max)
        finally:
            free.put(process)

    processes: list[subprocess.Popen[bytes]] = []
    pool = ThreadPoolExecutor(count, thread_name_prefix="neighbours")
    try:
        for _ in range(count):
            processes.append(_start())
            free.put(processes[-1])
        chunks = _chunks(frames)
        waiting = deque((chunk, pool.submit(made, chunk)) for chunk in islice(chunks, 2 * count))
        while waiting:
            chunk, future = waiting.popleft()
            answer = future.result()
            waiting.extend((more, pool.submit(made, more)) for more in islice(chunks, 1))
            yield from _edges(chunk, answer, r_max)
    finally:
        for process in processes:
            process.kill()
        pool.shutdown(cancel_futures=True)  # its threads see that the processes are gone
        for process in processes:
            with contextlib.suppress(BrokenPipeError), process:
                pass  # closes the pipes and waits


def _chunks(frames: Sequence[Frame]) -> Iterator[Sequence[Frame]]:
    """Consecutive frames that have ``CHUNK`` atoms together, or more by a part of one frame."""
    start = atoms = 0
    for stop, frame in enumerate(frames, start=1):
        atoms += len(frame)
        if atoms >= CHUNK or stop == len(frames):
            yield frames[start:stop]
            start, atoms = stop, 0


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: the folder of this file holds modules that no other program should find
        [sys.executable, "-P", program.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,  # Ctrl-C is for this process, which then ends the others
    )


def _ask(
    process: subprocess.Popen[bytes], chunk: Sequence[Frame], r_max: float
) -> list[np.ndarray]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        send(
            process.stdin,
            np.array(r_max, np.float64),
            np.array([len(frame) for frame in chunk], np.int64),
            np.array([frame.pbc for frame in chunk], bool),
            np.array([frame.cell for frame in chunk], np.float64),
            np.concatenate([np.asarray(frame.positions, np.float64) for frame in chunk]),
        )
        return receive(process.stdout)
    except (EOFError, BrokenPipeError) as error:
        code = process.wait()
        raise ChildProcessError(
            f"a process that made the neighbour lists of {chunk[0].source} to {chunk[-1].source} "
            f"{_ended(code)};\nwith `workers: 1` (or workers=1) this process makes them itself."
        ) from error


def _ended(code: int) -> str:
    if code == -9:  # SIGKILL, which not every system has a name for
        return "was killed, as systems do when memory runs out"
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _edges(chunk: Sequence[Frame], answer: list[np.ndarray], r_max: float) -> Iterator[Edges]:
    """Of every frame of a chunk; raises ValueError if one was refused."""
    counts, *parts = answer
    cuts = np.cumsum(counts)[:-1]
    for arrays in zip(*(np.split(part, cuts) for part in parts), strict=True):
        yield Edges(*arrays)
    for frame in chunk[len(counts) :]:
        yield neighbours(frame, r_max)
