"""Which cells can be trained as one step, and running them so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
from rich.console import Console

from jaxft import bundle, inputs, run
from jaxft import config as configs
from jaxft.config import Config
from jaxft.fit import FitResult
from jaxft.inputs import Inputs
from jaxft.logs import Csv, JsonLines
from jaxft.report import Judged
from jaxft.run import RunResult
from jaxft.study import results, stacked
from jaxft.study.cell import begin_anew, precision
from jaxft.study.identity import identity
from jaxft.study.lock import Busy, Held, hold
from jaxft.study.made import contents, ensure
from jaxft.study.plan import Cell
from jaxft.study.results import Result
from jaxft.study.stacked import STRENGTH, Member


def key_of(config: Config, made: Mapping[Path, str] | None = None) -> str | None:
    """Configs of the same key can be stacked; None if this one cannot be at all."""
    chosen = config.optimizer
    goes_alone = (
        config.accumulate > 1,
        chosen.plateau is not None,
        config.patience is not None,
        config.max_seconds is not None,
        any(getattr(entry, STRENGTH, 1.0) == 0 for entry in config.recipe),  # switched off
    )
    if any(goes_alone):
        return None
    is_drawn = isinstance(config.valid, float) or config.train_size is not None
    recipe = [
        entry.model_copy(update={STRENGTH: 1.0}) if hasattr(entry, STRENGTH) else entry
        for entry in config.recipe
    ]
    same = {
        "recipe": recipe,
        "seed": config.seed if is_drawn or config.sources else 0,
        "optimizer": chosen.model_copy(update={"learning_rate": 1.0}),
    }
    return identity(config.model_copy(update=same), made)


def stacks(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that are not begun and can share a step, two at least; the order is the plan's."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if results.read(cell.folder) is None and not cell.config.output.exists():
            key = key_of(cell.config, contents(cell.needs))
            if key is not None:
                found.setdefault(key, []).append(cell)
    return [members for members in found.values() if len(members) > 1]


def run_stack(cells: Sequence[Cell], tell: Callable[[str], None]) -> None:
    """Train cells of one key together, except those that another process has.

    A stack that is killed begins anew. Input that is refused is left to the cells themselves.
    """
    with ExitStack() as locks:
        held: list[tuple[Cell, Held]] = []
        for cell in cells:
            try:
                held.append((cell, locks.enter_context(hold(cell.folder))))
            except Busy as busy:
                tell(f"{cell.id}: {busy}")
        mine = [cell for cell, _ in held]
        if len(mine) < 2 or any(results.read(cell.folder) for cell in mine):
            return
        with precision(mine[0].config):
            try:
                ensure(mine[0].needs, Console(quiet=True))
                given = inputs.read(mine[0].config, Console(quiet=True))
            except (ValueError, ImportError):
                return
            for member, (cell, lock) in zip(
                stacked.fit([cell.config for cell in mine], given), held, strict=True
            ):
                lock.check()
                results.save(cell.folder, _finished(cell, member, given))
        tell(f"{len(mine)} cells in one step: {', '.join(cell.id for cell in mine)}")
    jax.clear_caches()


def _finished(cell: Cell, member: Member, given: Inputs) -> Result:
    """Write what a run leaves, but for its page, and say how it ended."""
    config, fitted = cell.config, member.result
    if member.reason is not None or fitted is None:
        return Result(results.DIVERGED, member.reason or "")
    begin_anew(cell)
    config.output.mkdir(parents=True)
    (config.output / run.CONFIG).write_text(configs.to_yaml(config))
    for log in (JsonLines(config.output / "metrics.jsonl"), Csv(config.output / "metrics.csv")):
        log.start(fitted.history)
        log.close()
    path = config.output / run.MODEL
    bundle.save(path, given.model, fitted.params, provenance=run.provenance_of(config, fitted))
    return results.of_run(cell, _judged(config, given, fitted))


def _judged(config: Config, given: Inputs, fitted: FitResult) -> RunResult:
    before = run.predict_tests(config, given, given.params)
    after = run.predict_tests(config, given, fitted.params)
    judged = [
        Judged(name, frames, before[name], after[name], config.test[name].e0s == "base")
        for name, frames in given.tests.items()
    ]
    return RunResult(given.model, fitted, judged, config.output / run.MODEL)
