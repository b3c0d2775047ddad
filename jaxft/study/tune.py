"""Successive halving: all candidates a little, the better ones more.

A rung is a pause. Every candidate is one cell with the epochs, and so the schedule, of the last
rung; who goes on does so from its checkpoint, bitwise the run that never paused. Nothing is trained
twice, whatever the schedule, and rates have not come down where candidates are first compared.

Reference: Jamieson and Talwalkar, AISTATS 2016, arXiv:1502.07943.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from jaxft.study import results
from jaxft.study.cell import epochs_done, run_until
from jaxft.study.lock import Busy
from jaxft.study.plan import Cell
from jaxft.study.search import TuneConfig, candidates, rungs
from jaxft.study.work import FORGET

TellFn = Callable[[str], None]
WAIT = 2.0
"""Seconds between two looks at what another process does."""


@dataclass(frozen=True)
class Trial:
    """A candidate and how far it came."""

    cell: Cell
    epochs: int
    score: float
    """Best metric after so many epochs; infinite if the run ended without."""
    reason: str = ""


@dataclass(frozen=True)
class Search:
    """All candidates of one dataset and recipe, the best first."""

    dataset: str
    recipe: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        """The winner; None if every candidate failed."""
        first = self.trials[0]
        return first if math.isfinite(first.score) else None


def search(tune: TuneConfig, tell: TellFn) -> list[Search]:
    """Search for every dataset and recipe; what is done already is not done again.

    Several processes may do this at once: they share the candidates of a rung, and wait for one
    another where it ends.

    Raises:
      ValueError: as :func:`jaxft.study.search.candidates`.
      Preempted: SIGTERM came; it is saved.
    """
    pairs = list(itertools.product(tune.datasets, tune.recipes))
    planned = [candidates(tune, *pair) for pair in pairs]  # refuses before anything runs
    return [
        Search(*pair, _halved(tune, cells, tell))
        for pair, cells in zip(pairs, planned, strict=True)
    ]


def _halved(tune: TuneConfig, cells: Sequence[Cell], tell: TellFn) -> tuple[Trial, ...]:
    alive, dropped = list(cells), list[Trial]()
    if len(cells) < tune.samples:
        tell(f"{cells[0].dataset} {cells[0].recipe}: there are only {len(cells)} candidates")
    trials: list[Trial] = []
    steps = rungs(tune.first, tune.epochs, tune.keep)
    for rung, epochs in enumerate(steps):
        tell(f"{cells[0].dataset} {cells[0].recipe}: {len(alive)} candidates to epoch {epochs}")
        _advance(alive, epochs, tell)
        trials = sorted((trial(cell, epochs) for cell in alive), key=lambda t: t.score)
        if rung + 1 == len(steps):
            break
        count = max(1, math.ceil(len(cells) / tune.keep ** (rung + 1)))
        going = [t for t in trials if math.isfinite(t.score)][:count]
        dropped = [t for t in trials if t not in going] + dropped
        alive = [t.cell for t in going]
        if not alive:
            return tuple(dropped)
    return (*trials, *dropped)


def _advance(cells: Sequence[Cell], epochs: int, tell: TellFn) -> None:
    """Bring every cell to an epoch, here or in another process."""
    waiting = list(cells)
    for count in itertools.count(1):
        busy = []
        for cell in waiting:
            if results.read(cell.folder) is not None or epochs_done(cell) >= epochs:
                continue
            try:
                run_until(cell, epochs)
            except Busy:
                busy.append(cell)
                continue
            tell(f"  {cell.id} {_told(trial(cell, epochs))}")
            if count % FORGET == 0:
                jax.clear_caches()
        waiting = busy
        if not waiting:
            return
        time.sleep(WAIT)


def trial(cell: Cell, epochs: int) -> Trial:
    """What is known of a candidate after so many epochs: the best value of its metric."""
    known = results.read(cell.folder)
    if known is not None and known.status != results.DONE:
        return Trial(cell, epochs_done(cell), math.inf, f"{known.status}: {known.reason}")
    lines = (cell.config.output / "metrics.jsonl").read_text().splitlines()[1 : epochs + 1]
    metric = cell.config.metric
    column = metric if "/" in metric else f"valid/{metric}"
    scores = [json.loads(line)[column] for line in lines]
    return Trial(cell, len(lines), min(scores, default=math.inf))


def _told(found: Trial) -> str:
    chosen = " ".join(f"{key}={value}" for key, value in found.cell.varied.items())
    result = found.reason or f"{found.cell.config.metric} {found.score:.5g}"
    return f"{chosen or 'as it is'}: {result}"


def rows(found: Sequence[Search]) -> list[dict[str, object]]:
    """Tidy: one per candidate."""
    axes = dict.fromkeys(key for s in found for t in s.trials for key in t.cell.varied)
    return [
        {
            "dataset": one.dataset,
            "recipe": one.recipe,
            "rank": rank,
            "cell": t.cell.id,
            **{axis: t.cell.varied.get(axis) for axis in axes},
            "epochs": t.epochs,
            "metric": t.cell.config.metric,
            "score": t.score if math.isfinite(t.score) else None,
            "reason": t.reason.replace("\n", " "),
        }
        for one in found
        for rank, t in enumerate(one.trials, start=1)
    ]
