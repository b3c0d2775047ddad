"""The ASE calculator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ase
import jax
import numpy as np
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes

from jaxft.bundle import load
from jaxft.data import Dataset, Shape, atom_features_of, features_of, prepare, unlabelled
from jaxft.evaluate.predictions import ase_results, cast, predict_batch, working_dtype
from jaxft.graph import edges_per_block, fullest, num_blocks
from jaxft.potential import Potential
from jaxft.typing import Params

ROW_WIDTH = 16
"""Slots per edge row, the same for every structure, so that it adds no static shapes."""

FIRST_HEADROOM = 1.1
"""Free room in the first static shape, so that vibrating atoms stay inside it."""

GROWTH = 1.25
"""Free room in every later shape: sizes that creep up compile logarithmically often."""

BLOCK_HEADROOM = 1.05
"""Free rows in blocks, whose numbers of rows fluctuate less, being sums over hundreds of atoms."""

WASTE = 2
"""A shape is reused for structures down to this fraction of its size."""

SMALL_NODES, SMALL_ROWS = 32, 64
"""Every shape but the first has this size at least, and is reused for anything smaller."""


class _Static(NamedTuple):
    """What the compiled program depends on; the row width is fixed and there is one graph."""

    n_row: int
    n_node: int
    n_element: int
    blocks: int = 1


class JaxftCalculator(Calculator):
    """Energies (eV), forces (eV/Å) and stresses (eV/Å³, ASE sign and Voigt order) for ASE.

    Energies include the isolated-atom energies, added in float64; ``free_energy`` equals
    ``energy``. Stress exists for structures that are periodic in three directions. Models with a
    moment head give ``magmoms`` (µB, [n] or [n, 3]) and their sum ``magmom``, which for magnitudes
    is that of the ferromagnetic order; ``initial_magmoms`` are not looked at.

    Args:
      model_or_path: a bundle's folder, or a potential.
      params: the potential's parameters; only together with a potential.
      dtype: of the computation. float32 suits molecular dynamics, float64 relaxations and phonons.
        By default that of the stored parameters, and float32 where JAX has float64 switched off.
      head: name of the model's head; not needed with one head.
      max_edges_per_block: a structure with more edge slots (edges, and free slots in their rows of
        16) is evaluated in blocks of about so many, one after the other. The memory then is that
        of one block, and of a few arrays of atoms and channels; results differ by rounding only.
        By default what suits the platform: 16,384 on CPUs.
      backend: ``auto``, ``xla`` or ``cueq``; by default that of a given potential, or ``auto``.

    Raises:
      ValueError: blocks of less than one edge, an unknown head, a path with or a potential without
        ``params``, a backend that cannot be used here, or float64 while JAX has it switched off. On
        calculation: an element that the model does not know, or an impossible geometry; nothing is
        compiled then.

    Example::

      atoms.calc = JaxftCalculator("water.jaxft")
      atoms.get_potential_energy()
    """

    name = "jaxft"
    # ASE's own annotations make these instance variables.
    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(
        self,
        model_or_path: Potential | str | Path,
        params: Params | None = None,
        *,
        dtype: str | None = None,
        head: str | None = None,
        max_edges_per_block: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.max_edges_per_block = edges_per_block(max_edges_per_block)
        model, params = _loaded(model_or_path, params, dtype)
        self.head = model.heads[model.head_index(head)]
        self.model = model if backend is None else model.with_backend(backend)
        if model.moments is not None:
            self.implemented_properties = [*self.implemented_properties, "magmoms", "magmom"]
        self.dtype = working_dtype(params, dtype)
        self._params = cast(params, self.dtype)
        self._compiled: list[_Static] = []
        self.blocks = 1
        """In how many parts the last structure was evaluated."""

    def __repr__(self) -> str:
        return (
            f"JaxftCalculator(head={self.head!r}, dtype={self.dtype!r}, "
            f"backend={self.model.backend.name!r}, "
            f"max_edges_per_block={self.max_edges_per_block}, blocks={self.blocks}, "
            f"compilations={self.compilations})"
        )

    @property
    def compilations(self) -> int:
        """Static shapes used so far; the model is compiled once for each.

        Shapes have room to spare and are reused, so this stays put while atoms move and grows with
        the logarithm of the size when atoms are added. Calculators of one potential share programs.
        """
        return len(self._compiled)

    def check_state(self, atoms: ase.Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation; ASE does not look at charge and spin."""
        changes: list[str] = super().check_state(atoms, tol)
        if self.model.embeddings and not changes and self.atoms is not None:
            now, then = (features_of(a) | atom_features_of(a) for a in (atoms, self.atoms))
            if now.keys() != then.keys() or any(np.any(now[k] != then[k]) for k in now):
                changes.append("initial_charges")
        return changes

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill ``results``; ASE calls this."""
        super().calculate(atoms, properties, system_changes)
        frame = unlabelled(self.atoms, source=f"the structure {self.atoms.symbols}")
        if "stress" in properties and not frame.is_periodic:
            raise PropertyNotImplementedError(
                f"stress needs a structure that is periodic in three directions; "
                f"{frame.source} has pbc={frame.pbc}."
            )
        dataset = prepare([frame], self.model, head=self.head, row_width=ROW_WIDTH)
        static = self._static(dataset)
        shape = Shape(n_node=static.n_node, n_row=static.n_row, n_graph=2)
        self.blocks = static.blocks
        (result,) = predict_batch(
            self.model,
            self._params,
            dataset,
            [0],
            shape,
            num_elements=static.n_element,
            blocks=static.blocks,
        )
        self.results = ase_results(result)

    def _static(self, dataset: Dataset) -> _Static:
        """The smallest shape so far that suits, or a new one."""
        (sample,) = dataset.samples
        need = _Static(len(sample.receivers), len(sample.species) + 1, len(dataset.elements))
        suitable = [s for s in self._compiled if _suits(s, need, sample.receivers)]
        if suitable:
            return min(suitable)
        if self._compiled:
            n_row = max(_rounded(GROWTH * need.n_row), SMALL_ROWS)
            n_node = max(_rounded(GROWTH * need.n_node), SMALL_NODES)
        else:
            n_row = _rounded(FIRST_HEADROOM * need.n_row)
            n_node = _rounded(FIRST_HEADROOM * need.n_node)
        static = _Static(n_row, n_node, need.n_element)
        blocks = num_blocks(n_row * ROW_WIDTH, n_node, self.max_edges_per_block)
        if blocks > 1:
            # atoms that come later find room in the shapes that come later
            n_node = n_node if self._compiled else need.n_node
            n_node = blocks * -(-n_node // blocks)
            most = int(np.ceil(BLOCK_HEADROOM * fullest(sample.receivers, n_node, blocks)))
            static = _Static(blocks * max(most, 1), n_node, need.n_element, blocks)
        self._compiled.append(static)
        return static


def _suits(static: _Static, need: _Static, receivers: np.ndarray) -> bool:
    if not need.n_node <= static.n_node <= max(WASTE * need.n_node, SMALL_NODES):
        return False
    n_row = static.blocks * fullest(receivers, static.n_node, static.blocks)
    return (
        n_row <= static.n_row <= max(WASTE * n_row, SMALL_ROWS)
        and need.n_element <= static.n_element <= WASTE * need.n_element
    )


def _rounded(count: float) -> int:
    """Up to a multiple of 8, and at least 8."""
    return max(int(-(-count // 8)) * 8, 8)


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
