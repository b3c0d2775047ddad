"""Learning rates by update."""

from __future__ import annotations

import math

import optax

SCHEDULES = ("constant", "cosine", "exponential", "linear")
"""What a config may name."""


def schedule(
    kind: str,
    learning_rate: float,
    *,
    steps: int,
    warmup: int = 0,
    final: float = 0.01,
    decay: float | None = None,
) -> optax.Schedule:
    """Learning rate by update: a rise to the peak, then ``kind`` down to ``final`` times the peak.

    After ``steps`` updates a ``linear`` or ``cosine`` rate stays at its end; an ``exponential`` one
    goes on.

    Args:
      kind: one of ``SCHEDULES``.
      learning_rate: peak value.
      steps: updates of the whole run.
      warmup: updates of linear rise from 0, for all kinds.
      final: fraction of the peak at the end, for all kinds but ``constant``.
      decay: factor per update of ``exponential``, instead of ``final``. For γ per epoch, as in
        torch MACE, pass γ ** (1 / updates per epoch): equal where epochs end, smooth within.

    Raises:
      ValueError: the kind is unknown, a number is out of range, warm-up takes the whole run, or
        ``decay`` is given for another kind.

    Example:
      >>> rate = schedule("exponential", 1e-2, steps=100, final=0.01)
      >>> [round(float(rate(t)), 6) for t in (0, 50, 100)]
      [0.01, 0.001, 0.0001]
    """
    _check(kind, learning_rate, steps, warmup, final, decay)
    n = max(steps - warmup, 1)
    if kind == "constant":
        rest = optax.constant_schedule(learning_rate)
    elif kind == "cosine":
        rest = optax.cosine_decay_schedule(learning_rate, n, alpha=final)
    elif kind == "linear":
        rest = optax.linear_schedule(learning_rate, final * learning_rate, n)
    else:
        rate = final ** (1 / n) if decay is None else decay
        rest = optax.exponential_decay(learning_rate, 1, rate)
    if not warmup:
        return rest
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), rest], [warmup])


def _check(
    kind: str, learning_rate: float, steps: int, warmup: int, final: float, decay: float | None
) -> None:
    if kind not in SCHEDULES:
        raise ValueError(f"schedule {kind!r} is unknown; use one of {', '.join(SCHEDULES)}.")
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise ValueError(f"learning_rate={learning_rate} is not a rate; use a number >= 0.")
    if not 0 <= warmup <= max(steps - 1, 0):
        raise ValueError(
            f"warmup={warmup} of {steps} updates never reaches the peak; use fewer than {steps}."
        )
    lowest = "> 0" if kind == "exponential" else ">= 0"
    if not (0 <= final <= 1) or (kind == "exponential" and final == 0):
        raise ValueError(
            f"final={final} is no fraction of the peak that a schedule {kind!r} can end at; "
            f"use a number {lowest} and <= 1."
        )
    if decay is not None and kind != "exponential":
        raise ValueError(
            f"decay={decay} was given for schedule {kind!r}, which has none; use 'exponential', "
            "or final=…"
        )
    if decay is not None and not 0 < decay <= 1:
        raise ValueError(f"decay={decay} is no factor per update; use a number > 0 and <= 1.")
