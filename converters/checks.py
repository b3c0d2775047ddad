"""Whether a file agrees with itself, and is of a size that a MACE can have.

A file of a few kilobytes can name one module a thousand times or declare a width of 2⁶⁰, so sizes
are checked before anything is built from them. No limit is near what is trained today.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from converters.reader import ModelFile, ModelFileError, Node, irreps
from jaxft.models.config import InteractionConfig, MACEConfig
from jaxft.models.irreps import tensor_product_paths

MAX_DEGREE = 11  # of e3nn's spherical harmonics
MAX_MULTIPLICITY = 1 << 20
MAX_TERMS = 2 * (MAX_DEGREE + 1)  # each irrep once
MAX_LAYERS = 32
MAX_HEADS = 1000
MAX_NAME = 200  # characters of a head
MAX_EMBEDDINGS = 100
MAX_CORRELATION = 8
MAX_INSTRUCTIONS = 10_000  # of one product; one of degrees 4 and 11 has a few hundred
MAX_CHECKED = 50_000  # instructions and irreps of all modules; published two-layer ones have 150
MAX_EFFORT = 300_000_000  # products of numbers that couplings may take, 5 ns each
MAX_SHARING = 4  # bytes of tensors per byte of storage

LINEAR = "e3nn.o3._linear.Linear"
PRODUCT = "e3nn.o3._tensor_product._tensor_product.TensorProduct"
FULL_PRODUCT = "e3nn.o3._tensor_product._sub.FullyConnectedTensorProduct"


def unsupported(found: str, expected: str) -> ModelFileError:
    return ModelFileError(
        f"this model has {found}; this version of jaxft converts {expected}.\n"
        "Please say on the issue tracker which model you need."
    )


def at_most(limit: int, values: Sized, what: str) -> None:
    """Raises unless ``values`` are few enough."""
    if len(values) > limit:
        raise ModelFileError(
            f"the file has {len(values)} {what}; no MACE has more than {limit}.\n"
            "It is damaged, or please report how it was made."
        )


def number(value: Any, what: str) -> float:
    """A hyper-parameter: a number of Python, or a tensor with one element."""
    if isinstance(value, np.ndarray) and value.size == 1:
        return float(value.reshape(()))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelFileError(
            f"{what} is of the type {type(value).__name__}; expected a number.\n"
            "The file is damaged, or please report how it was made."
        )
    return float(value)


def irreps_text(value: Any) -> str:
    """Irreps of features, where each occurs once, as the config has them."""
    terms = irreps(value)
    at_most(MAX_TERMS, terms, "irreps in one list")
    if any(mul > MAX_MULTIPLICITY or degree > MAX_DEGREE for mul, degree, _ in terms):
        raise unsupported(
            "irreps of too high a degree or multiplicity",
            f"degrees up to {MAX_DEGREE}, multiplicities up to {MAX_MULTIPLICITY}",
        )
    return "+".join(f"{mul}x{_name(degree, parity)}" for mul, degree, parity in terms)


def _name(degree: int, parity: int) -> str:
    return f"{degree}{'e' if parity == 1 else 'o'}"


def check_finite(file: ModelFile) -> None:
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


def check_sharing(file: ModelFile) -> None:
    """Tensors may share memory, but their copies must not outgrow the file by far."""
    spans = sorted(np.lib.array_utils.byte_bounds(t) for t in file.tensors.values() if t.size)
    stored = end = 0
    for low, high in spans:
        stored += max(0, high - max(low, end))
        end = max(end, high)
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    if total > MAX_SHARING * stored + (1 << 20):
        raise ModelFileError(
            f"its tensors have {total} bytes but share {stored} bytes of memory; no MACE does.\n"
            "Please report how this model was made."
        )


def check_heads(config: MACEConfig, file: ModelFile, name: str, width: int) -> None:
    """A tensor with ``width`` numbers per head, if the file has it, must fit the heads."""
    count = len(config.heads)
    if name in file.tensors and file.tensors[name].size != count * width:
        raise ModelFileError(
            f"{name} has shape {file.tensors[name].shape}, but the model has {count} heads "
            f"({', '.join(config.heads):.200}); the file disagrees with itself."
        )


def check_couplings(config: MACEConfig, file: ModelFile) -> None:
    """The constants of the symmetric contractions must have the shapes that they are used in."""
    for i, product in enumerate(config.products):
        size = sum(2 * degree + 1 for _, degree, _ in irreps(product.irreps_in))
        for j, (_, degree, _) in enumerate(irreps(product.irreps_out)):
            outer = (2 * degree + 1,) if degree else ()
            for nu, paths in zip(range(product.correlation, 0, -1), product.paths[j], strict=True):
                name = f"products.{i}.symmetric_contractions.contractions.{j}.U_matrix_{nu}"
                expected = (*outer, *[size] * nu, paths)
                found = file.tensors[name].shape
                if found != expected:
                    raise ModelFileError(
                        f"{name} has shape {found}; expected {expected}.\n"
                        "The file disagrees with itself; please report how it was written."
                    )


def check_effort(interactions: Sequence[InteractionConfig], edge_irreps: str) -> None:
    """Raises where the couplings of the tensor products would take more than a second or two."""

    def dims(text: str) -> list[int]:
        return [2 * degree + 1 for _, degree, _ in irreps(text)]

    effort = 0
    for block in interactions:
        ends = dims(block.sent_irreps), dims(edge_irreps), dims(block.target_irreps)
        effort += sum(
            (a * b * c) ** 2 for a, b, c in itertools.product(*ends) if abs(a - b) < c < a + b
        )
    if effort > MAX_EFFORT:
        raise unsupported("tensor products of too many irreps of too high degrees", "lower ones")


def check_harmonics(harmonics: Node) -> None:
    chosen = harmonics.get("normalize"), harmonics.get("normalization")
    if chosen != (True, "component"):
        raise unsupported(
            f"spherical harmonics with (normalize, normalization) = {chosen}", "(True, 'component')"
        )


def check_paths(block: Node, config: InteractionConfig, edge_irreps: str) -> None:
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
        for item in _instructions(product)
    ]
    if given != expected:
        raise ModelFileError(
            f"the tensor product of {block.qualname} has the paths {given}; expected {expected}.\n"
            "Please report how this model was made."
        )


def check_normalisation(root: Node) -> None:
    """Every path weight must be the one that the forward pass applies."""
    pending, checked = [("model", root)], 0
    while pending:
        path, node = pending.pop()
        if node.qualname in (LINEAR, PRODUCT, FULL_PRODUCT):
            checked += _check_path_weights(node, path)
        if checked > MAX_CHECKED:
            raise ModelFileError(
                f"its modules have more than {MAX_CHECKED} instructions; that is no MACE model"
            )
        pending += [(f"{path}.{name}", child) for name, child in node.children.items()]


def _check_path_weights(node: Node, path: str) -> int:
    """1/sqrt(fan-in) per output, times sqrt(2l + 1) in tensor products; how many were looked at."""
    outs = irreps(node.get("irreps_out"))
    muls = [mul for mul, _, _ in irreps(node.get(_KEYS[node.qualname][0]))]
    second = irreps(node.get("irreps_in2")) if node.qualname == FULL_PRODUCT else ()
    fan_in = dict.fromkeys(range(len(outs)), 0)
    instructions = _instructions(node)
    entries = []
    for item in instructions:
        i_in = item.get(_KEYS[node.qualname][1])
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
    return len(instructions) + len(outs) + len(muls) + len(second)


_KEYS = {
    LINEAR: ("irreps_in", "i_in"),
    PRODUCT: ("irreps_in1", "i_in1"),
    FULL_PRODUCT: ("irreps_in1", "i_in1"),
}


def _instructions(product: Node) -> list[Node]:
    found: list[Node] = product.get("instructions")
    at_most(MAX_INSTRUCTIONS, found, "instructions of one product")
    return found
