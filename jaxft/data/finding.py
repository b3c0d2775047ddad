"""One thing that an audit has to say of a set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxft.data.frames import Frame

Severity = Literal["error", "warning", "note"]

EXAMPLES = 3
"""Sources that a finding names."""


@dataclass(frozen=True)
class Finding:
    """What was found, in how many frames, and what to do about it."""

    name: str
    """Short and stable, for scripts: ``close-contacts``."""
    severity: Severity
    """error: training on it, or starting to, goes wrong; warning: look at it; note: know it."""
    count: int
    """Frames, or pairs of frames."""
    sources: tuple[str, ...]
    """Of the worst, or the first, few."""
    text: str
    """What was found, with numbers and units."""
    advice: str
    """What to do."""


def found(
    name: str, severity: Severity, frames: Sequence[Frame], text: str, advice: str
) -> list[Finding]:
    """A finding about these frames, the worst first; none if there are none."""
    if not frames:
        return []
    sources = tuple(frame.source for frame in frames[:EXAMPLES])
    return [Finding(name, severity, len(frames), sources, text, advice)]


def worst(frames: Sequence[Frame], value: dict[int, float], limit: float) -> list[Frame]:
    """Frames beyond the limit, the worst first."""
    beyond = [f for f in frames if value[id(f)] > limit]
    return sorted(beyond, key=lambda f: -value[id(f)])
