"""What changes a model's structure or constants; pure, done once, before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from ase.data import chemical_symbols

from jaxft.potential import E0_BUFFER, Potential


def set_e0s(model: Potential, e0s: Mapping[int, float]) -> Potential:
    """The model with other isolated-atom energies; all other elements keep theirs.

    Forces and stresses do not change, energies change by Σ ΔE0.

    Args:
      model: the potential.
      e0s: ``{atomic number: eV}``.

    Raises:
      ValueError: an element is not in the model's table, or a value is not finite.
    """
    unknown = sorted(set(e0s) - set(model.atomic_numbers))
    if unknown:
        raise ValueError(
            f"E0s were given for {', '.join(chemical_symbols[z] for z in unknown)}, which the "
            f"model does not know; its elements are "
            f"{' '.join(chemical_symbols[z] for z in model.atomic_numbers)}."
        )
    wrong = [chemical_symbols[z] for z, e0 in e0s.items() if not np.isfinite(e0)]
    if wrong:
        raise ValueError(f"the E0s of {', '.join(wrong)} are not finite; give energies in eV.")
    table = np.array(model.buffers[E0_BUFFER], np.float64)
    row = table.reshape(-1)
    for z, e0 in e0s.items():
        row[model.atomic_numbers.index(z)] = e0
    return replace(model, buffers={**model.buffers, E0_BUFFER: table})


def set_scale_shift(model: Potential, *, scale: float, shift: float) -> Potential:
    """The model with another scale (eV) and shift (eV per atom) of its interaction energy.

    Raises:
      ValueError: a value is not finite, or the scale is not positive.
    """
    if not (np.isfinite([scale, shift]).all() and scale > 0):
        raise ValueError(f"scale={scale}, shift={shift}; use a positive scale and a finite shift.")
    values = {"scale_shift/scale": scale, "scale_shift/shift": shift}
    buffers = {name: np.full_like(model.buffers[name], value) for name, value in values.items()}
    return replace(model, buffers={**model.buffers, **buffers})
