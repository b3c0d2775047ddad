"""DoRA: a matrix as lengths and directions of its columns, the directions with low-rank updates."""

from __future__ import annotations

import jax.numpy as jnp

from jaxft import tree
from jaxft.strategies.base import Strategy
from jaxft.strategies.lora import (
    LINEARS,
    Scaling,
    Start,
    also,
    check_numbers,
    draw,
    matrices,
    own_factors,
    products,
    scale_of,
)
from jaxft.tree import Patterns
from jaxft.typing import Array, Consts, Coords, Mask, Params


def dora(
    where: Patterns = LINEARS,
    *,
    rank: int = 4,
    alpha: float = 1.0,
    scaling: Scaling = "torch",
    init_std: float = 1.0,
    also_train: Patterns | None = None,
    name: str = "dora",
) -> Strategy:
    r"""Weight-decomposed low-rank adaptation, irrep by irrep.

    .. math:: W' = (1+g)\,\frac{\lVert W\rVert}{\lVert V\rVert}\,V, \qquad V = W + s A B

    with the norm over the input axis: one length per irrep and output channel (and element, where
    a leaf has several), trained through g, apart from the direction, trained through A and B. A
    leaf holds one irrep's matrix and no m-components, so W' is as equivariant as W. g and B start
    at zero: the identity at init, bit for bit. A column of zeros has no direction; it is adapted
    as by LoRA, times 1 + g. Unlike the authors we differentiate ‖V‖, which they hold constant to
    save memory.

    Args:
      where: patterns of the matrices to adapt; all other base leaves are frozen.
      rank: r, smaller than both matrix dimensions.
      alpha: α.
      scaling: how s follows from α and r, see :func:`~jaxft.strategies.lora.lora`.
      init_std: standard deviation of A at the start.
      also_train: patterns of leaves to train in full beside the coordinates.
      name: of the strategy.

    Returns:
      A strategy that trains ``<leaf>/A`` [..., in, r], ``<leaf>/B`` [..., r, out] and ``<leaf>/g``
      [..., out], and ``also_train``.

    Raises:
      ValueError: as :func:`~jaxft.strategies.lora.lora`.

    Example:
      >>> print(jaxft.describe((dora("**/linear_up/*", rank=2),), params).splitlines()[-1])
      trainable params: 60 || all params: 21,292 || trainable%: 0.28

    Reference: Liu et al., arXiv:2402.09353, eq. 5, there for networks without symmetry; lengths and
    directions per irrep are ours.
    """
    check_numbers("dora", rank=rank, alpha=alpha, init_std=init_std)
    s = scale_of("dora", scaling, alpha, rank)

    def plan(params: Params) -> dict[str, Start]:
        chosen = matrices("dora", params, where, rank)
        return {path: own_factors(leaf, rank, init_std) for path, leaf in chosen.items()}

    def trains(params: Params) -> Mask:
        plan(params)
        return also(also_train)(params)

    def init(key: Array, params: Params) -> tuple[Coords, Consts]:
        starts = plan(params)
        coords = draw(key, starts)
        for path, start in starts.items():
            coords[f"{path}/g"] = jnp.zeros((*start.b[:-2], start.b[-1]), start.dtype)
        return tree.unflatten(coords), {}

    def apply(params: Params, coords: Coords, consts: Consts) -> Params:
        flat, own = dict(tree.flatten(params)), tree.flatten(coords)
        for path, product in products(own):
            flat[path] = _decomposed(flat[path], s * product, own[f"{path}/g"])
        return tree.unflatten(flat)

    cites = ("liu2024dora", *(("kalajdzievski2023rslora",) if scaling == "rslora" else ()))
    return Strategy(name=name, trains=trains, init=init, apply=apply, cites=cites)


def _decomposed(w: Array, update: Array, g: Array) -> Array:
    """(1 + g) ‖W‖/‖W + D‖ (W + D) by columns; W and D are [..., in, out], g is [..., out].

    ‖W + D‖² enters as ‖W‖² + (2W + D)·D: two sums over W alone could be ordered differently by the
    compiler and then their ratio would not be one where D is zero.
    """
    length = jnp.sum(w**2, axis=-2, keepdims=True)
    has_direction = length > 0
    change = jnp.sum((2 * w + update) * update, axis=-2, keepdims=True)
    relative = jnp.where(has_direction, change, 0) / jnp.where(has_direction, length, 1)
    # Rounding may leave nothing, or less, of a column that D cancels.
    ratio = 1 / jnp.sqrt(jnp.maximum(1 + relative, jnp.finfo(w.dtype).eps))
    return (1 + g[..., None, :]) * ratio * (w + update)
