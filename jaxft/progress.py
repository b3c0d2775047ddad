"""Where a run stands: what an update changes, what a checkpoint holds."""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft import tree
from jaxft.checkpoint import Checkpoints
from jaxft.data import Dataset
from jaxft.train import Trainable, TrainState
from jaxft.typing import Array, Params


class Progress(NamedTuple):
    """Where a run stands: after ``epoch``, and ``batch`` updates into the next. Plain numbers."""

    epoch: int = -1
    batch: int = 0
    losses: tuple[float, ...] = ()
    """Of the updates of the unfinished epoch."""
    best_epoch: int = 0
    best: float = math.inf
    history: tuple[dict[str, float], ...] = ()
    plateau: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """That its epochs took, without waiting for programs."""
        rows = self.history[1:]
        return sum(row["seconds"] - row.get("compiling", 0.0) for row in rows)

    def is_done(self, patience: int | None) -> bool:
        return patience is not None and self.epoch - self.best_epoch >= patience


class Moving(NamedTuple):
    """What an update changes, on the device."""

    state: TrainState
    ema: Trainable
    is_sound: Array
    """[] bool; False since an update that was not finite: nothing moves any more."""


class Run(NamedTuple):
    moving: Moving
    best: Trainable
    progress: Progress

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds; frozen leaves come from the model again."""
        state = self.moving.state
        moving = {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
        return {"state": moving, "ema": self.moving.ema, "best": self.best}

    def save(self, checkpoints: Checkpoints) -> None:
        step = int(self.moving.state.step)
        if checkpoints.latest != step:
            checkpoints.save(step, self.arrays(), self.progress._asdict())


def resumed(run: Run, checkpoints: Checkpoints) -> Run:
    arrays, record = checkpoints.restore(run.arrays())
    state = run.moving.state._replace(**arrays["state"])
    sequences = {name: tuple(record[name]) for name in ("losses", "history")}
    progress = Progress(**record | sequences)
    return Run(Moving(state, arrays["ema"], run.moving.is_sound), arrays["best"], progress)


def fingerprint_of_frames(dataset: Dataset) -> str:
    """Number and hash of the frames: edges, elements, labels, weights, heads and features."""
    digest = hashlib.sha256(dataset.elements.tobytes())
    for sample in dataset.samples:
        for value in jax.tree.leaves(tuple(sample), is_leaf=lambda x: x is None):
            digest.update(b"-" if value is None else np.ascontiguousarray(value).tobytes())
    return f"{len(dataset)} frames {digest.hexdigest()[:16]}"


def fingerprint(params: Params) -> str:
    """Hash of names and numbers of a parameter tree."""
    digest = hashlib.sha256()
    for path, leaf in sorted(tree.flatten(params).items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
