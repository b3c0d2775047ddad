"""A torch ``.model`` file becomes a potential and its parameters, without torch.

Every hyper-parameter comes from the sub-modules of the file, never from its top-level attributes
or from another library's defaults; what this version cannot reproduce exactly is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np

from converters.reader import MALFORMED, ModelFile, ModelFileError, irreps, read
from converters.rules import buffer_path, check_coverage, parameter_rules
from converters.unpickle import Node, Reference
from jaxft import tree
from jaxft.models.config import (
    EmbeddingConfig,
    GateConfig,
    InteractionConfig,
    MACEConfig,
    ProductConfig,
    ReadoutConfig,
)
from jaxft.models.irreps import multiplicities, tensor_product_paths
from jaxft.potential import E0_BUFFER, Potential
from jaxft.typing import Params

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
LINEAR = "e3nn.o3._linear.Linear"
PRODUCT = "e3nn.o3._tensor_product._tensor_product.TensorProduct"
FULL_PRODUCT = "e3nn.o3._tensor_product._sub.FullyConnectedTensorProduct"
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
CONSTANT = ("radial_embedding.", "pair_repulsion_fn.")
"""Modules whose tensors are constants even where torch calls them parameters: a fine-tune turns the
Bessel buffer into a parameter outside its optimiser."""


def convert(
    path: str | Path, *, like: str | Path | None = None, allow_nonfinite: bool = False
) -> tuple[Potential, Params]:
    """Read a mace-torch ``.model``; parameters keep the file's numbers, bit for bit.

    Half-precision parameters are widened to float32, and mixed ones to the widest, exactly.

    Args:
      path: the file.
      like: for a state_dict or a training checkpoint, a whole model of the same architecture.
      allow_nonfinite: accept NaN and infinity among the numbers.

    Raises:
      ModelFileError: the file is not such a model, is damaged, or holds an architecture that this
        version does not reproduce exactly.
    """
    return from_file(_read(path, like), allow_nonfinite=allow_nonfinite)


def convert_with_provenance(
    path: str | Path, *, like: str | Path | None = None, allow_nonfinite: bool = False
) -> tuple[Potential, Params, dict[str, Any]]:
    """As :func:`convert`, and where the model came from: file name, hash and dtype."""
    file = _read(path, like)
    model, params = from_file(file, allow_nonfinite=allow_nonfinite)
    dtypes = {str(file.tensors[name].dtype) for name in _trained(file)}
    provenance = {
        "source": file.path.name,
        "sha256": file.sha256,
        "dtype": "+".join(sorted(dtypes)),
    }
    return model, params, provenance


def _read(path: str | Path, like: str | Path | None) -> ModelFile:
    return read(path) if like is None else read(path, like=like)


def from_file(file: ModelFile, *, allow_nonfinite: bool = False) -> tuple[Potential, Params]:
    """As :func:`convert`, for a file already read."""
    try:
        return _from_file(file, allow_nonfinite)
    except ModelFileError:
        raise
    except MALFORMED as error:
        raise ModelFileError(
            f"{file.path} is damaged: its modules and tensors do not make a model ({error!r:.200})."
            "\nGet the file again from where it came."
        ) from error


def _from_file(file: ModelFile, allow_nonfinite: bool) -> tuple[Potential, Params]:
    config = config_of(file)
    rules = parameter_rules(config)
    trained = _trained(file)
    check_coverage(trained, (rule.name for rule in rules))
    if not allow_nonfinite:
        _check_finite(file)
    wide = _widened([file.tensors[rule.name].dtype for rule in rules])
    leaves: dict[str, np.ndarray] = {}
    for rule in rules:
        leaves.update(rule.to_leaves(file.tensors[rule.name].astype(wide, copy=False)))
    buffers = {}
    for name, tensor in file.tensors.items():
        if name not in trained:
            is_real = tensor.dtype.kind not in "iub"
            dtype = _widened([tensor.dtype]) if is_real else tensor.dtype
            buffers[buffer_path(config, name)] = tensor.astype(dtype, copy=False)
    model = Potential(config, buffers)
    for name in ("scale", "shift"):
        _check_heads(model, f"scale_shift/{name}", 1)
    _check_heads(model, E0_BUFFER, config.num_elements)
    return model, tree.unflatten(leaves)


def _trained(file: ModelFile) -> set[str]:
    named = file.parameters & file.tensors.keys()
    return {name for name in named if not name.startswith(CONSTANT)}


def _widened(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The widest, at least float32; half precision (float16, bfloat16) fits into that exactly."""
    return np.result_type(*(np.float32 if d.itemsize < 4 else d for d in dtypes))


def _check_finite(file: ModelFile) -> None:
    wrong = [
        name
        for name, tensor in file.tensors.items()
        if tensor.dtype.kind not in "iub" and not np.isfinite(tensor).all()
    ]
    if wrong:
        listed = ", ".join(wrong[:10]) + (f" and {len(wrong) - 10} more" if wrong[10:] else "")
        raise ModelFileError(
            f"{file.path} holds NaN or infinity in {listed}; its training diverged, or the file is "
            "damaged.\nGive an earlier checkpoint; --allow-nonfinite converts it all the same."
        )


def _check_heads(model: Potential, path: str, width: int) -> None:
    if path in model.buffers and model.buffers[path].size != len(model.heads) * width:
        raise ModelFileError(
            f"{path.replace('/', '.')} has shape {model.buffers[path].shape}, but the model has "
            f"{len(model.heads)} heads ({', '.join(model.heads)}); the file disagrees with itself."
        )


def config_of(file: ModelFile) -> MACEConfig:
    """The architecture of a file."""
    root = file.root
    if root.name not in ("ScaleShiftMACE", "MACE"):
        raise _unsupported(root.qualname, "ScaleShiftMACE and MACE")
    if (root.name == "ScaleShiftMACE") != root.has("scale_shift"):
        raise _unsupported(f"a {root.name} with scale_shift: {root.has('scale_shift')}", "others")
    layers = range(len(root.module("interactions").children))
    blocks = [root.module(f"interactions.{i}") for i in layers]
    readouts = list(root.module("readouts").children.values())
    heads = _heads(file, readouts)
    gates = {_gate(readout) for readout in readouts if readout.has("non_linearity")}
    gate, gate_constant = _agreed(gates or {("silu", 1.0)}, "gates in the readouts")
    networks = [block.module("conv_tp_weights") for block in blocks]
    silu = {_silu(act) for network in networks for act in _activations(network)}
    config = MACEConfig(
        family=root.name,
        atomic_numbers=tuple(int(z) for z in file.tensors["atomic_numbers"]),
        heads=heads,
        r_max=float(file.tensors["r_max"]),
        **_radial(file),
        edge_irreps=_text(blocks[0].module("conv_tp").get("irreps_in2")),
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
        raise _unsupported("an embedding readout of several heads in a plain MACE", "one head")
    for block, interaction in zip(blocks, config.interactions, strict=True):
        _check_paths(block, interaction, config.edge_irreps)
    _check_harmonics(root.module("spherical_harmonics"))
    _check_normalisation(root, "model")
    return config


def _heads(file: ModelFile, readouts: Sequence[Node]) -> tuple[str, ...]:
    table = file.tensors["atomic_energies_fn.atomic_energies"]
    count = table.shape[0] if table.ndim == 2 else 1
    heads = file.root.get("heads", None) or (["Default"] if count == 1 else None)
    if heads is None or len(heads) != count or not all(isinstance(head, str) for head in heads):
        raise ModelFileError(
            f"the table of isolated-atom energies has {count} rows, the heads are {heads!r:.200}; "
            "expected a name per row.\nPlease report how this model was made."
        )
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
        raise _unsupported(f"the radial basis {basis.qualname}", ", ".join(BASES))
    radial_type = BASES[basis.name]
    repulsion = file.root.has("pair_repulsion_fn")
    powers = {"cutoff_power": "radial_embedding.cutoff_fn.p"}
    if repulsion:
        powers["repulsion_power"] = "pair_repulsion_fn.p"
    return {
        "radial_type": radial_type,
        "num_bessel": file.tensors[f"radial_embedding.bessel_fn.{BASIS_SIZE[radial_type]}"].size,
        "gaussian_coefficient": float(basis.get("coeff")) if radial_type == "gaussian" else None,
        "distance_transform": _transform(embedding),
        "apply_cutoff": bool(embedding.get("apply_cutoff", True)),
        "pair_repulsion": repulsion,
        **{field: _whole(file.tensors[name]) for field, name in powers.items()},
    }


def _whole(power: np.ndarray) -> int:
    if power.size != 1 or float(power) != int(power):
        raise _unsupported(f"the cutoff power {power}", "whole numbers")
    return int(power)


def _transform(embedding: Node) -> str:
    if not embedding.has("distance_transform"):
        return "None"
    transform = embedding.module("distance_transform")
    if transform.name == "AgnesiTransform":
        return "Agnesi"
    if transform.name == "SoftTransform":
        return "Soft" if transform.get("alpha", None) is not None else "Soft 0.3.6"
    raise _unsupported(f"the distance transform {transform.qualname}", "Agnesi and Soft")


def _interaction(file: ModelFile, layer: int) -> InteractionConfig:
    block = file.root.module(f"interactions.{layer}")
    name = BLOCKS.get(block.qualname)
    if name is None:
        raise _unsupported(f"a block of class {block.qualname}", ", ".join(BLOCKS.values()))
    prefix = f"interactions.{layer}"
    is_nonlinear = "NonLinear" in name
    up = block.module("linear_up")
    last = block.module("linear_2" if is_nonlinear else "linear")
    nodes, sent = (_text(up.get(key)) for key in ("irreps_in", "irreps_out"))
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
        target_irreps=_text(last.get("irreps_out")),
        hidden_irreps=_text(block.get("hidden_irreps") if hidden is None else hidden),
        radial_mlp=radial,
        avg_num_neighbors=float(block.get("avg_num_neighbors")),
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
    eps = {float(layer.get("eps")) for layer in layers if layer.name == "LayerNorm"}
    if kinds != expected or len(eps) != 1:
        raise _unsupported(f"a radial network of {kinds}", "Linear, LayerNorm and SiLU in turn")
    return eps.pop()


def _block_gate(gate: Node) -> GateConfig:
    if gate.qualname == "mace.modules.gate.GatedEquivariantBlock":
        if gate.get("_layout_is_ir_mul"):
            raise _unsupported("a gate in cuEquivariance's layout", "e3nn's")
        acts = [
            (_function(gate.get(f"_act_{kind}")), float(gate.get(f"_{kind}_cst")))
            for kind in ("scalar", "gate")
        ]
    else:  # e3nn's, until mace-torch 0.3.15
        paths = ("act_scalars", "act_gates")
        acts = [_activation(gate.module(f"{path}.acts.0")) for path in paths]
    if [name for name, _ in acts] != ["silu", "sigmoid"]:
        raise _unsupported(f"a gate with {acts}", "silu and sigmoid")
    return GateConfig(scalar_constant=acts[0][1], gate_constant=acts[1][1])


def _product(file: ModelFile, layer: int) -> ProductConfig:
    product = file.root.module(f"products.{layer}")
    contractions = product.module("symmetric_contractions")
    prefix = f"products.{layer}.symmetric_contractions.contractions"
    paths, rows = [], set()
    for j in range(len(contractions.module("contractions").children)):
        lower = [name for name in file.tensors if name.startswith(f"{prefix}.{j}.weights.")]
        names = [f"{prefix}.{j}.weights_max"]
        names += [f"{prefix}.{j}.weights.{i}" for i in range(len(lower))]
        paths.append(tuple(file.tensors[name].shape[1] for name in names))
        rows |= {file.tensors[name].shape[0] for name in names}
    is_one = rows == {1} and file.tensors["atomic_numbers"].size > 1
    return ProductConfig(
        irreps_in=_text(contractions.get("irreps_in")),
        irreps_out=_text(contractions.get("irreps_out")),
        paths=tuple(paths),
        use_sc=bool(product.get("use_sc")),
        is_agnostic=is_one or bool(product.get("use_agnostic_product", False)),
    )


def _readout(readout: Node) -> ReadoutConfig:
    kind = READOUTS.get(readout.qualname)
    if kind is None:
        raise _unsupported(f"a readout of class {readout.qualname}", " or ".join(READOUTS))
    first = readout.module("linear" if kind == "linear" else "linear_1")
    hidden = "0x0e" if kind == "linear" else _text(first.get("irreps_out"))
    if kind != "linear" and list(multiplicities(hidden)) != ["0e"]:
        raise _unsupported(f"a readout with hidden {hidden}", "scalars")
    return ReadoutConfig(kind=kind, irreps_in=_text(first.get("irreps_in")), hidden_irreps=hidden)


def _embeddings(root: Node) -> tuple[EmbeddingConfig, ...]:
    if not root.has("joint_embedding"):
        return ()
    specs = root.module("joint_embedding").get("specs")
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


def _check_harmonics(harmonics: Node) -> None:
    chosen = harmonics.get("normalize"), harmonics.get("normalization")
    if chosen != (True, "component"):
        raise _unsupported(
            f"spherical harmonics with (normalize, normalization) = {chosen}", "(True, 'component')"
        )


def _check_paths(block: Node, config: InteractionConfig, edge_irreps: str) -> None:
    """The file's tensor product must be the one that the model builds, path by path."""
    paths = tensor_product_paths(config.sent_irreps, edge_irreps, config.target_irreps)
    expected = [(path.node, path.edge, path.out) for path in paths]
    product = block.module("conv_tp")
    nodes, edges, outs = (
        [_name(*entry[1:]) for entry in irreps(product.get(key))]
        for key in ("irreps_in1", "irreps_in2", "irreps_out")
    )
    given = [
        (nodes[item.args[0]], edges[item.args[1]], outs[item.args[2]])
        for item in product.get("instructions")
    ]
    if given != expected:
        raise ModelFileError(
            f"the tensor product of {block.qualname} has the paths {given}; expected {expected}.\n"
            "Please report how this model was made."
        )


def _check_normalisation(node: Node, path: str) -> None:
    """Every path weight must be the one that the forward pass applies: 1/sqrt(fan-in) per output,
    times sqrt(2l + 1) in tensor products."""
    if node.qualname in (LINEAR, PRODUCT, FULL_PRODUCT):
        outs = irreps(node.get("irreps_out"))
        key = "irreps_in" if node.qualname == LINEAR else "irreps_in1"
        muls = [mul for mul, _, _ in irreps(node.get(key))]
        second = irreps(node.get("irreps_in2")) if node.qualname == FULL_PRODUCT else ()
        fan_in = dict.fromkeys(range(len(outs)), 0)
        entries = []
        for item in node.get("instructions"):
            i_in = item.get("i_in" if node.qualname == LINEAR else "i_in1")
            if i_in >= 0:  # -1 marks a bias
                size = muls[i_in] if node.qualname != PRODUCT else 1
                size *= second[item.get("i_in2")][0] if second else 1
                fan_in[item.get("i_out")] += size
                entries.append((item.get("i_out"), item.get("path_weight")))
        for out, weight in entries:
            dimension = 1 if node.qualname == LINEAR else 2 * outs[out][1] + 1
            expected = math.sqrt(dimension / fan_in[out])
            if not math.isclose(weight, expected, rel_tol=1e-9):
                raise ModelFileError(
                    f"{path} has a path weight of {weight}; expected {expected} (e3nn's component "
                    "and element normalisation).\nPlease report how this model was made."
                )
    for name, child in node.children.items():
        _check_normalisation(child, f"{path}.{name}")


def _activations(network: Node) -> list[Node]:
    """Of a ``FullyConnectedNet``."""
    for layer in network.children.values():
        if layer.name == "_Layer" and (layer.get("var_in"), layer.get("var_out")) != (1, 1):
            raise _unsupported("a radial network with variances other than 1", "1")
    return [layer.module("act") for layer in network.children.values() if layer.has("act")]


def _silu(activation: Node) -> float:
    name, constant = _activation(activation)
    if name != "silu":
        raise _unsupported(f"the activation {name} in a radial network", "silu")
    return constant


def _gate(readout: Node) -> tuple[str, float]:
    """The activation of a readout and its constant."""
    if not readout.has("non_linearity.acts.0"):
        return "None", 1.0
    return _activation(readout.module("non_linearity.acts.0"))


def _activation(activation: Node) -> tuple[str, float]:
    """The name of e3nn's normalised activation, and its constant."""
    constant = 1.0 if activation.get("_is_id") else float(activation.get("cst"))
    if not math.isfinite(constant):
        raise ModelFileError(f"the constant of an activation is {constant}; expected a number.")
    return _function(activation.get("f")), constant


def _function(function: Any) -> str:
    if not isinstance(function, Reference | Node) or function.qualname not in GATES:
        raise _unsupported(f"the activation {function}", ", ".join(sorted(set(GATES.values()))))
    return GATES[function.qualname]


def _agreed(values: set[T], what: str) -> T:
    if len(values) != 1:
        raise _unsupported(f"{len(values)} different {what}", "one")
    return values.pop()


def _name(l: int, p: int) -> str:  # noqa: E741
    return f"{l}{'e' if p == 1 else 'o'}"


def _text(value: Any) -> str:
    return "+".join(f"{mul}x{_name(l, p)}" for mul, l, p in irreps(value))  # noqa: E741


def _unsupported(found: str, expected: str) -> ModelFileError:
    return ModelFileError(
        f"this model has {found}; this version of jaxft converts {expected}.\n"
        "Please say on the issue tracker which model you need."
    )
