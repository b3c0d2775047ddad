"""Irrep bookkeeping shared by the blocks: features by irrep, paths of the tensor product."""

from __future__ import annotations

from typing import NamedTuple

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np

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
    # e3nn orders 0o before 0e, 1e before 1o: by l, then by -p * (-1)^l; natural parity sorts by l.
    found.sort(key=lambda item: (item[0].l, item[0].p * (-1) ** item[0].l))
    return [path for _, path in found]


def _coupling(node: e3nn.Irrep, edge: e3nn.Irrep, out: e3nn.Irrep) -> np.ndarray:
    cg = np.asarray(e3nn.clebsch_gordan(node.l, edge.l, out.l), dtype=np.float64)
    return cg / np.linalg.norm(cg) * np.sqrt(2 * out.l + 1)


def concatenate(features: Features, irreps: str) -> Array:
    """``[..., lm, mul]``: the blocks of ``irreps`` one after the other."""
    return jnp.concatenate([features[name] for name in multiplicities(irreps)], axis=-2)
