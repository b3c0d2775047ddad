"""The words that signatures use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

Array = Any
"""A jax array; a numpy one on the host."""

Params = Mapping[str, Any]
"""Nested dict of arrays; see :mod:`jaxft.tree` for paths."""

Mask = Any
"""A tree of Python bools shaped like the parameters."""

Coords = Any
"""Arrays that a strategy owns and that are trained."""

Consts = Any
"""Arrays that a strategy owns and that stay as they are."""

LossFn = Callable[[Params, Any], tuple[Array, dict[str, Array]]]
"""``(params, batch) -> scalar loss, {name: scalar}``."""


class Domain(Protocol):
    """What data preparation must know of a model: which atoms, how far they see, their E0s."""

    @property
    def atomic_numbers(self) -> tuple[int, ...]:
        """The model's element table, in its own order."""

    @property
    def r_max(self) -> float:
        """Cutoff radius in Å."""

    @property
    def e0s(self) -> np.ndarray:
        """Isolated-atom energies in eV, float64, in the order of ``atomic_numbers``."""
