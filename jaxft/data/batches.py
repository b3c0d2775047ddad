"""Frames become padded batches in a few static shapes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase.data import chemical_symbols

from jaxft.data.cache import cached_neighbours
from jaxft.data.curvatures import Probes, check_probes
from jaxft.data.features import USUAL as USUAL
from jaxft.data.features import feature_of
from jaxft.data.frames import Frame
from jaxft.data.moments import moment_labels
from jaxft.data.packing import ATOM_COST, ROW_COST, Shape, ladder, plan, smallest
from jaxft.data.samples import Sample, best_width, sample_of
from jaxft.graph import PADDING_DISTANCE, Batch, Curvature, Graph, Labels, Weights, totals_of
from jaxft.typing import Domain

SIMULATED = 1024
"""Batches, at most, that the choice of static shapes looks at, in shuffled epochs that no run
sees; together they hold at most 64 times as many frames."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Frames with their edges, in rows, for models with one element table and cutoff."""

    frames: Sequence[Frame]
    samples: Sequence[Sample]
    elements: np.ndarray
    """[S] int32, rows of the model's element table that occur."""
    r_max: float
    row_width: int
    per_atom: frozenset[str] = frozenset()
    """Names of the features that belong to atoms, not graphs."""
    probes: Probes | None = None
    """Which displacements batches carry for the Hessian in a loss; None is none at all."""

    def __len__(self) -> int:
        return len(self.samples)

    @functools.cached_property
    def nodes(self) -> np.ndarray:
        """[frames] atoms."""
        return np.array([len(sample.species) for sample in self.samples], int)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """[frames] edge rows."""
        return np.array([len(sample.receivers) for sample in self.samples], int)

    @functools.cached_property
    def edges(self) -> np.ndarray:
        """[frames] edges."""
        return np.array([sample.n_edge for sample in self.samples], int)

    @property
    def costs(self) -> np.ndarray:
        """[frames], what a frame adds to a batch, in edge slots."""
        return ATOM_COST * self.nodes + (self.row_width + ROW_COST) * self.rows

    @property
    def fill(self) -> float:
        """Fraction of the edge slots that hold an edge, before batches are padded."""
        return float(self.edges.sum() / max(self.row_width * self.rows.sum(), 1))


def prepare(
    frames: Sequence[Frame],
    model: Domain,
    *,
    head: str | Sequence[str | None] | None = None,
    row_width: int | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    probes: Probes | None = None,
) -> Dataset:
    """Build neighbour lists and remove the model's isolated-atom energies from the labels.

    Args:
      frames: structures.
      model: gives the element table, the cutoff, the E0s and what else it reads of a frame.
      head: of the model, that these frames belong to, or one for each frame; not needed with one
        head.
      row_width: slots per edge row; by default the one of ``ROW_WIDTHS`` that costs least.
      cache: a folder where neighbour lists are kept between runs; see :mod:`jaxft.data.cache`.
      workers: of :func:`jaxft.data.workers.neighbour_lists`: most processes that it may start.
      probes: with it batches carry a displacement of every frame and the Hessian times it, see
        :mod:`jaxft.data.curvatures`; needed by a loss in which the Hessian has weight.

    Raises:
      ValueError: a frame holds an element that the model does not know, an impossible geometry,
        moments that the model's head cannot learn, or not the features that the model reads; or a
        head is unknown, or their number is not that of the frames.
      ChildProcessError: a process that made neighbour lists has died.
    """
    check_probes(probes)
    heads = _heads(head, frames, model)
    check_elements(frames, model.atomic_numbers)
    features = [{f.name: feature_of(frame, f) for f in model.embeddings} for frame in frames]
    table = np.full(120, -1)
    table[list(model.atomic_numbers)] = np.arange(len(model.atomic_numbers))
    present = np.unique(np.concatenate([f.atomic_numbers for f in frames] or [np.zeros(0, int)]))
    edges = cached_neighbours(frames, model.r_max, cache, workers=workers)
    width = row_width or best_width(
        [np.bincount(e.receivers, minlength=len(f)) for e, f in zip(edges, frames, strict=True)]
    )
    samples = []
    for frame, edge, given, index in zip(frames, edges, features, heads, strict=True):
        species = np.searchsorted(present, frame.atomic_numbers)
        e0 = float(model.e0s[index][table[frame.atomic_numbers]].sum())
        moments = moment_labels(frame, model.moments)
        samples.append(
            sample_of(frame, edge, species, e0, index, given, model.r_max, width, moments)
        )
    per_atom = frozenset(f.name for f in model.embeddings if f.per == "atom")
    rows = table[present].astype(np.int32)
    return Dataset(frames, samples, rows, model.r_max, width, per_atom, probes)


def _heads(
    head: str | Sequence[str | None] | None, frames: Sequence[Frame], model: Domain
) -> list[int]:
    """The position of each frame's head."""
    if head is None or isinstance(head, str):
        return [model.head_index(head)] * len(frames)
    if len(head) != len(frames):
        raise ValueError(
            f"{len(head)} heads were given for {len(frames)} frames; give one name for all, or one "
            "for each frame."
        )
    known = {name: model.head_index(name) for name in dict.fromkeys(head)}
    return [known[name] for name in head]


def check_elements(frames: Sequence[Frame], known: tuple[int, ...]) -> None:
    """Raises ValueError if a frame holds an element that is not among ``known``."""
    for frame in frames:
        unknown = sorted(set(frame.atomic_numbers.tolist()) - set(known))
        if unknown:
            raise ValueError(
                f"{frame.source} holds {', '.join(chemical_symbols[z] for z in unknown)}, which "
                f"the model does not know; its elements are "
                f"{' '.join(chemical_symbols[z] for z in known)}.\n"
                "Leave the frame out, or start from a model that covers these elements."
            )


def shapes(dataset: Dataset, size: int, *, shuffled: bool = True) -> list[Shape]:
    """The static shapes, ascending and at most six, that batches of ``size`` frames use.

    Those that waste least, see :func:`jaxft.data.packing.ladder`: over simulated epochs, and one in
    which any batch fits; or over the only epoch that there is, if frames keep their order.

    Args:
      dataset: from :func:`prepare`.
      size: most frames per batch.
      shuffled: whether the epochs are.
    """
    if size < 1:
        raise ValueError(f"batches of {size} frames are not possible; use a size >= 1.")
    if not len(dataset):
        return []
    n_frame = -(-len(dataset) // num_batches(dataset, size))
    shuffled = shuffled and n_frame < len(dataset)
    sizes = np.stack([dataset.nodes, dataset.rows], axis=1)
    rng = np.random.default_rng(0) if shuffled else None
    looks = max(1, min(SIMULATED, 64 * SIMULATED // n_frame)) if shuffled else None
    epochs = itertools.repeat(rng) if shuffled else [rng]
    found = (batch for rng in epochs for batch in plan(dataset.costs, size, rng))
    most = np.sort(sizes, axis=0)[-n_frame:].sum(axis=0)
    return ladder(
        np.array([sizes[batch].sum(axis=0) for batch in itertools.islice(found, looks)]),
        n_graph=n_frame + 1,
        row_width=dataset.row_width,
        most=(int(most[0]), int(most[1])) if shuffled else None,
        per_pass=num_batches(dataset, size),
    )


def epoch(
    dataset: Dataset,
    size: int,
    *,
    dtype: str = "float32",
    seed: int | None = None,
    number: int = 0,
    start: int = 0,
) -> Iterator[Batch]:
    """The batches of one pass over the dataset; every frame occurs exactly once.

    Batches have equal numbers of frames, or one less. In a shuffled epoch batches that follow one
    another trade frames until they are about equally large; see :mod:`jaxft.data.packing`.

    Args:
      dataset: from :func:`prepare`.
      size: most frames per batch.
      dtype: of the floating arrays.
      seed: with ``number`` it determines the order; None keeps the dataset's order.
      number: of the epoch.
      start: skip this many batches (to resume inside an epoch).
    """
    sizes = shapes(dataset, size, shuffled=seed is not None)
    for chosen in itertools.islice(_plan(dataset, size, seed, number), start, None):
        shape = smallest(sizes, dataset.nodes[chosen].sum(), dataset.rows[chosen].sum())
        yield pack(dataset, chosen, shape, dtype, key=(seed or 0, number))


def _plan(dataset: Dataset, size: int, seed: int | None, number: int) -> Iterator[np.ndarray]:
    rng = None if seed is None else np.random.default_rng([seed, number])
    return plan(dataset.costs, size, rng)


def num_batches(dataset: Dataset, size: int) -> int:
    """Batches per epoch."""
    return -(-len(dataset) // size)


class Padding(NamedTuple):
    """Fractions of the slots of an epoch's batches that hold nothing."""

    atoms: float
    rows: float
    edges: float
    """Free slots in rows and those of empty rows."""
    shapes: int
    """How many static shapes occur; for each the model is compiled."""


def padding(dataset: Dataset, size: int, *, seed: int | None = 0, number: int = 0) -> Padding:
    """How much of the batches of :func:`epoch` is padding; nothing is packed."""
    sizes = shapes(dataset, size, shuffled=seed is not None)
    used = [
        smallest(sizes, dataset.nodes[chosen].sum(), dataset.rows[chosen].sum())
        for chosen in _plan(dataset, size, seed, number)
    ]
    n_node, n_row = sum(shape.n_node for shape in used), sum(shape.n_row for shape in used)
    return Padding(
        atoms=1 - int(dataset.nodes.sum()) / n_node,
        rows=1 - int(dataset.rows.sum()) / n_row,
        edges=1 - int(dataset.edges.sum()) / (n_row * dataset.row_width),
        shapes=len(set(used)),
    )


def pack(
    dataset: Dataset,
    chosen: Sequence[int] | np.ndarray,
    shape: Shape,
    dtype: str,
    *,
    key: tuple[int, int] = (0, 0),
) -> Batch:
    """One padded batch (numpy) of the frames at the positions ``chosen``.

    Seed and number of the epoch, ``key``, determine the displacements that it carries, if any.
    """
    n_node, n_row, n_graph = shape
    width = dataset.row_width
    species = np.zeros(n_node, np.int32)
    graph_index = np.full(n_node, n_graph - 1, np.int32)
    is_atom = np.zeros(n_node, bool)
    forces, forces_weight = np.zeros((n_node, 3)), np.zeros(n_node)
    senders = np.full((n_row, width), n_node - 1, np.int32)
    receivers = np.full(n_row, n_node - 1, np.int32)
    vectors = np.zeros((n_row, width, 3))
    vectors[..., 0] = PADDING_DISTANCE * dataset.r_max
    volume, n_atoms = np.ones(n_graph), np.ones(n_graph, np.int32)
    energy, energy_weight = np.zeros(n_graph), np.zeros(n_graph)
    stress, stress_weight = np.zeros((n_graph, 3, 3)), np.zeros(n_graph)
    frame = np.full(n_graph, -1, np.int32)
    moments = [np.zeros((n_node, *array.shape[1:])) for array in dataset.samples[chosen[0]].moments]
    # padding takes the values of a frame, which are valid ones
    first = dataset.samples[chosen[0]]
    head = np.full(n_graph, first.head, np.int32)
    features = {
        name: np.resize(value, (n_graph, *value.shape))
        if name not in dataset.per_atom
        else np.resize(value[:1], (n_node, *value.shape[1:]))
        for name, value in first.features.items()
    }
    node = row = 0
    for g, index in enumerate(chosen):
        sample = dataset.samples[index]
        atoms = slice(node, node + len(sample.species))
        rows = slice(row, row + len(sample.receivers))
        species[atoms], graph_index[atoms], is_atom[atoms] = sample.species, g, True
        senders[rows], receivers[rows] = sample.senders + node, sample.receivers + node
        vectors[rows] = sample.vectors
        volume[g], n_atoms[g], frame[g] = sample.volume, len(sample.species), index
        head[g] = sample.head
        for name, value in sample.features.items():
            features[name][atoms if name in dataset.per_atom else g] = value
        energy[g], energy_weight[g] = sample.energy, sample.energy_weight
        forces[atoms], forces_weight[atoms] = sample.forces, sample.forces_weight
        stress[g], stress_weight[g] = sample.stress, sample.stress_weight
        for array, value in zip(moments, sample.moments, strict=True):
            array[atoms] = value
        node, row = atoms.stop, rows.stop

    def real(array: np.ndarray) -> np.ndarray:
        return array.astype(dtype)

    moment, moment_weight = map(real, moments) if moments else (None, None)
    weights = Weights(real(energy_weight), real(forces_weight), real(stress_weight), moment_weight)
    return Batch(
        graph=Graph(
            vectors=real(vectors),
            senders=senders,
            receivers=receivers,
            species=species,
            elements=dataset.elements,
            graph_index=graph_index,
            volume=real(volume),
            is_atom=is_atom,
            is_graph=frame >= 0,
            head=head,
            features={name: real(value) for name, value in features.items()},
        ),
        labels=Labels(real(energy), real(forces), real(stress), moment),
        weights=weights,
        totals=totals_of(weights),
        n_atoms=n_atoms,
        frame=frame,
        curvature=None
        if dataset.probes is None
        else _curvature(dataset, chosen, n_node, dtype, key),
    )


def _curvature(
    dataset: Dataset,
    chosen: Sequence[int] | np.ndarray,
    n_node: int,
    dtype: str,
    key: tuple[int, int],
) -> Curvature:
    """A displacement of every frame that has some, and the Hessian times it."""
    assert dataset.probes is not None
    probe, product, weight = np.zeros((n_node, 3)), np.zeros((n_node, 3)), np.zeros(n_node)
    node = 0
    for index in chosen:
        sample = dataset.samples[index]
        atoms = slice(node, node + len(sample.species))
        if sample.hessian is not None:
            drawn = sample.hessian.draw(dataset.probes, (*key, int(index)))
            probe[atoms], product[atoms] = drawn
            weight[atoms] = sample.hessian_weight
        node = atoms.stop
    weight = weight.astype(dtype)
    return Curvature(probe.astype(dtype), product.astype(dtype), weight, weight.sum())
