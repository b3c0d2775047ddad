"""What a model sees of a frame: its atoms' scalar features, averaged by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxft import data
from jaxft.data import Frame
from jaxft.evaluate.predictions import cast, working_dtype
from jaxft.potential import Potential
from jaxft.typing import Array, Params


def _evaluate(model: Potential, params: Params, graph: Array) -> Array:
    return model.invariants(params, graph)


_invariants = jax.jit(_evaluate, static_argnums=0)


def descriptors(
    model: Potential,
    params: Params,
    frames: Sequence[Frame],
    *,
    head: str | None = None,
    batch_size: int = 16,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The mean scalar features of each frame's atoms, element by element.

    The features are those after every layer (:meth:`jaxft.Potential.invariants`). Where a frame
    lacks an element it has zeros: atoms of different elements then have nothing in common, and
    the squared Euclidean distance between frames is ``k(a, a) + k(b, b) - 2 k(a, b)`` with the
    kernel ``k(a, b) = Σ_z <x>_z · <x'>_z`` over the elements that both hold. It weighs the absence
    of an element by how long its features are, not by an arbitrary large number.

    Args:
      model: the potential.
      params: its parameters.
      frames: structures; their labels are not looked at.
      head: one of the model's, or none: all heads see the same features.
      batch_size: frames per batch.
      dtype: of the computation and the result; by default that of ``params``, as in
        :func:`predict_frames`.
      progress: called with (frames done, frames in total) after every batch.

    Returns:
      [frames, elements that occur, by atomic number, d]. With d = 256 in float32, ten thousand
      frames of ten elements take 0.1 GB.

    Raises:
      ValueError: as :func:`predict_frames`.

    Reference: ``calculate_descriptors`` of mace-torch's ``fine_tuning_select``, which fills the
    place of absent elements with 1e11.
    """
    params = cast(params, working_dtype(params, dtype))
    dtype = jax.tree.leaves(params)[0].dtype.name
    dataset = data.prepare(frames, model, head=model.heads[0] if head is None else head)
    shape = (len(frames), len(dataset.elements))
    means: np.ndarray | None = None
    done = 0
    for batch in data.epoch(dataset, batch_size, dtype=dtype) if frames else ():
        graph = batch.graph
        found = np.asarray(_invariants(model, params, graph), np.float64)[graph.is_atom]
        if means is None:
            means = np.zeros((*shape, found.shape[-1]), dtype)
        place = np.ravel_multi_index(
            (batch.frame[graph.graph_index], graph.species), shape, mode="clip"
        )[graph.is_atom]
        groups, members = np.unique(place, return_inverse=True)
        sums = np.zeros((len(groups), found.shape[-1]))
        np.add.at(sums, members, found)
        means.reshape(-1, found.shape[-1])[groups] = sums / np.bincount(members)[:, None]
        done += int((batch.frame >= 0).sum())
        if progress is not None:
            progress(done, len(frames))
    return np.zeros((0, 0, 0), dtype) if means is None else means
