"""A fine-tuning run from a config: files in, a folder with a bundle, metrics and a report out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from ase.data import chemical_symbols
from rich.console import Console
from rich.table import Table

from jaxft import adapter, bundle, data, fisherfile, inputs, loss, optimizer
from jaxft import config as configs
from jaxft.calibration import calibration
from jaxft.citation import citation, works
from jaxft.config import Config
from jaxft.describe import describe
from jaxft.display import Display
from jaxft.evaluate.errors import errors
from jaxft.evaluate.plots import parity_plot
from jaxft.evaluate.predictions import FrameResult, predict_frames
from jaxft.fisher import fisher, sampled
from jaxft.fit import FitResult, FitSettings, fingerprint_of_frames, fit
from jaxft.inputs import Inputs
from jaxft.logs import Logger, Logs, TensorBoard, Wandb
from jaxft.optimizer import Plateau
from jaxft.potential import Potential
from jaxft.preflight import MISMATCH
from jaxft.report import Judged, Report, environment
from jaxft.report import write as write_report
from jaxft.strategies import Fisher, Recipe
from jaxft.train import in_precision
from jaxft.tree import name_diff
from jaxft.typing import LossFn, Params
from jaxft.version import __version__

CONFIG, MODEL, ADAPTER = "config.yaml", "model.jaxft", "adapter"
REPORT, CITATIONS = "report.html", "citations.bib"


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    model: Potential
    fit: FitResult
    judged: list[Judged]
    path: Path
    """Of the bundle."""


def finetune(
    config: Config, *, console: Console | None = None, restart: str = "never"
) -> RunResult:
    """Run a config.

    Everything that can be refused is refused before the training step is compiled, and before the
    output folder is made.

    Args:
      config: checked settings.
      console: for progress and tables.
      restart: ``never`` refuses an output that exists; ``auto`` continues the run in it, if there
        is one; ``always`` refuses to begin anew.

    Raises:
      ValueError, FileExistsError: input that cannot be used.
      NonFiniteError: the run diverged.
    """
    console = console or Console(quiet=True)
    output = Path(config.output)
    _check_output(output, config, restart)
    given = inputs.read(config, console)
    before = _predict_tests(config, given, given.params)
    logger = _logger(config)
    output.mkdir(parents=True, exist_ok=True)
    (output / CONFIG).write_text(configs.to_yaml(config))
    fitted = _fit(config, given, Display(console, initial_error=MISMATCH), logger)
    path = output / MODEL
    if path.exists():
        console.print(f"{path} exists and is kept; the run was complete.")
    else:
        _save_adapter(config, given, fitted, output / ADAPTER, console)
        bundle.save(path, given.model, fitted.params, provenance=_provenance(config, fitted))
        console.print(f"wrote {path} (epoch {fitted.best_epoch} of {len(fitted.history) - 1})")
    after = _predict_tests(config, given, fitted.params)
    judged = [
        Judged(name, frames, before[name], after[name], config.test[name].e0s == "base")
        for name, frames in given.tests.items()
    ]
    if judged:
        console.print(comparison(judged))
    _report(config, given, fitted, judged, output, console)
    return RunResult(given.model, fitted, judged, path)


def objective(config: Config, model: Potential) -> LossFn:
    """The loss that a config asks for, in its precision."""
    chosen = loss.weighted(
        model,
        **config.loss.terms,
        error=config.loss.error,
        delta=config.loss.delta,
    )
    if config.compute_dtype == config.parameter_dtype:
        return chosen
    return in_precision(chosen, config.compute_dtype)


def citations(config: Config, recipe: Recipe) -> str:
    """BibTeX of exactly the methods that a run uses."""
    return citation(recipe, also=_also_cited(config))


def _also_cited(config: Config) -> tuple[str, ...]:
    chosen = config.optimizer
    return optimizer.cites(
        chosen.name,
        weight_decay=chosen.weight_decay,
        decay_towards=chosen.decay_towards,
        alternation=chosen.alternation,
    )


def estimate_fisher(
    config: Config,
    files: Sequence[Path],
    output: Path,
    *,
    n: int | None,
    probes: int | None,
    threshold: float | None,
    normalise: str | None,
    head: str | None,
    strength: float | None,
    seed: int,
    console: Console,
) -> Fisher:
    """Estimate the Fisher of a config's loss at its model on other data, and write it.

    Args:
      config: gives the model (with the head that it adds), the loss, the keys and the precision.
      files: of frames with pretraining labels.
      output: of the new file.
      n: frames to take, in an order drawn from ``seed``; None is all.
      probes: per frame, of a sampled Fisher; None is the empirical one.
      threshold, normalise: as in :func:`jaxft.fisher`.
      head: that the frames belong to.
      strength: λ that the printed report is for.
      seed: of the order and the probes.
      console: for the report.

    Raises:
      ValueError, FileExistsError: input that cannot be used.
    """
    bundle.refuse_existing(output)
    begin = inputs.start(config)
    head = head or begin.like or config.head
    frames = data.without_isolated_atoms(data.read(files, keys=inputs.keys(config)))
    prepared = data.prepare(frames, begin.base, head=head, cache=config.cache)
    batches = data.epoch(prepared, 1, dtype=config.compute_dtype, seed=seed)
    facts = {
        "loss": config.loss.model_dump(),
        "files": [str(path) for path in files],
        "head": head,
        "dtype": config.dtype,
    }
    with Display(console).counter(label="fisher") as advance:
        shared: dict[str, Any] = {
            "n": n,
            "normalise": normalise,
            "provenance": facts,
            "progress": advance,
        }
        if probes is None:
            data.require_labels(frames, config.loss.labels, keys=inputs.keys(config))
            found = fisher(
                objective(config, begin.base), begin.params, batches, threshold=threshold, **shared
            )
        else:
            found = sampled(
                _outputs(config, begin.base),
                begin.params,
                batches,
                probes=probes,
                seed=seed,
                **shared,
            )
    fisherfile.save(output, found)
    console.print(calibration(found, strength).render())
    console.print(f"wrote {output} ({found.provenance['frames']} frames)")
    return found


def _outputs(config: Config, model: Potential) -> Callable[[Params, Any], Any]:
    if config.loss.error != "mse":
        raise ValueError(
            f"a sampled Fisher is that of squared errors, but the loss is {config.loss.error!r};\n"
            "override it for this command: loss.error=mse."
        )
    outputs = loss.outputs(model, labelled_only=False, **config.loss.terms)
    dtype = config.compute_dtype
    return lambda params, batch: outputs(
        jax.tree.map(lambda leaf: leaf.astype(dtype), params), batch
    )


def _fit(config: Config, given: Inputs, display: Display, logger: Logger) -> FitResult:
    chosen = config.optimizer
    steps = config.epochs * -(-given.train.num_batches // config.accumulate)
    schedule = optimizer.schedule(
        chosen.schedule,
        chosen.learning_rate,
        steps=steps,
        warmup=chosen.warmup,
        final=chosen.final,
    )
    tx = optimizer.optimizer(
        chosen.name,
        schedule,
        weight_decay=chosen.weight_decay,
        decay_towards=chosen.decay_towards,
        clip_norm=chosen.clip_norm,
        alternation=chosen.alternation,
        period=max(config.period, 2),
        b1=chosen.b1,
        b2=chosen.b2,
        eps=chosen.eps,
    )
    plateau = chosen.plateau
    settings = FitSettings(
        epochs=config.epochs,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        seed=config.seed,
        dtype=config.compute_dtype,
        ema_decay=config.ema_decay,
        patience=config.patience,
        metric=config.metric,
        plateau=None if plateau is None else Plateau(**plateau.model_dump()),
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        loss_weights=config.loss.weights,
    )
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
    adapter.save(
        path,
        adapter.Adapter(
            base=given.start.digest,
            recipe=[entry for entry in config.recipe if entry.name in coords],
            trainable=fitted.trainable._replace(coords=coords),
            heads=given.model.heads,
            e0s=given.model.e0s,
            like=given.start.like,
        ),
    )
    console.print(f"wrote {path} (`jaxft merge {config.model} {path} OUT.jaxft`)")


def _report(
    config: Config,
    given: Inputs,
    fitted: FitResult,
    judged: Sequence[Judged],
    output: Path,
    console: Console,
) -> None:
    """One page about the run, parity plots and the works to cite."""
    for item in judged if find_spec("matplotlib") else ():
        picture = output / f"parity-{configs.slug(item.name)}.png"
        picture.unlink(missing_ok=True)  # of the same run, before it was resumed
        parity_plot(item.frames, {"before": item.before, "after": item.after}, picture)
        console.print(f"wrote {picture}")
    base, model = given.start.base, given.model
    row = model.head_index(config.head)
    present = {int(z) for frame in given.train.dataset.frames for z in frame.atomic_numbers}
    symbols = {chemical_symbols[z]: i for i, z in enumerate(model.atomic_numbers) if z in present}
    chosen, check = config.e0s if isinstance(config.e0s, str) else "given", given.preflight
    report = Report(
        title=f"jaxft {output.name}",
        run=hashlib.sha256(configs.to_yaml(config).encode()).hexdigest()[:16],
        summary={
            "recipe": " + ".join(strategy.name for strategy in given.recipe) or "all parameters",
            "kept epoch": f"{fitted.best_epoch} of {len(fitted.history) - 1}",
            "training data": "; ".join(given.train.describe()),
        },
        warnings=[w for w in check.warnings if w.startswith(f"{chosen}:")] if check else (),
        tests=judged,
        history=fitted.history,
        best_epoch=fitted.best_epoch,
        trained=describe(given.recipe, given.params),
        e0s=check.to_dict() if check else {},
        e0s_used={
            symbol: {"model": float(base.e0s[row, i]), "now": float(model.e0s[row, i])}
            for symbol, i in symbols.items()
        },
        works=works(given.recipe, also=_also_cited(config)),
        settings=configs.to_yaml(config),
        environment={
            **environment(),
            "dtype": config.dtype,
            "base": f"{config.model} ({given.start.digest})",
            "training frames": fingerprint_of_frames(given.train.dataset),
        },
    )
    page = write_report(output / REPORT, report)
    (output / CITATIONS).write_text(citations(config, given.recipe))
    console.print(f"wrote {page}; please cite the works in {output / CITATIONS}")


def _predict_tests(config: Config, given: Inputs, params: Params) -> dict[str, list[FrameResult]]:
    """Results on each test set, with the E0s of its level of theory."""
    found = {}
    for name, frames in given.tests.items():
        model, head = inputs.test_model(config, given, name)
        found[name] = predict_frames(model, params, frames, head=head, dtype=config.compute_dtype)
    return found


def comparison(judged: Sequence[Judged]) -> Table:
    """RMSE of every test set before and after."""
    table = Table(title="RMSE before → after", title_justify="left")
    table.add_column("set")
    table.add_column("frames", justify="right")
    for heading in ("E meV/atom", "F meV/Å", "σ meV/Å³"):
        table.add_column(heading, justify="right")
    for item in judged:
        row_before, row_after = (
            errors(item.frames, results).total.rmse() for results in (item.before, item.after)
        )
        cells = [
            "–" if row_before[k] is None else f"{row_before[k]:.1f} → {row_after[k]:.1f}"
            for k in ("energy", "forces", "stress")
        ]
        table.add_row(item.name, str(len(item.frames)), *cells)
    return table


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


def _provenance(config: Config, fitted: FitResult) -> dict[str, object]:
    return {
        "made_by": f"jaxft {__version__}",
        "jax": jax.__version__,
        "base": bundle.read_model(config.model)[1] | {"path": str(config.model)},
        "config": config.model_dump(mode="json", by_alias=True),
        "best_epoch": fitted.best_epoch,
    }
