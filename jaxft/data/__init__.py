"""Frames, neighbour lists and batches."""

from jaxft.data.accumulate import Spread, updates
from jaxft.data.audit import Audit, audit
from jaxft.data.batches import (
    USUAL,
    Dataset,
    Padding,
    Shape,
    check_elements,
    epoch,
    num_batches,
    pack,
    padding,
    prepare,
    shapes,
)
from jaxft.data.frames import (
    ISOLATED_ATOM,
    Coverage,
    Frame,
    Keys,
    atom_features_of,
    coverage,
    features_of,
    from_atoms,
    has_label,
    isolated_atom_energies,
    read,
    read_atoms,
    require_any_label,
    require_labels,
    unlabelled,
    without_isolated_atoms,
)
from jaxft.data.mixture import Mixture, alone
from jaxft.data.moments import magnitudes, mean_moments
from jaxft.data.prefetch import prefetch
from jaxft.data.selection import filter_elements, select
from jaxft.data.sources import mixture
from jaxft.data.split import split, structure_key, subset
from jaxft.data.weighing import weigh
from jaxft.graph import with_shared_totals

__all__ = [
    "ISOLATED_ATOM",
    "USUAL",
    "Audit",
    "Coverage",
    "Dataset",
    "Frame",
    "Keys",
    "Mixture",
    "Padding",
    "Shape",
    "Spread",
    "alone",
    "atom_features_of",
    "audit",
    "check_elements",
    "coverage",
    "epoch",
    "features_of",
    "filter_elements",
    "from_atoms",
    "has_label",
    "isolated_atom_energies",
    "magnitudes",
    "mean_moments",
    "mixture",
    "num_batches",
    "pack",
    "padding",
    "prefetch",
    "prepare",
    "read",
    "read_atoms",
    "require_any_label",
    "require_labels",
    "select",
    "shapes",
    "split",
    "structure_key",
    "subset",
    "unlabelled",
    "updates",
    "weigh",
    "with_shared_totals",
    "without_isolated_atoms",
]
