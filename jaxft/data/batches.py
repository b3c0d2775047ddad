"""Frames become padded batches in a few static shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from ase.data import chemical_symbols

from jaxft.data.frames import Frame
from jaxft.data.neighbours import Edges, neighbours
from jaxft.graph import PADDING_DISTANCE, Batch, Graph, Labels, Weights, totals_of
from jaxft.typing import Domain, Feature

ROW_WIDTHS = (4, 8, 16, 32, 64)
"""Slots per edge row; a dataset uses the one that wastes least."""

ROW_COST = 2
"""What a row costs beyond its slots, in slots; so wide rows win ties."""

LADDER = tuple(1.25**-k for k in range(6))
"""Sizes of the static shapes, relative to the largest batch that can occur."""


class _Sample(NamedTuple):
    """One frame, ready to be packed. n atoms, r rows of K slots."""

    species: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    vectors: np.ndarray
    volume: float
    energy: float
    forces: np.ndarray
    stress: np.ndarray
    energy_weight: float
    """0 for a missing label, which itself is 0; likewise the next two."""
    forces_weight: np.ndarray
    stress_weight: float
    head: int
    features: dict[str, np.ndarray]
    """[] or [in_dim] per graph, [n, …] per atom."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Frames with their edges, in rows, for models with one element table and cutoff."""

    frames: Sequence[Frame]
    samples: Sequence[_Sample]
    elements: np.ndarray
    """[S] int32, rows of the model's element table that occur."""
    r_max: float
    row_width: int
    per_atom: frozenset[str] = frozenset()
    """Names of the features that belong to atoms, not graphs."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fill(self) -> float:
        """Fraction of the edge slots that hold an edge, before batches are padded."""
        lengths = [np.linalg.norm(s.vectors, axis=-1) for s in self.samples]
        slots = sum(length.size for length in lengths)
        return sum(int((length < self.r_max).sum()) for length in lengths) / max(slots, 1)


class Shape(NamedTuple):
    """A static shape: atoms, edge rows and graphs, padding included."""

    n_node: int
    n_row: int
    n_graph: int


def prepare(
    frames: Sequence[Frame],
    model: Domain,
    *,
    head: str | Sequence[str | None] | None = None,
    row_width: int | None = None,
) -> Dataset:
    """Build neighbour lists and remove the model's isolated-atom energies from the labels.

    Args:
      frames: structures.
      model: gives the element table, the cutoff, the E0s and what else it reads of a frame.
      head: of the model, that these frames belong to, or one for each frame; not needed with one
        head.
      row_width: slots per edge row; by default the one of ``ROW_WIDTHS`` that wastes least.

    Raises:
      ValueError: a frame holds an element that the model does not know, an impossible geometry, or
        not the features that the model reads; or a head is unknown, or their number is not that of
        the frames.
    """
    heads = _heads(head, frames, model)
    check_elements(frames, model.atomic_numbers)
    features = [{f.name: _feature(frame, f) for f in model.embeddings} for frame in frames]
    table = np.full(120, -1)
    table[list(model.atomic_numbers)] = np.arange(len(model.atomic_numbers))
    present = np.unique(np.concatenate([f.atomic_numbers for f in frames] or [np.zeros(0, int)]))
    edges = [neighbours(frame, model.r_max) for frame in frames]
    width = row_width or _best_width(
        [np.bincount(e.receivers, minlength=len(f)) for e, f in zip(edges, frames, strict=True)]
    )
    samples = []
    for frame, edge, given, index in zip(frames, edges, features, heads, strict=True):
        species = np.searchsorted(present, frame.atomic_numbers)
        e0 = float(model.e0s[index][table[frame.atomic_numbers]].sum())
        samples.append(_sample(frame, edge, species, e0, index, given, model.r_max, width))
    per_atom = frozenset(f.name for f in model.embeddings if f.per == "atom")
    rows = table[present].astype(np.int32)
    return Dataset(frames, samples, rows, model.r_max, width, per_atom)


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


USUAL = {"total_charge": ("charge", 0), "total_spin": ("spin", 1)}
"""Other names of features, and what they are where a frame is silent, as in mace-torch: a neutral
singlet. All other features must be given."""


def _feature(frame: Frame, feature: Feature) -> np.ndarray:
    """What a frame says of a feature, checked: [], or [n, …]."""
    name, (alias, default) = feature.name, USUAL.get(feature.name, (feature.name, None))
    told: Mapping[str, object] = frame.features if feature.per == "graph" else frame.atom_features
    given = {key: told[key] for key in (name, alias) if key in told}
    try:
        values = [np.asarray(value, np.float64) for value in given.values()]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{frame.source} says {given}; expected numbers.") from error
    if not values and default is None:
        raise ValueError(
            f"{frame.source} has no {name!r}, which the model reads; set it in atoms."
            f"{'info' if feature.per == 'graph' else 'arrays'}[{name!r}]."
        )
    value = values[0] if values else np.asarray(default, np.float64)
    if any(not np.array_equal(value, other) for other in values[1:]):
        raise ValueError(f"{frame.source} says {given}; expected the same under both names.")
    shape: tuple[int, ...] = () if feature.per == "graph" else (len(frame),)
    wide = (*shape, feature.in_dim) if feature.in_dim > 1 else shape
    if value.size != np.prod(wide, dtype=int) or value.shape[: len(shape)] != shape:
        raise ValueError(
            f"{frame.source}: {name!r} has shape {value.shape}; expected {wide} "
            f"(per {'frame' if feature.per == 'graph' else 'atom'})."
        )
    value = value.reshape(wide)
    if feature.num_classes is not None:
        low, high = -feature.offset, feature.num_classes - 1 - feature.offset
        if ((value != np.round(value)) | (value < low) | (value > high)).any():
            raise ValueError(
                f"{frame.source}: {name!r} is {value}; this model knows whole numbers from "
                f"{low} to {high}."
            )
    elif not np.isfinite(value).all():
        raise ValueError(f"{frame.source}: {name!r} is {value}; expected finite numbers.")
    return value


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


def _best_width(degrees: Sequence[np.ndarray]) -> int:
    counts = np.concatenate(list(degrees) or [np.zeros(0, int)])

    def cost(width: int) -> int:
        return int((-(-counts // width)).sum()) * (width + ROW_COST)

    return min(reversed(ROW_WIDTHS), key=cost)


def _sample(
    frame: Frame,
    edges: Edges,
    species: np.ndarray,
    e0: float,
    head: int,
    features: dict[str, np.ndarray],
    r_max: float,
    width: int,
) -> _Sample:
    degree = np.bincount(edges.receivers, minlength=len(frame))
    rows_of = -(-degree // width)
    first_row = np.cumsum(rows_of) - rows_of
    first_edge = np.cumsum(degree) - degree
    rank = np.arange(len(edges.receivers)) - first_edge[edges.receivers]
    row, slot = first_row[edges.receivers] + rank // width, rank % width
    receivers = np.repeat(np.arange(len(frame)), rows_of)
    senders = np.repeat(receivers[:, None], width, axis=1)
    vectors = np.zeros((len(receivers), width, 3))
    vectors[..., 0] = PADDING_DISTANCE * r_max
    senders[row, slot] = edges.senders
    vectors[row, slot] = edges.vectors
    return _Sample(
        species,
        senders,
        receivers,
        vectors,
        frame.volume if frame.is_periodic else 1.0,
        *_labels(frame, e0),
        head,
        features,
    )


def _labels(
    frame: Frame, e0: float
) -> tuple[float, np.ndarray, np.ndarray, float, np.ndarray, float]:
    """Energy without E0s, forces, stress, and their weights; zeros where a label is missing."""
    has_energy, has_forces = frame.energy is not None, frame.forces is not None
    has_stress = frame.stress is not None and frame.is_periodic
    atoms = np.ones(len(frame)) if frame.atom_weights is None else frame.atom_weights
    return (
        frame.energy - e0 if frame.energy is not None else 0.0,
        frame.forces if frame.forces is not None else np.zeros((len(frame), 3)),
        frame.stress if frame.stress is not None else np.zeros((3, 3)),
        frame.weight * frame.energy_weight * has_energy,
        frame.weight * frame.forces_weight * has_forces * atoms,
        frame.weight * frame.stress_weight * has_stress,
    )


def shapes(dataset: Dataset, size: int) -> list[Shape]:
    """The static shapes, ascending, that batches of ``size`` frames use.

    A ladder of at most ``len(LADDER)`` sizes below the largest batch that can occur, thinned to the
    ones that shuffled full batches reach, so that a short last batch compiles nothing new.
    """
    size = min(size, len(dataset))
    nodes = np.array([len(sample.species) for sample in dataset.samples])
    rows = np.array([len(sample.receivers) for sample in dataset.samples])
    ladder = [
        Shape(
            _round_up(scale * np.sort(nodes)[-size:].sum() + 1),
            _round_up(scale * np.sort(rows)[-size:].sum() + 1),
            size + 1,
        )
        for scale in LADDER
    ]
    used = {ladder[0]}
    rng = np.random.default_rng(0)
    for _ in range(3):
        order = rng.permutation(len(nodes))
        for chosen in _chunks(order, size):
            if len(chosen) == size:
                used.add(_smallest(ladder, nodes[chosen].sum(), rows[chosen].sum()))
    return sorted(used)


def _round_up(count: float, multiple: int = 8) -> int:
    return int(-(-count // multiple)) * multiple


def _smallest(ladder: Sequence[Shape], n_node: int, n_row: int) -> Shape:
    return min(shape for shape in ladder if shape.n_node > n_node and shape.n_row >= n_row)


def _chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


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

    Args:
      dataset: from :func:`prepare`.
      size: frames per batch.
      dtype: of the floating arrays.
      seed: with ``number`` it determines the order; None keeps the dataset's order.
      number: of the epoch.
      start: skip this many batches (to resume inside an epoch).
    """
    if size < 1:
        raise ValueError(f"batches of {size} frames are not possible; use a size >= 1.")
    ladder = shapes(dataset, size)
    order = np.arange(len(dataset))
    if seed is not None:
        order = np.random.default_rng([seed, number]).permutation(order)
    for chosen in _chunks(order, size)[start:]:
        samples = [dataset.samples[i] for i in chosen]
        n_node = sum(len(sample.species) for sample in samples)
        n_row = sum(len(sample.receivers) for sample in samples)
        yield pack(dataset, chosen, _smallest(ladder, n_node, n_row), dtype)


def num_batches(dataset: Dataset, size: int) -> int:
    """Batches per epoch."""
    return -(-len(dataset) // size)


def pack(dataset: Dataset, chosen: Sequence[int] | np.ndarray, shape: Shape, dtype: str) -> Batch:
    """One padded batch (numpy) of the frames at the positions ``chosen``."""
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
        node, row = atoms.stop, rows.stop

    def real(array: np.ndarray) -> np.ndarray:
        return array.astype(dtype)

    weights = Weights(real(energy_weight), real(forces_weight), real(stress_weight))
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
        labels=Labels(real(energy), real(forces), real(stress)),
        weights=weights,
        totals=totals_of(weights),
        n_atoms=n_atoms,
        frame=frame,
    )
