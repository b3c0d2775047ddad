"""Holes in the potential energy surface, looked for from random structures.

Random crystals are relaxed under pressure, rattled and relaxed again. A structure fell into a hole
if any of four flags is up, see :data:`FLAGS`. It tests the repulsive wall and nothing else.

Protocol: Tompa et al. (2026), appendix A.5, arXiv:2606.12704. Their amplitude of rattling and their
limits of steps are not known to us; ours are settings of the finding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import ase
import numpy as np
from ase.units import GPa

from jaxft.evaluate.candidate import Candidate, check_names
from jaxft.evaluate.finding import Finding, Line, Picture, Row, Value
from jaxft.evaluate.relaxation import Relaxed, closeness, collapse, relax, volume_per_atom

PRESSURES = (0.1, 50.0)
"""GPa."""
CLOSE = 0.5
"""(i) of the sum of covalent radii."""
DENSE = 0.3
"""(ii) of the composition's median volume."""
MADS, AT_LEAST = 10.0, 5.0
"""(iii) median absolute deviations below the median energy, but at least so many eV/atom."""
SMALL = 0.5
"""(iv) of the median volume, together with an energy below the median."""

FLAGS = ("too_close", "too_dense", "too_deep", "dense_and_low")
UNITS = {
    "structures": "",
    "holes": "",
    "holes_percent": "%",
    "more_than_base": "% points",
    **dict.fromkeys(FLAGS, ""),
    "failed": "",
    "unconverged": "",
    "steps": "",
}
ALL = "all"
NOTES = (
    "a hole is a structure with any of: too close (distance < 0.5 of the sum of covalent radii), "
    "too dense (volume < 30 % of the composition's median), too deep (energy below the median by "
    "10 MAD and 5 eV/atom), dense and low (volume < 50 % and energy below the median), or failed "
    "(energy or forces not finite). more than base: than the first model.",
)


@dataclass(frozen=True, eq=False)
class Ends:
    """Where the structures of one composition ended, at one pressure."""

    found: Sequence[Relaxed]

    def numbers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Å³/atom, eV/atom and closeness; NaN of the failed."""
        rows = [
            (np.nan,) * 3
            if (total := r.energy) is None
            else (volume_per_atom(r.atoms), total / len(r.atoms), closeness(r.atoms))
            for r in self.found
        ]
        volume, energy, close = np.array(rows, np.float64).reshape(-1, 3).T
        return volume, energy, close

    def flags(self) -> dict[str, np.ndarray]:
        """By name, which structures have it; ``failed`` too."""
        volume, energy, close = self.numbers()
        is_known = np.isfinite(energy)
        if not is_known.any():
            never = np.zeros(len(energy), bool)
            return {**dict.fromkeys(FLAGS, never), "failed": ~is_known}
        middle, usual = np.median(energy[is_known]), np.median(volume[is_known])
        spread = np.median(abs(energy[is_known] - middle))
        with np.errstate(invalid="ignore"):  # comparisons with NaN are False
            return {
                "too_close": close < CLOSE,
                "too_dense": volume < DENSE * usual,
                "too_deep": energy < middle - max(MADS * spread, AT_LEAST),
                "dense_and_low": (volume < SMALL * usual) & (energy < middle),
                "failed": ~is_known,
            }


def check(
    candidates: Sequence[Candidate],
    structures: Mapping[str, Sequence[ase.Atoms]],
    *,
    pressures: Sequence[float] = PRESSURES,
    rounds: int = 3,
    rattle: float = 0.1,
    fmax: float = 0.05,
    steps: int = 200,
    seed: int = 0,
) -> Finding:
    """Relax, and between relaxations rattle, everything with every model; count the holes.

    Args:
      candidates: who is judged; the first is the base that the others are compared with.
      structures: by composition, at least three each, so that there is a median.
      pressures: GPa.
      rounds: relaxations, one after the other.
      rattle: Å, standard deviation of every coordinate's displacement between them.
      fmax: eV/Å.
      steps: of a relaxation, at most.
      seed: of the rattling, which is the same for all models.

    Raises:
      ValueError: names occur twice, or a composition has too few structures.
    """
    check_names(candidates)
    few = [name for name, some in structures.items() if len(some) < 3]
    if few or not structures or rounds < 1:
        raise ValueError(
            f"{', '.join(few) or 'nothing'}: a median needs three structures and one round; give "
            "more."
        )
    rows: list[Row] = []
    lines: dict[str, list[Line]] = {}
    base: dict[str, float] = {}
    for candidate in candidates:
        for pressure in pressures:
            ends = _search(candidate, structures, pressure, rounds, rattle, fmax, steps, seed)
            some = _rows(candidate.name, ends, pressure)
            rows += [_against(row, base) for row in some]
            for name, end in ends.items():
                volume, energy, _ = end.numbers()
                title = _subject(name, pressure)
                lines.setdefault(title, []).append(
                    Line(candidate.name, volume, energy, is_scatter=True)
                )
    pictures = tuple(
        Picture(title, "volume, Å³/atom", "energy, eV/atom", tuple(found))
        for title, found in lines.items()
    )
    settings = {
        "pressures_gpa": list(pressures),
        "rounds": rounds,
        "rattle": rattle,
        "fmax": fmax,
        "steps": steps,
        "seed": seed,
        "base": candidates[0].name,
    }
    return Finding("rss", tuple(rows), UNITS, settings, pictures, NOTES)


def _search(
    candidate: Candidate,
    structures: Mapping[str, Sequence[ase.Atoms]],
    pressure: float,
    rounds: int,
    rattle: float,
    fmax: float,
    steps: int,
    seed: int,
) -> dict[str, Ends]:
    starts = [atoms for some in structures.values() for atoms in some]
    found: dict[int, Relaxed] = {}
    taken = [0] * len(starts)
    todo = {i: atoms.copy() for i, atoms in enumerate(starts)}
    rng = np.random.default_rng(seed)
    shifts = [
        [rng.normal(scale=rattle, size=atoms.positions.shape) for atoms in starts]
        for _ in range(rounds - 1)
    ]
    for k in range(rounds):
        if k:
            for i, atoms in todo.items():
                atoms.positions += shifts[k - 1][i]
        relaxed = relax(
            candidate,
            list(todo.values()),
            fmax=fmax,
            steps=steps,
            pressure=pressure * GPa,
            stop=collapse,
        )
        for i, result in zip(todo, relaxed, strict=True):
            taken[i] += result.steps
            found[i] = Relaxed(result.atoms, taken[i], result.fmax, result.flag)
        # what failed or collapsed stays where it is
        todo = {
            i: result.atoms.copy()
            for i, result in zip(todo, relaxed, strict=True)
            if result.energy is not None and collapse(result.atoms) is None
        }
    every = iter(range(len(starts)))
    return {
        name: Ends([found[i] for i in islice(every, len(some))])
        for name, some in structures.items()
    }


def _rows(model: str, ends: Mapping[str, Ends], pressure: float) -> list[Row]:
    counted = {name: _counts(end) for name, end in ends.items()}
    rows = [
        Row(model, _subject(name, pressure), _percent(counts), _first(ends[name]))
        for name, counts in counted.items()
    ]
    if len(rows) > 1:
        sums = {key: sum(c[key] for c in counted.values()) for key in next(iter(counted.values()))}
        rows.append(Row(model, _subject(ALL, pressure), _percent(sums)))
    return rows


def _counts(end: Ends) -> dict[str, int]:
    flags = end.flags()
    return {
        "structures": len(end.found),
        "holes": int(np.any(list(flags.values()), axis=0).sum()),
        **{name: int(up.sum()) for name, up in flags.items()},
        "unconverged": sum(r.flag is not None and r.energy is not None for r in end.found),
        "steps": sum(r.steps for r in end.found),
    }


def _percent(counts: Mapping[str, int]) -> dict[str, Value]:
    total = counts["structures"]
    percent = 100 * counts["holes"] / total
    return {**counts, "holes_percent": percent, "steps": counts["steps"] / total}


def _first(end: Ends) -> str | None:
    """The first hole, in words."""
    for name, up in end.flags().items():
        if up.any():
            place = int(np.argmax(up))
            reason = end.found[place].flag if name == "failed" else name.replace("_", " ")
            return f"holes, first structure {place}: {reason}"
    return None


def _subject(name: str, pressure: float) -> str:
    return f"{name}, {pressure:g} GPa"


def _against(row: Row, base: dict[str, float]) -> Row:
    """With the difference from the first model, which fills ``base``."""
    percent = row.values["holes_percent"]
    assert isinstance(percent, float)
    if row.subject not in base:
        base[row.subject] = percent
        return row
    values = {**row.values, "more_than_base": percent - base[row.subject]}
    return Row(row.model, row.subject, values, row.flag)
