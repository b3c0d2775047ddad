"""Imports of libraries without the parts of them that nobody here uses.

scipy, which e3nn-jax and ASE import for functions that we do not call, and sympy are most of a
second of every start. ``importlib.util.LazyLoader`` does not help: the statement ``import
scipy.signal`` asks a module for its ``__spec__``, and that loads it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, get_ident
from types import ModuleType
from typing import Any

_lock = Lock()


class _Later:
    """Stands for a name of a module: an annotation as it is, a function as soon as it is called.

    Whatever else is tried, such as to derive a class from it, is an error.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name

    def __repr__(self) -> str:
        return f"{self._module}.{self._name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(_loaded(self._module), self._name)(*args, **kwargs)


class _Postponed(ModuleType):
    """Stands for a module until something of it is used.

    What the thread that postponed it reads inside the block is a name for later; everything else,
    afterwards or in another thread, is the module's own.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._thread: int | None = get_ident()

    def __getattr__(self, name: str) -> Any:
        if self._thread != get_ident():
            return getattr(_loaded(self.__name__), name)
        if name.startswith("__"):  # such as __path__, by which the import system asks for a package
            raise AttributeError(f"{self.__name__!r} is postponed and has no {name}")
        return _Later(self.__name__, name)


def _loaded(name: str) -> ModuleType:
    _withdraw(name)
    return importlib.import_module(name)


def _withdraw(name: str) -> None:
    with _lock:  # two threads at once would remove the module that the first has loaded
        if isinstance(sys.modules.get(name), _Postponed):
            del sys.modules[name]


@contextmanager
def postponed(*names: str) -> Iterator[None]:
    """Inside the block ``import <name>`` loads nothing; the first use of it does, then or later.

    ``from <name> import function`` loads it when the function is called. Modules that are loaded
    already are left as they are. They are top-level, or submodules of packages that load their
    submodules when they are used, as scipy does.
    """
    stand_ins = {name: _Postponed(name) for name in names if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            module._thread = None
            _withdraw(name)
