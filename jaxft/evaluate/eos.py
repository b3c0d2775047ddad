"""Energy against volume: V0, B0, B0', and the Δ-gauge against a reference.

Cells are scaled uniformly around the given structure; ions keep their fractional positions. All
volumes of all structures are one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ase
import numpy as np

from jaxft.evaluate.candidate import Candidate, Flag, check_names
from jaxft.evaluate.equation import Equation, delta, fit
from jaxft.evaluate.finding import Finding, Line, Picture, Row, Value
from jaxft.evaluate.relaxation import no_crystal, volume_per_atom

UNITS = {
    "v0": "Å³/atom",
    "b0": "GPa",
    "b0_prime": "",
    "fit_rms": "meV/atom",
    "v0_error": "%",
    "b0_error": "%",
    "delta": "meV/atom",
    "phase_energy": "meV/atom",
    "phase_error": "meV/atom",
}
REFERENCE = "reference"
DRAWN = 200
"""Points of an equation in a picture."""
MOST_MOVES = 4
"""How often the range follows a minimum that lies outside."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Energies (eV/atom) at volumes (Å³/atom)."""

    volumes: np.ndarray
    energies: np.ndarray


@dataclass(frozen=True)
class _Found:
    curve: Curve | None = None
    equation: Equation | None = None
    flag: str | None = None


def check(
    candidates: Sequence[Candidate],
    structures: Mapping[str, ase.Atoms],
    *,
    references: Mapping[str, Curve] | None = None,
    against: str | None = None,
    span: float = 0.06,
    points: int = 11,
) -> Finding:
    """Fit every structure's curve of every model, and compare.

    Args:
      candidates: who is judged.
      structures: by name, each near its equilibrium. The range of volumes is centred on it, and
        moves if the minimum lies outside.
      references: curves of some structures, by name.
      against: the name of a candidate that gives the reference of structures without a curve.
      span: relative half width of the range of volumes; also that of the Δ-gauge.
      points: volumes per structure.

    Raises:
      ValueError: a reference of no structure, of another cell, or that cannot be fitted; or
        settings that make no sense.
    """
    references = dict(references or {})
    _check(candidates, structures, references, against, span, points)
    fitted = {name: _reference(name, curve) for name, curve in references.items()}
    found = {c.name: _scan(c, structures, span, points) for c in candidates}
    if against is not None:
        for name, result in found[against].items():
            if name not in fitted and result.equation is not None:
                fitted[name] = result.equation
    firsts = _firsts(structures)
    above_first = _above(fitted, firsts)
    rows = [
        Row(REFERENCE, name, _values(fitted[name], None, span) | _phase(name, above_first, {}))
        for name in references
    ]
    for model, results in found.items():
        above = _above({n: r.equation for n, r in results.items() if r.equation}, firsts)
        for name, result in results.items():
            is_own = model == against and name not in references
            reference = None if is_own else fitted.get(name)
            values = _values(result.equation, reference, span) if result.equation else {}
            values |= _phase(name, above, {} if model == against else above_first)
            is_missing = (references or against) and not is_own and reference is None
            flag = result.flag or ("there is no reference" if is_missing else None)
            rows.append(Row(model, name, values, flag))
    pictures = tuple(_picture(name, found, references.get(name)) for name in structures)
    settings = {"span": span, "points": points, "ions": "clamped", "against": against}
    return Finding("eos", tuple(rows), UNITS, settings, pictures, NOTES)


NOTES = (
    "third-order Birch–Murnaghan; ions keep their fractional positions. delta: Lejaeghere's "
    "Δ-gauge, both curves 0 at their own minimum, over 1 ± span of the mean of both V0. phase "
    "energy: of the minimum, above that of the first structure of the same composition.",
)


def _check(
    candidates: Sequence[Candidate],
    structures: Mapping[str, ase.Atoms],
    references: Mapping[str, Curve],
    against: str | None,
    span: float,
    points: int,
) -> None:
    check_names(candidates)
    names = [candidate.name for candidate in candidates]
    if REFERENCE in names:
        raise ValueError(f"a model is called {REFERENCE!r}; give it another name (NAME=PATH).")
    if against is not None and against not in names:
        raise ValueError(f"{against!r} is none of the models {', '.join(names)}; name one.")
    if points < 5 or not 0 < span < 0.5:
        raise ValueError(f"points={points}, span={span}; use at least 5 and a span in (0, 0.5).")
    for name, curve in references.items():
        if name not in structures:
            raise ValueError(
                f"a reference is given for {name!r}, which is no structure; there are "
                f"{', '.join(structures)}."
            )
        if no_crystal(structures[name]):
            continue
        ratio = np.mean(curve.volumes) / (structures[name].get_volume() / len(structures[name]))
        if not 1 / 1.6 < ratio < 1.6:
            raise ValueError(
                f"the reference of {name} has {ratio:.3g} times the volume per atom of the "
                "structure; give volumes and energies per cell of this structure."
            )


def _reference(name: str, curve: Curve) -> Equation:
    try:
        return fit(curve.volumes, curve.energies)
    except ValueError as error:
        raise ValueError(f"the reference of {name} cannot be fitted: {error}") from error


def _scan(
    candidate: Candidate, structures: Mapping[str, ase.Atoms], span: float, points: int
) -> dict[str, _Found]:
    """Every structure's curve; ranges without their minimum move, all in one batch per move."""
    found = {
        name: _Found(flag=reason) for name, a in structures.items() if (reason := no_crystal(a))
    }
    todo = [name for name in structures if name not in found]
    centres = {name: volume_per_atom(structures[name]) for name in todo}
    for move in range(MOST_MOVES + 1):
        grid = {n: centres[n] * np.linspace(1 - span, 1 + span, points) for n in todo}
        scaled = [scaled_to(structures[n], v) for n in todo for v in grid[n]]
        outcomes = iter(candidate.evaluate(scaled))
        again = []
        for name in todo:
            some = [next(outcomes) for _ in range(points)]
            reason = next((o.reason for o in some if isinstance(o, Flag)), None)
            if reason is not None:
                found[name] = _Found(flag=reason)
                continue
            energies = [o.energy / len(structures[name]) for o in some if not isinstance(o, Flag)]
            found[name], centre = _fitted(Curve(grid[name], np.array(energies)), move)
            if centre is not None:
                centres[name] = centre
                again.append(name)
        todo = again
        if not todo:
            break
    return {name: found[name] for name in structures}


def _fitted(curve: Curve, move: int) -> tuple[_Found, float | None]:
    """The result, and around which volume to look again if the minimum is not within."""
    lowest = int(np.argmin(curve.energies))
    low, high = curve.volumes[[0, -1]]
    is_inside = 0 < lowest < len(curve.volumes) - 1
    if is_inside:
        try:
            equation = fit(curve.volumes, curve.energies)
        except ValueError as error:
            return _Found(curve, flag=str(error)), None
        if low < equation.v0 < high:
            return _Found(curve, equation), None
    if move < MOST_MOVES:
        return _Found(curve), float(curve.volumes[lowest])
    return _Found(
        curve, flag=f"no minimum of the energy near {low:.4g} to {high:.4g} Å³/atom"
    ), None


def scaled_to(atoms: ase.Atoms, volume: float) -> ase.Atoms:
    """A copy with ``volume`` Å³/atom and the same fractional positions."""
    copy = atoms.copy()
    factor = (volume * len(atoms) / atoms.get_volume()) ** (1 / 3)
    copy.set_cell(atoms.cell.array * factor, scale_atoms=True)
    return copy


def _values(equation: Equation, reference: Equation | None, span: float) -> dict[str, Value]:
    values: dict[str, Value] = {
        "v0": equation.v0,
        "b0": equation.bulk_modulus,
        "b0_prime": equation.b1,
        "fit_rms": 1e3 * equation.rms,
    }
    if reference is not None:
        values |= {
            "v0_error": 100 * (equation.v0 / reference.v0 - 1),
            "b0_error": 100 * (equation.b0 / reference.b0 - 1),
            "delta": 1e3 * delta(equation, reference, span=span),
        }
    return values


def _firsts(structures: Mapping[str, ase.Atoms]) -> dict[str, str]:
    """Of each structure but the first of a composition, that first one."""
    named: dict[str, str] = {}
    found = {
        name: named.setdefault(str(atoms.symbols.formula.reduce()[0].convert("hill")), name)
        for name, atoms in structures.items()
    }
    return {name: first for name, first in found.items() if name != first}


def _above(equations: Mapping[str, Equation], firsts: Mapping[str, str]) -> dict[str, float]:
    """meV/atom, of minima above those of the first phases, where both are known."""
    return {
        name: 1e3 * (equations[name].e0 - equations[first].e0)
        for name, first in firsts.items()
        if name in equations and first in equations
    }


def _phase(
    name: str, found: Mapping[str, float], reference: Mapping[str, float]
) -> dict[str, Value]:
    values: dict[str, Value] = {"phase_energy": found[name]} if name in found else {}
    if name in found and name in reference:
        values["phase_error"] = found[name] - reference[name]
    return values


def _picture(
    name: str, found: Mapping[str, Mapping[str, _Found]], reference: Curve | None
) -> Picture:
    lines = []
    if reference is not None:
        energies = 1e3 * (reference.energies - reference.energies.min())
        lines.append(Line(REFERENCE, reference.volumes, energies, is_reference=True))
    for model, results in found.items():
        curve = results[name].curve
        if curve is None:
            continue
        equation, points = results[name].equation, curve.volumes
        lowest = equation.e0 if equation else curve.energies.min()
        lines.append(Line(model, points, 1e3 * (curve.energies - lowest), is_scatter=True))
        if equation is not None:
            dense = np.linspace(points[0], points[-1], DRAWN)
            lines.append(Line(model, dense, 1e3 * equation.energy(dense)))
    return Picture(name, "volume, Å³/atom", "energy above the minimum, meV/atom", tuple(lines))


def read_curve(path: str | Path, atoms: int) -> Curve:
    """Two columns, volume (Å³) and energy (eV) of a cell of so many atoms, as phonopy's e-v.dat.

    Raises:
      ValueError: the file cannot be read, or has other columns.
    """
    try:
        table = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if table.shape[1] != 2:
        raise ValueError(f"{path} has {table.shape[1]} columns; give volume (Å³) and energy (eV).")
    return Curve(table[:, 0] / atoms, table[:, 1] / atoms)
