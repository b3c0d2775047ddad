"""Checks of several models against labelled frames."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxft.cli.candidates import (
    Models,
    Report,
    Save,
    candidates,
    check_outputs,
    common_dtype,
    per_head,
    show,
)
from jaxft.cli.shared import Dtype, Head, Json, command, evaluate_app

if TYPE_CHECKING:
    from jaxft.data import Frame, Keys

Wanted = Annotated[Dtype | None, typer.Option(help="Default: float64 if any bundle is.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Largest structures per batch.")]
Data = Annotated[list[Path], typer.Option(help="Frames; repeatable.")]


def _read(files: list[Path], keys: Keys) -> list[Frame]:
    from jaxft import data

    frames = data.without_isolated_atoms(data.read(files, keys=keys))
    if not frames:
        raise ValueError("no frames to judge by (isolated atoms do not count); give some.")
    return frames


@evaluate_app.command("forget")
@command
def evaluate_forget(
    base: Annotated[str, typer.Argument(metavar="[NAME=]BASE")],
    tuned: Models,
    data: Data,
    dtype: Wanted = None,
    base_head: Annotated[str | None, typer.Option(help="Head of BASE; default: --head.")] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(help="Head of the others, where they have several; repeatable."),
    ] = None,
    own_e0s: Annotated[
        bool,
        typer.Option(
            "--own-e0s/--base-e0s",
            help="Isolated-atom energies of each model, or for all those of BASE.",
        ),
    ] = False,
    energy_key: str = "REF_energy",
    forces_key: str = "REF_forces",
    stress_key: str = "REF_stress",
    batch_size: BatchSize = 16,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """What models forgot of BASE: errors before and after, drift, weight distance.

    DATA is of the domain of BASE; without labels only the drift is told.
    """
    from jaxft.data import Keys
    from jaxft.evaluate.forget import check

    check_outputs(save, report)
    heads: list[str | None] = [*head] if head else [None]
    frames = _read(data, Keys(energy_key, forces_key, stress_key))
    first = base_head if base_head is not None else heads[0]
    wanted = dtype or common_dtype([base, *tuned])
    (before,) = candidates([base], wanted, first, batch_size)
    after = per_head(tuned, wanted, heads, batch_size)
    told = ", ".join(str(h) for h in heads if h is not None)
    found = check(before, after, frames, heads=told, own_e0s=own_e0s)
    show(found, as_json=as_json, save=save, report=report)


@evaluate_app.command("softening")
@command
def evaluate_softening(
    models: Models,
    data: Data,
    equilibrium: Annotated[
        list[Path] | None, typer.Option(help="Frames at rest, for the curvature; repeatable.")
    ] = None,
    max_force: Annotated[
        float | None, typer.Option(min=0, help="eV/Å; frames with larger ones are left out.")
    ] = None,
    max_displacement: Annotated[
        float, typer.Option(min=0, help="Å, from the equilibrium frame, for the curvature.")
    ] = 0.1,
    dtype: Wanted = None,
    head: Head = None,
    energy_key: str = "REF_energy",
    forces_key: str = "REF_forces",
    stress_key: str = "REF_stress",
    batch_size: BatchSize = 16,
    save: Save = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Slope of predicted against reference forces, material by material; below 1 is soft."""
    from jaxft.data import Keys
    from jaxft.evaluate.softening import check

    check_outputs(save, report)
    keys = Keys(energy_key, forces_key, stress_key)
    frames = _read(data, keys)
    at_rest = _read(equilibrium, keys) if equilibrium else []
    found = check(
        candidates(models, dtype, head, batch_size),
        frames,
        equilibrium=at_rest,
        max_force=max_force,
        max_displacement=max_displacement,
    )
    show(found, as_json=as_json, save=save, report=report)
