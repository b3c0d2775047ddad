"""Radial distribution functions, and how far one is from another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ase
import numpy as np
from matscipy.neighbours import neighbour_list

BINS = 500


@dataclass(frozen=True, eq=False)
class Rdf:
    """g(r) in bins of equal width."""

    r: np.ndarray
    """[bins] Å, middles."""
    g: np.ndarray
    """[bins]; 1 for an ideal gas."""

    @property
    def width(self) -> float:
        """Å, of a bin."""
        return float(2 * self.r[0])


def largest_radius(structures: Sequence[ase.Atoms]) -> float:
    """Å, half the shortest lattice vector of all structures.

    Raises:
      ValueError: one is not periodic in three directions, so that it has no density.
    """
    for atoms in structures:
        if not atoms.pbc.all():
            raise ValueError(
                f"{atoms.symbols} has pbc={atoms.pbc.tolist()}; a radial distribution function "
                "needs structures that are periodic in three directions."
            )
    return 0.5 * min(float(atoms.cell.lengths().min()) for atoms in structures)


def rdf(
    structures: Sequence[ase.Atoms],
    *,
    r_max: float | None = None,
    bins: int = BINS,
    pair: tuple[str, str] | None = None,
) -> Rdf:
    """The mean over structures, normalised by the exact volumes of the shells.

    Args:
      structures: frames of a trajectory, periodic in three directions.
      r_max: Å; by default :func:`largest_radius`.
      bins: of equal width from 0 to ``r_max``.
      pair: elements; by default all atoms alike.

    Raises:
      ValueError: no structure, one that is not periodic, or without the elements.
    """
    if not len(structures):
        raise ValueError("there are no structures to count pairs in; give at least one.")
    largest = largest_radius(structures)
    edges = np.linspace(0.0, r_max or largest, bins + 1)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    g = np.zeros(bins)
    for atoms in structures:
        first, second = (_members(atoms, pair and pair[k]) for k in (0, 1))
        both = int((first & second).sum())
        expected = (first.sum() * second.sum() - both) / atoms.get_volume()
        if expected <= 0:
            raise ValueError(f"{atoms.symbols} has no pair of {pair or 'atoms'}; choose others.")
        i, j, d = neighbour_list("ijd", atoms, cutoff=float(edges[-1]))
        counts, _ = np.histogram(d[first[i] & second[j]], bins=edges)
        g += counts / (expected * shells)
    return Rdf(0.5 * (edges[1:] + edges[:-1]), g / len(structures))


def _members(atoms: ase.Atoms, symbol: str | None) -> np.ndarray:
    if symbol is None:
        return np.ones(len(atoms), bool)
    return np.array(atoms.get_chemical_symbols()) == symbol


def rdf_error(reference: Rdf, found: Rdf) -> float:
    """%: 100 min(1, ∫|g_ref - g| dr / ∫|g_ref - 1| dr); 100 is no better than an ideal gas.

    Raises:
      ValueError: other bins.

    Reference: MLIPAudit and Matbench Discovery's MD task.
    """
    _check_bins(reference, found)
    least = np.abs(reference.g - 1).sum()
    return float(100 * min(1.0, np.abs(reference.g - found.g).sum() / max(least, 1e-300)))


def earth_mover(reference: Rdf, found: Rdf) -> float:
    """Å: Wasserstein-1 distance of the two curves, each normalised to unit area over its bins.

    Raises:
      ValueError: other bins, or a curve without any pair.
    """
    _check_bins(reference, found)
    if not (reference.g.sum() > 0 and found.g.sum() > 0):
        raise ValueError("no pair of atoms is within the bins; choose a larger r_max.")
    gap = np.cumsum(reference.g) / reference.g.sum() - np.cumsum(found.g) / found.g.sum()
    return float(np.abs(gap).sum() * reference.width)


def _check_bins(reference: Rdf, found: Rdf) -> None:
    if reference.r.shape != found.r.shape or not np.allclose(reference.r, found.r):
        raise ValueError(
            f"bins up to {reference.r[-1]:.3f} Å ({len(reference.r)}) and {found.r[-1]:.3f} Å "
            f"({len(found.r)}) cannot be compared; use the same r_max and bins."
        )
