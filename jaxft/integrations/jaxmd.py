"""An energy function for jax-md, for those who want its integrators and minimisers.

jax-md is imported here and nowhere else; ``pip install 'jaxft[jaxmd]'``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data import unlabelled
from jaxft.data.batches import check_elements
from jaxft.evaluate.predictions import cast, working_dtype
from jaxft.graph import PADDING_DISTANCE, Blocks, Graph, edges_per_block, num_blocks
from jaxft.potential import Potential
from jaxft.typing import Array, Params

EnergyFn = Callable[..., Array]


def neighbor_list_energy(
    model: Potential,
    params: Params,
    displacement: Callable[..., Array],
    box: Array,
    atomic_numbers: np.ndarray,
    *,
    head: str | None = None,
    dtype: str | None = None,
    **neighbor_options: Any,
) -> tuple[Any, EnergyFn]:
    """``neighbor_fn, energy_fn`` as jax-md's own ``energy.*_neighbor_list`` return them.

    ``energy_fn(R, neighbor, **kwargs)`` is the interaction energy in eV for positions in Å:
    isolated-atom energies are a constant (:func:`isolated_atom_energy`) and would cost digits in
    float32. It is differentiable and can be jitted; ``kwargs`` such as ``box`` go to
    ``displacement``. Masses, times and temperatures are up to the caller: with masses in amu the
    unit of time is ``ase.units``'.

    jax-md's displacements know one image of every neighbour, so the box must be at least twice the
    cutoff wide. Look at ``neighbor.did_buffer_overflow``, as jax-md says: neighbours that found no
    place are missing.

    Args:
      model: the potential; one that reads charges or other features is refused.
      params: its parameters.
      displacement: from ``jax_md.space``, or a free one.
      box: Å, as jax-md wants it: edges, or columns of lattice vectors.
      atomic_numbers: [n].
      head: of the model; not needed with one head.
      dtype: of the computation, as in :func:`jaxft.evaluate.predict_frames`.
      neighbor_options: to ``jax_md.partition.neighbor_list``: ``dr_threshold`` (Å),
        ``capacity_multiplier``, ``fractional_coordinates``, …

    Raises:
      ImportError: jax-md is not installed.
      ValueError: an element that the model does not know, a model that reads features, an unknown
        head, or a box that is too narrow for the cutoff.

    Example::

      displacement, shift = jax_md.space.periodic(box)
      neighbor_fn, energy_fn = neighbor_list_energy(model, params, displacement, box, numbers)
      neighbor = neighbor_fn.allocate(R)
      forces = -jax.grad(energy_fn)(R, neighbor)
    """
    try:
        from jax_md import partition
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"jax-md cannot be imported ({error});\nuse pip install 'jaxft[jaxmd]'."
        ) from error
    _check_box(np.asarray(box, np.float64), model.r_max)
    fixed = _Fixed(model, cast(params, working_dtype(params, dtype)), atomic_numbers, head)
    neighbor_fn = partition.neighbor_list(
        displacement,
        box,
        model.r_max,
        format=partition.NeighborListFormat.Dense,
        **neighbor_options,
    )

    def energy_fn(R: Array, neighbor: Any, **kwargs: Any) -> Array:
        return fixed.energy(R, neighbor.idx, partial(displacement, **kwargs))

    return neighbor_fn, energy_fn


def isolated_atom_energy(
    model: Potential, atomic_numbers: np.ndarray, *, head: str | None = None
) -> float:
    """eV, what :func:`neighbor_list_energy` leaves out."""
    table = list(model.atomic_numbers)
    places = [table.index(int(z)) for z in atomic_numbers]
    return float(model.e0s[model.head_index(head)][places].sum())


def _check_box(box: np.ndarray, r_max: float) -> None:
    lattice = np.diag(np.broadcast_to(box, 3)) if box.ndim < 2 else box.T
    widths = 1 / np.linalg.norm(np.linalg.inv(lattice), axis=0)
    if widths.min() < 2 * r_max:
        raise ValueError(
            f"the box is {widths.min():.2f} Å wide, but jax-md's displacements need twice the "
            f"cutoff, {2 * r_max:g} Å;\nrepeat the cell, or use jaxft.md.Simulation, which sees "
            "every image."
        )


class _Fixed:
    """All of a graph but its geometry."""

    def __init__(
        self, model: Potential, params: Params, numbers: np.ndarray, head: str | None
    ) -> None:
        import ase

        if model.embeddings:
            names = ", ".join(repr(e.name) for e in model.embeddings)
            raise ValueError(f"the model reads {names}, which jax-md has no place for.")
        frame = unlabelled(ase.Atoms(numbers=numbers), source="the system")
        check_elements([frame], model.atomic_numbers)
        self.model, self.params = model, params
        self.n_atom = len(frame)
        self.dtype = jax.tree.leaves(params)[0].dtype
        self.head = model.head_index(head)
        present = np.unique(frame.atomic_numbers)
        table = list(model.atomic_numbers)
        self.elements = np.array([table.index(z) for z in present], np.int32)
        self.species = np.searchsorted(present, frame.atomic_numbers).astype(np.int32)

    def energy(self, positions: Array, idx: Array, displacement: Callable[..., Array]) -> Array:
        """eV; a row of slots per atom, the free ones with index n."""
        n, far = self.n_atom, PADDING_DISTANCE * self.model.r_max
        is_edge = idx < n
        safe = jnp.where(is_edge, idx, 0)
        pairs = jax.vmap(jax.vmap(displacement, (None, 0)))(positions, positions[safe])
        apart = jnp.zeros(3, positions.dtype).at[0].set(far)
        vectors = jnp.where(is_edge[..., None], pairs, apart).astype(self.dtype)
        blocks = num_blocks(idx.size, n + 1, edges_per_block(None))
        n_node = blocks * -(-(n + 1) // blocks)
        spare = n_node - n

        def padded(array: Array, value: float) -> Array:
            widths = [(0, spare), *[(0, 0)] * (array.ndim - 1)]
            return jnp.pad(array, widths, constant_values=value)

        vectors = padded(vectors, 0.0).at[n:, :, 0].set(far)
        graph = Graph(
            vectors=vectors,
            senders=padded(jnp.where(is_edge, idx, n_node - 1), n_node - 1).astype(jnp.int32),
            receivers=jnp.arange(n_node, dtype=jnp.int32),
            species=padded(self.species, 0),
            elements=jnp.asarray(self.elements),
            graph_index=(jnp.arange(n_node) >= n).astype(jnp.int32),
            volume=jnp.ones(2, self.dtype),
            is_atom=jnp.arange(n_node) < n,
            is_graph=jnp.array([True, False]),
            head=jnp.full(2, self.head, jnp.int32),
            features={},
            blocks=Blocks(blocks),
        )
        return self.model.node_energies(self.params, graph)[:n].sum()
