"""Random parameters of a base's architecture for one cell, with statistics of its frames."""

from __future__ import annotations

from pathlib import Path

from jaxft import bundle, data, e0s, inputs, scratch
from jaxft.config import Config


def write(config: Config, like: Path, output: Path) -> Path:
    """A bundle of the architecture of another, with random parameters.

    E0s are those of isolated atoms where the training files hold one of every element, else
    averages.

    Args:
      config: gives the training frames and the seed.
      like: bundle of the architecture and its elements.
      output: of the new bundle.

    Raises:
      ValueError: input that cannot be used.
    """
    model, _, _ = bundle.load_numpy(like)
    frames, _ = inputs.labelled_frames(config)
    fitted = data.without_isolated_atoms(frames)
    data.check_elements(fitted, model.atomic_numbers)
    known = data.isolated_atom_energies(frames)
    if not {int(z) for frame in fitted for z in frame.atomic_numbers} <= set(known):
        known = e0s.average(fitted).e0s
    model, params = scratch.again(model, fitted, e0s=known, seed=config.seed)
    about = {"random": True, "seed": config.seed, "like": str(like), "frames": len(fitted)}
    return bundle.save(
        output, *bundle.cast(model, params, config.parameter_dtype), provenance=about
    )
