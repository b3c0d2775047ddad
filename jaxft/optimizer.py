"""Optimisers and learning-rate schedules by name; all of them optax's."""

from __future__ import annotations

import optax

OPTIMIZERS = {
    "adam": optax.adam,
    "amsgrad": optax.amsgrad,
    "adamw": optax.adamw,
    "sgd": optax.sgd,
}
"""What a config may name."""


def schedule(
    kind: str, learning_rate: float, *, steps: int, warmup: int = 0, final: float = 0.01
) -> optax.Schedule:
    """Learning rate by update: ``constant``, or ``cosine`` down to ``final`` times the start.

    Args:
      kind: name of the shape.
      learning_rate: peak value.
      steps: updates of the whole run.
      warmup: updates of linear rise from 0.
      final: fraction of the peak at the end of a cosine.
    """
    if kind == "constant":
        rest = optax.constant_schedule(learning_rate)
    elif kind == "cosine":
        rest = optax.cosine_decay_schedule(learning_rate, max(steps - warmup, 1), alpha=final)
    else:
        raise ValueError(f"schedule {kind!r} is unknown; use 'constant' or 'cosine'.")
    if not warmup:
        return rest
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), rest], [warmup])


def optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """An optax optimiser behind a clip of the global norm of the trained leaves' gradient.

    Args:
      name: one of ``OPTIMIZERS``.
      learning_rate: number or schedule.
      weight_decay: decoupled decay towards zero; only for ``adamw``.
      clip_norm: largest norm, None for no clipping.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is unknown; use one of {', '.join(OPTIMIZERS)}.")
    if weight_decay and name != "adamw":
        raise ValueError(
            f"weight_decay={weight_decay} was given for {name!r}, which has none; use 'adamw'."
        )
    options = {"weight_decay": weight_decay} if name == "adamw" else {}
    tx = OPTIMIZERS[name](learning_rate, **options)
    return tx if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), tx)
