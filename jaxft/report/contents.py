"""What a report may say."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxft.citation import Work
from jaxft.data import Frame
from jaxft.evaluate.predictions import FrameResult
from jaxft.version import __version__

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "ase", "e3nn-jax")


@dataclass(frozen=True)
class Judged:
    """A test set before and after."""

    name: str
    frames: Sequence[Frame]
    before: Sequence[FrameResult]
    after: Sequence[FrameResult]
    is_base: bool = False
    """Whether its labels are what the base model was trained on, so that errors that grow say what
    was forgotten."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What there is to say; what is empty is left out. All text is shown as it is."""

    title: str
    run: str = ""
    """What tells this run from others; a report is only ever replaced by one of the same run."""
    summary: Mapping[str, object] = field(default_factory=dict)
    """A few facts for the top."""
    warnings: Sequence[str] = ()
    tests: Sequence[Judged] = ()
    history: Sequence[Mapping[str, float]] = ()
    """A row per epoch, as :func:`jaxft.fit.fit` returns; errors in eV and Å."""
    best_epoch: int | None = None
    trained: str = ""
    """Of :func:`jaxft.describe`."""
    e0s: Mapping[str, Any] = field(default_factory=dict)
    """Of :meth:`jaxft.preflight.Preflight.to_dict`."""
    e0s_used: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """``{element: {"model": eV, "now": eV}}``."""
    works: Sequence[Work] = ()
    """Of :func:`jaxft.citation.works`."""
    settings: str = ""
    """The YAML of the run."""
    environment: Mapping[str, object] = field(default_factory=dict)
    """Versions, device, hashes of the inputs; see :func:`environment`."""
    timings: Mapping[str, object] = field(default_factory=dict)
    """Beside those of ``history``: padding waste, compile time, …"""


def environment() -> dict[str, str]:
    """Versions and devices of this process, for ``Report.environment``."""
    devices = jax.devices()
    return {
        "jaxft": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "devices": f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})",
    }


def timings(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Durations of a run; the first epoch compiles, so the median tells more than the mean."""
    seconds = [row["seconds"] for row in history if "seconds" in row and row["epoch"] > 0]
    if not seconds:
        return {}
    return {
        "epochs": str(len(seconds)),
        "first epoch, with compilation": f"{seconds[0]:.1f} s",
        "median epoch": f"{statistics.median(seconds):.1f} s",
        "all epochs": f"{sum(seconds):.1f} s",
    }
