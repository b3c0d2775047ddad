"""Checks of several models on structures, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxft.cli.candidates import Models, Report, Save, candidates, check_outputs, show
from jaxft.cli.checks import BatchSize, Wanted
from jaxft.cli.shared import Dtype, Head, Json, command, evaluate_app

if TYPE_CHECKING:
    import ase

Structures = Annotated[
    list[str],
    typer.Option(metavar="[NAME=]FILE", help="Structures, in any file that ASE reads; repeatable."),
]
Against = Annotated[str | None, typer.Option(help="The model that is the reference, by name.")]
Fmax = Annotated[float, typer.Option(min=0, help="eV/Å, where a relaxation ends.")]
Steps = Annotated[int, typer.Option(min=1, help="Of a relaxation, at most.")]


def _structures(specs: list[str]) -> dict[str, ase.Atoms]:
    """By NAME, or the file's; those of a file that holds several are numbered."""
    from jaxft.data import read_atoms

    found: dict[str, ase.Atoms] = {}
    for spec in specs:
        name, path = _split(spec)
        images = read_atoms(path)
        for i, atoms in enumerate(images):
            label = name if len(images) == 1 else f"{name}:{i}"
            if label in found:
                raise ValueError(f"two structures are called {label!r}; give NAME=FILE.")
            found[label] = atoms
    return found


def _split(spec: str) -> tuple[str, Path]:
    name, separator, path = spec.partition("=")
    if separator and name and path and not Path(spec).exists():
        return name, Path(path)
    return Path(spec).stem, Path(spec)


@evaluate_app.command("eos")
@command
def evaluate_eos(
    models: Models,
    structures: Structures,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="Volumes (Å³) and energies (eV) of that structure's cell."
        ),
    ] = None,
    against: Against = None,
    span: Annotated[float, typer.Option(help="Half width of the volumes, relative.")] = 0.06,
    points: Annotated[int, typer.Option(min=5)] = 11,
    dtype: Wanted = None,
    head: Head = None,
    batch_size: BatchSize = 16,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Energy against volume: V0, B0, and the Δ-gauge against a reference."""
    from jaxft.evaluate.eos import check, read_curve

    check_outputs(save, report)
    found = _structures(structures)
    curves = {}
    for spec in reference or []:
        name, path = _split(spec)
        if name not in found:
            raise ValueError(f"{name!r} of {spec} is no structure; there are {', '.join(found)}.")
        curves[name] = read_curve(path, len(found[name]))
    finding = check(
        candidates(models, dtype, head, batch_size),
        found,
        references=curves,
        against=against,
        span=span,
        points=points,
    )
    show(finding, as_json=as_json, save=save, report=report)


@evaluate_app.command("elastic")
@command
def evaluate_elastic(
    models: Models,
    structures: Structures,
    relax_first: Annotated[
        bool, typer.Option("--relax/--no-relax", help="Relax with each model before.")
    ] = True,
    against: Against = None,
    fmax: Fmax = 0.01,
    steps: Steps = 500,
    dtype: Wanted = None,
    head: Head = None,
    batch_size: BatchSize = 16,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Elastic constants and moduli, with ions clamped and relaxed."""
    from jaxft.evaluate.elastic import check, tables

    check_outputs(save, report)
    finding = check(
        candidates(models, dtype, head, batch_size),
        _structures(structures),
        relax_first=relax_first,
        fmax=fmax,
        steps=steps,
        against=against,
    )
    show(finding, as_json=as_json, save=save, report=report, tables=tables(finding))


@evaluate_app.command("relax")
@command
def evaluate_relax(
    models: Models,
    structures: Structures,
    cell: Annotated[bool, typer.Option("--cell/--no-cell", help="Relax cells too.")] = True,
    fmax: Fmax = 0.05,
    steps: Steps = 500,
    optimizer: Annotated[str, typer.Option(help="FIRE, LBFGS or BFGS.")] = "FIRE",
    symprec: Annotated[float, typer.Option(min=0, help="Å.")] = 1e-2,
    pressure: Annotated[float, typer.Option(help="GPa.")] = 0.0,
    dtype: Wanted = None,
    head: Head = None,
    batch_size: BatchSize = 16,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Where structures relax to: steps, volume, displacements, space group."""
    from jaxft.evaluate.relax import check

    check_outputs(save, report)
    finding = check(
        candidates(models, dtype, head, batch_size),
        _structures(structures),
        cell=cell,
        fmax=fmax,
        steps=steps,
        optimizer=optimizer,
        symprec=symprec,
        pressure=pressure,
    )
    show(finding, as_json=as_json, save=save, report=report)


@evaluate_app.command("diatomics")
@command
def evaluate_diatomics(
    models: Models,
    element: Annotated[list[str], typer.Option(help="A symbol; repeatable; all pairs are taken.")],
    against: Against = None,
    shortest: Annotated[float, typer.Option(help="Å.")] = 0.18,
    longest: Annotated[float, typer.Option(help="Å.")] = 6.0,
    points: Annotated[int, typer.Option(min=10)] = 100,
    dtype: Wanted = None,
    head: Head = None,
    batch_size: BatchSize = 128,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Curves of two atoms: the repulsive wall, spurious wells, roughness."""
    from jaxft.evaluate.diatomics import check

    check_outputs(save, report)
    finding = check(
        candidates(models, dtype, head, batch_size),
        element,
        against=against,
        shortest=shortest,
        longest=longest,
        points=points,
    )
    show(finding, as_json=as_json, save=save, report=report)


@evaluate_app.command("smoothness")
@command
def evaluate_smoothness(
    models: Models,
    structures: Structures,
    r_max: Annotated[float | None, typer.Option(help="Å, of models that are not ours.")] = None,
    seed: int = 0,
    dtype: Annotated[Dtype, typer.Option(help="float32 hides much.")] = Dtype.float64,
    head: Head = None,
    batch_size: BatchSize = 16,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Is it a potential? Continuity, symmetries, forces and stress as derivatives."""
    from jaxft.evaluate.smoothness import check

    check_outputs(save, report)
    finding = check(
        candidates(models, dtype, head, batch_size),
        _structures(structures),
        r_max=r_max,
        seed=seed,
    )
    show(finding, as_json=as_json, save=save, report=report)


@evaluate_app.command("rss")
@command
def evaluate_rss(
    models: Models,
    composition: Annotated[
        list[str] | None,
        typer.Option(help="What a random cell holds, Na4Cl4; repeatable; needs jaxft[rss]."),
    ] = None,
    structures: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Or start from these, a composition per file."),
    ] = None,
    count: Annotated[int, typer.Option(min=3, help="Structures per composition.")] = 50,
    pressure: Annotated[
        list[float] | None, typer.Option(help="GPa; repeatable. Default: 0.1 and 50.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Relaxations, with rattling between.")] = 3,
    rattle: Annotated[float, typer.Option(min=0, help="Å.")] = 0.1,
    fmax: Fmax = 0.05,
    steps: Steps = 200,
    seed: int = 0,
    dtype: Wanted = None,
    head: Head = None,
    batch_size: BatchSize = 64,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Holes of the energy surface, from random structures; the first model is the base."""
    from jaxft.data import read_atoms
    from jaxft.evaluate.randomstructures import random_crystals
    from jaxft.evaluate.rss import PRESSURES, check

    check_outputs(save, report)
    judged = candidates(models, dtype, head, batch_size)
    named = [_split(spec) for spec in structures or []]
    found = {name: read_atoms(path) for name, path in named}
    for i, formula in enumerate(composition or []):
        found[formula] = random_crystals(formula, count, seed=seed + i)
    if len(found) < len(named) + len(composition or []):
        raise ValueError("a composition occurs twice; give each once, files as NAME=FILE.")
    finding = check(
        judged,
        found,
        pressures=pressure or PRESSURES,
        rounds=rounds,
        rattle=rattle,
        fmax=fmax,
        steps=steps,
        seed=seed,
    )
    show(finding, as_json=as_json, save=save, report=report)
