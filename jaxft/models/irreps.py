"""Irrep bookkeeping shared by the blocks: features by irrep, paths of the tensor product."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxft.models.e3nn import e3nn
from jaxft.typing import Array

Features = dict[str, Array]
"""One array ``[..., 2l+1, mul]`` per irrep, keyed by its name (``"1o"``); channels last."""


def multiplicities(irreps: str) -> dict[str, int]:
    """``{"0e": 128, "1o": 128}``, in the order of ``irreps``.

    Raises:
      ValueError: an irrep occurs twice.
    """
    found: dict[str, int] = {}
    for mul, ir in e3nn.Irreps(irreps):
        if str(ir) in found:
            raise ValueError(f"irreps {irreps!r} hold {ir} twice; expected each irrep once.")
        found[str(ir)] = mul
    return found


class Path(NamedTuple):
    """One tensor-product path ``node × edge → out`` and its coupling coefficients."""

    node: str
    edge: str
    out: str
    coupling: np.ndarray
    """[2 l_node + 1, 2 l_edge + 1, 2 l_out + 1] float64, times sqrt(2 l_out + 1)."""


def tensor_product_paths(node_irreps: str, edge_irreps: str, target_irreps: str) -> list[Path]:
    """Paths of mace-torch's ``conv_tp``, in the order of its radial weights.

    Each allowed product of a node and an edge irrep that occurs in the target is one path; paths
    are sorted by output irrep, ties keep the order of discovery (e3nn's stable sort).
    """
    target = set(multiplicities(target_irreps))
    found: list[tuple[e3nn.Irrep, Path]] = []
    for _, node in e3nn.Irreps(node_irreps):
        for _, edge in e3nn.Irreps(edge_irreps):
            for out in node * edge:
                if str(out) in target:
                    path = Path(str(node), str(edge), str(out), _coupling(node, edge, out))
                    found.append((out, path))
    found.sort(key=lambda item: (item[0].l, item[0].p))  # e3nn 0.4: 0o before 0e, 1o before 1e
    return [path for _, path in found]


OPPOSITE = frozenset(
    {(1, 2, 2), (1, 3, 3), (1, 4, 4), (2, 1, 2), (2, 2, 1), (3, 1, 3), (3, 3, 1), (4, 1, 4)}
    | {(4, 4, 1)}
)
"""Degrees whose coupling has the other sign in e3nn-jax than in e3nn 0.4.4, which MACE needs;
the rest of l <= 4 agrees. Only products with an odd sum of degrees can differ."""


def _coupling(node: e3nn.Irrep, edge: e3nn.Irrep, out: e3nn.Irrep) -> np.ndarray:
    degrees = (node.l, edge.l, out.l)
    if sum(degrees) % 2 and max(degrees) > 4:
        raise ValueError(
            f"the product {node} x {edge} -> {out} is not supported: the sign of its coupling is "
            "known for degrees up to 4."
        )
    cg = np.asarray(e3nn.clebsch_gordan(*degrees), dtype=np.float64)
    sign = -1.0 if degrees in OPPOSITE else 1.0
    return sign * cg / np.linalg.norm(cg) * np.sqrt(2 * out.l + 1)


def concatenate(features: Features, irreps: str) -> Array:
    """``[..., lm, mul]``: the blocks of ``irreps`` one after the other; absent ones are zeros."""
    some = next(iter(features.values()))
    blocks = []
    for mul, ir in e3nn.Irreps(irreps):
        shape = (*some.shape[:-2], ir.dim, mul)
        blocks.append(features.get(str(ir), jnp.zeros_like(some, shape=shape)))
    return jnp.concatenate(blocks, axis=-2)
