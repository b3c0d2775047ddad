"""Messages and symmetric contraction by NVIDIA's cuEquivariance: one fused kernel for each.

Both are polynomials with sparse coefficients: the same coupling tensors as everywhere in jaxft, so
that nothing depends on the library's own conventions. Rows of ``C`` channels are its segments, and
our arrays ``[…, 2l + 1, C]`` are its buffers as they are. Gathering from senders and summing onto
receivers happen inside the kernel, which has derivatives of any order.

Reference: NVIDIA cuEquivariance 0.13, ``cuequivariance_jax.segmented_polynomial``, method
``uniform_1d``, after Geiger et al., https://docs.nvidia.com/cuda/cuequivariance.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import compilation
from jaxft.graph import Graph
from jaxft.models.config import MACEConfig
from jaxft.models.contraction import Coupling
from jaxft.models.irreps import Features, Path, multiplicities
from jaxft.models.precision import PARITY, Precision
from jaxft.typing import Array

INSTALL = "pip install 'jaxft[cuda,cueq]' (NVIDIA, Linux, Python >= 3.12)"

NO_CACHE = "programs of cueq hold handles of their process"
"""Why compiled programs must not be kept on disk: another process would follow stale handles."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class Polynomial:
    """A ``cuequivariance.SegmentedPolynomial``; compiled programs depend on it as on a shape."""

    value: Any


class Contraction(NamedTuple):
    """The couplings of all output irreps of a product block, as one polynomial."""

    projections: Mapping[str, Array]
    """{output irrep: [rank, native paths]}."""
    polynomial: Polynomial
    """Of weights [S, Σ rank · C] and features [N, lm · C]."""


@dataclass(frozen=True)
class Cueq:
    """The backend; see :class:`jaxft.models.backend.Backend` for what its methods are."""

    method: str = "uniform_1d"
    """Of ``segmented_polynomial``. Tests on other platforms use ``naive``, which is slow."""
    precision: Precision = PARITY
    name = "cueq"

    def check(self, config: MACEConfig) -> None:
        """Raises ValueError if the kernels cannot have a model's irreps."""
        for i, block in enumerate(config.interactions):
            _one_multiplicity(block.sent_irreps, f"interactions_{i} sends")
        for i, product in enumerate(config.products):
            _one_multiplicity(product.irreps_in, f"products_{i} contracts")

    def couple(self, couplings: Mapping[str, Coupling], channels: int, noise: float) -> Contraction:
        """Sparse couplings; coefficients below ``noise`` times the largest are dropped."""
        sparse = {name: sparsify(coupling, noise) for name, coupling in couplings.items()}
        terms = {name: (one.selectors, one.basis) for name, one in sparse.items()}
        projections = {name: one.projection for name, one in sparse.items()}
        return Contraction(projections, Polynomial(_contraction(terms, channels)))

    def convolve(
        self,
        features: Features,
        harmonics: Features,
        radial: tuple[Array, Array],
        paths: Sequence[Path],
        graph: Graph,
    ) -> Features:
        hidden, matrix = radial
        edges = graph.senders.size
        channels = next(iter(features.values())).shape[-1]
        slots = _slots(paths)
        polynomial = _messages(paths, channels, list(features), list(harmonics))
        weights = jnp.matmul(hidden, matrix, precision=self.precision.radial).reshape(edges, -1)
        nodes = jnp.concatenate([_flat(block) for block in features.values()], axis=1)
        angular = jnp.concatenate(
            [block.reshape(edges, -1) for block in harmonics.values()], axis=1
        )
        receivers = jnp.repeat(graph.receivers, graph.senders.shape[1])
        flat = self._evaluate(
            polynomial,
            [weights, nodes, angular],
            graph.n_node,
            [None, graph.senders.reshape(-1), None, receivers],
            "messages",
        )
        shapes = {out: (_dim(out), len(rows) * channels) for out, rows in slots.items()}
        return _divided(flat, shapes)

    def contract(
        self, x: Array, weights: Mapping[str, Array], one_hot: Array, couplings: Contraction
    ) -> Features:
        n, _, channels = x.shape
        reduced = [
            jnp.einsum("rk,skc->src", couplings.projections[name], native)
            for name, native in weights.items()
        ]
        species = jax.lax.argmax(one_hot, 1, jnp.int32)
        flat = self._evaluate(
            couplings.polynomial.value,
            [_flat(jnp.concatenate(reduced, axis=1)), _flat(x)],
            n,
            [species, None, None],
            "contraction",
        )
        return _divided(flat, {name: (_dim(name), channels) for name in weights})

    def _evaluate(
        self, polynomial: Any, inputs: list[Array], rows: int, indices: list[Any], name: str
    ) -> Array:
        """[rows, …], summed where an index of the output repeats."""
        cuex = importlib.import_module("cuequivariance_jax")
        out = jax.ShapeDtypeStruct((rows, polynomial.outputs[0].size), inputs[0].dtype)
        (found,) = cuex.segmented_polynomial(
            polynomial, inputs, [out], indices, method=self.method, name=name
        )
        return found


def require() -> None:
    """Raises ValueError, saying what to install, unless cueq can be used in this process."""
    for package in ("cuequivariance", "cuequivariance_jax"):
        _import(package)
    platform = _platform()
    if platform != "cuda":
        raise ValueError(
            f"backend: cueq needs an NVIDIA GPU, but JAX computes on {platform};\n"
            "use backend: xla here, or install jaxft[cuda] on a machine with one."
        )
    _import("cuequivariance_ops_jax")


def require_no_cache() -> None:
    """Raises ValueError if JAX would keep compiled programs on disk, or load them."""
    kept = compilation.cache()
    if kept.folder is not None:
        raise ValueError(
            f"backend: cueq cannot be used while compiled programs are {kept}: {NO_CACHE},\n"
            "which another process would follow. Call jaxft.compilation.disable_cache('cueq') "
            "before."
        )


def sparsify(coupling: Coupling, noise: float) -> Coupling:
    """The same coupling in a basis of as few terms as elimination finds.

    Rows of the basis are brought to reduced echelon form; the projection follows.

    Args:
      coupling: of one output irrep.
      noise: of the coefficients, relative to the largest; what is smaller is dropped.

    Raises:
      ValueError: the sparse basis does not reproduce the coupling.
    """
    components, rank, monomials = coupling.basis.shape
    rows = np.asarray(coupling.basis).transpose(1, 0, 2).reshape(rank, -1)
    exact = rows.T @ coupling.projection
    echelon, pivots = _echelon(rows, noise)
    echelon = echelon[: len(pivots)]
    projection = rows[:, pivots].T @ coupling.projection
    error = np.abs(echelon.T @ projection - exact).max(initial=0.0)
    if len(pivots) < rank or error > noise * max(rank, 1) * np.abs(exact).max(initial=1.0):
        raise ValueError(
            f"the coupling tensor has no clean sparse basis: {len(pivots)} of {rank} rows leave an "
            f"error of {error:.1e}; use backend: xla."
        )
    basis = echelon.reshape(rank, components, monomials).transpose(1, 0, 2)
    return Coupling(coupling.selectors, basis, projection)


def _echelon(rows: np.ndarray, noise: float) -> tuple[np.ndarray, list[int]]:
    """Reduced row echelon form of a matrix of full row rank, and its pivots."""
    rows = np.array(rows, np.float64)
    pivots: list[int] = []
    limit = noise * np.abs(rows).max(initial=0.0)
    for column in range(rows.shape[1]):
        done = len(pivots)
        if done == len(rows):
            break
        best = done + int(np.abs(rows[done:, column]).argmax())
        if abs(rows[best, column]) <= limit:
            continue
        rows[[done, best]] = rows[[best, done]]
        rows[done] /= rows[done, column]
        others = np.arange(len(rows)) != done
        rows[others] -= rows[others, column, None] * rows[done]
        pivots.append(column)
    rows[np.abs(rows) <= noise * np.abs(rows).max(initial=0.0)] = 0.0
    return rows, pivots


def _contraction(terms: Mapping[str, tuple[np.ndarray, np.ndarray]], channels: int) -> Any:
    """Σ basis · weight · x … x of every output irrep, by order.

    Args:
      terms: {output irrep: selectors [ν, T, lm + 1], basis [2L + 1, r, T]}.
      channels: C.
    """
    cue = importlib.import_module("cuequivariance")
    found: dict[int, list[tuple[tuple[int, ...], float]]] = {}
    weight = out = 0
    for selectors, basis in terms.values():
        lm = selectors.shape[-1] - 1
        factors = selectors.argmax(axis=-1).T
        for m, r, t in np.argwhere(basis).tolist():
            monomial = tuple(int(i) for i in factors[t] if i < lm)
            at = (weight + r, *monomial, out + m)
            found.setdefault(len(monomial), []).append((at, float(basis[m, r, t])))
        weight, out = weight + basis.shape[1], out + basis.shape[0]
    operations = []
    for order, paths in sorted(found.items()):
        product = _product(["u"] * (order + 2), [weight, *[lm] * order, out], channels, paths)
        operations.append((cue.Operation([0, *[1] * order, 2]), product))
    segments = [[(channels,)] * count for count in (weight, lm, out)]
    operands = [cue.SegmentedOperand(ndim=1, segments=one) for one in segments]
    return cue.SegmentedPolynomial(operands[:2], operands[2:], operations)


def _messages(paths: Sequence[Path], channels: int, nodes: list[str], edges: list[str]) -> Any:
    """Σ coupling · weight · sender · harmonic, outputs by (irrep, component, slot)."""
    cue = importlib.import_module("cuequivariance")
    node_at, edge_at = _starts(nodes), _starts(edges)
    slots = _slots(paths)
    sizes = [_dim(out) * len(rows) for out, rows in slots.items()]
    out_at = dict(zip(slots, itertools.accumulate([0, *sizes]), strict=False))
    found = []
    for number, path in enumerate(paths):
        rows = slots[path.out]
        for i, j, m in np.argwhere(np.abs(path.coupling) > 1e-12).tolist():
            out = out_at[path.out] + m * len(rows) + rows.index(number)
            at = (number, node_at[path.node] + i, edge_at[path.edge] + j, out)
            found.append((at, float(path.coupling[i, j, m])))
    counts = [len(paths), sum(map(_dim, nodes)), sum(map(_dim, edges)), sum(sizes)]
    product = _product(["u", "u", "", "u"], counts, channels, found)
    return cue.SegmentedPolynomial.eval_last_operand(product)


def _product(
    modes: list[str],
    counts: list[int],
    channels: int,
    paths: Sequence[tuple[tuple[int, ...], float]],
) -> Any:
    """A tensor product of ``counts`` segments per operand, each a row of channels or a number."""
    cue = importlib.import_module("cuequivariance")
    product = cue.SegmentedTensorProduct.from_subscripts(",".join(modes))
    for operand, (mode, count) in enumerate(zip(modes, counts, strict=True)):
        product.add_segments(operand, [(channels,) if mode else ()] * count)
    product.set_paths([cue.segmented_polynomials.Path(at, c) for at, c in paths])
    return product


def _slots(paths: Sequence[Path]) -> dict[str, list[int]]:
    """Numbers of the paths by output irrep, in path order."""
    found: dict[str, list[int]] = {}
    for number, path in enumerate(paths):
        found.setdefault(path.out, []).append(number)
    return found


def _starts(names: list[str]) -> dict[str, int]:
    """Where the components of each irrep begin."""
    return dict(zip(names, itertools.accumulate([0, *map(_dim, names)]), strict=False))


def _dim(irrep: str) -> int:
    """2l + 1."""
    return 2 * int(irrep[:-1]) + 1


def _flat(block: Array) -> Array:
    """[N, a, C] -> [N, a · C]."""
    return block.reshape(block.shape[0], -1)


def _divided(flat: Array, shapes: Mapping[str, tuple[int, int]]) -> Features:
    """[N, …] -> {irrep: [N, *shape]}."""
    stops = list(itertools.accumulate(a * b for a, b in shapes.values()))
    parts = jnp.split(flat, stops[:-1], axis=1)
    return {
        name: part.reshape(-1, *shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _one_multiplicity(irreps: str, what: str) -> None:
    if len(set(multiplicities(irreps).values())) > 1:
        raise ValueError(
            f"backend: cueq needs irreps of one multiplicity, but {what} {irreps};\n"
            "use backend: xla for this model."
        )


def _import(package: str) -> None:
    try:
        importlib.import_module(package)
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing
        raise ValueError(
            f"backend: cueq needs {package}, which cannot be imported ({error});\n"
            f"{INSTALL}, or use backend: xla."
        ) from error


def _platform() -> str:
    """cpu, tpu, cuda or rocm; JAX calls the last two gpu."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
