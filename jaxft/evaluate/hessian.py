"""Second derivatives of a potential, exact: forward-mode over reverse-mode differentiation.

A product of the Hessian with a displacement, :func:`jaxft.potential.hvp`, costs about two to three
gradients; there is no step to choose, and periodic images need no supercell of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import ase
import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data import Frame, Shape, pack, prepare, unlabelled
from jaxft.effort import effort
from jaxft.evaluate.batches import plan_batches
from jaxft.evaluate.predictions import cast, packed_graph, working_dtype
from jaxft.graph import Graph, edges_per_block, fullest, in_blocks, num_blocks
from jaxft.potential import Potential, hvp
from jaxft.typing import Array, Params

DTYPE = "float64"
"""Of the computation: eigenvalues of a Hessian lose half of their digits as frequencies."""


def _along(model: Potential, params: Params, graph: Graph, displacements: Array) -> Array:
    """[C, N, 3] Å -> [C, N, 3] eV/Å: Hessian times displacements."""
    return jax.vmap(lambda u: hvp(model, params, graph, u))(displacements)


_products = jax.jit(_along, static_argnums=0)


@functools.cache
def _quickly() -> Callable[..., Array]:
    """The same, compiled quickly, for few edges in all calls."""
    return jax.jit(_along, static_argnums=0, compiler_options=dict(effort(0).options))


def hessian_products(
    model: Potential,
    params: Params,
    atoms: ase.Atoms,
    displacements: np.ndarray,
    *,
    head: str | None = None,
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The Hessian times displacements, without the Hessian.

    Args:
      model: the potential.
      params: its parameters.
      atoms: N atoms, periodic or not.
      displacements: [k, N, 3] Å.
      head: of the model; not needed with one head.
      chunk: displacements per call, which bounds the memory; by default as many as keep a call at
        the size of :data:`jaxft.graph.EDGES_PER_BLOCK`. Results depend on it by rounding only.
      progress: called with (displacements done, in total) after every call.

    Returns:
      [k, N, 3] eV/Å, float64: the force constants contracted with each displacement.

    Raises:
      ValueError: the shape is another, ``chunk`` is less than 1, JAX has float64 switched off, or
        the structure is none for this model (before anything is compiled).
    """
    displacements = np.asarray(displacements, np.float64)
    if displacements.ndim != 3 or displacements.shape[1:] != (len(atoms), 3):
        raise ValueError(
            f"displacements of shape {displacements.shape} were given for {len(atoms)} atoms;\n"
            f"use [k, {len(atoms)}, 3] in Å."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunks of {chunk} displacements are not possible; use chunk >= 1.")
    params = cast(params, working_dtype(params, DTYPE))
    graph = _graph(model, atoms, head)
    slots = int(np.prod(graph.senders.shape))
    chunk = chunk or max(1, edges_per_block(None) // max(slots, 1))
    chunk = min(chunk, max(len(displacements), 1))
    padded = np.zeros((-(-len(displacements) // chunk) * chunk, graph.n_node, 3))
    padded[: len(displacements), : len(atoms)] = displacements
    found = []
    for start in range(0, len(padded), chunk):
        part = _products(model, params, graph, jnp.asarray(padded[start : start + chunk]))
        found.append(np.asarray(part)[:, : len(atoms)])
        if progress is not None:
            progress(min(start + chunk, len(displacements)), len(displacements))
    return np.concatenate([*found, np.zeros((0, len(atoms), 3))])[: len(displacements)]


def products_of_frames(
    model: Potential,
    params: Params,
    frames: Sequence[Frame],
    displacements: Sequence[np.ndarray],
    *,
    head: str | None = None,
    batch_size: int = 16,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """Hessians of many frames, each times a few displacements of its own, in batches.

    All batches have one static shape, as in :func:`jaxft.evaluate.predict_frames`, and large ones
    are evaluated in blocks.

    Args:
      model: the potential.
      params: its parameters.
      frames: structures; their labels are not looked at.
      displacements: [k, n, 3] Å of each frame, with one k >= 1.
      head: of the model; not needed with one head.
      batch_size: largest frames per batch.
      dtype: of the computation; by default as :func:`jaxft.evaluate.predictions.working_dtype`.
      progress: called with (frames done, in total) after every batch.

    Returns:
      [k, n, 3] eV/Å of each frame, in their order, float64.

    Raises:
      ValueError: a shape is another, or as :func:`jaxft.evaluate.predict_frames`.
    """
    params = cast(params, working_dtype(params, dtype))
    kind = jax.tree.leaves(params)[0].dtype
    if not frames:
        return []
    if len(displacements) != len(frames):
        raise ValueError(
            f"displacements of {len(displacements)} frames were given for {len(frames)} frames;\n"
            "give those of each."
        )
    count = max(len(displacements[0]), 1)
    for frame, given in zip(frames, displacements, strict=True):
        if np.shape(given) != (count, len(frame), 3):
            raise ValueError(
                f"{frame.source}: displacements of shape {np.shape(given)} were given;\n"
                f"use [{count}, {len(frame)}, 3] in Å, as many of each frame."
            )
    dataset = prepare(frames, model, head=head)
    limit = max(1, edges_per_block(None) // count)
    shape, batches, blocks = plan_batches(dataset, batch_size, limit)
    few = effort(count * dataset.edges.sum(), model.channels).options
    program = _quickly() if few else _products
    results: dict[int, np.ndarray] = {}
    for chosen in batches:
        graph = packed_graph(dataset, chosen, shape, kind.name, blocks=blocks)
        ends = np.cumsum(dataset.nodes[chosen])
        padded = np.zeros((count, graph.n_node, 3), kind)
        padded[:, : ends[-1]] = np.concatenate([displacements[i] for i in chosen], axis=1)
        found = np.asarray(program(model, params, graph, jnp.asarray(padded)), np.float64)
        parts = np.split(found[:, : ends[-1]], ends[:-1], axis=1)
        results.update(zip(chosen, parts, strict=True))
        if progress is not None:
            progress(len(results), len(frames))
    return [results[i] for i in range(len(frames))]


def force_constants(
    model: Potential,
    params: Params,
    atoms: ase.Atoms,
    chosen: Sequence[int] | np.ndarray | None = None,
    *,
    head: str | None = None,
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Second derivatives of the energy, in the layout of phonopy.

    A periodic structure's atoms stand for all their images, so those of a supercell are what
    finite displacements in it converge to.

    Args:
      model: the potential.
      params: its parameters.
      atoms: N atoms; a supercell for phonons.
      chosen: atoms whose rows are wanted, all by default. With ``Phonopy.primitive.p2s_map`` the
        result is phonopy's compact form, at a cost that does not grow with the square of N.
      head: as in :func:`hessian_products`, like the two that follow.
      chunk: displacements per call.
      progress: called after every call.

    Returns:
      [len(chosen), N, 3, 3] eV/Å², float64; ``[a, b, i, j]`` is d²E/dr_ai dr_bj.

    Raises:
      ValueError: as :func:`hessian_products`.
    """
    chosen = np.arange(len(atoms)) if chosen is None else np.asarray(chosen, int)
    units = np.zeros((len(chosen), 3, len(atoms), 3))
    for row, atom in enumerate(chosen):
        units[row, :, atom] = np.eye(3)
    found = hessian_products(
        model,
        params,
        atoms,
        units.reshape(-1, len(atoms), 3),
        head=head,
        chunk=chunk,
        progress=progress,
    )
    return np.ascontiguousarray(found.reshape(len(chosen), 3, len(atoms), 3).transpose(0, 2, 1, 3))


def hessian(
    model: Potential,
    params: Params,
    atoms: ase.Atoms,
    *,
    head: str | None = None,
    chunk: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The matrix of second derivatives: [3N, 3N] eV/Å², float64, components of an atom together.

    Symmetric to rounding, and left as it is computed, so that its asymmetry can be looked at.

    Args:
      model: the potential.
      params: its parameters.
      atoms: N atoms, periodic or not.
      head: as in :func:`hessian_products`, like the two that follow.
      chunk: displacements per call.
      progress: called after every call.

    Raises:
      ValueError: as :func:`hessian_products`.
    """
    found = force_constants(model, params, atoms, head=head, chunk=chunk, progress=progress)
    size = 3 * len(atoms)
    return found.transpose(0, 2, 1, 3).reshape(size, size)


def _graph(model: Potential, atoms: ase.Atoms, head: str | None) -> Graph:
    """One structure and one padding atom, in blocks where it is large."""
    dataset = prepare([unlabelled(atoms, source=str(atoms.symbols))], model, head=head)
    (sample,) = dataset.samples
    n_node, n_row = len(atoms) + 1, max(len(sample.receivers), 1)
    blocks = num_blocks(n_row * dataset.row_width, n_node, edges_per_block(None))
    if blocks == 1:
        return pack(dataset, [0], Shape(n_node, n_row, 2), DTYPE).graph
    n_node = blocks * -(-n_node // blocks)
    n_row = blocks * max(fullest(sample.receivers, n_node, blocks), 1)
    graph = pack(dataset, [0], Shape(n_node, n_row, 2), DTYPE).graph
    return in_blocks(graph, blocks, r_max=dataset.r_max, n_row=n_row)
