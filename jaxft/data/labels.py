"""Labels and weights as files store them: shapes, units and signs checked, names of mace-torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ase
import numpy as np

AGREEMENT = 1e-3
"""Largest difference, relative to the largest component, between a stress and a virial of one
frame: files round them, but a sign, a factor of two or kbar is no rounding."""

NEGLIGIBLE = 1e-6
"""eV/Å³; stresses below it are rounding."""

WEIGHTS = {
    "weight": ("config_weight",),
    "energy_weight": ("config_energy_weight",),
    "forces_weight": ("config_forces_weight",),
    # a virial label is kept as a stress
    "stress_weight": ("config_stress_weight", "config_virials_weight"),
    "hessian_weight": ("config_hessian_weight",),
    "moments_weight": ("config_moments_weight",),
}
"""Weights of a frame and their names in ``info``, those of mace-torch, which knows no Hessians."""

ATOM_WEIGHTS = ("atom_weights", "atom_weight")
"""Names of the weights of single atoms in ``arrays``."""


def numbers(value: object, shape: tuple[int, ...], key: str, source: str) -> np.ndarray:
    """``value`` as float64 of this shape, or a ValueError that names key and frame."""
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {key!r} is {value!r:.60}; expected numbers.") from error
    if array.shape != shape:
        raise ValueError(f"{source}: {key!r} has shape {array.shape}; expected {shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{source}: {key!r} holds NaN or infinity; remove the label or the frame.")
    return array


def tensor(value: object, key: str, source: str) -> np.ndarray:
    """[3, 3] from 3x3, 9 numbers, or Voigt xx, yy, zz, yz, xz, xy."""
    shape = np.shape(np.asarray(value))
    if shape == (6,):
        xx, yy, zz, yz, xz, xy = numbers(value, (6,), key, source)
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    if shape == (9,):
        return numbers(value, (9,), key, source).reshape(3, 3)
    return numbers(value, (3, 3), key, source)


def moments_of(value: object, n: int, key: str, source: str) -> np.ndarray:
    """[n] or [n, 3] µB."""
    shape = np.shape(np.asarray(value))
    if shape not in ((n,), (n, 3)):
        raise ValueError(
            f"{source}: {key!r} has shape {shape}; expected ({n},) or ({n}, 3), a magnetic moment "
            "in µB for each atom."
        )
    return numbers(value, shape, key, source)


def stress_from_virials(
    stress: np.ndarray | None,
    virials: np.ndarray,
    volume: float,
    names: tuple[str, str],
    source: str,
) -> np.ndarray:
    """Stress in eV/Å³ (ASE sign) of virials in eV, −V σ; a stress given too must agree.

    Raises:
      ValueError: it does not agree, or the cell is flat.
    """
    if volume == 0:
        raise ValueError(f"{source} has {names[1]!r} but a cell of volume 0; set cell or pbc.")
    found = -virials / volume
    if stress is None:
        return found
    scale = max(np.abs(stress).max(), np.abs(found).max())
    if np.abs(stress - found).max() > AGREEMENT * scale + NEGLIGIBLE:
        raise ValueError(
            f"{source}: {names[0]!r} is {_short(stress)} eV/Å³, but −{names[1]!r}/V is "
            f"{_short(found)}; expected the same stress (positive under tension).\n"
            "Repair one of them, or name the key of the right one and leave the other out."
        )
    return stress


def _short(matrix: np.ndarray) -> str:
    return np.array2string(matrix.reshape(9), precision=4, separator=", ", max_line_width=200)


def weights_of(atoms: ase.Atoms, source: str) -> dict[str, Any]:
    """The weights of a frame that its ``info`` gives, by their names in ``WEIGHTS``."""
    found = {}
    for name, keys in WEIGHTS.items():
        if (value := _only(atoms.info, keys, source)) is not None:
            found[name] = float(numbers(value, (), keys[0], source))
    return found


def atom_weights_of(atoms: ase.Atoms, source: str) -> np.ndarray | None:
    """[n] weights of single atoms, or None where ``arrays`` has none."""
    value = _only(atoms.arrays, ATOM_WEIGHTS, source)
    return None if value is None else numbers(value, (len(atoms),), ATOM_WEIGHTS[0], source)


def _only(told: Mapping[str, Any], keys: tuple[str, ...], source: str) -> Any:
    """What is said under one of several names of one thing; None if nothing."""
    given = {key: told[key] for key in keys if key in told}
    values = list(given.values())
    if any(not np.array_equal(values[0], other) for other in values[1:]):
        raise ValueError(f"{source} says {given}; expected one value, keep one of them.")
    return values[0] if values else None


def check_weight(value: object, name: str, source: str) -> None:
    """Raises ValueError unless all of ``value`` is finite and not negative."""
    array = np.asarray(value, np.float64)
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(
            f"{source}: {name} is {value!r:.60}; expected finite numbers >= 0 "
            "(0 leaves a label out, 2 counts it twice)."
        )
