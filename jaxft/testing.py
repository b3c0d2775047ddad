"""The laws that every strategy and recipe obeys, as functions that raise AssertionError.

Run :func:`assert_lawful` on a strategy of your own before you publish a number that it made::

    predictor = jax.jit(functools.partial(jaxft.predict, model))
    assert_lawful((my_strategy,), predictor, params, batch)

and :func:`assert_trains_lawfully` with the pair that :func:`jaxft.finetune` returns. The laws that
compare numbers want float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import tree
from jaxft.graph import Batch, Graph
from jaxft.potential import Prediction
from jaxft.strategies import base
from jaxft.strategies.base import Recipe
from jaxft.typing import Array, Coords, Params

Predictor = Callable[[Params, Graph], Prediction]

ROUNDING = 1e-9
"""Relative to the largest number compared; float64 sums of a few thousand terms stay below it."""


def assert_lawful(
    recipe: Recipe, predictor: Predictor, params: Params, batch: Batch, *, seed: int = 0
) -> None:
    """All laws that need no training step.

    Args:
      recipe: strategies.
      predictor: ``(params, graph) -> Prediction``, best jitted by the caller, once.
      params: of the model, float64.
      batch: real and padding atoms.
      seed: of the random coordinates and rotations.
    """
    key = jax.random.key(seed)
    assert_equivariant(recipe, predictor, params, batch.graph, key=key)
    assert_lawful_trees(recipe, params, batch, key=key)


def assert_lawful_trees(recipe: Recipe, params: Params, batch: Any, *, key: Array) -> None:
    """All laws that need neither a training step nor a potential; ``params`` may be any tree."""
    assert_identity_at_init(recipe, params, key=key)
    assert_keeps_structure(recipe, params, key=key)
    assert_order_free(recipe, params, batch, key=key)
    assert_penalty_anchored(recipe, params, batch, key=key)
    assert_projection_idempotent(recipe, params, key=key)
    assert_own_keys(recipe, params, key=key)
    assert_jit_agrees(recipe, params, batch, key=key)


def assert_trains_lawfully(
    finetuned: tuple[Callable, Callable],
    merge: Callable[[Recipe, Any], Params],
    recipe: Recipe,
    params: Params,
    batch: Any,
    *,
    steps: int = 3,
    seed: int = 0,
) -> None:
    """The laws of training, for the ``(init, step)`` of :func:`jaxft.finetune`.

    Args:
      finetuned: ``(init, step)``; an optimiser with weight decay makes the sharpest test.
      merge: :func:`jaxft.merge`.
      recipe: strategies.
      params: to start from.
      batch: what ``step`` takes.
      steps: to make.
      seed: of the initial coordinates.
    """
    init, step = finetuned
    state = init(jax.random.key(seed), params)
    assert_frozen_is_absent(recipe, params, state)
    start = [np.array(leaf) for leaf in jax.tree.leaves(state.trainable)]
    for _ in range(steps):
        state, info = step(state, batch)
        assert bool(info["is_finite"]), f"a step of {_names(recipe)} is not finite: {info}"
    end = jax.tree.leaves(state.trainable)
    still = all(_is_same(a, b) for a, b in zip(start, end, strict=True))
    assert not still, f"{steps} steps of {_names(recipe)} moved nothing"
    assert_frozen_is_unchanged(recipe, params, state)
    assert_merged(recipe, params, state, merge(recipe, state))


def assert_identity_at_init(recipe: Recipe, params: Params, *, key: Array) -> None:
    """Law 1: the effective parameters at init are the given ones, bit for bit.

    A strategy that says that it is no identity at init is left out; it must then differ.
    """
    for strategy in recipe:
        if not strategy.is_identity_at_init:
            moved = base.apply((strategy,), params, *base.init((strategy,), key, params))
            same = all(map(_is_same, jax.tree.leaves(moved), jax.tree.leaves(params)))
            assert not same, f"{strategy.name!r} is the identity at init, but says that it is not"
    recipe = tuple(strategy for strategy in recipe if strategy.is_identity_at_init)
    coords, consts = base.init(recipe, key, params)
    _assert_same(
        base.apply(recipe, params, coords, consts), params, f"{_names(recipe)} at init changes"
    )


def assert_keeps_structure(recipe: Recipe, params: Params, *, key: Array) -> None:
    """Law 2: same names, shapes and dtypes, whatever the coordinates; masks are trees of bools."""
    coords, consts = random_coords(recipe, params, key=key)
    effective = tree.flatten(base.apply(recipe, params, coords, consts))
    given = tree.flatten(params)
    diff = tree.name_diff(effective, given)
    assert not diff, f"{_names(recipe)} changes the structure (- lost, + new):\n{diff}"
    for path, leaf in effective.items():
        before, after = _kind(given[path]), _kind(leaf)
        assert before == after, f"{_names(recipe)} turns {path!r} from {before} into {after}"
    mask = tree.flatten(base.trains(recipe, params))
    diff = tree.name_diff(mask, given)
    assert not diff, f"the mask of {_names(recipe)} has other leaves (- lost, + new):\n{diff}"
    for path, value in mask.items():
        assert isinstance(value, bool), f"the mask of {_names(recipe)} at {path!r} is {value!r}"


def assert_equivariant(
    recipe: Recipe, predictor: Predictor, params: Params, graph: Graph, *, key: Array
) -> None:
    """Law 3: with random coordinates, energies are invariant under rotation and inversion, forces
    and stresses turn along."""
    effective = base.apply(recipe, params, *random_coords(recipe, params, key=key))
    plain = predictor(effective, graph)
    for name, rotation in _rotations(key):
        turned = predictor(effective, graph._replace(vectors=graph.vectors @ rotation.T))
        expected = {
            "energies": plain.node_energy,
            "forces": plain.forces @ rotation.T,
            "stresses": rotation @ plain.stress @ rotation.T,
        }
        found = (turned.node_energy, turned.forces, turned.stress)
        for (what, wanted), given in zip(expected.items(), found, strict=True):
            error, scale = _distance(given, wanted)
            assert error <= ROUNDING * scale, (
                f"{_names(recipe)}: {what} are not equivariant under {name}: "
                f"off by {error:.1e}, the largest is {scale:.1e}"
            )


def assert_frozen_is_absent(recipe: Recipe, params: Params, state: Any) -> None:
    """Law 4, before a step: what the mask leaves out is no part of the differentiated tree or of
    the optimiser state; what it keeps is no part of the frozen one."""
    mask = tree.flatten(base.trains(recipe, params))
    trainable, frozen = tree.flatten(state.trainable.params), tree.flatten(state.frozen.params)
    tracked = {
        path
        for keys, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
        for path in mask
        if _ends_with(keys, path)
    }
    for path, trains in mask.items():
        where = f"{_names(recipe)}: {path!r}, {'trained' if trains else 'frozen'},"
        assert (trainable[path] is not None) == trains, f"{where} in the differentiated tree?"
        assert (frozen[path] is None) == trains, f"{where} in the frozen tree?"
        assert trains or path not in tracked, f"{where} has an optimiser state"


def assert_frozen_is_unchanged(recipe: Recipe, params: Params, state: Any) -> None:
    """Law 4, after some steps: base leaves outside the mask are as they were, bit for bit."""
    mask = tree.flatten(base.trains(recipe, params))
    now = tree.flatten(tree.combine(state.trainable.params, state.frozen.params))
    given = tree.flatten(params)
    leaked = [path for path in given if not (mask[path] or _is_same(now[path], given[path]))]
    assert not leaked, f"{_names(recipe)} moved frozen leaves: {', '.join(leaked)}"


def assert_order_free(recipe: Recipe, params: Params, batch: Any, *, key: Array) -> None:
    """Law 5: masks, initial coordinates and penalties do not depend on the order of the recipe."""

    def view(members: Recipe) -> dict[str, Any]:
        coords, consts = base.init(members, key, params)
        near = _perturbed(params, key)
        return {
            "masks": base.trains(members, params),
            "coordinates": coords,
            "penalties": base.penalties(members, near, consts, batch),
        }

    wanted = view(tuple(recipe))
    for members in itertools.islice(itertools.permutations(recipe), 1, 6):
        for what, found in view(members).items():
            _assert_same(found, wanted[what], f"{what} of {_names(members)} depend on the order:")


def assert_penalty_anchored(recipe: Recipe, params: Params, batch: Any, *, key: Array) -> None:
    """Law 6: penalties are never negative, and 0 with zero gradient where they are anchored."""
    _, consts = base.init(recipe, key, params)

    def penalties(params: Params) -> dict[str, Array]:
        return base.penalties(recipe, params, consts, batch)

    for name, value in penalties(params).items():
        assert float(value) == 0.0, f"penalty of {name!r} is {value} at its anchor, not 0"
        gradient = jax.grad(lambda near, name=name: penalties(near)[name])(params)
        for path, leaf in tree.flatten(gradient).items():
            assert not np.any(leaf), f"penalty of {name!r} pulls {path!r} at its anchor"
    for n in range(4):
        for name, value in penalties(_perturbed(params, jax.random.fold_in(key, n))).items():
            assert float(value) >= 0.0, f"penalty of {name!r} is {value}, negative"


def assert_projection_idempotent(recipe: Recipe, params: Params, *, key: Array) -> None:
    """Law 7: projecting twice is projecting once, and keeps names, shapes and dtypes."""
    coords, consts = random_coords(recipe, params, key=key)
    once = base.project(recipe, coords, consts)
    given, kept = jax.tree.map(_kind, coords), jax.tree.map(_kind, once)
    assert given == kept, f"project of {_names(recipe)} turns {given} into {kept}"
    twice = base.project(recipe, once, consts)
    _assert_same(twice, once, f"project of {_names(recipe)} applied twice changes")


def assert_own_keys(recipe: Recipe, params: Params, *, key: Array) -> None:
    """Law 8: a strategy draws the same coordinates alone and in company."""
    together, _ = base.init(recipe, key, params)
    for strategy in recipe:
        alone, _ = base.init((strategy,), key, params)
        _assert_same(
            together[strategy.name],
            alone[strategy.name],
            f"{strategy.name!r} draws other coordinates in {_names(recipe)} than alone:",
        )


def assert_jit_agrees(recipe: Recipe, params: Params, batch: Any, *, key: Array) -> None:
    """Law 9: apply, penalty and project give the same jitted and not."""
    coords, consts = random_coords(recipe, params, key=key)

    def view(params: Params, coords: Coords, consts: Any) -> tuple[Any, Any, Any]:
        return (
            base.apply(recipe, params, coords, consts),
            base.penalties(recipe, _perturbed(params, key), consts, batch),
            base.project(recipe, coords, consts),
        )

    plain, jitted = view(params, coords, consts), jax.jit(view)(params, coords, consts)
    for what, a, b in zip(("apply", "penalty", "project"), plain, jitted, strict=True):
        assert str(jax.tree.structure(a)) == str(jax.tree.structure(b)), f"{what} depends on jit"
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            error, scale = _distance(x, y)
            assert error <= ROUNDING * scale, (
                f"{what} of {_names(recipe)} depends on jit: off by {error:.1e} of {scale:.1e}"
            )


def assert_merged(recipe: Recipe, params: Params, state: Any, merged: Params) -> None:
    """Law 10: ``merged`` is an ordinary tree with the structure of ``params``, holds the effective
    parameters bit for bit, and owns its buffers, so that the state can be donated.

    What it predicts is then what the effective parameters predict. The torch leg (merge, export,
    convert) is a matter of the converters.
    """
    diff = tree.name_diff(tree.flatten(merged), tree.flatten(params))
    assert not diff, f"merging {_names(recipe)} changes the structure (- lost, + new):\n{diff}"
    whole = tree.combine(state.trainable.params, state.frozen.params)
    effective = base.apply(recipe, whole, state.trainable.coords, state.frozen.consts)
    _assert_same(merged, effective, f"merging {_names(recipe)} does not give the effective")
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    for path, leaf in tree.flatten(merged).items():
        own = leaf.unsafe_buffer_pointer() not in held
        assert own, f"merged {path!r} shares its buffer with the training state"


def random_coords(recipe: Recipe, params: Params, *, key: Array) -> tuple[Any, Any]:
    """Coordinates as after a long training, ``normal`` everywhere, with the recipe's constants."""
    coords, consts = base.init(recipe, key, params)
    leaves, structure = jax.tree.flatten(coords)
    drawn = [
        jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn), consts


@jax.jit
def _perturbed(params: Params, key: Array) -> Params:
    flat = tree.flatten(params)
    return tree.unflatten(
        {
            path: leaf + 0.1 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
            for i, (path, leaf) in enumerate(flat.items())
        }
    )


def _rotations(key: Array) -> list[tuple[str, Array]]:
    rotation, _ = jnp.linalg.qr(jax.random.normal(key, (3, 3)))
    rotation = rotation * jnp.linalg.det(rotation)
    return [("a rotation", rotation), ("inversion", -jnp.eye(3))]


def _names(recipe: Recipe) -> str:
    return f"({', '.join(strategy.name for strategy in recipe)})"


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _ends_with(keys: tuple[Any, ...], path: str) -> bool:
    """A base leaf's entry; a strategy may call its coordinates like the leaf that they change."""
    if any(getattr(key, "name", None) == "coords" for key in keys):
        return False
    names = path.split("/")
    return [getattr(key, "key", None) for key in keys[-len(names) :]] == names


def _is_same(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _assert_same(found: Any, wanted: Any, what: str) -> None:
    """Equal trees, bit for bit; ``what`` begins the message."""
    found, wanted = _leaves(found), _leaves(wanted)
    diff = tree.name_diff(found, wanted)
    assert not diff, f"{what} the structure (- lost, + new):\n{diff}"
    other = [path for path in wanted if not _is_same(found[path], wanted[path])]
    assert not other, f"{what} {', '.join(map(repr, other))}"


def _leaves(node: Mapping[str, Any]) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in jax.tree_util.tree_flatten_with_path(node)[0]
    }


def _distance(a: Any, b: Any) -> tuple[float, float]:
    """Largest difference and largest size; NaN counts as infinitely far."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = float(np.abs(a - b).max(initial=0.0))
    return (error if np.isfinite(error) else np.inf), float(np.abs(b).max(initial=0.0))
