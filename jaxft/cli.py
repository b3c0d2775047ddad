"""The command ``jaxft``."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Fine-tune machine-learning interatomic potentials in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
evaluate_app = typer.Typer(help="Judge a bundle.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")

console = Console(markup=False)  # names and paths may hold brackets
EXIT_INPUT, EXIT_DIVERGED = 1, 3


class Dtype(StrEnum):
    float32 = "float32"
    float64 = "float64"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
Head = Annotated[str | None, typer.Option(help="Head, where the model has several.")]


def _command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of the user's input become one message and exit code 1, divergence exit code 3."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_INPUT) from error
        except RuntimeError as error:
            from jaxft.fit import NonFiniteError

            if not isinstance(error, NonFiniteError):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(EXIT_DIVERGED) from error

    return wrapped


def _use(dtype: str | None) -> None:
    """Let JAX compute in ``dtype``; before its first computation."""
    import jax

    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)


@app.command()
@_command
def info(path: Path, as_json: Json = False) -> None:
    """What a torch .model file or a bundle holds."""
    from converters.inspect import inspect
    from jaxft import inspection

    facts = inspect(path)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        console.print(inspection.page(facts))
    if not facts["convertible"]:
        raise typer.Exit(EXIT_INPUT)


@app.command()
@_command
def models(as_json: Json = False) -> None:
    """Published foundation models that `convert` knows by name."""
    from converters import registry

    rows = registry.table()
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1, default=str))
        return
    table = Table(title="jaxft convert NAME OUT.jaxft", title_justify="left")
    for heading in ("name", "licence", "digest from", "here", "architecture"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row.name, row.licence, row.digest, "yes" if row.cached else "", row.family)
    console.print(table)


@app.command()
@_command
def convert(
    source: Annotated[str, typer.Argument(metavar="FILE|NAME")],
    bundle: Path,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: that of the file.")] = None,
    head: Annotated[str | None, typer.Option(help="Keep only this head.")] = None,
    elements: Annotated[
        str | None, typer.Option(help="Keep only these elements, e.g. H,C,O.")
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="Whole model of the same architecture, for a state_dict or checkpoint."),
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinity.")
    ] = False,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Accept the licence of the named model.")
    ] = False,
) -> None:
    """Convert a torch MACE .model FILE, or a published model by NAME, into a BUNDLE; no torch."""
    from converters.to_jax import convert_with_provenance
    from jaxft import bundle as bundles
    from jaxft import surgery

    bundles.refuse_existing(bundle)
    file = _resolve(source, accept_license)
    model, params, provenance = convert_with_provenance(
        file, like=like, allow_nonfinite=allow_nonfinite
    )
    if like is not None:
        provenance["like"] = str(like)
    if head is not None:
        model, params = surgery.select_head(model, params, head)
        provenance["head"] = head
    if elements is not None:
        chosen = [symbol.strip() for symbol in elements.split(",")]
        model, params = surgery.select_elements(model, params, chosen)
        provenance["elements"] = chosen
    if dtype is not None:
        model, params = bundles.cast(model, params, dtype.value)
    bundles.save(bundle, model, params, provenance=provenance, allow_nonfinite=allow_nonfinite)
    console.print(f"wrote {bundle}")


def _resolve(source: str, accept_license: bool) -> Path:
    """The file that is meant: a path, or a published model, downloaded where necessary."""
    from converters import registry
    from jaxft.display import Display

    if Path(source).exists() or Path(source).suffix or os.sep in source:
        return Path(source)
    entry = registry.resolve(source)
    console.print(
        f"{entry.name}: licence {entry.licence} {entry.licence_url or ''}\n{entry.citation}",
        highlight=False,
    )
    with Display(console).counter(label=entry.file) as advance:
        return registry.fetch(entry.name, accept_license=accept_license, progress=advance)


@app.command()
@_command
def predict(
    bundle: Path,
    structures: Annotated[Path, typer.Argument(metavar="IN")],
    output: Annotated[Path, typer.Argument(metavar="OUT.xyz")],
    dtype: Annotated[Dtype | None, typer.Option(help="Default: that of the bundle.")] = None,
    head: Head = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Energies, forces and stresses of all frames of IN, written to OUT.xyz."""
    from jaxft.display import Display
    from jaxft.evaluate.predictions import predict_file

    model, params = _load(bundle, dtype, head)
    with Display(console).counter(label="predict") as advance:
        count = predict_file(
            model,
            params,
            structures,
            output,
            head=head,
            batch_size=batch_size,
            progress=advance,
        )
    console.print(f"wrote {output} ({count} frames)")


@app.command()
@_command
def finetune(
    config: Path,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    restart: Annotated[
        bool, typer.Option(help="Resume the run in the output folder, if there is one.")
    ] = False,
) -> None:
    """Fine-tune as CONFIG says; key=value overrides it (optimizer.learning_rate=1e-4)."""
    from jaxft import config as configs

    settings = configs.load(config, overrides or ())
    _use(settings.dtype)
    from jaxft import run

    run.finetune(settings, console=console, resume=restart)


@app.command()
@_command
def describe(
    config: Path,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
) -> None:
    """What CONFIG would train, leaf by leaf."""
    import jaxft
    from jaxft import config as configs

    settings = configs.load(config, overrides or ())
    _use(settings.dtype)
    _, params = jaxft.load(settings.model, dtype=settings.dtype)
    print(jaxft.describe(configs.strategies(settings), params))


@evaluate_app.command("errors")
@_command
def evaluate_errors(
    bundle: Path,
    files: Annotated[list[Path], typer.Argument(metavar="DATA...")],
    dtype: Annotated[Dtype | None, typer.Option(help="Default: that of the bundle.")] = None,
    head: Head = None,
    energy_key: str = "REF_energy",
    forces_key: str = "REF_forces",
    stress_key: str = "REF_stress",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    plot: Annotated[Path | None, typer.Option(help="Parity plot to write (PNG).")] = None,
    as_json: Json = False,
) -> None:
    """MAE and RMSE of energy, forces and stress against the labels of DATA."""
    from jaxft import data
    from jaxft.evaluate.errors import errors
    from jaxft.evaluate.plots import check_picture, parity_plot
    from jaxft.evaluate.predictions import predict_frames

    if plot is not None:
        check_picture(plot)
    model, params = _load(bundle, dtype, head)
    keys = data.Keys(energy_key, forces_key, stress_key)
    frames = data.without_isolated_atoms(data.read(files, keys=keys))
    data.require_any_label(frames, keys=keys)
    results = predict_frames(model, params, frames, head=head, batch_size=batch_size)
    table = errors(frames, results)
    if plot is not None:
        parity_plot(frames, {str(bundle): results}, plot)
    if as_json:
        print(json.dumps(table.to_dict(), indent=1))
    else:
        console.print(table.render())


@app.command()
@_command
def export(
    bundle: Path,
    output: Annotated[Path, typer.Argument(metavar="OUT.model")],
    state_dict: Annotated[
        bool, typer.Option("--state-dict", help="Write only the state_dict, as OUT.pt.")
    ] = False,
) -> None:
    """Write a BUNDLE as a torch .model that mace-torch loads (needs jaxft[torch])."""
    from converters.to_torch import export as write

    write(bundle, output, state_dict=state_dict)
    console.print(f"wrote {output}")


@app.command()
@_command
def verify(
    path: Path,
    golden: Annotated[
        bool, typer.Option("--golden", help="Against published figures; needs no torch.")
    ] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of the comparison with torch.")] = Dtype.float64,
) -> None:
    """Compare jaxft with mace-torch on a .model file (which torch loads: trust it), or, with
    --golden, a published model with its published energies, forces and stress. Exit code 1 if they
    differ."""
    _use("float64" if golden else dtype.value)
    if golden:
        from converters.golden import check

        found: Any = check(path)
    else:
        from converters.verify import verify as compare

        found = compare(path, dtype=dtype.value)
    print(found)
    if not found.agrees:
        raise typer.Exit(EXIT_INPUT)


@app.command()
@_command
def init(
    preset: Annotated[str, typer.Option(help="Name of a preset; without it they are listed.")] = "",
) -> None:
    """Print a preset config; redirect it into a file and edit it."""
    from jaxft import presets

    if preset:
        print(presets.text(preset), end="")
    else:
        for name, line in presets.summaries().items():
            console.print(f"{name:<14} {line}", highlight=False)


@app.command()
@_command
def schema() -> None:
    """Print the JSON schema of a config, for an editor's completion."""
    from jaxft.config import Config

    print(json.dumps(Config.model_json_schema(), indent=1))


def _load(bundle: Path, dtype: Dtype | None, head: str | None) -> tuple[Any, Any]:
    from jaxft import bundle as bundles

    model, params, _ = bundles.load_numpy(bundle)
    model.head_index(head)
    wanted = dtype.value if dtype else bundles.stored_dtype(params)
    _use(wanted)
    return bundles.load(bundle, dtype=wanted)
