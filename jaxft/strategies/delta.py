"""Delta: a trained update of full size beside frozen weights, so that decay pulls it to zero."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import tree
from jaxft.strategies.base import Strategy
from jaxft.tree import Patterns
from jaxft.typing import Array, Consts, Coords, Mask, Params


def delta(
    where: Patterns = "**", *, support: Params | None = None, name: str = "delta"
) -> Strategy:
    r"""Train :math:`W + \delta` with W frozen and δ, of full size, starting at zero.

    Alone it is full fine-tuning in other coordinates. What it adds is that a *decoupled* decay of
    the optimiser on ``coords/delta/**`` pulls towards the pretrained W instead of towards 0:

    .. math:: \delta \leftarrow (1 - \eta w)\,\delta - \eta\, u

    with u the optimiser's direction. Adam's |u| is about 1 at most, so |δ| stays below 1/w,
    whatever the gradient and the learning rate η. Under plain SGD the decay is exactly
    ``l2sp(w)``; under Adam a penalty would be rescaled, and the two differ. Published: AdamW,
    η = 0.01, w = 10.

    Args:
      where: patterns of the leaves to train through a δ; all other leaves are frozen.
      support: zeros and ones (or bools) shaped like the parameters; only numbers at a one move.
        With the result of :func:`support_of` this refits what a sparse training chose to change.
        A leaf without a one is frozen and has no δ.
      name: of the strategy.

    Returns:
      A strategy that trains ``<leaf>/delta`` and no base leaf.

    Raises:
      ValueError: when the recipe is set up: a pattern matches nothing, the support has other
        leaves, shapes or numbers than 0 and 1, or it allows nothing to move.

    Example:
      >>> recipe = (delta("products_*/**"),)

    Reference: Grandel, Benner and George, arXiv:2604.01017 (Equitrain, whose paper calls it
    LoRA-based; it is not low rank); the pull is that of Li et al., arXiv:1802.01483.
    """

    # Adding -0.0 changes no bit of any number; adding 0.0 would turn a -0.0 of the base into 0.0.
    def targets(params: Params) -> dict[str, Array]:
        flat = tree.flatten(params)
        chosen = {path: flat[path] for path in tree.select(params, where)}
        if support is None:
            return chosen
        _check_support(support, params, name)
        allowed = {path for path, ones in tree.flatten(support).items() if np.any(ones)}
        if not allowed & set(chosen):
            raise ValueError(
                f"the support of {name!r} is zero in all {len(chosen)} leaves of `where`, so "
                "nothing would move;\ngive one with ones, such as support_of(base, tuned)."
            )
        return {path: leaf for path, leaf in chosen.items() if path in allowed}

    def trains(params: Params) -> Mask:
        targets(params)
        return tree.constant_mask(params, False)

    def init(key: Array, params: Params) -> tuple[Coords, Consts]:
        chosen = targets(params)
        coords = {f"{path}/delta": -jnp.zeros_like(leaf) for path, leaf in chosen.items()}
        if support is None:
            return tree.unflatten(coords), {}
        ones = tree.flatten(support)
        consts = {f"{path}/delta": jnp.asarray(ones[path], bool) for path in chosen}
        return tree.unflatten(coords), tree.unflatten(consts)

    def apply(params: Params, coords: Coords, consts: Consts) -> Params:
        flat = dict(tree.flatten(params))
        kept = coords if support is None else project(coords, consts)
        for key, value in tree.flatten(kept).items():
            path = key.removesuffix("/delta")
            flat[path] = flat[path] + value
        return tree.unflatten(flat)

    def project(coords: Coords, consts: Consts) -> Coords:
        return jax.tree.map(lambda value, ones: jnp.where(ones, value, -0.0), coords, consts)

    plain = Strategy(
        name=name,
        trains=trains,
        init=init,
        apply=apply,
        cites=("grandel2026equitrain", "li2018l2sp"),
    )
    return plain if support is None else replace(plain, project=project)


def support_of(base: Params, tuned: Params) -> Params:
    """A tree of bools: which numbers of ``tuned`` differ from those of ``base``.

    Args:
      base: parameters before training.
      tuned: after, merged.

    Raises:
      ValueError: the two have other leaves or shapes.

    Example:
      >>> tuned = {**params, "readouts_0": jax.tree.map(lambda x: 2 * x, params["readouts_0"])}
      >>> support = support_of(params, tuned)
      >>> recipe = (delta(support=support),)  # trains readouts_0 alone
    """
    _check_alike(
        base, tuned, "the tuned parameters are not of the same model as the base (- base, + tuned)"
    )
    return jax.tree.map(lambda start, end: np.asarray(start) != np.asarray(end), base, tuned)


def _check_support(support: Params, params: Params, name: str) -> None:
    _check_alike(
        params, support, f"the support of {name!r} is of another model (- model, + support)"
    )
    for path, leaf in tree.flatten(support).items():
        if not np.isin(leaf, (0, 1)).all():
            raise ValueError(
                f"the support of {name!r} holds other numbers than 0 and 1 in {path!r};\n"
                "1 lets a number move, 0 keeps it: see support_of(base, tuned)."
            )


def _check_alike(expected: Params, given: Params, what: str) -> None:
    kinds = [
        [f"{path} {np.shape(leaf)}" for path, leaf in tree.flatten(params).items()]
        for params in (given, expected)
    ]
    if diff := tree.name_diff(*kinds):
        raise ValueError(f"{what}:\n{diff}\nGive a tree with the same names and shapes.")
