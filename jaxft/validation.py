"""Judging parameters on labelled sets, after every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft import data, parallel
from jaxft.compilation import Ahead
from jaxft.data import Dataset, Spread
from jaxft.graph import Batch, Weights, totals_of
from jaxft.potential import Potential, predict
from jaxft.typing import Array, LossFn, Params

METRICS = ("energy", "forces", "stress")

TOTALS = {"energy": "energy", "forces": "forces", "stress": "stress", "virials": "stress"}
"""Which sum of weights a term of the loss is divided by."""


@dataclass(frozen=True)
class Validator:
    """A function ``params -> {<set>/<metric>: value}``; made by :func:`validator`."""

    sets: Mapping[str, Spread]
    mesh: Mesh
    programs: Ahead
    """``(params, batch) -> sums of squares, mean terms, totals``, a program per shape."""
    weights: Mapping[str, float]

    def start(self, params: Params) -> None:
        """Begin to compile, in the background."""
        everywhere = parallel.replicated(self.mesh, params)
        self.programs.start(
            (everywhere, parallel.spread(self.mesh, batches.example(shape)))
            for batches in self.sets.values()
            for shape in batches.planned(range(1))
        )

    def __call__(self, params: Params) -> dict[str, float]:
        everywhere = parallel.replicated(self.mesh, params)
        return {
            f"{name}/{metric}": value
            for name, batches in self.sets.items()
            for metric, value in self._judged(everywhere, batches).items()
        }

    def _judged(self, params: Params, batches: Spread) -> dict[str, float]:
        squares, counts = dict.fromkeys(METRICS, 0.0), dict.fromkeys(METRICS, 0.0)
        losses = dict.fromkeys(self.weights, 0.0)
        for batch in batches.epoch(0):
            placed = parallel.spread(self.mesh, batch)
            sums, terms, totals = jax.device_get(self.programs(params, placed))
            for name in METRICS:
                squares[name] += float(sums[name])
                counts[name] += float(getattr(totals, name))
            for name, mean in terms.items():
                losses[name] += float(mean) * float(getattr(totals, TOTALS[name]))
        found = {name: math.sqrt(squares[name] / counts[name]) for name in METRICS if counts[name]}
        labelled = {n: weight for n, weight in self.weights.items() if counts[TOTALS[n]]}
        if labelled:
            found["loss"] = sum(w * losses[n] / counts[TOTALS[n]] for n, w in labelled.items())
        return found


def validator(
    model: Potential,
    loss_fn: LossFn,
    sets: Mapping[str, Dataset],
    *,
    weights: Mapping[str, float],
    batch_size: int,
    dtype: str,
    mesh: Mesh,
    pool: Executor | None = None,
    report: Callable[[str], None] | None = None,
) -> Validator:
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
      pool, report: as in :class:`jaxft.compilation.Ahead`.
    """
    here = parallel.mine(mesh)
    spreads = {
        name: Spread(
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

    programs = Ahead(parallel.per_device(mesh, measured), pool=pool, report=report)
    return Validator(spreads, mesh, programs, weights)
