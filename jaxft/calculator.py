"""The ASE calculator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import ase
import jax
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes

from jaxft.bundle import load
from jaxft.data import Frame, from_atoms, prepare
from jaxft.evaluate.predictions import Predictor, ase_results, cast, working_dtype
from jaxft.potential import Potential
from jaxft.typing import Params

ROW_WIDTH = 16
"""Slots per edge row, the same for every structure, so that it adds no static shapes."""


class JaxftCalculator(Calculator):
    """Energies (eV), forces (eV/Å) and stresses (eV/Å³, ASE sign and Voigt order) for ASE.

    Energies include the isolated-atom energies, added in float64; ``free_energy`` equals
    ``energy``. Stress exists for structures that are periodic in three directions.

    Args:
      model_or_path: a bundle's folder, or a potential.
      params: the potential's parameters; only together with a potential.
      dtype: of the computation. float32 suits molecular dynamics, float64 relaxations and phonons.
        By default that of the stored parameters, and float32 where JAX has float64 switched off.
      head: name of the model's head; not needed with one head.

    Raises:
      ValueError: an unknown head, a path with or a potential without ``params``, or float64 while
        JAX has it switched off. On calculation: an element that the model does not know, or an
        impossible geometry; nothing is compiled then.

    Example::

      atoms.calc = JaxftCalculator("water.jaxft")
      atoms.get_potential_energy()
    """

    name = "jaxft"
    implemented_properties: ClassVar[list[str]] = [
        "energy",
        "free_energy",
        "energies",
        "forces",
        "stress",
    ]
    ignored_changes: ClassVar[set[str]] = {"initial_charges", "initial_magmoms"}

    def __init__(
        self,
        model_or_path: Potential | str | Path,
        params: Params | None = None,
        *,
        dtype: str | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__()
        model, params = _loaded(model_or_path, params, dtype)
        _check_head(model.config.heads, head)
        self._predictor = Predictor(model, dtype=working_dtype(params, dtype))
        self._params = cast(params, self._predictor.dtype)

    @property
    def model(self) -> Potential:
        return self._predictor.model

    @property
    def dtype(self) -> str:
        """Of the computation; results are float64 always."""
        return self._predictor.dtype

    @property
    def compilations(self) -> int:
        """Static shapes used so far; the model is compiled once for each.

        Shapes have room to spare and are reused, so this stays put while atoms move and grows with
        the logarithm of the size when atoms are added. Calculators of one potential share them.
        """
        return self._predictor.compilations

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill ``results``; ASE calls this."""
        super().calculate(atoms, properties, system_changes)
        frame = _frame(self.atoms)
        if "stress" in properties and not frame.is_periodic:
            raise PropertyNotImplementedError(
                f"stress needs a structure that is periodic in three directions; "
                f"{frame.source} has pbc={frame.pbc}."
            )
        dataset = prepare([frame], self.model, row_width=ROW_WIDTH)
        (result,) = self._predictor(self._params, dataset, [0])
        self.results = ase_results(result)


def _loaded(
    source: Potential | str | Path, params: Params | None, dtype: str | None
) -> tuple[Potential, Params]:
    if isinstance(source, Potential):
        if params is None:
            raise ValueError(
                "JaxftCalculator was given a potential without parameters;\n"
                "use JaxftCalculator(model, params), or the path of a bundle."
            )
        return source, params
    if params is not None:
        raise ValueError(
            f"JaxftCalculator was given the path {str(source)!r} and parameters; a bundle has its "
            "own.\nUse JaxftCalculator(path), or JaxftCalculator(model, params)."
        )
    if dtype is None and not jax.config.read("jax_enable_x64"):
        dtype = "float32"
    return load(source, dtype=dtype)


def _check_head(heads: Sequence[str], head: str | None) -> None:
    if len(heads) == 1 and head in (None, heads[0]):
        return
    asked = "no head was named" if head is None else f"head {head!r} was asked for"
    if len(heads) == 1:
        raise ValueError(f"{asked}, but the model's only head is {heads[0]!r}; leave head away.")
    raise ValueError(
        f"{asked}, but the model has {len(heads)} heads: {', '.join(heads)};\n"
        "this version of jaxft predicts with models of one head."
    )


def _frame(atoms: ase.Atoms) -> Frame:
    """The structure alone: labels in ``info`` are nobody's business here."""
    if not len(atoms):
        raise ValueError("the structure has no atoms; give at least one.")
    bare = ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    return from_atoms(bare, source=f"the structure {atoms.symbols}")
