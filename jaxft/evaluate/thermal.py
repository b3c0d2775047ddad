"""What follows from phonons at a temperature: C_V, S, F, thermal expansion, Slack's κ."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ase.units import _hplanck, _k

from jaxft.evaluate.crystals import Phonons, phonopy_api

CUTOFF = 1e-2
"""THz: modes below, imaginary ones among them, have no part in C_V, S and F."""

THERMAL_STEP = 10.0
"""K, between the temperatures that thermal expansion is a difference of."""

ACOUSTIC = 3


class Thermal(NamedTuple):
    """Per mole of primitive cells."""

    heat_capacity: np.ndarray
    """[temperatures] J/mol/K, at constant volume."""
    entropy: np.ndarray
    """[temperatures] J/mol/K."""
    free_energy: np.ndarray
    """[temperatures] kJ/mol, with the zero-point energy."""


class Expansion(NamedTuple):
    """In the quasi-harmonic approximation, at one temperature and no pressure."""

    volumetric: float
    """1e-6/K, (1/V) dV/dT."""
    volume: float
    """Å³ per primitive cell."""
    bulk_modulus: float
    """GPa, isothermal."""


def thermal(phonons: Phonons, mesh: list[int], temperatures: Sequence[float]) -> Thermal:
    """C_V, S and F of harmonic phonons, by phonopy; real modes above ``CUTOFF`` alone."""
    phonons.run_mesh(mesh)
    found = phonons.run_thermal_properties(
        temperatures=np.asarray(temperatures, float), cutoff_frequency=CUTOFF
    )
    return Thermal(
        np.array(found.heat_capacity), np.array(found.entropy), np.array(found.free_energy)
    )


def gruneisen(phonons: Phonons, larger: Phonons, smaller: Phonons, mesh: list[int]) -> float:
    """The root mean square of the acoustic modes' Grüneisen parameters, -d ln ω / d ln V.

    Args:
      phonons: at the volume V.
      larger: at V + ΔV.
      smaller: at V - ΔV.
      mesh: of q points.

    Returns:
      NaN where no acoustic mode is real.
    """
    phonopy_api()
    from phonopy import PhonopyGruneisen

    found = PhonopyGruneisen(phonons, larger, smaller)
    found.set_mesh(mesh)
    _, weights, frequencies, _, parameters = found.get_mesh()  # type: ignore[misc]
    is_real = frequencies[:, :ACOUSTIC] > CUTOFF
    weights = np.broadcast_to(np.asarray(weights, float)[:, None], is_real.shape)[is_real]
    squares = parameters[:, :ACOUSTIC][is_real] ** 2
    return float(np.sqrt(weights @ squares / weights.sum())) if len(weights) else float("nan")


def debye_temperature(frequencies: np.ndarray, weights: np.ndarray) -> float:
    """K, of the acoustic branches: (h/k_B) √(5/3 <ν²>).

    A Debye spectrum with the same second moment, as Slack takes it.

    Args:
      frequencies: [q, branches] THz, ascending.
      weights: [q].
    """
    acoustic = np.clip(frequencies[:, :ACOUSTIC], 0, None)
    moment = float(weights @ (acoustic**2).mean(axis=1) / weights.sum())
    return float(_hplanck * 1e12 / _k * np.sqrt(5 / 3 * moment))


def slack(
    gruneisen: float,
    debye: float,
    *,
    mass: float,
    volume: float,
    atoms: int,
    temperature: float,
) -> float:
    r"""Lattice thermal conductivity after Slack, W/m/K.

    .. math:: \kappa = \frac{A\,\bar M\,\theta_a^3\,\delta\,n^{1/3}}{\gamma^2 T},\quad
        A = \frac{2.43\cdot 10^{-6}}{1 - 0.514/\gamma + 0.228/\gamma^2}

    An estimate for θ_a and above, of crystals whose acoustic modes carry the heat.

    Args:
      gruneisen: γ of the acoustic modes.
      debye: θ_a of the acoustic modes, K.
      mass: the mean of the atoms', amu.
      volume: per atom, Å³; δ is its cube root.
      atoms: n, in the primitive cell.
      temperature: T, K.

    Reference: Slack, Solid State Physics 34, 1 (1979); A as Morelli and Slack, in High Thermal
    Conductivity Materials (Springer, 2006), eq. 2.8, after Julian, Phys. Rev. 137, A128 (1965).
    """
    factor = 2.43e-6 / (1 - 0.514 / gruneisen + 0.228 / gruneisen**2)
    delta = volume ** (1 / 3)
    return factor * mass * debye**3 * delta * atoms ** (1 / 3) / (gruneisen**2 * temperature)


def expansion(
    phonons: Sequence[Phonons], energies: Sequence[float], mesh: list[int], temperature: float
) -> Expansion | None:
    """Thermal expansion in the quasi-harmonic approximation, by phonopy, with Vinet's equation.

    Args:
      phonons: of one crystal at five volumes at least.
      energies: eV per primitive cell.
      mesh: of q points.
      temperature: K.

    Returns:
      None where the free energy has no minimum among the volumes.
    """
    phonopy_api()
    from phonopy import run_qha

    steps = np.array([-1, 0, 1, 2]) * min(THERMAL_STEP, 0.5 * temperature)
    order = np.argsort([one.primitive.volume for one in phonons])
    volumes = [phonons[i].primitive.volume for i in order]
    with warnings.catch_warnings():
        # of lattice parameters, which are not used; a volume out of range is looked for below
        warnings.filterwarnings("ignore", ".*are extrapolated")
        found = run_qha(
            [phonons[i] for i in order],
            temperature + steps,
            internal_energies=[energies[i] for i in order],
            mesh=mesh,
            exclude_gamma_acoustic=True,
        )
    if len(found.temperatures) < 2:
        return None
    volume = float(found.equilibrium_volumes[1])
    if not volumes[0] < volume < volumes[-1]:
        return None
    return Expansion(
        float(found.thermal_expansion[1]) * 1e6, volume, float(found.bulk_moduli[1]) * 160.21766208
    )
