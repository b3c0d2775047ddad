"""Further frames to train on, beside those of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Schedule = Literal["mixed", "alternate"]
LabelsFrom = Literal["given", "base", "none"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Frames that a strategy adds to the training data, and how they are mixed in.

    Raises:
      ValueError: there are no frames, a number is out of its range, or an option is given that
        the schedule does not read.
    """

    name: str
    """Unique among the sources; keys its log lines and seeds its order."""
    frames: Sequence[Any]
    """:class:`jaxft.data.Frame`."""
    head: str | None = None
    """Of the model, that these frames belong to; None is that of the target."""
    is_apart: bool = False
    """The head must not be that of the target; checked where the data are mixed."""
    schedule: Schedule = "mixed"
    """``mixed``: a share of every batch; ``alternate``: batches of their own, each an update."""
    fraction: float = 0.5
    """``mixed``: of the frames of every batch, in [0, 1); 0 is training without them."""
    batch_size: int | None = None
    """``alternate``: frames per update; None is that of the target."""
    steps: int = 1
    """``alternate``: updates after each one of the target."""
    weight: float = 1.0
    """Of these frames, times their own."""
    labels: LabelsFrom = "given"
    """``given``: those of the frames; ``base``: to be made by the model that training starts from;
    ``none``: the frames are structures only, for penalties that look at predictions."""

    def __post_init__(self) -> None:
        if not len(self.frames):
            raise ValueError(f"{self.name!r} has no frames; give at least one, or leave it out.")
        for what, allowed in (("schedule", Schedule), ("labels", LabelsFrom)):
            if getattr(self, what) not in get_args(allowed):
                raise ValueError(
                    f"{self.name!r} has {what}={getattr(self, what)!r}; use one of "
                    f"{', '.join(map(repr, get_args(allowed)))}."
                )
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
        self._refuse_what_is_not_read()

    def _refuse_what_is_not_read(self) -> None:
        if self.schedule == "alternate" and self.fraction != 0.5:
            raise ValueError(
                f"{self.name!r} alternates, so fraction={self.fraction} would mean nothing; set "
                "batch_size and steps, or schedule='mixed'."
            )
        if self.schedule == "mixed" and (self.steps != 1 or self.batch_size is not None):
            raise ValueError(
                f"{self.name!r} is mixed into the target's batches, so batch_size="
                f"{self.batch_size}, steps={self.steps} would mean nothing; set fraction, or "
                "schedule='alternate'."
            )
        if self.is_apart and self.head is None:
            raise ValueError(
                f"{self.name!r} needs a head other than the target's; name it with head=…."
            )
