"""Read a torch ``.model`` file without torch: named arrays and an inert tree of modules.

``torch.save(model)`` writes a zip archive: ``<stem>/data.pkl`` holds the objects and
``<stem>/data/<key>`` the raw storages. :func:`read` checks the archive, lets
:mod:`converters.unpickle` turn the pickle into :class:`Node` objects, and names the tensors as
torch's ``state_dict()`` does. It needs no torch, mace or e3nn, and runs nothing that the file
contains; ``torch.load`` of a whole model executes any code in it.

Example:
  >>> file = read("MACE.model")                                            # doctest: +SKIP
  >>> file.tensors["interactions.0.linear_up.weight"].dtype                # doctest: +SKIP
  dtype('float64')
  >>> irreps(file.root.module("interactions.0").get("hidden_irreps"))      # doctest: +SKIP
  ((8, 0, 1), (8, 1, -1))
"""

import dataclasses
import hashlib
import io
import operator
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from converters.unpickle import ModelFileError, Node, Reference, Storage, load
from converters.vocabulary import STORAGES

__all__ = ["ModelFile", "ModelFileError", "Node", "Reference", "irreps", "read"]

MAX_PICKLE = 32 << 20  # bytes; real files have 0.2 to 0.6 MB
MAX_DIRECTORY = 2 << 20  # bytes of the zip's table of contents
MAX_MEMBERS = 10_000
MAX_ENTRIES = 50_000  # modules, parameters and buffers; real files have under 2 000
MAX_DEPTH = 32
MAX_NAME = 100

MODELS = ("mace.modules.models.MACE", "mace.modules.models.ScaleShiftMACE")

# What damaged bytes make zipfile, pickletools and NumPy raise. RuntimeError covers recursion,
# encryption and missing zip features; LookupError the stack and the memo; ArithmeticError integers
# beyond int64; Warning what Python says of bad escape sequences when warnings are errors.
MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    Warning,
    EOFError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
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


def read(path: str | Path, *, max_bytes: int = 4 << 30) -> ModelFile:
    """Read a torch ``.model`` file.

    Args:
      path: A whole MACE model as ``mace_run_train`` saves it, pickle protocol 2 to 5.
      max_bytes: The largest file, and the largest sum of tensor sizes, to accept.

    Raises:
      ModelFileError: For whatever is wrong with the file; it is the only error a file can cause.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: there is no such file; expected a torch MACE .model file")
    try:
        with _CappedFile(path) as file:
            return _read(path, file, max_bytes)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error.__cause__
    except MALFORMED as error:
        raise ModelFileError(
            f"{path}: this is not an intact torch model ({type(error).__name__}: "
            f"{str(error)[:200]}); download or copy it again, or save it again in torch"
        ) from error


def _read(path: Path, file: "_CappedFile", max_bytes: int) -> ModelFile:
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise ModelFileError(f"it has {size} bytes, more than max_bytes={max_bytes}")
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    _check_magic(file.read(64))
    archive = _Archive(file, size)
    root = load(archive.pickle(), archive.storage)
    if not isinstance(root, Node) or root.qualname not in MODELS:
        raise ModelFileError(_not_a_model(root))
    tensors, parameters = _state_dict(root, max_bytes)
    return ModelFile(path, sha256, root, tensors, parameters)


def _check_magic(head: bytes) -> None:
    if head.startswith(b"PK\x03\x04"):
        return
    if (0x1950A86A20F9469CFC6C).to_bytes(10, "little") in head:  # torch's mark of its old format
        raise ModelFileError(
            "it is in torch's format from before version 1.6; save it again with a newer torch: "
            "torch.save(torch.load(path, weights_only=False), new_path)"
        )
    raise ModelFileError(
        f"it is not a torch file: expected a zip archive, found the bytes {head[:12]!r}; "
        "give the .model file that mace_run_train saved"
    )


def _not_a_model(root: Any) -> str:
    if isinstance(root, dict) and "model" in root:
        return (
            "it is a training checkpoint: weights without the model's hyper-parameters; "
            "give the .model file of the same run"
        )
    if isinstance(root, dict):
        return (
            "it is a dict, probably a bare state_dict(): weights without the model's "
            "hyper-parameters; give the .model file they came from"
        )
    kind = root.qualname if isinstance(root, Node | Reference) else type(root).__name__
    return f"it holds a {kind}, not a MACE or ScaleShiftMACE model; give a whole saved model"


class _CappedFile(io.FileIO):
    """A file that refuses large reads: zipfile allocates whatever size a directory claims."""

    cap = MAX_DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        most = self.cap + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        if len(data) > self.cap:
            raise ModelFileError(f"a part of the archive has more than {self.cap} bytes")
        return data


class _Archive:
    """The zip archive behind a torch file, checked before any member is read."""

    def __init__(self, file: _CappedFile, size: int) -> None:
        try:
            self._zip = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise ModelFileError(
                f"the archive is truncated or damaged ({error}); download or copy it again"
            ) from error
        members = self._zip.infolist()
        self._members = {info.filename: info for info in members}
        self._storages: dict[str, bytes] = {}
        if len(members) > MAX_MEMBERS or len(members) != len(self._members):
            raise ModelFileError(
                f"the archive has {len(members)} members with {len(self._members)} names; "
                f"expected distinct ones, at most {MAX_MEMBERS}"
            )
        self._stem = self._find_stem()
        for info in members:
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ModelFileError(
                    f"the member {info.filename[:80]!r} is compressed, which torch never does; "
                    "give the file as torch saved it"
                )
        if sum(info.file_size for info in members) > size:
            raise ModelFileError("its members claim more bytes than the whole file has")
        file.cap = size

    def _find_stem(self) -> str:
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in self._members):
            raise ModelFileError(
                "it is a TorchScript program; give the .model file saved beside it, "
                "the one without '_compiled' or '-lammps' in its name"
            )
        pickles = [name for name in self._members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ModelFileError(
                f"it is a zip archive but not a torch file: {len(pickles)} members are called "
                "data.pkl, expected one; give the .model file that mace_run_train saved"
            )
        return pickles[0].removesuffix("/data.pkl")

    def pickle(self) -> bytes:
        order = f"{self._stem}/byteorder"
        if order in self._members and self._bytes(order, 16) != b"little":
            raise ModelFileError("it was written on a big-endian machine; save it on another one")
        return self._bytes(f"{self._stem}/data.pkl", MAX_PICKLE)

    def storage(self, kind: str, key: str, size: int) -> Storage:
        """The storage of a persistent id. Its location ('cuda:0') plays no role here."""
        dtype = STORAGES.get(kind)
        if dtype is None:
            raise ModelFileError(f"a storage has the type {kind!r}; expected {sorted(STORAGES)}")
        member = f"{self._stem}/data/{key}"
        if key not in self._storages:
            self._storages[key] = self._bytes(member)
        raw = self._storages[key]
        if len(raw) != size * dtype.itemsize:
            raise ModelFileError(
                f"the storage {member[:80]!r} has {len(raw)} bytes, but {size} elements of {dtype} "
                "are declared; the file is damaged, download or copy it again"
            )
        return Storage(raw, dtype)

    def _bytes(self, name: str, limit: int | None = None) -> bytes:
        info = self._members.get(name)
        if info is None:
            raise ModelFileError(f"the archive has no member {name[:80]!r}; the file is damaged")
        if limit is not None and info.file_size > limit:
            raise ModelFileError(f"{name[:80]!r} has {info.file_size} bytes, more than {limit}")
        return self._zip.read(info)


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
        if depth > MAX_DEPTH or entries > MAX_ENTRIES:
            raise ModelFileError(
                f"its modules are nested deeper than {MAX_DEPTH}, contain each other, or have more "
                f"than {MAX_ENTRIES} entries; that is no MACE model"
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
            raise ModelFileError(f"the tensor {prefix}{name!s:.80} is a {type(value).__name__}")
    return own


def _checked(name: Any) -> str:
    # torch forbids dots in names, so dotted paths are unique; depth would multiply long names
    if not isinstance(name, str) or "." in name or not 0 < len(name) <= MAX_NAME:
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
        terms = [_IRREP.fullmatch(term) for term in value.split("+")] if value.strip() else []
        if not all(terms):
            raise ModelFileError(f"{value[:80]!r} is not a sum of irreps such as '8x0e+8x1o'")
        return tuple((int(m[1] or 1), int(m[2]), 1 if m[3] == "e" else -1) for m in terms if m)
    try:
        (terms,) = value.args
        parsed = tuple(_multiplicity(term) for term in terms)
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelFileError(f"{type(value).__name__} is not an Irreps object of e3nn") from error
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
