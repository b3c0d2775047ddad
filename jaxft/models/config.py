"""What a MACE is, apart from its numbers: the part of a bundle that ``model.json`` holds.

Irreps are strings in e3nn's notation and are never re-sorted. Every value is taken from the
sub-modules of the file that the model came from.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from jaxft.models.e3nn import e3nn


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


class GateConfig(_Frozen):
    """Gated non-linearity of a non-linear block: silu on scalars, sigmoid on gates."""

    scalar_constant: float
    """``cst`` of silu, from the file like all constants here."""
    gate_constant: float
    """``cst`` of sigmoid."""


Block = Literal[
    "RealAgnosticInteractionBlock",
    "RealAgnosticResidualInteractionBlock",
    "RealAgnosticDensityInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock",
    "RealAgnosticResidualNonLinearInteractionBlock",
]


class InteractionConfig(_Frozen):
    """One message-passing block, called by its class in mace-torch."""

    block: Block
    node_feats_irreps: IrrepsStr
    target_irreps: IrrepsStr
    hidden_irreps: IrrepsStr
    """Of the self-connection, in residual blocks."""
    radial_mlp: tuple[Count, ...]
    """Hidden widths."""
    avg_num_neighbors: float = Field(gt=0)
    """What non-density blocks divide by."""
    sender_irreps: IrrepsStr | None = None
    """Of what enters the tensor product (mace's ``edge_irreps``); None: ``node_feats_irreps``."""
    density_mlp: tuple[Count, ...] = ()
    """Hidden widths of the density network."""
    layer_norm_eps: float = Field(1e-5, gt=0)
    """Non-linear blocks only."""
    gate: GateConfig | None = None
    """Non-linear blocks only."""

    @model_validator(mode="after")
    def _is_consistent(self) -> InteractionConfig:
        if self.is_nonlinear != (self.gate is not None):
            raise ValueError(f"a {self.block} with gate {self.gate}")
        return self

    @property
    def is_residual(self) -> bool:
        """The self-connection comes from the block's input; otherwise there is none."""
        return "Residual" in self.block

    @property
    def is_nonlinear(self) -> bool:
        return "NonLinear" in self.block

    @property
    def has_density(self) -> bool:
        """Messages are divided by a learned density instead of an average neighbour count."""
        return "Density" in self.block or self.is_nonlinear

    @property
    def sent_irreps(self) -> str:
        """Of what enters the tensor product."""
        return self.sender_irreps or self.node_feats_irreps

    @property
    def gated_irreps(self) -> str:
        """What enters the gate: scalars and gates together, then the gated irreps."""
        target = e3nn.Irreps(self.target_irreps)
        gated = [(mul, ir) for mul, ir in target if ir.l > 0]
        scalars = sum(mul for mul, _ in target)
        return str(e3nn.Irreps([(scalars, "0e"), *gated]))


class ProductConfig(_Frozen):
    """Symmetric contraction, linear map and self-connection."""

    irreps_in: IrrepsStr
    irreps_out: IrrepsStr
    paths: tuple[tuple[Annotated[int, Field(ge=0, le=1 << 16)], ...], ...]
    """Per output irrep: number of native paths for ν = correlation, correlation - 1, …, 1."""
    use_sc: bool = True
    """Add the block's self-connection, where it has one."""
    is_agnostic: bool = False
    """One set of weights for all elements."""

    @property
    def correlation(self) -> int:
        return len(self.paths[0])


class ReadoutConfig(_Frozen):
    """``linear``: one map. ``nonlinear``: a hidden layer. ``bias``: two of them, with biases."""

    kind: Literal["linear", "nonlinear", "bias"]
    irreps_in: IrrepsStr
    hidden_irreps: IrrepsStr = "0x0e"
    """Of all heads together, head by head."""


class EmbeddingConfig(_Frozen):
    """A feature of graphs or atoms, such as the total charge, that enters the node features."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
    kind: Literal["categorical", "continuous"]
    per: Literal["graph", "atom"]
    emb_dim: Count
    num_classes: Count | None = None
    """Categorical features: classes ``-offset … num_classes - 1 - offset``."""
    offset: Annotated[int, Field(ge=-(1 << 20), le=1 << 20)] = 0
    in_dim: Count = 1
    """Continuous features: numbers per atom; 1 per graph."""
    use_bias: bool = True

    @model_validator(mode="after")
    def _is_consistent(self) -> EmbeddingConfig:
        if (self.kind == "categorical") != (self.num_classes is not None):
            raise ValueError(f"the {self.kind} feature {self.name} has {self.num_classes} classes")
        if self.per == "graph" and self.in_dim != 1:
            raise ValueError(f"{self.name} has {self.in_dim} numbers per graph; expected one")
        return self


class MomentsConfig(_Frozen):
    """A head for magnetic moments; see :mod:`jaxft.models.moments`."""

    kind: Literal["collinear", "signed", "vector"] = "collinear"
    """Magnitudes, which are not negative; numbers of either sign; or axial vectors."""
    energy: bool = False
    """Moments add to the energy."""
    hidden: Count = 16
    """Scalars of the hidden layer."""
    channels: Count = 8
    """Products of vectors, and terms of the exchange."""


class MACEConfig(_Frozen):
    """A ``ScaleShiftMACE``, or a plain ``MACE``, which has neither scale nor shift."""

    family: Literal["ScaleShiftMACE", "MACE"] = "ScaleShiftMACE"
    atomic_numbers: tuple[Annotated[int, Field(ge=1, le=118)], ...]
    heads: tuple[str, ...]
    r_max: float = Field(gt=0, le=100.0)
    num_bessel: Count
    """Number of radial functions, of whatever kind."""
    cutoff_power: Annotated[int, Field(ge=1, le=64)]
    radial_type: Literal["bessel", "gaussian", "chebyshev"] = "bessel"
    gaussian_coefficient: float | None = None
    """1/Å², of a Gaussian basis."""
    distance_transform: Literal["None", "Agnesi", "Soft", "Soft 0.3.6"] = "None"
    """``Soft 0.3.6`` is another function, which mace-torch called Soft until 0.3.9."""
    apply_cutoff: bool = True
    """The cutoff multiplies the radial functions; otherwise the radial network's output."""
    pair_repulsion: bool = False
    """Ziegler-Biersack-Littmark repulsion at short distances."""
    repulsion_power: Annotated[int, Field(ge=1, le=64)] = 6
    """Of the repulsion's cutoff."""
    edge_irreps: IrrepsStr
    """Spherical harmonics of the edges, e.g. ``1x0e+1x1o+1x2e+1x3o``."""
    interactions: tuple[InteractionConfig, ...]
    products: tuple[ProductConfig, ...]
    readouts: tuple[ReadoutConfig, ...]
    """One per layer, or one, of the last layer."""
    embeddings: tuple[EmbeddingConfig, ...] = ()
    embedding_readout: bool = False
    gate: Literal["silu", "tanh", "abs", "None"] = "silu"
    """Of the non-linear readout."""
    moments: MomentsConfig | None = None
    """Ours; mace-torch has no counterpart."""
    silu_constant: float
    """``cst`` of the radial networks' silu: the file's own, not recomputed (0.16 % apart)."""
    gate_constant: float = Field(
        validation_alias=AliasChoices("gate_constant", "readout_silu_constant")
    )
    """``cst`` of the non-linear readout's gate."""
    mace_attributes: dict[str, bool | str | None] = Field(default_factory=dict)
    """Constructor flags that only an export back to torch needs."""

    @model_validator(mode="after")
    def _is_consistent(self) -> MACEConfig:
        layers = {len(self.interactions), len(self.products)}
        if len(layers) != 1 or 0 in layers:
            raise ValueError(f"interactions and products have {layers} layers")
        if len(self.readouts) not in (1, len(self.products)):
            raise ValueError(f"{len(self.readouts)} readouts for {len(self.products)} layers")
        if not self.atomic_numbers or len(set(self.atomic_numbers)) != len(self.atomic_numbers):
            raise ValueError("atomic_numbers must hold each element once")
        if not self.heads or len(set(self.heads)) != len(self.heads):
            raise ValueError("heads must be distinct names, at least one")
        if (self.radial_type == "gaussian") != (self.gaussian_coefficient is not None):
            raise ValueError(f"a {self.radial_type} basis with {self.gaussian_coefficient=}")
        for product in self.products:
            if len(product.paths) != len(e3nn.Irreps(product.irreps_out)) or not product.paths[0]:
                raise ValueError("a product needs one list of path counts per output irrep")
        if self.moments is not None and self.moments.kind == "vector" and not self.has_vectors:
            raise ValueError("vector moments need a layer with at least two hidden vectors (1o)")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        if self.moments is None:  # models without the head are written, and hashed, as ever
            found.pop("moments", None)
        return found

    @property
    def has_vectors(self) -> bool:
        """A layer has two hidden vectors, whose cross product is an axial one."""
        hidden = (e3nn.Irreps(product.irreps_out) for product in self.products)
        return any(irreps.count("1o") > 1 for irreps in hidden)

    @property
    def num_elements(self) -> int:
        return len(self.atomic_numbers)
