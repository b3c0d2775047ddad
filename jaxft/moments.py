"""Predicted magnetic moments against labels, in a batch."""

from __future__ import annotations

import jax.numpy as jnp

from jaxft.graph import Batch, sum_atoms, take
from jaxft.potential import Potential
from jaxft.typing import Array

COMPARISONS = ("magnitude", "sign", "direct")
"""What of the moments is compared, see :func:`differences`."""


def check_comparison(model: Potential, compare: str, weight: float) -> None:
    """Raises ValueError unless a loss can compare the model's moments so, or gives them none."""
    if compare not in COMPARISONS:
        raise ValueError(
            f"compare={compare!r} is unknown; expected one of {', '.join(map(repr, COMPARISONS))}."
        )
    if weight and model.moments is None:
        raise ValueError(
            f"the loss weighs magnetic moments with {weight:g}, but the model has no head for "
            "them;\nadd one (jaxft.surgery.add_moments; in a config the key `moments`), or give "
            "them weight 0."
        )


def differences(predicted: Array, batch: Batch, compare: str) -> Array:
    """Predicted minus labelled moments, µB.

    =============  ==========================================================================
    ``magnitude``  of |µ|, [N]: no direction and no sign counts, as suits labels whose overall
                   orientation is an accident of the calculation
    ``sign``       of µ, [N] or [N, 3], those of a graph reversed together (time reversal) if
                   that brings them closer to its labels
    ``direct``     of µ, [N] or [N, 3], as they are
    =============  ==========================================================================
    """
    labels: Array = batch.labels.moments
    if compare == "magnitude":
        return _magnitude(predicted) - _magnitude(labels)
    if compare == "sign":
        overlap = (predicted * labels).reshape(len(labels), -1).sum(axis=-1)
        overlap = sum_atoms(batch.weights.moments * overlap, batch.graph)
        sign = jnp.where(overlap < 0, -1.0, 1.0).astype(predicted.dtype)
        sign = take(sign, batch.graph.graph_index)
        predicted = predicted * sign.reshape(-1, *[1] * (predicted.ndim - 1))
    return predicted - labels


def offsets_of_means(model: Potential, batch: Batch) -> Array:
    """[N] µB: each element's mean of |µ|, as the model's head was made for, minus the label."""
    labels: Array = batch.labels.moments
    means = jnp.asarray(model.mean_moments, labels.dtype)
    graph = batch.graph
    return take(take(means, graph.elements), graph.species) - _magnitude(labels)


def _magnitude(moments: Array) -> Array:
    """|µ|, with gradient 0 at 0: [N] or [N, 3] -> [N]."""
    if moments.ndim == 1:
        return moments * jnp.sign(moments)
    square = (moments**2).sum(axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
