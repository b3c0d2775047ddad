"""Frames, neighbour lists and batches."""

from jaxft.data.batches import Dataset, Shape, epoch, num_batches, pack, prepare, shapes
from jaxft.data.frames import (
    Coverage,
    Frame,
    Keys,
    coverage,
    from_atoms,
    isolated_atom_energies,
    read,
    require_labels,
    split,
    without_isolated_atoms,
)

__all__ = [
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
    "require_labels",
    "shapes",
    "split",
    "without_isolated_atoms",
]
