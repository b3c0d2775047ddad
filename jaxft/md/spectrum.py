"""Vibrational density of states from velocities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KEPT = 0.999
"""Fraction of a reference's power that an error looks at."""

LEAST = 8
"""Frames."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A density of states with unit area."""

    frequency: np.ndarray
    """[K] THz, of equal spacing from 0 to half the rate of frames."""
    density: np.ndarray
    """[K] 1/THz."""


def spectrum(replicas: Sequence[np.ndarray], interval: float) -> Spectrum:
    """Power spectra of all velocity components with a Hann window, each of unit power, averaged.

    The resolution is two over the length of the trajectory, and nothing above half the rate of
    frames can be seen: it is folded back.

    Args:
      replicas: [F, n, 3] velocities of trajectories of equal length, in any unit.
      interval: ps between frames.

    Raises:
      ValueError: fewer than 8 frames, no or unequal trajectories, or nothing moves.
    """
    lengths = {len(replica) for replica in replicas}
    if len(lengths) != 1 or min(lengths) < LEAST:
        raise ValueError(
            f"trajectories of {sorted(lengths)} frames give no spectrum; use equal lengths, of "
            f"{LEAST} frames at least."
        )
    (n_frame,) = lengths
    every = np.concatenate([np.reshape(v, (n_frame, -1)) for v in replicas], axis=1)
    # n + 1 points without the last: the window of a periodic sequence
    window = np.hanning(n_frame + 1)[:-1, None]
    power = np.abs(np.fft.rfft(window * every, axis=0)) ** 2
    sums = power.sum(0)
    if not (sums > 0).any():
        raise ValueError("nothing moves in these trajectories, so they have no spectrum.")
    mean = (power[:, sums > 0] / sums[sums > 0]).mean(1)
    frequency = np.fft.rfftfreq(n_frame, interval)
    return Spectrum(frequency, mean / (mean.sum() * frequency[1]))


def spectrum_error(reference: Spectrum, found: Spectrum) -> float:
    """%: 100 min(1, W1/σ), of Wasserstein's distance and the reference's standard deviation, both
    up to the frequency below which 99.9 % of the reference's power lies.

    Raises:
      ValueError: other frequencies.

    Reference: Matbench Discovery's MD task.
    """
    if reference.frequency.shape != found.frequency.shape or not np.allclose(
        reference.frequency, found.frequency
    ):
        raise ValueError("spectra of other frequencies cannot be compared; use equal trajectories.")
    share = np.cumsum(reference.density) / reference.density.sum()
    upper = int(np.searchsorted(share, KEPT)) + 1
    frequency = reference.frequency[:upper]
    p, q = (s.density[:upper] / max(s.density[:upper].sum(), 1e-300) for s in (reference, found))
    distance = np.abs(np.cumsum(p) - np.cumsum(q)).sum() * reference.frequency[1]
    spread = np.sqrt((p * frequency**2).sum() - (p * frequency).sum() ** 2)
    return float(100 * min(1.0, distance / max(spread, 1e-300)))
