"""What a recipe does to each leaf, as a table."""

from __future__ import annotations

import jax

from jaxft import tree
from jaxft.strategies import base
from jaxft.strategies.base import Recipe
from jaxft.typing import Params


def describe(recipe: Recipe, params: Params) -> str:
    """A line per leaf (path, shape, what happens to it, trained numbers), then totals.

    Raises:
      ValueError: whatever :func:`jaxft.finetune` would refuse before its first step.
    """
    rows = rows_of(recipe, params)
    total = tree.size(params)
    trained = sum(row[3] for row in rows)
    table = [("leaf", "shape", "state", "trained"), *((*row[:3], f"{row[3]:,}") for row in rows)]
    widths = [max(len(str(row[i])) for row in table) for i in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]!s:<{widths[1]}}  {row[2]:<{widths[2]}}  "
        f"{row[3]:>{widths[3]}}"
        for row in table
    ]
    percent = 100 * trained / total
    lines.append(
        f"trainable params: {trained:,} || all params: {total:,} || trainable%: {percent:.2f}"
    )
    return "\n".join(lines)


def rows_of(recipe: Recipe, params: Params) -> list[tuple[str, tuple[int, ...], str, int]]:
    """(path, shape, state, trained numbers) per leaf; a state names the strategies involved."""
    base.check(recipe, params)
    trained = tree.flatten(base.trains(recipe, params))
    coords, _ = jax.eval_shape(lambda: base.init(recipe, jax.random.key(0), params))
    rows = []
    for path, leaf in tree.flatten(params).items():
        count = leaf.size if trained[path] else 0
        states = ["trained"] if trained[path] else []
        for name, owned in coords.items():
            own = {k: v for k, v in tree.flatten(owned).items() if k.startswith(f"{path}/")}
            if own:
                states.append(name)
                count += sum(v.size for v in own.values())
        rows.append((path, tuple(leaf.shape), " + ".join(states) or "frozen", count))
    return rows
