"""The loop around the step: epochs, validation, EMA, early stop, checkpoints, exact resume."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import data, tree
from jaxft.checkpoint import Checkpoints
from jaxft.data import Dataset
from jaxft.display import Display
from jaxft.graph import Batch
from jaxft.potential import Potential, predict
from jaxft.strategies.base import Recipe
from jaxft.train import Trainable, TrainState, finetune, merge
from jaxft.typing import Array, LossFn, Params

METRICS = ("energy", "forces", "stress")


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How long, how much at once, and what counts as better."""

    epochs: int
    batch_size: int = 8
    seed: int = 0
    dtype: str = "float32"
    ema_decay: float | None = 0.999
    """Per update; None judges and saves the raw parameters."""
    patience: int | None = None
    """Epochs without a better ``metric`` before the run stops; None never stops early."""
    metric: str = "loss"
    """What chooses the best epoch: ``loss`` (the weighted validation loss), ``energy``, ``forces``
    or ``stress`` (validation RMSE)."""
    checkpoint_every: int | None = None
    """Updates between checkpoints inside an epoch, for long epochs; every epoch ends with one."""
    loss_weights: Mapping[str, float]
    """λ of energy, forces, stress for the validation loss."""

    def __post_init__(self) -> None:
        if self.metric not in ("loss", *METRICS):
            raise ValueError(f"metric {self.metric!r} is unknown; use loss, {', '.join(METRICS)}.")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs={self.epochs}, batch_size={self.batch_size}; use >= 1.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}; use a number in [0, 1) or none.")


class FitResult(NamedTuple):
    """What a run leaves."""

    params: Params
    """Of the best epoch: EMA parameters, merged."""
    best_epoch: int
    history: list[dict[str, float]]
    """One row per epoch; row 0 is the model as it came."""


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite; the state before it was saved."""


def fit(
    model: Potential,
    params: Params,
    *,
    train: Dataset,
    valid: Dataset,
    loss_fn: LossFn,
    recipe: Recipe,
    tx: optax.GradientTransformation,
    settings: FitSettings,
    directory: Path,
    identity: Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> FitResult:
    """Fine-tune, resuming from ``directory`` if it holds a checkpoint of the same run.

    A run that was killed and resumed gives bitwise the parameters of one that was not: the order of
    the frames follows from (seed, epoch), and raw parameters, optimiser state, EMA, best
    parameters and the position are all saved after every epoch.

    Args:
      model, params: where to start.
      train, valid: prepared for this model.
      loss_fn, recipe, tx: as in :func:`jaxft.finetune`.
      settings: the schedule.
      directory: of ``checkpoints/`` and ``metrics.jsonl`` (one line per epoch).
      identity: further facts that a checkpoint must agree with.
      display: progress.

    Raises:
      NonFiniteError: with the epoch, the step and the frames of the batch.
      ValueError: the checkpoint belongs to another run.
    """
    display = display or Display()
    init, step = finetune(loss_fn, recipe, tx)
    state = init(jax.random.key(settings.seed), params)
    run = _Run(state, tree.copy(state.trainable), tree.copy(state.trainable), _Progress())
    checkpoints = Checkpoints(
        directory / "checkpoints",
        {
            **asdict(settings),
            "recipe": [strategy.name for strategy in recipe],
            "parameters": fingerprint(params),
            "train": _fingerprint_of_frames(train),
            "valid": _fingerprint_of_frames(valid),
            **(identity or {}),
        },
    )
    if checkpoints.latest is not None:
        run = _resumed(run, checkpoints)
        display.say(f"resuming after epoch {run.progress.epoch}")
    validate = _validator(model, valid, settings)
    judged = _judge(recipe, settings)
    log = directory / "metrics.jsonl"
    try:
        if run.progress.epoch < 0:
            started = time.perf_counter()
            row = validate(merge(recipe, run.state))
            run = _recorded(run, row, settings, started, log, display)
            run.save(checkpoints)
        while run.progress.epoch < settings.epochs and not run.progress.is_done(settings.patience):
            started = time.perf_counter()
            run = _epoch(run, step, train, settings, display, checkpoints)
            row = {"train/loss": float(np.mean(run.progress.losses)), **validate(judged(run))}
            run = _recorded(run, row, settings, started, log, display)
            run.save(checkpoints)
    finally:
        checkpoints.close()
    best = merge(recipe, run.state._replace(trainable=run.best))
    return FitResult(best, run.progress.best_epoch, list(run.progress.history))


class _Progress(NamedTuple):
    """Where a run stands: after ``epoch``, and ``batch`` batches into the next. Plain numbers."""

    epoch: int = -1
    batch: int = 0
    losses: tuple[float, ...] = ()
    """Of the batches of the unfinished epoch."""
    best_epoch: int = 0
    best: float = math.inf
    history: tuple[dict[str, float], ...] = ()

    def is_done(self, patience: int | None) -> bool:
        return patience is not None and self.epoch - self.best_epoch >= patience


class _Run(NamedTuple):
    state: TrainState
    ema: Trainable
    best: Trainable
    progress: _Progress

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds; frozen leaves come from the model again."""
        state = self.state
        moving = {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
        return {"state": moving, "ema": self.ema, "best": self.best}

    def save(self, checkpoints: Checkpoints) -> None:
        if checkpoints.latest != int(self.state.step):
            checkpoints.save(int(self.state.step), self.arrays(), self.progress._asdict())


def _resumed(run: _Run, checkpoints: Checkpoints) -> _Run:
    arrays, record = checkpoints.restore(run.arrays())
    state = run.state._replace(**arrays["state"])
    sequences = {name: tuple(record[name]) for name in ("losses", "history")}
    progress = _Progress(**record | sequences)
    return _Run(state, arrays["ema"], arrays["best"], progress)


def _epoch(
    run: _Run,
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]],
    train: Dataset,
    settings: FitSettings,
    display: Display,
    checkpoints: Checkpoints,
) -> _Run:
    """The rest of one pass over the training frames; its losses stay in the progress."""
    number = run.progress.epoch + 1
    batches = data.epoch(
        train,
        settings.batch_size,
        dtype=settings.dtype,
        seed=settings.seed,
        number=number,
        start=run.progress.batch,
    )
    total = data.num_batches(train, settings.batch_size) - run.progress.batch
    for batch in display.track(batches, total=total, label=f"epoch {number}"):
        state, info = step(run.state, batch)
        run = run._replace(state=state)
        if not info["is_finite"]:
            run.save(checkpoints)
            raise NonFiniteError(_not_finite(run, train, batch, info))
        if settings.ema_decay is not None:
            run = run._replace(
                ema=_averaged(run.ema, state.trainable, state.step, settings.ema_decay)
            )
        losses = (*run.progress.losses, float(info["loss"]))
        run = run._replace(progress=run.progress._replace(batch=len(losses), losses=losses))
        if settings.checkpoint_every and int(state.step) % settings.checkpoint_every == 0:
            run.save(checkpoints)
    return run


def _not_finite(run: _Run, train: Dataset, batch: Batch, info: Mapping[str, Array]) -> str:
    names = "\n  ".join(train.frames[i].source for i in batch.frame if i >= 0)
    return (
        f"loss {float(info['loss'])} and gradient norm {float(info['gradient_norm'])} are not "
        f"finite in epoch {run.progress.epoch + 1}, batch {run.progress.batch}, after update "
        f"{int(run.state.step)}, for the frames\n  {names}\n"
        "The state before it is saved. Check these frames, or lower the learning rate."
    )


@jax.jit
def _averaged(ema: Trainable, new: Trainable, step: Array, decay: Array) -> Trainable:
    # torch_ema's warm-up, so that a short run is not judged by its first parameters.
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, b: (a + (1 - decay) * (b - a)).astype(a.dtype), ema, new)


def _judge(recipe: Recipe, settings: FitSettings) -> Callable[[_Run], Params]:
    def params_of(run: _Run) -> Params:
        if settings.ema_decay is None:
            return merge(recipe, run.state)
        return merge(recipe, run.state._replace(trainable=run.ema))

    return params_of


def _recorded(
    run: _Run,
    row: dict[str, float],
    settings: FitSettings,
    started: float,
    log: Path,
    display: Display,
) -> _Run:
    """The run with one more epoch in its history, and the best parameters renewed."""
    progress = run.progress
    number = progress.epoch + 1
    value = row[f"valid/{settings.metric}"]
    is_best = value < progress.best
    seconds = time.perf_counter() - started
    row = {"epoch": number, "is_best": is_best, **row, "seconds": seconds}
    judged = run.state.trainable if settings.ema_decay is None else run.ema
    progress = _Progress(
        epoch=number,
        best_epoch=number if is_best else progress.best_epoch,
        best=value if is_best else progress.best,
        history=(*progress.history, row),
    )
    # Written whole: a run that was killed between log and checkpoint repeats its last epoch.
    scratch = log.with_suffix(".part")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in progress.history))
    scratch.replace(log)
    display.epoch(row)
    best = tree.copy(judged) if is_best else run.best
    return run._replace(progress=progress, best=best)


def _validator(
    model: Potential, valid: Dataset, settings: FitSettings
) -> Callable[[Params], dict[str, float]]:
    """``params -> {valid/…: RMSE}`` and the weighted loss, summed over frames and divided once."""

    @jax.jit
    def squared(params: Params, batch: Batch) -> dict[str, tuple[Array, Array]]:
        predicted = predict(model, params, batch.graph)
        labels, weights = batch.labels, batch.weights
        energy = ((predicted.energy - labels.energy) / batch.n_atoms) ** 2
        forces = jnp.mean((predicted.forces - labels.forces) ** 2, axis=-1)
        stress = jnp.mean((predicted.stress - labels.stress) ** 2, axis=(-2, -1))
        values = {"energy": energy, "forces": forces, "stress": stress}
        return {
            name: (jnp.sum(getattr(weights, name) * value), getattr(weights, name).sum())
            for name, value in values.items()
        }

    def validate(params: Params) -> dict[str, float]:
        sums = dict.fromkeys(METRICS, 0.0)
        counts = dict.fromkeys(METRICS, 0.0)
        for batch in data.epoch(valid, settings.batch_size, dtype=settings.dtype):
            for name, (total, count) in squared(params, batch).items():
                sums[name] += float(total)
                counts[name] += float(count)
        means = {name: sums[name] / counts[name] for name in METRICS if counts[name]}
        weighted = sum(settings.loss_weights[name] * mean for name, mean in means.items())
        row = {f"valid/{name}": math.sqrt(mean) for name, mean in means.items()}
        return row | {"valid/loss": weighted}

    return validate


def _fingerprint_of_frames(dataset: Dataset) -> str:
    """Number and hash of the frames: edges, elements, labels, heads and features."""
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
