"""The symmetric contraction, in the exactly compressed basis of its coupling tensors.

torch contracts ``U[m, i1…iν, k] · w[z, k, c] · x[i1, c] … x[iν, c]``. Only the part of U that is
symmetric in i1…iν acts, and its paths k are linearly dependent: the symmetrised tensor, a matrix
over (m, monomial) × k, has a rank far below the number of paths. It factors once, on the host
in float64, into ``basis · projection``. The native weights stay the trained leaves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxft.graph import take
from jaxft.models.dots import add_up, mix, pick
from jaxft.models.irreps import Features, multiplicities
from jaxft.models.parameter import parameter
from jaxft.typing import Array


class Coupling(NamedTuple):
    """Compressed coupling of one output irrep. T monomials, r rank, k native paths, ν order."""

    selectors: Array
    """[ν, T, lm + 1], one-hot rows; the last column stands for the factor 1."""
    basis: Array
    """[2L + 1, r, T]."""
    projection: Array
    """[r, k]; the paths of ν = correlation come first, then ν - 1, …"""


def weight_names(correlation: int) -> list[str]:
    """torch's names of the weights for ν = correlation, correlation - 1, …, 1."""
    return ["weights_max", *(f"weights_{i}" for i in range(correlation - 1))]


def noise_of(u_matrices: Iterable[np.ndarray]) -> float:
    """Relative uncertainty that their dtype leaves in coupling tensors."""
    return 1e3 * float(max(np.finfo(u.dtype).eps for u in u_matrices))


def compress(u_matrices: Mapping[int, np.ndarray], num_components: int) -> Coupling:
    """Factor the coupling tensors ``{ν: U}`` of one output irrep.

    Args:
      u_matrices: torch's ``U_matrix_ν``, shape ``[2L + 1,] (lm,) * ν, k``; the leading axis is
        absent for L = 0.
      num_components: 2L + 1.

    Raises:
      ValueError: the factors do not reproduce the tensors.
    """
    order = max(u_matrices)
    lm = next(iter(u_matrices.values())).shape[-2]
    noise = noise_of(u_matrices.values())
    monomials: list[tuple[int, ...]] = []
    bases, projections = [], []
    for nu in range(order, 0, -1):
        tensor = np.asarray(u_matrices[nu], np.float64).reshape(num_components, lm**nu, -1)
        factors, symmetric = _symmetrise(tensor, lm, nu, noise)
        basis, projection = _factor(symmetric, noise)
        monomials += [(*row, *[lm] * (order - nu)) for row in factors]
        bases.append(basis)
        projections.append(projection)
    selectors = np.zeros((order, len(monomials), lm + 1))
    for t, monomial in enumerate(monomials):
        selectors[range(order), t, monomial] = 1.0
    return Coupling(selectors, _block_diagonal(bases), _block_diagonal(projections))


def _symmetrise(
    tensor: np.ndarray, lm: int, nu: int, noise: float
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """[2L + 1, lm^ν, k] -> monomials that occur, their coefficients [2L + 1, T, k]."""
    indices = np.sort(np.array(list(itertools.product(range(lm), repeat=nu))), axis=1)
    distinct, inverse = np.unique(indices, axis=0, return_inverse=True)
    summed = np.zeros((len(distinct), tensor.shape[0], tensor.shape[2]))
    np.add.at(summed, inverse.reshape(-1), tensor.transpose(1, 0, 2))
    size = np.abs(summed).max(axis=(1, 2), initial=0.0)
    keep = size > noise * max(size.max(initial=0.0), np.abs(tensor).max(initial=0.0))
    return [tuple(row) for row in distinct[keep].tolist()], summed[keep].transpose(1, 0, 2)


def _factor(symmetric: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """[2L + 1, T, k] = basis [2L + 1, r, T] · projection [r, k]."""
    m, t, k = symmetric.shape
    if t == 0:
        return np.zeros((m, 0, 0)), np.zeros((0, k))
    matrix = symmetric.reshape(m * t, k)
    left, singular, right = np.linalg.svd(matrix, full_matrices=False)
    rank = int((singular > noise * singular[0]).sum())
    left, right = left[:, :rank] * singular[:rank], right[:rank]
    error = np.abs(left @ right - matrix).max()
    if error > noise * singular[0]:
        raise ValueError(
            f"the coupling tensor has no clean rank: {rank} of {k} paths leave an error of "
            f"{error:.1e}; the U matrices of this file are damaged."
        )
    return left.reshape(m, t, rank).transpose(0, 2, 1), right


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """Stack the last two axes of ``blocks`` along a diagonal."""
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (-2, -1))
    full = np.zeros((*blocks[0].shape[:-2], rows, columns))
    row = column = 0
    for block in blocks:
        height, width = block.shape[-2:]
        full[..., row : row + height, column : column + width] = block
        row, column = row + height, column + width
    return full


def contract(
    x: Array,
    weights: Mapping[str, Array],
    one_hot: Array,
    couplings: Mapping[str, Coupling],
) -> Features:
    """The contraction of one block.

    Args:
      x: [N, lm, C].
      weights: native, {output irrep: [S, k, C]}.
      one_hot: [N, S] elements.
      couplings: {output irrep: coupling}.

    Returns:
      {output irrep: [N, 2L + 1, C]}.
    """
    n, lm, channels = x.shape
    columns = x.transpose(1, 0, 2).reshape(lm, n * channels)
    columns = jnp.concatenate([columns, jnp.ones_like(columns[:1])])
    out: Features = {}
    for name, native in weights.items():
        coupling = couplings[name]
        components, rank, _ = coupling.basis.shape
        if rank == 0:  # nothing couples to a scalar that is odd, say
            out[name] = jnp.zeros((n, components, channels), x.dtype)
            continue
        monomials = pick(coupling.selectors[0], columns)
        for selector in coupling.selectors[1:]:
            monomials = monomials * pick(selector, columns)
        basis = coupling.basis.reshape(components * rank, -1)
        terms = mix(basis.T[None], monomials[None]).reshape(components, rank, -1)
        reduced = jnp.einsum("rk,skc->rsc", coupling.projection, native)
        # A product with the one-hot rows, since the transpose of a gather is a scatter with
        # few, contended targets.
        reduced = jnp.einsum("rsc,ns->rnc", reduced, one_hot).reshape(-1, n * channels)
        summed = add_up(terms * reduced)
        out[name] = summed.reshape(-1, n, channels).transpose(1, 0, 2)
    return out


ContractFn = Callable[[Array, Mapping[str, Array], Array, Any], Features]
"""Like :func:`contract`; couplings are what its backend makes of them."""


class SymmetricContraction(nn.Module):
    """Products of up to ν neighbourhood features, weighted per element."""

    irreps_out: str
    paths: tuple[tuple[int, ...], ...]
    """Per output irrep: number of native paths for ν = correlation, correlation - 1, …, 1."""
    num_elements: int
    contract: ContractFn

    @nn.compact
    def __call__(self, x: Array, elements: Array, one_hot: Array, couplings: Any) -> Features:
        """[N, lm, C], [S] element table rows, [N, S] -> {irrep: [N, 2L + 1, C]}."""
        weights = {}
        for name, paths in zip(multiplicities(self.irreps_out), self.paths, strict=True):
            native = NativeWeights(paths, self.num_elements, x.shape[-1], name=name)()
            weights[name] = take(native, elements)
        return self.contract(x, weights, one_hot, couplings)


class NativeWeights(nn.Module):
    """torch's ``weights_max``, ``weights.0``, … of one output irrep, side by side."""

    paths: tuple[int, ...]
    num_elements: int
    channels: int

    @nn.compact
    def __call__(self) -> Array:
        """[num_elements, sum of paths, C]."""
        blocks = []
        for name, k in zip(weight_names(len(self.paths)), self.paths, strict=True):
            init = nn.initializers.normal(1.0 / max(k, 1))
            blocks.append(parameter(self, name, init, (self.num_elements, k, self.channels)))
        return jnp.concatenate(blocks, axis=1)
