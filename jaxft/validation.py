"""Judging parameters on labelled sets, after every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft import data, parallel
from jaxft.data import Dataset
from jaxft.graph import Batch, Weights, totals_of
from jaxft.potential import Potential, predict
from jaxft.typing import Array, LossFn, Params

METRICS = ("energy", "forces", "stress")

TOTALS = {"energy": "energy", "forces": "forces", "stress": "stress", "virials": "stress"}
"""Which sum of weights a term of the loss is divided by."""


def validator(
    model: Potential,
    loss_fn: LossFn,
    sets: Mapping[str, Dataset],
    *,
    weights: Mapping[str, float],
    batch_size: int,
    dtype: str,
    mesh: Mesh,
) -> Callable[[Params], dict[str, float]]:
    """A function ``params -> {<set>/<metric>: value}``.

    Metrics are the RMSE of ``energy`` (eV/atom), ``forces`` (eV/Å) and ``stress`` (eV/Å³), where a
    set has such labels, and the weighted ``loss`` of its terms that have any. All are summed over
    the set and divided once, so they depend neither on the batches nor on the devices.

    Args:
      model: the potential.
      loss_fn: its info holds the terms of ``weights``.
      sets: by name.
      weights: λ of the loss's terms.
      batch_size: frames per batch.
      dtype: of the batches.
      mesh: the devices that share every batch.
    """
    here = parallel.mine(mesh)
    batches = {
        name: data.Spread(
            data.alone(dataset, batch_size), seed=None, dtype=dtype, parts=mesh.size, mine=here
        )
        for name, dataset in sets.items()
    }

    def measured(
        params: Params, batch: Batch
    ) -> tuple[dict[str, Array], dict[str, Array], Weights]:
        totals = parallel.total(totals_of(batch.weights))
        batch = batch._replace(totals=totals)
        _, terms = loss_fn(params, batch)
        like = jax.tree.map(lambda leaf: leaf.astype(batch.graph.vectors.dtype), params)
        predicted = predict(model, like, batch.graph)
        labels = batch.labels
        squares = {
            "energy": ((predicted.energy - labels.energy) / batch.n_atoms) ** 2,
            "forces": jnp.mean((predicted.forces - labels.forces) ** 2, axis=-1),
            "stress": jnp.mean((predicted.stress - labels.stress) ** 2, axis=(-2, -1)),
        }
        sums = {name: jnp.sum(getattr(batch.weights, name) * x) for name, x in squares.items()}
        added = parallel.total((sums, {name: terms[name] for name in weights}))
        return *added, totals

    measure = parallel.per_device(mesh, measured)

    def judge(params: Params, parts: data.Spread) -> dict[str, float]:
        squares, counts = dict.fromkeys(METRICS, 0.0), dict.fromkeys(METRICS, 0.0)
        losses = dict.fromkeys(weights, 0.0)
        for batch in parts.epoch(0):
            sums, terms, totals = jax.device_get(measure(params, parallel.spread(mesh, batch)))
            for name in METRICS:
                squares[name] += float(sums[name])
                counts[name] += float(getattr(totals, name))
            for name, mean in terms.items():
                losses[name] += float(mean) * float(getattr(totals, TOTALS[name]))
        found = {name: math.sqrt(squares[name] / counts[name]) for name in METRICS if counts[name]}
        labelled = {name: weight for name, weight in weights.items() if counts[TOTALS[name]]}
        if labelled:
            found["loss"] = sum(w * losses[n] / counts[TOTALS[n]] for n, w in labelled.items())
        return found

    def validate(params: Params) -> dict[str, float]:
        everywhere = parallel.replicated(mesh, params)
        return {
            f"{name}/{metric}": value
            for name, parts in batches.items()
            for metric, value in judge(everywhere, parts).items()
        }

    return validate
