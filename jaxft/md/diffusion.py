"""Mean squared displacements, diffusion coefficients with their errors, and Arrhenius' law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import units

BLOCKS = 4
WINDOW = (0.1, 0.5)
"""Of the fit, in units of a block's length."""


def without_drift(positions: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """[F, n, 3] Å relative to the centre of all masses."""
    centre = np.einsum("fna,n->fa", positions, masses) / masses.sum()
    return positions - centre[:, None]


def mean_squared_displacement(positions: np.ndarray) -> np.ndarray:
    """[F] Å², the mean over atoms and over all F - lag origins of time.

    Args:
      positions: [F, n, 3] Å, not wrapped.

    Reference: Calandrini et al., Collection SFN 12, 201 (2011), section 4.2.1.
    """
    n_frame = len(positions)
    positions = positions - positions.mean(0)
    spectrum = np.fft.rfft(positions, 2 * n_frame, axis=0)
    products = np.fft.irfft(np.abs(spectrum) ** 2, axis=0)[:n_frame].sum(-1).mean(1)
    squares = (positions**2).sum(-1).mean(1)
    before = np.concatenate([[0.0], np.cumsum(squares)])
    lags = np.arange(n_frame)
    total = before[n_frame - lags] + before[n_frame] - before[lags]
    found: np.ndarray = (total - 2 * products) / (n_frame - lags)
    found[0] = 0.0
    return found


@dataclass(frozen=True)
class Diffusion:
    """A self-diffusion coefficient."""

    value: float
    """Å²/ps, which is 1e-4 cm²/s; may come out negative where nothing diffuses."""
    error: float
    """Å²/ps, one standard error: of the mean over blocks of time and replicas."""
    window: tuple[float, float]
    """ps, lags of the fit."""


def diffusion(
    replicas: Sequence[np.ndarray],
    interval: float,
    *,
    blocks: int = BLOCKS,
    window: tuple[float, float] = WINDOW,
) -> Diffusion:
    """Einstein's relation, ⟨|Δr|²⟩ = 6 D t + c, fitted by least squares.

    Each replica is cut into blocks of time that do not overlap; each block gives a slope over the
    same lags. Value and error are mean and standard error of these. The error holds as long as a
    block is much longer than the dynamics remember.

    Args:
      replicas: [F, n, 3] Å each, not wrapped, without drift, of the atoms that count.
      interval: ps between frames.
      blocks: of each replica.
      window: of the fit, as fractions of a block.

    Raises:
      ValueError: too few frames for a slope in every block, or no replica.
    """
    cut = [block for replica in replicas for block in np.array_split(replica, blocks)]
    shortest = min((len(block) for block in cut), default=0)
    low, high = max(round(window[0] * shortest), 1), round(window[1] * shortest)
    if high - low < 2 or len(cut) < 2:
        raise ValueError(
            f"{[len(r) for r in replicas]} frames in {blocks} blocks are too few for a diffusion "
            "coefficient; run longer, or write frames more often."
        )
    times = interval * np.arange(low, high + 1)
    slopes = [
        np.polyfit(times, mean_squared_displacement(block)[low : high + 1], 1)[0] / 6
        for block in cut
    ]
    error = np.std(slopes, ddof=1) / np.sqrt(len(slopes))
    return Diffusion(float(np.mean(slopes)), float(error), (float(times[0]), float(times[-1])))


@dataclass(frozen=True)
class Arrhenius:
    """D = D0 exp(-E/kT)."""

    energy: float
    """eV, of activation."""
    error: float
    """eV, one standard error that follows from those of the coefficients."""
    prefactor: float
    """Å²/ps."""


def arrhenius(temperatures: Sequence[float], found: Sequence[Diffusion]) -> Arrhenius:
    """The straight line through ln D against 1/kT, weighted by the errors of ln D.

    Args:
      temperatures: K.
      found: a coefficient at each.

    Raises:
      ValueError: fewer than two temperatures, or a coefficient or error that is not positive.
    """
    if len(set(temperatures)) < 2 or len(temperatures) != len(found):
        raise ValueError(
            f"{len(found)} coefficients at {sorted(set(temperatures))} K give no Arrhenius law; "
            "use two temperatures or more."
        )
    if not all(d.value > 0 and d.error > 0 for d in found):
        raise ValueError(
            "a diffusion coefficient or its error is not positive: nothing diffuses at "
            "one of the temperatures; run longer, or leave it out."
        )
    x = np.array([1 / (units.kB * t) for t in temperatures])
    y = np.log([d.value for d in found])
    weight = np.array([d.value / d.error for d in found])
    design = np.stack([np.ones_like(x), -x], axis=1) * weight[:, None]
    covariance = np.linalg.inv(design.T @ design)
    intercept, energy = covariance @ design.T @ (weight * y)
    return Arrhenius(float(energy), float(np.sqrt(covariance[1, 1])), float(np.exp(intercept)))
