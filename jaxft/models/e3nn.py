"""e3nn_jax, imported without scipy.signal, which it needs for plots on spheres alone.

That import is a third of a second of every start. ``importlib.util.LazyLoader`` does not help: the
statement ``import scipy.signal`` asks a module for its ``__spec__``, and that loads it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class _Postponed(ModuleType):
    """Stands for a module until something of it is used, by this thread or another."""

    def __getattr__(self, name: str) -> Any:
        _withdraw(self)
        return getattr(importlib.import_module(self.__name__), name)


def _withdraw(module: ModuleType) -> None:
    if sys.modules.get(module.__name__) is module:
        del sys.modules[module.__name__]


@contextmanager
def postponed(name: str) -> Iterator[None]:
    """Inside the block ``import <name>`` loads nothing; the first use of it does, then or later.

    Where it is loaded already nothing changes. It is a submodule of a package that loads its
    submodules when they are used, as scipy does.
    """
    if name in sys.modules:
        yield
        return
    module = _Postponed(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        _withdraw(module)


with postponed("scipy.signal"):
    import e3nn_jax as e3nn

__all__ = ["e3nn", "postponed"]
