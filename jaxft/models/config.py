"""What a MACE is, apart from its numbers: the part of a bundle that ``model.json`` holds.

Irreps are strings in e3nn's notation and are never re-sorted. Every value is taken from the
sub-modules of the file that the model came from.
"""

from __future__ import annotations

from typing import Annotated, Literal

import e3nn_jax as e3nn
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _checked_irreps(text: str) -> str:
    try:
        e3nn.Irreps(text)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{text!r} is not a list of irreps such as '128x0e+128x1o'") from error
    return text


IrrepsStr = Annotated[str, AfterValidator(_checked_irreps)]
Count = Annotated[int, Field(ge=1, le=1 << 16)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class InteractionConfig(_Frozen):
    """One message-passing block (mace-torch's ``RealAgnosticResidualInteractionBlock``)."""

    block: Literal["RealAgnosticResidualInteractionBlock"]
    node_feats_irreps: IrrepsStr
    target_irreps: IrrepsStr
    hidden_irreps: IrrepsStr
    radial_mlp: tuple[Count, ...]
    avg_num_neighbors: float = Field(gt=0)


class ProductConfig(_Frozen):
    """Symmetric contraction, linear map and self-connection."""

    irreps_in: IrrepsStr
    irreps_out: IrrepsStr
    paths: tuple[tuple[Annotated[int, Field(ge=0, le=1 << 16)], ...], ...]
    """Per output irrep: number of native paths for ν = correlation, correlation - 1, …, 1."""

    @property
    def correlation(self) -> int:
        return len(self.paths[0])


class ReadoutConfig(_Frozen):
    """``linear``: scalars to energy. ``nonlinear``: one hidden layer of ``hidden_irreps``."""

    kind: Literal["linear", "nonlinear"]
    irreps_in: IrrepsStr
    hidden_irreps: IrrepsStr = "0x0e"


class MACEConfig(_Frozen):
    """A ``ScaleShiftMACE`` with residual blocks, Bessel basis and polynomial cutoff."""

    family: Literal["ScaleShiftMACE"] = "ScaleShiftMACE"
    atomic_numbers: tuple[Annotated[int, Field(ge=1, le=118)], ...]
    heads: tuple[str, ...]
    r_max: float = Field(gt=0, le=100.0)
    num_bessel: Count
    cutoff_power: Annotated[int, Field(ge=1, le=64)]
    edge_irreps: IrrepsStr
    """Spherical harmonics of the edges, e.g. ``1x0e+1x1o+1x2e+1x3o``."""
    interactions: tuple[InteractionConfig, ...]
    products: tuple[ProductConfig, ...]
    readouts: tuple[ReadoutConfig, ...]
    gate: Literal["silu"] = "silu"
    silu_constant: float
    """``cst`` of the radial networks' silu: the file's own, not recomputed (0.16 % apart)."""
    readout_silu_constant: float
    """``cst`` of the non-linear readout's silu."""
    mace_attributes: dict[str, bool | str | None] = Field(default_factory=dict)
    """Constructor flags that only an export back to torch needs."""

    @model_validator(mode="after")
    def _is_consistent(self) -> MACEConfig:
        layers = {len(self.interactions), len(self.products), len(self.readouts)}
        if len(layers) != 1 or 0 in layers:
            raise ValueError(f"interactions, products and readouts have {layers} layers")
        if not self.atomic_numbers or len(set(self.atomic_numbers)) != len(self.atomic_numbers):
            raise ValueError("atomic_numbers must hold each element once")
        if not self.heads:
            raise ValueError("heads is empty")
        for product in self.products:
            if len(product.paths) != len(e3nn.Irreps(product.irreps_out)) or not product.paths[0]:
                raise ValueError("a product needs one list of path counts per output irrep")
        return self

    @property
    def num_elements(self) -> int:
        return len(self.atomic_numbers)
