"""A model with its constants, and the energies, forces and stresses that follow from it.

Only the edge vectors are differentiated: with ``g = dE/dvector`` the forces are sums of ``g`` over
rows and senders, the virial is a sum of ``g ⊗ vector``, and there is no strain variable. A
displacement u of the atoms moves an edge by ``u[receiver] - u[sender]``, so the Hessian times u is
the same sums of the derivative of g along these, and periodic images need no supercell.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.graph import Graph, sum_atoms, sum_rows, sum_senders, take
from jaxft.models.backend import XLA, Backend, choose
from jaxft.models.config import EmbeddingConfig, MACEConfig, MomentsConfig
from jaxft.models.contraction import Coupling, compress, noise_of
from jaxft.models.irreps import multiplicities
from jaxft.models.mace import MACE, Constants
from jaxft.typing import Array, Params

E0_BUFFER = "atomic_energies_fn/atomic_energies"
MEANS_BUFFER = "moments/means"
"""[elements] µB: means of |µ| in the labels that a moment head was made for."""


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
    moments: Array | None = None
    """[N] µB, or [N, 3] of a head for vectors; None without a moment head."""


@dataclass(frozen=True, eq=False)
class Potential:
    """Everything of a model but its trainable parameters. Pure: surgery returns a new one."""

    config: MACEConfig
    buffers: Mapping[str, np.ndarray]
    """Constants of the model file by path, in the file's own dtypes and layouts."""
    backend: Backend = XLA
    """Who computes messages and contractions: how, never what. Not part of a bundle."""

    def with_backend(self, asked: str = "auto", precision: str = "parity") -> Potential:
        """The same potential, computed by ``auto``, ``xla`` or ``cueq``, and as exactly as
        :mod:`jaxft.models.precision` says.

        Raises:
          ValueError: there is no such backend or precision, or it cannot be used here or for this
            model.
        """
        backend = choose(asked, precision).backend
        backend.check(self.config)
        return replace(self, backend=backend)

    @property
    def atomic_numbers(self) -> tuple[int, ...]:
        return self.config.atomic_numbers

    @property
    def r_max(self) -> float:
        """Å."""
        return self.config.r_max

    @property
    def channels(self) -> int:
        """Hidden features of a kind, at most: 128 of MACE-MP-0."""
        layers = (multiplicities(layer.hidden_irreps) for layer in self.config.interactions)
        return max(count for layer in layers for count in layer.values())

    @property
    def heads(self) -> tuple[str, ...]:
        """Levels of theory that the model speaks for, at least one."""
        return self.config.heads

    @property
    def embeddings(self) -> tuple[EmbeddingConfig, ...]:
        """Features of graphs and atoms that the model reads, such as the total charge."""
        return self.config.embeddings

    @property
    def moments(self) -> MomentsConfig | None:
        """The head for magnetic moments, if there is one; :func:`jaxft.surgery.add_moments`."""
        return self.config.moments

    @property
    def mean_moments(self) -> np.ndarray | None:
        """[elements] µB, each element's mean |µ|, of models with a moment head: what a prediction
        has to beat."""
        return None if self.moments is None else np.asarray(self.buffers[MEANS_BUFFER], np.float64)

    @property
    def e0s(self) -> np.ndarray:
        """[heads, elements] eV, float64."""
        table = np.asarray(self.buffers[E0_BUFFER], np.float64)
        return table.reshape(len(self.heads), len(self.atomic_numbers))

    def head_index(self, head: str | None = None) -> int:
        """The position of a head; None is the only one.

        Raises:
          ValueError: there is no such head, or several and none was named.
        """
        if head is None and len(self.heads) == 1:
            return 0
        if head in self.heads:
            return self.heads.index(head)
        asked = "no head was named" if head is None else f"head {head!r} was asked for"
        raise ValueError(
            f"{asked}, but the model's heads are {', '.join(map(repr, self.heads))};\n"
            "name one of them."
        )

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the architecture and the constants but the isolated-atom energies, rounded to
        float32: whatever dtype they are loaded in."""
        found = hashlib.sha256(self.config.model_dump_json().encode())
        for name, value in sorted(self.buffers.items()):
            if name != E0_BUFFER:
                found.update(f"{name} {np.shape(value)}\n".encode())
                found.update(np.ascontiguousarray(value, np.float32).tobytes())
        return found.hexdigest()[:16]

    @property
    def module(self) -> MACE:
        return MACE(self.config, self.backend)

    @functools.cached_property
    def constants(self) -> Constants:
        """Float64 numpy arrays derived from the buffers, once."""

        def number(path: str) -> np.ndarray:
            return np.asarray(self.buffers[path], np.float64)

        def heads(name: str, default: float) -> np.ndarray:
            # plain MACE models have neither scale nor shift
            path = f"scale_shift/{name}"
            value = number(path) if path in self.buffers else np.asarray(default)
            return np.broadcast_to(value.reshape(-1), (len(self.heads),))

        return Constants(
            basis=self._numbers("radial_embedding/bessel_fn"),
            transform=self._numbers("radial_embedding/distance_transform"),
            repulsion=self._numbers("pair_repulsion_fn"),
            charges=np.asarray(self.atomic_numbers, np.float64),
            scale=heads("scale", 1.0),
            shift=heads("shift", 0.0),
            couplings=tuple(self._couplings(i) for i in range(len(self.config.products))),
        )

    def _numbers(self, module: str) -> dict[str, np.ndarray]:
        """The buffers of one module; tables over atomic numbers become tables over elements."""
        found = {}
        for path, buffer in self.buffers.items():
            parent, _, name = path.rpartition("/")
            if parent == module:
                value = np.asarray(buffer, np.float64)
                found[name] = (
                    value[list(self.atomic_numbers)] if name == "covalent_radii" else value
                )
        return found

    def _couplings(self, layer: int) -> Any:
        product = self.config.products[layer]
        found, noise = {}, 0.0
        for name in multiplicities(product.irreps_out):
            path = f"products_{layer}/symmetric_contractions/{name}"
            u = {nu: self.buffers[f"{path}/U_matrix_{nu}"] for nu in _orders(product.correlation)}
            found[name] = _compressed(tuple(u), *(_Hashed(value) for value in u.values()))
            noise = max(noise, noise_of(u.values()))
        channels = next(iter(multiplicities(product.irreps_in).values()))
        return self.backend.couple(found, channels, noise)

    def init(self, key: Array, *, dtype: str = "float32") -> Params:
        """Random parameters with torch MACE's initial distributions."""
        graph = _smallest_graph(self, dtype)
        return self.module.init(key, graph, self._cast(dtype))["params"]

    def node_energies(self, params: Params, graph: Graph) -> Array:
        """[N] eV, interaction energies; differentiable in parameters and edge vectors."""
        with jax.default_matmul_precision(self.backend.precision.features):
            return self.module.apply({"params": params}, graph, self._cast(graph.vectors.dtype))

    def node_outputs(self, params: Params, graph: Graph) -> tuple[Array, Array | None]:
        """[N] eV as :meth:`node_energies`, and moments as in :class:`Prediction`."""
        if self.moments is None:
            return self.node_energies(params, graph), None
        with jax.default_matmul_precision(self.backend.precision.features):
            energies, kept = self.module.apply(
                {"params": params},
                graph,
                self._cast(graph.vectors.dtype),
                mutable=["intermediates"],
            )
        return energies, kept["intermediates"]["magnetic_moments"][0]

    def invariants(self, params: Params, graph: Graph) -> Array:
        """[N, d]: the scalar features of the atoms after every layer, one layer after the other.

        Reference: ``MACECalculator.get_descriptors(invariants_only=True)`` of mace-torch.
        """
        with jax.default_matmul_precision(self.backend.precision.features):
            _, kept = self.module.apply(
                {"params": params},
                graph,
                self._cast(graph.vectors.dtype),
                mutable=["intermediates"],
            )
        return jnp.concatenate(kept["intermediates"]["invariants"], axis=-1)

    def _cast(self, dtype: str) -> Constants:
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), self.constants)


def predict(model: Potential, params: Params, graph: Graph) -> Prediction:
    """Energy, forces and stress of every graph. Pure; jit it with ``model`` closed over."""
    gradient, per_atom = _gradient(model, params, graph)(graph.vectors)
    return _prediction(graph, gradient, *per_atom)


def predict_along(
    model: Potential, params: Params, graph: Graph, displacement: Array
) -> tuple[Prediction, Array]:
    """:func:`predict` and :func:`hvp`, sharing the gradient that both need.

    Args:
      model, params, graph: as in :func:`predict`.
      displacement: [N, 3] Å, zero where there is only padding.

    Returns:
      The prediction, and [N, 3] eV/Å.
    """
    tangents = _edges_along(graph, displacement)
    gradient = _gradient(model, params, graph)
    value, change, per_atom = jax.jvp(gradient, (graph.vectors,), (tangents,), has_aux=True)
    return _prediction(graph, value, *per_atom), _onto_atoms(graph, change)


def hvp(model: Potential, params: Params, graph: Graph, displacement: Array) -> Array:
    """Hessian of the energy times a displacement of all atoms, by forward over reverse mode.

    The derivative of minus the forces along the displacement: positive as force constants are.
    Pure, and differentiable in parameters.

    Args:
      model, params, graph: as in :func:`predict`.
      displacement: [N, 3] Å; graphs of a batch do not feel one another's.

    Returns:
      [N, 3] eV/Å.
    """

    def gradient(vectors: Array) -> Array:
        return _gradient(model, params, graph)(vectors)[0]

    tangents = _edges_along(graph, displacement)
    _, change = jax.jvp(gradient, (graph.vectors,), (tangents,))
    return _onto_atoms(graph, change)


def _gradient(
    model: Potential, params: Params, graph: Graph
) -> Callable[[Array], tuple[Array, tuple[Array, Array | None]]]:
    """Edge vectors -> dE/dvector, and the atoms' energies and magnetic moments."""

    def total(vectors: Array) -> tuple[Array, tuple[Array, Array | None]]:
        node_energy, moments = model.node_outputs(params, graph._replace(vectors=vectors))
        return node_energy.sum(), (node_energy, moments)

    return jax.grad(total, has_aux=True)


def _prediction(
    graph: Graph, gradient: Array, node_energy: Array, moments: Array | None
) -> Prediction:
    # receiver minus sender: dE/dr is +g on the receiver and -g on the sender
    forces = sum_senders(gradient, graph) - sum_rows(gradient.sum(axis=1), graph)
    virial = jnp.einsum("rka,rkb->rab", gradient, graph.vectors, precision="highest")
    virial = sum_atoms(sum_rows(virial, graph), graph)
    stress = 0.5 * (virial + virial.swapaxes(1, 2)) / graph.volume[:, None, None]
    return Prediction(sum_atoms(node_energy, graph), node_energy, forces, stress, moments)


def _edges_along(graph: Graph, displacement: Array) -> Array:
    """[N, 3] -> [R, K, 3]: how edge vectors change."""
    return take(displacement, graph.receivers)[:, None] - take(displacement, graph.senders)


def _onto_atoms(graph: Graph, change: Array) -> Array:
    """Derivatives by edge vectors, [R, K, 3], as derivatives by positions, [N, 3]."""
    return sum_rows(change.sum(axis=1), graph) - sum_senders(change, graph)


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


def _smallest_graph(model: Potential, dtype: str) -> Graph:
    return Graph(
        vectors=jnp.full((1, 1, 3), 0.3 * model.r_max, dtype),
        senders=jnp.zeros((1, 1), jnp.int32),
        receivers=jnp.zeros(1, jnp.int32),
        species=jnp.zeros(1, jnp.int32),
        elements=jnp.zeros(1, jnp.int32),
        graph_index=jnp.zeros(1, jnp.int32),
        volume=jnp.ones(1, dtype),
        is_atom=jnp.ones(1, bool),
        is_graph=jnp.ones(1, bool),
        head=jnp.zeros(1, jnp.int32),
        features={e.name: jnp.zeros((1, e.in_dim), dtype) for e in model.embeddings},
    )
