"""A torch ``.model`` file becomes a potential and its parameters, without torch.

:mod:`converters.hyperparameters` tells the architecture, :mod:`converters.rules` where each number
belongs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from converters.checks import check_couplings, check_finite, check_heads, check_sharing
from converters.hyperparameters import config_of
from converters.reader import MALFORMED, ModelFile, ModelFileError, read
from converters.rules import buffer_path, check_coverage, parameter_rules
from jaxft import tree
from jaxft.potential import Potential
from jaxft.typing import Params

MAX_MESSAGE = 20_000  # characters; names and values in it are the file's

CONSTANT = ("radial_embedding.", "pair_repulsion_fn.")
"""Modules whose tensors are constants even where torch calls them parameters: a fine-tune turns the
Bessel buffer into a parameter outside its optimiser."""


def convert(
    path: str | Path, *, like: str | Path | None = None, allow_nonfinite: bool = False
) -> tuple[Potential, Params]:
    """Read a mace-torch ``.model``; parameters keep the file's numbers, bit for bit.

    Half-precision parameters are widened to float32, and mixed ones to the widest, exactly.

    Args:
      path: the file.
      like: for a state_dict or a training checkpoint, a whole model of the same architecture.
      allow_nonfinite: accept NaN and infinity among the numbers.

    Raises:
      ModelFileError: the file is not such a model, is damaged, or holds an architecture that this
        version does not reproduce exactly.
    """
    return from_file(read(path, like=like), allow_nonfinite=allow_nonfinite)


def convert_with_provenance(
    path: str | Path, *, like: str | Path | None = None, allow_nonfinite: bool = False
) -> tuple[Potential, Params, dict[str, Any]]:
    """As :func:`convert`, and where the model came from: file name, hash and dtype."""
    file = read(path, like=like)
    model, params = from_file(file, allow_nonfinite=allow_nonfinite)
    dtypes = {str(file.tensors[name].dtype) for name in _trained(file)}
    provenance = {
        "source": file.path.name,
        "sha256": file.sha256,
        "dtype": "+".join(sorted(dtypes)),
    }
    return model, params, provenance


def from_file(file: ModelFile, *, allow_nonfinite: bool = False) -> tuple[Potential, Params]:
    """As :func:`convert`, for a file already read."""
    with _readable_errors(file.path):
        return _from_file(file, allow_nonfinite)


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    """Turn what a file that makes no model can raise into one error of bounded length."""
    try:
        yield
    except ModelFileError as error:
        if len(str(error)) <= MAX_MESSAGE:
            raise
        raise ModelFileError(f"{str(error)[:MAX_MESSAGE]} …") from None
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, line['loc'])) or error.title}: {line['msg']:.200}"
            for line in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        more = f"; and {len(wrong) - 5} more" if wrong[5:] else ""
        raise ModelFileError(
            f"{path} holds hyper-parameters unknown to jaxft: {'; '.join(wrong[:5])}{more}.\n"
            "It is damaged, or please report how it was made."
        ) from error
    except MALFORMED as error:
        raise ModelFileError(
            f"{path} is damaged: its modules and tensors do not make a model ({error!r:.200})."
            "\nGet the file again from where it came."
        ) from error


def _from_file(file: ModelFile, allow_nonfinite: bool) -> tuple[Potential, Params]:
    check_sharing(file)
    config = config_of(file)
    rules = parameter_rules(config)
    trained = _trained(file)
    check_coverage(trained, (rule.name for rule in rules))
    if any(file.tensors[name].dtype.kind in "iub" for name in trained):
        raise ModelFileError(f"{file.path} has whole numbers among its parameters; it is damaged.")
    check_couplings(config, file)
    for name in ("scale", "shift"):
        check_heads(config, file, f"scale_shift.{name}", 1)
    check_heads(config, file, "atomic_energies_fn.atomic_energies", config.num_elements)
    if not allow_nonfinite:
        check_finite(file)
    wide = _widened([file.tensors[rule.name].dtype for rule in rules])
    leaves: dict[str, np.ndarray] = {}
    for rule in rules:
        leaves.update(rule.to_leaves(file.tensors[rule.name].astype(wide, copy=False)))
    buffers = {}
    for name, tensor in file.tensors.items():
        if name not in trained:
            is_real = tensor.dtype.kind not in "iub"
            dtype = _widened([tensor.dtype]) if is_real else tensor.dtype
            buffers[buffer_path(config, name)] = tensor.astype(dtype, copy=False)
    return Potential(config, buffers), tree.unflatten(leaves)


def _trained(file: ModelFile) -> set[str]:
    named = file.parameters & file.tensors.keys()
    return {name for name in named if not name.startswith(CONSTANT)}


def _widened(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The widest, at least float32; half precision (float16, bfloat16) fits into that exactly."""
    return np.result_type(*(np.float32 if d.itemsize < 4 else d for d in dtypes))
