"""Muon on the matrices of a tree, Adam on the rest."""

from __future__ import annotations

from math import sqrt
from typing import Any

import jax
import optax

RMS = 0.2
"""Of an entry of an orthogonalised update; Adam's is about that."""


def scale_by_muon(
    b1: float = 0.95, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    r"""Orthogonalised momentum for matrices, Adam for the other leaves.

    A leaf with two axes or more is a stack of matrices in its last two axes, as all of jaxft's are
    (``skip_tp [elements, in, out]``, ``weights_max [elements, paths, channels]``); each is
    orthogonalised on its own, and scaled by :math:`0.2 \sqrt{\max(n_{in}, n_{out})}`, so that one
    learning rate suits both kinds of leaves.

    Args:
      b1: decay of the momentum of matrices; Adam's is 0.9.
      b2: Adam's decay of the second moment.
      eps: added to norms and roots.

    Reference: Jordan et al., "Muon" (2024); the scale is that of Liu et al., arXiv:2502.16982.
    """
    matrices = optax.chain(
        optax.contrib.scale_by_muon(beta=b1, eps=eps, weight_dimension_numbers=_last_two_axes),
        optax.stateless_with_tree_map(lambda u, _: u * (RMS * sqrt(max(u.shape[-2:])))),
    )
    return optax.partition(
        {"matrix": matrices, "other": optax.scale_by_adam(b2=b2, eps=eps)}, _kinds
    )


def _kinds(params: Any) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim >= 2 else "other", params)


def _last_two_axes(updates: Any) -> Any:
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map(lambda _: axes, updates)
