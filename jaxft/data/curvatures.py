"""Labels of second derivatives: a frame's Hessian times some displacements, and which is used when.

A file holds the displacements of a frame and the Hessian times each. Columns of the Hessian are
the case where one coordinate of one atom is displaced by 1 Å. A batch carries one displacement per
frame, drawn on the host: a Hessian of 64 atoms has 36 864 numbers, its product with one has 192.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxft.data.labels import numbers

Probes = Literal["column", "gaussian"]
"""``column``: one of the frame's displacements; ``gaussian``: a random sum of all of them."""

STREAM = 0x4E55
"""Keeps draws apart from those of the order of frames, which have the same seed and number."""


class Curvatures(NamedTuple):
    """What the Hessian of n atoms makes of k displacements."""

    displacements: np.ndarray
    """[k, n, 3] Å."""
    products: np.ndarray
    """[k, n, 3] eV/Å, the Hessian times each: force constants, with their sign."""

    def draw(self, probes: Probes, key: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        """One displacement of all atoms and the Hessian times it, each [n, 3].

        Args:
          probes: of what kind. A Gaussian one is Σ g_i u_i / √k with g of unit variance, so that
            the mean square of an error is that of a random column.
          key: seed, number of the epoch, position of the frame; determines the draw.
        """
        rng, count = np.random.default_rng([STREAM, *key]), len(self.displacements)
        if probes == "column":
            i = rng.integers(count)
            return self.displacements[i], self.products[i]
        factors = rng.normal(size=count) / np.sqrt(count)
        return (
            np.tensordot(factors, self.displacements, 1),
            np.tensordot(factors, self.products, 1),
        )


def check_probes(probes: str | None) -> None:
    """Raises ValueError unless it is one of ``Probes``, or None."""
    if probes is not None and probes not in get_args(Probes):
        raise ValueError(
            f"probes={probes!r} is unknown; use one of {', '.join(map(repr, get_args(Probes)))}."
        )


def curvatures_of(
    displacements: Any, products: Any, n: int, keys: tuple[str, str], source: str
) -> Curvatures | None:
    """From the arrays of a file, both [n, 3 k] or [n, 3]; None where neither is there.

    Raises:
      ValueError: only one is there, or they are not finite numbers of such a shape.
    """
    if displacements is None and products is None:
        return None
    if displacements is None or products is None:
        there, absent = keys if products is None else keys[::-1]
        raise ValueError(
            f"{source} has {there!r} but not {absent!r}; second derivatives are a displacement and "
            "the Hessian times it: give both, or neither."
        )
    width = np.shape(displacements)[-1] if np.ndim(displacements) == 2 else 0
    if width % 3 or not width:
        raise ValueError(
            f"{source}: {keys[0]!r} has shape {np.shape(displacements)}; expected ({n}, 3 k), "
            "three numbers of each atom for every displacement."
        )
    one, other = (
        numbers(value, (n, width), key, source).reshape(n, -1, 3).transpose(1, 0, 2)
        for value, key in zip((displacements, products), keys, strict=True)
    )
    return Curvatures(one, other)


def arrays_of(curvatures: Curvatures, keys: tuple[str, str]) -> dict[str, np.ndarray]:
    """For ``ase.Atoms.arrays``: what :func:`curvatures_of` reads."""
    n = curvatures.displacements.shape[1]
    both = (curvatures.displacements, curvatures.products)
    return {
        key: np.ascontiguousarray(value.transpose(1, 0, 2).reshape(n, -1))
        for key, value in zip(keys, both, strict=True)
    }


def displacements(n: int, count: int, kind: Probes, rng: np.random.Generator) -> np.ndarray:
    """Random displacements of n atoms, whose mean square length is 1 Å².

    The mean square of an error of the Hessian times either kind is that of a random column.

    Args:
      n: atoms.
      count: displacements.
      kind: ``column`` moves one coordinate of one atom by 1 Å, no coordinate twice while there are
        others; ``gaussian`` moves all of them, each with variance 1 / (3 n) Å².
      rng: determines them.

    Returns:
      [count, n, 3] Å.
    """
    if kind == "gaussian":
        return rng.normal(scale=1 / np.sqrt(3 * n), size=(count, n, 3))
    rounds = [rng.permutation(3 * n) for _ in range(-(-count // (3 * n)))]
    return np.eye(3 * n)[np.concatenate(rounds)[:count]].reshape(count, n, 3)


def columns(constants: np.ndarray, atoms: np.ndarray) -> Curvatures:
    """Columns of the Hessian from rows of force constants, by its symmetry.

    Args:
      constants: [A, n, 3, 3] eV/Å², phonopy's layout; entry [a, b, i, j] is of coordinate i of atom
        ``atoms[a]`` and j of atom b.
      atoms: [A], whose rows they are; all n of them in the full form.

    Returns:
      3 A displacements of 1 Å. In a perfect lattice those of one primitive cell say all, since the
      other columns are the same ones, translated.
    """
    n = constants.shape[1]
    units = np.zeros((len(atoms), 3, n, 3))
    for row, atom in enumerate(atoms):
        units[row, :, atom] = np.eye(3)
    return Curvatures(
        units.reshape(-1, n, 3), constants.transpose(0, 2, 1, 3).reshape(-1, n, 3).copy()
    )
