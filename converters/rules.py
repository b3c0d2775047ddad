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
from jaxft.models.config import MACEConfig
from jaxft.models.contraction import weight_names
from jaxft.models.irreps import multiplicities, tensor_product_paths
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
            leaves[block.path] = np.ascontiguousarray(piece.transpose(block.axes))
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
    s = config.num_elements
    rules = []
    first = _only(config.interactions[0].node_feats_irreps)
    rules.append(_rule("node_embedding.linear.weight", "node_embedding/linear/0e", (s, first)))
    for i, (block, product) in enumerate(zip(config.interactions, config.products, strict=True)):
        torch, leaf = f"interactions.{i}", f"interactions_{i}"
        nodes = multiplicities(block.node_feats_irreps)
        target = multiplicities(block.target_irreps)
        hidden = multiplicities(block.hidden_irreps)
        paths = tensor_product_paths(
            block.node_feats_irreps, config.edge_irreps, block.target_irreps
        )
        slots = {name: sum(nodes[p.node] for p in paths if p.out == name) for name in target}
        rules.append(_linear(f"{torch}.linear_up", f"{leaf}/linear_up", nodes, nodes))
        widths = (config.num_bessel, *block.radial_mlp, sum(nodes[p.node] for p in paths))
        for j, shape in enumerate(itertools.pairwise(widths)):
            name = f"conv_tp_weights.layer{j}.weight"
            rules.append(_rule(f"{torch}.{name}", f"{leaf}/conv_tp_weights/layer{j}", shape))
        rules.append(_linear(f"{torch}.linear", f"{leaf}/linear", slots, target))
        skips = [
            Block(f"{leaf}/skip_tp/{name}", (mul, s, hidden[name]), (1, 0, 2))
            for name, mul in nodes.items()
            if name in hidden
        ]
        rules.append(Rule(f"{torch}.skip_tp.weight", tuple(skips)))
        rules += _product_rules(i, product.irreps_out, product.paths, s)
    for i, readout in enumerate(config.readouts):
        inputs = multiplicities(readout.irreps_in)
        torch, leaf = f"readouts.{i}", f"readouts_{i}"
        heads = {"0e": len(config.heads)}
        if readout.kind == "linear":
            rules.append(_linear(f"{torch}.linear", f"{leaf}/linear", inputs, heads))
        else:
            hidden = multiplicities(readout.hidden_irreps)
            rules.append(_linear(f"{torch}.linear_1", f"{leaf}/linear_1", inputs, hidden))
            rules.append(_linear(f"{torch}.linear_2", f"{leaf}/linear_2", hidden, heads))
    return rules


def _product_rules(
    layer: int, irreps_out: str, paths: tuple[tuple[int, ...], ...], num_elements: int
) -> list[Rule]:
    out = multiplicities(irreps_out)
    rules = []
    for j, (name, mul) in enumerate(out.items()):
        torch = f"products.{layer}.symmetric_contractions.contractions.{j}"
        leaf = f"products_{layer}/symmetric_contractions/{name}"
        for weights, k in zip(weight_names(len(paths[j])), paths[j], strict=True):
            torch_name = weights if weights == "weights_max" else weights.replace("_", ".")
            shape = (num_elements, k, mul)
            rules.append(_rule(f"{torch}.{torch_name}", f"{leaf}/{weights}", shape))
    rules.append(_linear(f"products.{layer}.linear", f"products_{layer}/linear", out, out))
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


def _only(irreps: str) -> int:
    (mul,) = multiplicities(irreps).values()
    return mul
