"""Torch files for tests: real ones written by torch and mace, and forged ones assembled by hand."""

import os
import pickle
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

from converters.unpickle import Storage, load
from converters.vocabulary import STORAGES


def mace_model(*, dtype: str = "float64", correlation: int = 2, **changes: Any) -> Any:
    """A small random ScaleShiftMACE for H, C and O; every parameter is randomised."""
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 needs it to import
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = pytest.importorskip("mace.modules")
        o3 = pytest.importorskip("e3nn.o3")

        block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
        previous = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        torch.manual_seed(0)
        try:
            model = modules.ScaleShiftMACE(
                **{
                    "r_max": 4.5,
                    "num_bessel": 8,
                    "num_polynomial_cutoff": 5,
                    "max_ell": 2,
                    "interaction_cls": block,
                    "interaction_cls_first": block,
                    "num_interactions": 2,
                    "num_elements": 3,
                    "hidden_irreps": o3.Irreps("8x0e+8x1o"),
                    "MLP_irreps": o3.Irreps("4x0e"),
                    "atomic_energies": torch.tensor([-13.6, -1029.0, -2042.0]).numpy(),
                    "avg_num_neighbors": 9.5,
                    "atomic_numbers": [1, 6, 8],
                    "correlation": correlation,
                    "gate": torch.nn.functional.silu,
                    "use_reduced_cg": False,
                    "atomic_inter_scale": 0.8042,
                    "atomic_inter_shift": 0.1641,
                    **changes,
                }
            )
        finally:
            torch.set_default_dtype(previous)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def save(model: Any, path: Path, **options: Any) -> None:
    """``torch.save``, without the warnings about TorchScript inside e3nn's modules."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model, path, **options)


class Code(bytes):
    """Pickle instructions that leave one object on the stack."""


def code(value: Any) -> Code:
    """Instructions for a plain value; :class:`Code` inside it is taken as it is."""
    match value:
        case Code():
            return value
        case None:
            return Code(b"N")
        case bool():
            return Code(b"\x88" if value else b"\x89")
        case int():
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return Code(b"\x8a" + bytes([len(raw)]) + raw)
        case str():
            raw = value.encode()
            return Code(b"X" + len(raw).to_bytes(4, "little") + raw)
        case tuple():
            return Code(b"(" + b"".join(map(code, value)) + b"t")
        case list():
            return Code(b"](" + b"".join(map(code, value)) + b"e")
        case dict():
            items = (code(key) + code(item) for key, item in value.items())
            return Code(b"}(" + b"".join(items) + b"u")
    raise TypeError(f"no instructions for {type(value)}")


def named(qualname: str) -> Code:
    """A global."""
    module, _, name = qualname.rpartition(".")
    return Code(f"c{module}\n{name}\n".encode())


def call(qualname: str, *args: Any) -> Code:
    """REDUCE."""
    return Code(named(qualname) + code(args) + b"R")


def new(qualname: str, *args: Any, state: Any = None) -> Code:
    """NEWOBJ and BUILD."""
    made = named(qualname) + code(args) + b"\x81"
    return Code(made if state is None else made + code(state) + b"b")


def storage(key: Any = "0", size: Any = 2, *, kind: str = "torch.FloatStorage") -> Code:
    """A persistent id."""
    return Code(code(("storage", named(kind), key, "cuda:0", size)) + b"Q")


def tensor(
    shape: tuple = (2,), strides: tuple = (1,), offset: int = 0, of: Code | None = None
) -> Code:
    """A tensor, of two float32 zeros unless stated."""
    of = storage() if of is None else of
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", of, offset, shape, strides, False, hooks)


def module(
    *, parameters: Any = None, buffers: Any = None, modules: Any = None, **attributes: Any
) -> dict:
    """The state of a torch module."""
    tables = {"_parameters": parameters, "_buffers": buffers, "_modules": modules}
    return {key: {} if value is None else value for key, value in tables.items()} | attributes


def mace(**state: Any) -> Code:
    """A ScaleShiftMACE with this :func:`module` state."""
    return new("mace.modules.models.ScaleShiftMACE", state=module(**state))


def forge(
    path: Path,
    root: Any,
    *,
    members: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
    stem: str = "m",
) -> Path:
    """Write a torch file around ``root``; bytes that are not :class:`Code` are the whole pickle."""
    raw = type(root) is bytes
    pickle = root if raw else b"\x80\x02" + code(root) + b"."
    content = {"data.pkl": pickle, "byteorder": b"little", "data/0": bytes(8)}
    content = {f"{stem}/{name}": data for name, data in content.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in (content | (members or {})).items():
            archive.writestr(name, data)
    return path


MAGIC = 0x1950A86A20F9469CFC6C
MACHINE = {
    "protocol_version": 1001,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


def legacy_storage(key: Any = "0", size: Any = 2, *, kind: Any = None, view: Any = None) -> Code:
    """A persistent id of torch before version 1.6."""
    kind = named("torch.FloatStorage") if kind is None else kind
    return Code(code(("storage", kind, key, "cpu", size, view)) + b"Q")


def legacy_class(cls: Any, *, file: Any = "a.py", source: Any = "import os") -> Code:
    """The persistent id of a class, with its source code."""
    return Code(code(("module", cls, file, source)) + b"Q")


def forge_legacy(
    path: Path,
    root: Any,
    *,
    storages: dict[str, tuple[int, bytes]] | None = None,
    keys: Any = None,
    magic: Any = MAGIC,
    version: Any = 1001,
    machine: Any = MACHINE,
    tail: bytes = b"",
) -> Path:
    """Write a torch file of the old format around ``root``; ``storages`` are sizes and bytes."""
    storages = {"0": (2, bytes(8))} if storages is None else storages
    keys = list(storages) if keys is None else keys
    instructions = root if type(root) is bytes else b"\x80\x02" + code(root) + b"."
    pickles = [pickle.dumps(value, 2) for value in (magic, version, machine)]
    raw = [size.to_bytes(8, "little", signed=True) + data for size, data in storages.values()]
    parts = [*pickles, instructions, b"\x80\x02" + code(keys) + b".", *raw, tail]
    path.write_bytes(b"".join(parts))
    return path


def to_legacy(source: Path, path: Path) -> Path:
    """Rewrite a torch file in the old format, with no help from torch."""
    with zipfile.ZipFile(source) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    (stem,) = [name.removesuffix("data.pkl") for name in content if name.endswith("/data.pkl")]
    storages: dict[str, tuple[int, bytes]] = {}

    def storage(kind: str, key: str, size: int) -> Storage:
        storages[key] = size, content[f"{stem}data/{key}"]
        return Storage(storages[key][1], STORAGES[kind])

    instructions = content[f"{stem}data.pkl"]
    load(instructions, storage)
    return forge_legacy(path, with_views(instructions), storages=storages)


def with_views(instructions: bytes) -> bytes:
    """The instructions with the sixth part that the old format has in each persistent id."""
    parts, start, end = [], 0, None
    for opcode, _, position in pickletools.genops(instructions):
        if opcode.name == "TUPLE":
            end = position
        elif opcode.name == "BINPERSID":
            parts += [instructions[start:end], b"N"]
            start = end
    return b"".join([*parts, instructions[start:]])


def state_dict(tensors: dict[str, Any], path: Path, *, wrap: Any = None) -> Path:
    """Write arrays as ``torch.save(state_dict)`` does, without torch.

    ``wrap`` may put the instructions of the state dict into something larger. The
    arrays are NumPy's; those of the same memory get storages of their own.
    """
    kinds = {dtype: name for name, dtype in STORAGES.items()}
    members, entries = {}, {}
    for index, (name, array) in enumerate(tensors.items()):
        members[f"m/data/{index}"] = array.tobytes()
        strides = [1] * array.ndim
        for axis in range(array.ndim - 1, 0, -1):
            strides[axis - 1] = strides[axis] * array.shape[axis]
        of = storage(str(index), array.size, kind=kinds[array.dtype])
        entries[name] = tensor(array.shape, tuple(strides), 0, of)
    made = Code(call("collections.OrderedDict") + code_of_items(entries))
    made = Code(made + code({"_metadata": call("collections.OrderedDict")}) + b"b")
    return forge(path, made if wrap is None else wrap(made), members=members)


def code_of_items(items: dict) -> bytes:
    return b"(" + b"".join(code(key) + code(item) for key, item in items.items()) + b"u"
