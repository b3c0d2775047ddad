"""The architecture that the modules of a torch file describe.

Every hyper-parameter comes from the sub-modules of the file, never from its top-level attributes
or from another library's defaults; what this version cannot reproduce exactly is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

import numpy as np
from ase.data import chemical_symbols

from converters.checks import (
    MAX_CORRELATION,
    MAX_EMBEDDINGS,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_NAME,
    at_most,
    check_effort,
    check_harmonics,
    check_normalisation,
    check_paths,
    irreps_text,
    number,
    unsupported,
)
from converters.reader import ModelFile, ModelFileError, Node, Reference
from jaxft.models.config import (
    EmbeddingConfig,
    GateConfig,
    InteractionConfig,
    MACEConfig,
    ProductConfig,
    ReadoutConfig,
)
from jaxft.models.irreps import multiplicities

T = TypeVar("T")

BLOCKS = {
    f"mace.modules.blocks.{name}": name
    for name in get_args(InteractionConfig.model_fields["block"].annotation)
}
READOUTS = {
    "mace.modules.blocks.LinearReadoutBlock": "linear",
    "mace.modules.blocks.NonLinearReadoutBlock": "nonlinear",
    "mace.modules.blocks.NonLinearBiasReadoutBlock": "bias",
}
BASES = {"BesselBasis": "bessel", "GaussianBasis": "gaussian", "ChebychevBasis": "chebyshev"}
BASIS_SIZE = {"bessel": "bessel_weights", "gaussian": "gaussian_weights", "chebyshev": "n"}
GATES = {
    "torch.nn.functional.silu": "silu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.functional.sigmoid": "sigmoid",
    "torch.sigmoid": "sigmoid",
    "torch.nn.functional.tanh": "tanh",
    "torch.tanh": "tanh",
    "torch.abs": "abs",
}
ATTRIBUTES = ("use_reduced_cg", "use_so3", "lammps_mliap")


def config_of(file: ModelFile) -> MACEConfig:
    """The architecture of a file."""
    root = file.root
    if root.name not in ("ScaleShiftMACE", "MACE"):
        raise unsupported(root.qualname, "ScaleShiftMACE and MACE")
    if (root.name == "ScaleShiftMACE") != root.has("scale_shift"):
        raise unsupported(f"a {root.name} with scale_shift: {root.has('scale_shift')}", "others")
    layers = range(len(root.module("interactions").children))
    at_most(MAX_LAYERS, layers, "layers")
    blocks = [root.module(f"interactions.{i}") for i in layers]
    readouts = list(root.module("readouts").children.values())
    heads = _heads(file, readouts)
    gates = {_gate(readout) for readout in readouts if readout.has("non_linearity")}
    gate, gate_constant = _agreed(gates or {("silu", 1.0)}, "gates in the readouts")
    networks = [block.module("conv_tp_weights") for block in blocks]
    silu = {_silu(act) for network in networks for act in _activations(network)}
    config = MACEConfig(
        family=root.name,
        atomic_numbers=_elements(file.tensors["atomic_numbers"]),
        heads=heads,
        r_max=number(file.tensors["r_max"], "r_max"),
        **_radial(file),
        edge_irreps=irreps_text(blocks[0].module("conv_tp").get("irreps_in2")),
        interactions=tuple(_interaction(file, i) for i in layers),
        products=tuple(_product(file, i) for i in layers),
        readouts=tuple(_readout(readout) for readout in readouts),
        embeddings=_embeddings(root),
        embedding_readout=root.has("embedding_readout"),
        gate=gate,
        gate_constant=gate_constant,
        silu_constant=_agreed(silu or {1.0}, "constants of silu in the radial networks"),
        mace_attributes={name: root.get(name) for name in ATTRIBUTES if name in root.state},
    )
    if config.embedding_readout and config.family == "MACE" and len(heads) > 1:
        raise unsupported("an embedding readout of several heads in a plain MACE", "one head")
    check_effort(config.interactions, config.edge_irreps)
    for block, interaction in zip(blocks, config.interactions, strict=True):
        check_paths(block, interaction, config.edge_irreps)
    check_harmonics(root.module("spherical_harmonics"))
    check_normalisation(root)
    return config


def _elements(numbers: np.ndarray) -> tuple[int, ...]:
    at_most(len(chemical_symbols), numbers, "elements")
    if numbers.dtype.kind not in "iu":
        raise ModelFileError(f"atomic_numbers are {numbers.dtype}; expected whole numbers.")
    return tuple(int(z) for z in numbers)


def _heads(file: ModelFile, readouts: Sequence[Node]) -> tuple[str, ...]:
    table = file.tensors["atomic_energies_fn.atomic_energies"]
    count = table.shape[0] if table.ndim == 2 else 1
    heads: Any = file.root.get("heads", None) or (["Default"] if count == 1 else None)
    is_list = isinstance(heads, list | tuple) and len(heads) == count
    if not is_list or not all(isinstance(head, str) for head in heads):
        raise ModelFileError(
            f"the table of isolated-atom energies has {count} rows, the heads are {heads!r:.200}; "
            "expected a name per row.\nPlease report how this model was made."
        )
    at_most(MAX_HEADS, heads, "heads")
    for head in heads:
        at_most(MAX_NAME, head, "characters in the name of a head")
    for readout in readouts:
        own = readout.get("num_heads", count)
        if own != count:
            raise ModelFileError(
                f"a readout has {own} heads, the model {count}; the file disagrees with itself."
            )
    return tuple(heads)


def _radial(file: ModelFile) -> dict[str, Any]:
    """The fields of the config that concern distances."""
    embedding = file.root.module("radial_embedding")
    basis = embedding.module("bessel_fn")
    if basis.name not in BASES:
        raise unsupported(f"the radial basis {basis.qualname}", ", ".join(BASES))
    radial_type = BASES[basis.name]
    repulsion = file.root.has("pair_repulsion_fn")
    powers = {"cutoff_power": "radial_embedding.cutoff_fn.p"}
    if repulsion:
        powers["repulsion_power"] = "pair_repulsion_fn.p"
    return {
        "radial_type": radial_type,
        "num_bessel": file.tensors[f"radial_embedding.bessel_fn.{BASIS_SIZE[radial_type]}"].size,
        "gaussian_coefficient": (
            number(basis.get("coeff"), "coeff") if radial_type == "gaussian" else None
        ),
        "distance_transform": _transform(embedding),
        "apply_cutoff": bool(embedding.get("apply_cutoff", True)),
        "pair_repulsion": repulsion,
        **{field: _whole(file.tensors[name]) for field, name in powers.items()},
    }


def _whole(power: np.ndarray) -> int:
    if power.size != 1 or float(power) != int(power):
        raise unsupported(f"the cutoff power {power}", "whole numbers")
    return int(power)


def _transform(embedding: Node) -> str:
    if not embedding.has("distance_transform"):
        return "None"
    transform = embedding.module("distance_transform")
    if transform.name == "AgnesiTransform":
        return "Agnesi"
    if transform.name == "SoftTransform":
        return "Soft" if transform.get("alpha", None) is not None else "Soft 0.3.6"
    raise unsupported(f"the distance transform {transform.qualname}", "Agnesi and Soft")


def _interaction(file: ModelFile, layer: int) -> InteractionConfig:
    block = file.root.module(f"interactions.{layer}")
    name = BLOCKS.get(block.qualname)
    if name is None:
        raise unsupported(f"a block of class {block.qualname}", ", ".join(BLOCKS.values()))
    prefix = f"interactions.{layer}"
    is_nonlinear = "NonLinear" in name
    up = block.module("linear_up")
    last = block.module("linear_2" if is_nonlinear else "linear")
    nodes, sent = (irreps_text(up.get(key)) for key in ("irreps_in", "irreps_out"))
    hidden = block.module("skip_tp").get("irreps_out") if "Residual" in name else None
    extra: dict[str, Any] = {}
    if is_nonlinear:
        networks = [block.module(key) for key in ("conv_tp_weights", "density_fn")]
        eps = {_check_mlp(network) for network in networks}
        extra = {
            "density_mlp": _widths(file, f"{prefix}.density_fn.net.{{}}.weight", 3),
            "layer_norm_eps": _agreed(eps, "epsilons of LayerNorm"),
            "gate": _block_gate(block.module("equivariant_nonlin")),
        }
        radial = _widths(file, f"{prefix}.conv_tp_weights.net.{{}}.weight", 3)
    else:
        radial = _widths(file, f"{prefix}.conv_tp_weights.layer{{}}.weight", 1)
    return InteractionConfig(
        block=name,
        node_feats_irreps=nodes,
        target_irreps=irreps_text(last.get("irreps_out")),
        hidden_irreps=irreps_text(block.get("hidden_irreps") if hidden is None else hidden),
        radial_mlp=radial,
        avg_num_neighbors=number(block.get("avg_num_neighbors"), "avg_num_neighbors"),
        sender_irreps=None if sent == nodes else sent,
        **extra,
    )


def _widths(file: ModelFile, pattern: str, step: int) -> tuple[int, ...]:
    """Hidden widths of a network, from its matrices: [in, out] every layer, [out, in] every 3rd."""
    shapes: list[tuple[int, ...]] = []
    while (name := pattern.format(step * len(shapes))) in file.tensors:
        shapes.append(file.tensors[name].shape)
    out = 1 if step == 1 else 0
    return tuple(shape[out] for shape in shapes[:-1])


def _check_mlp(network: Node) -> float:
    """Raises unless it is Linear, LayerNorm, SiLU, …, Linear; the epsilon of LayerNorm."""
    layers = list(network.module("net").children.values())
    kinds = [layer.name for layer in layers]
    expected = ["Linear", "LayerNorm", "SiLU"] * (len(kinds) // 3) + ["Linear"]
    eps = {number(layer.get("eps"), "eps") for layer in layers if layer.name == "LayerNorm"}
    if kinds != expected or len(eps) != 1:
        raise unsupported(f"a radial network of {kinds}", "Linear, LayerNorm and SiLU in turn")
    return eps.pop()


def _block_gate(gate: Node) -> GateConfig:
    if gate.qualname == "mace.modules.gate.GatedEquivariantBlock":
        if gate.get("_layout_is_ir_mul"):
            raise unsupported("a gate in cuEquivariance's layout", "e3nn's")
        acts = [
            (_function(gate.get(f"_act_{kind}")), number(gate.get(f"_{kind}_cst"), f"_{kind}_cst"))
            for kind in ("scalar", "gate")
        ]
    else:  # e3nn's, until mace-torch 0.3.15
        paths = ("act_scalars", "act_gates")
        acts = [_activation(gate.module(f"{path}.acts.0")) for path in paths]
    if [name for name, _ in acts] != ["silu", "sigmoid"]:
        raise unsupported(f"a gate with {acts}", "silu and sigmoid")
    return GateConfig(scalar_constant=acts[0][1], gate_constant=acts[1][1])


def _product(file: ModelFile, layer: int) -> ProductConfig:
    product = file.root.module(f"products.{layer}")
    contractions = product.module("symmetric_contractions")
    prefix = f"products.{layer}.symmetric_contractions.contractions"
    paths, rows = [], set()
    for j in range(len(contractions.module("contractions").children)):
        names = [f"{prefix}.{j}.weights_max"]
        while (name := f"{prefix}.{j}.weights.{len(names) - 1}") in file.tensors:
            names.append(name)
        at_most(MAX_CORRELATION, names, "orders of correlation")
        paths.append(tuple(file.tensors[name].shape[1] for name in names))
        rows |= {file.tensors[name].shape[0] for name in names}
    is_one = rows == {1} and file.tensors["atomic_numbers"].size > 1
    return ProductConfig(
        irreps_in=irreps_text(contractions.get("irreps_in")),
        irreps_out=irreps_text(contractions.get("irreps_out")),
        paths=tuple(paths),
        use_sc=bool(product.get("use_sc")),
        is_agnostic=is_one or bool(product.get("use_agnostic_product", False)),
    )


def _readout(readout: Node) -> ReadoutConfig:
    kind = READOUTS.get(readout.qualname)
    if kind is None:
        raise unsupported(f"a readout of class {readout.qualname}", " or ".join(READOUTS))
    first = readout.module("linear" if kind == "linear" else "linear_1")
    hidden = "0x0e" if kind == "linear" else irreps_text(first.get("irreps_out"))
    if kind != "linear" and list(multiplicities(hidden)) != ["0e"]:
        raise unsupported(f"a readout with hidden {hidden}", "scalars")
    return ReadoutConfig(
        kind=kind, irreps_in=irreps_text(first.get("irreps_in")), hidden_irreps=hidden
    )


def _embeddings(root: Node) -> tuple[EmbeddingConfig, ...]:
    if not root.has("joint_embedding"):
        return ()
    specs = root.module("joint_embedding").get("specs")
    at_most(MAX_EMBEDDINGS, specs, "embeddings")
    fields = ("emb_dim", "num_classes", "offset", "in_dim", "use_bias")
    return tuple(
        EmbeddingConfig(
            name=name,
            kind=spec["type"],
            per="graph" if spec["per"] == "graph" else "atom",  # so torch decides
            **{
                field: spec[field]
                for field in fields
                if field in spec and (field != "num_classes" or spec["type"] == "categorical")
            },
        )
        for name, spec in specs.items()
    )


def _activations(network: Node) -> list[Node]:
    """Of a ``FullyConnectedNet``."""
    for layer in network.children.values():
        if layer.name == "_Layer" and (layer.get("var_in"), layer.get("var_out")) != (1, 1):
            raise unsupported("a radial network with variances other than 1", "1")
    return [layer.module("act") for layer in network.children.values() if layer.has("act")]


def _silu(activation: Node) -> float:
    name, constant = _activation(activation)
    if name != "silu":
        raise unsupported(f"the activation {name} in a radial network", "silu")
    return constant


def _gate(readout: Node) -> tuple[str, float]:
    """The activation of a readout and its constant."""
    if not readout.has("non_linearity.acts.0"):
        return "None", 1.0
    return _activation(readout.module("non_linearity.acts.0"))


def _activation(activation: Node) -> tuple[str, float]:
    """The name of e3nn's normalised activation, and its constant."""
    constant = 1.0 if activation.get("_is_id") else number(activation.get("cst"), "cst")
    if not math.isfinite(constant):
        raise ModelFileError(f"the constant of an activation is {constant}; expected a number.")
    return _function(activation.get("f")), constant


def _function(function: Any) -> str:
    if not isinstance(function, Reference | Node) or function.qualname not in GATES:
        raise unsupported(f"the activation {function}", ", ".join(sorted(set(GATES.values()))))
    return GATES[function.qualname]


def _agreed(values: set[T], what: str) -> T:
    if len(values) != 1:
        raise unsupported(f"{len(values)} different {what}", "one")
    return values.pop()
