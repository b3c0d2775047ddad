"""The loop around the step: epochs, validation, EMA, early stop, checkpoints, exact resume."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft import compilation, data, optimizer, parallel, tree
from jaxft.checkpoint import Checkpoints
from jaxft.compilation import Ahead
from jaxft.data import Dataset, Mixture, Spread
from jaxft.display import Display
from jaxft.effort import effort
from jaxft.graph import Batch
from jaxft.logs import Csv, JsonLines, Logger, Logs
from jaxft.optimizer import Plateau
from jaxft.parallel import StopFn
from jaxft.potential import Potential
from jaxft.progress import Moving, Progress, Run, fingerprint, fingerprint_of_frames, resumed
from jaxft.strategies.base import Recipe
from jaxft.timing import Stopwatch, Timing
from jaxft.train import StepFn, Trainable, TrainState, finetune, merge
from jaxft.typing import Array, LossFn, Params
from jaxft.validation import METRICS, Validator, validator

SYNCHRONISE = 16
"""Updates between two looks at what the device found; every look waits for it."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How long, how much at once, and what counts as better."""

    epochs: int
    batch_size: int = 8
    """Frames per batch, over all devices."""
    accumulate: int = 1
    """Batches per update; ``batch_size`` is that of each."""
    seed: int = 0
    dtype: str = "float32"
    """Of the batches; parameters keep their own."""
    ema_decay: float | None = 0.999
    """Per update; None judges and saves the raw parameters."""
    patience: int | None = None
    """Epochs without a better ``metric`` before the run stops; None never stops early."""
    metric: str = "loss"
    """What chooses the best epoch: ``loss`` (the weighted validation loss), ``energy``, ``forces``,
    ``stress`` or ``moments`` (validation RMSE), or one of them of a watched set, as in
    ``replay/forces``."""
    plateau: Plateau | None = None
    """Lowers the learning rate when ``metric`` no longer falls."""
    max_seconds: float | None = None
    """The run ends with the epoch in which its epochs took so long, compilers not counted."""
    checkpoint_every: int | None = None
    """Updates between checkpoints inside an epoch, for long epochs. Epochs end with one, too, but
    not if they are so short that saving would take more than a twentieth of the time."""
    keep_checkpoints: int = 1
    loss_weights: Mapping[str, float]
    """λ of the loss's terms, for the validation loss."""

    def __post_init__(self) -> None:
        known = ("loss", *METRICS, "moments")
        if self.metric.rpartition("/")[2] not in known:
            raise ValueError(f"metric {self.metric!r} is unknown; use one of {', '.join(known)}.")
        for name in ("epochs", "batch_size", "accumulate", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; use >= 1.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}; use a number in [0, 1) or none.")

    @property
    def column(self) -> str:
        """The metric's name in a row of the history."""
        return self.metric if "/" in self.metric else f"valid/{self.metric}"


class FitResult(NamedTuple):
    """What a run leaves."""

    params: Params
    """Of the best epoch: EMA parameters, merged."""
    best_epoch: int
    history: list[dict[str, float]]
    """One row per epoch; row 0 is the model as it came."""
    trainable: Trainable
    """What ``params`` were merged of."""


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite; the state before it was saved."""


class Preempted(RuntimeError):
    """The run was asked to stop, and saved where it stands; the same call goes on from there."""


@dataclass(frozen=True)
class Feed:
    """What a run is fed with, and judged by."""

    train: Mixture
    valid: Dataset
    watch: Mapping[str, Dataset] = field(default_factory=dict)
    """Further sets that are judged after every epoch: what must not be forgotten."""

    def __post_init__(self) -> None:
        if "valid" in self.watch or "train" in self.watch:
            raise ValueError("a watched set cannot be called 'valid' or 'train'; rename it.")


def fit(
    model: Potential,
    params: Params,
    *,
    train: Dataset | Mixture,
    valid: Dataset,
    watch: Mapping[str, Dataset] | None = None,
    loss_fn: LossFn,
    recipe: Recipe,
    tx: optax.GradientTransformation,
    settings: FitSettings,
    directory: Path,
    schedule: optax.Schedule | None = None,
    identity: Mapping[str, Any] | None = None,
    display: Display | None = None,
    logger: Logger | None = None,
    mesh: Mesh | None = None,
    stop: StopFn | None = None,
    until: int | None = None,
) -> FitResult:
    """Fine-tune, resuming from ``directory`` if it holds a checkpoint of the same run.

    A run that was killed and resumed gives bitwise the parameters of one that was not: the order of
    the frames follows from (seed, epoch), and raw parameters, optimiser state, EMA, best
    parameters and the position are all saved at the ends of epochs.

    Devices share every batch; their number changes results by rounding only, and may differ when a
    run is resumed. With several processes each calls this with the same arguments, ``directory``
    is one that all see, and the first one writes the logs.

    Args:
      model, params: where to start.
      train: frames of one set, or a mixture with the recipe's sources.
      valid: judged after every epoch.
      watch: further sets to judge, by name.
      loss_fn, recipe, tx: as in :func:`jaxft.finetune`.
      settings: how long, and what counts as better.
      directory: of ``checkpoints/``, ``metrics.jsonl`` and ``metrics.csv`` (a line per epoch).
      schedule: of the learning rate, to be logged.
      identity: further facts that a checkpoint must agree with.
      display: progress.
      logger: told of every epoch beside the files.
      mesh: the devices; None is all, :func:`jaxft.parallel.mesh`.
      stop: asked after every update with their number, whether to save and stop there.
      until: save and stop after this epoch, if the run is not over then.

    Raises:
      Preempted: ``stop`` or ``until`` said so.
      NonFiniteError: with the epoch, the step and the frames of the batch.
      ValueError: the checkpoint belongs to another run, the metric is of a set that is not judged,
        or a batch has fewer frames than there are devices.
    """
    display = display or Display()
    mesh = mesh or parallel.mesh()
    mixture = train if isinstance(train, Mixture) else data.alone(train, settings.batch_size)
    feed = Feed(mixture, valid, watch or {})
    check_metric(settings.metric, feed.watch)
    spread = _spread(mixture, settings, mesh)
    init, step = finetune(loss_fn, recipe, tx, accumulate=settings.accumulate, mesh=mesh)
    state = init(jax.random.key(settings.seed), params)
    start = Moving(state, tree.copy(state.trainable), jnp.ones((), bool))
    moving, best = parallel.replicated(mesh, (start, tree.copy(state.trainable)))
    run = Run(moving, best, Progress())
    facts = {
        **asdict(settings),
        "recipe": [strategy.name for strategy in recipe],
        "parameters": fingerprint(params),
        "potential": model.digest,
        "train": fingerprint_of_frames(mixture.dataset),
        "mixture": mixture.describe(),
        "valid": fingerprint_of_frames(valid),
        **{f"watch {k}": fingerprint_of_frames(v) for k, v in feed.watch.items()},
        **(identity or {}),
    }
    parallel.check_agreement(facts)
    checkpoints = Checkpoints(directory / "checkpoints", facts, keep=settings.keep_checkpoints)
    if checkpoints.latest is not None:
        run = resumed(run, checkpoints)
        display.say(f"resuming after epoch {run.progress.epoch}")
    files: list[Logger] = [JsonLines(directory / "metrics.jsonl"), Csv(directory / "metrics.csv")]
    logs = Logs([*files, *([logger] if logger else [])] if parallel.is_first() else [])
    logs.start(list(run.progress.history))
    chosen = effort(settings.epochs * float(mixture.dataset.edges.sum()), model.channels)
    display.say(f"compiles {chosen}")
    # one thread: it shares the cores with what the loop itself compiles and computes
    pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
    validate = validator(
        model,
        loss_fn,
        {"valid": feed.valid, **feed.watch},
        weights=settings.loss_weights,
        batch_size=settings.batch_size,
        dtype=settings.dtype,
        mesh=mesh,
        pool=pool,
        options=chosen.options,
        report=_reporter(display, "validation"),
    )
    advance = Ahead(
        _advance(step, settings, mesh),
        pool=pool,
        options=chosen.options,
        report=_reporter(display, "an update"),
    )
    loop = _Loop(recipe, settings, spread, mesh, advance, validate, checkpoints, stop, until)
    try:
        with compilation.counting() as count:
            if loop.goes_on(run):
                _announce(run, loop)
            while loop.goes_on(run):
                started = time.perf_counter()
                run, row = _trained(run, loop, display)
                row |= {"updates": int(run.moving.state.step)}
                row |= {"seconds": time.perf_counter() - started, **loop.programs()}
                if schedule is not None:
                    factor = optimizer.get_factor(run.moving.state.opt_state)
                    row["learning_rate"] = float(schedule(int(run.moving.state.step))) * factor
                run, row = _recorded(run, row, loop)
                logs.log(row)
                display.epoch(row)
                if checkpoints.is_due or not loop.goes_on(run):
                    run.save(checkpoints)
        display.say(str(count))
    finally:
        pool.shutdown(cancel_futures=True)
        checkpoints.close()
        logs.close()
    if not loop.is_over(run):
        raise Preempted(f"paused as asked, and saved after epoch {run.progress.epoch}.")
    kept = parallel.local(run.best)
    result = merge(recipe, parallel.local(run.moving.state)._replace(trainable=kept))
    return FitResult(result, run.progress.best_epoch, list(run.progress.history), kept)


def check_metric(metric: str, watched: Iterable[str]) -> None:
    """Raises ValueError if a metric is of a set that is not watched."""
    name, known = metric.rpartition("/")[0], list(watched)
    if name and name not in known:
        raise ValueError(
            f"metric {metric!r} is of a set that is not watched (watched: "
            f"{', '.join(map(repr, known)) or 'none'});\n"
            "use loss, energy, forces, stress or moments of the validation set, or name a watched "
            "set."
        )


def _reporter(display: Display, what: str) -> Callable[[str], None]:
    return lambda cause: display.warn(f"after the first epoch {what} was {cause}")


def _spread(train: Mixture, settings: FitSettings, mesh: Mesh) -> Spread:
    return Spread(
        train,
        seed=settings.seed,
        dtype=settings.dtype,
        count=settings.accumulate,
        parts=mesh.size,
        mine=parallel.mine(mesh),
    )


def _advance(step: StepFn, settings: FitSettings, mesh: Mesh) -> Any:
    """:func:`advancing`, jitted."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(advancing(step, settings.ema_decay), donate_argnums=0, out_shardings=everywhere)


def advancing(step: StepFn, ema_decay: float | None) -> Callable[[Moving, Batch], Any]:
    """``(moving, batch) -> moving, info``: one update with its average; after one that is not
    finite, none changes anything.

    So nobody has to wait for the device after every update to know that it went well.
    """

    def advance(moving: Moving, batch: Batch) -> tuple[Moving, dict[str, Array]]:
        before = moving.state
        after, info = step(before, batch)
        is_sound = moving.is_sound & info["is_finite"]
        counter, trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_sound, new, old),
            (after.step, after.trainable, after.opt_state),
            (before.step, before.trainable, before.opt_state),
        )
        state = TrainState(counter, trainable, before.frozen, opt_state)
        ema = trainable
        if ema_decay is not None:
            # torch_ema's warm-up, so that a short run is not judged by its first parameters.
            decay = jnp.minimum(ema_decay, (1 + counter) / (10 + counter))
            decay = jnp.where(is_sound, decay, 1.0)
            ema = jax.tree.map(
                lambda a, b: (a + (1 - decay) * (b - a)).astype(a.dtype), moving.ema, trainable
            )
        seen = {name: info[name] for name in ("loss", "gradient_norm")}
        return Moving(state, ema, is_sound), {**seen, "is_sound": is_sound}

    return advance


class _Loop(NamedTuple):
    """What stays the same from epoch to epoch."""

    recipe: Recipe
    settings: FitSettings
    spread: Spread
    mesh: Mesh
    advance: Ahead
    validate: Validator
    checkpoints: Checkpoints
    stop: StopFn | None
    until: int | None

    def judged(self, run: Run) -> Params:
        """The parameters to judge and to keep: averages, where there are any."""
        moving = parallel.local(run.moving)
        averages = _averages(moving, self.settings)
        return merge(self.recipe, moving.state._replace(trainable=averages))

    def is_over(self, run: Run) -> bool:
        """Whether nothing is left to do: of epochs, patience or time."""
        settings, progress = self.settings, run.progress
        limit = settings.max_seconds
        is_late = limit is not None and parallel.said_by_first(progress.seconds >= limit)
        return progress.epoch >= settings.epochs or progress.is_done(settings.patience) or is_late

    def goes_on(self, run: Run) -> bool:
        is_paused = self.until is not None and run.progress.epoch >= self.until
        return not self.is_over(run) and not is_paused

    def programs(self) -> dict[str, float]:
        """How many were compiled or loaded, and how many of them after the first epoch."""
        both = (self.advance, self.validate.programs)
        return {
            "compilations": sum(each.compilations for each in both),
            "recompilations": sum(len(each.unexpected) for each in both),
        }

    def updates(self, run: Run) -> Iterator[Batch]:
        """The rest of the updates of an epoch, on the devices."""
        batches = self.spread.epoch(run.progress.epoch + 1, run.progress.batch)
        return data.prefetch(parallel.spread(self.mesh, batch) for batch in batches)


def _averages(moving: Moving, settings: FitSettings) -> Trainable:
    if settings.ema_decay is not None:
        return moving.ema
    return optimizer.evaluated(moving.state.opt_state, moving.state.trainable)


def _announce(run: Run, loop: _Loop) -> None:
    """Begin to compile what the run will need: first the first update, beside which the loop
    validates."""
    progress = run.progress
    numbers = range(progress.epoch + 1 + (progress.epoch < 0), loop.settings.epochs + 1)
    batches = (
        (run.moving, parallel.spread(loop.mesh, loop.spread.example(shape)))
        for shape in loop.spread.planned(numbers, progress.batch)
    )
    loop.advance.start(itertools.islice(batches, 1))
    loop.validate.start(loop.judged(run))
    loop.advance.start(batches)


def _trained(run: Run, loop: _Loop, display: Display) -> tuple[Run, dict[str, float]]:
    """The run after one more epoch, and what to log of it; the model is judged as it came first."""
    if run.progress.epoch < 0:
        return run, loop.validate(merge(loop.recipe, parallel.local(run.moving.state)))
    first = run.progress.batch
    run, timing = _epoch(run, loop, display)
    row = {"train/loss": float(np.asarray(run.progress.losses).mean())}
    row |= {**loop.validate(loop.judged(run)), **_speed(timing, loop, run, first)}
    for programs in (loop.advance, loop.validate.programs):
        programs.settle()
    return run, row


def _speed(timing: Timing, loop: _Loop, run: Run, first: int) -> dict[str, float]:
    """Of the updates that were made just now; empty if there were none left."""
    spread, number = loop.spread, run.progress.epoch + 1
    updates = range(first, run.progress.batch)
    places = [x for i in updates for part in spread.frames(number, i) for x in part]
    if not places:
        return {}
    frames, seconds = np.concatenate(places), timing.total - timing.compiling
    return {
        "atoms_per_second": float(spread.train.dataset.nodes[frames].sum()) / seconds,
        "edges_per_second": float(spread.train.dataset.edges[frames].sum()) / seconds,
        "computing": timing.computing,
        "waiting": timing.waiting,
        "compiling": timing.compiling,
    }


def _epoch(run: Run, loop: _Loop, display: Display) -> tuple[Run, Timing]:
    """The rest of one pass over the training frames; its losses stay in the progress."""
    settings, number = loop.settings, run.progress.epoch + 1
    total = loop.spread.num_updates - run.progress.batch
    before = (number - 1) * loop.spread.num_updates
    pending: list[dict[str, Array]] = []
    with Stopwatch() as watch:
        batches = watch.batches(loop.updates(run))
        for batch in display.track(batches, total=total, label=f"epoch {number}"):
            moving, info = watch.update(loop.advance, run.moving, batch)
            run = run._replace(moving=moving)
            pending.append(info)
            done = run.progress.batch + len(pending)
            is_due = settings.checkpoint_every is not None and done % settings.checkpoint_every == 0
            is_over = loop.stop is not None and loop.stop(before + done)
            if is_due or is_over or len(pending) == SYNCHRONISE:
                run, pending = _looked_at(run, loop, pending), []
            if is_due or is_over:
                run.save(loop.checkpoints)
            if is_over:
                raise Preempted(
                    f"asked to stop, and saved after update {done} of epoch {number}; the same "
                    "command with --restart auto goes on, on as many devices as there are then."
                )
        return _looked_at(run, loop, pending), watch.timing()


def _looked_at(run: Run, loop: _Loop, pending: list[dict[str, Array]]) -> Run:
    """The run with the losses of the last updates, which were all finite."""
    infos = jax.device_get(pending)
    sound = list(itertools.takewhile(lambda info: info["is_sound"], infos))
    losses = (*run.progress.losses, *(float(info["loss"]) for info in sound))
    run = run._replace(progress=run.progress._replace(batch=len(losses), losses=losses))
    if len(sound) < len(infos):
        run.save(loop.checkpoints)
        raise NonFiniteError(_not_finite(run, loop.spread, infos[len(sound)]))
    return run


def _not_finite(run: Run, spread: Spread, info: Mapping[str, Any]) -> str:
    number, update = run.progress.epoch + 1, run.progress.batch
    places = np.concatenate([x for part in spread.frames(number, update) for x in part])
    names = "\n  ".join(spread.train.dataset.frames[i].source for i in places)
    return (
        f"loss {float(info['loss'])} and gradient norm {float(info['gradient_norm'])} are not "
        f"finite in epoch {number}, update {update + 1}, after "
        f"{int(run.moving.state.step)} updates in all, for the frames\n  {names}\n"
        "The state before it is saved. Check these frames, or lower the learning rate."
    )


def _recorded(run: Run, row: dict[str, float], loop: _Loop) -> tuple[Run, dict[str, float]]:
    """The run with one more epoch in its history, and the best parameters renewed."""
    settings, progress, moving = loop.settings, run.progress, run.moving
    number = progress.epoch + 1
    value = row.get(settings.column, math.nan)
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the metric {settings.column} is {value} after epoch {number}: its set has no such "
            "label, or the model's predictions overflow;\nchoose another metric, or check the set."
        )
    is_best = value < progress.best
    row = {"epoch": number, "is_best": is_best, **row}
    plateau = settings.plateau
    if plateau is not None and number > 0:
        plateau = (Plateau(**progress.plateau) if progress.plateau else plateau).update(value)
        opt_state = optimizer.set_factor(parallel.local(moving.state.opt_state), plateau.scale)
        opt_state = parallel.replicated(loop.mesh, opt_state)
        moving = moving._replace(state=moving.state._replace(opt_state=opt_state))
    progress = Progress(
        epoch=number,
        best_epoch=number if is_best else progress.best_epoch,
        best=value if is_best else progress.best,
        history=(*progress.history, row),
        plateau=asdict(plateau) if plateau is not None and number > 0 else progress.plateau,
    )
    best = run.best
    if is_best:
        found = tree.copy(_averages(parallel.local(moving), settings))
        best = parallel.replicated(loop.mesh, found)
    return Run(moving, best, progress), row
