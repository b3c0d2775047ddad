"""Commands about data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jaxft.cli.shared import EXIT_INPUT, Dtype, Head, Json, command, console, data_app


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
    moments_key: str = "REF_magmoms",
    as_json: Json = False,
) -> None:
    """Labels, units, duplicates, close contacts, outliers, elements. Exit code 1 if DATA cannot be
    trained on."""
    from jaxft import bundle as bundles
    from jaxft import data
    from jaxft.data.audit import audit

    potential = None if model is None else bundles.load_numpy(model)[0]
    keys = data.Keys(energy_key, forces_key, stress_key, virials_key, moments_key)
    found = audit(data.read(files, keys=keys), model=potential)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        console.print(found.render())
    if not found.is_ok:
        raise typer.Exit(EXIT_INPUT)


@data_app.command("rattle")
@command
def rattle(
    structures: Annotated[list[str], typer.Argument(metavar="[NAME=]STRUCTURE...")],
    model: Annotated[Path, typer.Option(help="Bundle of the base model.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="NAME.xyz; with --format a new folder.")
    ],
    frames: Annotated[int, typer.Option(min=1, help="Of each structure.")] = 20,
    amplitude: Annotated[
        tuple[float, float], typer.Option(help="Å, range of the standard deviation.")
    ] = (0.0, 0.15),
    volume: Annotated[
        tuple[float, float], typer.Option(help="Range, relative to the relaxed cell.")
    ] = (0.96, 1.04),
    strain: Annotated[float, typer.Option(help="Largest, at constant volume.")] = 0.01,
    window: Annotated[
        tuple[float, float],
        typer.Option(help="eV/atom above the relaxed structure, filled uniformly."),
    ] = (0.0, 0.05),
    min_length: Annotated[float, typer.Option(help="Å, thickness of the supercell.")] = 10.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    code: Annotated[
        str | None,
        typer.Option("--format", help="vasp or espresso: a folder with an input per frame."),
    ] = None,
    fmax: Annotated[float, typer.Option(help="eV/Å, where relaxations end.")] = 0.005,
    steps: Annotated[int, typer.Option(min=1, help="Of a relaxation, at most.")] = 500,
    dtype: Annotated[Dtype | None, typer.Option(help="Default: that of the bundle.")] = None,
    head: Head = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    as_json: Json = False,
) -> None:
    """Rattled and strained supercells, relaxed first, even in energy: frames to be labelled."""
    from jaxft.cli.candidates import candidates, show
    from jaxft.cli.physics import named_structures
    from jaxft.evaluate.handover import check_target, hand_over
    from jaxft.evaluate.rattle import rattle as rattled
    from jaxft.evaluate.trials import Ranges

    ranges = Ranges(amplitude, volume, strain, window, min_length)
    parents = named_structures(structures)
    check_target(output, code, parents.values())
    (base,) = candidates([str(model)], dtype, head, batch_size)
    found, finding = rattled(
        base, parents, frames=frames, ranges=ranges, seed=seed, fmax=fmax, steps=steps
    )
    if found:
        hand_over(output, found, code)
    show(finding, as_json=as_json, save=None, report=None)
    if not found:
        raise ValueError("no frame was made, so nothing was written; see the flags.")
    if not as_json:
        console.print(f"wrote {output} ({len(found)} frames)", highlight=False)


@data_app.command("hessian")
@command
def hessian(
    crystals: Annotated[list[Path], typer.Argument(metavar="CRYSTAL...")],
    output: Annotated[Path, typer.Option("-o", "--output", help="NAME.xyz")],
    teacher: Annotated[
        Path | None, typer.Option(help="Bundle whose second derivatives are the labels.")
    ] = None,
    supercell: Annotated[
        str | None, typer.Option(help='Repetitions, as "2 2 2", where no file says them.')
    ] = None,
    min_length: Annotated[float, typer.Option(help="Of other supercells, Å.")] = 10.0,
    at_rest: Annotated[
        bool, typer.Option("--at-rest", help="Forces and stress of 0 are labels, too.")
    ] = False,
    head: Head = None,
) -> None:
    """Force constants (folders of phonopy, as of evaluate phonons) or a teacher's second
    derivatives as labels of perfect supercells, for the Hessian in a loss."""
    import ase.io

    from jaxft.cli.phonons import repetitions
    from jaxft.cli.shared import load
    from jaxft.evaluate.candidate import JaxCandidate
    from jaxft.evaluate.crystals import phonopy_api, read_crystal
    from jaxft.evaluate.curvature import labelled

    phonopy_api()
    if output.exists():
        raise ValueError(f"{output} exists; give another --output.")
    found = [read_crystal(path, repetitions(supercell)) for path in crystals]
    own = None
    if teacher is not None:
        own = JaxCandidate("teacher", *load(teacher, Dtype.float64, head), head=head)
    frames = [
        labelled(one, teacher=own, min_length=min_length, is_at_rest=at_rest) for one in found
    ]
    ase.io.write(output, frames, format="extxyz")
    told = ", ".join(f"{atoms.symbols} {atoms.arrays['probe'].shape[1] // 3}" for atoms in frames)
    console.print(f"wrote {output} (columns of {told})", highlight=False)
