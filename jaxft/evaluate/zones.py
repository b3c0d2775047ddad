"""What is looked at of phonons, the same for a model and a reference: numbers, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.evaluate.crystals import Phonons
from jaxft.evaluate.finding import Line, Picture, Value
from jaxft.evaluate.spectra import (
    Bands,
    Spectrum,
    acoustic_velocities,
    at_points_of,
    bands,
    common_grid,
    curvature_slope,
    density_of_states,
    distance,
    dos_error,
    mean_error,
    mesh_numbers,
    spectrum,
    standard_path,
)
from jaxft.evaluate.thermal import Thermal, thermal

REFERENCE = "reference"
"""The model of rows and lines that hold a reference's numbers."""

UNITS = {
    "omega_max": "THz",
    "omega_mean": "THz",
    "omega_min": "THz",
    "stable": "",
    "mae": "THz",
    "omega_max_bias": "%",
    "w1": "THz",
    "dos_error": "%",
    "curvature_slope": "",
    "force_rmse": "meV/Å",
    "sum_rule": "eV/Å²",
    "slowest_sound": "km/s",
    "fastest_sound": "km/s",
    "heat_capacity": "J/mol/K",
    "entropy": "J/mol/K",
    "free_energy": "kJ/mol",
    "heat_capacity_error": "J/mol/K",
    "entropy_error": "J/mol/K",
    "free_energy_error": "kJ/mol",
    "gruneisen": "",
    "debye": "K",
    "slack_kappa": "W/m/K",
    "kappa": "W/m/K",
    "kappa_lowest": "W/m/K",
    "kappa_highest": "W/m/K",
    "kappa_srd": "",
    "kappa_srme": "",
    "expansion": "1e-6/K",
    "volume": "Å³",
    "bulk_modulus": "GPa",
    "crystals": "",
    "imaginary_precision": "",
    "imaginary_recall": "",
}
"""Columns; thermal ones are per mole of primitive cells, ``volume`` is that of one."""


@dataclass(frozen=True, eq=False)
class Zone:
    """Where phonons of a crystal are looked at, in reduced coordinates: the same for everybody."""

    mesh: list[int]
    path: Any


@dataclass(frozen=True, eq=False)
class View:
    """Phonons, and what is seen of them."""

    phonons: Phonons
    spectrum: Spectrum
    bands: Bands
    thermal: Thermal

    @property
    def lowest(self) -> float:
        """THz, on the mesh and along the path."""
        return float(min(self.spectrum.frequencies.min(), np.nanmin(self.bands.frequencies)))

    @property
    def highest(self) -> float:
        """THz, on the mesh and along the path."""
        return float(max(self.spectrum.frequencies.max(), np.nanmax(self.bands.frequencies)))


def zone_of(phonons: Phonons, length: float) -> Zone:
    """A mesh after phonopy's measure ``length`` in Å, and the standard path."""
    return Zone(mesh_numbers(phonons, length), standard_path(phonons))


def view_of(phonons: Phonons, zone: Zone, temperatures: Sequence[float]) -> View:
    """Of phonons with force constants."""
    return View(
        phonons,
        spectrum(phonons, zone.mesh),
        bands(phonons, zone.path),
        thermal(phonons, zone.mesh, temperatures),
    )


def own_values(view: View, tolerance: float) -> dict[str, Value]:
    """What needs no reference; stable is a lowest frequency above -``tolerance`` THz."""
    velocities = acoustic_velocities(view.phonons)
    return {
        "omega_max": view.highest,
        "omega_mean": view.spectrum.average,
        "omega_min": view.lowest,
        "stable": view.lowest > -tolerance,
        "slowest_sound": float(velocities.min()),
        "fastest_sound": float(velocities.max()),
    }


def compared(ours: View, theirs: View, zone: Zone) -> dict[str, Value]:
    """What is off; see ``docs/evaluate/phonons.md`` for the definitions."""
    same = at_points_of(ours.phonons, theirs.spectrum)
    grid = common_grid(ours.spectrum, theirs.spectrum)
    densities = [density_of_states(v.phonons, zone.mesh, grid) for v in (ours, theirs)]
    return {
        "mae": mean_error(same, theirs.spectrum),
        "omega_max_bias": 100 * (ours.highest / theirs.highest - 1),
        "w1": distance(same, theirs.spectrum),
        "dos_error": dos_error(*densities),
        "curvature_slope": curvature_slope(ours.phonons, theirs.phonons, theirs.spectrum),
    }


def thermal_values(view: View, place: int, theirs: View | None = None) -> dict[str, Value]:
    """C_V, S and F at one of the temperatures, and how far they are from a reference's."""
    found: dict[str, Value] = {}
    for name in Thermal._fields:
        value = float(getattr(view.thermal, name)[place])
        found[name] = value
        if theirs is not None:
            found[f"{name}_error"] = value - float(getattr(theirs.thermal, name)[place])
    return found


def pictures(
    name: str, views: Mapping[str, View], reference: View | None, zone: Zone
) -> list[Picture]:
    """Bands along the path, the density of states and the heat capacity of one crystal."""
    every = ({REFERENCE: reference} if reference is not None else {}) | dict(views)
    if not every:
        return []
    grid = common_grid(*(view.spectrum for view in every.values()))
    temperatures = np.linspace(0, 600, 61)[1:].tolist()
    lines: dict[str, list[Line]] = {"bands": [], "dos": [], "heat": []}
    for label, view in every.items():
        is_reference = label == REFERENCE and view is reference
        # all paths are drawn as long as that of the first: cells may be relaxed
        x = next(iter(every.values())).bands.distances
        for branch in view.bands.frequencies.T:
            lines["bands"].append(Line(label, x, branch, is_reference=is_reference))
        density = density_of_states(view.phonons, zone.mesh, grid)
        lines["dos"].append(Line(label, grid, density, is_reference=is_reference))
        heat = thermal(view.phonons, zone.mesh, temperatures).heat_capacity
        lines["heat"].append(Line(label, temperatures, heat, is_reference=is_reference))
    ticks = next(iter(every.values())).bands.ticks
    return [
        Picture(f"{name}: phonons", "", "frequency, THz", tuple(lines["bands"]), ticks=ticks),
        Picture(f"{name}: density of states", "frequency, THz", "states/THz", tuple(lines["dos"])),
        Picture(f"{name}: heat capacity", "temperature, K", "C_V, J/mol/K", tuple(lines["heat"])),
    ]
