"""What a model file or a bundle holds, as plain facts; no torch, nothing compiled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from jaxft import bundle, tree
from jaxft.potential import Potential
from jaxft.typing import Params

GROUPS = ("node_embedding", "interactions", "products", "readouts")


def facts(model: Potential, params: Params, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Architecture, heads, elements and E0s, counts, dtype and origin; JSON-like."""
    config = model.config
    counts = dict.fromkeys(GROUPS, 0)
    for path, leaf in tree.flatten(params).items():
        group = next(name for name in GROUPS if path.startswith(name))
        counts[group] += int(np.size(leaf))
    leaves = tree.flatten(params).values()
    return {
        "family": config.family,
        "blocks": [block.block for block in config.interactions],
        "r_max": config.r_max,
        "radial_basis": f"{config.num_bessel} Bessel, polynomial cutoff p = {config.cutoff_power}",
        "edge_irreps": config.edge_irreps,
        "hidden_irreps": [product.irreps_out for product in config.products],
        "correlation": [product.correlation for product in config.products],
        "readouts": [readout.kind for readout in config.readouts],
        "avg_num_neighbors": [block.avg_num_neighbors for block in config.interactions],
        "heads": list(config.heads),
        "scale": float(model.constants.scale),
        "shift": float(model.constants.shift),
        "e0s": {
            chemical_symbols[z]: float(e0)
            for z, e0 in zip(config.atomic_numbers, model.e0s[0], strict=True)
        },
        "parameters": counts | {"total": sum(counts.values())},
        "dtype": np.result_type(*leaves).name,
        "provenance": dict(provenance),
    }


def of_bundle(path: str | Path) -> dict[str, Any]:
    """The facts of a bundle; errors as :func:`jaxft.load`."""
    model, params, provenance = bundle.load_numpy(path)
    return facts(model, params, provenance)


def rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts as lines to print."""
    shown = []
    for key, value in found.items():
        if key == "e0s":
            text = ", ".join(f"{symbol} {e0:.3f}" for symbol, e0 in value.items())
            shown.append((f"E0s, eV ({len(value)} elements)", text))
        elif key == "provenance":
            shown += [(f"provenance: {k}", f"{v}") for k, v in value.items() if k != "config"]
        elif isinstance(value, Mapping):
            shown.append((key, ", ".join(f"{k} {v:,}" for k, v in value.items())))
        elif isinstance(value, list):
            shown.append((key, ", ".join(str(item) for item in value)))
        else:
            shown.append((key, str(value)))
    return shown
