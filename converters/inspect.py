"""What is known of any model file or bundle: its facts, the published model next to it, its writer.

:func:`inspect` answers for all that the reader reads, also for what cannot be converted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from converters.reader import MALFORMED, ModelFile, ModelFileError, irreps, read
from converters.registry import identify
from converters.to_jax import from_file
from converters.unpickle import Node
from jaxft import inspection
from jaxft.bundle import read_model
from jaxft.models.config import MACEConfig


def inspect(path: str | Path) -> dict[str, Any]:
    """The facts of a torch ``.model`` file or a bundle.

    Returns:
      The document of :func:`jaxft.inspection.facts`. Where ``convertible`` is False, ``reason``
      says why, and a model that jaxft cannot build lacks all keys that its modules do not tell:
      there are ``family``, ``blocks``, ``radial_basis``, ``readouts`` (names of classes), ``heads``
      and ``elements`` (as far as they are intact), ``tensors``, their number, ``modules``, the
      number of modules by class, ``parameters`` with ``total`` alone, and ``dtype``.

    Raises:
      ModelFileError: the file is no model that the reader reads.
      BundleError: the folder is no bundle, or a damaged one.
    """
    path = Path(path)
    if path.is_dir():
        found = inspection.of_bundle(path)
        config, provenance = read_model(path)
        relation, sha256 = _origin(provenance)
        return found | {"published": _published(sha256, relation), "nearest": nearest(config)}
    file = read(path)
    found = _of_file(file)
    size = path.stat().st_size
    return found | {
        "file": inspection.file_facts(path.name, "torch model", size, file.sha256),
        "published": _published(file.sha256, "is"),
        "writer": writer(file),
        "dtype": _dtypes(file),
    }


def _of_file(file: ModelFile) -> dict[str, Any]:
    reason = None
    try:
        model, params = from_file(file)
    except ModelFileError as error:
        reason = str(error)
        try:
            model, params = from_file(file, allow_nonfinite=True)
        except ModelFileError:
            return _of_modules(file, reason)
    found = inspection.facts(model, params, _provenance(file))
    return found | {
        "convertible": reason is None,
        "reason": reason,
        "nearest": nearest(model.config),
    }


def _of_modules(file: ModelFile, reason: str) -> dict[str, Any]:
    """What the names of classes and a few tensors tell."""
    root = file.root
    numbers = np.ravel(file.tensors.get("atomic_numbers", np.zeros(0, int)))[:118]
    heads = root.state.get("heads")
    is_names = (
        isinstance(heads, list)
        and len(heads) < 100
        and all(isinstance(head, str) for head in heads)
    )
    basis = [node.name for node in _named(root, "radial_embedding.bessel_fn")]
    return {
        "format": inspection.FORMAT,
        "units": inspection.UNITS,
        "convertible": False,
        "reason": reason,
        "published": None,
        "nearest": None,
        "family": root.name,
        "blocks": _classes(root, "interactions"),
        "radial_basis": basis[0] if basis else None,
        "readouts": _classes(root, "readouts"),
        "heads": heads if is_names else [],
        "elements": [chemical_symbols[int(z)] for z in numbers if 0 < z < len(chemical_symbols)],
        "tensors": len(file.tensors),
        "modules": dict(sorted(Counter(node.qualname for node in _walk(root)).items())),
        "parameters": {"total": sum(int(file.tensors[name].size) for name in file.parameters)},
        "provenance": _provenance(file),
    }


def _classes(root: Node, name: str) -> list[str]:
    return [node.name for node in root.module(name).children.values()] if root.has(name) else []


def _walk(node: Node) -> list[Node]:
    return [node, *(inner for child in node.children.values() for inner in _walk(child))]


def _provenance(file: ModelFile) -> dict[str, str]:
    """As the conversion records it."""
    dtype = _dtypes(file)["parameters"]
    return {"source": file.path.name, "sha256": file.sha256, "dtype": dtype}


def _dtypes(file: ModelFile) -> dict[str, str]:
    e0s = "atomic_energies_fn.atomic_energies"
    constants = [t for n, t in file.tensors.items() if n not in file.parameters and n != e0s]
    return {
        "parameters": inspection.names_of(file.tensors[name].dtype for name in file.parameters),
        "constants": inspection.names_of(tensor.dtype for tensor in constants),
        "e0s": file.tensors[e0s].dtype.name if e0s in file.tensors else "",
    }


# The published file


def _origin(provenance: Mapping[str, Any]) -> tuple[str, Any]:
    """How a bundle relates to the file that it came from, and that file's digest."""
    relation = "converted from"
    while "sha256" not in provenance and isinstance(provenance.get("base"), Mapping):
        provenance, relation = provenance["base"], "derived from"
    if provenance.keys() - {"source", "sha256", "dtype"}:
        relation = "derived from"
    return relation, provenance.get("sha256")


def _published(sha256: Any, relation: str) -> dict[str, str] | None:
    entry = identify(sha256) if isinstance(sha256, str) else None
    if entry is None:
        return None
    return {
        "name": entry.name,
        "relation": relation,
        "licence": entry.licence,
        "citation": entry.citation,
        "url": entry.url,
    }


# The nearest architecture

MP_ELEMENTS = tuple(z for z in range(1, 95) if not 84 <= z <= 88)
OFF_ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17, 35, 53)

A, R, D, DR, NL = (
    f"RealAgnostic{kind}InteractionBlock"
    for kind in ("", "Residual", "Density", "DensityResidual", "ResidualNonLinear")
)
SMALL, MEDIUM, LARGE = "128x0e", "128x0e+128x1o", "128x0e+128x1o+128x2e"

_COMMON: dict[str, Any] = {
    "class": "ScaleShiftMACE",
    "harmonics": "1x0e+1x1o+1x2e+1x3o",
    "correlation": "3",
    "cutoff power": 5,
    "radial basis": "bessel",
    "distance transform": "None",
    "repulsion": "none",
    "cutoff applied to": "radial functions",
    "radial network": "64-64-64",
    "gate": "silu",
    "readouts": "linear | nonlinear 16",
    "sender irreps": "all",
    "product weights": "per element",
    "embeddings": "none",
    "heads": 1,
}
_MP = _COMMON | {"elements": MP_ELEMENTS, "r_max": 6.0}
_ZBL = _MP | {"distance transform": "Agnesi", "repulsion": "ZBL"}
_MP0 = _MP | {"interactions": f"{R} | {R}", "radial functions": 10}
_0B = _ZBL | {"interactions": f"{A} | {R}", "radial functions": 8}
_DENSITY = _ZBL | {"interactions": f"{D} | {DR}"}
_0B2 = _DENSITY | {"radial functions": 8, "r_max": 5.0}
_OFF = _COMMON | {
    "elements": OFF_ELEMENTS,
    "interactions": f"{A} | {R}",
    "radial functions": 8,
    "r_max": 5.0,
}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "mace-mp-0-small": _MP0 | {"hidden irreps": SMALL},
    "mace-mp-0-medium": _MP0 | {"hidden irreps": MEDIUM},
    "mace-mp-0-large": _MP0 | {"hidden irreps": LARGE},
    "mace-mp-0b-small": _0B | {"hidden irreps": SMALL},
    "mace-mp-0b-medium": _0B | {"hidden irreps": MEDIUM},
    "mace-mp-0b2-small": _0B2 | {"hidden irreps": SMALL},
    "mace-mp-0b2-medium": _0B2 | {"hidden irreps": MEDIUM},
    "mace-mp-0b2-large": _0B2 | {"hidden irreps": LARGE},
    "mace-mp-0b3-medium": _DENSITY | {"hidden irreps": MEDIUM, "radial functions": 10},
    "mace-mpa-0-medium": _DENSITY | {"hidden irreps": MEDIUM},
    "mace-omat-0-small": _DENSITY | {"hidden irreps": SMALL},
    "mace-omat-0-medium": _DENSITY | {"hidden irreps": MEDIUM},
    "mace-matpes-pbe-0": _DENSITY | {"hidden irreps": MEDIUM},
    "mace-matpes-r2scan-0": _DENSITY | {"hidden irreps": MEDIUM},
    "mace-mh-1": {key: value for key, value in _ZBL.items() if key != "readouts"}
    | {
        "interactions": f"{NL} | {NL}",
        "hidden irreps": "512x0e+512x1o",
        "sender irreps": "128x0e | 128x0e+128x1o",
        "radial functions": 10,
        "cutoff applied to": "output of the radial network",
        "product weights": "shared",
        "heads": 6,
    },
    "mace-off23-medium": _OFF | {"hidden irreps": MEDIUM},
    "mace-omol-0-extra-large": {
        key: value
        for key, value in _COMMON.items()
        if key not in ("readouts", "sender irreps", "product weights")
    }
    | {
        "elements": 83,
        "interactions": f"{NL} | {NL} | {NL}",
        "hidden irreps": "1024x0e+1024x1o+1024x2e",
        "correlation": "2",
        "radial functions": 8,
        "r_max": 6.0,
        "cutoff applied to": "output of the radial network",
        "embeddings": "total_spin (101, offset 0) | total_charge (201, offset 100)",
    },
}
"""What is published of the architectures, by name of the registry; what is not is left out.

MH-0, OFF23 small and large, OFF23b, OFF24 and ANI-cc are missing: their irreps or blocks are not
public. Sources: the training scripts in ACEsuit/mace-foundations, the release notes, and
arXiv:2401.00096, 2312.15211, 2510.25380. The number of radial functions of MPA-0, OMAT-0 and MatPES
and the readouts of MH-1 and OMOL are not published.
"""


def nearest(config: MACEConfig) -> dict[str, Any]:
    """The entry ``nearest``: all published models whose known facts agree, or else the closest.

    A fact that is not published counts as half a difference when the closest is chosen. All models
    that differ in the same way are named.
    """
    found = _features(config)
    differs = {
        name: {k: (found[k], there) for k, there in known.items() if not _agree(found, k, there)}
        for name, known in ARCHITECTURES.items()
    }
    unknown = {name: sorted(found.keys() - known) for name, known in ARCHITECTURES.items()}
    degrees = _degrees(found["hidden irreps"])

    def distance(name: str) -> tuple[bool, int, bool]:
        other = _degrees(ARCHITECTURES[name]["hidden irreps"]) != degrees
        return bool(differs[name]), 2 * len(differs[name]) + len(unknown[name]), other

    best = differs[min(differs, key=distance)]
    names = [name for name, difference in differs.items() if difference == best]
    return {
        "names": names,
        "is_same": not best,
        "differs": {k: [_brief(here), _brief(there)] for k, (here, there) in sorted(best.items())},
        "unknown": {name: unknown[name] for name in names if unknown[name]},
    }


def _features(config: MACEConfig) -> dict[str, Any]:
    """The facts of ``ARCHITECTURES``, of a model."""
    blocks, products = config.interactions, config.products
    one = {product.is_agnostic for product in products} == {True}
    sent = " | ".join(block.sent_irreps for block in blocks)
    is_all = all(block.sender_irreps is None for block in blocks)
    where = "radial functions" if config.apply_cutoff else "output of the radial network"
    embeddings = [
        f"{item.name} ({item.num_classes}, offset {item.offset})"
        if item.num_classes
        else f"{item.name} ({item.in_dim})"
        for item in config.embeddings
    ]
    widths = {"-".join(map(str, block.radial_mlp)): None for block in blocks}
    return {
        "class": config.family,
        "interactions": " | ".join(block.block for block in blocks),
        "hidden irreps": _hidden(config),
        "sender irreps": "all" if is_all else sent,
        "harmonics": config.edge_irreps,
        "correlation": " | ".join({str(p.correlation): None for p in products}),
        "r_max": config.r_max,
        "cutoff power": config.cutoff_power,
        "cutoff applied to": where,
        "radial basis": config.radial_type,
        "radial functions": config.num_bessel,
        "distance transform": config.distance_transform,
        "repulsion": "ZBL" if config.pair_repulsion else "none",
        "radial network": " | ".join(widths),
        "gate": config.gate,
        "readouts": _readouts(config),
        "product weights": "shared" if one else "per element",
        "embeddings": " | ".join(embeddings) or "none",
        "heads": len(config.heads),
        "elements": config.atomic_numbers,
    }


def _hidden(config: MACEConfig) -> str:
    """Of all layers but the last, which is expected to keep the scalars alone."""
    *inner, last = [product.irreps_out for product in config.products]
    first = inner[0] if inner else last
    expected = [first] * len(inner) + [first.split("+")[0]]
    return first if [*inner, last] == expected else " | ".join([*inner, last])


def _readouts(config: MACEConfig) -> str:
    """Kinds and hidden widths per head."""
    heads = len(config.heads)
    shown = [
        r.kind if r.kind == "linear" else f"{r.kind} {int(r.hidden_irreps.split('x')[0]) // heads}"
        for r in config.readouts
    ]
    return " | ".join(shown)


def _degrees(hidden: str) -> list[str]:
    """``["0e", "1o"]`` of ``"128x0e+128x1o"``."""
    return [term.rpartition("x")[2] for term in hidden.split("+")]


def _agree(found: Mapping[str, Any], key: str, there: Any) -> bool:
    here = found[key]
    if key == "elements":
        return len(here) == there if isinstance(there, int) else set(here) == set(there)
    return bool(here == there)


def _brief(value: Any) -> Any:
    """Elements by number, blocks without what all their names share."""
    if isinstance(value, tuple):
        return len(value)
    if isinstance(value, str):
        return value.replace("InteractionBlock", "")
    return value


# The writer


@dataclass(frozen=True)
class Mark:
    """A feature of the tree of modules that one version of mace-torch introduced."""

    since: str
    is_there: bool | None
    """None: the model has no module that could show it."""


VERSIONS = ("0.3.4", *(f"0.3.{i}" for i in range(5, 17)))
"""All that the Python package index has of 0.3; the table below was read off their sources."""


def writer(file: ModelFile) -> dict[str, str | None]:
    """The versions of mace-torch that can have built the model, from what its modules have.

    A model keeps the attributes with which it was built when a later version loads and saves it.

    ===========  ==============================================================================
    since        mark
    ===========  ==============================================================================
    0.3.5        Agnesi or Soft transform, Chebyshev basis, ZBL repulsion
    0.3.7        attribute ``heads``; ``num_heads`` of non-linear readouts; density blocks
    0.3.9        ``cueq_config`` of interactions
    0.3.10       the cutoff's ``p`` is an integer; ZBL without a ``cutoff`` of its own; Soft with
                 ``alpha`` instead of ``a`` and ``b``
    0.3.11       ``cueq_config`` of products
    0.3.13       attribute ``lammps_mliap``
    0.3.14       attribute ``apply_cutoff``; ``…_zeroed`` flags of contractions; ``oeq_config`` of
                 interactions; non-linear blocks
    0.3.15       attribute ``use_edge_irreps_first``; other irreps sent than received in layer 0
    0.3.16       gates of ``mace.modules.gate`` in non-linear blocks; irreps other than scalars
                 behind the last layer
    ===========  ==============================================================================

    Within these, versions are not told apart (0.3.5 and 0.3.6; 0.3.7 and 0.3.8; 0.3.11 and 0.3.12);
    0.3.15 and 0.3.16 only by a non-linear block. Before 0.3.4 nothing was on the index.

    Returns:
      ``text``, and ``at_least`` and ``at_most``, each a version or None.
    """
    try:
        marks = _marks(file)
    except MALFORMED:
        marks = []
    there = [mark.since for mark in marks if mark.is_there]
    absent = [mark.since for mark in marks if mark.is_there is False]
    low = max(there, key=VERSIONS.index, default=None)
    first_absent = min(absent, key=VERSIONS.index, default=None)
    high = VERSIONS[VERSIONS.index(first_absent) - 1] if first_absent else None
    if low and high and VERSIONS.index(low) > VERSIONS.index(high):
        text = (
            f"unknown, between releases or changed by hand: it has what mace-torch {low} brought, "
            f"but not all that {first_absent} brought"
        )
        return {"text": text, "at_least": None, "at_most": None}
    return {"text": _between(low, high), "at_least": low, "at_most": high}


def _between(low: str | None, high: str | None) -> str:
    if low is None and high is None:
        return "unknown"
    if low is None:
        return f"mace-torch {high} or older"
    if high is None:
        return f"mace-torch {low} or newer"
    return f"mace-torch {low}" if low == high else f"mace-torch {low} to {high}"


def _marks(file: ModelFile) -> list[Mark]:
    root = file.root
    blocks = list(root.module("interactions").children.values())
    products = list(root.module("products").children.values())
    nonlinear = [r for r in root.module("readouts").children.values() if "NonLinear" in r.name]
    gates = [b.module("equivariant_nonlin").qualname for b in blocks if b.has("equivariant_nonlin")]
    transforms = _named(root, "radial_embedding.distance_transform")
    repulsions = _named(root, "pair_repulsion_fn")
    soft = [node for node in transforms if node.name == "SoftTransform"]
    power = file.tensors.get("radial_embedding.cutoff_fn.p")
    chebyshev = [n for n in _named(root, "radial_embedding.bessel_fn") if n.name[:4] == "Cheb"]
    names = {block.name for block in blocks}
    received, sent = (
        irreps(blocks[0].module("linear_up").get(f"irreps_{x}")) for x in ("in", "out")
    )
    last = irreps(products[-1].module("linear").get("irreps_out"))

    def attribute(name: str) -> bool:
        return name in root.state

    def optional(has: bool) -> bool | None:
        return True if has else None

    return [
        Mark("0.3.5", optional(bool(transforms or repulsions or chebyshev))),
        Mark("0.3.7", attribute("heads")),
        Mark("0.3.7", all("num_heads" in r.state for r in nonlinear) if nonlinear else None),
        Mark("0.3.7", optional(any("Density" in name for name in names))),
        Mark("0.3.9", all("cueq_config" in block.state for block in blocks)),
        Mark("0.3.10", None if power is None else power.dtype.kind == "i"),
        Mark("0.3.10", not repulsions[0].has("cutoff") if repulsions else None),
        Mark("0.3.10", soft[0].get("alpha", None) is not None if soft else None),
        Mark("0.3.11", all("cueq_config" in product.state for product in products)),
        # LAMMPS scripts set it to True in models of any version
        Mark(
            "0.3.13", None if root.get("lammps_mliap", None) is True else attribute("lammps_mliap")
        ),
        Mark("0.3.14", attribute("apply_cutoff")),
        Mark("0.3.14", any(name.endswith("_zeroed") for name in file.tensors)),
        Mark("0.3.14", all("oeq_config" in block.state for block in blocks)),
        Mark("0.3.14", optional(any("NonLinear" in name for name in names))),
        Mark("0.3.15", attribute("use_edge_irreps_first")),
        Mark("0.3.15", optional(sent != received)),
        Mark("0.3.16", gates[0].startswith("mace.modules.gate.") if gates else None),
        Mark("0.3.16", optional(len(products) > 1 and any(degree for _, degree, _ in last))),
    ]


def _named(root: Node, path: str) -> list[Node]:
    return [root.module(path)] if root.has(path) else []
