"""Running one cell: what a process does that may be killed at any time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from rich.console import Console

from jaxft import config as configs
from jaxft import run
from jaxft.config import Config
from jaxft.fit import NonFiniteError, Preempted
from jaxft.study import phonons, results
from jaxft.study.lock import Held, hold
from jaxft.study.made import ensure
from jaxft.study.plan import Cell
from jaxft.study.results import Result

LOG, CHECKPOINTS = "log.txt", "checkpoints"
REASON = 500
"""Characters of a reason that are kept."""


def run_cell(cell: Cell, *, retry: bool = False) -> Result:
    """Run a cell to its end, unless it has been; a run that was killed goes on.

    What cannot be used, or diverges, is a result with its reason, and is not tried again, since it
    would end the same way.

    Args:
      cell: of a plan.
      retry: try again what was refused, diverged or failed.

    Raises:
      Busy: another process runs this cell.
      Preempted: SIGTERM came; it is saved.
      OSError: files cannot be written or have vanished; nothing is recorded.
    """
    with hold(cell.folder) as held:
        known = results.read(cell.folder)
        if known is not None and (known.status == results.DONE or not retry):
            return known
        if known is not None:
            (cell.folder / results.RESULT).unlink()
            begin_anew(cell)
        found = _run(cell, held, None)
        assert found is not None
        return found


def run_until(cell: Cell, epoch: int) -> Result | None:
    """Likewise, but pause after an epoch: None says that more are to come.

    A cell that went on from there is bitwise the one that never paused.
    """
    with hold(cell.folder) as held:
        known = results.read(cell.folder)
        return known or _run(cell, held, epoch)


def _run(cell: Cell, held: Held, until: int | None) -> Result | None:
    if not _can_go_on(cell):
        begin_anew(cell)
    with (cell.folder / LOG).open("a") as log, precision(cell.config):
        console = Console(file=log, width=120, markup=False)
        console.print(cell.name)
        result = _attempt(cell, console, until)
    if result is None:
        return None
    held.check()
    results.save(cell.folder, result)
    shutil.rmtree(cell.config.output / CHECKPOINTS, ignore_errors=True)
    return result


def begin_anew(cell: Cell) -> None:
    """Remove what was begun; a cell's folder is that of its content, and holds nothing else."""
    shutil.rmtree(cell.config.output, ignore_errors=True)


def _attempt(cell: Cell, console: Console, until: int | None) -> Result | None:
    is_pause = until is not None and until < cell.config.epochs
    try:
        phonons.check(cell)
        ensure(cell.needs, console)
        found = run.finetune(cell.config, console=console, restart="auto", until=until)
    except Preempted:
        if is_pause and epochs_done(cell) >= (until or 0):
            return None
        raise
    except NonFiniteError as error:
        return _ended(results.DIVERGED, error, console)
    except (ValueError, ImportError) as error:
        return _ended(results.REFUSED, error, console)
    except jax.errors.JaxRuntimeError as error:  # out of memory, a device that is gone
        return _ended(results.FAILED, error, console)
    return results.of_run(cell, found)


def _ended(status: str, error: Exception, console: Console) -> Result:
    console.print(f"{status}: {error}")
    return Result(status, f"{error}"[:REASON] or type(error).__name__)


def epochs_done(cell: Cell) -> int:
    """Epochs in the log of a cell."""
    path = cell.config.output / "metrics.jsonl"
    return path.read_text().count("\n") - 1 if path.is_file() else 0


def _can_go_on(cell: Cell) -> bool:
    """Whether there is a checkpoint, and under the same names: files of the same content may have
    been moved since, which a run that resumes cannot know."""
    output = cell.config.output
    folder, settings = output / CHECKPOINTS, output / run.CONFIG
    if not folder.is_dir() or not any(path.name.isdigit() for path in folder.iterdir()):
        return False
    return settings.is_file() and settings.read_text() == configs.to_yaml(cell.config)


@contextmanager
def precision(config: Config) -> Iterator[None]:
    """JAX computes as a process of this config alone would; as before afterwards."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", config.parameter_dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
