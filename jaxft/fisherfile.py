"""A Fisher as a file, beside the model that it belongs to."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxft import tree
from jaxft.document import loads
from jaxft.strategies.ewc import Fisher

FORMAT, VERSION = "jaxft-fisher", "1"

UNREADABLE = (
    SafetensorError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)
"""What a safetensors or JSON file that is none, or a damaged one, raises."""


def save(path: str | Path, fisher: Fisher) -> Path:
    """Write a Fisher as one safetensors file, the rest as JSON in its header.

    Args:
      path: of the new file, by custom ``NAME.fisher``, beside the model.
      fisher: from :func:`jaxft.fisher`.

    Raises:
      FileExistsError: ``path`` exists; nothing is overwritten.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; nothing was overwritten. Give another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"parameters": fisher.parameters, "provenance": dict(fisher.provenance)}
    header = {"format": FORMAT, "version": VERSION, "record": json.dumps(record)}
    arrays = {name: np.array(leaf, order="C") for name, leaf in tree.flatten(fisher.values).items()}
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file(arrays, scratch, metadata=header)
        Path(scratch).chmod(0o644)
        os.rename(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path


def load(path: str | Path) -> Fisher:
    """Read a Fisher; nothing in the file is executed.

    Raises:
      ValueError: the file is not a Fisher, or a damaged one.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            given = header.get("format"), header.get("version")
            if given != (FORMAT, VERSION):
                raise ValueError(f"it says format {given[0]!r}, version {given[1]!r}")
            record = loads(header["record"])
            parameters, provenance = record["parameters"], dict(record["provenance"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Fisher(tree.unflatten(arrays), parameters, provenance)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is not a Fisher that this jaxft reads: {error}.\n"
            "Estimate one with jaxft.fisher, and write it with `save` of that module."
        ) from error
