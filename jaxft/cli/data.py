"""Commands about data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jaxft.cli.shared import EXIT_INPUT, Json, command, console, data_app


@data_app.command("check")
@command
def check(
    files: Annotated[list[Path], typer.Argument(metavar="DATA...")],
    model: Annotated[
        Path | None, typer.Option(help="Bundle that is to be trained on them.")
    ] = None,
    energy_key: str = "REF_energy",
    forces_key: str = "REF_forces",
    stress_key: str = "REF_stress",
    virials_key: str = "REF_virials",
    as_json: Json = False,
) -> None:
    """Labels, units, duplicates, close contacts, outliers, elements. Exit code 1 if DATA cannot be
    trained on."""
    from jaxft import bundle as bundles
    from jaxft import data
    from jaxft.data.audit import audit

    potential = None if model is None else bundles.load_numpy(model)[0]
    keys = data.Keys(energy_key, forces_key, stress_key, virials_key)
    found = audit(data.read(files, keys=keys), model=potential)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        console.print(found.render())
    if not found.is_ok:
        raise typer.Exit(EXIT_INPUT)
