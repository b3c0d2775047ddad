"""A model with its constants, and the energies, forces and stresses that follow from it.

Only the edge vectors are differentiated: with ``g = dE/dvector`` the forces are sums of ``g`` over
rows and senders, the virial is a sum of ``g ⊗ vector``, and there is no strain variable.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.graph import Graph, sum_atoms, sum_rows, sum_senders
from jaxft.models.config import MACEConfig
from jaxft.models.contraction import Coupling, compress
from jaxft.models.irreps import multiplicities
from jaxft.models.mace import Constants, ScaleShiftMACE
from jaxft.typing import Array, Params

E0_BUFFER = "atomic_energies_fn/atomic_energies"


class Prediction(NamedTuple):
    """What a potential says of a graph; padding entries are to be ignored."""

    energy: Array
    """[G] eV, interaction energy: isolated-atom energies are added on the host, in float64."""
    node_energy: Array
    """[N] eV, interaction energy per atom."""
    forces: Array
    """[N, 3] eV/Å."""
    stress: Array
    """[G, 3, 3] eV/Å³, ASE sign (positive under tension); meaningful for periodic graphs."""


@dataclass(frozen=True, eq=False)
class Potential:
    """Everything of a model but its trainable parameters. Pure: surgery returns a new one."""

    config: MACEConfig
    buffers: Mapping[str, np.ndarray]
    """Constants of the model file by path, in the file's own dtypes and layouts."""

    @property
    def atomic_numbers(self) -> tuple[int, ...]:
        return self.config.atomic_numbers

    @property
    def r_max(self) -> float:
        """Å."""
        return self.config.r_max

    @property
    def e0s(self) -> np.ndarray:
        """[elements] eV, float64."""
        return np.asarray(self.buffers[E0_BUFFER], np.float64).reshape(-1)

    def require_head(self, head: str | None) -> None:
        """Raises ValueError unless ``head`` is the model's only head, or None and it has one."""
        heads = self.config.heads
        if len(heads) == 1 and head in (None, heads[0]):
            return
        asked = "no head was named" if head is None else f"head {head!r} was asked for"
        raise ValueError(
            f"{asked}, but the model's heads are {', '.join(map(repr, heads))};\n"
            "name one of them (this version of jaxft predicts with models of one head)."
        )

    @property
    def module(self) -> ScaleShiftMACE:
        return ScaleShiftMACE(self.config)

    @functools.cached_property
    def constants(self) -> Constants:
        """Float64 numpy arrays derived from the buffers, once."""

        def number(path: str) -> np.ndarray:
            return np.asarray(self.buffers[path], np.float64)

        return Constants(
            frequencies=number("radial_embedding/bessel_fn/bessel_weights"),
            prefactor=number("radial_embedding/bessel_fn/prefactor"),
            scale=number("scale_shift/scale").reshape(()),
            shift=number("scale_shift/shift").reshape(()),
            couplings=tuple(self._couplings(i) for i in range(len(self.config.products))),
        )

    def _couplings(self, layer: int) -> dict[str, Coupling]:
        product = self.config.products[layer]
        found = {}
        for name in multiplicities(product.irreps_out):
            path = f"products_{layer}/symmetric_contractions/{name}"
            u = {nu: self.buffers[f"{path}/U_matrix_{nu}"] for nu in _orders(product.correlation)}
            found[name] = _compressed(tuple(u), *(_Hashed(value) for value in u.values()))
        return found

    def init(self, key: Array, *, dtype: str = "float32") -> Params:
        """Random parameters with torch MACE's initial distributions."""
        graph = _smallest_graph(self.r_max, dtype)
        return self.module.init(key, graph, self._cast(dtype))["params"]

    def node_energies(self, params: Params, graph: Graph) -> Array:
        """[N] eV, interaction energies; differentiable in parameters and edge vectors."""
        # JAX's default for float32 is TF32 on recent NVIDIA and bfloat16 on TPU; torch's is not.
        with jax.default_matmul_precision("highest"):
            return self.module.apply({"params": params}, graph, self._cast(graph.vectors.dtype))

    def _cast(self, dtype: str) -> Constants:
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), self.constants)


def predict(model: Potential, params: Params, graph: Graph) -> Prediction:
    """Energy, forces and stress of every graph. Pure; jit it with ``model`` closed over."""

    def total(vectors: Array) -> tuple[Array, Array]:
        node_energy = model.node_energies(params, graph._replace(vectors=vectors))
        return node_energy.sum(), node_energy

    gradient, node_energy = jax.grad(total, has_aux=True)(graph.vectors)
    # receiver minus sender: dE/dr is +g on the receiver and -g on the sender
    forces = sum_senders(gradient, graph) - sum_rows(gradient.sum(axis=1), graph)
    virial = jnp.einsum("rka,rkb->rab", gradient, graph.vectors, precision="highest")
    virial = sum_atoms(sum_rows(virial, graph), graph)
    stress = 0.5 * (virial + virial.swapaxes(1, 2)) / graph.volume[:, None, None]
    return Prediction(sum_atoms(node_energy, graph), node_energy, forces, stress)


def _orders(correlation: int) -> range:
    return range(1, correlation + 1)


class _Hashed:
    """An array that a cache can key on by content: the same couplings recur in every layer."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self._key = (array.shape, array.dtype.str, array.tobytes())

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self._key == other._key


@functools.lru_cache(maxsize=32)
def _compressed(orders: tuple[int, ...], *tensors: _Hashed) -> Coupling:
    u = {nu: tensor.array for nu, tensor in zip(orders, tensors, strict=True)}
    components = u[1].shape[0] if u[1].ndim == 3 else 1
    return compress(u, components)


def _smallest_graph(r_max: float, dtype: str) -> Graph:
    return Graph(
        vectors=jnp.full((1, 1, 3), 0.3 * r_max, dtype),
        senders=jnp.zeros((1, 1), jnp.int32),
        receivers=jnp.zeros(1, jnp.int32),
        species=jnp.zeros(1, jnp.int32),
        elements=jnp.zeros(1, jnp.int32),
        graph_index=jnp.zeros(1, jnp.int32),
        volume=jnp.ones(1, dtype),
        is_atom=jnp.ones(1, bool),
        is_graph=jnp.ones(1, bool),
    )
