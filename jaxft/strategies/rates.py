"""Learning rates per group: soft freezing and gradual unfreezing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft import tree
from jaxft.strategies.base import Strategy
from jaxft.typing import Array, Consts, Coords, Mask, Params

Factor = float | Callable[[Array], Array] | Mapping[str, float]
"""A number, a function of the update's count, or ``{"from": n, "factor": f}``."""


class RatesState(NamedTuple):
    """What the next update needs."""

    count: Array
    """[] int32, updates made."""


def rates(factors: Mapping[str, Factor], *, name: str = "rates") -> Strategy:
    """Multiply the updates of the leaves that match a pattern.

    The factor acts after the optimiser, so it scales the learning rate, and decoupled decay with
    it; scaling gradients would have no effect under Adam. It also acts on coordinates that other
    strategies own for such a leaf, ``<leaf>/A`` of a ``lora`` for one. Coordinates of a whole
    module, such as a threshold of ``sparse``, follow the leaves of that module, which must then
    agree. Leaves that no pattern matches have factor 1.

    A factor of 0 keeps a leaf's value; unlike with ``freeze``, its gradient is computed and counts
    in the clipping norm.

    Args:
      factors: ``{pattern: factor}``. A factor is a number >= 0; a function of the number of updates
        made, such as an optax schedule; or ``{"from": n, "factor": f}``, 0 for the first n updates
        and f from then on. Staggered ``from`` unfreeze gradually.
      name: of the strategy.

    Returns:
      A strategy that trains everything and owns no coordinates.

    Raises:
      ValueError: a factor is none of these; or, when the recipe is set up, a pattern matches
        nothing, two match the same leaf, or leaves of one module with a coordinate disagree.

    Example:
      >>> recipe = (rates({"interactions_*/**": 0.1, "products_*/**": {"from": 500, "factor": 1}}),)

    Reference: ``--soft_freeze_factor`` of mace-freeze, Radova et al., npj Comput. Mater. (2025),
    arXiv:2502.15582.
    """
    if not factors:
        raise ValueError("rates() was given no factors; use {pattern: factor}.")
    functions = {pattern: _function(pattern, factor) for pattern, factor in factors.items()}

    def trains(params: Params) -> Mask:
        _patterns_by_leaf(params, functions, name)
        return tree.constant_mask(params, True)

    def init(key: Array, params: Params) -> tuple[Coords, Consts]:
        _patterns_by_leaf(params, functions, name)
        return {}, {}

    def start(trainable: Any) -> RatesState:
        _chosen(trainable, functions, name)
        return RatesState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: RatesState, params: Any = None) -> tuple[Any, RatesState]:
        now = {pattern: function(state.count) for pattern, function in functions.items()}
        chosen = _chosen(updates, functions, name)

        def scaled(keys: Any, leaf: Array) -> Array:
            pattern = chosen[_path(keys)]
            return leaf if pattern is None else leaf * jnp.asarray(now[pattern], leaf.dtype)

        return jax.tree_util.tree_map_with_path(scaled, updates), RatesState(state.count + 1)

    return Strategy(
        name=name,
        trains=trains,
        init=init,
        tx=optax.GradientTransformation(start, update),
        cites=("radova2025frozen",),
    )


def _function(pattern: str, factor: Factor) -> Callable[[Array], Any]:
    if not isinstance(pattern, str):
        raise ValueError(f"rates() was given the pattern {pattern!r}; use a string.")
    if callable(factor):
        shape = jax.eval_shape(factor, jax.ShapeDtypeStruct((), jnp.int32)).shape
        if shape != ():
            raise ValueError(
                f"the factor of {pattern!r} is a function with values of shape {shape};\n"
                "use one from the number of updates to a number."
            )
        return factor
    first: Any = 0
    value: Any = factor
    if isinstance(factor, Mapping):
        if set(factor) != {"from", "factor"}:
            raise ValueError(
                f"the factor of {pattern!r} has the keys {', '.join(map(str, sorted(factor)))};\n"
                'use {"from": updates, "factor": number}.'
            )
        first, value = factor["from"], factor["factor"]
    if not (_is_number(first) and first == int(first)):
        raise ValueError(
            f"the factor of {pattern!r} starts from {first!r}; use a number of updates, >= 0."
        )
    if not _is_number(value):
        raise ValueError(
            f"the factor of {pattern!r} is {value!r}; use a finite number >= 0, a function of the "
            'number of updates, or {"from": updates, "factor": number}.'
        )
    return lambda count: jnp.where(count >= first, value, 0.0)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and 0 <= value < math.inf


def _patterns_by_leaf(params: Params, patterns: Any, name: str) -> dict[str, str]:
    """``{leaf path: its pattern}``; leaves that no pattern matches are absent."""
    found: dict[str, str] = {}
    for pattern in patterns:
        for path in tree.select(params, pattern):
            if path in found:
                raise ValueError(
                    f"{name!r} has two factors for {path!r}: of {found[path]!r} and of "
                    f"{pattern!r};\nuse patterns that share no leaf."
                )
            found[path] = pattern
    return found


def _chosen(trainable: Any, patterns: Any, name: str) -> dict[str, str | None]:
    """``{path of a trainable leaf: its pattern}``; paths as :func:`_path` says them."""
    by_leaf = _patterns_by_leaf(trainable.params, patterns, name)
    leaves = list(tree.flatten(trainable.params))  # frozen ones included, as holes
    found: dict[str, str | None] = {}
    for keys, _ in jax.tree_util.tree_flatten_with_path(trainable)[0]:
        path = _path(keys)
        kind, _, own = path.partition("/")
        if kind == "params":
            found[path] = by_leaf.get(own)
            continue
        own = own.partition("/")[2]  # without the strategy's name
        owners = [leaf for leaf in leaves if f"{own}/".startswith(f"{leaf}/")]
        module = own.rpartition("/")[0]
        owners = owners or [leaf for leaf in leaves if module and leaf.startswith(f"{module}/")]
        choices = {by_leaf.get(leaf) for leaf in owners} or {None}
        if len(choices) > 1:
            raise ValueError(
                f"{name!r} has several factors for leaves of {module!r}, which own {path!r} "
                f"together: {', '.join(sorted(str(choice) for choice in choices))};\n"
                "use patterns that match all leaves of the module, or none."
            )
        (found[path],) = choices
    return found


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
