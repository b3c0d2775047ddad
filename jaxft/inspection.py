"""What a model file or a bundle holds, as plain facts; nothing is compiled."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from jaxft import bundle, tree
from jaxft.data.batches import USUAL
from jaxft.models.config import EmbeddingConfig, MACEConfig
from jaxft.models.irreps import multiplicities
from jaxft.page import page
from jaxft.potential import E0_BUFFER, Potential
from jaxft.typing import Params

__all__ = ["FORMAT", "UNITS", "facts", "file_facts", "names_of", "number", "of_bundle", "page"]

FORMAT = 2
"""Of the facts: raised when a key changes its meaning or goes."""

GROUPS = (
    "node_embedding",
    "joint_embedding",
    "embedding_readout",
    "interactions",
    "products",
    "readouts",
)
UNITS = {"r_max": "Å", "scale": "eV", "shift": "eV per atom", "e0s": "eV", "bytes": "byte"}


def facts(model: Potential, params: Params, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is, as a document that JSON can hold; numbers that are not finite become None.

    Energies are in eV, lengths in Å; ``units`` repeats it. Lists called "per layer" begin with the
    first layer.

    Returns:
      A dict with, in this order,

      - ``format``: version of this document; ``units``: by key;
      - ``file``: ``name``, ``kind`` ("bundle" or "torch model"), ``bytes`` on disk and ``sha256``
        (of a bundle: of its arrays), or None; filled in by whoever read the file;
      - ``convertible``: whether jaxft computes with it; ``reason``: None, or why not;
      - ``published``: None, or of the published file that this is, or was made from, ``name``,
        ``relation`` ("is", "converted from", "derived from"), ``licence``, ``citation``, ``url``;
      - ``nearest``: None, or ``names`` of published models, ``is_same``, whether all that is known
        of their architecture agrees, or else ``differs``: ``{fact: [here, there]}``; ``unknown``:
        ``{name: facts}`` that are not published;
      - ``writer``: None, or ``text``, ``at_least``, ``at_most``: versions of mace-torch, or None;
      - ``family``; per layer ``blocks``, ``hidden_irreps``, ``sender_irreps`` (of what enters the
        tensor product), ``message_irreps``, ``correlation``, ``paths`` (``{irrep: counts}`` of the
        file's own coupling paths for ν = correlation … 1), ``radial_mlp`` and ``density_mlp``
        (hidden widths), ``is_density`` and ``avg_num_neighbors`` (used where not ``is_density``),
        ``agnostic_product``; ``edge_irreps``, the spherical harmonics;
      - ``cutoff``: ``r_max``, polynomial ``power``, ``applied_to`` ("radial functions" or "output
        of the radial network");
      - ``radial_basis``: ``kind``, ``number``, ``coefficient`` (1/Å², Gaussians only);
      - ``distance_transform``, ``pair_repulsion``: None, or ``kind`` and its constants by name;
      - ``gate``, ``readouts`` (``kind``, ``irreps_in``, ``hidden_irreps`` of all heads together),
        ``last_readout_only``;
      - ``embeddings``: ``name``, ``kind``, ``per``, ``emb_dim``; ``lowest``, ``highest`` of
        categorical, ``in_dim`` of continuous ones, ``default`` (None: it must be given);
        ``embedding_readout``; ``moments``, only of models with a head for them;
      - ``heads``: names; ``scale``, ``shift``: ``{head: value}``, None for a plain MACE;
        ``elements``: symbols in the model's order; ``e0s``: ``{head: {symbol: E0}}``;
      - ``parameters``: counts by group and ``total``; ``parameters_per_layer``: ``interaction``,
        ``product``, ``readout``;
      - ``dtype``: of ``parameters``, ``constants`` and ``e0s``; ``provenance``: of the model.
    """
    return {
        "format": FORMAT,
        "units": UNITS,
        "file": None,
        "convertible": True,
        "reason": None,
        "published": None,
        "nearest": None,
        "writer": None,
        **_architecture(model.config),
        **_distances(model),
        **_heads(model),
        **_counts(model.config, params),
        "dtype": _dtypes(model, params),
        "provenance": dict(provenance),
    }


def of_bundle(path: str | Path) -> dict[str, Any]:
    """The facts of a bundle; errors as :func:`jaxft.load`."""
    path = Path(path)
    found = facts(*bundle.load_numpy(path))
    with (path / bundle.ARRAYS).open("rb") as arrays:
        sha256 = hashlib.file_digest(arrays, "sha256").hexdigest()
    size = sum((path / name).stat().st_size for name in (bundle.MODEL, bundle.ARRAYS))
    return found | {"file": file_facts(path.name, "bundle", size, sha256)}


def file_facts(name: str, kind: str, size: int, sha256: str) -> dict[str, Any]:
    """The entry ``file``."""
    return {"name": name, "kind": kind, "bytes": size, "sha256": sha256}


def number(value: Any) -> float | None:
    """None unless finite: JSON knows neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def _architecture(config: MACEConfig) -> dict[str, Any]:
    blocks, products = config.interactions, config.products
    moments = {} if config.moments is None else {"moments": config.moments.model_dump(mode="json")}
    return moments | {
        "family": config.family,
        "blocks": [block.block for block in blocks],
        "hidden_irreps": [product.irreps_out for product in products],
        "sender_irreps": [block.sent_irreps for block in blocks],
        "message_irreps": [product.irreps_in for product in products],
        "edge_irreps": config.edge_irreps,
        "correlation": [product.correlation for product in products],
        "paths": [
            dict(zip(multiplicities(p.irreps_out), map(list, p.paths), strict=True))
            for p in products
        ],
        "radial_mlp": [list(block.radial_mlp) for block in blocks],
        "density_mlp": [list(block.density_mlp) for block in blocks],
        "is_density": [block.has_density for block in blocks],
        "avg_num_neighbors": [block.avg_num_neighbors for block in blocks],
        "agnostic_product": [product.is_agnostic for product in products],
        "gate": config.gate,
        "readouts": [readout.model_dump(mode="json") for readout in config.readouts],
        "last_readout_only": len(config.readouts) < len(products),
        "embeddings": [_embedding(feature) for feature in config.embeddings],
        "embedding_readout": config.embedding_readout,
    }


def _embedding(feature: EmbeddingConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": feature.name,
        "kind": feature.kind,
        "per": feature.per,
        "emb_dim": feature.emb_dim,
        "default": USUAL[feature.name][1] if feature.name in USUAL else None,
    }
    if feature.num_classes is None:
        return found | {"in_dim": feature.in_dim}
    return found | {
        "lowest": -feature.offset,
        "highest": feature.num_classes - 1 - feature.offset,
    }


def _distances(model: Potential) -> dict[str, Any]:
    config = model.config
    where = "radial functions" if config.apply_cutoff else "output of the radial network"
    transform = repulsion = None
    if config.distance_transform != "None":
        transform = {"kind": config.distance_transform}
        transform |= _constants(model, "radial_embedding/distance_transform")
    if config.pair_repulsion:
        repulsion = {"kind": "ZBL"} | _constants(model, "pair_repulsion_fn")
    return {
        "cutoff": {"r_max": config.r_max, "power": config.cutoff_power, "applied_to": where},
        "radial_basis": {
            "kind": config.radial_type,
            "number": config.num_bessel,
            "coefficient": config.gaussian_coefficient,
        },
        "distance_transform": transform,
        "pair_repulsion": repulsion,
    }


def _constants(model: Potential, module: str) -> dict[str, Any]:
    """The constants of a module, except for the table of all elements' radii."""
    found: dict[str, Any] = {}
    for path, buffer in sorted(model.buffers.items()):
        parent, _, name = path.rpartition("/")
        if parent == module and name != "covalent_radii":
            values = [number(value) for value in np.ravel(buffer)]
            found[name] = values if np.ndim(buffer) else values[0]
    return found


def _heads(model: Potential) -> dict[str, Any]:
    symbols = [chemical_symbols[z] for z in model.atomic_numbers]
    found: dict[str, Any] = {"heads": list(model.heads)}
    for name in ("scale", "shift"):
        buffer = model.buffers.get(f"scale_shift/{name}")
        found[name] = None
        if buffer is not None:
            values = np.broadcast_to(np.ravel(np.asarray(buffer, np.float64)), len(model.heads))
            found[name] = dict(zip(model.heads, map(number, values), strict=True))
    found["elements"] = symbols
    found["e0s"] = {
        head: dict(zip(symbols, map(number, row), strict=True))
        for head, row in zip(model.heads, model.e0s, strict=True)
    }
    return found


def _counts(config: MACEConfig, params: Params) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    for path, leaf in tree.flatten(params).items():
        module = path.partition("/")[0]
        sizes[module] = sizes.get(module, 0) + int(np.size(leaf))
    groups = {
        group: sum(n for name, n in sizes.items() if name.startswith(group)) for group in GROUPS
    }
    last = len(config.interactions) - 1
    first = last + 1 - len(config.readouts)  # the layer of the first readout
    layers = [
        {
            "interaction": sizes.get(f"interactions_{i}", 0),
            "product": sizes.get(f"products_{i}", 0),
            "readout": sizes.get(f"readouts_{i - first}", 0),
        }
        for i in range(last + 1)
    ]
    total = sum(sizes.values())
    return {"parameters": groups | {"total": total}, "parameters_per_layer": layers}


def _dtypes(model: Potential, params: Params) -> dict[str, str]:
    constants = [a for name, a in model.buffers.items() if name != E0_BUFFER]
    return {
        "parameters": names_of(np.asarray(leaf).dtype for leaf in tree.flatten(params).values()),
        "constants": names_of(
            np.asarray(a).dtype for a in constants if np.asarray(a).dtype != bool
        ),
        "e0s": np.asarray(model.buffers[E0_BUFFER]).dtype.name,
    }


def names_of(dtypes: Iterable[np.dtype]) -> str:
    """The floating ones, e.g. ``"float32+float64"``."""
    return "+".join(
        sorted({dtype.name for dtype in dtypes if dtype.name.lstrip("b")[:5] == "float"})
    )
