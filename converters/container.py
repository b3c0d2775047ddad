"""The two containers that torch has for a pickle and its storages: a zip archive, and what it wrote
before version 1.6.

:func:`unpack` checks the file and its sizes before it reads a part of it, and hands the pickle to
:mod:`converters.unpickle`. Nothing here knows what a model is.
"""

import hashlib
import io
import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from converters.unpickle import ModelFileError, Storage, load
from converters.vocabulary import STORAGES

MAX_PICKLE = 32 << 20  # bytes; real files have 0.2 to 0.6 MB
MAX_DIRECTORY = 2 << 20  # bytes of the zip's table of contents
MAX_MEMBERS = 10_000

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

MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # torch's mark of its old format
LEGACY_VERSION = 1001

GIVE = "give the .model file that mace_run_train saved"

# Other kinds of file by their first bytes, in lower case, after white space.
KINDS = {
    b"version https://git-lfs": "it is a git-lfs pointer, not the file itself; run 'git lfs pull' "
    "or download the file from the web page",
    b"<!doctype html": "it is a web page, probably a failed download; download the file itself",
    b"<html": "it is a web page, probably a failed download; download the file itself",
    b"<?xml": "it is an XML page, probably a failed download; download the file itself",
    b"\x1f\x8b": "it is compressed with gzip; unpack it first: gunzip, or tar -xzf for an archive",
    b"bzh": "it is compressed with bzip2; unpack it first",
    b"\xfd7zxz": "it is compressed with xz; unpack it first",
    b"(\xb5/\xfd": "it is compressed with zstd; unpack it first",
    b"\x80": f"it is a Python pickle that torch.save did not write; {GIVE}",
    b"\x89hdf": f"it is an HDF5 file; {GIVE}",
}


def unpack(path: Path, max_bytes: int) -> tuple[str, Any]:
    """The SHA-256 of a torch file and the object that it holds."""
    if not path.exists():
        raise ModelFileError("there is no such file; expected a torch MACE .model file")
    if path.is_dir():
        raise ModelFileError("it is a directory; give a torch MACE .model file in it")
    if not path.is_file():
        raise ModelFileError("it is a pipe, socket or device; expected a torch MACE .model file")
    try:
        file = _CappedFile(path, opener=_opener)
    except OSError as error:
        raise ModelFileError(f"it cannot be opened ({error.strerror}); see its owner") from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError("it is no longer a regular file")
        if status.st_size > max_bytes:
            raise ModelFileError(f"it has {status.st_size} bytes, more than max_bytes={max_bytes}")
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        head = file.read(64)
        if head.startswith(b"PK\x03\x04"):
            archive = _Archive(file, status.st_size)
            return sha256, load(archive.pickle(), archive.storage)
        if MAGIC in head:
            return sha256, _Legacy(file, status.st_size).load()
        raise ModelFileError(_not_a_torch_file(head))


def _opener(path: str, flags: int) -> int:
    # A pipe put in the file's place after the checks would block for ever
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _not_a_torch_file(head: bytes) -> str:
    if not head:
        return f"it is empty; copy or download it again, or {GIVE}"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, message in KINDS.items():
        if start.startswith(mark):
            return message
    kind = "it is a text file" if _is_text(head) else "it is not a torch file"
    return f"{kind}: expected a zip archive, found the bytes {head[:12]!r}; {GIVE}"


def _is_text(head: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in head) and head.isascii()


class _CappedFile(io.FileIO):
    """A file that refuses large reads: zipfile allocates whatever size a directory claims."""

    cap = MAX_DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        most = self.cap + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        if len(data) > self.cap:
            raise ModelFileError(f"a part of the archive has more than {self.cap} bytes")
        return data


def _dtype(kind: str) -> np.dtype:
    dtype = STORAGES.get(kind)
    if dtype is None:
        raise ModelFileError(f"a storage has the type {kind!r}; expected {sorted(STORAGES)}")
    return dtype


class _Legacy:
    """A file in torch's format from before version 1.6.

    Pickles of a magic number, the format's version, the machine, the object and the keys of the
    storages follow one another; then come the storages, as ``<int64 size><raw>`` each. Since the
    object is built first, its tensors view memory that is filled afterwards.
    """

    def __init__(self, file: _CappedFile, size: int) -> None:
        self._file = file
        self._size = size
        self._claimed = 0
        self._storages: dict[str, tuple[np.dtype, np.ndarray]] = {}

    def load(self) -> Any:
        self._file.seek(0)
        self._file.cap = MAX_PICKLE
        stream = io.BytesIO(self._file.read(min(self._size, MAX_PICKLE)))
        magic, version, machine = (load(stream, _no_storage, limit=100) for _ in range(3))
        if type(magic) is not int or magic != int.from_bytes(MAGIC, "little"):
            raise ModelFileError("it does not begin with torch's magic number")
        if type(version) is not int or version != LEGACY_VERSION:
            raise ModelFileError(f"its format is not the version {LEGACY_VERSION} that torch wrote")
        if type(machine) is not dict or machine.get("little_endian") is not True:
            raise ModelFileError("it was written on a big-endian machine; save it on another one")
        root = load(stream, self.storage, legacy=True)
        keys = load(stream, _no_storage)
        if type(keys) is not list or len(keys) != len(self._storages):
            raise ModelFileError("its list of storages is not that of its pickle; it is damaged")
        self._file.seek(stream.tell())
        for key in keys:
            self._fill(*self._storages.pop(key))
        if self._file.tell() != self._size:
            raise ModelFileError("it goes on behind its last storage; download or copy it again")
        return root

    def storage(self, kind: str, key: str, size: int) -> Storage:
        """The storage of a persistent id, still without its content."""
        dtype = _dtype(kind)
        if key not in self._storages:
            self._claimed += 8 + size * dtype.itemsize
            if size < 0 or self._claimed > self._size:
                raise ModelFileError("its storages claim more bytes than the whole file has")
            self._storages[key] = dtype, np.empty(size * dtype.itemsize, np.uint8)
        known, raw = self._storages[key]
        if known != dtype or size * dtype.itemsize != raw.size:
            raise ModelFileError(f"its storage {key[:80]!r} has two types or sizes")
        return Storage(raw.data.toreadonly(), dtype)

    def _fill(self, dtype: np.dtype, raw: np.ndarray) -> None:
        size = int.from_bytes(self._file.read(8), "little")
        if size * dtype.itemsize != raw.size:
            raise ModelFileError("a storage has not the size that is declared; it is damaged")
        rest = raw.data
        while rest:
            count = self._file.readinto(rest)
            if not count:
                raise ModelFileError("it is truncated; download or copy it again")
            rest = rest[count:]


def _no_storage(kind: str, key: str, size: int) -> Storage:
    raise ModelFileError("its header has a storage")


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
        dtype = _dtype(kind)
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
