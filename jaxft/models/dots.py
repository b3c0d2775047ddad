"""Products of many small matrices with long rows, never transposing the long rows.

Three products of the same three kinds of arrays, per row r of a batch::

    mix:    short [k, m], long [k, c] -> wide [m, c]      sum over k
    spread: short [k, m], wide [m, c] -> long [k, c]      sum over m
    match:  long [k, c], wide [m, c] -> short [k, m]      sum over c

Each is linear in both arguments, and the derivatives of one are the other two. They are primitives
of their own for one reason: the transposes of ``jnp.einsum`` choose orders of operands in which
XLA copies ``long`` into another layout before every product, on CPUs at the price of the product
itself. Here ``short`` and ``wide``, which are smaller, are what is copied.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxft.graph import take
from jaxft.typing import Array


def mix(short: Array, long: Array) -> Array:
    """[R, k, m], [R, k, c] -> [R, m, c]."""
    return _bind(_MIX, short, long)


def spread(short: Array, wide: Array) -> Array:
    """[R, k, m], [R, m, c] -> [R, k, c]."""
    return _bind(_SPREAD, short, wide)


def match(long: Array, wide: Array) -> Array:
    """[R, k, c], [R, m, c] -> [R, k, m]."""
    return _bind(_MATCH, long, wide)


def apply(matrix: Array, x: Array) -> Array:
    """``x @ matrix`` for many rows: [..., a], [a, b] -> [..., b].

    As one ``spread``: the gradient of the matrix transposes x, which is there, and not the
    cotangent, which is not, and whose making XLA would fuse into a transposing copy.
    """
    rows = spread(x.reshape(1, -1, x.shape[-1]), matrix[None])
    return rows.reshape(*x.shape[:-1], matrix.shape[-1])


def times(x: Array, matrix: Array) -> Array:
    """``x @ matrix``: [..., a], [a, b] -> [..., b], as one operation."""
    a, b = _promoted(x, matrix)
    return jax.lax.dot_general(a, b, (((x.ndim - 1,), (0,)), ((), ())))


def add_up(x: Array) -> Array:
    """Sum over a short axis: [a, r, c] -> [a, c].

    One fused loop over the last axis, as a reduction XLA takes ten times as long on CPUs; and one
    operation, whose transpose is a broadcast and not a sum of padded slices.
    """
    return _ADD_UP.bind(x)


def _promoted(a: Array, b: Array) -> tuple[Array, Array]:
    if a.dtype == b.dtype:
        return a, b
    dtype = jnp.result_type(a, b)
    return a.astype(dtype), b.astype(dtype)


def _bind(primitive: Primitive, a: Array, b: Array) -> Array:
    return primitive.bind(*_promoted(a, b), precision=_precision())


def _precision() -> str | None:
    """Of the surrounding ``jax.default_matmul_precision``: derivatives are taken outside of it."""
    return jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]


def _primitive(name: str, formula: str) -> Primitive:
    arguments, _, result = formula.partition("->")
    first, _, second = arguments.partition(",")

    def plain(a: Array, b: Array, precision: str | None) -> Array:
        return jnp.einsum(formula, a, b, precision=precision)

    def shape(a: Array, b: Array, precision: str | None) -> jax.core.ShapedArray:
        sizes = dict(zip(first, a.shape, strict=True))
        agrees = all(sizes.setdefault(k, n) == n for k, n in zip(second, b.shape, strict=True))
        if not agrees or a.dtype != b.dtype:
            raise TypeError(f"{name} of {a.dtype}{a.shape} and {b.dtype}{b.shape}; use {formula}.")
        return jax.core.ShapedArray(tuple(sizes[k] for k in result), a.dtype)

    def batch(
        args: tuple[Array, Array], dims: tuple[int | None, int | None], precision: str | None
    ) -> tuple[Array, int]:
        return jax.vmap(functools.partial(plain, precision=precision), in_axes=dims)(*args), 0

    primitive = Primitive(name)
    primitive.def_impl(jax.jit(plain, static_argnames="precision"))
    primitive.def_abstract_eval(shape)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    return primitive


_MIX = _primitive("mix", "rkm,rkc->rmc")
_SPREAD = _primitive("spread", "rkm,rmc->rkc")
_MATCH = _primitive("match", "rkc,rmc->rkm")

ad.defbilinear(
    _MIX,
    lambda ct, _, long, precision: _MATCH.bind(long, ct, precision=precision),
    lambda ct, short, _, precision: _SPREAD.bind(short, ct, precision=precision),
)
ad.defbilinear(
    _SPREAD,
    lambda ct, _, wide, precision: _MATCH.bind(ct, wide, precision=precision),
    lambda ct, short, _, precision: _MIX.bind(short, ct, precision=precision),
)
ad.defbilinear(
    _MATCH,
    lambda ct, _, wide, precision: _SPREAD.bind(ct, wide, precision=precision),
    lambda ct, long, _, precision: _MIX.bind(ct, long, precision=precision),
)


def _sum_of_slices(x: Array) -> Array:
    return functools.reduce(jax.lax.add, (x[:, r] for r in range(x.shape[1])))


_ADD_UP = Primitive("add_up")
_ADD_UP.def_impl(jax.jit(_sum_of_slices))
_ADD_UP.def_abstract_eval(lambda x: jax.core.ShapedArray((x.shape[0], x.shape[2]), x.dtype))
ad.deflinear2(_ADD_UP, lambda ct, x: [jax.lax.broadcast_in_dim(ct, x.aval.shape, (0, 2))])
batching.primitive_batchers[_ADD_UP] = lambda args, dims: (
    jax.vmap(_sum_of_slices, in_axes=dims)(*args),
    0,
)
mlir.register_lowering(_ADD_UP, mlir.lower_fun(_sum_of_slices, multiple_results=False))


@jax.custom_jvp
def pick(selector: Array, x: Array) -> Array:
    """``selector @ x`` for one-hot rows [T, n] and x [n, c] -> [T, c], by copying rows.

    Its derivative is the product, since the transpose of copying is a scatter.
    """
    return take(x, jax.lax.argmax(selector, selector.ndim - 1, jnp.int32))


@pick.defjvp
def _pick_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    selector, x = primals
    return pick(selector, x), mix(selector.T[None], tangents[1][None])[0]
