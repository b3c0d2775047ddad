"""Judging parameters on labelled sets, after every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxft import data, parallel
from jaxft.compilation import Ahead
from jaxft.data import Dataset, Spread
from jaxft.graph import Batch, totals_of, with_totals
from jaxft.loss import HESSIAN_SQUARES, MOMENT_ERRORS, SQUARES, mean_squares
from jaxft.potential import Potential, predict
from jaxft.typing import Array, LossFn, Params

METRICS = tuple(SQUARES)

TOTALS = {
    **{name: name for name in METRICS},
    **{SQUARES[name]: name for name in METRICS},
    "virials": "stress",
    "hessian": "hessian",
    HESSIAN_SQUARES: "hessian",
    **dict.fromkeys(("moments", *MOMENT_ERRORS), "moments"),
}
"""Which sum of weights a mean is divided by."""

MAE = {"moments_errors": "moments_mae", "moments_mean_errors": "moments_mean_mae"}
"""Metrics that are means themselves."""


def squares_of(weights: Mapping[str, float]) -> dict[str, str]:
    """Where the mean squares of each metric are, of a loss with these terms."""
    return {**SQUARES, **({"hessian": HESSIAN_SQUARES} if "hessian" in weights else {})}


@dataclass(frozen=True)
class Validator:
    """A function ``params -> {<set>/<metric>: value}``; made by :func:`validator`."""

    sets: Mapping[str, Spread]
    mesh: Mesh
    programs: Ahead
    """``(params, batch) -> means of terms and squares, totals``, a program per shape."""
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
        counts: dict[str, float] = {}
        sums: dict[str, float] = {}
        for batch in batches.epoch(0):
            placed = parallel.spread(self.mesh, batch)
            means, totals = jax.device_get(self.programs(params, placed))
            for name, total in totals.items():
                counts[name] = counts.get(name, 0.0) + float(total)
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + float(mean) * float(totals[TOTALS[name]])
        squares = squares_of(self.weights)
        found = {
            name: math.sqrt(sums[square] / counts[name])
            for name, square in squares.items()
            if counts[name]
        }
        if counts.get("moments"):
            found["moments"] = math.sqrt(sums["moments_squares"] / counts["moments"])
            present = {name: metric for name, metric in MAE.items() if name in sums}
            found |= {metric: sums[name] / counts["moments"] for name, metric in present.items()}
        labelled = {n: weight for n, weight in self.weights.items() if counts[TOTALS[n]]}
        if labelled:
            found["loss"] = sum(w * sums[n] / counts[TOTALS[n]] for n, w in labelled.items())
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
    options: Mapping[str, Any] | None = None,
    report: Callable[[str], None] | None = None,
) -> Validator:
    """A function ``params -> {<set>/<metric>: value}``.

    Metrics are the RMSE of ``energy`` (eV/atom), ``forces`` (eV/Å), ``stress`` (eV/Å³), of products
    of the ``hessian`` (eV/Å) if the loss has such a term, and of ``moments`` (µB; with
    ``moments_mae``, and ``moments_mean_mae`` of predicting each element's mean), where a set has
    such labels, and the weighted ``loss`` of its terms that have any. All are summed over the set
    and divided once, so they depend neither on the batches nor on the devices.

    Args:
      model: the potential.
      loss_fn: its info holds the terms of ``weights``.
      sets: by name.
      weights: λ of the loss's terms.
      batch_size: frames per batch.
      dtype: of the batches.
      mesh: the devices that share every batch.
      pool, options, report: as in :class:`jaxft.compilation.Ahead`.
    """
    here = parallel.mine(mesh)
    spreads = {
        name: Spread(
            data.alone(dataset, batch_size), seed=None, dtype=dtype, parts=mesh.size, mine=here
        )
        for name, dataset in sets.items()
    }

    def measured(params: Params, batch: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
        curvature = batch.curvature
        probed = None if curvature is None else curvature.weight.sum()
        totals, probed = parallel.total((totals_of(batch.weights), probed))
        batch = with_totals(batch, totals, probed)
        _, means = loss_fn(params, batch)
        if not all(name in means for name in SQUARES.values()):  # a loss of somebody else's
            like = jax.tree.map(lambda leaf: leaf.astype(batch.graph.vectors.dtype), params)
            squares = mean_squares(predict(model, like, batch.graph), batch)
            means = means | {SQUARES[name]: mean for name, mean in squares.items()}
        magnetic = (name for name in MOMENT_ERRORS if name in means)
        wanted = (*weights, *squares_of(weights).values(), *magnetic)
        named = {name: total for name, total in totals._asdict().items() if total is not None}
        named |= {} if probed is None else {"hessian": probed}
        return parallel.total({name: means[name] for name in wanted}), named

    jitted = parallel.per_device(mesh, measured)
    programs = Ahead(jitted, pool=pool, options=options, report=report)
    return Validator(spreads, mesh, programs, weights)
