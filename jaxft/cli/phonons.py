"""The command that judges phonons."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jaxft.cli.candidates import Models, Report, Save, candidates, check_outputs, show
from jaxft.cli.shared import Dtype, Head, Json, command, console, evaluate_app


class Method(StrEnum):
    displacements = "displacements"
    hessian = "hessian"


@evaluate_app.command("phonons")
@command
def evaluate_phonons(
    models: Models,
    crystal: Annotated[
        list[Path],
        typer.Option(
            help="A folder or phonopy_*.yaml with FORCE_SETS and BORN beside it, or a structure; "
            "repeatable."
        ),
    ],
    supercell: Annotated[
        str | None, typer.Option(help='Repetitions, as "2 2 2", where no file says them.')
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="A model that the others are compared with.")
    ] = None,
    method: Annotated[
        Method, typer.Option(help="Finite displacements, or exact second derivatives.")
    ] = Method.displacements,
    min_length: Annotated[float, typer.Option(help="Of supercells, Å.")] = 10.0,
    distance: Annotated[float, typer.Option(help="Of displacements, Å.")] = 0.01,
    mesh: Annotated[float, typer.Option(help="Of q points, phonopy's measure, Å.")] = 40.0,
    temperature: Annotated[list[float] | None, typer.Option(help="K; repeatable.")] = None,
    relax: Annotated[
        float | None, typer.Option(help="Relax cell and atoms first, to this force, eV/Å.")
    ] = None,
    slack: Annotated[
        bool, typer.Option("--slack", help="Thermal conductivity, estimated.")
    ] = False,
    expansion: Annotated[bool, typer.Option("--expansion", help="Thermal expansion.")] = False,
    kappa: Annotated[
        bool, typer.Option("--kappa", help="Thermal conductivity of third order, by phono3py.")
    ] = False,
    kappa_length: Annotated[float, typer.Option(help="Of its supercells, Å.")] = 8.0,
    kappa_distance: Annotated[float, typer.Option(help="Of its displacements, Å.")] = 0.03,
    kappa_mesh: Annotated[float, typer.Option(help="Of its q points, Å.")] = 30.0,
    tolerance: Annotated[float, typer.Option(help="THz; stable is above minus this.")] = 0.05,
    dtype: Annotated[Dtype, typer.Option(help="Small differences of forces.")] = Dtype.float64,
    head: Head = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Frequencies, imaginary modes, C_V, S, F, thermal expansion and conductivity of crystals."""
    from jaxft.display import Display
    from jaxft.evaluate.crystals import phonopy_api, read_crystal
    from jaxft.evaluate.kappa import phono3py_api
    from jaxft.evaluate.phonon_tasks import Options
    from jaxft.evaluate.phonons import phonons, tables

    check_outputs(save, report)
    phonopy_api()
    options = Options(
        method=method.value,
        min_length=min_length,
        distance=distance,
        mesh=mesh,
        temperatures=tuple(temperature or [300.0]),
        fmax=relax,
        slack=slack,
        expansion=expansion,
        tolerance=tolerance,
        kappa=kappa,
        kappa_length=kappa_length,
        kappa_distance=kappa_distance,
        kappa_mesh=kappa_mesh,
    )
    if kappa:
        phono3py_api()
    crystals = [read_crystal(path, repetitions(supercell)) for path in crystal]
    judged = candidates(models, dtype, head, batch_size)
    with Display(console).counter(label="phonons") as advance:
        finding = phonons(judged, crystals, options, reference=reference, progress=advance)
    show(finding, as_json=as_json, save=save, report=report, tables=tables(finding))


def repetitions(text: str | None) -> tuple[int, ...] | None:
    """Three numbers of a command line."""
    if text is None:
        return None
    words = text.replace(",", " ").split()
    if len(words) != 3 or not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f'supercell {text!r} is none; give three numbers, as "2 2 2".')
    return tuple(int(word) for word in words)
