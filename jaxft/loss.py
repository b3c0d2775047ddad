"""Losses: functions ``(params, batch) -> scalar, {name: scalar}``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxft.graph import Batch, Curvature, Labels, Weights, totals_of
from jaxft.moments import check_comparison, differences, offsets_of_means
from jaxft.potential import Potential, Prediction, predict, predict_along
from jaxft.typing import Array, LossFn, Params

BOUNDS = (100.0, 200.0, 300.0)
"""eV/Å; where the reference force is at least so large, ``universal`` lowers its δ."""

FACTORS = (1.0, 0.7, 0.4, 0.1)
"""Of δ, below the first of ``BOUNDS``, below the second, …"""


def weighted(
    model: Potential,
    *,
    energy: float = 1.0,
    forces: float = 100.0,
    stress: float = 0.0,
    virials: float = 0.0,
    hessian: float = 0.0,
    moments: float = 0.0,
    error: str = "mse",
    delta: float = 0.01,
    compare: str = "magnitude",
) -> LossFn:
    r"""Weighted mean errors of energy, forces, stress, virials, curvature and magnetic moments.

    .. math:: \lambda_E \langle e(\Delta E/N) \rangle + \lambda_F \langle e(\Delta F) \rangle
              + \lambda_S \langle e(\Delta\sigma) \rangle + \lambda_V \langle e(\Delta V/N) \rangle
              + \lambda_H \langle e(\Delta Hv) \rangle + \lambda_M \langle e(\Delta\mu) \rangle

    Each mean runs over what is labelled, Σ w e / W with W the sum of the weights in
    ``batch.totals``: a missing label is neither a zero nor part of the count, and weight 2 is the
    frame twice, whatever the error. A term without any label in the batch is 0.

    =============  ===========================================================================
    ``error``      e, a mean over components unless it says otherwise
    =============  ===========================================================================
    ``mse``        x²
    ``mae``        \|x\|
    ``huber``      x²/2 up to δ, δ (\|x\| − δ/2) beyond
    ``universal``  the same, and for forces δ · 1, 0.7, 0.4, 0.1 where the reference force
                   is below 100, 200, 300 eV/Å, or not
    ``l2``         the length of a force error, \|x\| for all else
    =============  ===========================================================================

    Args:
      model: the potential.
      energy: λ_E; its unit makes the term a pure number, for ``mse`` (eV/atom)⁻².
      forces: λ_F; (eV/Å)⁻².
      stress: λ_S; (eV/Å³)⁻².
      virials: λ_V; (eV/atom)⁻², of V = −volume · σ.
      hessian: λ_H; (eV/Å)⁻², of the Hessian times the displacement that the batch carries for each
        frame, see :func:`jaxft.data.prepare`. Batches without such labels skip it.
      moments: λ_M; µB⁻²; of models with a head for them, :func:`jaxft.surgery.add_moments`.
      error: a name of the table.
      delta: δ of ``huber`` and ``universal``, in the unit of each term.
      compare: what of the moments, see :func:`jaxft.moments.differences`.

    Returns:
      A loss whose info holds ``energy``, ``forces``, ``stress``, and ``virials`` and ``hessian`` if
      they have weight: the means, not multiplied by λ; :func:`mean_squares` under the names
      ``SQUARES``, that of the Hessian under ``HESSIAN_SQUARES``; and of moments, where the batch
      carries any, :func:`moment_errors` and ``moments``.

    Raises:
      ValueError: an unknown error or comparison, a negative λ, none that is positive, δ not above
        0, or moments of a model that has none; while it is compiled, that the Hessian or moments
        have weight and the batch was prepared without them.

    Reference: the Hessian of random columns after Koker et al., arXiv:2601.07742, of random
    directions after arXiv:2603.04523. All else: mace-torch's
    ``WeightedEnergyForcesStressLoss``, ``WeightedEnergyForcesVirialsLoss``,
    ``WeightedHuberEnergyForcesStressLoss``, ``UniversalLoss`` and ``WeightedEnergyForcesL1L2Loss``,
    equal to each where all labels exist with weight 1. On purpose, weights and missing labels
    differ: there masked labels count in the means, the weights of labels lie inside ``universal``'s
    Huber function and scale the force that chooses δ, and ``huber`` and the forces of ``l2`` know
    no weights at all.
    """
    lambdas = _lambdas(
        energy=energy,
        forces=forces,
        stress=stress,
        virials=virials,
        hessian=hessian,
        moments=moments,
    )
    check_error(error, delta)
    check_comparison(model, compare, moments)

    def loss(params: Params, batch: Batch) -> tuple[Array, dict[str, Array]]:
        predicted, product = _predicted(model, params, batch, is_curved=hessian > 0)
        found = terms(predicted, batch, error=error, delta=delta)
        if not virials:
            del found["virials"]
        squares = mean_squares(predicted, batch)
        info = {SQUARES[name]: square for name, square in squares.items()}
        given = batch.curvature
        if product is not None and given is not None:
            found["hessian"] = curvature_term(product, given, error=error, delta=delta)
            info[HESSIAN_SQUARES] = curvature_term(product, given)
        found |= moment_term(predicted, batch, error=error, delta=delta, compare=compare)
        if moments and "moments" not in found:
            raise ValueError(
                "the loss weighs magnetic moments, and the batch carries none;\nprepare its frames "
                "(jaxft.data.prepare) for the model with the head."
            )
        info = found | info | moment_errors(model, predicted, batch, compare=compare)
        return sum(lambdas[name] * term for name, term in found.items()), info

    return loss


SQUARES = {name: f"{name}_squares" for name in ("energy", "forces", "stress")}
"""Where a loss's info holds :func:`mean_squares`."""


HESSIAN_SQUARES = "hessian_squares"
"""Likewise ⟨(ΔHv)²⟩, (eV/Å)², of losses with such a term."""


def mean_squares(predicted: Prediction | Labels, batch: Batch) -> dict[str, Array]:
    """⟨(ΔE/N)²⟩, ⟨ΔF²⟩ and ⟨Δσ²⟩ as in :func:`weighted`: whose roots are the RMSE."""
    found = terms(predicted, batch)
    return {name: found[name] for name in SQUARES}


def terms(
    predicted: Prediction | Labels, batch: Batch, *, error: str = "mse", delta: float = 0.01
) -> dict[str, Array]:
    """The four means of :func:`weighted`, for predictions that are given."""
    labels, weights, totals = batch.labels, batch.weights, batch.totals
    kind = ERRORS[error]
    energy = (predicted.energy - labels.energy) / batch.n_atoms
    stress = predicted.stress - labels.stress
    per_atom = batch.graph.volume / batch.n_atoms
    forces = kind.forces(predicted.forces - labels.forces, labels.forces, delta)
    virials = kind.number(stress * per_atom[:, None, None], delta)
    return {
        "energy": _mean(kind.number(energy, delta), weights.energy, totals.energy),
        "forces": _mean(forces, weights.forces, totals.forces),
        "stress": _mean(
            jnp.mean(kind.number(stress, delta), axis=(-2, -1)), weights.stress, totals.stress
        ),
        "virials": _mean(jnp.mean(virials, axis=(-2, -1)), weights.stress, totals.stress),
    }


def curvature_term(
    product: Array, given: Curvature, *, error: str = "mse", delta: float = 0.01
) -> Array:
    """⟨e(ΔHv)⟩ of :func:`weighted`, of Hessians times a batch's displacements, [N, 3] eV/Å."""
    off = jnp.mean(ERRORS[error].number(product - given.product, delta), axis=-1)
    return _mean(off, given.weight, given.total)


def _predicted(
    model: Potential, params: Params, batch: Batch, *, is_curved: bool
) -> tuple[Prediction, Array | None]:
    """The prediction and, if it is asked for, the Hessian times the batch's displacements."""
    graph, given = batch.graph, batch.curvature
    if not is_curved:
        return predict(model, params, graph), None
    if given is None:
        raise ValueError(
            "the Hessian has weight in the loss, but the batches carry no displacements;\n"
            "prepare their frames with probes='column' or 'gaussian'."
        )
    # second derivatives are dear: frames of co-training, say, have no such labels
    return jax.lax.cond(
        jnp.any(given.weight > 0),
        lambda params: predict_along(model, params, graph, given.probe),
        lambda params: (predict(model, params, graph), jnp.zeros_like(given.probe)),
        params,
    )


def moment_term(
    predicted: Prediction,
    batch: Batch,
    *,
    error: str = "mse",
    delta: float = 0.01,
    compare: str = "magnitude",
) -> dict[str, Array]:
    """``{"moments": ⟨e(Δµ)⟩}`` over labelled atoms; empty where model or batch has no moments."""
    if predicted.moments is None or batch.labels.moments is None:
        return {}
    errors = ERRORS[error].number(differences(predicted.moments, batch, compare), delta)
    return {"moments": _mean_of_atoms(errors, batch)}


MOMENT_ERRORS = ("moments_squares", "moments_errors", "moments_mean_errors")
"""Where a loss's info holds :func:`moment_errors`."""


def moment_errors(
    model: Potential, predicted: Prediction, batch: Batch, *, compare: str = "magnitude"
) -> dict[str, Array]:
    """⟨Δµ²⟩ and ⟨|Δµ|⟩; and where magnitudes are compared ⟨|Δµ|⟩ of predicting, for each atom,
    its element's mean."""
    if predicted.moments is None or batch.labels.moments is None:
        return {}
    delta = differences(predicted.moments, batch, compare)
    found = [delta**2, jnp.abs(delta)]
    if compare == "magnitude":
        found.append(jnp.abs(offsets_of_means(model, batch)))
    means = (_mean_of_atoms(each, batch) for each in found)
    return dict(zip(MOMENT_ERRORS, means, strict=False))


def _mean_of_atoms(values: Array, batch: Batch) -> Array:
    """Of [N] or [N, 3], by the weights of the moments."""
    per_atom = values.reshape(len(values), -1).mean(axis=-1)
    return _mean(per_atom, batch.weights.moments, batch.totals.moments)


def outputs(
    model: Potential,
    *,
    energy: float = 1.0,
    forces: float = 100.0,
    stress: float = 0.0,
    virials: float = 0.0,
    labelled_only: bool = False,
) -> Callable[[Params, Batch], Array]:
    r"""What the squared-error loss compares, as one vector: ‖outputs − labels‖² is the loss.

    The gradient of ``v @ outputs(params, batch)`` for a random v of unit variance samples the
    Gauss-Newton matrix of ``weighted(…, error="mse")``, halved; see :func:`jaxft.fisher`.

    Args:
      model: the potential.
      energy: λ_E, and so on, as in :func:`weighted`.
      forces: λ_F.
      stress: λ_S.
      virials: λ_V.
      labelled_only: leave out what has no label, and use the batch's weights. By default every
        frame counts once with energy, forces and, where it is periodic, stress: no labels needed.

    Returns:
      ``(params, batch) -> [G + 3N + 9G + 9G]``, each entry times the square root of its weight in
      the loss, λ w / W over the number of components; zeros for padding. See :func:`scaled`.

    Raises:
      ValueError: a negative λ, or none that is positive.
    """
    lambdas = _lambdas(energy=energy, forces=forces, stress=stress, virials=virials)

    def vector(params: Params, batch: Batch) -> Array:
        weighed = batch if labelled_only else all_labelled(batch)
        return scaled(predict(model, params, batch.graph), weighed, lambdas)

    return vector


def scaled(values: Prediction | Labels, batch: Batch, lambdas: dict[str, float]) -> Array:
    """Predictions or labels as the vector of :func:`outputs`; λ by name of the term."""
    weights, totals = batch.weights, batch.totals

    def part(name: str, value: Array, weight: Array, total: Array) -> Array:
        count = math.prod(value.shape[1:])
        factor = lambdas.get(name, 0.0) * weight / (count * jnp.where(total > 0, total, 1.0))
        return (value.reshape(len(weight), count) * jnp.sqrt(factor)[:, None]).reshape(-1)

    virials = -values.stress * (batch.graph.volume / batch.n_atoms)[:, None, None]
    return jnp.concatenate(
        [
            part("energy", values.energy / batch.n_atoms, weights.energy, totals.energy),
            part("forces", values.forces, weights.forces, totals.forces),
            part("stress", values.stress, weights.stress, totals.stress),
            part("virials", virials, weights.stress, totals.stress),
        ]
    )


def all_labelled(batch: Batch) -> Batch:
    """The batch with weight 1 for whatever a label could say: stress where there is a volume."""
    graph = batch.graph
    # a volume of exactly 1 stands for none, see Graph
    periodic = graph.is_graph & (graph.volume != 1)
    kind = graph.volume.dtype
    weights = Weights(*(x.astype(kind) for x in (graph.is_graph, graph.is_atom, periodic)))
    return batch._replace(weights=weights, totals=totals_of(weights))


class Error(NamedTuple):
    """How far off is how bad."""

    number: Callable[[Array, float], Array]
    """(difference, δ), for each component."""
    forces: Callable[[Array, Array, float], Array]
    """(difference [N, 3], reference [N, 3], δ) -> [N]."""


def _square(x: Array, delta: float | Array) -> Array:
    return x**2


def _absolute(x: Array, delta: float | Array) -> Array:
    return x * jnp.sign(x)  # the gradient of abs is 1 at 0, this one's is 0


def _huber(x: Array, delta: float | Array) -> Array:
    size = jnp.abs(x)
    return jnp.where(size <= delta, 0.5 * x**2, delta * (size - 0.5 * delta))


def _components(number: Callable[[Array, Array], Array]) -> Error:
    def forces(x: Array, reference: Array, delta: float) -> Array:
        return jnp.mean(number(x, delta), axis=-1)

    return Error(number, forces)


def _conditional(x: Array, reference: Array, delta: float) -> Array:
    size = jnp.linalg.norm(reference, axis=-1)
    factors = jnp.asarray(FACTORS, x.dtype)
    index = jnp.searchsorted(jnp.asarray(BOUNDS, x.dtype), size, side="right")
    return jnp.mean(_huber(x, delta * factors[index][:, None]), axis=-1)


def _length(x: Array, reference: Array, delta: float) -> Array:
    square = jnp.sum(x**2, axis=-1)
    # the gradient of a root at 0 is infinite, and times 0 not a number
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


ERRORS = {
    "mse": _components(_square),
    "mae": _components(_absolute),
    "huber": _components(_huber),
    "universal": Error(_huber, _conditional),
    "l2": Error(_absolute, _length),
}


def check_error(error: str, delta: float) -> None:
    """Raises ValueError unless this is an error with a δ that makes sense."""
    if error not in ERRORS:
        raise ValueError(
            f"error={error!r} is unknown; expected one of {', '.join(map(repr, ERRORS))}."
        )
    if not (delta > 0 and math.isfinite(delta)):
        raise ValueError(f"delta={delta} is no width; expected a number above 0, such as 0.01.")


def _lambdas(**given: float) -> dict[str, float]:
    for name, value in given.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"the weight {name}={value} is impossible; use a number >= 0.")
    if not any(given.values()):
        raise ValueError("all terms of the loss have weight 0; give one of them a weight above 0.")
    return given


def _mean(values: Array, weights: Array, total: Array) -> Array:
    """Σ w x / W, and 0 (with zero gradient) where nothing has weight."""
    return jnp.sum(weights * values) / jnp.where(total > 0, total, 1.0)
