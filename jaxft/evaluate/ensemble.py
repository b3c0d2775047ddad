"""Several models' opinions of the same frames: potentials of one architecture in one jitted call.

Leaves that all members share are kept once and not batched, so the trunk of a last-layer ensemble
is evaluated once for all of them, and only its backward pass per member.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ase
import jax
import jax.numpy as jnp
import numpy as np

from jaxft import tree
from jaxft.data import prepare, unlabelled
from jaxft.evaluate.batches import plan_batches
from jaxft.evaluate.candidate import (
    NOT_FINITE,
    Candidate,
    Flag,
    JaxCandidate,
    Outcome,
    ProgressFn,
)
from jaxft.evaluate.predictions import (
    FrameResult,
    cast,
    frame_results,
    packed_graph,
    working_dtype,
)
from jaxft.graph import Graph, edges_per_block
from jaxft.potential import Potential, Prediction, predict
from jaxft.strategies.delta import support_of
from jaxft.typing import Array, Params


@dataclass(frozen=True, eq=False)
class Stack:
    """Parameters of several members: by path, what they share, and the rest along a leading axis.

    Args:
      size: how many members.
      shared: leaves that are the same in all.
      own: [members, …] leaves that differ.
    """

    size: int
    shared: dict[str, Array]
    own: dict[str, Array]

    def member(self, i: int) -> Params:
        """Parameters of one."""
        return tree.unflatten({**self.shared, **{k: v[i] for k, v in self.own.items()}})


def stack(members: Sequence[Params]) -> Stack:
    """Several parameter trees as one.

    Raises:
      ValueError: there are none, or they have other leaves or shapes.
    """
    if not members:
        raise ValueError("an ensemble of nothing; give at least one member.")
    for other in members[1:]:
        support_of(members[0], other)  # refuses trees of other models
    flat = [tree.flatten(member) for member in members]
    shared, own = {}, {}
    for path, leaf in flat[0].items():
        leaves = [np.asarray(member[path]) for member in flat]
        if all(np.array_equal(leaves[0], other) for other in leaves[1:]):
            shared[path] = jnp.asarray(leaf)
        else:
            own[path] = jnp.stack([jnp.asarray(value) for value in leaves])
    return Stack(len(members), shared, own)


class _Same:
    """A potential as a key of compiled programs, by what it is and not by where it was loaded."""

    def __init__(self, model: Potential) -> None:
        self.model = model
        self._key = (model.digest, model.backend)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._key == other._key


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict(
    same: _Same, size: int, shared: dict[str, Array], own: dict[str, Array], graph: Graph
) -> Prediction:
    def member(leaves: dict[str, Array]) -> Prediction:
        return predict(same.model, tree.unflatten({**shared, **leaves}), graph)

    return jax.vmap(member, axis_size=size)(own)


def predict_ensemble(
    models: Sequence[Potential],
    members: Stack | Sequence[Params],
    structures: Sequence[ase.Atoms],
    *,
    head: str | None = None,
    batch_size: int = 4,
    dtype: str | None = None,
    max_edges_per_block: int | None = None,
    progress: ProgressFn | None = None,
) -> list[list[FrameResult]]:
    """What every member says of every structure: member by member, structure by structure.

    Args:
      models: the potential of each member, or one for all; they may differ in isolated-atom
        energies, which are added on the host, and in nothing else.
      members: parameters, as a list or stacked.
      structures: to judge.
      head: of the model; not needed with one head.
      batch_size: largest structures per batch; each batch is evaluated for all members at once.
      dtype: of the computation; by default as :func:`jaxft.evaluate.predictions.working_dtype`.
      max_edges_per_block: as in :func:`jaxft.evaluate.predict_frames`, for all members together.
      progress: called with (structures done, structures in total) after every batch.

    Raises:
      ValueError: the members are of different models, or as
        :func:`jaxft.evaluate.predict_frames`.
    """
    whole = members if isinstance(members, Stack) else stack(members)
    models = [models[0]] * whole.size if len(models) == 1 else list(models)
    _check_alike(models, whole.size)
    if batch_size < 1:
        raise ValueError(f"batches of {batch_size} frames are not possible; use batch_size >= 1.")
    dtype = working_dtype({**whole.shared, **whole.own}, dtype)
    shared, own = cast(whole.shared, dtype), cast(whole.own, dtype)
    frames = [unlabelled(atoms, source=str(atoms.symbols)) for atoms in structures]
    if not frames:
        return [[] for _ in models]
    dataset = prepare(frames, models[0], head=head)
    limit = max(edges_per_block(max_edges_per_block) // whole.size, 1)
    shape, batches, blocks = plan_batches(dataset, batch_size, limit)
    found: list[dict[int, FrameResult]] = [{} for _ in models]
    for chosen in batches:
        graph = packed_graph(dataset, chosen, shape, dtype, blocks=blocks)
        every = jax.device_get(_predict(_Same(models[0]), whole.size, shared, own, graph))
        for i, model in enumerate(models):
            one: Any = jax.tree.map(lambda leaf, i=i: leaf[i], every)
            results = frame_results(model.e0s, dataset, chosen, one, model.mean_moments)
            found[i].update(zip(chosen, results, strict=True))
        if progress is not None:
            progress(len(found[0]), len(frames))
    return [[results[i] for i in range(len(frames))] for results in found]


def opinions(
    candidates: Sequence[Candidate],
    structures: Sequence[ase.Atoms],
    progress: ProgressFn | None = None,
) -> list[list[Outcome]]:
    """What every candidate says of every structure; potentials that differ in their parameters
    alone are evaluated together."""
    own = [c for c in candidates if isinstance(c, JaxCandidate)]
    if len(own) < len(candidates) or not _are_stackable(own):
        return [candidate.evaluate(structures, progress) for candidate in candidates]
    first = own[0]
    refused = _refused(first, structures)
    every = predict_ensemble(
        [c.model for c in own],
        [c.params for c in own],
        [atoms for i, atoms in enumerate(structures) if i not in refused],
        head=first.head,
        batch_size=max(first.batch_size // len(own), 1),
        dtype=first.dtype,
        progress=progress,
    )
    found: list[list[Outcome]] = []
    for results in every:
        rest = iter(results)
        found.append(
            [refused[i] if i in refused else _checked(next(rest)) for i in range(len(structures))]
        )
    return found


def _refused(candidate: JaxCandidate, structures: Sequence[ase.Atoms]) -> dict[int, Flag]:
    """Why structures cannot be evaluated, by position; all members say the same."""

    def look(chosen: Sequence[ase.Atoms]) -> None:
        frames = [unlabelled(atoms, source=str(atoms.symbols)) for atoms in chosen]
        prepare(frames, candidate.model, head=candidate.head)

    found = {}
    try:
        look(structures)
    except ValueError:
        for i, atoms in enumerate(structures):
            try:
                look([atoms])
            except ValueError as error:
                found[i] = Flag(str(error).splitlines()[0])
    return found


def _checked(result: FrameResult) -> Outcome:
    is_finite = np.isfinite(result.energy) and np.isfinite(result.forces).all()
    return result if is_finite else Flag(NOT_FINITE)


def _are_stackable(own: Sequence[JaxCandidate]) -> bool:
    if len(own) < 2:
        return False
    first, *others = (
        (c.model.digest, c.model.backend, c.head, c.working_dtype, c.model.heads) for c in own
    )
    return all(other == first for other in others)


def _check_alike(models: Sequence[Potential], size: int) -> None:
    if len(models) != size:
        raise ValueError(
            f"{len(models)} potentials were given for {size} members; give one for each, or one."
        )
    wrong = [i for i, model in enumerate(models) if model.digest != models[0].digest]
    if wrong:
        raise ValueError(
            f"members {', '.join(map(str, wrong))} differ from the first in their architecture or "
            "constants; only models of one base are evaluated together: give the others as "
            "candidates of their own."
        )
