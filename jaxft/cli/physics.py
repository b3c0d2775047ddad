"""Commands that look for phases and that weigh the opinions of an ensemble."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxft.cli.candidates import Models, Report, Save, candidates, check_outputs, show
from jaxft.cli.shared import Dtype, Head, Json, command, console, evaluate_app

if TYPE_CHECKING:
    import ase

Wanted = Annotated[Dtype | None, typer.Option(help="Default: float64 if any bundle is.")]


@evaluate_app.command("phase")
@command
def evaluate_phase(
    models: Models,
    structure: Annotated[
        list[str],
        typer.Option(metavar="[NAME=]FILE", help="A high-symmetry phase; repeatable."),
    ],
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=GROUP", help="Space group that it ends in; repeatable."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whose phases are the expected ones.")
    ] = None,
    min_length: Annotated[float, typer.Option(help="Å, thickness of the supercell.")] = 8.0,
    displacement: Annotated[float, typer.Option(help="Å, of finite differences.")] = 0.01,
    threshold: Annotated[
        float, typer.Option(help="THz; softer than minus this is unstable.")
    ] = 0.1,
    longest: Annotated[float, typer.Option(help="Å, end of the walk, of one atom.")] = 0.6,
    points: Annotated[int, typer.Option(min=2, help="Of the walk, in either direction.")] = 12,
    wells: Annotated[int, typer.Option(min=1, help="How many of the deepest are relaxed.")] = 3,
    cell: Annotated[bool, typer.Option("--cell/--fixed-cell", help="Relax cells too.")] = True,
    fmax: Annotated[float, typer.Option(help="eV/Å, where relaxations end.")] = 0.005,
    steps: Annotated[int, typer.Option(min=1, help="Of a relaxation, at most.")] = 500,
    symprec: Annotated[float, typer.Option(help="Å, of space groups.")] = 0.02,
    dtype: Wanted = None,
    head: Head = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Follow imaginary modes to the phases that models predict."""
    import numpy as np

    from jaxft.evaluate.phase import check
    from jaxft.evaluate.walks import Protocol

    check_outputs(save, report)
    protocol = Protocol(
        min_length=min_length,
        displacement=displacement,
        threshold=threshold,
        amplitudes=tuple(np.linspace(0, longest, points + 1)[1:]),
        relaxed=wells,
        cell=cell,
        fmax=fmax,
        steps=steps,
        symprec=symprec,
    )
    structures = named_structures(structure)
    found = check(
        candidates(models, dtype, head, batch_size),
        structures,
        expected=_expected(expect or []),
        against=against,
        protocol=protocol,
    )
    show(found, as_json=as_json, save=save, report=report)


@evaluate_app.command("uncertainty")
@command
def evaluate_uncertainty(
    models: Models,
    data: Annotated[list[Path], typer.Option(help="Frames, with labels or not; repeatable.")],
    name: Annotated[str, typer.Option(help="Of the ensemble.")] = "ensemble",
    rank: Annotated[
        Path | None, typer.Option(help="Write the frames, most uncertain first (extended XYZ).")
    ] = None,
    most: Annotated[int | None, typer.Option(min=1, help="So many frames of the ranking.")] = None,
    top: Annotated[int, typer.Option(min=0, help="So many frames in the table.")] = 5,
    dtype: Wanted = None,
    head: Head = None,
    energy_key: str = "REF_energy",
    forces_key: str = "REF_forces",
    stress_key: str = "REF_stress",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """How far models disagree on DATA, whether that tells of errors, and what to label next."""
    from jaxft.data import Keys, from_atoms, read_atoms
    from jaxft.evaluate.spread import check_ranked, spreads, write_ranked
    from jaxft.evaluate.uncertainty import judge

    check_outputs(save, report, rank)
    if rank is not None:
        check_ranked(rank)
    keys = Keys(energy_key, forces_key, stress_key)
    read = [(atoms, f"{p}:{i}") for p in data for i, atoms in enumerate(read_atoms(p))]
    frames = [from_atoms(atoms, keys=keys, source=source) for atoms, source in read]
    structures = [atoms for atoms, _ in read]
    found = spreads(candidates(models, dtype, head, batch_size), structures)
    finding = judge({name: found}, frames, top=top)
    show(finding, as_json=as_json, save=save, report=report)
    if rank is not None:
        count = write_ranked(rank, structures, found, most=most)
        if not as_json:
            console.print(f"wrote {rank} ({count} frames)", highlight=False)


def named_structures(specs: list[str]) -> dict[str, ase.Atoms]:
    """``[NAME=]FILE`` of a command line, one structure each.

    Raises:
      ValueError: two have one name, or a file holds none or several.
    """
    from jaxft.evaluate.bindings import one_structure

    found: dict[str, ase.Atoms] = {}
    for spec in specs:
        before, separator, after = spec.partition("=")
        is_named = separator and before and after and not Path(spec).exists()
        name, path = (before, after) if is_named else (Path(spec).stem, spec)
        if name in found:
            raise ValueError(f"two structures are called {name!r}; give one a name: NAME={path}.")
        found[name] = one_structure(Path(path))
    return found


def _expected(specs: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for spec in specs:
        name, separator, group = spec.rpartition("=")
        if not separator or not name or not group or name in found:
            raise ValueError(f"--expect {spec!r} is no NAME=GROUP, or its name occurs twice.")
        found[name] = group
    return found
