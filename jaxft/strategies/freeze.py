"""Freezing: some leaves stay as they are."""

from __future__ import annotations

import jax

from jaxft import tree
from jaxft.strategies.base import Strategy
from jaxft.tree import Patterns
from jaxft.typing import Mask, Params

GROUPS: dict[str, tuple[str, ...]] = {
    "embedding": ("node_embedding/**",),
    "interactions": ("interactions_*/**",),
    "products": ("products_*/**",),
    "readouts": ("readouts_*/**",),
    "radial": ("interactions_*/conv_tp_weights/**",),
    "skips": ("interactions_*/skip_tp/*",),
    "contractions": ("products_*/symmetric_contractions/**",),
}
"""Patterns of the parts that every model has; see also :func:`groups`."""

LEVELS: dict[int, tuple[str, ...]] = {
    **dict.fromkeys((1, 2, 3, 4), ("embedding",)),
    5: ("embedding", "interactions"),
    6: ("embedding", "interactions", "products"),
    7: ("embedding", "interactions", "products", "readouts"),
}
"""The groups that torch MACE's ``--freeze N`` freezes."""


def freeze(
    where: Patterns | None = None,
    *,
    except_: Patterns | None = None,
    level: int | None = None,
    name: str = "freeze",
) -> Strategy:
    """Keep the leaves that match ``where``, or all but those that match ``except_``.

    Frozen leaves take no part in gradients, optimiser state, weight decay or clipping norm.

    ``level`` is torch MACE's ``--freeze N``, by name, so that it means the same with and without a
    ZBL repulsion (in mace-freeze, where N counts modules, ZBL shifts it by one):

    ===== ==================================== ==================================
    level frozen                               trained
    ===== ==================================== ==================================
    1–4   ``GROUPS["embedding"]``              interactions, products, readouts
    5     and ``GROUPS["interactions"]``       products, readouts
    6     and ``GROUPS["products"]``           readouts
    7     and ``GROUPS["readouts"]``           nothing, which is an error
    ===== ==================================== ==================================

    As in torch, no level freezes the joint embedding of charges or spins, nor its readout.
    ``GROUPS`` names more parts, and :func:`groups` those of one model in forward order.

    Args:
      where: patterns of the leaves to freeze.
      except_: patterns of the leaves to train; all others are frozen.
      level: 1 to 7.
      name: of the strategy.

    Returns:
      A strategy that only sets a mask.

    Raises:
      ValueError: not exactly one of the three is given, or a level that does not exist; or, when
        the recipe is set up, a pattern matches nothing or no leaf is left to train.

    Example:
      >>> recipe = (freeze(except_="readouts_*/**"),)
      >>> recipe = (freeze(GROUPS["interactions"]),)
      >>> print(jaxft.describe((freeze(level=6),), params).splitlines()[-1])
      trainable params: 24 || all params: 21,292 || trainable%: 0.11

    Reference: Radova et al., npj Comput. Mater. (2025), arXiv:2502.15582; ``get_params_options`` in
    ``mace/tools/scripts_utils.py`` of mace-torch 0.3.16.
    """
    given = {"where": where, "except_": except_, "level": level}
    names = [word for word, value in given.items() if value is not None]
    if not names:
        raise ValueError(
            "freeze() was given neither of `where` and `except_`; "
            "give the leaves to freeze or the leaves to train, or a `level`."
        )
    if len(names) > 1:
        what = " and ".join(f"`{word}`" for word in names)
        raise ValueError(
            f"freeze() was given {'both' if len(names) == 2 else 'all'} of {what}; "
            "give the leaves to freeze or the leaves to train or a level, only one of them."
        )
    if level is not None and level not in LEVELS:
        raise ValueError(
            f"freeze(level={level}) is none of torch MACE's levels {min(LEVELS)} to {max(LEVELS)};"
            "\nfor anything else give patterns as `where` or `except_`, for nothing leave it out."
        )

    def trains(params: Params) -> Mask:
        if except_ is not None:
            return tree.mask(params, except_)
        kept = where if level is None else [p for word in LEVELS[level] for p in GROUPS[word]]
        return jax.tree.map(lambda frozen: not frozen, tree.mask(params, kept or ()))

    cites = ("radova2025frozen", *(("batatia2022mace",) if level is not None else ()))
    return Strategy(name=name, trains=trains, cites=cites)


def groups(params: Params) -> dict[str, tuple[str, ...]]:
    """Patterns of the parts of a model, layer by layer in forward order; each leaf is in one.

    These are Equitrain's groups, whose numbers 0 to 5 are the positions in a model of two layers,
    with a joint embedding and its readout as groups of their own where a model has them.

    Example:
      >>> list(groups(params))
      ['node_embedding', 'interactions_0', 'products_0', 'interactions_1', 'products_1', 'readouts']
    """
    names = [name for name in params if not name.startswith("readouts_")]
    found = {name: (f"{name}/**",) for name in sorted(names, key=_forward)}
    return found | {"readouts": GROUPS["readouts"]}


def _forward(name: str) -> tuple[int, str]:
    """Embeddings, then interaction and product of each layer, then the rest."""
    kind, _, number = name.rpartition("_")
    if number.isdigit():
        return 1 + int(number), kind
    return (0, "") if name == "node_embedding" else (0, name)
