"""Commands that fine-tune, and that prepare and finish it."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxft.cli.shared import Json, Overrides, app, command, console, use


class Normalise(StrEnum):
    none = "none"
    mean = "mean"
    max = "max"


class Restart(StrEnum):
    never = "never"
    auto = "auto"
    always = "always"


@app.command()
@command
def finetune(
    config: Path,
    overrides: Overrides = None,
    restart: Annotated[
        Restart,
        typer.Option(
            help="auto: resume the run in the output folder, if there is one; always: or fail."
        ),
    ] = Restart.never,
    devices: Annotated[
        int | None, typer.Option(min=1, help="To use, of each process; default: all.")
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Of process 0, to work with others; in each."),
    ] = None,
    num_processes: Annotated[int | None, typer.Option(help="With --coordinator.")] = None,
    process_id: Annotated[int | None, typer.Option(help="With --coordinator; from 0.")] = None,
    distributed: Annotated[
        bool | None,
        typer.Option(
            "--distributed/--no-distributed",
            help="Find the other processes, or work alone; default: find them under srun, mpirun.",
        ),
    ] = None,
    start_timeout: Annotated[int, typer.Option(help="Seconds to wait for the others.")] = 300,
) -> None:
    """Fine-tune as CONFIG says; key=value overrides it (optimizer.learning_rate=1e-4)."""
    from jaxft import parallel

    group = parallel.group(
        coordinator=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        distributed=distributed,
        timeout=start_timeout,
        environment=os.environ,
    )
    settings = _settings(config, overrides)
    if group is not None:
        console.print(parallel.start(group), highlight=False)
    from jaxft import run

    run.finetune(settings, console=console, restart=restart.value, devices=devices)


@app.command()
@command
def new(
    output: Annotated[Path, typer.Argument(metavar="OUT.jaxft")],
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option(help="YAML with the same keys.")] = None,
) -> None:
    """A bundle with random parameters, to train from scratch: train=FILE e0s=isolated_atoms
    architecture.hidden=16x0e+16x1o, or like=BUNDLE; statistics are those of the training files."""
    from jaxft import scratchrun

    settings = scratchrun.read(overrides or (), config)
    use(settings.dtype)
    scratchrun.make(settings, output, console=console)


@app.command()
@command
def describe(config: Path, overrides: Overrides = None) -> None:
    """What CONFIG would train, leaf by leaf."""
    settings = _settings(config, overrides)
    import jaxft
    from jaxft import inputs

    recipe, params = inputs.recipe(settings)
    print(jaxft.describe(recipe, params))


@app.command()
@command
def preflight(config: Path, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check CONFIG and its data without training: what trains, which labels there are, and how far
    energies are off with each choice of isolated-atom energies."""
    settings = _settings(config, overrides)
    from rich.console import Console

    from jaxft import inputs

    found = inputs.read(settings, Console(quiet=True) if as_json else console)
    if as_json:
        table = None if found.preflight is None else found.preflight.to_dict()
        print(json.dumps({"mixture": found.train.describe(), "e0s": table}, indent=1))


@app.command()
@command
def fisher(
    config: Path,
    files: Annotated[list[Path], typer.Argument(metavar="DATA...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, NAME.fisher.")],
    n: Annotated[int | None, typer.Option("-n", min=1, help="Frames; default: all.")] = None,
    sampled: Annotated[
        bool, typer.Option("--sampled", help="Gauss-Newton, by random probes; needs no labels.")
    ] = False,
    probes: Annotated[int, typer.Option(min=1, help="Per frame, with --sampled.")] = 1,
    threshold: Annotated[
        float | None, typer.Option(help="Leave out frames with a loss of at least this.")
    ] = None,
    normalise: Annotated[
        Normalise, typer.Option(help="Divide by the mean or the largest value.")
    ] = Normalise.none,
    head: Annotated[
        str | None, typer.Option(help="That DATA belong to; default: that of CONFIG.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="λ that the report is for; default: none.")
    ] = None,
    seed: int = 0,
) -> None:
    """The Fisher information of CONFIG's loss on DATA, with pretraining labels, for ewc."""
    settings = _settings(config, None)
    from jaxft.fisherrun import estimate_fisher

    estimate_fisher(
        settings,
        files,
        output,
        n=n,
        probes=probes if sampled else None,
        threshold=threshold,
        normalise=None if normalise is Normalise.none else normalise.value,
        head=head,
        strength=strength,
        seed=seed,
        console=console,
    )


@app.command()
@command
def merge(
    base: Path,
    adapter: Path,
    output: Annotated[Path, typer.Argument(metavar="OUT.jaxft")],
) -> None:
    """Merge an ADAPTER, which a run wrote beside its model, into its BASE bundle."""
    from jaxft import bundle as bundles

    bundles.refuse_existing(output)
    from jaxft import adapter as adapters

    found = adapters.load(adapter)
    use(found.dtype)
    model, params = bundles.load(base, dtype=found.dtype)
    tuned = adapters.merge(found, model, params)
    bundles.save(output, *tuned, provenance={"base": str(base), "adapter": str(adapter)})
    console.print(f"wrote {output}")


@app.command()
@command
def diff(base: Path, tuned: Path, as_json: Json = False) -> None:
    """Which numbers of TUNED differ from BASE, and by how much; by leaf, irrep and element."""
    from jaxft import bundle as bundles
    from jaxft.changes import changes

    model, before, _ = bundles.load_numpy(base)
    _, after, _ = bundles.load_numpy(tuned)
    found = changes(before, after, elements=model.atomic_numbers)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        console.print(found.render())


@app.command()
@command
def cite(config: Path, overrides: Overrides = None) -> None:
    """BibTeX of exactly the methods that CONFIG uses."""
    settings = _settings(config, overrides)
    from jaxft import inputs, outcome

    print(outcome.citations(settings, inputs.recipe(settings)[0]), end="")


@app.command()
@command
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
@command
def schema() -> None:
    """Print the JSON schema of a config, for an editor's completion."""
    from jaxft.config import Config

    print(json.dumps(Config.model_json_schema(), indent=1))


def _settings(config: Path, overrides: list[str] | None) -> Any:
    """The checked config, JAX set to its precision."""
    from jaxft import config as configs

    settings = configs.load(config, overrides or ())
    use(settings.parameter_dtype, settings.backend)
    return settings
