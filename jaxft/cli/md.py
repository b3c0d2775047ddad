"""Molecular dynamics on the command line."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jaxft.cli.candidates import Models, Report, Save, candidates, check_outputs, show
from jaxft.cli.shared import Dtype, Head, Json, command, console, evaluate_app


class EnsembleName(StrEnum):
    nve = "nve"
    langevin = "langevin"
    bussi = "bussi"
    npt = "npt"


@evaluate_app.command("md")
@command
def evaluate_md(
    models: Models,
    structure: Annotated[
        list[Path], typer.Option(help="Structures to start from, all frames; repeatable.")
    ],
    ensemble: EnsembleName = EnsembleName.nve,
    temperature: Annotated[
        list[float] | None, typer.Option(help="K; repeatable. Default: 300.")
    ] = None,
    pressure: Annotated[float, typer.Option(help="GPa, of npt.")] = 0.0,
    timestep: Annotated[float, typer.Option(help="fs.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="After equilibration.")] = 1000,
    equilibration: Annotated[int, typer.Option(min=0, help="Steps.")] = 0,
    replicas: Annotated[int, typer.Option(min=1, help="With other velocities.")] = 1,
    interval: Annotated[int, typer.Option(min=1, help="Steps between frames.")] = 5,
    element: Annotated[str | None, typer.Option(help="Whose diffusion is measured.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Trajectory to compare distances with, if not the first.")
    ] = None,
    max_temperature: Annotated[float, typer.Option(help="K; a replica ends above.")] = 1e4,
    min_distance: Annotated[
        float, typer.Option(help="In sums of covalent radii; a replica ends below.")
    ] = 0.5,
    seed: int = 0,
    trajectories: Annotated[
        Path | None, typer.Option(help="New folder for trajectories (extended XYZ).")
    ] = None,
    stride: Annotated[int, typer.Option(min=1, help="Of the frames, which are written.")] = 10,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: that of the bundles.")] = None,
    head: Head = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Replicas at once.")] = 16,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Survival, energy drift, diffusion, radial distribution and vibrations of trajectories."""
    from jaxft.data.frames import read_atoms
    from jaxft.display import Display
    from jaxft.evaluate.md import md, tables
    from jaxft.evaluate.mdruns import Plan
    from jaxft.md.limits import Limits

    check_outputs(save, report, trajectories)
    plan = Plan(
        ensemble.value,
        tuple(temperature or [300.0]),
        pressure,
        timestep,
        steps,
        equilibration,
        replicas,
        interval,
        element,
        seed,
        limits=Limits(max_temperature, min_distance),
    )
    structures = [atoms for path in structure for atoms in read_atoms(path)]
    found = candidates(models, dtype, head, batch_size)
    with Display(console).counter(label="steps") as advance:
        finding = md(
            found,
            structures,
            plan,
            reference=None if reference is None else read_atoms(reference),
            trajectories=trajectories,
            stride=stride,
            progress=None if as_json else advance,
        )
    show(finding, as_json=as_json, save=save, report=report, tables=tables(finding))
