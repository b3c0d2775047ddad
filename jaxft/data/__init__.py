"""Frames, neighbour lists and batches."""

from jaxft.data.batches import Dataset, Shape, epoch, num_batches, pack, prepare, shapes
from jaxft.data.frames import (
    ISOLATED_ATOM,
    Coverage,
    Frame,
    Keys,
    coverage,
    from_atoms,
    isolated_atom_energies,
    read,
    read_atoms,
    require_any_label,
    require_labels,
    split,
    unlabelled,
    without_isolated_atoms,
)

__all__ = [
    "ISOLATED_ATOM",
    "Coverage",
    "Dataset",
    "Frame",
    "Keys",
    "Shape",
    "coverage",
    "epoch",
    "from_atoms",
    "isolated_atom_energies",
    "num_batches",
    "pack",
    "prepare",
    "read",
    "read_atoms",
    "require_any_label",
    "require_labels",
    "shapes",
    "split",
    "unlabelled",
    "without_isolated_atoms",
]
