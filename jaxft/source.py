"""Further frames to train on, beside those of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Frames that a strategy adds to the training data, and how they are mixed in.

    Raises:
      ValueError: a number is out of its range, or there are no frames.
    """

    name: str
    """Unique among the sources; keys its log lines and seeds its order."""
    frames: Sequence[Any]
    """:class:`jaxft.data.Frame`."""
    head: str | None = None
    """Of the model, that these frames belong to; None is that of the target."""
    schedule: Literal["mixed", "alternate"] = "mixed"
    """``mixed``: a share of every batch; ``alternate``: batches of their own, each an update."""
    fraction: float = 0.5
    """``mixed``: of the frames of every batch, in [0, 1)."""
    batch_size: int | None = None
    """``alternate``: frames per update; None is that of the target."""
    steps: int = 1
    """``alternate``: updates after each one of the target."""
    weight: float = 1.0
    """Of these frames, beside their own."""
    labels: Literal["given", "base", "none"] = "given"
    """``given``: those of the frames; ``base``: to be made by the model that training starts from;
    ``none``: the frames are structures only, for penalties that look at predictions."""

    def __post_init__(self) -> None:
        if not len(self.frames):
            raise ValueError(f"{self.name!r} has no frames; give at least one, or leave it out.")
        if not 0 <= self.fraction < 1:
            raise ValueError(
                f"{self.name!r} asks for a fraction {self.fraction} of every batch; use a number "
                "in [0, 1): something must be left for the target."
            )
        if self.steps < 1 or (self.batch_size is not None and self.batch_size < 1):
            raise ValueError(
                f"{self.name!r} has batch_size={self.batch_size}, steps={self.steps}; use >= 1."
            )
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"{self.name!r} has weight={self.weight}; use a number >= 0.")
