"""What is known of any model file or bundle: its facts, the published model next to it, its writer.

:func:`inspect` answers for all that the reader reads, also for what cannot be converted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from converters.architectures import nearest
from converters.reader import ModelFile, ModelFileError, Node, read
from converters.registry import identify
from converters.to_jax import from_file
from converters.writer import writer
from jaxft import inspection
from jaxft.bundle import read_model


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
    basis = "radial_embedding.bessel_fn"
    return {
        "format": inspection.FORMAT,
        "units": inspection.UNITS,
        "convertible": False,
        "reason": reason,
        "published": None,
        "nearest": None,
        "family": root.name,
        "blocks": _classes(root, "interactions"),
        "radial_basis": root.module(basis).name if root.has(basis) else None,
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
