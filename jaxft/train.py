"""The engine: a loss, a recipe and an optimiser become ``init`` and a jitted ``step``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxft import optimizer, parallel, tree
from jaxft.graph import Batch, totals_of, with_totals
from jaxft.strategies import base
from jaxft.strategies.base import Recipe
from jaxft.typing import Array, LossFn, Params


class Trainable(NamedTuple):
    """What the optimiser moves."""

    params: Params
    """Base leaves that train; ``None`` where a leaf is frozen."""
    coords: dict[str, Any]
    """Coordinates by strategy name."""


class Frozen(NamedTuple):
    """What it does not; an argument of the step, never differentiated, never compiled in."""

    params: Params
    """The complement of ``Trainable.params``."""
    consts: dict[str, Any]
    """Constants by strategy name."""


class TrainState(NamedTuple):
    """What the next step needs."""

    step: Array
    """[] int32, updates made."""
    trainable: Trainable
    frozen: Frozen
    opt_state: optax.OptState


InitFn = Callable[[Array, Params], TrainState]
StepFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]


def finetune(
    loss_fn: LossFn,
    recipe: Recipe,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    mesh: Mesh | None = None,
) -> tuple[InitFn, StepFn]:
    """Fine-tuning as a pair of functions, ``init(key, params)`` and ``step(state, batch)``.

    One step is::

        params    = effective(recipe, trainable, frozen)
        loss      = loss_fn(params, batch) + sum of penalties(params)
        trainable = project(recipe, apply_updates(trainable, tx.update(d loss / d trainable)))

    Only the trainable tree is differentiated, so frozen leaves cost nothing in the backward pass
    and own no optimiser state. A step whose loss or gradient is not finite changes nothing and
    says so in ``info["is_finite"]``.

    Args:
      loss_fn: ``(params, batch) -> scalar, {name: scalar}``.
      recipe: strategies; ``()`` is full fine-tuning.
      tx: the optimiser.
      accumulate: micro-batches per update, for updates that do not fit into memory. If more than 1,
        ``step`` takes that many batches stacked along a leading axis and sums their gradients: the
        gradient of one batch of all their frames, where they share their ``totals``
        (:func:`jaxft.data.with_shared_totals`).
      mesh: devices that share every update, :func:`jaxft.parallel.mesh`. ``step`` then takes a
        state that lies on all of them (:func:`jaxft.parallel.replicated`) and batches stacked along
        a leading axis, one for each (:func:`jaxft.parallel.spread`), outside that of
        ``accumulate``. It finds the common totals itself; the update is that of one batch of all
        their frames.

    Returns:
      ``init`` copies what it is given, the caller's arrays stay valid. ``step`` is jitted and
      donates the state: do not use a state after it was passed on. Its info holds the loss, the
      loss's own terms, ``penalty/<strategy>``, ``gradient_norm`` and ``is_finite``.

    Raises:
      ValueError: two strategies share a name; from ``init``: whatever a strategy refuses, a recipe
        that leaves nothing to train, or a schedule-free optimiser with a strategy that acts after
        the update.
    """
    recipe = tuple(recipe)
    base.check_names(recipe)
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} micro-batches are no update; use >= 1.")
    count = accumulate * (1 if mesh is None else mesh.size)
    means = [strategy.name for strategy in recipe if strategy.reads_batch]
    if count > 1 and means:
        raise ValueError(
            f"{', '.join(map(repr, means))} takes a mean over each batch, which accumulate="
            f"{accumulate} on {count // accumulate} devices cannot add up to that of one large "
            "batch;\nuse accumulate=1 on one device."
        )
    chain = optax.chain(tx, *(strategy.tx for strategy in recipe))

    def init(key: Array, params: Params) -> TrainState:
        params = tree.copy(params)
        base.check(recipe, params)
        coords, consts = base.init(recipe, key, params)
        moving, fixed = tree.partition(params, base.trains(recipe, params))
        trainable = Trainable(moving, tree.copy(coords))
        opt_state = jax.jit(chain.init)(trainable)  # one program; eagerly it is one per shape
        _check_averages(recipe, opt_state)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            trainable=trainable,
            frozen=Frozen(fixed, tree.copy(consts)),
            opt_state=tree.copy(opt_state),
        )

    def total(trainable: Trainable, frozen: Frozen, batch: Any) -> tuple[Array, dict[str, Array]]:
        params = _effective(recipe, trainable, frozen)
        loss, info = loss_fn(params, batch)
        for name, penalty in base.penalties(recipe, params, frozen.consts, batch).items():
            penalty = penalty / count if count > 1 else penalty  # each counts it, and they add
            loss = loss + penalty
            info = {**info, f"penalty/{name}": penalty}
        return loss, {**info, "loss": loss}

    one = jax.grad(total, has_aux=True)

    def several(trainable: Trainable, frozen: Frozen, batches: Any) -> tuple[Trainable, Any]:
        def add(sums: Any, batch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, one(trainable, frozen, batch)), None

        first = jax.tree.map(lambda leaf: leaf[0], batches)
        shapes = jax.eval_shape(one, trainable, frozen, first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, batches)[0]

    differentiate = one if accumulate == 1 else several

    def shared(trainable: Trainable, frozen: Frozen, batch: Any) -> tuple[Trainable, Any]:
        # the gradient of what this device holds, then the sum: never the gradient of a sum
        own = differentiate(trainable, frozen, _with_totals_of_all(batch))
        return parallel.total(own)

    find = differentiate if mesh is None else shared

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        gradient, info = find(state.trainable, state.frozen, batch)
        norm = optax.tree.norm(gradient)
        is_finite = jnp.isfinite(norm) & jnp.isfinite(info["loss"])
        updates, opt_state = chain.update(gradient, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        projected = base.project(recipe, trainable.coords, state.frozen.consts)
        moved = (state.step + 1, trainable._replace(coords=projected), opt_state)
        before = (state.step, state.trainable, state.opt_state)
        counter, trainable, opt_state = jax.tree.map(
            lambda new, old: jax.lax.select(is_finite, new, old), moved, before
        )
        info = {**info, "gradient_norm": norm, "is_finite": is_finite}
        return TrainState(counter, trainable, state.frozen, opt_state), info

    if mesh is None:
        return init, jax.jit(step, donate_argnums=0)
    return init, parallel.per_device(mesh, step, donate=(0,))


def _with_totals_of_all(batch: Batch) -> Batch:
    """With the sums of the weights over all devices, and over micro-batches where there are any."""
    curvature = batch.curvature
    probed = None if curvature is None else curvature.weight.sum()
    found = parallel.total((totals_of(batch.weights), probed))
    before = batch.totals, None if curvature is None else curvature.total
    like = jax.tree.map(lambda total, own: jnp.full_like(own, total), found, before)
    return with_totals(batch, *like)


def _check_averages(recipe: Recipe, opt_state: optax.OptState) -> None:
    late = [strategy.name for strategy in recipe if strategy.acts_after_update]
    if late and optimizer.is_averaging(opt_state):
        raise ValueError(
            f"{', '.join(map(repr, late))} changes updates or coordinates after the optimiser; a "
            "schedule-free one does not see that, and its averages would drift:\nuse adamw."
        )


def merge(recipe: Recipe, state: TrainState) -> Params:
    """The effective parameters: an ordinary tree again, in buffers of its own."""
    return tree.copy(_effective(tuple(recipe), state.trainable, state.frozen))


def _effective(recipe: Recipe, trainable: Trainable, frozen: Frozen) -> Params:
    params = tree.combine(trainable.params, frozen.params)
    return base.apply(recipe, params, trainable.coords, frozen.consts)


def in_precision(loss_fn: LossFn, dtype: str) -> LossFn:
    """The loss computed in ``dtype``, of parameters that are kept in another.

    With parameters and optimiser in float64 and the model in float32, small updates are not lost
    and the model runs at the speed of float32. Batches have to be of ``dtype`` too.
    """

    def cast(params: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return lambda params, batch: loss_fn(cast(params), batch)
