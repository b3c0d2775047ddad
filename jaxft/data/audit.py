"""A label audit: what a set holds, what looks wrong with it, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from rich.console import Group as Page
from rich.table import Table
from rich.text import Text

from jaxft.data.audit_energies import Fit, check_atoms, check_energies
from jaxft.data.audit_labels import check_labels
from jaxft.data.audit_structures import check_structures
from jaxft.data.audit_trends import Trend, trends
from jaxft.data.finding import Finding
from jaxft.data.frames import ISOLATED_ATOM, Frame, coverage, has_label
from jaxft.typing import Domain

SEVERITIES = {"error": "bold red", "warning": "yellow", "note": "dim"}
"""In the order of the page, with their colours."""

LABELS = ("energy", "forces", "stress")


@dataclass(frozen=True)
class Kind:
    """The frames of one ``config_type``: how many, and how many carry each label."""

    config_type: str
    frames: int
    atoms: int
    energy: int
    forces: int
    stress: int


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found."""

    kinds: tuple[Kind, ...]
    elements: dict[str, int]
    """``{symbol: atoms}``."""
    energy: dict[str, float]
    """eV/atom: ``min``, ``median``, ``max``, and ``spread``, robust, around a fit of E0s."""
    forces: dict[str, float]
    """eV/Å: ``rms`` of the components and ``max`` of the norms."""
    rank: int
    """How many independent sums of E0s the compositions determine."""
    undetermined: tuple[str, ...]
    """Elements whose E0 they leave open."""
    trends: tuple[Trend, ...]
    """Whether energies follow forces and stress; empty where no frames are near one another."""
    findings: tuple[Finding, ...]
    """Errors first."""

    @property
    def is_ok(self) -> bool:
        """No finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts, for JSON."""
        return {
            "is_ok": self.is_ok,
            "kinds": [asdict(kind) for kind in self.kinds],
            "elements": dict(self.elements),
            "energy": dict(self.energy),
            "forces": dict(self.forces),
            "rank": self.rank,
            "undetermined": list(self.undetermined),
            "trends": [trend._asdict() for trend in self.trends],
            "findings": [asdict(f) | {"sources": list(f.sources)} for f in self.findings],
        }

    def render(self) -> Page:
        """For a :class:`rich.console.Console`."""
        return Page(_kinds(self.kinds), Text(_summary(self)), *map(_paragraph, self.findings))


def audit(
    frames: Sequence[Frame],
    *,
    model: Domain | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Audit:
    """Look for what commonly goes wrong in labels and structures.

    Nothing is changed and no model is evaluated. What rests on statistics says "Suspicion": wrong
    signs and units are found where energies do not follow the work of forces and stress along pairs
    of near frames (relaxations, displaced or strained cells, trajectories), or from sizes.

    Args:
      frames: all of a set, several files together: copies are looked for across them.
      model: whose elements the frames must be of.
      progress: called with (frames done, total).

    Raises:
      ValueError: there are no frames.

    Example:
      >>> from jaxft import data
      >>> symbols, free = np.array([8, 1, 1]), (False, False, False)
      >>> water = data.Frame(symbols, np.eye(3), np.zeros((3, 3)), free, energy=0.0)
      >>> [(found.name, found.severity) for found in data.audit([water]).findings]
      [('zero-energy', 'error'), ('undetermined-e0s', 'note')]
    """
    if not frames:
        raise ValueError("no frames to audit were given; expected one at least. Name other files.")
    fit, about_energies = check_energies(frames)
    seen, about_trends = trends(frames)
    undetermined = tuple(chemical_symbols[z] for z in fit.undetermined) if fit else ()
    findings = [
        *check_structures(frames, model, progress),
        *check_labels(frames),
        *about_energies,
        *check_atoms(frames),
        *about_trends,
        *_open(fit, undetermined, frames),
    ]
    per_atom = [f.energy / len(f) for f in _real(frames) if f.energy is not None]
    forces = [f.forces for f in _real(frames) if f.forces is not None]
    return Audit(
        kinds=_by_kind(frames),
        elements=coverage(frames).elements,
        energy=_energy(per_atom, fit),
        forces=_sizes(np.concatenate(forces)) if forces else {},
        rank=fit.rank if fit else 0,
        undetermined=undetermined,
        trends=tuple(seen),
        findings=tuple(sorted(findings, key=lambda f: list(SEVERITIES).index(f.severity))),
    )


def _real(frames: Sequence[Frame]) -> list[Frame]:
    return [frame for frame in frames if frame.config_type != ISOLATED_ATOM]


def _by_kind(frames: Sequence[Frame]) -> tuple[Kind, ...]:
    groups: dict[str, list[Frame]] = {}
    for frame in frames:
        groups.setdefault(frame.config_type, []).append(frame)
    return tuple(
        Kind(
            name,
            len(members),
            sum(map(len, members)),
            *(
                sum(has_label(f, label) for f in members)
                for label in ("energy", "forces", "stress")
            ),
        )
        for name, members in groups.items()
    )


def _energy(per_atom: Sequence[float], fit: Fit | None) -> dict[str, float]:
    if fit is None:
        return {}
    low, median, high = (float(q) for q in np.quantile(per_atom, (0, 0.5, 1)))
    return {"min": low, "median": median, "max": high, "spread": fit.spread}


def _sizes(forces: np.ndarray) -> dict[str, float]:
    return {
        "rms": float(np.sqrt(np.mean(forces**2))),
        "max": float(np.linalg.norm(forces, axis=1).max()),
    }


def _open(fit: Fit | None, undetermined: Sequence[str], frames: Sequence[Frame]) -> list[Finding]:
    """Elements whose E0 nothing in the set determines, neither compositions nor isolated atoms."""
    atoms = {
        chemical_symbols[int(f.atomic_numbers[0])]
        for f in frames
        if f.config_type == ISOLATED_ATOM and len(f) == 1
    }
    left = [symbol for symbol in undetermined if symbol not in atoms]
    if fit is None or not left:
        return []
    text = (
        f"Compositions determine {fit.rank} of {len(fit.elements)} E0s: those of {' '.join(left)} "
        "in sums only."
    )
    advice = "Add isolated atoms or other compositions, or keep or estimate the model's E0s."
    return [Finding("undetermined-e0s", "note", len(frames), (), text, advice)]


def _kinds(kinds: Sequence[Kind]) -> Table:
    table = Table("config_type", box=None, pad_edge=False)
    for heading in ("frames", "atoms", "energy", "forces", "stress"):
        table.add_column(heading, justify="right")
    for kind in kinds:
        labels = (kind.energy, kind.forces, kind.stress)
        table.add_row(
            kind.config_type,
            str(kind.frames),
            str(kind.atoms),
            *("–" if not n else "all" if n == kind.frames else str(n) for n in labels),
        )
    return table


def _summary(found: Audit) -> str:
    lines = ["", "elements  " + "  ".join(f"{s} {n}" for s, n in found.elements.items())]
    if found.energy:
        span = "{min:.6g} … {median:.6g} … {max:.6g}".format(**found.energy)
        spread = found.energy["spread"] * 1e3
        lines.append(f"energy    {span} eV/atom; ±{spread:.3g} meV/atom around a fit of E0s")
    if found.forces:
        lines.append("forces    rms {rms:.3g}, largest {max:.3g} eV/Å".format(**found.forces))
    lines += [
        f"{trend.label:9} {trend.slope:.3g} times its work is what energies differ by "
        f"({trend.pairs} pairs of near frames, {trend.agreement:.0%} agree; 1 is right)"
        for trend in found.trends
    ]
    if not found.findings:
        lines.append("\nnothing found")
    return "\n".join(lines)


def _paragraph(finding: Finding) -> Text:
    text = Text("\n")
    text.append(f"{finding.severity} {finding.name}", style=SEVERITIES[finding.severity])
    text.append(f" ({finding.count})\n  {finding.text}\n  {finding.advice}")
    more = ["…"] if finding.sources and finding.count > len(finding.sources) else []
    for line in (*finding.sources, *more):
        text.append(f"\n  {line}", style="dim")
    return text
