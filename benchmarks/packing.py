"""How much of a batch is padding, on real sets of structures.

    JAXFT_DATA=... python benchmarks/packing.py > benchmarks/results/packing.json

For shuffled epochs of batches of 4, 8 and 16 frames: the fractions of atom slots, of edge rows and
of edge slots that hold nothing (the last counts free slots inside rows too), the number of static
shapes that occur, and the row width that was chosen. Nothing is packed and no model is run; the
mean is over five epochs. A table for people goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from jaxft import data

SETS = {
    "maml_MoNbTaW_train_small": "extxyz/maml_MoNbTaW_train_small.extxyz.gz",
    "mlearn_Mo_training": "extxyz/mlearn_Mo_training.extxyz.gz",
    "mlearn_Li_training": "extxyz/mlearn_Li_training.extxyz.gz",
    "3BPA_train_300K": "raw/davkovacs+BOTNet-datasets/dataset_3BPA/train_300K.xyz",
    "equitrain_data": "raw/BAMeScience+equitrain/tests/data.xyz",
    "Li_electrode_finetune": (
        "raw/Fung-Lab+MatterTune/examples/finetune-test/data/Li_electrode_finetune.xyz"
    ),
}
"""By name; the last but one is MPtrj-like: crystals of 10 to 32 atoms with 14 to 93 neighbours."""

SIZES = (4, 8, 16)
EPOCHS = 5
R_MAX = 6.0
"""Å, that of the published MACE-MP models."""


def domain(frames: list[data.Frame], r_max: float) -> SimpleNamespace:
    """What packing must know of a model."""
    known = sorted({int(z) for frame in frames for z in frame.atomic_numbers})
    return SimpleNamespace(
        atomic_numbers=tuple(known),
        r_max=r_max,
        e0s=np.zeros((1, len(known))),
        embeddings=(),
        head_index=lambda head: 0,
    )


def measure(dataset: data.Dataset, size: int) -> dict[str, object]:
    """Means over the epochs, and the most shapes that occurred in one."""
    epochs = [data.padding(dataset, size, number=number) for number in range(EPOCHS)]
    means = {
        name: round(float(np.mean([getattr(epoch, name) for epoch in epochs])), 4)
        for name in ("atoms", "rows", "edges")
    }
    return {"size": size, **means, "shapes": max(epoch.shapes for epoch in epochs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--r-max", type=float, default=R_MAX)
    args = parser.parse_args()
    folder = os.environ.get("JAXFT_DATA")
    if folder is None:
        sys.exit("error: JAXFT_DATA is not set; name the folder that holds the sets.")
    found = []
    for name, path in SETS.items():
        frames = data.read(Path(folder) / path)
        dataset = data.prepare(frames, domain(frames, args.r_max))
        row = {
            "set": name,
            "frames": len(frames),
            "atoms_per_frame": [int(dataset.nodes.min()), int(dataset.nodes.max())],
            "neighbours": round(float(dataset.edges.sum() / dataset.nodes.sum()), 1),
            "row_width": dataset.row_width,
            "row_fill": round(dataset.fill, 4),
            "batches": [measure(dataset, size) for size in SIZES],
        }
        found.append(row)
        for b in row["batches"]:
            print(
                f"{name:26s} K={dataset.row_width:2d} batch {b['size']:2d}: "
                f"atoms {b['atoms']:6.1%}  rows {b['rows']:6.1%}  edges {b['edges']:6.1%}  "
                f"{b['shapes']} shapes",
                file=sys.stderr,
            )
    print(json.dumps({"r_max": args.r_max, "epochs": EPOCHS, "sets": found}, indent=1))


if __name__ == "__main__":
    main()
