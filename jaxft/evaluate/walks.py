"""The walk itself: one model, one high-symmetry structure, and the phase that it ends in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import ase
import numpy as np
from ase.constraints import FixSymmetry

from jaxft.evaluate.candidate import Candidate, Flag
from jaxft.evaluate.finding import Value
from jaxft.evaluate.relaxation import Relaxed, relax
from jaxft.evaluate.softmodes import SoftMode, Spectrum, repeats, spectrum, walk
from jaxft.evaluate.spacegroups import SpaceGroup, space_group, unfit

MILLI = 1e3
SHALLOW = 0.01
"""meV/atom; what lies less deep than this is no well but rounding."""
FINE = np.linspace(-1, 1, 21)
"""Places of the second walk, in steps of the first, around its minimum."""


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
    amplitudes: Sequence[float] = tuple(i / 20 for i in range(1, 13))
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


def _shown(mode: SoftMode) -> str:
    return " ".join(f"{component:.3g}" for component in mode.q)
