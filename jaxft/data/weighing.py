"""Weights by what frames are called, for whole sets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxft.data.frames import Frame
from jaxft.data.labels import check_weight


def weigh(
    frames: Sequence[Frame], *, config_types: Mapping[str, float] | None = None, factor: float = 1.0
) -> list[Frame]:
    """The frames with their weights multiplied, by ``config_type`` and all alike.

    Args:
      frames: of one head, say; the weights that they have count on.
      config_types: factors by ``config_type``; those not named keep their weight.
      factor: of all frames.

    Raises:
      ValueError: a factor is negative or not finite, or no frame has such a ``config_type``.

    Example:
      >>> from jaxft.data.weighing import weigh
      >>> weigh([], factor=2.0)
      []
    """
    factors = config_types or {}
    for name, value in {"factor": factor, **factors}.items():
        check_weight(value, name, "weigh")
    known = sorted({frame.config_type for frame in frames})
    if unknown := sorted(set(factors) - set(known)):
        raise ValueError(
            f"no frame has config_type {', '.join(map(repr, unknown))}; known are "
            f"{', '.join(map(repr, known)) or 'none'}.\n"
            "Correct the name, or leave its weight out."
        )
    return [
        replace(frame, weight=frame.weight * factor * factors.get(frame.config_type, 1.0))
        for frame in frames
    ]
