"""A torch ``.model`` file becomes a potential and its parameters, without torch.

Every hyper-parameter comes from the sub-modules of the file, never from its top-level attributes
or from another library's defaults; what this version cannot reproduce exactly is refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from converters.reader import MALFORMED, ModelFile, ModelFileError, irreps, read
from converters.rules import buffer_path, check_coverage, parameter_rules
from converters.unpickle import Node, Reference
from jaxft import tree
from jaxft.models.config import InteractionConfig, MACEConfig, ProductConfig, ReadoutConfig
from jaxft.models.irreps import tensor_product_paths
from jaxft.potential import Potential
from jaxft.typing import Params

BLOCK = "mace.modules.blocks.RealAgnosticResidualInteractionBlock"
READOUTS = {
    "mace.modules.blocks.LinearReadoutBlock": "linear",
    "mace.modules.blocks.NonLinearReadoutBlock": "nonlinear",
}
LINEAR = "e3nn.o3._linear.Linear"
PRODUCT = "e3nn.o3._tensor_product._tensor_product.TensorProduct"
FULL_PRODUCT = "e3nn.o3._tensor_product._sub.FullyConnectedTensorProduct"
SILU = ("torch.nn.functional.silu", "torch.nn.modules.activation.SiLU")
ATTRIBUTES = ("use_reduced_cg", "apply_cutoff", "use_so3", "use_agnostic_product")


def convert(path: str | Path) -> tuple[Potential, Params]:
    """Read a mace-torch ``.model``; parameters keep the file's numbers and dtype, bit for bit.

    Raises:
      ModelFileError: the file is not such a model, is damaged, or holds an architecture that this
        version does not reproduce exactly.
    """
    return from_file(read(path))


def convert_with_provenance(path: str | Path) -> tuple[Potential, Params, dict[str, Any]]:
    """As :func:`convert`, and where the model came from: file name and hash."""
    file = read(path)
    model, params = from_file(file)
    return model, params, {"source": file.path.name, "sha256": file.sha256}


def from_file(file: ModelFile) -> tuple[Potential, Params]:
    """As :func:`convert`, for a file already read."""
    try:
        return _from_file(file)
    except ModelFileError:
        raise
    except MALFORMED as error:
        raise ModelFileError(
            f"{file.path} is damaged: its modules and tensors do not make a model ({error!r:.200})."
            "\nGet the file again from where it came."
        ) from error


def _from_file(file: ModelFile) -> tuple[Potential, Params]:
    config = config_of(file)
    rules = parameter_rules(config)
    trained = {name for name in file.tensors if _is_trained(file, name)}
    check_coverage(trained, (rule.name for rule in rules))
    leaves: dict[str, np.ndarray] = {}
    for rule in rules:
        leaves.update(rule.to_leaves(file.tensors[rule.name]))
    buffers = {
        buffer_path(config, name): tensor
        for name, tensor in file.tensors.items()
        if name not in trained
    }
    return Potential(config, buffers), tree.unflatten(leaves)


def _is_trained(file: ModelFile, name: str) -> bool:
    """torch trains it. A fine-tune turns the Bessel buffer into a parameter outside its optimiser;
    it is a constant all the same."""
    return name in file.parameters and not name.endswith("bessel_weights")


def config_of(file: ModelFile) -> MACEConfig:
    """The architecture of a file."""
    root = file.root
    if root.name != "ScaleShiftMACE":
        raise _unsupported(root.qualname, "ScaleShiftMACE (as MACE-MP-0 is)")
    heads = root.get("heads", None) or ["Default"]
    if len(heads) > 1:
        raise _unsupported(f"{len(heads)} heads ({', '.join(heads)})", "a single head")
    for name in ("pair_repulsion_fn", "joint_embedding", "embedding_readout"):
        if root.has(name):
            raise _unsupported(f"the module {name}", "a model without it (as MACE-MP-0 is)")
    if root.get("use_last_readout_only", False):
        raise _unsupported("use_last_readout_only", "one readout per layer")
    radial = root.module("radial_embedding")
    _check_radial(radial)
    layers = range(len(root.module("interactions").children))
    blocks = [root.module(f"interactions.{i}") for i in layers]
    silu = {_silu(act) for block in blocks for act in _activations(block)}
    readouts = [root.module(f"readouts.{i}") for i in layers]
    config = MACEConfig(
        atomic_numbers=tuple(int(z) for z in file.tensors["atomic_numbers"]),
        heads=tuple(heads),
        r_max=float(file.tensors["r_max"]),
        num_bessel=file.tensors["radial_embedding.bessel_fn.bessel_weights"].size,
        cutoff_power=int(file.tensors["radial_embedding.cutoff_fn.p"]),
        edge_irreps=_text(blocks[0].get("edge_attrs_irreps")),
        interactions=tuple(_interaction(block) for block in blocks),
        products=tuple(_product(file, i) for i in layers),
        readouts=tuple(_readout(readout) for readout in readouts),
        silu_constant=_agreed(silu, "constants of silu in the radial networks"),
        readout_silu_constant=_agreed(
            {_silu(r.module("non_linearity.acts.0")) for r in readouts if r.has("non_linearity")}
            or silu,  # a single layer has a linear readout only
            "constants of silu in the readouts",
        ),
        mace_attributes={name: root.get(name) for name in ATTRIBUTES if name in root.state},
    )
    for block, interaction in zip(blocks, config.interactions, strict=True):
        _check_paths(block, interaction, config.edge_irreps)
    _check_normalisation(root, "model")
    return config


def _interaction(block: Node) -> InteractionConfig:
    if block.qualname != BLOCK:
        raise _unsupported(f"a block of class {block.qualname}", BLOCK.rpartition(".")[2])
    network = block.module("conv_tp_weights")
    widths = [int(h) for h in network.get("hs")]
    return InteractionConfig(
        block="RealAgnosticResidualInteractionBlock",
        node_feats_irreps=_text(block.get("node_feats_irreps")),
        target_irreps=_text(block.get("target_irreps")),
        hidden_irreps=_text(block.get("hidden_irreps")),
        radial_mlp=tuple(widths[1:-1]),
        avg_num_neighbors=float(block.get("avg_num_neighbors")),
    )


def _product(file: ModelFile, layer: int) -> ProductConfig:
    contractions = file.root.module(f"products.{layer}.symmetric_contractions")
    if file.root.module(f"products.{layer}").get("use_agnostic_product", False):
        raise _unsupported("use_agnostic_product", "product weights per element")
    prefix = f"products.{layer}.symmetric_contractions.contractions"
    paths = []
    for j in range(len(contractions.module("contractions").children)):
        lower = [name for name in file.tensors if name.startswith(f"{prefix}.{j}.weights.")]
        names = [f"{prefix}.{j}.weights_max"]
        names += [f"{prefix}.{j}.weights.{i}" for i in range(len(lower))]
        paths.append(tuple(file.tensors[name].shape[1] for name in names))
    return ProductConfig(
        irreps_in=_text(contractions.get("irreps_in")),
        irreps_out=_text(contractions.get("irreps_out")),
        paths=tuple(paths),
    )


def _readout(readout: Node) -> ReadoutConfig:
    kind = READOUTS.get(readout.qualname)
    if kind is None:
        raise _unsupported(f"a readout of class {readout.qualname}", " or ".join(READOUTS))
    first = readout.module("linear" if kind == "linear" else "linear_1")
    hidden = _text(readout.get("hidden_irreps")) if kind == "nonlinear" else "0x0e"
    return ReadoutConfig(kind=kind, irreps_in=_text(first.get("irreps_in")), hidden_irreps=hidden)


def _check_radial(radial: Node) -> None:
    basis = radial.module("bessel_fn")
    if basis.name != "BesselBasis":
        raise _unsupported(f"the radial basis {basis.qualname}", "BesselBasis")
    if radial.has("distance_transform"):
        kind = radial.module("distance_transform").name
        raise _unsupported(f"the distance transform {kind}", "plain distances")
    if not radial.get("apply_cutoff", True):
        raise _unsupported("apply_cutoff=False", "a cutoff inside the radial basis")


def _check_paths(block: Node, config: InteractionConfig, edge_irreps: str) -> None:
    """The file's tensor product must be the one that the model builds, path by path."""
    paths = tensor_product_paths(config.node_feats_irreps, edge_irreps, config.target_irreps)
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


def _activations(block: Node) -> list[Node]:
    layers = block.module("conv_tp_weights").children
    return [layer.module("act") for layer in layers.values() if layer.has("act")]


def _silu(activation: Node) -> float:
    function = activation.get("f")
    if not isinstance(function, Reference | Node) or function.qualname not in SILU:
        raise _unsupported(f"the activation {function}", "silu")
    constant = 1.0 if activation.get("_is_id") else float(activation.get("cst"))
    if not math.isfinite(constant):
        raise ModelFileError(f"the constant of silu is {constant}; expected a finite number.")
    return constant


def _agreed(values: set[float], what: str) -> float:
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
