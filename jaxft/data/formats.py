"""Structures in mace-torch's HDF5 and LMDB layouts, as ASE's Atoms; nothing is unpickled."""

from __future__ import annotations

import importlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ase
import numpy as np
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator

from jaxft.document import loads

HDF5 = frozenset({".h5", ".hdf5"})
LMDB = frozenset({".lmdb", ".aselmdb", ".mdb"})

MAX_FRAME_BYTES = 2**28
"""Of one frame when inflated; a frame beyond it is damaged or made to fill the memory."""

RESULTS = ("energy", "forces", "stress")
IN_ARRAYS = {"forces": "REF_forces", "charges": "REF_charges"}
IN_INFO = {"energy": "REF_energy", "stress": "REF_stress", "virials": "REF_virials"}
"""mace-torch's default names of what its files call ``forces``, ``energy``, …"""

UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, AttributeError, MemoryError)
"""What h5py raises where a file is not what it was."""

INSIDE = r"config_batch_(\d+)", r"config_(\d+)"
"""Groups of a preprocessed file: batches, and the configurations in them."""


def read(path: Path) -> list[ase.Atoms] | None:
    """The frames of an HDF5 or LMDB file or folder of shards; None for all else.

    Labels arrive under mace-torch's default names (``REF_energy``, …), where ``Keys`` looks first,
    and as results of a calculator (``energy``, …); weights as ``config_weight`` and
    ``config_energy_weight``, ….

    Raises:
      ValueError: as the readers; or there are no frames.
    """
    if path.suffix in LMDB and path.exists():
        images = read_lmdb(path)
    elif path.suffix in HDF5 and path.is_file():
        images = read_hdf5(path)
    elif path.is_dir() and any(file.suffix in HDF5 | LMDB for file in path.iterdir()):
        images = read_shards(path)
    else:
        return None
    if not images:
        raise ValueError(f"{path} holds no frames; expected at least one. Name another file.")
    return images


def read_shards(path: Path) -> list[ase.Atoms]:
    """All frames of the HDF5 files, or of the LMDB files, of a folder; other files are left alone.

    Files come in the order of the numbers in their names: ``train_2.h5`` before ``train_10.h5``.

    Raises:
      ValueError: the folder holds files of both kinds; else as the readers.
    """
    files = sorted((f for f in path.iterdir() if f.suffix in HDF5 | LMDB), key=_natural)
    kinds = {file.suffix in HDF5 for file in files}
    if len(kinds) > 1:
        raise ValueError(
            f"{path} holds {files[0].name}, {files[-1].name}, …: HDF5 and LMDB; expected the "
            "shards of one data set. Name the files that you want."
        )
    read_one = read_hdf5 if kinds == {True} else read_lmdb
    return [atoms for file in files for atoms in read_one(file)]


def _natural(path: Path) -> list[tuple[str, int]]:
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", path.name)]


def _optional(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{path} needs the package {module}, which is not installed; "
            "pip install 'jaxft[formats]'."
        ) from error


def read_hdf5(path: Path) -> list[ase.Atoms]:
    """All frames of a file that ``mace_prepare_data`` wrote.

    A property stored as "None", and zeros of weight 0, are labels that the frame lacks.

    Raises:
      ValueError: h5py is absent; the file is damaged or holds another layout. It is named.
    """
    h5py = _optional("h5py", path)
    try:
        with h5py.File(path, "r") as file:
            return [_configuration(group, path) for group in _configurations(file, path)]
    except UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error});\n"
            "expected an undamaged HDF5 file of mace_prepare_data; write it again."
        ) from error


def _configurations(file: Any, path: Path) -> Iterator[Any]:
    batches = _numbered(file, INSIDE[0])
    if not batches:
        graphs = _numbered(file, INSIDE[1])
        found = "graphs without atomic numbers" if graphs else f"{sorted(file)[:5]} at the top"
        raise ValueError(
            f"{path} holds {found}; expected config_batch_0/config_0/…, as mace_prepare_data "
            "writes them.\nConvert the original structures again, or give them as extended XYZ."
        )
    for batch in batches:
        yield from (file[batch][name] for name in _numbered(file[batch], INSIDE[1]))


def _numbered(names: Iterable[str], pattern: str) -> list[str]:
    found = {name: re.fullmatch(pattern, name) for name in names}
    return sorted((n for n, m in found.items() if m), key=lambda n: int(found[n][1]))  # type: ignore[index]


def _configuration(group: Any, path: Path) -> ase.Atoms:
    try:
        told = {name: _value(group[name]) for name in ("cell", "pbc", "weight", "config_type")}
        properties = {key: _value(value) for key, value in group["properties"].items()}
        weights = {key: _value(value) for key, value in group["property_weights"].items()}
        cell, pbc = told["cell"], told["pbc"]
        atoms = ase.Atoms(
            numbers=_value(group["atomic_numbers"]),
            positions=_value(group["positions"]),
            cell=None if cell is None else np.asarray(cell).reshape(3, 3),
            pbc=False if pbc is None else np.asarray(pbc, bool),
        )
    except (*UNREADABLE, ValueError) as error:
        raise ValueError(
            f"{path}: {getattr(group, 'name', group)} is no structure ({type(error).__name__}: "
            f"{error});\nexpected what mace_prepare_data writes; write the file again."
        ) from error
    atoms.info["config_type"] = str(told["config_type"] or "Default")
    if told["weight"] not in (None, 1):
        atoms.info["config_weight"] = told["weight"]
    there = {
        key: value
        for key, value in properties.items()
        if value is not None and not (_is_zero(value) and _is_zero(weights.get(key, 1)))
    }
    for key, value in there.items():
        _attach(atoms, key, value)
        if key in (*RESULTS, "virials") and weights.get(key) not in (None, 1):
            atoms.info[f"config_{key}_weight"] = weights[key]
    _calculate(atoms, {key: there[key] for key in RESULTS if key in there})
    return atoms


def _value(dataset: Any) -> Any:
    if dataset.size is not None and dataset.size * dataset.dtype.itemsize > MAX_FRAME_BYTES:
        raise MemoryError(f"{dataset.name} has {dataset.size} numbers")
    value = dataset[()]
    value = value.decode() if isinstance(value, bytes) else value
    return None if isinstance(value, str) and value == "None" else value


def _is_zero(value: Any) -> bool:
    return not isinstance(value, str) and not np.any(value)


def _attach(atoms: ase.Atoms, key: str, value: Any) -> None:
    is_per_atom = 1 < len(atoms) == next(iter(np.shape(value)), 0) and key not in IN_INFO
    if key in IN_ARRAYS or is_per_atom:
        atoms.arrays[IN_ARRAYS.get(key, key)] = np.asarray(value)
    else:
        atoms.info[IN_INFO.get(key, key)] = value


def _calculate(atoms: ase.Atoms, results: Mapping[str, Any]) -> None:
    if results:
        atoms.calc = SinglePointCalculator(atoms)
        atoms.calc.results.update(results)


def read_lmdb(path: Path) -> list[ase.Atoms]:
    """All frames of an ASE database in LMDB, as mace-torch and fairchem write them.

    Energy, forces and stress of the row's calculator also become ``REF_energy``, …, unless the row
    has labels of these names already: those are meant (mace-torch prefers the calculator's).

    Raises:
      ValueError: lmdb is absent; the file is damaged, or holds pickles or anything else. It is
        named.
    """
    lmdb = _optional("lmdb", path)
    try:
        with lmdb.open(
            str(path), subdir=path.is_dir(), readonly=True, lock=False, create=False
        ) as env:
            _require_whole(env, path)
            with env.begin() as txn:
                rows = {
                    int(key): _unpacked(bytes(value), f"{path}: row {key.decode()}")
                    for key, value in txn.cursor()
                    if key.isdigit()
                }
    except (lmdb.Error, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error});\n"
            "expected an undamaged LMDB database of structures; write it again."
        ) from error
    return [_row(rows[key], f"{path}: row {key}") for key in sorted(rows)]


def _require_whole(env: Any, path: Path) -> None:
    """A shortened file would kill the process when its missing pages are touched."""
    file = path / "data.mdb" if path.is_dir() else path
    expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if file.stat().st_size < expected:
        raise ValueError(
            f"{path} has {file.stat().st_size} bytes; expected {expected}: it is cut short. "
            "Copy it again."
        )


def _unpacked(value: bytes, what: str) -> dict[str, Any]:
    inflate = zlib.decompressobj()
    try:
        text = value if value[:1] == b"\x80" else inflate.decompress(value, MAX_FRAME_BYTES)
    except zlib.error as error:
        raise ValueError(f"{what} is damaged ({error}); expected JSON, compressed.") from error
    if text[:1] == b"\x80":
        raise ValueError(
            f"{what} is a pickle, which could run code and is never opened; expected JSON, "
            "compressed.\nConvert the data where you trust them to .aselmdb or extended XYZ."
        )
    if inflate.unconsumed_tail or not inflate.eof:
        raise ValueError(
            f"{what} is cut short, or has more than {MAX_FRAME_BYTES} bytes when inflated; "
            "remove it or write it again."
        )
    try:
        row = loads(text)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON ({error}); write the file again.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{what} is {row!s:.40}; expected a structure, a dict.")
    return row


def _row(row: Mapping[str, Any], what: str) -> ase.Atoms:
    try:
        row = {key: _arrays(value) for key, value in row.items()}
        atoms = _structure(row)
        # what JSON calls null was a NaN: ASE leaves out what is None
        results = {key: np.asarray(row[key], float)[()] for key in RESULTS if key in row}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{what} is no structure ({type(error).__name__}: {error}); expected numbers, "
            "positions, cell and pbc. Write it again."
        ) from error
    named = {**atoms.info, **atoms.arrays}
    for key in RESULTS:
        if key in results and {**IN_INFO, **IN_ARRAYS}[key] not in named:
            _attach(atoms, key, results[key])
    _calculate(atoms, {key: row[key] for key in all_properties if key in row} | results)
    return atoms


def _structure(row: Mapping[str, Any]) -> ase.Atoms:
    data = dict(row.get("data") or {})
    arrays, info = data.pop("__arrays__", {}), data.pop("__info__", {})
    atoms = ase.Atoms(
        numbers=np.asarray(row["numbers"], int),
        positions=np.asarray(row["positions"], float),
        cell=row.get("cell"),
        pbc=row.get("pbc", False),
    )
    atoms.info.update({**data, **(row.get("key_value_pairs") or {}), **info})
    for name, array in arrays.items():
        if len(array) != len(atoms):
            # the writers keep arrays of earlier rows unless write() is given data={}
            raise ValueError(f"{name!r} has {len(array)} rows for {len(atoms)} atoms")
        atoms.set_array(name, np.asarray(array))
    return atoms


def _arrays(value: Any) -> Any:
    """ASE's JSON for arrays, ``{"__ndarray__": [shape, dtype, numbers]}``, and lists in lists."""
    if isinstance(value, list):
        return [_arrays(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "__ndarray__" not in value:
        return {key: _arrays(item) for key, item in value.items()}
    shape, dtype, flat = value["__ndarray__"]
    if np.dtype(dtype).kind not in "biuf":
        raise ValueError(f"an array of {dtype}; expected numbers")
    return np.asarray(flat, dtype).reshape(shape)
