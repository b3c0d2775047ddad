"""The same for any ASE calculator: ASE's own integrators, one replica after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ase
import numpy as np
from ase import units
from ase.calculators.calculator import Calculator
from ase.data import covalent_radii
from ase.stress import voigt_6_to_full_3x3_stress

from jaxft.data import unlabelled
from jaxft.data.neighbours import neighbours
from jaxft.md.ensembles import Ensemble
from jaxft.md.limits import NOT_FINITE, TOO_CLOSE, TOO_HOT, Limits
from jaxft.md.trajectory import Ended, Recorder, Trajectory


def run_serial(
    calculator: Calculator,
    atoms: ase.Atoms,
    ensemble: Ensemble,
    *,
    timestep: float,
    steps: int,
    interval: int = 10,
    seed: int = 0,
    limits: Limits | None = None,
    began: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Trajectory:
    """As :meth:`jaxft.md.Simulation.run`, for one replica and through ASE.

    ``nve`` is ``VelocityVerlet``, ``langevin`` ASE's Langevin, ``bussi`` its Bussi thermostat, and
    ``npt`` is ``IsotropicMTKNPT``: the ensembles are those of :class:`Simulation`, the trajectories
    of the last three are not. Whatever error the calculator raises ends the replica. ``began`` is
    the time of the first frame, ps.
    """
    limits = limits or Limits()
    moving = atoms.copy()
    moving.calc = calculator
    recorder = Recorder(atoms.copy(), ensemble.degrees_of_freedom(len(atoms)))
    ended, done, unit = None, 0, timestep / 1000
    try:
        dynamics = _dynamics(moving, ensemble, timestep, seed)
        for done, _ in enumerate(dynamics.irun(steps)):
            reason = _unsound(moving, limits, recorder.degrees)
            if reason is not None:
                ended = Ended(began + done * unit, reason)
                break
            if done % interval == 0:
                _record(recorder, moving, began + done * unit)
            if progress is not None:
                progress(done, steps)
    except Exception as error:  # a stranger's code: its failure is what is to be reported
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        ended = Ended(began + (done + 1) * unit if recorder.frames else began, why)
    return recorder.trajectory(ended, max(done - (ended is not None), 0))


def _dynamics(atoms: ase.Atoms, ensemble: Ensemble, timestep: float, seed: int) -> Any:
    from ase.md.bussi import Bussi
    from ase.md.langevin import Langevin
    from ase.md.nose_hoover_chain import IsotropicMTKNPT
    from ase.md.verlet import VelocityVerlet

    step, tau, kelvin = timestep * units.fs, ensemble.tau * units.fs, ensemble.temperature
    rng = np.random.default_rng(seed)
    if ensemble.name == "nve":
        return VelocityVerlet(atoms, step)
    if ensemble.name == "langevin":
        return Langevin(atoms, step, temperature_K=kelvin, friction=1 / tau, fixcm=False, rng=rng)
    if ensemble.name == "bussi":
        return Bussi(atoms, step, temperature_K=kelvin, taut=tau, rng=rng)
    return IsotropicMTKNPT(
        atoms,
        step,
        temperature_K=kelvin,
        pressure_au=ensemble.pressure * units.GPa,
        tdamp=tau,
        pdamp=ensemble.tau_pressure * units.fs,
    )


def _unsound(atoms: ase.Atoms, limits: Limits, degrees: int) -> str | None:
    kinetic = atoms.get_kinetic_energy()
    forces = atoms.get_forces(md=True)
    if not np.isfinite(kinetic + atoms.get_potential_energy() + forces.sum()):
        return limits.describe(NOT_FINITE)
    if 2 * kinetic > max(degrees, 1) * limits.temperature * units.kB:
        return limits.describe(TOO_HOT)
    radii = limits.distance * covalent_radii[atoms.numbers]
    if limits.distance > 0:
        near = neighbours(unlabelled(atoms), float(2 * radii.max()))
        least = radii[near.senders] + radii[near.receivers]
        if (np.linalg.norm(near.vectors, axis=1) < least).any():
            return limits.describe(TOO_CLOSE)
    return None


def _record(recorder: Recorder, atoms: ase.Atoms, time: float) -> None:
    stress = None
    if atoms.pbc.all() and "stress" in atoms.calc.implemented_properties:
        stress = voigt_6_to_full_3x3_stress(atoms.get_stress())
    recorder.add(
        time,
        atoms.positions.copy(),
        atoms.get_velocities(),
        atoms.cell.array.copy(),
        atoms.get_potential_energy(),
        stress,
    )
