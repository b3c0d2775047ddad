"""The architecture of a new MACE, in the words of mace-torch's command line, and what it makes.

Constants are those that mace-torch would write into a file, so that a new model exports like any
other. What is not offered here (non-linear blocks, embeddings, other bases) can be had by starting
from a bundle that has it, see :func:`jaxft.scratch.again`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import ase.data
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxft.models.config import InteractionConfig, MACEConfig, ProductConfig, ReadoutConfig
from jaxft.models.couplings import coupling_tensors
from jaxft.models.e3nn import e3nn
from jaxft.models.irreps import multiplicities, tensor_product_paths
from jaxft.potential import E0_BUFFER, Potential

SILU = 1.6791767923989418
"""e3nn 0.4.4's ``normalize2mom(silu)``, a Monte Carlo number that every file of mace-torch has."""

HEAD = "Default"
"""mace-torch's name of an only head."""

AGNESI = {"a": 1.0805, "q": 0.9183, "p": 4.5791}
ZBL = {"a_exp": 0.300, "a_prefactor": 0.4543, "c": [0.1818, 0.5099, 0.2802, 0.02817]}
"""mace-torch's constants of transform and repulsion; see :mod:`jaxft.models.radial`."""

RADII = np.asarray(ase.data.covalent_radii, np.float64)
"""[119] Å, by atomic number."""

Block = Literal[
    "RealAgnosticInteractionBlock",
    "RealAgnosticResidualInteractionBlock",
    "RealAgnosticDensityInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock",
]
RESIDUAL: Block = "RealAgnosticResidualInteractionBlock"


class Architecture(BaseModel):
    """Everything about a new MACE but its elements and numbers; defaults are mace-torch's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    hidden: str = "128x0e+128x1o"
    """Features between layers (mace's ``hidden_irreps``): scalars first, each degree as often, with
    the parity of vectors and their products (0e, 1o, 2e …)."""
    layers: int = Field(2, ge=1, le=8)
    l_max: int = Field(3, ge=0, le=4)
    """Of the spherical harmonics (``max_ell``)."""
    correlation: int = Field(3, ge=1, le=3)
    r_max: float = Field(5.0, gt=0, le=100.0)
    """Å."""
    num_bessel: int = Field(8, ge=1, le=256)
    """Radial functions (``num_radial_basis``)."""
    cutoff_power: int = Field(5, ge=1, le=64)
    radial_mlp: tuple[int, ...] = (64, 64, 64)
    """Hidden widths of the radial network."""
    readout: int = Field(16, ge=1, le=1 << 16)
    """Hidden scalars of the last layer's readout (``MLP_irreps``)."""
    first_block: Block = RESIDUAL
    """Of the first layer (``interaction_first``)."""
    block: Block = RESIDUAL
    """Of the others."""
    distance_transform: Literal["None", "Agnesi"] = "None"
    pair_repulsion: bool = False
    """Ziegler–Biersack–Littmark repulsion at short distances."""

    @model_validator(mode="after")
    def _can_be_built(self) -> Architecture:
        try:
            terms = multiplicities(self.hidden)
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"hidden: {self.hidden!r} is no list such as 16x0e+16x1o") from error
        degrees = [int(name[:-1]) for name in terms]
        natural = [f"{degree}{'oe'[degree % 2 == 0]}" for degree in degrees]
        if list(terms) != natural or degrees != sorted(degrees) or degrees[:1] != [0]:
            raise ValueError(f"hidden: {self.hidden} must be 0e, 1o, 2e … in this order, with 0e")
        if len(set(terms.values())) != 1 or min(terms.values()) < 1:
            raise ValueError(f"hidden: {self.hidden} must have every irrep as often")
        if max(degrees) > self.l_max:
            raise ValueError(f"hidden: {self.hidden} has a degree above l_max: {self.l_max}")
        if not all(width >= 1 for width in self.radial_mlp):
            raise ValueError("radial_mlp: widths must be positive")
        return self

    @property
    def channels(self) -> int:
        return next(iter(multiplicities(self.hidden).values()))


def build(
    architecture: Architecture,
    elements: Sequence[int],
    *,
    avg_num_neighbors: float,
    e0s: Mapping[int, float],
    scale: float = 1.0,
    shift: float = 0.0,
) -> Potential:
    """The potential of an architecture; its parameters come from :meth:`Potential.init`.

    Args:
      architecture: see there.
      elements: atomic numbers, each once.
      avg_num_neighbors: what messages are divided by (density blocks do not read it).
      e0s: ``{atomic number: eV}`` of all elements.
      scale: eV, of the interaction energy.
      shift: eV per atom.

    Raises:
      ValueError: an element is missing or occurs twice, or a number is out of range.
    """
    config = _config(architecture, sorted(elements), avg_num_neighbors)
    buffers = dict(_constants(config))
    buffers[E0_BUFFER] = np.array([e0s[z] for z in config.atomic_numbers], np.float64)
    buffers["scale_shift/scale"] = np.array(scale, np.float64)
    buffers["scale_shift/shift"] = np.array(shift, np.float64)
    return Potential(config, buffers)


def architecture_of(config: MACEConfig) -> Architecture:
    """The architecture that :func:`build` would make this model from.

    Raises:
      ValueError: it has something that cannot be built here; the message names it.
    """
    if len(config.heads) > 1:
        raise ValueError(f"{UNLIKE}: it has {len(config.heads)} heads. Select one of them first.")
    first, last = config.interactions[0], config.interactions[-1]
    readout = multiplicities(config.readouts[-1].hidden_irreps).get("0e", 0)
    given: dict[str, Any] = {
        "hidden": config.products[0].irreps_out,
        "layers": len(config.interactions),
        "l_max": max(ir.l for _, ir in e3nn.Irreps(config.edge_irreps)),
        "correlation": config.products[0].correlation,
        "r_max": config.r_max,
        "num_bessel": config.num_bessel,
        "cutoff_power": config.cutoff_power,
        "radial_mlp": first.radial_mlp,
        "readout": readout or Architecture().readout,
        "first_block": first.block,
        "block": last.block,
        "distance_transform": config.distance_transform,
        "pair_repulsion": config.pair_repulsion,
    }
    try:
        found = Architecture(**given)
    except ValueError as error:
        raise ValueError(f"{UNLIKE} ({error}).\n{ADVICE}") from error
    rebuilt = _config(found, config.atomic_numbers, first.avg_num_neighbors).model_dump()
    own = config.model_dump()
    differs = [name for name in rebuilt if name not in FREE and rebuilt[name] != own[name]]
    if differs:
        raise ValueError(f"{UNLIKE}: it differs in {', '.join(differs)}.\n{ADVICE}")
    return found


UNLIKE = "the bundle's architecture cannot be changed here"
ADVICE = "Use it as it is (without keys under `architecture`), or give an architecture without like"
FREE = {"heads", "mace_attributes", "gate_constant", "repulsion_power"}
"""Of a config, what may differ without another architecture."""


def _config(
    architecture: Architecture, elements: Sequence[int], avg_num_neighbors: float
) -> MACEConfig:
    hidden, c = architecture.hidden, architecture.channels
    scalars, n = f"{c}x0e", architecture.layers
    degrees = range(architecture.l_max + 1)
    harmonics = [f"{degree}{'oe'[degree % 2 == 0]}" for degree in degrees]
    target = "+".join(f"{c}x{name}" for name in harmonics)
    outs = [hidden] * (n - 1) + [scalars]
    blocks = [architecture.first_block] + [architecture.block] * (n - 1)
    interactions = tuple(
        InteractionConfig(
            block=block,
            node_feats_irreps=hidden if i else scalars,
            target_irreps=target,
            hidden_irreps=out,
            radial_mlp=architecture.radial_mlp,
            avg_num_neighbors=avg_num_neighbors,
        )
        for i, (block, out) in enumerate(zip(blocks, outs, strict=True))
    )
    products = tuple(
        ProductConfig(
            irreps_in=target,
            irreps_out=out,
            paths=tuple(
                tuple(u.shape[-1] for u in reversed(_tensors(target, name, architecture)))
                for name in multiplicities(out)
            ),
            use_sc=i > 0 or "Residual" in blocks[0],
        )
        for i, out in enumerate(outs)
    )
    readouts = [ReadoutConfig(kind="linear", irreps_in=out) for out in outs]
    if n > 1:
        last = f"{architecture.readout}x0e"
        readouts[-1] = ReadoutConfig(kind="nonlinear", irreps_in=scalars, hidden_irreps=last)
    return MACEConfig(
        atomic_numbers=tuple(int(z) for z in elements),
        heads=(HEAD,),
        r_max=architecture.r_max,
        num_bessel=architecture.num_bessel,
        cutoff_power=architecture.cutoff_power,
        distance_transform=architecture.distance_transform,
        pair_repulsion=architecture.pair_repulsion,
        repulsion_power=architecture.cutoff_power if architecture.pair_repulsion else 6,
        edge_irreps="+".join(f"1x{name}" for name in harmonics),
        interactions=interactions,
        products=products,
        readouts=tuple(readouts),
        silu_constant=SILU if architecture.radial_mlp else 1.0,
        gate_constant=SILU if n > 1 else 1.0,
        mace_attributes={"use_reduced_cg": False, "use_so3": False, "lammps_mliap": False},
    )


def _tensors(target: str, output: str, architecture: Architecture) -> list[np.ndarray]:
    return list(coupling_tensors(target, output, architecture.correlation).values())


def _constants(config: MACEConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Buffers that follow from the architecture, under mace-torch's names."""
    r_max = np.array(config.r_max)
    yield "atomic_numbers", np.array(config.atomic_numbers, np.int64)
    yield "num_interactions", np.array(len(config.interactions), np.int64)
    yield "r_max", r_max
    frequencies = np.pi / config.r_max * np.arange(1, config.num_bessel + 1)
    yield "radial_embedding/bessel_fn/bessel_weights", frequencies
    yield "radial_embedding/bessel_fn/prefactor", np.array(math.sqrt(2 / config.r_max))
    yield "radial_embedding/bessel_fn/r_max", r_max
    yield "radial_embedding/cutoff_fn/p", np.array(config.cutoff_power, np.int32)
    yield "radial_embedding/cutoff_fn/r_max", r_max
    if config.distance_transform == "Agnesi":
        for name, value in AGNESI.items():
            yield f"radial_embedding/distance_transform/{name}", np.array(value)
        yield "radial_embedding/distance_transform/covalent_radii", RADII
    if config.pair_repulsion:
        for name, number in ZBL.items():
            yield f"pair_repulsion_fn/{name}", np.array(number)
        yield "pair_repulsion_fn/covalent_radii", RADII
        yield "pair_repulsion_fn/p", np.array(config.repulsion_power, np.int32)
    for i, product in enumerate(config.products):
        for name in multiplicities(product.irreps_out):
            tensors = coupling_tensors(product.irreps_in, name, product.correlation)
            for nu, tensor in tensors.items():
                yield f"products_{i}/symmetric_contractions/{name}/U_matrix_{nu}", tensor
    yield from _of_torch_alone(config)


def _of_torch_alone(config: MACEConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Masks and empty arrays that e3nn's modules keep and nothing here reads."""
    first = config.interactions[0].node_feats_irreps
    masks = {"node_embedding/linear": _mask(first)}
    for i, (block, product) in enumerate(zip(config.interactions, config.products, strict=True)):
        nodes, target = block.node_feats_irreps, block.target_irreps
        sent = multiplicities(block.sent_irreps)
        paths = tensor_product_paths(block.sent_irreps, config.edge_irreps, target)
        masks |= {
            f"interactions_{i}/conv_tp": np.ones(
                sum(sent[path.node] * e3nn.Irrep(path.out).dim for path in paths)
            ),
            f"interactions_{i}/linear": _mask(target),
            f"interactions_{i}/linear_up": _mask(block.sent_irreps),
            f"interactions_{i}/skip_tp": (
                _mask(block.hidden_irreps, nodes) if block.is_residual else _mask(target)
            ),
            f"products_{i}/linear": _mask(product.irreps_out),
        }
        yield f"interactions_{i}/conv_tp/weight", np.zeros(0)
    for i, readout in enumerate(config.readouts):
        if readout.kind == "linear":
            masks[f"readouts_{i}/linear"] = np.ones(1)
        else:
            masks[f"readouts_{i}/linear_1"] = _mask(readout.hidden_irreps)
            masks[f"readouts_{i}/linear_2"] = np.ones(1)
    for path, mask in masks.items():
        yield f"{path}/output_mask", mask
        if not path.endswith("_tp"):
            yield f"{path}/bias", np.zeros(0)


def _mask(outputs: str, inputs: str | None = None) -> np.ndarray:
    """1 for every component that an input of the same irrep reaches; by default all."""
    reached = multiplicities(outputs if inputs is None else inputs)
    blocks = [np.full(mul * ir.dim, float(str(ir) in reached)) for mul, ir in e3nn.Irreps(outputs)]
    return np.concatenate(blocks)
