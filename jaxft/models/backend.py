"""Who computes the two operations that take the time, and the policy that chooses.

=======  ========================================================================================
xla      batched matrix products, compiled by XLA; works everywhere, and is the default everywhere
cueq     NVIDIA's fused kernels (:mod:`jaxft.models.cueq`); an extra, for NVIDIA GPUs
=======  ========================================================================================

A backend that was asked for and cannot be used is an error. Nothing else is put in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from jaxft.graph import Graph
from jaxft.models import contraction, conv, cueq
from jaxft.models.config import MACEConfig
from jaxft.models.contraction import Coupling
from jaxft.models.irreps import Features, Path
from jaxft.models.precision import PARITY, Precision, named
from jaxft.typing import Array

Name = Literal["auto", "xla", "cueq"]
"""What can be asked for."""


class Backend(Protocol):
    """Immutable and hashable; modules hold it as a static attribute."""

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> Precision: ...

    def check(self, config: MACEConfig) -> None:
        """Raises ValueError if it cannot compute such a model."""

    def couple(self, couplings: Mapping[str, Coupling], channels: int, noise: float) -> Any:
        """Couplings of a product block as :meth:`contract` takes them; a pytree of float64 numpy.

        Args:
          couplings: by output irrep.
          channels: of the block.
          noise: relative uncertainty of the numbers in them.
        """

    def convolve(
        self,
        features: Features,
        harmonics: Features,
        radial: tuple[Array, Array],
        paths: Sequence[Path],
        graph: Graph,
    ) -> Features:
        """See :func:`jaxft.models.conv.convolve`."""

    def contract(
        self, x: Array, weights: Mapping[str, Array], one_hot: Array, couplings: Any
    ) -> Features:
        """See :func:`jaxft.models.contraction.contract`."""


@dataclass(frozen=True)
class Xla:
    """Formulations in plain JAX."""

    precision: Precision = PARITY
    name = "xla"

    def check(self, config: MACEConfig) -> None:
        """Every model."""

    def couple(
        self, couplings: Mapping[str, Coupling], channels: int, noise: float
    ) -> Mapping[str, Coupling]:
        return couplings

    def convolve(
        self,
        features: Features,
        harmonics: Features,
        radial: tuple[Array, Array],
        paths: Sequence[Path],
        graph: Graph,
    ) -> Features:
        return conv.convolve(features, harmonics, radial, paths, graph, self.precision)

    def contract(
        self,
        x: Array,
        weights: Mapping[str, Array],
        one_hot: Array,
        couplings: Mapping[str, Coupling],
    ) -> Features:
        return contraction.contract(x, weights, one_hot, couplings)


XLA = Xla()


class Choice(NamedTuple):
    """A backend, and why it is this one."""

    backend: Backend
    reason: str

    def __str__(self) -> str:
        return f"{self.backend.name} ({self.reason}), precision {self.backend.precision.name}"


def choose(asked: str = "auto", precision: str = "parity") -> Choice:
    """The backend that is meant.

    ``auto`` is xla on every platform, until a measurement on a GPU says otherwise.

    Raises:
      ValueError: there is no such backend or precision, or it cannot be used here.
    """
    policy = named(precision)
    if asked == "auto":
        return Choice(Xla(policy), "the default on every platform")
    if asked == "xla":
        return Choice(Xla(policy), "as asked for")
    if asked == "cueq":
        cueq.require()
        cueq.require_no_cache()
        found = cueq.Cueq(precision=policy)
        return Choice(found, f"as asked for; compiled programs are not kept: {cueq.NO_CACHE}")
    raise ValueError(f"there is no backend {asked!r}; use auto, xla or cueq.")


def usable() -> str:
    """What ``auto`` chooses here, and what else could be asked for or why not; for people."""
    try:
        cueq.require()
    except ValueError as error:
        other = f"cueq cannot be used here: {str(error).splitlines()[0].rstrip(';')}"
    else:
        other = "cueq can be asked for"
    return f"{choose()}; {other}"
