"""What is known of a finished cell: numbers with units, or why there are none."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft import bundle, tree
from jaxft.evaluate.accuracy import MOMENT_UNITS, UNITS, values_of
from jaxft.evaluate.errors import errors
from jaxft.report import Judged, environment
from jaxft.run import RunResult
from jaxft.study import phonons
from jaxft.study.plan import Cell

RESULT = "result.json"
DONE, DIVERGED, REFUSED, FAILED = "done", "diverged", "refused", "failed"
RATIO = "_ratio"
"""Ends the name of an error divided by the base model's own."""


@dataclass(frozen=True)
class Quantity:
    """One number of a cell."""

    set: str
    """Of test frames; empty for what is of the run itself."""
    name: str
    unit: str
    value: float


@dataclass(frozen=True)
class Result:
    """How a cell ended."""

    status: str
    reason: str = ""
    quantities: tuple[Quantity, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def of_run(cell: Cell, found: RunResult) -> Result:
    """The numbers of a run that went well."""
    quantities = [*_of_training(cell, found)]
    for judged in found.judged:
        quantities += of_set(judged, judged.name in cell.base_tests)
    quantities += [Quantity(*row) for row in phonons.of_run(cell, found.path)]
    return Result(DONE, "", tuple(quantities), environment())


def _of_training(cell: Cell, found: RunResult) -> list[Quantity]:
    history = found.fit.history
    seconds = sum(row["seconds"] for row in history)
    waiting = sum(row.get("compiling", 0.0) for row in history)
    best = history[found.fit.best_epoch]
    trained = sum(int(np.size(leaf)) for leaf in jax.tree.leaves(found.fit.trainable))
    rows = [
        ("trained", "", float(trained)),
        ("epochs", "", float(len(history) - 1)),
        ("best_epoch", "", float(found.fit.best_epoch)),
        ("updates", "", float(history[-1]["updates"])),
        ("seconds", "s", seconds),
        ("seconds_compiling", "s", waiting),
        *((f"{k.replace('/', '_')}", "", v) for k, v in best.items() if k.startswith("valid/")),
    ]
    changed = changed_percent(cell.config.model, found.path)
    if changed is not None:
        rows.append(("changed", "%", changed))
    return [Quantity("", name, unit, float(value)) for name, unit, value in rows]


def changed_percent(base: Path, tuned: Path) -> float | None:
    """Of the numbers of ``base`` those that differ in ``tuned``, to the precision of ``tuned``;
    None for models of different parameters, as with another head."""
    (_, before, _), (_, after, _) = (bundle.load_numpy(path) for path in (base, tuned))
    pairs = tree.flatten(before), tree.flatten(after)
    if {k: v.shape for k, v in pairs[0].items()} != {k: v.shape for k, v in pairs[1].items()}:
        return None
    differ = sum(
        int((np.asarray(old).astype(pairs[1][path].dtype) != pairs[1][path]).sum())
        for path, old in pairs[0].items()
    )
    return 100 * differ / sum(leaf.size for leaf in pairs[0].values())


def of_set(judged: Judged, is_base: bool) -> list[Quantity]:
    before, after = (
        values_of(errors(judged.frames, results).total) for results in (judged.before, judged.after)
    )
    found = []
    for name, unit in (UNITS | MOMENT_UNITS).items():
        now, then = after.get(name), before.get(name)
        if isinstance(now, int | float):
            found.append(Quantity(judged.name, name, unit, float(now)))
        if isinstance(then, int | float) and name.endswith(("rmse", "mae")):
            found.append(Quantity(judged.name, f"before_{name}", unit, float(then)))
            if is_base and isinstance(now, int | float) and then > 0:
                found.append(Quantity(judged.name, f"{name}{RATIO}", "", float(now) / float(then)))
    return found


def save(folder: Path, result: Result) -> None:
    """Write it at once: a reader finds all of it or nothing."""
    scratch = folder / f".{RESULT}.{os.getpid()}"
    scratch.write_text(json.dumps(asdict(result), indent=1) + "\n")
    scratch.replace(folder / RESULT)


def read(folder: Path) -> Result | None:
    """The result of a cell; None if it is not finished.

    Raises:
      ValueError: the file is damaged.
    """
    path = folder / RESULT
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        quantities = tuple(Quantity(**row) for row in found["quantities"])
        return Result(**found | {"quantities": quantities})
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no result of a cell ({error}); remove it to run the cell again."
        ) from error
