"""Pickles as data: a stack machine that calls, imports and compiles nothing a file names.

A pickle is a program for a small machine. Instead of teaching Python's own machine to distrust it,
this one lacks the dangerous instructions. A global becomes a :class:`Reference`, an object a
:class:`Node`; REDUCE looks its callee up in a table of our own functions; all other instructions
make plain containers. There is no ``find_class``, no ``setattr``, and no ``__setstate__``. What a
file holds can therefore be wrong, but it cannot act, and everything it makes is new with each load.

Reference: the instruction set of ``pickletools``; ``torch/_utils.py`` for rebuilding tensors.
"""

import dataclasses
import math
import pickletools
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np

from converters.vocabulary import CLASSES, FIELDS, MEMBERS, MENTIONED, REFUSED, STORAGES

MAX_OPCODES = 1_000_000  # a three-layer MACE has about 20 000
MAX_COPIED = 64 << 20  # bytes that instructions may copy: one string can be encoded many times
MAX_DIMENSIONS = 32


class ModelFileError(ValueError):
    """The file is not a torch MACE model that can be read; the message says what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """A global that the file mentions, by name only; the file cannot change or call it."""

    qualname: str


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """The bytes and dtype behind one or more tensors."""

    raw: bytes | memoryview
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return len(self.raw) // self.dtype.itemsize


class Node:
    """An inert stand-in for a pickled object.

    Attributes:
      qualname: Full class name, e.g. ``"mace.modules.blocks.LinearReadoutBlock"``.
      args: What the object was made from; for tuples (Irreps, Instruction) their contents.
      state: The pickled ``__dict__``: attributes, ``_parameters``, ``_buffers``, ``_modules``.
    """

    __slots__ = ("args", "qualname", "state")

    def __init__(self, qualname: str, args: tuple = (), state: dict | None = None) -> None:
        self.qualname = qualname
        self.args = args
        self.state = {} if state is None else state

    def __repr__(self) -> str:
        return f"Node({self.qualname})"

    @property
    def name(self) -> str:
        """The class name without its module."""
        return self.qualname.rpartition(".")[2]

    @property
    def children(self) -> dict[str, "Node"]:
        """The sub-modules by name, in the file's order, without those that are None."""
        return {name: node for name, node in self._table("_modules").items() if node is not None}

    def has(self, path: str) -> bool:
        """Whether the sub-module ``path`` exists, e.g. ``"interactions.0.linear"``."""
        return self._find(path)[1] is None

    def module(self, path: str) -> "Node":
        """The sub-module at a dotted path; :class:`ModelFileError` if there is none."""
        node, missing = self._find(path)
        if missing is not None:
            raise ModelFileError(
                f"the model has no module {path!r}: {node.name} lacks {missing!r} among its "
                f"sub-modules {_some(node.children)}; its layout is not one that jaxft knows"
            )
        return node

    def get(self, name: str, default: Any = ...) -> Any:
        """What ``object.name`` was in torch: attribute, tensor, sub-module or tuple field.

        Without ``default`` an absent name is a :class:`ModelFileError`.
        """
        fields = dict(zip(FIELDS.get(self.qualname, ()), self.args, strict=False))
        tables = (self._table(key) for key in ("_parameters", "_buffers", "_modules"))
        for table in (self.state, fields, *tables):
            if name in table:
                return table[name]
        if default is ...:
            known = sorted(str(key) for key in self.state if not str(key).startswith("_"))
            raise ModelFileError(
                f"{self.qualname} has no attribute {name!r}, only {_some(known)}; "
                "the file was written by a version of MACE that jaxft does not know"
            )
        return default

    def _table(self, key: str) -> dict:
        table = self.state.get(key, {})
        if type(table) is not dict:
            raise ModelFileError(f"{key!r} of {self.qualname} is not a dict; the file is damaged")
        return table

    def _find(self, path: str) -> tuple["Node", str | None]:
        node = self
        for part in path.split("."):
            child = node._table("_modules").get(part)
            if not isinstance(child, Node):
                return node, part
            node = child
        return node, None


def load(
    source: bytes | BinaryIO,
    storage: Callable[[str, str, int], Storage],
    *,
    legacy: bool = False,
    limit: int = MAX_OPCODES,
) -> Any:
    """Run a pickle of protocol 2 to 5 and return the object it describes.

    Args:
      source: The pickle, normally ``data.pkl`` of a torch file. A stream is left just behind it.
      storage: ``storage(dtype_name, key, size)`` gives the storage of a persistent id.
      legacy: Whether persistent ids have the layout of torch before version 1.6.
      limit: The largest number of instructions.

    Returns:
      Built-in scalars and containers, :class:`Node`, :class:`Reference`, :class:`Storage` and
      read-only arrays that view the storages.

    Raises:
      ModelFileError: For everything outside the allow-list. A malformed stream may also raise what
        Python raises for it (TypeError, IndexError, …); :func:`converters.reader.read` converts.
    """
    machine = _Machine(storage, legacy)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(source)):
        if count >= limit:
            raise ModelFileError(f"its pickle has more than {limit} instructions")
        name = opcode.name
        if name in _LITERALS:
            machine.stack.append(argument)
        elif name in _FRESH:
            machine.stack.append(_FRESH[name]())
        elif name in _OPERATIONS:
            _OPERATIONS[name](machine, argument)
        elif name not in _IGNORED:
            raise ModelFileError(f"its pickle uses {name}, an instruction no MACE model needs")
    return machine.stack.pop()


class _Machine:
    """Stack, memo and the instructions that need them.

    The memo is a dict, so an absurd index costs nothing.
    """

    def __init__(self, storage: Callable[[str, str, int], Storage], legacy: bool) -> None:
        self.storage = storage
        self.legacy = legacy
        self.stack: list = []
        self.outer: list[list] = []  # the stacks below each open MARK
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def spend(self, size: int) -> None:
        self.copied += size
        if self.copied > MAX_COPIED:
            raise ModelFileError(f"its pickle copies more than {MAX_COPIED} bytes")

    def mark(self, _: None) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def above_mark(self) -> list:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def fetch(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def tuple_of(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError("stack underflow")
        self.stack[-size:] = [tuple(self.stack[-size:])]

    def marked_tuple(self, _: None) -> None:
        items = self.above_mark()
        self.stack.append(tuple(items))

    def append(self, _: None) -> None:
        self.extend([self.stack.pop()])

    def extend(self, items: list | None) -> None:
        items = self.above_mark() if items is None else items
        _exactly(self.stack[-1], list).extend(items)

    def setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.setitems([key, value])

    def setitems(self, items: list | None) -> None:
        items = self.above_mark() if items is None else items
        pairs = zip(_keys(items[::2]), items[1::2], strict=True)
        _exactly(self.stack[-1], dict).update(pairs)

    def additems(self, _: None) -> None:
        items = self.above_mark()
        _exactly(self.stack[-1], set).update(_keys(items))

    def named(self, argument: str) -> None:
        self.stack.append(reference(*argument.split(" ", 1)))

    def stack_named(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(reference(_exactly(module, str), _exactly(name, str)))

    def persistent(self, _: None) -> None:
        parts = _exactly(self.stack.pop(), tuple)
        tag = _exactly(parts[0], str) if parts else ""
        if self.legacy and tag == "module":
            self.stack.append(_class_of(parts))
            return
        if self.legacy:
            *parts, view = parts
            if view is not None:
                raise ModelFileError("a storage of its pickle views another one, as no MACE has it")
        _, dtype, key, _location, size = parts
        if tag != "storage" or type(dtype) is not Reference:
            raise ModelFileError("a persistent id of its pickle is not a torch storage")
        found = self.storage(dtype.qualname, _exactly(key, str), _exactly(size, int))
        self.stack.append(found)

    def new(self, _: None) -> None:
        args, cls = _exactly(self.stack.pop(), tuple), self.stack.pop()
        if type(cls) is not Reference or cls.qualname not in CLASSES:
            raise ModelFileError(f"its pickle constructs {_describe(cls)}, which is not a class")
        self.stack.append(Node(cls.qualname, args))

    def reduce(self, _: None) -> None:
        args, callee = _exactly(self.stack.pop(), tuple), self.stack.pop()
        if type(callee) is not Reference or callee.qualname not in REDUCERS:
            raise ModelFileError(f"its pickle calls {_describe(callee)}; nothing was executed")
        self.spend(sum(len(arg) for arg in args if type(arg) is str))
        self.spend(sum(_ENTRY * len(arg) for arg in args if type(arg) is list))
        self.stack.append(REDUCERS[callee.qualname](*args))

    def build(self, _: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is dict:
            return  # attributes of an OrderedDict, such as state_dict()._metadata: not needed
        # A tuple would be (dict, slots): pickle sets the slots with setattr(), which on a function
        # renames it for the whole process. Modules never have one.
        if type(target) is not Node or type(state) is not dict:
            raise ModelFileError(
                f"its pickle sets the state of {_describe(target)} to {_describe(state)}; "
                "only an object's attributes can be set, from a dict"
            )
        self.spend(_ENTRY * len(state))
        target.state.update(state)


_ENTRY = 100  # bytes, about, of an entry of a dict or set
_LITERALS = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    }
)
_FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.fetch,
    "LONG_BINGET": _Machine.fetch,
    "TUPLE": _Machine.marked_tuple,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "ADDITEMS": _Machine.additems,
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.stack_named,
    "BINPERSID": _Machine.persistent,
    "NEWOBJ": _Machine.new,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}


def _class_of(parts: tuple) -> Reference:
    """The class of a persistent id of the old format, which adds its source code for comparison."""
    _, cls, _file, _source = parts
    if type(cls) is not Reference or cls.qualname not in CLASSES:
        raise ModelFileError(f"a persistent id of its pickle has {_describe(cls)}, not a class")
    return cls


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return str(names[:40]) if len(names) <= 40 else f"{names[:40]} and {len(names) - 40} more"


def _exactly(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ModelFileError(f"its pickle has {_describe(value)} where a {kind.__name__} belongs")
    return value


def _keys(values: list) -> list:
    # Hashing a deep tuple overflows the C stack, and integers and floats can be chosen to collide.
    for value in values:
        small = isinstance(value, int) and abs(value) < 2**31
        if not (small or isinstance(value, str) or value is None):
            raise ModelFileError(f"its pickle has {_describe(value)} as a key or set element")
    return values


def _describe(value: Any) -> str:
    qualname = getattr(value, "qualname", None)
    return repr(qualname) if isinstance(qualname, str) else f"a {type(value).__name__}"


def reference(module: str, name: str) -> Reference:
    """The inert reference for a global, or a :class:`ModelFileError` that names it."""
    module = "builtins" if module == "__builtin__" else module
    qualname = f"{module}.{name}"
    if "." not in name and qualname in ALLOWED:  # a dotted name reaches into an object
        return Reference(qualname)
    qualname = qualname if len(qualname) <= 120 else qualname[:120] + "…"
    for prefix, advice in REFUSED.items():
        if qualname.startswith(prefix):
            raise ModelFileError(f"it contains {qualname!r}: {advice}")
    raise ModelFileError(
        f"it names {qualname!r}, which is none of the {len(ALLOWED)} globals that torch MACE "
        "models are known to contain; nothing was executed. If this is an ordinary MACE model, "
        "please report that name at the project's issue tracker"
    )


def _rebuild_tensor(
    storage: Storage,
    offset: int,
    shape: tuple,
    strides: tuple,
    requires_grad: bool,
    hooks: dict,
    metadata: dict | None = None,
) -> np.ndarray:
    """``torch._utils._rebuild_tensor_v2``, as a view that never leaves or outgrows its storage."""
    _exactly(storage, Storage)
    numbers = (offset, *_exactly(shape, tuple), *_exactly(strides, tuple))
    natural = all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    if not natural or not len(shape) == len(strides) <= MAX_DIMENSIONS:
        raise ModelFileError("a tensor's shape, strides or offset are not matching natural numbers")
    size = math.prod(shape)
    if size == 0:
        return _frozen(np.empty(shape, storage.dtype))
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # torch allows a view with stride 0 to be of any size; 8 bytes would become 8 GiB when copied
    if last >= storage.size or size > storage.size:
        raise ModelFileError(
            f"a tensor of {size} elements that ends at element {last} does not fit in its storage "
            f"of {storage.size} elements"
        )
    item = storage.dtype.itemsize
    return np.ndarray(
        shape, storage.dtype, storage.raw, offset * item, tuple(item * stride for stride in strides)
    )


def _rebuild_parameter(data: np.ndarray, requires_grad: bool, hooks: dict) -> np.ndarray:
    return _exactly(data, np.ndarray)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _graph_module(body: dict, import_block: str) -> Node:
    # torch would exec() the source code in the body; it stays a string in our state
    return Node("torch.fx.graph_module.GraphModule", state=_exactly(body, dict))


def _encode(text: str, encoding: str) -> bytes:
    if _exactly(encoding, str) != "latin1":
        raise ModelFileError("its pickle encodes text, but not as latin1")
    return _exactly(text, str).encode("latin1")  # how protocol 2 writes bytes


def _getattr(owner: Reference, name: str) -> Reference:
    names = MEMBERS.get(owner.qualname, ()) if type(owner) is Reference else ()
    if _exactly(name, str) not in names:
        raise ModelFileError(
            f"its pickle calls getattr on {_describe(owner)}; nothing was executed"
        )
    if owner.qualname == "torch._C._VariableFunctionsClass":
        return Reference(f"torch.{name}")
    return Reference(f"{owner.qualname}.{name}")


def _set(items: list) -> set:
    return set(_keys(_exactly(items, list)))


def _ordered_dict() -> dict:
    return {}  # its items follow as instructions


REDUCERS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "builtins.getattr": _getattr,
    "builtins.set": _set,
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch.fx.graph_module.reduce_graph_module": _graph_module,
}

ALLOWED = CLASSES | MENTIONED | STORAGES.keys() | REDUCERS.keys()
