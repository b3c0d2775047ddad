r"""Third-order Birch–Murnaghan equation of state, and the distance of two of them.

.. math:: E(V) = E_0 + \frac{9 V_0 B_0}{16}\left[(x-1)^3 B_0' + (x-1)^2 (6 - 4x)\right],\quad
          x = (V_0/V)^{2/3}

is a cubic polynomial in :math:`V^{-2/3}`, so its fit is linear least squares and needs no start.

References: Birch, Phys. Rev. 71, 809 (1947); Lejaeghere et al., Crit. Rev. Solid State Mater. Sci.
39, 1 (2014), whose own script fits the same polynomial.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase.units import GPa

GAUSS_POINTS = 64


@dataclass(frozen=True)
class Equation:
    """Of energy against volume, per atom."""

    v0: float
    """Å³/atom."""
    e0: float
    """eV/atom."""
    b0: float
    """eV/Å³."""
    b1: float
    """dB/dP at V0, a pure number."""
    rms: float
    """eV/atom, of what the fit leaves."""

    @property
    def bulk_modulus(self) -> float:
        """GPa."""
        return self.b0 / GPa

    def energy(self, volume: np.ndarray | float) -> np.ndarray:
        """eV/atom at volumes in Å³/atom, 0 at the minimum."""
        x = (self.v0 / np.asarray(volume)) ** (2 / 3)
        stretched = (x - 1) ** 3 * self.b1 + (x - 1) ** 2 * (6 - 4 * x)
        return 9 * self.v0 * self.b0 / 16 * stretched


def fit(volumes: np.ndarray, energies: np.ndarray) -> Equation:
    """The best equation through energies (eV/atom) at volumes (Å³/atom).

    Raises:
      ValueError: fewer than five points, or the polynomial has no minimum.
    """
    volumes, energies = np.asarray(volumes, np.float64), np.asarray(energies, np.float64)
    if len(volumes) < 5 or not np.isfinite([volumes, energies]).all() or (volumes <= 0).any():
        raise ValueError(
            f"{len(volumes)} points, of which some may not be finite; give at least five energies "
            "at positive volumes."
        )
    offset, unit = energies.mean(), volumes.mean()
    x = (volumes / unit) ** (-2 / 3)
    polynomial = np.polynomial.Polynomial.fit(x, energies - offset, 3)
    first, second, third = (polynomial.deriv(k) for k in (1, 2, 3))
    x0 = _minimum(first)
    if x0 is None or x0 <= 0:
        raise ValueError("the energy has no minimum in the volume")
    v0 = x0**-1.5  # in units of `unit`
    # chain rule with x = v^(-2/3); the first derivative by x is zero at x0
    d1, d2 = -2 / 3 * v0 ** (-5 / 3), 10 / 9 * v0 ** (-8 / 3)
    e2 = second(x0) * d1**2
    e3 = third(x0) * d1**3 + 3 * second(x0) * d1 * d2
    rms = float(np.sqrt(np.mean((polynomial(x) - energies + offset) ** 2)))
    return Equation(
        v0=float(v0 * unit),
        e0=float(polynomial(x0) + offset),
        b0=float(v0 * e2 / unit),
        b1=float(-1 - v0 * e3 / e2),
        rms=rms,
    )


def _minimum(first: np.polynomial.Polynomial) -> float | None:
    """Where a cubic polynomial of this derivative has its minimum, if anywhere.

    In the form that stays exact as the cubic term vanishes, which it does for B' = 4.
    """
    c, b, a = np.pad(first.coef, (0, 2))[:3]
    inside = b * b - 4 * a * c
    if inside <= 0:
        return None
    root = np.sqrt(inside)  # the second derivative there, which is positive
    place = -2 * c / (b + root) if b > 0 else (root - b) / (2 * a)
    shift, scale = first.mapparms()
    return float((place - shift) / scale)


def delta(a: Equation, b: Equation, *, span: float = 0.06) -> float:
    r"""The Δ-gauge of two curves, eV/atom.

    .. math:: \Delta = \sqrt{\frac{1}{V_f - V_i}\int_{V_i}^{V_f} (E_a(V) - E_b(V))^2\,dV}

    with both energies 0 at their own minimum, over ``1 ± span`` of the mean of the two V0.
    """
    middle = (a.v0 + b.v0) / 2
    nodes, weights = np.polynomial.legendre.leggauss(GAUSS_POINTS)
    volumes = middle * (1 + span * nodes)
    return float(np.sqrt(weights @ (a.energy(volumes) - b.energy(volumes)) ** 2 / 2))
