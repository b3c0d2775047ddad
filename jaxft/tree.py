"""Parameter trees: paths, patterns, partition and combine.

A leaf's path joins its names by ``/``: ``interactions_0/linear_up/1o``. A pattern is a two-token
glob (``*`` stays inside a name, ``**`` crosses names) or a callable ``(path, leaf) -> bool``.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax

from jaxft.typing import Mask, Params

Tree = TypeVar("Tree")
Pattern = str | Callable[[str, Any], bool]
Patterns = Pattern | Iterable[Pattern]


def flatten(params: Params) -> dict[str, Any]:
    """``{path: leaf}`` in the tree's own order."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        for name, child in node.items():
            path = f"{prefix}{name}"
            if isinstance(child, Mapping):
                walk(child, f"{path}/")
            else:
                flat[path] = child

    walk(params, "")
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of ``{path: leaf}``; inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    tokens = re.split(r"(\*\*|\*)", pattern)
    wild = {"**": ".*", "*": "[^/]*"}
    return re.compile("".join(wild.get(token) or re.escape(token) for token in tokens))


def _is_match(pattern: Pattern, path: str, leaf: Any) -> bool:
    if callable(pattern):
        return bool(pattern(path, leaf))
    return _regex(pattern).fullmatch(path) is not None


def select(params: Params, patterns: Patterns) -> list[str]:
    """Paths of the leaves that at least one pattern matches, in tree order.

    Raises:
      ValueError: a pattern matches no leaf; the message names the closest ones.
    """
    if isinstance(patterns, str) or callable(patterns):
        patterns = (patterns,)
    flat = flatten(params)
    chosen: set[str] = set()
    for pattern in patterns:
        hits = [path for path, leaf in flat.items() if _is_match(pattern, path, leaf)]
        if not hits:
            raise ValueError(_no_match(pattern, list(flat)))
        chosen.update(hits)
    return [path for path in flat if path in chosen]


def _no_match(pattern: Pattern, paths: list[str]) -> str:
    if callable(pattern):
        return f"{pattern!r} selects none of {len(paths)} parameter leaves."
    close = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
    return (
        f"pattern {pattern!r} matches none of {len(paths)} parameter leaves;\n"
        f"closest: {', '.join(repr(path) for path in close)}."
    )


def mask(params: Params, patterns: Patterns) -> Mask:
    """A tree of bools, True where a pattern matches; errors as :func:`select`."""
    chosen = set(select(params, patterns))
    return unflatten({path: path in chosen for path in flatten(params)})


def constant_mask(params: Params, value: bool) -> Mask:
    """A tree of bools, all ``value``."""
    return jax.tree.map(lambda _: value, params)


def partition(params: Params, mask: Mask) -> tuple[Params, Params]:
    """Split into (where True, where False); the holes are ``None``, so both keep the structure."""
    where = jax.tree.map(lambda leaf, chosen: leaf if chosen else None, params, mask)
    rest = jax.tree.map(lambda leaf, chosen: None if chosen else leaf, params, mask)
    return where, rest


def combine(where: Params, rest: Params) -> Params:
    """Inverse of :func:`partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, where, rest, is_leaf=lambda leaf: leaf is None
    )


def copy(tree: Tree) -> Tree:
    """The same values in buffers of their own, safe to donate."""
    # not jnp.copy, which compiles a program for every shape
    return jax.device_put(tree, may_alias=False)


def interpolate(start: Params, end: Params, a: float) -> Params:
    """``start + a (end - start)``, leaf by leaf; 0 and 1 give the two trees bit for bit.

    Dtypes are those of ``start``; an amount outside [0, 1] extrapolates.
    """

    def leaf(x: Any, y: Any) -> Any:
        if a == 0:
            return x
        return y.astype(x.dtype) if a == 1 else (x + float(a) * (y - x)).astype(x.dtype)

    return jax.tree.map(leaf, start, end)


def size(params: Params) -> int:
    """How many numbers the tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def name_diff(given: Iterable[str], expected: Iterable[str]) -> str:
    """Sorted lines, ``-`` for expected but missing and ``+`` for given but unknown."""
    given, expected = set(given), set(expected)
    lines = [f"- {name}" for name in sorted(expected - given)]
    lines += [f"+ {name}" for name in sorted(given - expected)]
    return "\n".join(lines)
