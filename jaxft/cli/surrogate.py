"""The command that makes surrogates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jaxft.cli.shared import Overrides, app, command, console, use


@app.command()
@command
def distill(
    config: Path,
    overrides: Overrides = None,
    small: Annotated[
        bool, typer.Option("--small", help="The short form that CONFIG describes.")
    ] = False,
) -> None:
    """A surrogate as CONFIG says: a teacher labels a pool of its own making, a smaller model learns
    it, both are judged. What is done already is not done again; key=value overrides CONFIG."""
    from jaxft.surrogate import config as settings

    chosen = settings.load(config, overrides or (), small=small)
    training = chosen.training_config(Path("start"), Path("pool"), Path("run"))
    use(training.parameter_dtype, training.backend)
    from jaxft.surrogate import run

    run.distill(chosen, console=console)
