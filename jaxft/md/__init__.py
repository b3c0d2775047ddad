"""Molecular dynamics on the device, and what is measured of trajectories."""

from jaxft.md.ensembles import Ensemble, bussi, ensemble_of, langevin, npt, nve, thermal
from jaxft.md.limits import Limits
from jaxft.md.simulation import Simulation
from jaxft.md.trajectory import Ended, Trajectory

__all__ = [
    "Ended",
    "Ensemble",
    "Limits",
    "Simulation",
    "Trajectory",
    "bussi",
    "ensemble_of",
    "langevin",
    "npt",
    "nve",
    "thermal",
]
