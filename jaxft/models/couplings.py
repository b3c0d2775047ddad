r"""The coupling tensors of a symmetric contraction, made anew: mace-torch's ``U_matrix_ν``.

A path couples ν copies of the irreps of a message, one after the other, to one output irrep:
``((ir_1 ⊗ ir_2 → a) ⊗ ir_3 → b) …``, each step with Clebsch–Gordan coefficients of norm √(2l + 1).
All paths are kept, redundant ones too, since the initial distribution of the weights is defined in
this basis. A path is determined up to its sign, which a weight of symmetric distribution absorbs.

Reference: Batatia et al., NeurIPS 2022 (arXiv:2206.07697), eq. 10.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from jaxft.models.e3nn import e3nn


class _Coupled(NamedTuple):
    """One path: to which irrep, and how."""

    irrep: e3nn.Irrep
    tensor: np.ndarray
    """[2l + 1, lm, …, lm]."""


def coupling_tensors(irreps: str, output: str, correlation: int) -> dict[int, np.ndarray]:
    """``{ν: U}`` for ν = 1 … correlation.

    Args:
      irreps: of a message, such as ``0e+1o+2e``; multiplicities count as 1.
      output: one irrep, such as ``1o``.
      correlation: the largest ν.

    Returns:
      Arrays ``[2L + 1,] (lm,) * ν, paths``, float64; the leading axis is absent for L = 0.

    Raises:
      ValueError: nothing couples to the output at some order.

    Example:
      >>> [u.shape for u in coupling_tensors("0e+1o+2e+3o", "0e", 3).values()]
      [(16, 1), (16, 16, 4), (16, 16, 16, 23)]
    """
    wanted, found = e3nn.Irrep(output), {}
    for nu in range(1, correlation + 1):
        paths = [path.tensor for path in _paths(irreps, nu, wanted) if path.irrep == wanted]
        if not paths:
            raise ValueError(
                f"no product of {nu} of {irreps} holds {output}; raise the degree of the "
                "spherical harmonics, or leave that irrep out."
            )
        stacked = np.stack(paths, axis=-1)
        found[nu] = stacked[0] if wanted.l == 0 else stacked
    return found


@functools.lru_cache(maxsize=32)
def _paths(irreps: str, order: int, only: e3nn.Irrep | None = None) -> tuple[_Coupled, ...]:
    """All paths of one order, those of one irrep together; ``only`` leaves others out."""
    terms = [ir for _, ir in e3nn.Irreps(irreps)]
    starts = np.cumsum([0, *(ir.dim for ir in terms)])
    blocks = [slice(start, start + ir.dim) for start, ir in zip(starts, terms, strict=False)]
    size = int(starts[-1])
    if order == 1:
        identity = np.eye(size)
        return tuple(_Coupled(ir, identity[block]) for ir, block in zip(terms, blocks, strict=True))
    found = []
    for left in _paths(irreps, order - 1):
        for ir, block in zip(terms, blocks, strict=True):
            for out in left.irrep * ir:
                if only is None or out == only:
                    tensor = np.zeros((out.dim, *(size,) * order))
                    step = _clebsch_gordan(out.l, left.irrep.l, ir.l)
                    product = np.tensordot(step, left.tensor, (1, 0))
                    tensor[..., block] = np.moveaxis(product, 1, -1)
                    found.append(_Coupled(out, tensor))
    return tuple(sorted(found, key=lambda path: (path.irrep.l, path.irrep.p)))


@functools.cache
def _clebsch_gordan(out: int, left: int, right: int) -> np.ndarray:
    """[2 out + 1, 2 left + 1, 2 right + 1] of norm √(2 out + 1)."""
    found = np.asarray(e3nn.clebsch_gordan(out, left, right), np.float64)
    return found * np.sqrt(2 * out + 1) / np.linalg.norm(found)
