"""Thermodynamic ensembles as numbers: one compiled program integrates them all.

Every step is B A O A B, a half kick, a half drift, the thermostat and barostat, the other half
drift and the other half kick. A rate of zero makes a part the identity, so without any of them this
is velocity Verlet, and replicas of one batch may be in different ensembles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import ase
import numpy as np
from ase import units

NAMES = ("nve", "langevin", "bussi", "npt")


@dataclass(frozen=True)
class Ensemble:
    """Made by :func:`nve`, :func:`langevin`, :func:`bussi` or :func:`npt`."""

    name: str
    temperature: float = 0.0
    """K, of the bath."""
    tau: float = np.inf
    """fs, relaxation time of the thermostat."""
    pressure: float = 0.0
    """GPa."""
    tau_pressure: float = np.inf
    """fs."""
    compressibility: float = 0.0
    """1/GPa."""

    def __post_init__(self) -> None:
        wrong = {
            "temperature": not 0 <= self.temperature < np.inf,
            "tau": not self.tau > 0,
            "tau_pressure": not self.tau_pressure > 0,
            "pressure": not np.isfinite(self.pressure),
            "compressibility": not 0 <= self.compressibility < np.inf,
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(
                    f"{name}={getattr(self, name)} of {self.name} is not possible; use a finite "
                    "number, positive for relaxation times and not negative for temperatures."
                )

    @property
    def conserves_momentum(self) -> bool:
        """So that the centre of mass has no share in the temperature."""
        return self.name != "langevin"

    def degrees_of_freedom(self, n_atom: int) -> int:
        """Quadratic terms of the kinetic energy: 3n, or 3n - 3 where momentum is conserved."""
        return 3 * n_atom - 3 * (self.conserves_momentum and n_atom > 1)


def nve() -> Ensemble:
    """Constant energy: velocity Verlet."""
    return Ensemble("nve")


def langevin(temperature: float, *, tau: float = 100.0) -> Ensemble:
    """Constant temperature by friction and noise on every atom; changes the dynamics.

    Args:
      temperature: K.
      tau: fs, 1/friction.

    Reference: Leimkuhler and Matthews, Appl. Math. Res. Express 2013, 34 (BAOAB).
    """
    return Ensemble("langevin", temperature, tau)


def bussi(temperature: float, *, tau: float = 100.0) -> Ensemble:
    """Constant temperature by stochastic rescaling of all velocities; hardly disturbs the dynamics,
    so for diffusion coefficients and spectra.

    Args:
      temperature: K.
      tau: fs.

    Reference: Bussi, Donadio and Parrinello, J. Chem. Phys. 126, 014101 (2007), eq. A7.
    """
    return Ensemble("bussi", temperature, tau)


def npt(
    temperature: float,
    pressure: float = 0.0,
    *,
    tau: float = 100.0,
    tau_pressure: float = 1000.0,
    compressibility: float = 0.02,
) -> Ensemble:
    """Constant temperature and pressure; the cell changes its size but not its shape.

    Stochastic velocity rescaling with stochastic cell rescaling, in the Euler scheme. The
    compressibility only sets, with ``tau_pressure``, how fast the volume follows: a wrong one does
    not change averages or fluctuations.

    Args:
      temperature: K.
      pressure: GPa, positive compresses.
      tau: fs, of the thermostat.
      tau_pressure: fs, of the barostat.
      compressibility: 1/GPa, isothermal; 0.02 suits solids of a bulk modulus of 50 GPa, water has
        0.5.

    Reference: Bernetti and Bussi, J. Chem. Phys. 153, 114107 (2020), eq. 7.
    """
    if compressibility <= 0:
        raise ValueError(f"compressibility={compressibility} is not possible; use a positive one.")
    return Ensemble("npt", temperature, tau, pressure, tau_pressure, compressibility)


def ensemble_of(name: str, temperature: float, pressure: float = 0.0) -> Ensemble:
    """One by its name, with the default relaxation times.

    Raises:
      ValueError: there is no such ensemble.
    """
    if name not in NAMES:
        raise ValueError(f"ensemble {name!r} is unknown; use one of {', '.join(NAMES)}.")
    if name == "nve":
        return nve()
    if name == "npt":
        return npt(temperature, pressure)
    return langevin(temperature) if name == "langevin" else bussi(temperature)


class Knobs(NamedTuple):
    """Ensembles on the device, in eV, Å, amu and the time that follows, ``ase.units``; [G] each."""

    timestep: np.ndarray
    """[]."""
    friction: np.ndarray
    """1/time, of Langevin's thermostat."""
    rescaling: np.ndarray
    """1/time, of the velocities' rescaling."""
    temperature: np.ndarray
    """eV."""
    pressure: np.ndarray
    """eV/Å³."""
    squeezing: np.ndarray
    """Å³/eV/time, compressibility over relaxation time."""
    degrees: np.ndarray
    """Of freedom."""
    hottest: np.ndarray
    """[] eV; beyond it a replica has exploded."""


def knobs(
    ensembles: Sequence[Ensemble],
    n_atoms: Sequence[int],
    *,
    timestep: float,
    hottest: float,
    dtype: str,
) -> Knobs:
    """Of the replicas, and of one more graph, that of the padding, where nothing moves.

    Args:
      ensembles: of each replica.
      n_atoms: of each replica.
      timestep: fs; 0 evaluates the forces where atoms are.
      hottest: K.
      dtype: of the arrays.
    """

    def array(values: list[float]) -> np.ndarray:
        return np.array([*values, 0.0], dtype)

    def rate(ensemble: Ensemble, tau: float, *names: str) -> float:
        return 1 / (tau * units.fs) if ensemble.name in names and timestep > 0 else 0.0

    return Knobs(
        np.asarray(timestep * units.fs, dtype),
        array([rate(e, e.tau, "langevin") for e in ensembles]),
        array([rate(e, e.tau, "bussi", "npt") for e in ensembles]),
        array([e.temperature * units.kB for e in ensembles]),
        array([e.pressure * units.GPa for e in ensembles]),
        array([e.compressibility / units.GPa * rate(e, e.tau_pressure, "npt") for e in ensembles]),
        array([e.degrees_of_freedom(n) for e, n in zip(ensembles, n_atoms, strict=True)]),
        np.asarray(hottest * units.kB, dtype),
    )


def thermal(atoms: ase.Atoms, temperature: float, *, seed: int) -> ase.Atoms:
    """A copy with velocities drawn from Maxwell and Boltzmann, the centre of mass at rest, scaled
    to exactly this temperature (K)."""
    copy = atoms.copy()
    rng = np.random.default_rng([seed, len(atoms)])
    masses = copy.get_masses()[:, None]
    velocities = rng.normal(size=(len(atoms), 3)) / np.sqrt(masses)
    if len(atoms) > 1:
        velocities -= (masses * velocities).sum(0) / masses.sum()
    degrees = nve().degrees_of_freedom(len(atoms))
    found = (masses * velocities**2).sum() / degrees
    copy.set_velocities(velocities * np.sqrt(units.kB * temperature / found))
    return copy
