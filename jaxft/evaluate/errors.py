r"""Errors against labels: energy per atom, force components, stress components.

For frames b with :math:`N_b` atoms, with ``p`` the model and ``d`` the label,

.. math:: \mathrm{RMSE}_E = \sqrt{\langle (\Delta E_b/N_b)^2 \rangle_b},\quad
          \mathrm{RMSE}_F = \sqrt{\langle \Delta F_{i\alpha}^2 \rangle},\quad
          \mathrm{RMSE}_\sigma = \sqrt{\langle \Delta\sigma_{\alpha\beta}^2 \rangle}

with means over frames, over all 3N components of all atoms, and over all nine components; MAE
likewise. Energies are compared as they are: no shift per composition is fitted. A missing label
is in no mean and no count, and a mean over nothing is None, never 0. Of magnetic moments the
magnitudes are compared, over all atoms, and beside them those of predicting each element's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from ase.units import GPa
from rich import box
from rich.console import Group
from rich.table import Table

from jaxft.data import Frame, magnitudes
from jaxft.evaluate.predictions import FrameResult

SMALL_FORCE = 0.01
"""eV/Å; atoms with a smaller reference force have no direction worth comparing."""

TOTAL = "total"
MISSING = "–"
MILLI = 1e3

UNITS = {
    "energy": "meV/atom",
    "forces": "meV/Å",
    "stress": "meV/Å^3",
    "stress_gpa": "GPa",
    "elements": "meV/Å",
}
"""Of :meth:`ErrorTable.to_dict` and of the table."""

MOMENT_UNITS = {"moments": "mµB", "moments_of_means": "mµB"}
"""The same, of frames with such labels and models with such a head."""


@dataclass(frozen=True)
class Spread:
    """Errors of one quantity, in eV and Å; None where nothing is labelled."""

    frames: int
    """Frames with this label."""
    values: int
    """Numbers that the means run over."""
    mae: float | None
    rmse: float | None


NOTHING = Spread(0, 0, None, None)


@dataclass(frozen=True)
class GroupErrors:
    """Errors of one group of frames."""

    name: str
    frames: int
    atoms: int
    energy: Spread
    """eV/atom."""
    forces: Spread
    """eV/Å, over components."""
    stress: Spread
    """eV/Å³, over nine components."""
    force_cosine: float | None
    """Mean of cos(F_p, F_d) over atoms with |F_d| of at least ``SMALL_FORCE``; an atom whose
    predicted force is exactly zero counts as 0."""
    force_p95: float | None
    """eV/Å, 95th percentile of |ΔF_i| over atoms."""
    moments: Spread = NOTHING
    """µB, of magnitudes."""
    mean_moments: Spread = NOTHING
    """µB, likewise of predicting each element's mean, see :attr:`Potential.mean_moments`."""

    def rmse(self) -> dict[str, float | None]:
        """``energy`` in meV/atom, ``forces`` in meV/Å, ``stress`` in meV/Å³."""
        spreads = {"energy": self.energy, "forces": self.forces, "stress": self.stress}
        return {name: _times(spread.rmse, MILLI) for name, spread in spreads.items()}


@dataclass(frozen=True)
class ElementErrors:
    """Force errors of the atoms of one element."""

    symbol: str
    atoms: int
    """With a force label."""
    rmse: float
    """eV/Å, over components."""


@dataclass(frozen=True)
class ErrorTable:
    """Errors by ``config_type``, in total, and by element."""

    groups: tuple[GroupErrors, ...]
    """One per ``config_type``, in order of first appearance."""
    total: GroupErrors
    elements: tuple[ElementErrors, ...]
    """By atomic number; only elements with a force label."""

    def to_dict(self) -> dict[str, Any]:
        """Numbers in the units of ``UNITS``, ready for JSON; None where nothing is labelled."""
        return {
            "units": UNITS | (MOMENT_UNITS if self.total.moments.frames else {}),
            "total": _group_dict(self.total),
            "groups": {group.name: _group_dict(group) for group in self.groups},
            "elements": {
                e.symbol: {"atoms": e.atoms, "rmse": MILLI * e.rmse} for e in self.elements
            },
        }

    def render(self) -> Group:
        """Tables for a terminal; rich prints them."""
        groups = self.groups if len(self.groups) > 1 else ()
        rows = [*groups, self.total]
        tables = [_energy_and_forces(rows)]
        if self.total.stress.frames:
            tables.append(_stress(rows))
        if self.total.moments.frames:
            tables.append(_moments(rows))
        if self.elements:
            tables.append(_elements(self.elements))
        return Group(*tables)


def errors(frames: Sequence[Frame], results: Sequence[FrameResult]) -> ErrorTable:
    """Compare results with labels; definitions in the module's text.

    Args:
      frames: structures with labels. Isolated atoms count like any frame; leave them out with
        :func:`jaxft.data.without_isolated_atoms`.
      results: of :func:`jaxft.evaluate.predict_frames`, in the same order.

    Raises:
      ValueError: there are no frames, or results do not belong to the frames.
    """
    if not frames:
        raise ValueError("no frames to compare; give at least one.")
    if len(frames) != len(results):
        raise ValueError(
            f"{len(frames)} frames and {len(results)} results cannot be compared; give the "
            "results of predict_frames for these frames."
        )
    pairs = list(zip(frames, results, strict=True))
    for frame, result in pairs:
        if len(frame) != len(result.forces):
            raise ValueError(
                f"{frame.source} has {len(frame)} atoms, its result {len(result.forces)}; give the "
                "results of predict_frames for these frames, in their order."
            )
    names = dict.fromkeys(frame.config_type for frame in frames)
    return ErrorTable(
        groups=tuple(
            _group(n, [pair for pair in pairs if pair[0].config_type == n]) for n in names
        ),
        total=_group(TOTAL, pairs),
        elements=_by_element(pairs),
    )


Pairs = Sequence[tuple[Frame, FrameResult]]


def _group(name: str, pairs: Pairs) -> GroupErrors:
    energy = [(r.energy - f.energy) / len(f) for f, r in pairs if f.energy is not None]
    forces = [(r.forces, f.forces) for f, r in pairs if f.forces is not None]
    stress = [
        (r.stress - f.stress).ravel()
        for f, r in pairs
        if f.stress is not None and r.stress is not None
    ]
    predicted, reference = (_stack([pair[k] for pair in forces]) for k in (0, 1))
    size = np.linalg.norm(predicted - reference, axis=-1)
    moments = [
        (magnitudes(r.moments), r.mean_moments, magnitudes(f.moments))
        for f, r in pairs
        if f.moments is not None and r.moments is not None
    ]
    own, mean, label = (np.concatenate([np.zeros(0), *(m[k] for m in moments)]) for k in range(3))
    return GroupErrors(
        name=name,
        frames=len(pairs),
        atoms=sum(len(frame) for frame, _ in pairs),
        energy=_spread(energy, len(energy)),
        forces=_spread(predicted - reference, len(forces)),
        stress=_spread(stress, len(stress)),
        force_cosine=_cosine(predicted, reference),
        force_p95=float(np.percentile(size, 95)) if size.size else None,
        moments=_spread(own - label, len(moments)),
        mean_moments=_spread(mean - label, len(moments)),
    )


def _stack(forces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros((0, 3)), *forces])


def _spread(differences: Any, frames: int) -> Spread:
    delta = np.asarray(differences, np.float64).ravel()
    if not delta.size:
        return Spread(frames, 0, None, None)
    mae, rmse = np.abs(delta).mean(), np.sqrt((delta**2).mean())
    return Spread(frames, delta.size, float(mae), float(rmse))


def _cosine(predicted: np.ndarray, reference: np.ndarray) -> float | None:
    norm = np.linalg.norm(reference, axis=-1)
    counted = norm >= SMALL_FORCE
    if not counted.any():
        return None
    predicted, reference, norm = predicted[counted], reference[counted], norm[counted]
    product = norm * np.linalg.norm(predicted, axis=-1)
    cosines = (predicted * reference).sum(axis=-1) / np.where(product == 0, 1.0, product)
    return float(cosines.mean())


def _by_element(pairs: Pairs) -> tuple[ElementErrors, ...]:
    labelled = [(f, r) for f, r in pairs if f.forces is not None]
    if not labelled:
        return ()
    numbers = np.concatenate([f.atomic_numbers for f, _ in labelled])
    squares = np.concatenate([((r.forces - f.forces) ** 2).mean(axis=-1) for f, r in labelled])
    return tuple(
        ElementErrors(
            chemical_symbols[z],
            int((numbers == z).sum()),
            float(np.sqrt(squares[numbers == z].mean())),
        )
        for z in np.unique(numbers).tolist()
    )


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _group_dict(group: GroupErrors) -> dict[str, Any]:
    def spread(values: Spread, factor: float = MILLI) -> dict[str, Any]:
        scaled = {key: _times(getattr(values, key), factor) for key in ("mae", "rmse")}
        return asdict(values) | scaled

    moments = {
        "moments": spread(group.moments),
        "moments_of_means": spread(group.mean_moments),
    }
    return {
        **(moments if group.moments.frames else {}),
        "frames": group.frames,
        "atoms": group.atoms,
        "energy": spread(group.energy),
        "forces": spread(group.forces)
        | {"cosine": group.force_cosine, "p95": _times(group.force_p95, MILLI)},
        "stress": spread(group.stress),
        "stress_gpa": spread(group.stress, 1 / GPa),
    }


Column = tuple[str, Callable[[GroupErrors], str]]


def _energy_and_forces(groups: Sequence[GroupErrors]) -> Table:
    columns: list[Column] = [
        ("frames", lambda g: str(g.frames)),
        ("atoms", lambda g: str(g.atoms)),
        ("labels\nE/F", lambda g: f"{g.energy.frames}/{g.forces.frames}"),
        ("E\nMAE", lambda g: _number(g.energy.mae, MILLI)),
        ("E\nRMSE", lambda g: _number(g.energy.rmse, MILLI)),
        ("F\nMAE", lambda g: _number(g.forces.mae, MILLI)),
        ("F\nRMSE", lambda g: _number(g.forces.rmse, MILLI)),
        ("F\np95", lambda g: _number(g.force_p95, MILLI)),
        ("F\ncosine", lambda g: MISSING if g.force_cosine is None else f"{g.force_cosine:.3f}"),
    ]
    return _table("energy E, meV/atom, and forces F, meV/Å", groups, columns)


def _stress(groups: Sequence[GroupErrors]) -> Table:
    columns: list[Column] = [
        ("frames", lambda g: str(g.frames)),
        ("labels\nσ", lambda g: str(g.stress.frames)),
        ("σ MAE\nmeV/Å³", lambda g: _number(g.stress.mae, MILLI)),
        ("σ RMSE\nmeV/Å³", lambda g: _number(g.stress.rmse, MILLI)),
        ("σ MAE\nGPa", lambda g: _number(g.stress.mae, 1 / GPa)),
        ("σ RMSE\nGPa", lambda g: _number(g.stress.rmse, 1 / GPa)),
    ]
    return _table("stress σ", groups, columns)


def _moments(groups: Sequence[GroupErrors]) -> Table:
    columns: list[Column] = [
        ("frames", lambda g: str(g.frames)),
        ("labels\n|µ|", lambda g: str(g.moments.frames)),
        ("|µ|\nMAE", lambda g: _number(g.moments.mae, MILLI)),
        ("|µ|\nRMSE", lambda g: _number(g.moments.rmse, MILLI)),
        ("means\nMAE", lambda g: _number(g.mean_moments.mae, MILLI)),
        ("means\nRMSE", lambda g: _number(g.mean_moments.rmse, MILLI)),
    ]
    title = "magnetic moments |µ|, mµB; means: each element's, in the labels of the head"
    return _table(title, groups, columns)


def _table(title: str, groups: Sequence[GroupErrors], columns: Sequence[Column]) -> Table:
    table = _empty_table(title, "config\ntype", [heading for heading, _ in columns])
    for group in groups:
        is_total = group is groups[-1]
        table.add_row(
            group.name,
            *(text(group) for _, text in columns),
            style="bold" if is_total else None,
        )
    return table


def _elements(elements: Sequence[ElementErrors]) -> Table:
    table = _empty_table("forces by element", "element", ["atoms", "F RMSE\nmeV/Å"])
    for element in elements:
        table.add_row(element.symbol, str(element.atoms), _number(element.rmse, MILLI))
    return table


def _empty_table(title: str, first: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold", min_width=8)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _number(value: float | None, factor: float) -> str:
    """Three figures or one decimal; the reader compares columns, not exponents."""
    if value is None:
        return MISSING
    value = factor * value
    if not np.isfinite(value) or abs(value) >= 1e6:
        return f"{value:.2g}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:#.3g}"
