"""Fine-tunes of one base that differ in numbers alone, as one compiled step.

Learning rates, strengths of penalties and, where they share their data, seeds are arguments of a
step that ``jax.vmap`` makes of the ordinary one. Frozen parameters and, with one seed, batches are
there once. Every member gives the numbers of its own run, to rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import data, optimizer, parallel, train, tree
from jaxft.config import Config
from jaxft.data import Spread
from jaxft.data.packing import smallest
from jaxft.fit import FitResult, advancing
from jaxft.graph import Batch
from jaxft.inputs import Inputs
from jaxft.objective import objective
from jaxft.progress import Moving
from jaxft.run import schedule_of, transform_of
from jaxft.strategies import Recipe, Strategy
from jaxft.train import Frozen, Trainable, TrainState
from jaxft.typing import Array, Params
from jaxft.validation import validator

STRENGTH = "strength"
"""What an entry of a recipe calls its λ."""


@dataclass
class Member:
    """One of the fine-tunes, and where it stands."""

    config: Config
    best: Trainable
    best_epoch: int = 0
    best_value: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    reason: str | None = None
    """Why it stopped before its end."""
    result: FitResult | None = None


def fit(configs: Sequence[Config], given: Inputs) -> list[Member]:
    """Train all members at once, each as :func:`jaxft.fit.fit` would.

    Args:
      configs: of one key.
      given: what the first of them reads.

    Returns:
      The members in their order. One whose update is not finite stops there, and the others go on.
    """
    first = configs[0]
    spreads = _spreads(configs, given)
    rates = _rates(configs, spreads[0].num_updates)
    loss_fn = objective(first, given.model)
    begun = [_begun(config, given, loss_fn) for config in configs]
    axes = _axes([moving.state.frozen for moving in begun])
    moving = _joined(begun, axes)
    members = [Member(config, tree.copy(m.ema)) for config, m in zip(configs, begun, strict=True)]
    advance = _advance(first, given, loss_fn, axes, is_shared=len(spreads) == 1)
    validate = validator(
        given.model,
        loss_fn,
        {"valid": given.valid, **given.watch},
        weights=first.loss.weights,
        batch_size=first.batch_size,
        dtype=first.compute_dtype,
        mesh=parallel.mesh(1),
    )
    factors = _factors(configs)
    for number in range(first.epochs + 1):
        began, infos = time.perf_counter(), []
        updates = _batches(spreads, number, first.compute_dtype) if number else iter(())
        for update, batch in enumerate(updates, start=(number - 1) * spreads[0].num_updates):
            moving, info = advance(moving, batch, rates[:, update], factors)
            infos.append(info)
        found = jax.device_get(infos)
        going = [(k, member) for k, member in enumerate(members) if member.reason is None]
        for k, member in going:
            own = _member(moving, axes, k)
            _judge(number, member, own, [_own(info, k) for info in found], validate, given.recipe)
        for _, member in going:
            if member.reason is None:
                member.history[-1]["seconds"] = (time.perf_counter() - began) / len(going)
        if all(member.reason is not None for member in members):
            break
    for k, member in enumerate(members):
        state = _member(moving, axes, k).state
        params = train.merge(given.recipe, state._replace(trainable=member.best))
        member.result = FitResult(params, member.best_epoch, member.history, member.best)
    return members


def _own(info: dict[str, Any], k: int) -> dict[str, Any]:
    return {name: values[k] for name, values in info.items()}


def _judge(
    number: int,
    member: Member,
    own: Moving,
    infos: Sequence[dict[str, Any]],
    validate: Any,
    recipe: Recipe,
) -> None:
    """Enter an epoch into a member's history, or why there are no more."""
    config = member.config
    if wrong := [i for i, info in enumerate(infos, start=1) if not info["is_sound"]]:
        member.reason = (
            f"the loss or the gradient is not finite in epoch {number}, update {wrong[0]};\nlower "
            "the learning rate, or check the frames."
        )
        return
    judged = own.ema
    if config.ema_decay is None:
        judged = optimizer.evaluated(own.state.opt_state, own.state.trainable)
    row: dict[str, float] = {"epoch": number}
    if infos:
        row["train/loss"] = float(np.mean([info["loss"] for info in infos]))
    row |= validate(train.merge(recipe, own.state._replace(trainable=judged)))
    row["updates"] = int(own.state.step)
    metric = config.metric if "/" in config.metric else f"valid/{config.metric}"
    value = row.get(metric, math.nan)
    if not math.isfinite(value):
        member.reason = f"the metric {metric} is {value} after epoch {number}."
        return
    if value < member.best_value:
        member.best, member.best_epoch = tree.copy(judged), number
        member.best_value = value
    member.history.append(row | {"is_best": member.best_epoch == number})


def _spreads(configs: Sequence[Config], given: Inputs) -> list[Spread]:
    """One if all have the same order of frames, else one per member."""
    seeds = [config.seed for config in configs]
    chosen = seeds if len(set(seeds)) > 1 else seeds[:1]
    dtype = configs[0].compute_dtype
    return [Spread(given.train, seed=seed, dtype=dtype) for seed in chosen]


def _batches(spreads: Sequence[Spread], number: int, dtype: str) -> Iterator[Batch]:
    """The updates of an epoch; of several members stacked, in one static shape."""
    mixture = spreads[0].train
    dataset = mixture.dataset
    for update in range(spreads[0].num_updates):
        chosen = [spread.frames(number, update)[0][0] for spread in spreads]
        keys = [(spread.seed or 0, number) for spread in spreads]
        n_node = max(int(dataset.nodes[frames].sum()) for frames in chosen)
        n_row = max(int(dataset.rows[frames].sum()) for frames in chosen)
        shape = smallest(mixture.ladders[mixture.kind(update)], n_node, n_row)
        batches = [
            data.pack(dataset, frames, shape, dtype, key=key)
            for frames, key in zip(chosen, keys, strict=True)
        ]
        yield batches[0] if len(batches) == 1 else jax.tree.map(lambda *a: np.stack(a), *batches)


def _rates(configs: Sequence[Config], updates: int) -> np.ndarray:
    """[members, updates of the run]: the very numbers that each run's schedule would give."""
    steps = np.arange(configs[0].epochs * updates)
    found = []
    for config in configs:
        rates = jax.vmap(schedule_of(config, len(steps)))(jnp.asarray(steps, jnp.int32))
        found.append(np.broadcast_to(np.asarray(rates), steps.shape))
    return np.stack(found)


def _factors(configs: Sequence[Config]) -> dict[str, np.ndarray]:
    """λ of each member's penalties, [members], in units of the first's."""
    return {
        entry.name: np.array(
            [
                next(getattr(e, STRENGTH) for e in config.recipe if e.name == entry.name)
                for config in configs
            ]
        )
        / getattr(entry, STRENGTH)
        for entry in configs[0].recipe
        if hasattr(entry, STRENGTH)
    }


def _begun(config: Config, given: Inputs, loss_fn: Any) -> Moving:
    init, _ = train.finetune(loss_fn, given.recipe, transform_of(config, lambda count: 0.0))
    state = init(jax.random.key(config.seed), given.params)
    return Moving(state, tree.copy(state.trainable), jnp.ones((), bool))


def _axes(frozen: Sequence[Frozen]) -> Moving:
    """Which parts of the state are each member's own: constants only where they differ."""
    same = all(
        np.array_equal(a, b)
        for other in frozen[1:]
        for a, b in zip(
            jax.tree.leaves(frozen[0].consts), jax.tree.leaves(other.consts), strict=True
        )
    )
    own: Any = 0
    nobody: Any = None
    state = TrainState(own, own, Frozen(nobody, nobody if same else own), own)
    return Moving(state, own, own)


def _joined(parts: Sequence[Moving], axes: Moving) -> Moving:
    frozen = [part.state.frozen for part in parts]
    own = [_with_frozen(part, None) for part in parts]
    consts = frozen[0].consts
    if axes.state.frozen.consts is not None:
        consts = _stacked([each.consts for each in frozen])
    return _with_frozen(_stacked(own), Frozen(frozen[0].params, consts))


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _with_frozen(moving: Moving, frozen: Any) -> Moving:
    return moving._replace(state=moving.state._replace(frozen=frozen))


def _member(moving: Moving, axes: Moving, k: int) -> Moving:
    """Member ``k`` alone."""
    frozen = moving.state.frozen
    consts = frozen.consts
    if axes.state.frozen.consts is not None:
        consts = jax.tree.map(lambda leaf: leaf[k], consts)
    alone = jax.tree.map(lambda leaf: leaf[k], _with_frozen(moving, None))
    return _with_frozen(alone, Frozen(frozen.params, consts))


def _advance(config: Config, given: Inputs, loss_fn: Any, axes: Moving, *, is_shared: bool) -> Any:
    """``(moving, batch, rate, factors) -> moving, info`` of all members, jitted."""

    def one(moving: Moving, batch: Batch, rate: Array, factors: dict[str, Array]) -> Any:
        recipe = tuple(_scaled(strategy, factors) for strategy in given.recipe)
        _, step = train.finetune(loss_fn, recipe, transform_of(config, lambda count: rate))
        return advancing(step, config.ema_decay)(moving, batch)

    every = jax.vmap(one, in_axes=(axes, None if is_shared else 0, 0, 0), out_axes=(axes, 0))
    return jax.jit(every, donate_argnums=0)


def _scaled(strategy: Strategy, factors: dict[str, Array]) -> Strategy:
    if strategy.name not in factors:
        return strategy

    def penalty(params: Params, consts: Any, batch: Any) -> Array:
        own = strategy.penalty(params, consts, batch)
        return (factors[strategy.name] * own).astype(own.dtype)

    return replace(strategy, penalty=penalty)
