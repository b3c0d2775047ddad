"""Phonons of the crystals by which a dataset's cells are judged, before and after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxft import bundle
from jaxft.config import Config
from jaxft.evaluate.candidate import JaxCandidate
from jaxft.evaluate.crystals import Crystal, phonopy_api, read_crystal
from jaxft.evaluate.phonon_tasks import Options
from jaxft.evaluate.phonons import phonons
from jaxft.evaluate.zones import UNITS
from jaxft.study.config import PhononsConfig
from jaxft.study.identity import LENGTH, content

if TYPE_CHECKING:
    from jaxft.study.plan import Cell

QUANTITIES = {
    "omega_mae": "mae",
    "omega_max_bias": "omega_max_bias",
    "omega_max": "omega_max",
    "omega_min": "omega_min",
    "curvature_slope": "curvature_slope",
    "dos_error": "dos_error",
    "displaced_forces_rmse": "force_rmse",
    "stable": "stable",
}
"""Of a cell, and how :mod:`jaxft.evaluate.phonons` calls them; its definitions and units."""

HAS_PHONONS = "has_phonons"
"""1, or 0 where a model has none that can be computed: overlapping atoms, forces not finite."""

BEFORE, AFTER, STANDARD = "before", "after", "standard"
BATCH = 4
"""Supercells per call."""


def with_phonons(cell: Cell, judged_by: Mapping[str, PhononsConfig]) -> Cell:
    """The cell with what it is also judged by, which its id depends on, by content."""
    if not judged_by:
        return cell
    facts = {
        name: {
            key: content(value) if isinstance(value, Path) else value
            for key, value in entry.model_dump().items()
        }
        for name, entry in judged_by.items()
    }
    text = json.dumps([cell.id, facts], sort_keys=True)
    known = hashlib.sha256(text.encode()).hexdigest()[:LENGTH]
    output = cell.folder.parent / known / cell.config.output.name
    config = cell.config.model_copy(update={"output": output})
    return replace(cell, id=known, config=config, phonons=dict(judged_by))


def check(cell: Cell) -> None:
    """Before anything is trained.

    Raises:
      ValueError: a crystal cannot be read, or there is nothing to compare its phonons with.
      ModuleNotFoundError: phonopy is not installed.
    """
    if cell.phonons:
        phonopy_api()
    for name, entry in cell.phonons.items():
        crystal = _crystal(name, entry)
        if crystal.reference is None and entry.reference is None:
            raise ValueError(
                f"phonons {name!r}: {crystal.missing or f'{entry.crystal} says nothing of forces'};"
                "\ngive a folder with FORCE_SETS or force constants, or a bundle as `reference`."
            )


def of_run(cell: Cell, tuned: Path) -> Iterator[tuple[str, str, str, float]]:
    """(set, quantity, unit, value) of the base model and the tuned one, in float64."""
    for name, entry in cell.phonons.items():
        with _float64():
            yield from _of_crystal(name, entry, cell.config, tuned)


def _of_crystal(
    name: str, entry: PhononsConfig, config: Config, tuned: Path
) -> Iterator[tuple[str, str, str, float]]:
    head = config.head
    if config.add_head is not None:
        heads = bundle.read_model(config.model)[0].heads
        head = config.add_head.like or heads[0]
    models = {BEFORE: (config.model, head), AFTER: (tuned, config.head)}
    if entry.reference is not None:
        models[STANDARD] = (entry.reference, entry.head)
    found = phonons(
        [
            JaxCandidate(label, *bundle.load(path, dtype="float64"), head=of, batch_size=BATCH)
            for label, (path, of) in models.items()
        ],
        [_crystal(name, entry)],
        Options(mesh=entry.mesh),
        reference=None if entry.reference is None else STANDARD,
    )
    rows = {row.model: row for row in found.rows if row.subject == name}
    for label, prefix in ((AFTER, ""), (BEFORE, "before_")):
        values = rows[label].values
        yield name, f"{prefix}{HAS_PHONONS}", "", float("omega_max" in values)
        for quantity, known in QUANTITIES.items():
            value = values.get(known)
            if isinstance(value, int | float):
                yield name, f"{prefix}{quantity}", UNITS[known], float(value)


def _crystal(name: str, entry: PhononsConfig) -> Crystal:
    return read_crystal(entry.crystal, entry.supercell, name)


@contextmanager
def _float64() -> Iterator[None]:
    """Frequencies are roots of small differences."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
