"""Cells one after another in this process, or shared by several."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from jaxft.study import results
from jaxft.study.cell import run_cell
from jaxft.study.lock import Busy, is_held
from jaxft.study.plan import Cell
from jaxft.study.results import Result
from jaxft.study.stacking import run_stack, stacks

TellFn = Callable[[str], None]
FORGET = 6
"""Cells after which compiled programs are forgotten: a process may only map so much memory."""

DEVICES = "CUDA_VISIBLE_DEVICES"


def work(
    cells: Sequence[Cell], tell: TellFn, *, retry: bool = False, together: bool = False
) -> None:
    """Run every cell that is not finished, and that no other process runs.

    Any number of processes, on machines that share the folder, may do this at once.

    Args:
      cells: of a plan.
      tell: called with a line after every cell.
      retry: as in :func:`jaxft.study.cell.run_cell`.
      together: first train as one step those that can be, :mod:`jaxft.study.stacked`.
    """
    for stack in stacks(cells) if together else ():
        run_stack(stack, tell)
    ran = 0
    for number, cell in enumerate(cells, start=1):
        known = results.read(cell.folder)
        if known is not None and (known.status == results.DONE or not retry):
            continue
        where = f"{number}/{len(cells)} {cell.id} {cell.name}"
        try:
            found = run_cell(cell, retry=retry)
        except Busy as busy:
            tell(f"{where}: {busy}")
            continue
        tell(f"{where}: {told(found)}")
        ran += 1
        if ran % FORGET == 0:
            jax.clear_caches()


def told(result: Result) -> str:
    """A line about how a cell ended."""
    if result.status != results.DONE:
        return f"{result.status}: {result.reason.splitlines()[0]}"
    seconds = next(q.value for q in result.quantities if q.name == "seconds")
    forces = [
        f"{q.set} {q.value:.1f} meV/Å" for q in result.quantities if q.set and q.name == FORCES
    ]
    return f"done in {seconds:.0f} s of epochs{', F ' if forces else ''}{', '.join(forces)}"


FORCES = "forces_rmse"


def status(cell: Cell) -> str:
    """done, diverged, refused, failed, running, begun or waiting."""
    known = results.read(cell.folder)
    if known is not None:
        return known.status
    if is_held(cell.folder):
        return "running"
    return "begun" if cell.config.output.exists() else "waiting"


def spawn(command: Sequence[str], jobs: int) -> None:
    """Run ``jaxft COMMAND…`` in so many processes, each with its share of cores and GPUs.

    Raises:
      ValueError: one of them failed; the others ended what they did.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    processes = []
    for job in range(jobs):
        environment = os.environ | devices_of(job, jobs, os.environ)
        prefix = [sys.executable, "-m", "jaxft"]
        process = subprocess.Popen([*prefix, *command], env=environment)
        own = share(cores, job, jobs)
        if own:
            os.sched_setaffinity(process.pid, own)
        processes.append(process)
    try:
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()  # each saves where it stands
        for process in processes:
            process.wait()
        raise
    if wrong := [code for code in codes if code]:
        raise ValueError(
            f"{len(wrong)} of {jobs} processes ended with exit code {wrong[0]}; what they said "
            "is above. What is finished is kept: run it again."
        )


def share(things: Sequence[int], job: int, jobs: int) -> list[int]:
    """Every process's part of a list; where there are too few, several have the same."""
    if not things:
        return []
    return list(things[job::jobs]) or [things[job % len(things)]]


def devices_of(job: int, jobs: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What tells a process its GPUs; nothing where there are none."""
    given = environment.get(DEVICES)
    if given is None:
        names = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
        known = sorted((name for name in names if name.isdigit()), key=int)
    else:
        known = [name for name in given.split(",") if name.strip()]
    if not known:
        return {}
    return {DEVICES: ",".join(known[i] for i in share(range(len(known)), job, jobs))}
