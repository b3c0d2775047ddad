"""The table torch name ↔ leaf path: which piece of which tensor is which leaf.

A torch tensor is a sequence of row-major blocks; a block is one leaf, its axes permuted. No
number is scaled: path normalisations belong to the forward pass, so both directions are exact.
Every tensor of the file is used once and every leaf is filled, or the conversion fails with both
lists of names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from converters.reader import ModelFileError
from jaxft.models.config import InteractionConfig, MACEConfig, ProductConfig, ReadoutConfig
from jaxft.models.contraction import weight_names
from jaxft.models.irreps import Path, multiplicities, tensor_product_paths
from jaxft.tree import name_diff


@dataclass(frozen=True)
class Block:
    """A leaf inside a torch tensor."""

    path: str
    shape: tuple[int, ...]
    """In torch's order."""
    axes: tuple[int, ...]
    """Permutation from torch's order to the leaf's."""


@dataclass(frozen=True)
class Rule:
    """A torch tensor and the leaves that it holds, in memory order."""

    name: str
    blocks: tuple[Block, ...]

    def to_leaves(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        flat = np.ascontiguousarray(tensor).reshape(-1)
        expected = sum(prod(block.shape) for block in self.blocks)
        if flat.size != expected:
            raise ModelFileError(
                f"{self.name!r} has shape {tensor.shape}, {flat.size} numbers; this architecture "
                f"expects {expected} ({', '.join(f'{b.path} {b.shape}' for b in self.blocks)}).\n"
                "The file disagrees with itself; please report how it was written."
            )
        leaves, start = {}, 0
        for block in self.blocks:
            piece = flat[start : start + prod(block.shape)].reshape(block.shape)
            leaves[block.path] = np.asarray(piece.transpose(block.axes), order="C")
            start += prod(block.shape)
        return leaves

    def to_tensor(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """Inverse of :meth:`to_leaves`, flat; the caller knows torch's shape."""
        pieces = [
            np.asarray(leaves[block.path]).transpose(np.argsort(block.axes)).reshape(-1)
            for block in self.blocks
        ]
        return np.concatenate(pieces)


def parameter_rules(config: MACEConfig) -> list[Rule]:
    """All trainable tensors of the architecture."""
    first = multiplicities(config.interactions[0].node_feats_irreps)
    rules = [_table("node_embedding.linear", "node_embedding/linear", config, first["0e"])]
    rules += _embedding_rules(config, first)
    for i, (block, product) in enumerate(zip(config.interactions, config.products, strict=True)):
        torch, leaf = f"interactions.{i}", f"interactions_{i}"
        make = _nonlinear_rules if block.is_nonlinear else _interaction_rules
        rules += make(torch, leaf, config, block)
        rules += _product_rules(i, product, config.num_elements)
    for i, readout in enumerate(config.readouts):
        rules += _readout_rules(f"readouts.{i}", f"readouts_{i}", readout, len(config.heads))
    return rules


def _embedding_rules(config: MACEConfig, scalars: Mapping[str, int]) -> list[Rule]:
    if not config.embeddings:
        return []
    rules = []
    for spec in config.embeddings:
        torch = f"joint_embedding.embedders.{spec.name}"
        leaf = f"joint_embedding/embedders_{spec.name}"
        if spec.num_classes is not None:
            shape = (spec.num_classes, spec.emb_dim)
            rules.append(_rule(f"{torch}.weight", f"{leaf}/weight", shape))
        else:
            for j, n_in in ((0, spec.in_dim), (2, spec.emb_dim)):
                rules += _affine(
                    f"{torch}.{j}", f"{leaf}/net_{j}", n_in, spec.emb_dim, spec.use_bias
                )
    total = sum(spec.emb_dim for spec in config.embeddings)
    block = Block("joint_embedding/project", (scalars["0e"], total), (1, 0))
    rules.append(Rule("joint_embedding.project.0.weight", (block,)))
    if config.embedding_readout:
        heads = {"0e": len(config.heads)}
        rules.append(
            _linear("embedding_readout.linear", "embedding_readout/linear", scalars, heads)
        )
    return rules


def _interaction_rules(
    torch: str, leaf: str, config: MACEConfig, block: InteractionConfig
) -> list[Rule]:
    nodes, sent = multiplicities(block.node_feats_irreps), multiplicities(block.sent_irreps)
    target, slots = multiplicities(block.target_irreps), _slots(config, block)
    rules = [_linear(f"{torch}.linear_up", f"{leaf}/linear_up", nodes, sent)]
    widths = (config.num_bessel, *block.radial_mlp, _num_weights(config, block))
    for j, shape in enumerate(itertools.pairwise(widths)):
        name = f"conv_tp_weights.layer{j}.weight"
        rules.append(_rule(f"{torch}.{name}", f"{leaf}/conv_tp_weights/layer{j}", shape))
    if block.has_density:
        name = "density_fn.layer0.weight"
        rules.append(_rule(f"{torch}.{name}", f"{leaf}/density_fn/layer0", (config.num_bessel, 1)))
    rules.append(_linear(f"{torch}.linear", f"{leaf}/linear", slots, target))
    inputs, outputs = target, target
    if block.is_residual:
        inputs, outputs = nodes, multiplicities(block.hidden_irreps)
    skips = [
        Block(f"{leaf}/skip_tp/{name}", (mul, config.num_elements, outputs[name]), (1, 0, 2))
        for name, mul in inputs.items()
        if name in outputs
    ]
    return [*rules, Rule(f"{torch}.skip_tp.weight", tuple(skips))]


def _nonlinear_rules(
    torch: str, leaf: str, config: MACEConfig, block: InteractionConfig
) -> list[Rule]:
    nodes, sent = multiplicities(block.node_feats_irreps), multiplicities(block.sent_irreps)
    hidden, target = multiplicities(block.hidden_irreps), multiplicities(block.target_irreps)
    gated = multiplicities(block.gated_irreps)
    rules = [
        _table(f"{torch}.{end}_embedding", f"{leaf}/{end}_embedding", config, nodes["0e"])
        for end in ("source", "target")
    ]
    n_in = config.num_bessel + 2 * nodes["0e"]
    networks = {
        "conv_tp_weights": (*block.radial_mlp, _num_weights(config, block)),
        "density_fn": (*block.density_mlp, 1),
    }
    for name, widths in networks.items():
        for j, (fan_in, width) in enumerate(itertools.pairwise((n_in, *widths))):
            paths = f"{torch}.{name}.net.{3 * j}", f"{leaf}/{name}/net_{3 * j}"
            rules += _affine(*paths, fan_in, width)
            if j < len(widths) - 1:  # LayerNorm
                for kind in ("weight", "bias"):
                    paths = f"{torch}.{name}.net.{3 * j + 1}", f"{leaf}/{name}/net_{3 * j + 1}"
                    rules.append(_rule(f"{paths[0]}.{kind}", f"{paths[1]}/{kind}", (width,)))
    maps = {
        "linear_up": (nodes, sent),
        "linear_res": (sent, gated),
        "linear_1": (_slots(config, block), gated),
        "linear_2": (target, target),
        "skip_tp": (nodes, hidden),
    }
    rules += [_linear(f"{torch}.{name}", f"{leaf}/{name}", *ends) for name, ends in maps.items()]
    rules += [_rule(f"{torch}.{name}", f"{leaf}/{name}", ()) for name in ("alpha", "beta")]
    return rules


def _paths(config: MACEConfig, block: InteractionConfig) -> list[Path]:
    return tensor_product_paths(block.sent_irreps, config.edge_irreps, block.target_irreps)


def _num_weights(config: MACEConfig, block: InteractionConfig) -> int:
    sent = multiplicities(block.sent_irreps)
    return sum(sent[path.node] for path in _paths(config, block))


def _slots(config: MACEConfig, block: InteractionConfig) -> dict[str, int]:
    """Channels of each irrep after the tensor product, all paths side by side."""
    sent = multiplicities(block.sent_irreps)
    slots: dict[str, int] = {}
    for path in _paths(config, block):
        slots[path.out] = slots.get(path.out, 0) + sent[path.node]
    return slots


def _product_rules(layer: int, product: ProductConfig, num_elements: int) -> list[Rule]:
    out = multiplicities(product.irreps_out)
    rules = []
    for j, (name, mul) in enumerate(out.items()):
        torch = f"products.{layer}.symmetric_contractions.contractions.{j}"
        leaf = f"products_{layer}/symmetric_contractions/{name}"
        for weights, k in zip(weight_names(product.correlation), product.paths[j], strict=True):
            torch_name = weights if weights == "weights_max" else weights.replace("_", ".")
            shape = (1 if product.is_agnostic else num_elements, k, mul)
            rules.append(_rule(f"{torch}.{torch_name}", f"{leaf}/{weights}", shape))
    rules.append(_linear(f"products.{layer}.linear", f"products_{layer}/linear", out, out))
    return rules


def _readout_rules(torch: str, leaf: str, readout: ReadoutConfig, num_heads: int) -> list[Rule]:
    inputs, heads = multiplicities(readout.irreps_in), {"0e": num_heads}
    if readout.kind == "linear":
        return [_linear(f"{torch}.linear", f"{leaf}/linear", inputs, heads)]
    hidden = multiplicities(readout.hidden_irreps)
    rules = [_linear(f"{torch}.linear_1", f"{leaf}/linear_1", inputs, hidden)]
    has_bias = readout.kind == "bias"
    if has_bias:
        rules.append(_linear(f"{torch}.linear_mid", f"{leaf}/linear_mid", hidden, hidden))
        size = (hidden["0e"],)
        rules.append(_rule(f"{torch}.linear_mid.bias", f"{leaf}/linear_mid/bias", size))
    rules.append(_linear(f"{torch}.linear_2", f"{leaf}/linear_2", hidden, heads))
    if has_bias:
        rules.append(_rule(f"{torch}.linear_2.bias", f"{leaf}/linear_2/bias", (num_heads,)))
    return rules


def buffer_path(config: MACEConfig, name: str) -> str:
    """The path of a buffer: its torch name, contractions called by their irrep."""
    match = re.fullmatch(
        r"products\.(\d+)\.symmetric_contractions\.contractions\.(\d+)\.(.+)", name
    )
    if match:
        layer, j, rest = int(match[1]), int(match[2]), match[3]
        irrep = list(multiplicities(config.products[layer].irreps_out))[j]
        return f"products_{layer}/symmetric_contractions/{irrep}/{rest}"
    return re.sub(r"^(interactions|products|readouts)\.(\d+)\.", r"\1_\2/", name).replace(".", "/")


def check_coverage(given: Iterable[str], expected: Iterable[str]) -> None:
    """Raises ModelFileError with a diff unless both hold the same tensors."""
    diff = name_diff(given, expected)
    if diff:
        raise ModelFileError(
            "the file's tensors are not those of its architecture "
            f"(- expected but missing, + present but unknown):\n{diff}\n"
            "Please report how this model was made."
        )


def _rule(torch: str, path: str, shape: tuple[int, ...]) -> Rule:
    return Rule(torch, (Block(path, shape, tuple(range(len(shape)))),))


def _linear(torch: str, path: str, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> Rule:
    blocks = [
        Block(f"{path}/{name}", (mul, outputs[name]), (0, 1))
        for name, mul in inputs.items()
        if name in outputs
    ]
    return Rule(f"{torch}.weight", tuple(blocks))


def _affine(torch: str, path: str, n_in: int, n_out: int, has_bias: bool = True) -> list[Rule]:
    """torch's ``Linear``: [out, in], and [out]."""
    rules = [Rule(f"{torch}.weight", (Block(f"{path}/weight", (n_out, n_in), (1, 0)),))]
    if has_bias:
        rules.append(_rule(f"{torch}.bias", f"{path}/bias", (n_out,)))
    return rules


def _table(torch: str, path: str, config: MACEConfig, mul: int) -> Rule:
    return _rule(f"{torch}.weight", f"{path}/0e", (config.num_elements, mul))
