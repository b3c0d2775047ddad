"""A fine-tuning run from a config: files in, a folder with a bundle, metrics and a report out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh
from rich.console import Console

from jaxft import adapter, bundle, inputs, optimizer, outcome, parallel, train
from jaxft import config as configs
from jaxft.config import Config
from jaxft.data.accumulate import check_parts
from jaxft.display import Display
from jaxft.evaluate.predictions import FrameResult, predict_frames
from jaxft.fit import FitResult, FitSettings, fit
from jaxft.inputs import Inputs
from jaxft.logs import Logger, Logs, TensorBoard, Wandb
from jaxft.models.backend import choose
from jaxft.objective import objective
from jaxft.optimizer import Plateau
from jaxft.potential import Potential
from jaxft.preflight import MISMATCH
from jaxft.report import Judged
from jaxft.tree import name_diff
from jaxft.typing import Params
from jaxft.version import __version__

CONFIG, MODEL, ADAPTER = "config.yaml", "model.jaxft", "adapter"


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    model: Potential
    fit: FitResult
    judged: list[Judged]
    path: Path
    """Of the bundle."""


def finetune(
    config: Config,
    *,
    console: Console | None = None,
    restart: str = "never",
    devices: int | None = None,
    until: int | None = None,
) -> RunResult:
    """Run a config.

    Everything that can be refused is refused before the training step is compiled, and before the
    output folder is made. With several processes all of them call this, and the first one writes
    and prints.

    Args:
      config: checked settings.
      console: for progress and tables.
      restart: ``never`` refuses an output that exists; ``auto`` continues the run in it, if there
        is one; ``always`` refuses to begin anew.
      devices: of each process to use; None is all.
      until: pause after this epoch; ``restart="auto"`` goes on as if there had been no pause.

    Raises:
      ValueError, FileExistsError: input that cannot be used; with several processes in one of them.
      NonFiniteError: the run diverged.
      Preempted: SIGTERM came while it trained, or it paused; it is saved, ``restart="auto"`` goes
        on.
    """
    is_writer = parallel.is_first()
    console = console if console is not None and is_writer else Console(quiet=True)
    output = Path(config.output)
    with parallel.together("reading the input"):
        mesh = parallel.mesh(devices)
        check_parts(config.batch_size, mesh.size)
        _check_output(output, config, restart)
        given = inputs.read(config, console)
        tx, schedule = _optimizer(config, given, mesh)
        before = predict_tests(config, given, given.params)
        logger = _logger(config) if is_writer else Logs([])
    with parallel.together("making the output"):
        if is_writer:
            output.mkdir(parents=True, exist_ok=True)
            (output / CONFIG).write_text(configs.to_yaml(config))
    console.print(_devices(mesh), highlight=False)
    console.print(f"computes with {choose(config.backend, config.precision)}", highlight=False)
    display = Display(console, initial_error=MISMATCH)
    fitted = _fit(config, given, tx, schedule, display, logger, mesh, until)
    path = output / MODEL
    after = predict_tests(config, given, fitted.params)
    judged = [
        Judged(name, frames, before[name], after[name], config.test[name].e0s == "base")
        for name, frames in given.tests.items()
    ]
    with parallel.together("writing the results"):
        if is_writer:
            _write(config, given, fitted, judged, path, console)
    return RunResult(given.model, fitted, judged, path)


def _write(
    config: Config,
    given: Inputs,
    fitted: FitResult,
    judged: list[Judged],
    path: Path,
    console: Console,
) -> None:
    """Bundle, adapter and report, as far as they are not there yet."""
    output = path.parent
    if path.exists():
        console.print(f"{path} exists and is kept; the run was complete.")
    else:
        _save_adapter(config, given, fitted, output / ADAPTER, console)
        bundle.save(path, given.model, fitted.params, provenance=provenance_of(config, fitted))
        console.print(f"wrote {path} (epoch {fitted.best_epoch} of {len(fitted.history) - 1})")
    if judged:
        console.print(outcome.comparison(judged))
    outcome.show(config, given, fitted, judged, output, console)


def _devices(mesh: Mesh) -> str:
    processes, first = jax.process_count(), mesh.devices.flat[0]
    where = f" of {processes} processes" if processes > 1 else ""
    return f"trains on {mesh.size} × {first.device_kind} ({first.platform}){where}"


def _optimizer(
    config: Config, given: Inputs, mesh: Mesh
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser of a run and its learning rate; refuses what does not fit the recipe."""
    steps = config.epochs * -(-given.train.num_batches // config.accumulate)
    schedule = schedule_of(config, steps)
    tx = transform_of(config, schedule)
    init, _ = train.finetune(
        objective(config, given.model), given.recipe, tx, accumulate=config.accumulate, mesh=mesh
    )
    init(jax.random.key(config.seed), given.params)
    return tx, schedule


def schedule_of(config: Config, updates: int) -> optax.Schedule:
    """The learning rate that a config asks for, of a run of so many updates."""
    chosen = config.optimizer
    return optimizer.schedule(
        chosen.schedule,
        chosen.learning_rate,
        steps=updates,
        warmup=chosen.warmup,
        final=chosen.final,
    )


def transform_of(config: Config, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """The optimiser that a config asks for, at this rate."""
    chosen = config.optimizer
    return optimizer.optimizer(
        chosen.name,
        learning_rate,
        weight_decay=chosen.weight_decay,
        decay_towards=chosen.decay_towards,
        clip_norm=chosen.clip_norm,
        alternation=chosen.alternation,
        period=max(config.period, 2),
        b1=chosen.b1,
        b2=chosen.b2,
        eps=chosen.eps,
    )


def _fit(
    config: Config,
    given: Inputs,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    display: Display,
    logger: Logger,
    mesh: Mesh,
    until: int | None,
) -> FitResult:
    plateau = config.optimizer.plateau
    settings = FitSettings(
        epochs=config.epochs,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        seed=config.seed,
        dtype=config.compute_dtype,
        ema_decay=config.ema_decay,
        patience=config.patience,
        max_seconds=config.max_seconds,
        metric=config.metric,
        plateau=None if plateau is None else Plateau(**plateau.model_dump()),
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        loss_weights=config.loss.weights,
    )
    with parallel.preemption() as stop:
        return fit(
            given.model,
            given.params,
            train=given.train,
            valid=given.valid,
            watch=given.watch,
            loss_fn=objective(config, given.model),
            recipe=given.recipe,
            tx=tx,
            settings=settings,
            directory=Path(config.output),
            schedule=schedule,
            identity=_identity(config),
            display=display,
            logger=logger,
            mesh=mesh,
            stop=stop,
            until=until,
        )


def _identity(config: Config) -> dict[str, str]:
    """What a checkpoint must agree with beside what the loop knows: settings, and files of
    strategies."""
    found = {"config": hashlib.sha256(configs.to_yaml(config).encode()).hexdigest()[:16]}
    for entry in config.recipe:
        for path in entry.inputs:
            found[str(path)] = _hash(path)
    return found


def _hash(path: Path) -> str:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _logger(config: Config) -> Logger:
    loggers: list[Logger] = []
    if config.tensorboard:
        loggers.append(TensorBoard(Path(config.output) / "tensorboard"))
    if config.wandb is not None:
        loggers.append(
            Wandb(
                config.wandb.project,
                config.wandb.name or Path(config.output).name,
                Path(config.output) / "wandb",
                config.model_dump(mode="json", by_alias=True),
                config.wandb.mode,
            )
        )
    return Logs(loggers)


def _save_adapter(
    config: Config, given: Inputs, fitted: FitResult, path: Path, console: Console
) -> None:
    """What was trained, alone, where the recipe owns coordinates."""
    coords = {name: owned for name, owned in fitted.trainable.coords.items() if owned}
    if not coords or path.exists():
        return
    added = config.moments
    adapter.save(
        path,
        adapter.Adapter(
            base=given.start.digest,
            recipe=[entry for entry in config.recipe if entry.name in coords],
            trainable=fitted.trainable._replace(coords=coords),
            heads=given.model.heads,
            e0s=given.model.e0s,
            like=given.start.like,
            moments=None if added is None else {**added.model_dump(), "seed": config.seed},
            mean_moments=None if added is None else given.model.mean_moments,
        ),
    )
    console.print(f"wrote {path} (`jaxft merge {config.model} {path} OUT.jaxft`)")


def predict_tests(config: Config, given: Inputs, params: Params) -> dict[str, list[FrameResult]]:
    """Results on each test set, with the E0s of its level of theory."""
    found = {}
    for name, frames in given.tests.items():
        model, head = inputs.test_model(config, given, name)
        found[name] = predict_frames(model, params, frames, head=head, dtype=config.compute_dtype)
    return found


def _check_output(output: Path, config: Config, restart: str) -> None:
    if restart == "never":
        bundle.refuse_existing(output)
    elif restart == "always" and not output.exists():
        raise ValueError(f"{output} does not exist, so there is no run to resume.")
    elif output.exists() and not (output / CONFIG).is_file():
        raise ValueError(
            f"{output} exists but holds no {CONFIG}, so it is no run to resume;\n"
            "give another output."
        )
    elif output.exists():
        then, now = (output / CONFIG).read_text().splitlines(), configs.to_yaml(config).splitlines()
        diff = name_diff(now, then)
        if diff:
            raise ValueError(
                f"{output} was made with other settings (- then, + now):\n{diff}\n"
                "Resume with the same ones, or give another output."
            )


def provenance_of(config: Config, fitted: FitResult) -> dict[str, object]:
    """Where the model of a run comes from."""
    return {
        "made_by": f"jaxft {__version__}",
        "jax": jax.__version__,
        "base": bundle.read_model(config.model)[1] | {"path": str(config.model)},
        "config": config.model_dump(mode="json", by_alias=True),
        "best_epoch": fitted.best_epoch,
    }
