"""The words that signatures use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


class Feature(Protocol):
    """A property of graphs or atoms that a model reads besides elements and positions."""

    @property
    def name(self) -> str: ...
    @property
    def per(self) -> str:
        """``"graph"`` or ``"atom"``."""

    @property
    def num_classes(self) -> int | None:
        """None: any number."""

    @property
    def offset(self) -> int:
        """Classes are ``-offset … num_classes - 1 - offset``."""

    @property
    def in_dim(self) -> int:
        """Numbers per graph or atom."""


class MomentHead(Protocol):
    """What a model predicts of magnetic moments."""

    @property
    def kind(self) -> str:
        """``"collinear"``, ``"signed"`` or ``"vector"``."""


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
        """[heads, elements] isolated-atom energies in eV, float64."""

    @property
    def embeddings(self) -> Sequence[Feature]:
        """What frames must tell besides elements and positions."""

    @property
    def moments(self) -> MomentHead | None:
        """The head for magnetic moments, if there is one."""

    def head_index(self, head: str | None = None) -> int:
        """The position of a head; ValueError if there is none or the choice is open."""
