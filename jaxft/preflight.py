"""Before training: how far off energies are with each choice of isolated-atom energies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxft import data, e0s
from jaxft.data import Frame
from jaxft.e0s import Energies, Estimate
from jaxft.evaluate.predictions import predict_energies
from jaxft.potential import Potential
from jaxft.typing import Params

MISMATCH = 0.5
"""eV/atom; an initial error beyond it says that the E0s are of another level of theory."""

GAIN = 0.9
"""An estimate that leaves more than this fraction of the foundation's error gains nothing: the
labels are of the model's own level of theory, whose E0s mean something."""

PREFERENCE = ("isolated_atoms", "given", "estimated", "foundation")
"""Best first; averages are never recommended."""

MILLI = 1e3


@dataclass(frozen=True)
class Choice:
    """Isolated-atom energies, and the error of the energies that training would start with."""

    name: str
    """``foundation``, ``isolated_atoms``, ``given``, ``estimated`` or ``average``."""
    e0s: dict[int, float]
    """``{atomic number: eV}`` of the elements in the data."""
    rmse: float
    """eV/atom."""
    mae: float
    """eV/atom."""
    worst: float
    """Largest absolute error, eV/atom."""
    worst_frame: str
    """Where that is."""

    @property
    def is_mismatched(self) -> bool:
        """Whether the error is beyond ``MISMATCH``."""
        return self.rmse > MISMATCH


@dataclass(frozen=True)
class Preflight:
    """What each choice of isolated-atom energies would start from."""

    frames: int
    """With an energy, isolated atoms not counted."""
    choices: tuple[Choice, ...]
    missing: dict[str, str]
    """``{choice: why it is not among them}``."""
    recommendation: str
    """The name of a choice."""
    estimates: tuple[Estimate, ...]
    """Rank and null space of the fitted choices."""

    def __getitem__(self, name: str) -> Choice:
        """The choice of this name."""
        return next(choice for choice in self.choices if choice.name == name)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for each choice past ``MISMATCH``."""
        return tuple(
            f"{c.name}: energies start {MILLI * c.rmse:.0f} meV/atom off, more than "
            f"{MILLI * MISMATCH:.0f}; these E0s are of another level of theory, or the cohesive "
            "energies differ."
            for c in self.choices
            if c.is_mismatched
        )

    def to_dict(self) -> dict[str, Any]:
        """Energies in eV, errors in meV/atom; ready for JSON."""
        return {
            "units": {"e0s": "eV", "rmse": "meV/atom", "mae": "meV/atom", "worst": "meV/atom"},
            "frames": self.frames,
            "choices": {
                c.name: {
                    "e0s": {chemical_symbols[z]: value for z, value in c.e0s.items()},
                    "rmse": MILLI * c.rmse,
                    "mae": MILLI * c.mae,
                    "worst": MILLI * c.worst,
                    "worst_frame": c.worst_frame,
                }
                for c in self.choices
            },
            "missing": dict(self.missing),
            "recommendation": self.recommendation,
            "notes": [e0s.explain(found) for found in self.estimates],
            "warnings": list(self.warnings),
        }

    def render(self) -> Group:
        """For a terminal; rich prints it."""
        lines = [f"no {name}: {reason}" for name, reason in self.missing.items()]
        lines += [e0s.explain(found) for found in self.estimates]
        warnings = [Text(f"warning: {line}", style="yellow") for line in self.warnings]
        return Group(_errors(self), _values(self), *map(Text, lines), *warnings)


def preflight(
    model: Potential,
    params: Params,
    frames: Sequence[Frame],
    *,
    head: str | None = None,
    given: Mapping[int, float] | None = None,
) -> Preflight:
    """The error before training with each choice of isolated-atom energies that the data allow.

    Energies only: E0s change no force. The model is evaluated once, the rest is arithmetic.

    Recommended is the first of isolated atoms, given numbers, estimate and foundation that stays
    below ``MISMATCH``, or the most accurate of them if none does; the foundation's own come before
    an estimate that gains nothing. Averages are shown and never recommended.

    Args:
      model, params: what will be fine-tuned.
      frames: training data; isolated atoms among them give E0s and are not judged.
      head: of the model; not needed with one head.
      given: ``{atomic number: eV}``.

    Raises:
      ValueError: no frame has an energy; isolated atoms disagree; or ``given`` lacks an element of
        the data or holds a number that is not finite.

    Reference: Tompa et al., arXiv:2606.12704; 500 meV/atom is the symptom that MACE's guide names.
    """
    known = e0s.with_energy(data.without_isolated_atoms(frames))
    energies = e0s.energies_of(known)
    own = e0s.own_e0s(model, head)
    atoms = data.isolated_atom_energies(frames)
    if given is not None:
        _check_given(given, energies.elements)
    predicted = predict_energies(model, params, known, head=head)
    estimated, averaged = e0s.correct(energies, predicted, own), e0s.average(known)
    lacking = [chemical_symbols[z] for z in energies.elements if z not in atoms]
    offered: dict[str, Mapping[int, float] | None] = {
        "foundation": own,
        "isolated_atoms": None if lacking else atoms,
        "given": given,
        "estimated": estimated.e0s,
        "average": averaged.e0s,
    }
    choices = tuple(
        _choice(name, table, energies, predicted, own, known)
        for name, table in offered.items()
        if table is not None
    )
    missing = {"isolated_atoms": _why_not(lacking, bool(atoms))} if lacking else {}
    return Preflight(len(known), choices, missing, _best(choices), (estimated, averaged))


def _choice(
    name: str,
    table: Mapping[int, float],
    energies: Energies,
    predicted: np.ndarray,
    own: Mapping[int, float],
    frames: Sequence[Frame],
) -> Choice:
    change = np.array([table[z] - own[z] for z in energies.elements])
    error = np.abs(predicted + energies.counts @ change - energies.total) / energies.atoms
    at = int(error.argmax())
    return Choice(
        name,
        {z: float(table[z]) for z in energies.elements},
        rmse=float(np.sqrt(e0s.mean(error**2, energies))),
        mae=e0s.mean(error, energies),
        worst=float(error[at]),
        worst_frame=frames[at].source,
    )


def _best(choices: Sequence[Choice]) -> str:
    table = {choice.name: choice for choice in choices}
    ranked = [table[name] for name in PREFERENCE if name in table]
    sound = [choice for choice in ranked if not choice.is_mismatched]
    best = sound[0] if sound else min(ranked, key=lambda choice: choice.rmse)
    gains_nothing = table["estimated"].rmse > GAIN * table["foundation"].rmse
    return "foundation" if best.name == "estimated" and gains_nothing else best.name


def _why_not(lacking: Sequence[str], has_any: bool) -> str:
    if not has_any:
        return f"no frame is marked config_type={data.ISOLATED_ATOM}"
    return f"{', '.join(lacking)} not among the frames marked config_type={data.ISOLATED_ATOM}"


def _check_given(given: Mapping[int, float], elements: Sequence[int]) -> None:
    lacking = [chemical_symbols[z] for z in elements if z not in given]
    wrong = [chemical_symbols[z] for z, value in given.items() if not np.isfinite(value)]
    if lacking or wrong:
        raise ValueError(
            f"the given E0s hold no finite number for {', '.join(lacking or wrong)}; expected one "
            "in eV for every element of the data: add them."
        )


def _errors(found: Preflight) -> Table:
    title = f"error of {found.frames} energies before training, by isolated-atom energies"
    table = Table(title=title, title_justify="left")
    table.add_column("E0s")
    for heading in ("RMSE meV/atom", "MAE meV/atom", "max meV/atom"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for choice in found.choices:
        cells = [f"{MILLI * error:.1f}" for error in (choice.rmse, choice.mae, choice.worst)]
        is_best = choice.name == found.recommendation
        note = "recommended" if is_best else "never recommended" if choice.name == "average" else ""
        table.add_row(choice.name, *cells, note, style="yellow" if choice.is_mismatched else None)
    return table


def _values(found: Preflight) -> Table:
    table = Table(title="isolated-atom energies, eV", title_justify="left")
    table.add_column("element")
    for choice in found.choices:
        table.add_column(choice.name, justify="right")
    unsure = {z for fit in found.estimates for group in fit.undetermined for z in group.elements}
    for z in found.choices[0].e0s:
        fitted = {"estimated", "average"} if z in unsure else set()
        cells = [f"{c.e0s[z]:.4f}{' ?' if c.name in fitted else ''}" for c in found.choices]
        table.add_row(chemical_symbols[z], *cells)
    if unsure:
        table.caption = "? only sums of these are determined"
    return table
