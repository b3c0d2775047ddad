"""A fine-tuning run from a config: files in, a folder with a bundle, metrics and plots out."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
from ase.data import atomic_numbers, chemical_symbols
from rich.console import Console
from rich.table import Table

from jaxft import bundle, data, loss, optimizer, surgery
from jaxft import config as configs
from jaxft.config import Config
from jaxft.data import Dataset, Frame, Keys
from jaxft.describe import describe
from jaxft.display import Display
from jaxft.e0s import estimate, explain
from jaxft.evaluate.errors import errors
from jaxft.evaluate.plots import parity_plot
from jaxft.evaluate.predictions import FrameResult, predict_frames
from jaxft.fit import FitResult, FitSettings, fit
from jaxft.potential import Potential
from jaxft.strategies import Recipe
from jaxft.tree import name_diff
from jaxft.typing import Params
from jaxft.version import __version__

INITIAL_ERROR_WARNING = 0.5
"""eV/atom; beyond it the E0s are almost certainly of another level of theory."""

CONFIG, MODEL, METRICS = "config.yaml", "model.jaxft", "metrics.jsonl"


@dataclass(frozen=True)
class Judged:
    """A test set before and after."""

    name: str
    frames: Sequence[Frame]
    before: Sequence[FrameResult]
    after: Sequence[FrameResult]


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    model: Potential
    fit: FitResult
    judged: list[Judged]
    path: Path
    """Of the bundle."""


class _Inputs(NamedTuple):
    """Everything that a config names, read and checked."""

    base: Potential
    model: Potential
    """With the E0s of the training data."""
    params: Params
    recipe: Recipe
    train: Dataset
    valid: Dataset
    tests: dict[str, list[Frame]]


def finetune(config: Config, *, console: Console | None = None, resume: bool = False) -> RunResult:
    """Run a config.

    Everything that can be refused is refused before the training step is compiled, and before the
    output folder is made.

    Args:
      config: checked settings.
      console: for progress and tables.
      resume: continue the run in ``config.output`` instead of refusing a folder that exists.

    Raises:
      ValueError, FileExistsError: input that cannot be used.
      NonFiniteError: the run diverged.
    """
    console = console or Console(quiet=True)
    output = Path(config.output)
    _check_output(output, config, resume)
    inputs = _read(config, console)
    before = _predict_tests(config, inputs, inputs.params)
    output.mkdir(parents=True, exist_ok=True)
    (output / CONFIG).write_text(configs.to_yaml(config))
    fitted = _fit(config, inputs, Display(console, initial_error=INITIAL_ERROR_WARNING))
    path = output / MODEL
    if path.exists():
        console.print(f"{path} exists and is kept; the run was complete.")
    else:
        bundle.save(path, inputs.model, fitted.params, provenance=_provenance(config, fitted))
        console.print(f"wrote {path} (epoch {fitted.best_epoch} of {len(fitted.history) - 1})")
    after = _predict_tests(config, inputs, fitted.params)
    judged = [
        Judged(name, frames, before[name], after[name]) for name, frames in inputs.tests.items()
    ]
    if judged:
        console.print(comparison(judged))
        _plot(judged, output, console)
    return RunResult(inputs.model, fitted, judged, path)


def _read(config: Config, console: Console) -> _Inputs:
    base, params = bundle.load(config.model, dtype=config.dtype)
    base.head_index(config.head)
    recipe = configs.strategies(config)
    console.print(describe(recipe, params).splitlines()[-1], highlight=False)
    keys = Keys(**config.keys.model_dump())
    train, valid = _training_frames(config, keys)
    tests = {
        name: data.without_isolated_atoms(data.read(_paths(entry.files), keys=keys))
        for name, entry in config.test.items()
    }
    wanted: list[str] = [n for n, weight in config.loss.model_dump().items() if weight > 0]
    judged_by: list[str] = [] if config.metric == "loss" else [config.metric]
    fitted = [data.without_isolated_atoms(frames) for frames in (train, valid)]
    data.require_labels(fitted[0], wanted, keys=keys)
    data.require_labels(fitted[1], wanted + judged_by, keys=keys)
    for frames in (*fitted, *tests.values()):
        data.check_elements(frames, base.atomic_numbers)
    for frames in tests.values():
        data.require_any_label(frames, keys=keys)
    console.print(_coverage({"train": fitted[0], "valid": fitted[1], **tests}))
    model = _with_e0s(base, params, config, train, valid, console)
    training, validation = (data.prepare(frames, model, head=config.head) for frames in fitted)
    return _Inputs(base, model, params, recipe, training, validation, tests)


def _fit(config: Config, inputs: _Inputs, display: Display) -> FitResult:
    weights = config.loss.model_dump()
    chosen = config.optimizer
    steps = config.epochs * data.num_batches(inputs.train, config.batch_size)
    rate = optimizer.schedule(
        chosen.schedule, chosen.learning_rate, steps=steps, warmup=chosen.warmup
    )
    tx = optimizer.optimizer(
        chosen.name, rate, weight_decay=chosen.weight_decay, clip_norm=chosen.clip_norm
    )
    settings = FitSettings(
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        dtype=config.dtype,
        ema_decay=config.ema_decay,
        patience=config.patience,
        metric=config.metric,
        checkpoint_every=config.checkpoint_every,
        loss_weights=weights,
    )
    return fit(
        inputs.model,
        inputs.params,
        train=inputs.train,
        valid=inputs.valid,
        loss_fn=loss.weighted(inputs.model, **weights),
        recipe=inputs.recipe,
        tx=tx,
        settings=settings,
        directory=Path(config.output),
        identity={"config": hashlib.sha256(configs.to_yaml(config).encode()).hexdigest()[:16]},
        display=display,
    )


def _predict_tests(config: Config, inputs: _Inputs, params: Params) -> dict[str, list[FrameResult]]:
    """Results on each test set, with the E0s of its level of theory."""
    return {
        name: predict_frames(
            inputs.base if config.test[name].e0s == "base" else inputs.model,
            params,
            frames,
            head=config.head,
        )
        for name, frames in inputs.tests.items()
    }


def _plot(judged: Sequence[Judged], output: Path, console: Console) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no parity plots: matplotlib is absent; pip install 'jaxft[plots]'")
        return
    for item in judged:
        picture = output / f"parity-{configs.slug(item.name)}.png"
        picture.unlink(missing_ok=True)  # of the same run, before it was resumed
        parity_plot(item.frames, {"before": item.before, "after": item.after}, picture)
        console.print(f"wrote {picture}")


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


def _check_output(output: Path, config: Config, resume: bool) -> None:
    if not resume:
        bundle.refuse_existing(output)
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


def _training_frames(config: Config, keys: Keys) -> tuple[list[Frame], list[Frame]]:
    train = data.read(_paths(config.train), keys=keys)
    if isinstance(config.valid, float):
        return data.split(train, valid=config.valid, seed=config.seed)
    return train, data.read(_paths(config.valid), keys=keys)


def _paths(files: list[Path] | Path) -> list[Path]:
    return files if isinstance(files, list) else [files]


def _with_e0s(
    base: Potential,
    params: Params,
    config: Config,
    train: Sequence[Frame],
    valid: Sequence[Frame],
    console: Console,
) -> Potential:
    """The model with the E0s that the config asks for, and a table of what changed."""
    if config.e0s == "foundation":
        return base
    if config.e0s == "isolated_atoms":
        e0s = data.isolated_atom_energies(train)
        source = f"config_type={data.ISOLATED_ATOM} frames of the training files"
    elif config.e0s == "estimated":
        found = estimate(base, params, data.without_isolated_atoms(train), head=config.head)
        console.print(explain(found), highlight=False)
        e0s, source = found.e0s, "the estimate"
    else:
        e0s = {atomic_numbers[symbol]: value for symbol, value in config.e0s.items()}
        source = "the config"
    needed = {int(z) for frame in (*train, *valid) for z in frame.atomic_numbers}
    missing = sorted(needed - set(e0s))
    if missing:
        raise ValueError(
            f"no isolated-atom energy for {', '.join(chemical_symbols[z] for z in missing)} in "
            f"{source};\ngive one per element of the training and validation frames, or "
            "e0s: foundation if they are of the model's own level of theory."
        )
    model = surgery.set_e0s(base, e0s, head=config.head)
    table = Table(title="isolated-atom energies, eV (others unchanged)", title_justify="left")
    for heading in ("element", "model", "now"):
        table.add_column(heading, justify="right")
    for z in sorted(e0s):
        own = base.e0s[base.head_index(config.head), base.atomic_numbers.index(z)]
        table.add_row(chemical_symbols[z], f"{own:.4f}", f"{e0s[z]:.4f}")
    console.print(table)
    return model


def _coverage(sets: dict[str, Sequence[Frame]]) -> Table:
    table = Table(title="frames and labels", title_justify="left")
    table.add_column("set")
    for heading in ("frames", "energy", "forces", "stress"):
        table.add_column(heading, justify="right")
    table.add_column("atoms by element")
    for name, frames in sets.items():
        found = data.coverage(frames)
        counts = (found.frames, found.energy, found.forces, found.stress)
        elements = " ".join(f"{symbol} {n}" for symbol, n in found.elements.items())
        table.add_row(name, *(str(count) for count in counts), elements)
    return table


def _provenance(config: Config, fitted: FitResult) -> dict[str, object]:
    return {
        "made_by": f"jaxft {__version__}",
        "jax": jax.__version__,
        "base": bundle.read_model(config.model)[1] | {"path": str(config.model)},
        "config": config.model_dump(mode="json", by_alias=True),
        "best_epoch": fitted.best_epoch,
    }
