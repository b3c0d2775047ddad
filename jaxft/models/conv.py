"""Messages: a neighbour's features times harmonics times radial weights, summed over edges."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxft.graph import Graph, sum_rows, take
from jaxft.models.dots import apply, mix, times
from jaxft.models.irreps import Features, Path
from jaxft.models.precision import PARITY, Precision
from jaxft.typing import Array


def convolve(
    features: Features,
    harmonics: Features,
    radial: tuple[Array, Array],
    paths: Sequence[Path],
    graph: Graph,
    precision: Precision = PARITY,
) -> Features:
    """Sum the tensor products of all edges onto their receivers.

    Each path is one batched matrix product over (slot, component of the sender): messages per
    edge are never stored.

    Args:
      features: sender features, {irrep: [N, 2l + 1, C]}.
      harmonics: {irrep: [R, K, 2l + 1]}.
      radial: hidden radial features [R, K, h] and the matrix [h, ΣC over the paths].
      paths: in the order of the matrix's columns.
      graph: rows and slots.
      precision: of the radial weights.

    Returns:
      {irrep: [N, 2l + 1, ΣC over its slots]}, the slots of one irrep side by side in path order.
    """
    hidden, matrix = radial
    sent = {name: take(block, graph.senders) for name, block in features.items()}
    slots: dict[str, list[Array]] = {}
    widths = [features[path.node].shape[-1] for path in paths]
    for path, columns in zip(paths, jax.lax.split(matrix, widths, axis=1), strict=True):
        with jax.default_matmul_precision(precision.radial):
            weights = apply(columns, hidden)
        i, j, m = path.coupling.shape
        coupling = path.coupling.transpose(1, 0, 2).reshape(j, i * m).astype(weights.dtype)
        angular = times(harmonics[path.edge], coupling)
        weighted = sent[path.node] * weights[:, :, None, :]
        r, k = graph.senders.shape
        rows = mix(angular.reshape(r, k * i, m), weighted.reshape(r, k * i, -1))
        slots.setdefault(path.out, []).append(rows)
    merged = {name: jnp.concatenate(rows, axis=-1) for name, rows in slots.items()}
    return {name: sum_rows(rows, graph) for name, rows in merged.items()}
