"""The checks that a comparison knows, by name: one line each in ``CHECKS``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase
from pydantic import BaseModel, ConfigDict

from jaxft.data import Frame, Keys, read_atoms
from jaxft.evaluate import (
    accuracy,
    diatomics,
    elastic,
    eos,
    forget,
    md,
    phase,
    phonons,
    relax,
    rss,
    smoothness,
    softening,
    uncertainty,
)
from jaxft.evaluate.bindings import Check, Headline, Reader, one_structure
from jaxft.evaluate.candidate import Candidate
from jaxft.evaluate.cost import COST
from jaxft.evaluate.crystals import Crystal, read_crystal
from jaxft.evaluate.eos import Curve
from jaxft.evaluate.errors import TOTAL
from jaxft.evaluate.finding import Finding, Row
from jaxft.evaluate.randomstructures import random_crystals
from jaxft.evaluate.uncertainty import UNLABELLED, is_labelled


def judged(candidates: Sequence[Candidate], frames: Sequence[Frame]) -> Finding:
    """:func:`jaxft.evaluate.accuracy.check` of frames that have labels.

    Raises:
      ValueError: as there, or no frame has any label.
    """
    if frames and not is_labelled(frames):
        raise ValueError(
            f"none of {len(frames)} frames ({frames[0].source} …) has a label; give "
            "labelled frames, or the keys of their labels."
        )
    return accuracy.check(candidates, frames)


def forgotten(candidates: Sequence[Candidate], frames: Sequence[Frame], *, base: str) -> Finding:
    """:func:`jaxft.evaluate.forget.check` with the base among the candidates.

    The base itself forgot nothing: its ratios are 1, where there are errors.

    Raises:
      ValueError: as there, or the base is no candidate.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    if base not in by_name:
        raise ValueError(f"the base {base!r} is none of {', '.join(map(repr, by_name))}.")
    tuned = [candidate for name, candidate in by_name.items() if name != base]
    found = forget.check(by_name[base], tuned, frames)
    rows = (_unforgotten(row) if row.model == base else row for row in found.rows)
    notes = found.notes if is_labelled(frames) else (*found.notes, UNLABELLED)
    return replace(found, rows=tuple(rows), notes=notes)


def _unforgotten(row: Row) -> Row:
    ratios = {f"{q}_ratio": 1.0 for q in forget.QUANTITIES if row.values.get(f"{q}_rmse")}
    return replace(row, values={**row.values, **ratios})


class CrystalFile(BaseModel):
    """A crystal whose file does not say its supercell."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Path
    supercell: tuple[int, int, int]


def _crystals(given: Mapping[str, Path | CrystalFile], *_: Any) -> list[Crystal]:
    return [
        read_crystal(said.file, said.supercell, name)
        if isinstance(said, CrystalFile)
        else read_crystal(said, name=name)
        for name, said in given.items()
    ]


def _named(paths: Mapping[str, Path], *_: Any) -> list[ase.Atoms]:
    """Structures that know their names."""
    found = []
    for name, path in paths.items():
        atoms = one_structure(path)
        atoms.info["name"] = name
        found.append(atoms)
    return found


def _random(given: Mapping[str, Path | int], _: Keys, options: Any) -> dict[str, list[ase.Atoms]]:
    """All structures of a file, or so many random crystals of the composition."""
    return {
        name: random_crystals(name, said, seed=options.seed + i)
        if isinstance(said, int)
        else read_atoms(said)
        for i, (name, said) in enumerate(given.items())
    }


def _curves(paths: Mapping[str, Path], _: Keys, options: Any) -> dict[str, Curve]:
    """Energies of the cells that the structures of the same names are."""
    unknown = sorted(set(paths) - set(options.structures))
    if unknown:
        raise ValueError(
            f"references are given for {', '.join(map(repr, unknown))}, but the structures are "
            f"{', '.join(map(repr, options.structures))}; use their names."
        )
    return {
        name: eos.read_curve(path, len(one_structure(options.structures[name])))
        for name, path in paths.items()
    }


def _trajectory(path: Path, *_: Any) -> list[ase.Atoms]:
    return read_atoms(path)


MORE = float("inf")

CHECKS: dict[str, Check] = {
    "errors": Check(judged, (Headline("forces_rmse", TOTAL), Headline("energy_rmse", TOTAL))),
    "forget": Check(
        forgotten, (Headline("forces_ratio", TOTAL), Headline("forces_drift", TOTAL, best=None))
    ),
    "softening": Check(softening.check, (Headline("slope", softening.ALL, best=1.0),)),
    "phonons": Check(
        phonons.phonons,
        (
            Headline("mae", phonons.ALL, against="reference"),
            Headline("omega_max_bias", phonons.ALL, absolute=True, against="reference"),
        ),
        {"crystals": Reader(dict[str, Path | CrystalFile], _crystals)},
    ),
    "phase": Check(
        phase.check,
        tuple(Headline(c, phase.ALL, best=1.0) for c in ("f1", "accuracy")),
    ),
    "eos": Check(
        eos.check,
        (Headline("delta", against="against"),),
        {"references": Reader(dict[str, Path], _curves)},
    ),
    "elastic": Check(elastic.check, (Headline("k_error", absolute=True, against="against"),)),
    "relax": Check(relax.check, (Headline("rmsd", flagged=False),)),
    "diatomics": Check(diatomics.check, (Headline("force_flips", diatomics.ALL, best=1.0),)),
    "smoothness": Check(smoothness.check, (Headline("force_jump"),)),
    "rss": Check(
        rss.check,
        (Headline("holes_percent", rss.ALL),),
        {"structures": Reader(dict[str, Path | int], _random)},
    ),
    "md": Check(
        md.md,
        (Headline("survival_time", best=MORE), Headline("energy_drift", absolute=True)),
        {
            "structures": Reader(dict[str, Path], _named),
            "reference": Reader(Path, _trajectory),
        },
    ),
    "uncertainty": Check(uncertainty.check, of_models=False),
}
"""By the name in a config and of the finding."""

HEADLINES = {name: check.headlines for name, check in CHECKS.items()} | {
    COST: (Headline("per_atom"), Headline("parameters", best=None))
}
"""By the name of a finding, the numbers that stand for it."""
