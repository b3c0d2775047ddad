"""Read a torch ``.model`` file without torch: named arrays and an inert tree of modules.

:mod:`converters.container` opens the file and :mod:`converters.unpickle` turns its pickle into
:class:`Node` objects; :func:`read` checks that they are a model and names the tensors as torch's
``state_dict()`` does. It needs no torch, mace or e3nn, and runs nothing that the file contains;
``torch.load`` of a whole model executes any code in it.

Example:
  >>> file = read("MACE.model")                                            # doctest: +SKIP
  >>> file.tensors["interactions.0.linear_up.weight"].dtype                # doctest: +SKIP
  dtype('float64')
  >>> irreps(file.root.module("interactions.0").get("hidden_irreps"))      # doctest: +SKIP
  ((8, 0, 1), (8, 1, -1))
"""

import contextlib
import dataclasses
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from converters.container import GIVE, MALFORMED, unpack
from converters.unpickle import ModelFileError, Node, Reference

__all__ = ["MALFORMED", "ModelFile", "ModelFileError", "Node", "Reference", "irreps", "read"]

MAX_ENTRIES = 50_000  # modules, parameters and buffers; real files have under 2 000
MAX_DEPTH = 32
MAX_NAME = 100
MAX_TERMS = 4096  # irreps in one list; a tensor product of degrees up to 11 has a few hundred
MAX_PATH = 500  # characters of a dotted name; real ones have under 100

MODELS = ("mace.modules.models.MACE", "mace.modules.models.ScaleShiftMACE")

LACKS = (
    "weights without the model's hyper-parameters (irreps, average number of neighbours, "
    "activations, tensor-product instructions); give the .model file of the same run instead, or "
    "one of the same architecture as well: --like FILE.model (like= in Python)"
)


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A torch model, as data.

    Attributes:
      path: Where it was read from.
      sha256: Of the whole file, in hexadecimal.
      root: The model's tree of modules, with all hyper-parameters.
      tensors: As torch's ``state_dict()``: names, order, shapes, dtypes and bits. Read-only;
        tensors that share a storage in the file share memory. The Clebsch-Gordan constants inside
        e3nn's compiled code (``…_compiled_main_left_right._w3j_…``) are the only ones left out.
      parameters: Which of the names are trainable parameters in torch; the others are buffers.
    """

    path: Path
    sha256: str
    root: Node
    tensors: dict[str, np.ndarray]
    parameters: frozenset[str]


def read(
    path: str | Path, *, like: str | Path | None = None, max_bytes: int = 4 << 30
) -> ModelFile:
    """Read a torch ``.model`` file, or the weights of a training checkpoint.

    Args:
      path: A whole MACE model as ``mace_run_train`` saves it, pickle protocol 2 to 5. With
        ``like``: a ``state_dict()``, or a checkpoint of ``mace_run_train`` (``.pt``).
      like: A whole model of the same architecture. It supplies the hyper-parameters, and
        what one of two versions of MACE may lack: empty tensors and masks, which the architecture
        determines. All other tensors are those of ``path``; their names and shapes must agree.
      max_bytes: The largest file, and the largest sum of tensor sizes, to accept.

    Raises:
      ModelFileError: For whatever is wrong with the file; it is the only error a file can cause.
    """
    path = Path(path)
    with _blaming(path):
        sha256, root = unpack(path, max_bytes)
        if _is_model(root):
            if like is not None:
                raise ModelFileError(
                    "it is a whole model with its hyper-parameters; leave out --like (like= in "
                    "Python)"
                )
            return ModelFile(path, sha256, root, *_state_dict(root, max_bytes))
        if like is None:
            raise ModelFileError(_not_a_model(root))
        weights = _weights(root, max_bytes)
    with _blaming(Path(like)):
        _, model = unpack(Path(like), max_bytes)
        if not _is_model(model):
            raise ModelFileError(f"like must be a whole model, but {_not_a_model(model)}")
        tensors, parameters = _state_dict(model, max_bytes)
    with _blaming(path):
        tensors = _merge(tensors, weights, Path(like))
        _replace(model, tensors)
    return ModelFile(path, sha256, model, tensors, parameters)


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn what a damaged file can raise into one error that names the file."""
    try:
        yield
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error.__cause__
    except MALFORMED as error:
        raise ModelFileError(
            f"{path}: this is not an intact torch model ({type(error).__name__}: "
            f"{str(error)[:200]}); download or copy it again, or save it again in torch"
        ) from error


def _is_model(root: Any) -> bool:
    return isinstance(root, Node) and root.qualname in MODELS


def _not_a_model(root: Any) -> str:
    if isinstance(root, dict) and "model" in root:
        if _is_model(root["model"]):
            return (
                "it is a dict with a whole model under 'model'; save that alone, in torch: "
                "torch.save(torch.load(path, weights_only=False)['model'], new_path)"
            )
        return f"it is a training checkpoint: {LACKS}"
    if isinstance(root, dict) and all(isinstance(value, np.ndarray) for value in root.values()):
        return f"it is a bare state_dict: {LACKS}"
    if isinstance(root, dict):
        names = [str(key)[:40] for key in list(root)[:10]]
        return f"it holds a dict with the keys {names}, not a model; {GIVE}"
    kind = root.qualname if isinstance(root, Node | Reference) else type(root).__name__
    kind = {"ndarray": "tensor"}.get(kind, kind)
    return f"it holds a {kind}, not a MACE or ScaleShiftMACE model; {GIVE}"


def _weights(root: Any, max_bytes: int) -> dict[str, np.ndarray]:
    """The tensors of a state_dict, or of the one in a training checkpoint, by name."""
    found = root.get("model", root) if isinstance(root, dict) else None
    if not isinstance(found, dict):
        raise ModelFileError(
            f"expected a state_dict or a training checkpoint, but {_not_a_model(root)}"
        )
    if not found:
        raise ModelFileError(f"its state_dict is empty; {GIVE}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise ModelFileError(
                f"expected a state_dict, but its entry {str(name)[:80]!r} is a "
                f"{type(value).__name__}, not a tensor"
            )
    if sum(array.nbytes for array in found.values()) > max_bytes:
        raise ModelFileError(f"its tensors have more than max_bytes={max_bytes} bytes")
    return found


def _merge(
    like: dict[str, np.ndarray], weights: dict[str, np.ndarray], path: Path
) -> dict[str, np.ndarray]:
    """``weights`` under the names, and in the order, of ``like``; both must agree."""
    kept = {name for name in like.keys() - weights.keys() if _is_implied(name, like[name])}
    expected = {name: _layout(like[name]) for name in like if name not in kept}
    found = {
        name: _layout(array)
        for name, array in weights.items()
        if name in like or not _is_implied(name, array)
    }
    if expected != found:
        raise ModelFileError(
            f"its tensors are not those of a model like {path} (-: expected, +: found):\n"
            + _difference(expected, found)
            + "\ngive a whole model of the same architecture and number of elements and heads; "
            "weights in cuEquivariance layout or with LoRA adapters must be converted or merged "
            "first, in torch"
        )
    merged = {name: like[name] if name in kept else weights[name] for name in like}
    dtypes = {array.dtype for name, array in merged.items() if name not in kept}
    floats = {dtype for dtype in dtypes if _kind(dtype) == "float"}
    if len(floats) == 1:  # so that the model has one precision; masks are zeros and ones
        (dtype,) = floats
        for name in sorted(kept):
            if _kind(like[name].dtype) == "float" and like[name].dtype != dtype:
                merged[name] = like[name].astype(dtype)
                merged[name].flags.writeable = False
    return merged


def _is_implied(name: str, array: np.ndarray) -> bool:
    """Whether a tensor follows from the architecture, so that versions of MACE may leave it out."""
    implied = name.endswith(("_zeroed", "output_mask")) or "_compiled_main" in name
    return implied or array.size == 0


def _layout(array: np.ndarray) -> str:
    return f"{_kind(array.dtype)} {array.shape}"


def _kind(dtype: np.dtype) -> str:
    """``float``, ``int`` or ``bool``, as torch converts freely between precisions."""
    name = dtype.name.rstrip("0123456789")
    return {"bfloat": "float", "uint": "int"}.get(name, name)


def _difference(expected: dict[str, str], found: dict[str, str], most: int = 12) -> str:
    removed = [(name, "-", what) for name, what in expected.items() if found.get(name) != what]
    added = [(name, "+", what) for name, what in found.items() if expected.get(name) != what]
    lines = sorted(removed + added, key=lambda line: (line[0], line[1] == "+"))
    shown = [
        f"  {sign} {name[:100] if name.isprintable() else ascii(name[:100])}: {what[:100]}"
        for name, sign, what in lines[:most]
    ]
    return "\n".join(shown + [f"  and {len(lines) - most} more"] * (len(lines) > most))


def _replace(root: Node, tensors: dict[str, np.ndarray]) -> None:
    """Put the tensors into the tree, which is ours alone, so that both say the same."""
    for name, array in tensors.items():
        path, _, leaf = name.rpartition(".")
        node = root.module(path) if path else root
        buffers = node._table("_buffers")
        (buffers if buffers.get(leaf) is not None else node._table("_parameters"))[leaf] = array


def _state_dict(root: Node, max_bytes: int) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """Name the tensors depth first, as torch does: parameters, then buffers, then sub-modules."""
    tensors: dict[str, np.ndarray] = {}
    parameters: set[str] = set()
    pending = [("", 0, root)]
    entries = total = 0
    while pending:
        prefix, depth, node = pending.pop()
        if not isinstance(node, Node):
            raise ModelFileError(f"the sub-module {prefix!r} is a {type(node).__name__}")
        tables = [node._table(key) for key in ("_parameters", "_buffers", "_modules")]
        entries += 1 + sum(map(len, tables))
        if depth > MAX_DEPTH or len(prefix) > MAX_PATH or entries > MAX_ENTRIES:
            raise ModelFileError(
                f"its modules are nested deeper than {MAX_DEPTH}, contain each other, or have "
                f"names of more than {MAX_PATH} characters or more than {MAX_ENTRIES} entries; "
                "that is no MACE model"
            )
        own = _own_tensors(prefix, node)
        tensors |= own
        parameters |= own.keys() & {prefix + name for name in node._table("_parameters")}
        total += sum(array.nbytes for array in own.values())
        if total > max_bytes:
            raise ModelFileError(f"its tensors have more than max_bytes={max_bytes} bytes")
        below = [(f"{prefix}{_checked(name)}.", child) for name, child in node.children.items()]
        pending.extend((name, depth + 1, child) for name, child in reversed(below))
    return tensors, frozenset(parameters)


def _own_tensors(prefix: str, node: Node) -> dict[str, np.ndarray]:
    hidden = node.state.get("_non_persistent_buffers_set", set())
    if type(hidden) is not set:
        raise ModelFileError(
            f"the module {prefix!r} is damaged: a set is a {type(hidden).__name__}"
        )
    buffers = {name: t for name, t in node._table("_buffers").items() if name not in hidden}
    own = {}
    for name, value in (*node._table("_parameters").items(), *buffers.items()):
        if isinstance(value, np.ndarray):
            own[prefix + _checked(name)] = value
        elif value is not None:
            kind = type(value).__name__
            raise ModelFileError(f"the tensor {prefix}{_checked(name)} is a {kind}")
    return own


def _checked(name: Any) -> str:
    # torch forbids dots in names, so dotted paths are unique; depth would multiply long names;
    # what cannot be printed could act on the terminal that shows it
    sound = isinstance(name, str) and 0 < len(name) <= MAX_NAME
    if not sound or "." in name or not name.isprintable():
        raise ModelFileError(f"{str(name)[:80]!r} cannot be the name of a tensor or module")
    return name


_IRREP = re.compile(r"\s*(?:(\d{1,9})\s*x\s*)?(\d{1,3})([eo])\s*")


def irreps(value: Node | str) -> tuple[tuple[int, int, int], ...]:
    """Irreps as ``((mul, l, p), ...)``, in the order of the file.

    Args:
      value: An ``Irreps`` object of the file, or its string; both occur (``hidden_irreps`` of the
        last layer is a string).

    Example:
      >>> irreps("8x0e+8x1o")
      ((8, 0, 1), (8, 1, -1))
    """
    if isinstance(value, str):
        if len(value) > 16 * MAX_TERMS:
            raise ModelFileError(f"a list of irreps has {len(value)} characters; no MACE has that")
        terms = [_IRREP.fullmatch(term) for term in value.split("+")] if value.strip() else []
        if not all(terms):
            raise ModelFileError(f"{value[:80]!r} is not a sum of irreps such as '8x0e+8x1o'")
        return tuple((int(m[1] or 1), int(m[2]), 1 if m[3] == "e" else -1) for m in terms if m)
    try:
        (terms,) = value.args
        parsed = tuple(_multiplicity(term) for term in terms[: MAX_TERMS + 1])
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelFileError(f"{type(value).__name__} is not an Irreps object of e3nn") from error
    if len(parsed) > MAX_TERMS:
        raise ModelFileError(f"an Irreps object has {len(terms)} terms; no MACE has that")
    for mul, degree, parity in parsed:
        if mul < 0 or degree < 0 or abs(parity) != 1:
            raise ModelFileError(
                "an Irreps object of the file has no (multiplicity, degree, parity)"
            )
    return parsed


def _multiplicity(term: Node) -> tuple[int, int, int]:
    # All three are tuples in e3nn, pickled as one argument: _MulIr((mul, Irrep((l, p))))
    ((mul, irrep),) = term.args
    ((degree, parity),) = irrep.args
    return operator.index(mul), operator.index(degree), operator.index(parity)
