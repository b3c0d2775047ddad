r"""Displacive transitions: does a model leave the high-symmetry phase, and for which phase?

A crystal is relaxed under its own symmetry, its imaginary modes are found, the energy is followed
along each, and what lies at the bottom of the deepest wells is relaxed with all freedom. The space
group before and after names the transition.

With a transition predicted where the group after differs from the one before, right where it is
the expected one: :math:`P = \mathrm{right}/\mathrm{predicted}`,
:math:`R = \mathrm{right}/\mathrm{expected}` and :math:`F_1 = 2PR/(P+R)`. So a transition to a wrong
phase lowers both.

Reference: the phase walk of Grandel, Benner and George, arXiv:2604.01017.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ase
import numpy as np
from ase.constraints import FixSymmetry

from jaxft.evaluate.candidate import Candidate, Flag, check_names
from jaxft.evaluate.finding import Finding, Line, Picture, Row, Value
from jaxft.evaluate.relaxation import Relaxed, relax
from jaxft.evaluate.softmodes import SoftMode, Spectrum, repeats, spectrum, walk
from jaxft.evaluate.spacegroups import SpaceGroup, named_group, space_group, unfit

ALL = "all structures"
"""The subject of precision and recall."""

UNITS = {
    "soft_modes": "",
    "lowest": "THz",
    "wave_vector": "",
    "depth": "meV/atom",
    "position": "Å",
    "gain": "meV/atom",
    "volume_change": "%",
    "before": "",
    "after": "",
    "expected": "",
    "is_right": "",
    "counted": "",
    "precision": "",
    "recall": "",
    "f1": "",
}

MILLI = 1e3
SHALLOW = 0.01
"""meV/atom; what lies less deep than this is no well but rounding."""
FINE = np.linspace(-1, 1, 21)
"""Places of the second walk, in steps of the first, around its minimum."""

NOTES = (
    "Frequencies are negative where imaginary. depth and position: the minimum of the energy along "
    "the best mode, and the largest displacement of one atom there. gain: what the relaxed phase "
    "lies lower than the relaxed parent.",
    "Precision is of predicted transitions, recall of expected ones; right is the expected space "
    "group. Two structures of one space group count as one phase.",
)


@dataclass(frozen=True)
class Protocol:
    """What is done with every structure.

    Args:
      min_length: Å between opposite faces of the supercell, whose wave vectors are looked at.
      most_atoms: of the supercell; what is larger is flagged and not computed.
      displacement: Å, of finite differences.
      threshold: THz; a mode is unstable below minus this.
      amplitudes: Å, of the first walk along a mode, in both directions.
      relaxed: how many of the deepest wells are relaxed.
      cell: relax cells too.
      fmax: eV/Å, where relaxations end.
      steps: of a relaxation, at most.
      symprec: Å, of space groups.
    """

    min_length: float = 8.0
    most_atoms: int = 1000
    displacement: float = 0.01
    threshold: float = 0.1
    amplitudes: Sequence[float] = tuple(0.05 * i for i in range(1, 13))
    relaxed: int = 3
    cell: bool = True
    fmax: float = 0.005
    steps: int = 500
    symprec: float = 0.02

    def __post_init__(self) -> None:
        positive = ("min_length", "displacement", "threshold", "fmax", "symprec")
        wrong = [name for name in positive if not getattr(self, name) > 0]
        a = np.asarray(self.amplitudes, np.float64)
        if len(a) < 2 or not (np.diff(a) > 0).all() or not a[0] > 0:
            wrong.append("amplitudes")
        if self.relaxed < 1 or self.steps < 1:
            wrong.append("relaxed or steps")
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: not possible; give positive numbers, and two or more "
                "amplitudes that rise."
            )

    @property
    def grid(self) -> np.ndarray:
        """Amplitudes in both directions, 0 among them."""
        a = np.asarray(self.amplitudes, np.float64)
        return np.concatenate([-a[::-1], [0.0], a])


@dataclass(eq=False)
class Walked:
    """What one model makes of one structure, as far as it came."""

    before: SpaceGroup | None = None
    after: SpaceGroup | None = None
    values: dict[str, Value] = field(default_factory=dict)
    line: tuple[np.ndarray, np.ndarray] | None = None
    """The best walk: Å, meV/atom."""
    flags: list[str] = field(default_factory=list)


def check(
    candidates: Sequence[Candidate],
    structures: Mapping[str, ase.Atoms],
    *,
    expected: Mapping[str, str | int | ase.Atoms] | None = None,
    against: str | None = None,
    protocol: Protocol | None = None,
) -> Finding:
    """Follow the imaginary modes of ``structures`` to the phases that they lead to.

    Args:
      candidates: the models.
      structures: high-symmetry phases by name, one cell each, periodic in three directions.
      expected: the phase that each ends in, as a space group (symbol or number) or a structure;
        that of the parent where it is stable.
      against: instead, the name of a candidate whose phases are the expected ones.
      protocol: see :class:`Protocol`.

    Returns:
      A row per model and structure, and one of precision, recall and F1 per model where anything
      is expected.

    Raises:
      ValueError: there are no candidates or structures, both ``expected`` and ``against`` are
        given, or either names what is not there.
      ImportError: phonopy is not installed.
    """
    check_names(candidates)
    protocol = protocol or Protocol()
    groups = _expected(candidates, structures, expected, against, protocol)
    found = {
        (c.name, name): walked(c, atoms, protocol)
        for c in candidates
        for name, atoms in structures.items()
    }
    if against is not None:
        ends = {name: found[against, name].after for name in structures}
        groups = {name: end for name, end in ends.items() if end is not None}
    rows: list[Row] = []
    for candidate in candidates:
        own = {name: found[candidate.name, name] for name in structures}
        rows += [_row(candidate.name, n, w, groups.get(n)) for n, w in own.items()]
        if groups and candidate.name != against:
            rows.append(Row(candidate.name, ALL, _scores(own, groups)))
    settings = {**vars(protocol), "shallow": SHALLOW, "against": against}
    pictures = tuple(p for name in structures if (p := _picture(name, candidates, found)))
    return Finding("phase", tuple(rows), UNITS, settings, pictures, NOTES)


def walked(candidate: Candidate, atoms: ase.Atoms, protocol: Protocol) -> Walked:
    """One model, one structure: parent, modes, walk, relaxation; it ends where something fails."""
    found = Walked()
    if not atoms.pbc.all():
        found.flags.append("modes of a crystal need three periodic directions")
        return found
    if reason := unfit(atoms, protocol.symprec):
        found.flags.append(reason)
        return found
    parent = _relaxed_parent(candidate, atoms, protocol)
    if parent.flag is not None:
        found.flags.append(f"the parent: {parent.flag}")
    found.before = space_group(parent.atoms, protocol.symprec)
    if parent.energy is None:
        return found
    repeat = repeats(parent.atoms, protocol.min_length)
    size = int(np.prod(repeat)) * len(parent.atoms)
    if size > protocol.most_atoms:
        found.flags.append(f"the supercell would hold {size} atoms; lower min_length")
        return found
    modes = spectrum(
        candidate,
        parent.atoms,
        repeat,
        displacement=protocol.displacement,
        threshold=protocol.threshold,
        symprec=protocol.symprec,
    )
    if isinstance(modes, Flag):
        found.flags.append(modes.reason)
        return found
    found.values |= {"soft_modes": len(modes.modes), "lowest": modes.lowest}
    found.after = found.before
    if modes.modes:
        _follow(candidate, parent, modes, protocol, found)
    return found


def _relaxed_parent(candidate: Candidate, atoms: ase.Atoms, protocol: Protocol) -> Relaxed:
    """Under its own symmetry, so that it is where the modes of that symmetry have no force."""
    start = atoms.copy()
    start.set_constraint(FixSymmetry(start, symprec=protocol.symprec))
    (found,) = _relax(candidate, [start], protocol)
    found.atoms.set_constraint()
    return found


def _follow(
    candidate: Candidate, parent: Relaxed, modes: Spectrum, protocol: Protocol, found: Walked
) -> None:
    """Walk along all directions, look closer at the best, relax the deepest."""
    mode_of = [mode for mode in modes.modes for _ in mode.directions]
    directions = np.concatenate([mode.directions for mode in modes.modes])
    grid = protocol.grid
    energies = walk(candidate, modes.supercell, directions, grid)
    if isinstance(energies, Flag):
        found.flags.append(f"along the modes: {energies.reason}")
        return
    finite = np.where(np.isnan(energies), np.inf, energies)
    depths = -MILLI * finite.min(axis=1)
    wells = [i for i in _distinct(depths) if depths[i] > SHALLOW][: protocol.relaxed]
    if not wells:
        found.values |= {"depth": 0.0}
        return
    best = wells[0]
    found.line = grid, MILLI * energies[best]
    found.values |= {"wave_vector": _shown(mode_of[best])}
    at = {i: grid[int(finite[i].argmin())] for i in wells}
    if abs(at[best]) == grid[-1]:
        found.flags.append(f"the well is deeper than the walk of {grid[-1]:g} Å is long")
    place, depth = _closer(candidate, modes.supercell, directions[best], at[best], grid)
    found.values |= {"depth": depth, "position": place}
    starts = []
    for i in wells:
        start = modes.supercell.copy()
        start.positions += at[i] * directions[i]
        starts.append(start)
    _finish(parent, _relax(candidate, starts, protocol), protocol, found)


def _relax(candidate: Candidate, starts: Sequence[ase.Atoms], protocol: Protocol) -> list[Relaxed]:
    return relax(
        candidate,
        starts,
        fmax=protocol.fmax,
        steps=protocol.steps,
        cell=protocol.cell,
        optimizer="LBFGS",
    )


def _distinct(depths: np.ndarray) -> list[int]:
    """Deepest first, one of those that are equally deep: symmetry makes them one."""
    kept: list[int] = []
    for i in np.argsort(-depths, kind="stable"):
        if not any(np.isclose(depths[i], depths[k], rtol=1e-4, atol=SHALLOW) for k in kept):
            kept.append(int(i))
    return kept


def _closer(
    candidate: Candidate, supercell: ase.Atoms, direction: np.ndarray, at: float, grid: np.ndarray
) -> tuple[float | None, float | None]:
    """(Å, meV/atom) of the minimum near ``at``, by a parabola through the lowest of a finer walk.

    The place is a distance and not negative: both ends of a mode are alike or named by chance.
    """
    step = float(np.diff(grid).max())
    places = at + step * FINE
    energies = walk(candidate, supercell, direction[None], places)
    if isinstance(energies, Flag) or np.isnan(energies).any():
        return None, None
    lowest = int(np.clip(energies[0].argmin(), 1, len(places) - 2))
    near = slice(lowest - 1, lowest + 2)
    a, b, c = np.polyfit(places[near] - places[lowest], energies[0][near], 2)
    if a <= 0:
        return abs(float(places[lowest])), float(-MILLI * energies[0][lowest])
    return abs(float(places[lowest] - b / (2 * a))), float(-MILLI * (c - b * b / (4 * a)))


def _finish(parent: Relaxed, ends: Sequence[Relaxed], protocol: Protocol, found: Walked) -> None:
    """The lowest of the relaxed wells is the phase."""
    known = [(end, end.energy / len(end.atoms)) for end in ends if end.energy is not None]
    assert parent.energy is not None
    if not known:
        found.flags.append(f"the well: {ends[0].flag}")
        found.after = None
        return
    end, energy = min(known, key=lambda pair: pair[1])
    if end.flag is not None:
        found.flags.append(f"the well: {end.flag}")
    found.after = space_group(end.atoms, protocol.symprec)
    volumes = [a.get_volume() / len(a) for a in (parent.atoms, end.atoms)]
    found.values |= {
        "gain": MILLI * (parent.energy / len(parent.atoms) - energy),
        "volume_change": 100 * (volumes[1] / volumes[0] - 1),
    }


def _expected(
    candidates: Sequence[Candidate],
    structures: Mapping[str, ase.Atoms],
    expected: Mapping[str, str | int | ase.Atoms] | None,
    against: str | None,
    protocol: Protocol,
) -> dict[str, SpaceGroup]:
    if not structures:
        raise ValueError("there is no structure to look at; give at least one.")
    if expected and against is not None:
        raise ValueError(
            "expected phases and a model to compare with were given; give one of them."
        )
    names = [candidate.name for candidate in candidates]
    if against is not None and against not in names:
        raise ValueError(f"the model {against!r} is none of {', '.join(map(repr, names))}.")
    unknown = sorted(set(expected or ()) - set(structures))
    if unknown:
        raise ValueError(
            f"phases of {', '.join(map(repr, unknown))} are expected, but the structures are "
            f"{', '.join(map(repr, structures))}; give each the name of its structure."
        )
    groups = {}
    for name, wanted in (expected or {}).items():
        if not isinstance(wanted, ase.Atoms):
            groups[name] = named_group(wanted)
        elif (group := space_group(wanted, protocol.symprec)) is not None:
            groups[name] = group
        else:
            raise ValueError(f"spglib finds no space group of the phase expected of {name!r}.")
    return groups


def _row(model: str, name: str, found: Walked, expected: SpaceGroup | None) -> Row:
    values = dict(found.values)
    for key, group in (("before", found.before), ("after", found.after), ("expected", expected)):
        if group is not None:
            values[key] = str(group)
    if expected is not None and found.after is not None:
        values["is_right"] = found.after == expected
    return Row(model, name, values, "; ".join(found.flags) or None)


def _scores(own: Mapping[str, Walked], expected: Mapping[str, SpaceGroup]) -> dict[str, Value]:
    counted = [
        (found.before, found.after, expected[name])
        for name, found in own.items()
        if name in expected and found.after is not None
    ]
    predicted = sum(after != before for before, after, _ in counted)
    wanted = sum(end != before for before, _, end in counted)
    right = sum(after == end != before for before, after, end in counted)
    return {
        "counted": len(counted),
        "precision": right / predicted if predicted else None,
        "recall": right / wanted if wanted else None,
        "f1": 2 * right / (predicted + wanted) if predicted + wanted else None,
    }


def _picture(
    name: str, candidates: Sequence[Candidate], found: Mapping[tuple[str, str], Walked]
) -> Picture | None:
    lines = tuple(
        Line(c.name, *line) for c in candidates if (line := found[c.name, name].line) is not None
    )
    if not lines:
        return None
    return Picture(
        f"{name}: along the best mode",
        "largest displacement of one atom, Å",
        "energy, meV/atom",
        lines,
    )


def _shown(mode: SoftMode) -> str:
    return " ".join(f"{component:.3g}" for component in mode.q)
