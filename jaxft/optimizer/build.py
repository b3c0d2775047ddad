"""An optimiser by name, with clipping, decay, learning rate and its factor in one order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxft.optimizer.alternation import add_previous, project_gradients
from jaxft.optimizer.amsgrad import scale_by_amsgrad
from jaxft.optimizer.decay import decay
from jaxft.optimizer.muon import scale_by_muon
from jaxft.optimizer.plateau import scale_by_factor

Tree = TypeVar("Tree")


def _as_it_is(
    tx: optax.GradientTransformation, learning_rate: optax.ScalarOrSchedule, **options: float
) -> optax.GradientTransformation:
    return tx


@dataclass(frozen=True)
class Rule:
    """How a gradient becomes a direction."""

    scale: Callable[..., optax.GradientTransformation]
    """``options -> transform``, before decay and learning rate."""
    options: Mapping[str, float] = field(default_factory=dict)
    """What it takes of b1, b2 and eps, with defaults."""
    cites: tuple[str, ...] = ()
    """Keys of the works to cite."""
    wrap: Callable[..., optax.GradientTransformation] = _as_it_is
    """``transform, learning_rate, options -> transform``, around all of it."""
    joins: bool = True
    """Whether all leaves can be worked on as one vector, and there is something to work on."""


def _momentum(b1: float) -> optax.GradientTransformation:
    return optax.trace(b1)


def _rms(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    # schedule-free has its momentum outside, in the point where the gradient is taken
    return optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)


def _schedule_free(
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float,
    b2: float,
    eps: float,
) -> optax.GradientTransformation:
    if b1 == 0:
        raise ValueError("b1=0.0 of 'schedule_free' keeps no average; use 0 < b1 < 1, e.g. 0.9.")
    return optax.contrib.schedule_free(tx, learning_rate, b1=b1)


ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
DECAY = "loshchilov2019adamw"

OPTIMIZERS = {
    "adam": Rule(optax.scale_by_adam, ADAM, ("kingma2015adam",)),
    "amsgrad": Rule(scale_by_amsgrad, ADAM, ("kingma2015adam", "reddi2018amsgrad")),
    "adamw": Rule(optax.scale_by_adam, ADAM, ("kingma2015adam", DECAY)),
    "schedule_free": Rule(_rms, ADAM, ("defazio2024schedulefree", DECAY), _schedule_free),
    "muon": Rule(
        scale_by_muon,
        ADAM | {"b1": 0.95},
        ("jordan2024muon", "kingma2015adam"),
        joins=False,
    ),
    "momentum": Rule(_momentum, {"b1": 0.9}),
    "sgd": Rule(optax.identity, joins=False),
}
"""What a config may name. ``adamw`` is ``adam``: any optimiser may decay."""

ALTERNATIONS: dict[str, tuple[Callable[[int], optax.GradientTransformation], tuple[str, ...]]] = {
    "separate": (lambda period: optax.identity(), ()),
    "project": (project_gradients, ("chaudhry2019agem", "yu2020pcgrad")),
    "sum": (add_previous, ("kim2026reewc",)),
}
"""What updates of target and memory, which take turns, know of each other."""


def optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float | Mapping[str, float] = 0.0,
    decay_towards: str = "zero",
    clip_norm: float | None = None,
    alternation: str = "separate",
    period: int = 2,
    b1: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
) -> optax.GradientTransformation:
    r"""An optimiser by name: clip → alternation → ``name`` → decay → learning rate → factor.

    .. math:: \theta \leftarrow \theta - f \eta_t \left(\mathrm{name}(g_t)
              + w (\theta - \theta_0)\right)

    g is the gradient of the trained leaves alone, f a factor that the host may change
    (:func:`~jaxft.optimizer.set_factor`). Decay is decoupled for every optimiser; torch's ``Adam``
    (not ``AdamW``) adds it to the gradient instead, which this does not offer.

    Args:
      name: one of ``OPTIMIZERS``.
      learning_rate: number or schedule.
      weight_decay: w of all trained leaves, or by pattern; see :func:`~jaxft.optimizer.decay`.
      decay_towards: θ₀, ``"zero"`` or ``"start"``, the values that ``init`` is given.
      clip_norm: largest norm of the whole gradient, None for no clipping.
      alternation: for updates of target and memory that take turns: ``"separate"``, ``"project"``
        (:func:`~jaxft.optimizer.project_gradients`) or ``"sum"``
        (:func:`~jaxft.optimizer.add_previous`).
      period: of the alternation, in updates.
      b1: decay of the first moment, or momentum; 0.9, but 0.95 for ``muon``.
      b2: decay of the second moment, 0.999.
      eps: added to the root of the second moment, 1e-8.

    Raises:
      ValueError: a name is unknown, a number is out of range or without effect here; from ``init``:
        a pattern matches nothing.

    Example:
      >>> tx = optimizer("adamw", 0.01, weight_decay={"coords/delta/**": 10.0}, clip_norm=10.0)
    """
    options = _options(name, b1=b1, b2=b2, eps=eps)
    _check(learning_rate, clip_norm, alternation)
    if decay_towards != "zero" and not _decays(weight_decay):
        raise ValueError(
            f"decay_towards={decay_towards!r} was given without any weight_decay, so nothing would "
            "be pulled; set weight_decay > 0."
        )
    rule = OPTIMIZERS[name]
    scale = rule.scale(**options)
    # one loop instead of several for each of a hundred leaves, all of which have to be compiled
    parts = [optax.flatten(scale) if rule.joins else scale]
    if weight_decay:
        parts.append(decay(weight_decay, towards=decay_towards))
    parts += [optax.scale_by_learning_rate(learning_rate), scale_by_factor()]
    wrapped = rule.wrap(optax.chain(*parts), learning_rate, **options)
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    return optax.chain(clip, ALTERNATIONS[alternation][0](period), wrapped)


def cites(
    name: str,
    *,
    weight_decay: float | Mapping[str, float] = 0.0,
    decay_towards: str = "zero",
    alternation: str = "separate",
) -> tuple[str, ...]:
    """Keys of the works to cite for an optimiser with these options of :func:`optimizer`."""
    _options(name)
    _check(0.0, None, alternation)
    decays: tuple[str, ...] = ()
    if _decays(weight_decay):
        decays = (DECAY, "li2018l2sp") if decay_towards == "start" else (DECAY,)
    return tuple(dict.fromkeys((*OPTIMIZERS[name].cites, *decays, *ALTERNATIONS[alternation][1])))


def is_averaging(opt_state: Any) -> bool:
    """Whether the parameters to judge differ from those that are trained."""
    return bool(_averages(opt_state))


def evaluated(opt_state: Any, trainable: Tree) -> Tree:
    """The parameters to judge and to save: schedule-free's average, else ``trainable`` itself.

    Args:
      opt_state: of :func:`optimizer`, alone or inside the chain of a recipe.
      trainable: the trained tree that belongs to it.

    Returns:
      A tree like ``trainable``; before the first update its own numbers, bitwise.
    """
    found = _averages(opt_state)
    if not found:
        return trainable
    (state,) = found
    average = optax.contrib.schedule_free_eval_params(state, trainable)
    return jax.tree.map(
        lambda x, y: jnp.where(state.weight_sum > 0, x, y).astype(y.dtype), average, trainable
    )


def _averages(opt_state: Any) -> list[optax.contrib.ScheduleFreeState]:
    def is_average(node: Any) -> bool:
        return isinstance(node, optax.contrib.ScheduleFreeState)

    return [n for n in jax.tree.leaves(opt_state, is_leaf=is_average) if is_average(n)]


def _decays(weight_decay: float | Mapping[str, float]) -> bool:
    rates = weight_decay.values() if isinstance(weight_decay, Mapping) else (weight_decay,)
    return any(rate != 0 for rate in rates)


def _options(name: str, **given: float | None) -> dict[str, float]:
    """The options of an optimiser: its defaults, and what is given instead."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is unknown; use one of {', '.join(OPTIMIZERS)}.")
    defaults = OPTIMIZERS[name].options
    chosen = {key: value for key, value in given.items() if value is not None}
    for key, value in chosen.items():
        if key not in defaults:
            raise ValueError(
                f"{key}={value} was given for {name!r}, which takes "
                f"{', '.join(defaults) or 'no such option'}; leave it out."
            )
        if not (0 <= value < 1):
            raise ValueError(f"{key}={value} of {name!r} is out of range; use 0 <= {key} < 1.")
    return {**defaults, **chosen}


def _check(
    learning_rate: optax.ScalarOrSchedule, clip_norm: float | None, alternation: str
) -> None:
    if not callable(learning_rate) and not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise ValueError(f"learning_rate={learning_rate} is not a rate; use a number >= 0.")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(
            f"clip_norm={clip_norm} leaves no gradient; use a number > 0, or None for no clipping."
        )
    if alternation not in ALTERNATIONS:
        raise ValueError(
            f"alternation {alternation!r} is unknown; use one of {', '.join(ALTERNATIONS)}."
        )
