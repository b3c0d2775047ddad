"""Isolated-atom energies for training data of another level of theory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ase.data import chemical_symbols

from jaxft.data import Frame
from jaxft.evaluate.predictions import predict_frames
from jaxft.potential import Potential
from jaxft.typing import Params


class Estimate(NamedTuple):
    """Isolated-atom energies that suit a model and data, and how well the data determine them."""

    e0s: dict[int, float]
    """``{atomic number: eV}`` of the elements in the data."""
    rank: int
    """Of the composition matrix; below the number of elements, only sums are determined."""
    residual: float
    """RMS of what is left, eV/atom."""


def estimate(
    model: Potential, params: Params, frames: Sequence[Frame], *, head: str | None = None
) -> Estimate:
    r"""Model-aware estimate: the model's E0s plus the smallest change that absorbs its errors.

    .. math:: \min_{\Delta E_0} \sum_b (E_b - E^\mathrm{model}_b - n_b \cdot \Delta E_0)^2

    with n_b the composition of frame b, for the ΔE0 of smallest norm. With fewer independent
    compositions than elements (a single molecule) only sums are determined; read no chemistry into
    the values.

    Args:
      model, params: what will be fine-tuned.
      frames: with energies; the others are left out.
      head: of the model; not needed with one head.

    Raises:
      ValueError: no frame has an energy.

    Reference: ``--E0s=estimated`` of mace-torch; Tompa et al., arXiv:2606.12704.
    """
    frames = [frame for frame in frames if frame.energy is not None]
    if not frames:
        raise ValueError("E0s cannot be estimated: no frame has an energy; give them as numbers.")
    elements = sorted({int(z) for frame in frames for z in frame.atomic_numbers})
    counts = np.array([[(f.atomic_numbers == z).sum() for z in elements] for f in frames], float)
    results = predict_frames(model, params, frames, head=head)
    predicted = np.array([result.energy for result in results])
    error = np.array([frame.energy for frame in frames]) - predicted
    change, _, rank, _ = np.linalg.lstsq(counts, error, rcond=None)
    left = (error - counts @ change) / counts.sum(axis=1)
    own = dict(zip(model.atomic_numbers, model.e0s[model.head_index(head)], strict=True))
    e0s = {z: float(own[z] + d) for z, d in zip(elements, change, strict=True)}
    return Estimate(e0s, int(rank), float(np.sqrt(np.mean(left**2))))


def explain(found: Estimate) -> str:
    """What a person should know of an estimate."""
    names = " ".join(chemical_symbols[z] for z in found.e0s)
    text = (
        f"E0s estimated from the model's errors: {found.residual * 1e3:.1f} meV/atom are left; "
        f"rank {found.rank} of {len(found.e0s)} elements ({names})"
    )
    if found.rank < len(found.e0s):
        text += ", so only sums are determined and single values mean nothing"
    return text + "."
