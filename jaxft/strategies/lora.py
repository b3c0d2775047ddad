"""LoRA: low-rank updates of the matrices, irrep by irrep."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxft import tree
from jaxft.strategies.base import Strategy
from jaxft.tree import Patterns
from jaxft.typing import Array, Consts, Coords, Mask, Params

LINEARS = (
    "interactions_*/linear_up/*",
    "interactions_*/linear/*",
    "interactions_*/conv_tp_weights/*",
    "products_*/linear/*",
)
"""The matrices of all layers that mix channels or radial features."""


def lora(
    where: Patterns = LINEARS,
    *,
    rank: int = 4,
    alpha: float = 1.0,
    also_train: Patterns | None = None,
    name: str = "lora",
) -> Strategy:
    r"""Low-rank adaptation: :math:`W + \alpha\, r^{-3/2} A B` on each leaf that matches.

    A leaf holds one irrep's matrix in its last two axes (leading axes, such as elements, get
    factors of their own), so the update never mixes irreps and stays equivariant. A starts
    standard normal, B zero: the identity at init. :math:`r^{-3/2}` is torch MACE's ``alpha/rank``
    times the path normalisation of its bottleneck.

    Args:
      where: patterns of the matrices to adapt; all other base leaves are frozen.
      rank: r, smaller than both matrix dimensions.
      alpha: α.
      also_train: patterns of leaves to train in full beside the factors.
      name: of the strategy.

    Returns:
      A strategy that trains its factors, and ``also_train``.

    Raises:
      ValueError: when the recipe is set up: a pattern matches nothing, a leaf is no matrix, or
        the rank is not low for one of them.

    Example:
      >>> recipe = (lora("interactions_*/linear*/**", rank=8, also_train="readouts_*/**"),)

    Reference: Hu et al., arXiv:2106.09685; ``mace.modules.lora`` of mace-torch.
    """
    if rank < 1:
        raise ValueError(f"lora(rank={rank}) is not a rank; use an integer >= 1.")

    def targets(params: Params) -> dict[str, Array]:
        flat = tree.flatten(params)
        chosen = {path: flat[path] for path in tree.select(params, where)}
        for path, leaf in chosen.items():
            if leaf.ndim < 2:
                raise ValueError(
                    f"lora() was asked to adapt {path!r} of shape {leaf.shape}, which is no matrix;"
                    "\nleave this leaf out of `where`, or add it to `also_train`."
                )
            if rank >= min(leaf.shape[-2:]):
                raise ValueError(
                    f"lora(rank={rank}) is not low rank for {path!r} of shape {leaf.shape};\n"
                    f"use rank < {min(leaf.shape[-2:])}, or leave this leaf out of `where`."
                )
        return chosen

    def trains(params: Params) -> Mask:
        targets(params)
        if also_train is None:
            return tree.constant_mask(params, False)
        return tree.mask(params, also_train)

    def init(key: Array, params: Params) -> tuple[Coords, Consts]:
        factors = {}
        for index, (path, leaf) in enumerate(targets(params).items()):
            *lead, n_in, n_out = leaf.shape
            shape = (*lead, n_in, rank)
            factors[f"{path}/A"] = jax.random.normal(
                jax.random.fold_in(key, index), shape, leaf.dtype
            )
            factors[f"{path}/B"] = jnp.zeros((*lead, rank, n_out), leaf.dtype)
        return tree.unflatten(factors), {}

    def apply(params: Params, coords: Coords, consts: Consts) -> Params:
        flat = dict(tree.flatten(params))
        factors = tree.flatten(coords)
        for path in (key.removesuffix("/A") for key in factors if key.endswith("/A")):
            update = factors[f"{path}/A"] @ factors[f"{path}/B"]
            flat[path] = flat[path] + alpha * rank**-1.5 * update
        return tree.unflatten(flat)

    return Strategy(name=name, trains=trains, init=init, apply=apply)
