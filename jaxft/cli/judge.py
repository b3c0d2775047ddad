"""Commands that predict and judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jaxft.cli.candidates import Report, Save, check_outputs, per_head, show
from jaxft.cli.shared import (
    BackendName,
    Dtype,
    Head,
    Json,
    app,
    command,
    console,
    evaluate_app,
    load,
)


@app.command()
@command
def predict(
    bundle: Path,
    structures: Annotated[Path, typer.Argument(metavar="IN")],
    output: Annotated[Path, typer.Argument(metavar="OUT.xyz")],
    dtype: Annotated[Dtype | None, typer.Option(help="Default: that of the bundle.")] = None,
    head: Head = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_edges_per_block: Annotated[
        int | None,
        typer.Option(min=1, help="Bounds the memory. Default: what suits the platform."),
    ] = None,
    backend: Annotated[BackendName, typer.Option(help="auto is xla.")] = BackendName.auto,
) -> None:
    """Energies, forces, stresses of all frames of IN, and magnetic moments where the model has a
    head for them, written to OUT.xyz."""
    from jaxft.display import Display
    from jaxft.evaluate.predictions import predict_file
    from jaxft.models.backend import choose

    model, params = load(bundle, dtype, head, backend.value)
    with Display(console).counter(label="predict") as advance:
        count = predict_file(
            model,
            params,
            structures,
            output,
            head=head,
            batch_size=batch_size,
            max_edges_per_block=max_edges_per_block,
            progress=advance,
        )
    console.print(f"computed with {choose(backend.value)}", highlight=False)
    console.print(f"wrote {output} ({count} frames)")


@evaluate_app.command("errors")
@command
def evaluate_errors(
    bundle: Path,
    files: Annotated[list[Path], typer.Argument(metavar="DATA...")],
    dtype: Annotated[Dtype | None, typer.Option(help="Default: that of the bundle.")] = None,
    head: Head = None,
    energy_key: str = "REF_energy",
    forces_key: str = "REF_forces",
    stress_key: str = "REF_stress",
    moments_key: str = "REF_magmoms",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    plot: Annotated[Path | None, typer.Option(help="Parity plot to write (PNG).")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]MODEL", help="Another model beside BUNDLE; repeatable."),
    ] = None,
    every_head: Annotated[
        list[str] | None, typer.Option(help="Judge each model under this head; repeatable.")
    ] = None,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """MAE and RMSE of energy, forces, stress and magnetic moments against the labels of DATA.

    With --model, --every-head, --save or --report the result is that of the other checks: a row per
    model and group, its JSON document, its page.
    """
    from jaxft import data
    from jaxft.evaluate.accuracy import check
    from jaxft.evaluate.errors import errors
    from jaxft.evaluate.plots import check_picture, parity_plot
    from jaxft.evaluate.predictions import predict_frames

    if plot is not None:
        check_picture(plot)
    check_outputs(save, report)
    keys = data.Keys(energy_key, forces_key, stress_key, moments=moments_key)
    if model or every_head or save or report:
        if plot is not None:
            raise ValueError("--plot is of one model alone; --report has parity pictures of all.")
        judged = per_head([str(bundle), *(model or [])], dtype, every_head or [head], batch_size)
        frames = data.without_isolated_atoms(data.read(files, keys=keys))
        data.require_any_label(frames, keys=keys)
        show(check(judged, frames), as_json=as_json, save=save, report=report)
        return
    potential, params = load(bundle, dtype, head)
    frames = data.without_isolated_atoms(data.read(files, keys=keys))
    data.require_any_label(frames, keys=keys)
    results = predict_frames(potential, params, frames, head=head, batch_size=batch_size)
    table = errors(frames, results)
    if plot is not None:
        parity_plot(frames, {str(bundle): results}, plot)
    if as_json:
        print(json.dumps(table.to_dict(), indent=1))
    else:
        console.print(table.render())


@evaluate_app.command("interpolation")
@command
def evaluate_interpolation(
    base: Path,
    tuned: Path,
    target: Annotated[list[Path], typer.Option(help="Data that TUNED was made for; repeatable.")],
    pretraining: Annotated[
        list[Path], typer.Option(help="Data at the level of theory of BASE; repeatable.")
    ],
    steps: Annotated[int, typer.Option(min=2, help="Models from BASE to TUNED.")] = 6,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: that of TUNED.")] = None,
    head: Head = None,
    energy_key: str = "REF_energy",
    forces_key: str = "REF_forces",
    stress_key: str = "REF_stress",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    as_json: Json = False,
) -> None:
    """Errors of BASE + a (TUNED - BASE): what can be had between learning and forgetting."""
    import numpy as np

    from jaxft import bundle as bundles
    from jaxft import data
    from jaxft.evaluate.pareto import render, sweep, to_dict

    keys = data.Keys(energy_key, forces_key, stress_key)
    frames = [
        data.without_isolated_atoms(data.read(files, keys=keys)) for files in (target, pretraining)
    ]
    for found in frames:
        data.require_any_label(found, keys=keys)
    model, after = load(tuned, dtype, head)
    own, before = bundles.load(base, dtype=bundles.stored_dtype(after))
    points = sweep(
        model,
        before,
        after,
        {"target": (frames[0], model), "pretraining": (frames[1], own)},
        [float(a) for a in np.linspace(0, 1, steps)],
        head=head,
        batch_size=batch_size,
    )
    if as_json:
        print(json.dumps(to_dict(points), indent=1))
    else:
        console.print(render(points))
