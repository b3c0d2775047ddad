"""What changes a model's structure or constants; pure, done once, before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from ase.data import chemical_symbols

from jaxft.potential import E0_BUFFER, Potential


def set_e0s(model: Potential, e0s: Mapping[int, float], *, head: str | None = None) -> Potential:
    """The model with other isolated-atom energies; all other elements keep theirs.

    Forces and stresses do not change, energies change by Σ ΔE0.

    Args:
      model: the potential.
      e0s: ``{atomic number: eV}``.
      head: whose; not needed with one head.

    Raises:
      ValueError: the head is unknown, an element is not in the model's table, or a value is not
        finite.
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
    row = table.reshape(len(model.heads), -1)[model.head_index(head)]
    for z, e0 in e0s.items():
        row[model.atomic_numbers.index(z)] = e0
    return replace(model, buffers={**model.buffers, E0_BUFFER: table})


def set_scale_shift(
    model: Potential, *, scale: float, shift: float, head: str | None = None
) -> Potential:
    """The model with another scale (eV) and shift (eV per atom) of its interaction energy.

    Raises:
      ValueError: a value is not finite, the scale is not positive, the head is unknown, or the
        model is a plain MACE, which has neither.
    """
    if "scale_shift/scale" not in model.buffers:
        raise ValueError("a plain MACE has no scale and shift; only ScaleShiftMACE models do.")
    index = model.head_index(head)
    if not (np.isfinite([scale, shift]).all() and scale > 0):
        raise ValueError(f"scale={scale}, shift={shift}; use a positive scale and a finite shift.")
    values = {"scale_shift/scale": scale, "scale_shift/shift": shift}
    buffers = {}
    for name, value in values.items():
        buffers[name] = np.array(model.buffers[name])
        buffers[name].reshape(-1)[index] = value
    return replace(model, buffers={**model.buffers, **buffers})
