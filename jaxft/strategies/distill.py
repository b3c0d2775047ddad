"""Self-distillation: predictions stay near those of the model that training starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jaxft.graph import Batch, Graph, sum_atoms
from jaxft.strategies.base import Strategy
from jaxft.strategies.l2sp import check_strength
from jaxft.typing import Array, Consts, Coords, Params


class Predicted(Protocol):
    """What a prediction must hold; :class:`jaxft.potential.Prediction` does."""

    @property
    def energy(self) -> Array:
        """[G] eV."""

    @property
    def forces(self) -> Array:
        """[N, 3] eV/Å."""

    @property
    def stress(self) -> Array:
        """[G, 3, 3] eV/Å³."""


def distill(
    predict: Callable[[Params, Graph], Predicted],
    *,
    strength: float,
    energy: float = 1.0,
    forces: float = 1.0,
    stress: float = 0.0,
    graphs: Literal["all", "unlabelled"] = "all",
    name: str = "distill",
) -> Strategy:
    r"""Functional regularisation: a penalty on changed predictions instead of changed parameters.

    .. math:: \lambda \left( w_E \langle (\Delta E/N)^2 \rangle + w_F \langle \Delta F^2 \rangle
              + w_S \langle \Delta\sigma^2 \rangle \right)

    Δ is the difference between the effective parameters and those that training starts from, on the
    batch's own structures. Means run over graphs, force components, and stress components of
    periodic graphs; padding is in none. With ``graphs="unlabelled"`` only structures without any
    label take part: frames to be remembered, which then need neither labels nor a head.

    At the start the penalty and its gradient are 0, in float32 to rounding. A step takes about
    twice the arithmetic: the teacher's energies and forces, which are not differentiated, and a
    second backward pass through the model.

    Args:
      predict: ``(params, graph) -> prediction``: ``functools.partial(jaxft.predict, model)``.
      strength: λ. 0 is plain fine-tuning, bitwise.
      energy: w_E, (eV/atom)⁻².
      forces: w_F, (eV/Å)⁻².
      stress: w_S, (eV/Å³)⁻².
      graphs: which structures of a batch.
      name: of the strategy.

    Returns:
      A strategy that trains everything and owns no coordinates.

    Raises:
      ValueError: a weight is negative or not finite, all three are 0, or ``graphs`` is unknown.

    Example:
      >>> def predict(params, graph):
      ...     return jaxft.predict(model, params, graph)
      >>> recipe = (distill(predict, strength=10.0, graphs="unlabelled"),)

    Reference: Li and Hoiem, ECCV 2016, arXiv:1606.09282 (learning without forgetting), with
    squared differences of energies and forces.
    """
    check_strength(strength, "distill")
    _check(energy, forces, stress, graphs)

    def init(key: Array, params: Params) -> tuple[Coords, Consts]:
        return {}, {"anchor": params}

    def penalty(params: Params, consts: Consts, batch: Batch) -> Array:
        if strength == 0:  # 0 · ∞ is not 0
            return jnp.zeros_like(jax.tree.leaves(params)[0], shape=())
        graph = batch.graph
        student = predict(params, graph)
        teacher = jax.lax.stop_gradient(predict(consts["anchor"], graph))
        chosen = graph.is_graph
        if graphs == "unlabelled":
            chosen = chosen & _is_unlabelled(batch)
        atoms = chosen[graph.graph_index]  # padding atoms belong to a padding graph
        total = jnp.zeros((), student.energy.dtype)
        if energy:
            change = (student.energy - teacher.energy) / batch.n_atoms
            total += energy * _mean(change**2, chosen)
        if forces:
            change = student.forces - teacher.forces
            total += forces * _mean(jnp.mean(change**2, axis=-1), atoms)
        if stress:
            change = student.stress - teacher.stress
            # a graph that is not periodic has volume 1 by convention, and no stress
            periodic = chosen & (graph.volume != 1)
            total += stress * _mean(jnp.mean(change**2, axis=(-2, -1)), periodic)
        return strength * total

    return Strategy(name=name, init=init, penalty=penalty, reads_batch=True, cites=("li2016lwf",))


def _is_unlabelled(batch: Batch) -> Array:
    """[G]: no label of the graph has weight."""
    weights = batch.weights
    return (weights.energy + weights.stress + sum_atoms(weights.forces, batch.graph)) == 0


def _mean(values: Array, chosen: Array) -> Array:
    """Over what is chosen; 0, with zero gradient, where nothing is."""
    count = jnp.maximum(chosen.sum(), 1)
    return jnp.sum(jnp.where(chosen, values, 0)) / count


def _check(energy: float, forces: float, stress: float, graphs: Any) -> None:
    weights = {"energy": energy, "forces": forces, "stress": stress}
    wrong = {key: value for key, value in weights.items() if not 0 <= value < float("inf")}
    if wrong or not any(weights.values()):
        given = ", ".join(f"{key}={value}" for key, value in (wrong or weights).items())
        raise ValueError(f"distill({given}) compares nothing; use finite weights >= 0, one > 0.")
    if graphs not in ("all", "unlabelled"):
        raise ValueError(f"distill(graphs={graphs!r}) is unknown; use 'all' or 'unlabelled'.")
