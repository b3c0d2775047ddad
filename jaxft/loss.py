"""Losses: functions ``(params, batch) -> scalar, {name: scalar}``."""

from __future__ import annotations

import jax.numpy as jnp

from jaxft.graph import Batch
from jaxft.potential import Potential, predict
from jaxft.typing import Array, LossFn, Params


def weighted(
    model: Potential, *, energy: float = 1.0, forces: float = 100.0, stress: float = 0.0
) -> LossFn:
    r"""Weighted mean squared errors of energy per atom, force components and stress components.

    .. math:: \lambda_E \langle (\Delta E/N)^2 \rangle + \lambda_F \langle \Delta F^2 \rangle
              + \lambda_S \langle \Delta\sigma^2 \rangle

    Each mean runs over what is labelled, Σ w x / Σ w with the sum of the weights in
    ``batch.totals``: a missing label is neither a zero nor part of the count, and weight 2 is the
    frame twice. A term without any label in the batch is 0.

    Args:
      model: the potential.
      energy: λ_E, (eV/atom)⁻².
      forces: λ_F, (eV/Å)⁻².
      stress: λ_S, (eV/Å³)⁻².

    Returns:
      A loss whose info holds ``energy``, ``forces``, ``stress``: the three means, unweighted by λ.

    Reference: ``WeightedEnergyForcesStressLoss`` of mace-torch, equal to it when all labels exist.
    """

    def loss(params: Params, batch: Batch) -> tuple[Array, dict[str, Array]]:
        predicted = predict(model, params, batch.graph)
        labels, weights, totals = batch.labels, batch.weights, batch.totals
        terms = {
            "energy": _mean(
                ((predicted.energy - labels.energy) / batch.n_atoms) ** 2,
                weights.energy,
                totals.energy,
            ),
            "forces": _mean(
                jnp.mean((predicted.forces - labels.forces) ** 2, axis=-1),
                weights.forces,
                totals.forces,
            ),
            "stress": _mean(
                jnp.mean((predicted.stress - labels.stress) ** 2, axis=(-2, -1)),
                weights.stress,
                totals.stress,
            ),
        }
        total = energy * terms["energy"] + forces * terms["forces"] + stress * terms["stress"]
        return total, terms

    return loss


def _mean(values: Array, weights: Array, total: Array) -> Array:
    """Σ w x / W, and 0 (with zero gradient) where nothing has weight."""
    return jnp.sum(weights * values) / jnp.where(total > 0, total, 1.0)
