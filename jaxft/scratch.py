"""Models to be trained from scratch: random parameters, statistics of the training data.

Three numbers make a random MACE start near its data: messages are divided by the average number of
neighbours, the interaction energy is multiplied by the RMS force, and its mean per atom is added.
With the isolated-atom energies they are constants of the model and never trained.

Reference: ``mace_run_train`` of mace-torch with ``--scaling=rms_forces_scaling``
(``compute_avg_num_neighbors``, ``compute_mean_rms_energy_forces`` in ``mace/modules/utils.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import jax
import numpy as np
from ase.data import chemical_symbols

from jaxft import surgery
from jaxft.architecture import Architecture, build
from jaxft.data import Frame, has_label, without_isolated_atoms
from jaxft.data.workers import neighbour_lists
from jaxft.models.config import MACEConfig
from jaxft.potential import Potential
from jaxft.typing import Params

Scale = Literal["rms_forces"] | float
Shift = Literal["mean"] | float


class Statistics(NamedTuple):
    """Of training frames, for a model's constants."""

    avg_num_neighbors: float
    """Mean over all atoms that have a neighbour."""
    scale: float
    """eV: the RMS of the force components, in eV/Å."""
    shift: float
    """eV per atom: mean over the frames of (E - ΣE0) / atoms."""


def statistics(
    frames: Sequence[Frame],
    r_max: float,
    e0s: Mapping[int, float],
    *,
    scale: Scale = "rms_forces",
    shift: Shift = "mean",
) -> Statistics:
    """What mace-torch takes from its training set.

    Args:
      frames: with labels; isolated atoms are left out.
      r_max: Å.
      e0s: ``{atomic number: eV}``.
      scale: ``rms_forces``, or eV.
      shift: ``mean`` (mace-torch's ``--model=ScaleShiftMACE``), or eV per atom; 0 is its
        ``--model=MACE``.

    Raises:
      ValueError: there are no frames, none has a label that is needed, an E0 is missing, no atom
        has a neighbour, or all forces are zero.
    """
    fitted = without_isolated_atoms(frames)
    if not fitted:
        raise ValueError("there are no frames but isolated atoms; give labelled structures.")
    counts = [np.bincount(edges.receivers) for edges in neighbour_lists(fitted, r_max)]
    some = np.concatenate([count[count > 0] for count in counts])
    if not len(some):
        raise ValueError(f"no atom has a neighbour within r_max={r_max} Å; raise r_max.")
    return Statistics(
        float(some.mean()),
        _rms_force(fitted) if scale == "rms_forces" else float(scale),
        _mean_energy(fitted, e0s) if shift == "mean" else float(shift),
    )


def _rms_force(frames: Sequence[Frame]) -> float:
    forces = [f.forces for f in frames if f.forces is not None and has_label(f, "forces")]
    if not forces:
        raise ValueError("no frame has forces, so there is no RMS force; give scale in eV.")
    rms = float(np.sqrt(np.mean(np.concatenate(forces) ** 2)))
    if rms == 0:
        raise ValueError("all forces are zero, so there is no RMS force; give scale in eV.")
    return rms


def _mean_energy(frames: Sequence[Frame], e0s: Mapping[int, float]) -> float:
    known = [f for f in frames if f.energy is not None and has_label(f, "energy")]
    if not known:
        raise ValueError("no frame has an energy, so there is no mean; give shift in eV per atom.")
    present = {int(z) for frame in known for z in frame.atomic_numbers}
    if missing := sorted(present - set(e0s)):
        raise ValueError(
            f"the E0s of {', '.join(chemical_symbols[z] for z in missing)} are missing; "
            "give one for every element."
        )
    own = [sum(e0s[int(z)] for z in frame.atomic_numbers) for frame in known]
    return float(
        np.mean([(f.energy - e0) / len(f) for f, e0 in zip(known, own, strict=True)])  # type: ignore[operator]
    )


def new(
    architecture: Architecture,
    frames: Sequence[Frame],
    *,
    e0s: Mapping[int, float],
    elements: Iterable[int] | None = None,
    scale: Scale = "rms_forces",
    shift: Shift = "mean",
    seed: int = 0,
) -> tuple[Potential, Params]:
    """A model with random parameters and the statistics of its training frames.

    Args:
      architecture: see there.
      frames: training frames.
      e0s: ``{atomic number: eV}`` of all elements.
      elements: atomic numbers; by default those of the frames; isolated atoms are not counted.
      scale, shift: see :func:`statistics`.
      seed: of the parameters, which have mace-torch's initial distributions.

    Returns:
      The model, and float32 parameters.

    Raises:
      ValueError: as :func:`statistics`; or the frames hold other elements.

    Example:
      >>> from ase.build import molecule
      >>> frame = jaxft.data.from_atoms(molecule("H2O"))
      >>> model, params = new(
      ...     Architecture(hidden="4x0e", l_max=1), [frame], e0s={1: -13.6, 8: -432.0},
      ...     scale=1.0, shift=0.0,
      ... )
      >>> model.config.interactions[0].avg_num_neighbors
      2.0
    """
    present = {int(z) for f in without_isolated_atoms(frames) for z in f.atomic_numbers}
    chosen = sorted(present if elements is None else {int(z) for z in elements})
    if missing := sorted(present - set(chosen)):
        raise ValueError(
            f"the frames hold {', '.join(chemical_symbols[z] for z in missing)}, which the model "
            "is not to know; add it to the elements, or leave those frames out."
        )
    if missing := sorted(set(chosen) - set(e0s)):
        raise ValueError(
            f"the E0s of {', '.join(chemical_symbols[z] for z in missing)} are missing; "
            "give one for every element."
        )
    found = statistics(frames, architecture.r_max, e0s, scale=scale, shift=shift)
    model = build(
        architecture,
        chosen,
        avg_num_neighbors=found.avg_num_neighbors,
        e0s=e0s,
        scale=found.scale,
        shift=found.shift,
    )
    return model, randomised(model, seed)


def again(
    model: Potential,
    frames: Sequence[Frame],
    *,
    e0s: Mapping[int, float],
    scale: Scale = "rms_forces",
    shift: Shift = "mean",
    seed: int = 0,
) -> tuple[Potential, Params]:
    """The same architecture, whatever it is, with new parameters, statistics and E0s.

    Arguments and errors as :func:`new`; elements without an E0 keep the model's.
    """
    if len(model.heads) > 1:
        raise ValueError(
            f"the model has the heads {', '.join(map(repr, model.heads))}; select one first."
        )
    own = dict(zip(model.atomic_numbers, model.e0s[0].tolist(), strict=True)) | dict(e0s)
    found = statistics(frames, model.r_max, own, scale=scale, shift=shift)
    model = surgery.set_e0s(model, e0s)
    if model.config.family == "ScaleShiftMACE":
        model = surgery.set_scale_shift(model, scale=found.scale, shift=found.shift)
    model = replace(model, config=_with_neighbours(model.config, found.avg_num_neighbors))
    return model, randomised(model, seed)


def _with_neighbours(config: MACEConfig, average: float) -> MACEConfig:
    blocks = [
        block.model_copy(update={"avg_num_neighbors": average}) for block in config.interactions
    ]
    return config.model_copy(update={"interactions": tuple(blocks)})


def randomised(model: Potential, seed: int) -> Params:
    """Parameters of a model, drawn anew; float32."""
    with jax.enable_x64(False):  # the same numbers whatever JAX is set to
        params: Params = jax.jit(model.init)(jax.random.key(seed))
    return params
