"""Who is judged: a potential of ours in batches, or any ASE calculator, by the same code.

What cannot be computed is a :class:`Flag` in the place of its result, and the rest goes on: a model
that explodes on one structure is a finding about the model, not the end of a report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import ase
import numpy as np
from ase.calculators.calculator import Calculator
from ase.stress import voigt_6_to_full_3x3_stress

from jaxft.data import Frame, prepare, unlabelled
from jaxft.evaluate.predictions import FrameResult, Room, predict_frames, working_dtype
from jaxft.potential import Potential
from jaxft.typing import Params

ProgressFn = Callable[[int, int], None]
"""Told (structures done, structures in total)."""

NOT_FINITE = "energy, forces or stress are not finite"

LARGEST = 1e8
"""eV per atom, eV/Å, eV/Å³; beyond it a model explodes. Nuclei on top of each other stay below."""


@dataclass(frozen=True)
class Flag:
    """There is no result, and this is why."""

    reason: str


Outcome = FrameResult | Flag


class Candidate(Protocol):
    """A model under evaluation."""

    @property
    def name(self) -> str:
        """In tables and pictures; unique among those that are compared."""
        ...

    def evaluate(
        self, structures: Sequence[ase.Atoms], progress: ProgressFn | None = None
    ) -> list[Outcome]:
        """Energies, forces and stresses of ``structures`` in their order, or why there are none."""
        ...

    def ase_calculator(self) -> Calculator:
        """A calculator of this model, for what moves one structure step by step."""
        ...


@dataclass(frozen=True, eq=False)
class JaxCandidate:
    """A potential and its parameters; structures are evaluated in jitted batches.

    Args:
      name: in tables.
      model: the potential.
      params: its parameters, whose dtype is that of the computation unless ``dtype`` is given.
      head: of the model; not needed with one head.
      batch_size: largest structures per batch.
      dtype: as in :func:`jaxft.evaluate.predict_frames`.
      room: of structures that move, see :meth:`steady`.
    """

    name: str
    model: Potential
    params: Params = field(repr=False)
    head: str | None = None
    batch_size: int = 16
    dtype: str | None = None
    room: Room | None = None

    @property
    def working_dtype(self) -> str:
        """Of the computation."""
        return working_dtype(self.params, self.dtype)

    def evaluate(
        self, structures: Sequence[ase.Atoms], progress: ProgressFn | None = None
    ) -> list[Outcome]:
        """As :class:`Candidate` says; structures that cannot be are flagged before any compiles."""
        try:
            return [_checked(result) for result in self._predict(structures, progress)]
        except ValueError:  # of some structure, before anything was compiled
            flags = {i: flag for i, atoms in enumerate(structures) if (flag := self._flag(atoms))}
            if not flags:
                raise
        sound = [atoms for i, atoms in enumerate(structures) if i not in flags]
        found = iter(self._predict(sound, progress))
        return [flags[i] if i in flags else _checked(next(found)) for i in range(len(structures))]

    def ase_calculator(self) -> Calculator:
        """A new :class:`jaxft.calculator.JaxftCalculator`, with programs of its own shapes."""
        from jaxft.calculator import JaxftCalculator

        return JaxftCalculator(self.model, self.params, head=self.head, dtype=self.dtype)

    def _predict(
        self, structures: Sequence[ase.Atoms], progress: ProgressFn | None
    ) -> list[FrameResult]:
        return predict_frames(
            self.model,
            self.params,
            [_frame(atoms) for atoms in structures],
            head=self.head,
            batch_size=self.batch_size,
            dtype=self.dtype,
            progress=progress,
            room=self.room,
        )

    def steady(self) -> JaxCandidate:
        """The same for one set of structures as they move: it compiles few programs."""
        return replace(self, room=Room())

    def _flag(self, atoms: ase.Atoms) -> Flag | None:
        try:
            prepare([_frame(atoms)], self.model, head=self.head)
        except ValueError as error:
            return Flag(str(error).splitlines()[0])
        return None


@dataclass(frozen=True, eq=False)
class AseCandidate:
    """Any ASE calculator: mace-torch's, a peer's, an empirical potential; one call per structure.

    Its stress and per-atom energies are used where it has them; without the latter a structure's
    energy is spread evenly over its atoms.
    """

    name: str
    calculator: Calculator

    def evaluate(
        self, structures: Sequence[ase.Atoms], progress: ProgressFn | None = None
    ) -> list[Outcome]:
        """As :class:`Candidate` says; whatever error the calculator raises is that structure's."""
        found: list[Outcome] = []
        for atoms in structures:
            found.append(self._result(atoms))
            if progress is not None:
                progress(len(found), len(structures))
        return found

    def ase_calculator(self) -> Calculator:
        """The calculator itself."""
        return self.calculator

    def _result(self, atoms: ase.Atoms) -> Outcome:
        atoms = atoms.copy()
        atoms.set_constraint()  # fixed atoms of a file would change forces, and not those of ours
        atoms.calc = self.calculator
        try:
            return self._computed(atoms)
        except Exception as error:  # a stranger's code: its failure is what is to be reported
            words = str(error).splitlines()
            return Flag(": ".join([type(error).__name__, *words[:1]]))

    def _computed(self, atoms: ase.Atoms) -> Outcome:
        energy = float(atoms.get_potential_energy())
        forces = np.array(atoms.get_forces(), np.float64)
        if forces.shape != (len(atoms), 3):
            return Flag(f"forces of shape {forces.shape} for {len(atoms)} atoms")
        energies = np.full(len(atoms), energy / max(len(atoms), 1))
        with suppress(NotImplementedError, KeyError):
            energies = np.array(atoms.get_potential_energies(), np.float64)
        stress = None
        if atoms.pbc.all():
            with suppress(NotImplementedError, KeyError):
                stress = voigt_6_to_full_3x3_stress(atoms.get_stress())
        return _checked(FrameResult(energy, energies, forces, stress))


def _frame(atoms: ase.Atoms) -> Frame:
    return unlabelled(atoms, source=str(atoms.symbols))


def _checked(result: FrameResult) -> Outcome:
    numbers = (result.energy, result.forces, 0.0 if result.stress is None else result.stress)
    if not all(np.isfinite(n).all() for n in numbers):
        return Flag(NOT_FINITE)
    energy = result.energy / max(len(result.forces), 1)
    largest = max(float(np.abs(n).max(initial=0.0)) for n in (energy, *numbers[1:]))
    if largest > LARGEST:
        return Flag(f"the model explodes: energy per atom, forces or stress reach {largest:.0e}")
    return result


def check_names(candidates: Sequence[Candidate]) -> None:
    """Raises ValueError unless there are candidates, each with a name of its own."""
    names = [candidate.name for candidate in candidates]
    if not names:
        raise ValueError("there is no model to judge; give at least one.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"several models are called {', '.join(map(repr, twice))}; give each a name of its own "
            "(NAME=PATH on the command line)."
        )
