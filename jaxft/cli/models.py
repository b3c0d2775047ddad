"""Commands about model files."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from jaxft.cli.shared import EXIT_INPUT, Dtype, Json, app, command, console, keep_programs, use


@app.command()
@command
def info(path: Path, as_json: Json = False) -> None:
    """What a torch .model file or a bundle holds."""
    from converters.inspect import inspect
    from jaxft import hugepages, inspection
    from jaxft.models.backend import usable

    facts = inspect(path)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        console.print(inspection.page(facts))
        console.print(f"compiled programs  {keep_programs()}", highlight=False, soft_wrap=True)
        console.print(f"backend            {usable()}", highlight=False, soft_wrap=True)
        console.print(f"huge pages         {hugepages.state()[1]}", highlight=False, soft_wrap=True)
    if not facts["convertible"]:
        raise typer.Exit(EXIT_INPUT)


@app.command()
@command
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
@command
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
@command
def export(
    bundle: Path,
    output: Annotated[Path, typer.Argument(metavar="OUT.model")],
    state_dict: Annotated[
        bool, typer.Option("--state-dict", help="Write only the state_dict, as OUT.pt.")
    ] = False,
    without_moments: Annotated[
        bool,
        typer.Option(
            "--without-moments", help="Leave out the head for magnetic moments, which torch lacks."
        ),
    ] = False,
) -> None:
    """Write a BUNDLE as a torch .model that mace-torch loads (needs jaxft[torch])."""
    from converters.to_torch import export as write

    write(bundle, output, state_dict=state_dict, without_moments=without_moments)
    console.print(f"wrote {output}")


@app.command()
@command
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
    use("float64" if golden else dtype.value)
    if golden:
        from converters.golden import check

        found: Any = check(path)
    else:
        from converters.verify import verify as compare

        found = compare(path, dtype=dtype.value)
    print(found)
    if not found.agrees:
        raise typer.Exit(EXIT_INPUT)
