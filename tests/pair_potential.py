"""A pair potential with the face of a model: compiles at once, and its physics is known."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxft.graph import sum_rows

ARGON = {"epsilon": np.array(0.0104), "sigma": np.array(3.4), "repulsion": np.array(1.0)}
"""eV, Å."""


@dataclass(frozen=True, eq=False)
class LennardJones:
    """4 ε (repulsion (σ/r)¹² - (σ/r)⁶) times (1 - (r/r_max)²)³, for argon and helium alike."""

    r_max: float = 6.0
    atomic_numbers: tuple = (2, 18)
    heads: tuple = ("Default",)
    embeddings: tuple = ()
    moments: None = None
    e0s = np.array([[-1.0, -3.0]])

    def head_index(self, head=None):
        return 0

    def pair(self, params, r):
        sixth = (params["sigma"] / r) ** 6
        smooth = jnp.clip(1 - (r / self.r_max) ** 2, 0.0) ** 3
        return 4 * params["epsilon"] * (params["repulsion"] * sixth**2 - sixth) * smooth

    def node_energies(self, params, graph):
        r = jnp.sqrt((graph.vectors**2).sum(-1))
        return sum_rows(0.5 * self.pair(params, r).sum(-1), graph)

    def node_outputs(self, params, graph):
        return self.node_energies(params, graph), None


@dataclass(frozen=True, eq=False)
class Abrupt(LennardJones):
    """Without the last factor: a pair that is missed at the cutoff is seen in the energy."""

    def pair(self, params, r):
        sixth = (params["sigma"] / r) ** 6
        pairs = 4 * params["epsilon"] * (params["repulsion"] * sixth**2 - sixth)
        return jnp.where(r < self.r_max, pairs, 0.0)


@dataclass(frozen=True, eq=False)
class Springs(LennardJones):
    """k/2 (r - r0)² within the cutoff."""

    def pair(self, params, r):
        return jnp.where(r < self.r_max, 0.5 * params["k"] * (r - params["r0"]) ** 2, 0.0)
