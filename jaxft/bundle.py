"""The model on disk: a folder with ``model.json`` and ``params.safetensors``.

Nothing in a bundle is executed. ``model.json`` holds the architecture and where it came from;
the safetensors file holds parameters (``params/…``) and constants (``buffers/…``) under their
paths, in the dtypes of the original file.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxft import tree
from jaxft.document import loads
from jaxft.models.config import MACEConfig
from jaxft.potential import E0_BUFFER, MEANS_BUFFER, Potential
from jaxft.typing import Params

FORMAT = "jaxft-bundle"
VERSION = 1
MODEL, ARRAYS = "model.json", "params.safetensors"
MAX_JSON = 16 << 20
"""Bytes; a real ``model.json`` has a few kB."""

DTYPES = ("float32", "float64")


class BundleError(ValueError):
    """A folder is not a bundle, or a damaged one."""


def save(
    path: str | Path,
    model: Potential,
    params: Params,
    *,
    provenance: Mapping[str, Any] | None = None,
    allow_nonfinite: bool = False,
) -> Path:
    """Write a bundle; the folder appears complete or not at all.

    Args:
      path: of the new folder, by custom ``NAME.jaxft``.
      model: the potential.
      params: its parameters.
      provenance: anything JSON can hold: source file and hash, settings, data.
      allow_nonfinite: accept NaN and infinity; the bundle says where they are, and loads.

    Raises:
      FileExistsError: ``path`` exists; nothing is overwritten.
    """
    path = Path(path)
    refuse_existing(path)
    flat = {name: np.asarray(leaf) for name, leaf in tree.flatten(params).items()}
    wrong = _nonfinite({**model.buffers, **flat})
    check(model, flat, source="the model to be saved", nonfinite=wrong if allow_nonfinite else ())
    arrays = {f"params/{name}": leaf for name, leaf in flat.items()}
    arrays |= {f"buffers/{name}": np.asarray(value) for name, value in model.buffers.items()}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": model.config.model_dump(mode="json"),
        "provenance": dict(provenance or {}),
    }
    if wrong:
        document["nonfinite"] = wrong
    with whole_folder(path) as scratch:
        (scratch / MODEL).write_text(json.dumps(document, indent=1) + "\n")
        save_file({name: np.asarray(a, order="C") for name, a in arrays.items()}, scratch / ARRAYS)
    return path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes ``path`` at the end, or vanishes if anything goes wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        os.rename(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def load(path: str | Path, *, dtype: str | None = None) -> tuple[Potential, Params]:
    """Read a bundle.

    Args:
      path: the folder.
      dtype: of the parameters: ``"float32"``, ``"float64"``, or None for the stored one. Constants
        keep the file's; isolated-atom energies are summed in float64 whatever it is.

    Returns:
      The potential and its parameters as jax arrays.

    Raises:
      BundleError: the folder is not a bundle, is damaged, or holds non-finite numbers.
      ValueError: float64 is asked for while JAX has it switched off.
    """
    model, params, _ = load_numpy(path)
    wanted = require_dtype(dtype or stored_dtype(params))
    return model, jax.tree.map(lambda leaf: jnp.asarray(leaf, wanted), params)


def load_numpy(path: str | Path) -> tuple[Potential, Params, dict[str, Any]]:
    """Potential, parameters as stored, provenance; errors as :func:`load`, save for dtypes."""
    path = Path(path)
    config, provenance, nonfinite = _read_document(path)
    arrays = _read_arrays(path / ARRAYS)
    flat = _under(arrays, "params/")
    model = Potential(config, _under(arrays, "buffers/"))
    check(model, flat, source=str(path), nonfinite=nonfinite)
    return model, tree.unflatten(flat), provenance


def stored_dtype(params: Params) -> str:
    """The dtype of a parameter tree."""
    return np.result_type(*jax.tree.leaves(params)).name


def cast(model: Potential, params: Params, dtype: str) -> tuple[Potential, Params]:
    """Parameters and floating constants in another dtype (numpy); E0s keep theirs.

    E0s of heavy elements lose millielectronvolts in float32, so they are never cast.
    """

    def leaf(array: np.ndarray) -> np.ndarray:
        is_real = np.issubdtype(np.asarray(array).dtype, np.floating)
        return np.asarray(array).astype(dtype) if is_real else np.asarray(array)

    buffers = {
        name: value if name == E0_BUFFER else leaf(value) for name, value in model.buffers.items()
    }
    return replace(model, buffers=buffers), jax.tree.map(leaf, params)


def require_dtype(dtype: str) -> str:
    """``dtype`` if this process can compute in it, else ValueError."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}.")
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError(
            "float64 was asked for, but JAX computes in float32 only;\n"
            'call jax.config.update("jax_enable_x64", True) first, or load with dtype="float32".'
        )
    return dtype


def read_model(path: str | Path) -> tuple[MACEConfig, dict[str, Any]]:
    """Architecture and provenance of a bundle, without its numbers; errors as :func:`load`."""
    config, provenance, _ = _read_document(Path(path))
    return config, provenance


def _read_document(path: Path) -> tuple[MACEConfig, dict[str, Any], list[str]]:
    """Architecture, provenance, and the paths of the numbers that need not be finite."""
    file = path / MODEL
    if not file.is_file() or not (path / ARRAYS).is_file():
        raise BundleError(
            f"{path} is not a jaxft bundle: expected a folder with {MODEL} and {ARRAYS};\n"
            "make one from a torch file with `jaxft convert FILE.model NAME.jaxft`."
        )
    if file.stat().st_size > MAX_JSON:
        raise BundleError(f"{file} has {file.stat().st_size} bytes; expected less than {MAX_JSON}.")
    try:
        document = loads(file.read_text())
    except ValueError as error:
        raise BundleError(f"{file} is not JSON ({error}); the bundle is damaged.") from error
    try:
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            raise BundleError(
                f"{file} says format {document.get('format')!r}, version "
                f"{document.get('version')!r}; this jaxft reads {FORMAT!r}, version {VERSION}."
            )
        config, provenance = MACEConfig.model_validate(document["model"]), document["provenance"]
        if not isinstance(provenance, dict):
            raise BundleError(f"{file}: provenance is no mapping; the bundle was edited.")
        return config, provenance, [str(name) for name in document.get("nonfinite", [])]
    except (KeyError, AttributeError, TypeError, ValidationError) as error:
        raise BundleError(f"{file} does not describe a model: {error}") from error


def refuse_existing(path: Path) -> None:
    """Raises FileExistsError if ``path`` exists."""
    if path.exists():
        raise FileExistsError(f"{path} exists; nothing was overwritten. Give another name.")


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise BundleError(f"{file} cannot be read ({error}); the bundle is damaged.") from error


def _under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def check(
    model: Potential,
    flat: Mapping[str, np.ndarray],
    *,
    source: str,
    nonfinite: Collection[str] = (),
) -> None:
    """Raises BundleError unless ``{path: leaf}`` are finite and exactly the model's parameters.

    Paths among ``nonfinite`` may hold NaN and infinity.
    """
    if E0_BUFFER not in model.buffers:
        raise BundleError(f"{source} lacks the constant {E0_BUFFER}; it is damaged.")
    means = model.buffers.get(MEANS_BUFFER)
    has_means = means is not None and np.shape(means) == (len(model.atomic_numbers),)
    if (model.moments is not None) != has_means:
        raise BundleError(f"{source}: {MODEL} and the stored constants disagree on the moments.")
    wrong = sorted(set(_nonfinite({**model.buffers, **flat})) - set(nonfinite))
    if wrong:
        raise BundleError(f"{source} holds non-finite numbers in {', '.join(wrong)}.")
    dtypes = sorted({array.dtype.name for array in flat.values()})
    if len(dtypes) != 1 or dtypes[0] not in DTYPES:
        raise BundleError(
            f"{source} holds parameters of dtype {', '.join(dtypes) or 'none'}; expected one of "
            f"{', '.join(DTYPES)} for all."
        )
    for name, value in (("atomic_numbers", model.atomic_numbers), ("r_max", model.r_max)):
        stored = model.buffers.get(name)
        if stored is None or not np.array_equal(stored, np.asarray(value, stored.dtype)):
            raise BundleError(f"{source}: {MODEL} and the stored constants disagree on {name}.")
    try:
        expected = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise BundleError(f"{source}: architecture and constants disagree ({error}).") from error
    shapes = {name: tuple(leaf.shape) for name, leaf in tree.flatten(expected).items()}
    given = {name: tuple(array.shape) for name, array in flat.items()}
    diff = tree.name_diff(
        (f"{k} {v}" for k, v in given.items()), (f"{k} {v}" for k, v in shapes.items())
    )
    if diff:
        raise BundleError(
            f"{source} does not hold this architecture's parameters (- expected, + found):\n{diff}"
        )


def _nonfinite(arrays: Mapping[str, np.ndarray]) -> list[str]:
    return [name for name, array in arrays.items() if not np.isfinite(array).all()]
