"""Training from scratch: random parameters, with the statistics that an initial model needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jaxft import bundle, data, e0s, inputs, surgery
from jaxft.config import Config
from jaxft.data import Frame
from jaxft.data.neighbours import neighbours
from jaxft.potential import Potential


def write(config: Config, like: Path, output: Path) -> Path:
    """A bundle of the architecture of another, with random parameters.

    Args:
      config: gives the training frames, among them isolated atoms if there are any, and the seed.
      like: bundle of the architecture and its elements.
      output: of the new bundle.

    Raises:
      ValueError: input that cannot be used.
    """
    model, _ = bundle.load(like, dtype=config.parameter_dtype)
    frames, _ = inputs.labelled_frames(config)
    model = with_statistics(model, frames)
    about = {"random": f"seed {config.seed}", "like": str(like), "frames": len(frames)}
    return bundle.save(output, model, model.init(jax.random.key(config.seed)), provenance=about)


def with_statistics(model: Potential, frames: list[Frame]) -> Potential:
    """The model with statistics of frames, as mace-torch begins.

    E0s are those of isolated atoms where the frames hold them, else averages; scale is the RMS
    force, shift the mean energy per atom beyond E0s; the number of neighbours is the mean.

    Raises:
      ValueError: no frame has forces or none an energy; or an element is unknown to the model.
    """
    found = data.isolated_atom_energies(frames)
    frames = data.without_isolated_atoms(frames)
    model = surgery.set_e0s(model, found or e0s.average(frames).e0s)
    table = e0s.own_e0s(model, None)
    given = e0s.energies_of(e0s.with_energy(frames))
    atoms = given.counts.sum(axis=1)
    interaction = given.total - given.counts @ [table[z] for z in given.elements]
    forces = [frame.forces.ravel() for frame in frames if frame.forces is not None]
    if not forces:
        raise ValueError("a model from scratch needs forces for its scale, and no frame has any.")
    model = surgery.set_scale_shift(
        model,
        scale=float(np.sqrt(np.mean(np.concatenate(forces) ** 2))),
        shift=float(np.mean(interaction / atoms)),
    )
    counts = [np.bincount(neighbours(frame, model.r_max).receivers) for frame in frames]
    mean = float(np.concatenate([count[count > 0] for count in counts]).mean())
    blocks = [b.model_copy(update={"avg_num_neighbors": mean}) for b in model.config.interactions]
    return replace(model, config=model.config.model_copy(update={"interactions": tuple(blocks)}))
