"""A new bundle from a config: training files and an architecture in, random parameters out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from pydantic import AfterValidator, Field, model_validator
from rich.console import Console

from jaxft import bundle, data, scratch, surgery, tree
from jaxft import e0s as references
from jaxft.architecture import Architecture, architecture_of
from jaxft.config import checked, known_symbols, override, read_yaml
from jaxft.data import Frame, Keys
from jaxft.models.config import MACEConfig
from jaxft.potential import Potential
from jaxft.recipe import KeysConfig, Strict
from jaxft.typing import Params
from jaxft.version import __version__


class Shape(Strict):
    """What a new model looks like: an architecture, or that of a bundle, as it is or changed."""

    like: Path | None = None
    """A bundle whose architecture the new model has; keys of ``architecture`` change it."""
    head: str | None = None
    """Of ``like``, where it has several; the new model has that one alone."""
    architecture: dict[str, Any] = Field(default_factory=dict)
    """Keys of :class:`jaxft.architecture.Architecture`: hidden, layers, l_max, correlation, r_max,
    num_bessel, …; those left out are mace-torch's defaults, or those of ``like``."""
    elements: list[str] | None = None
    """By default those of the training frames; those of ``like``, where it is not changed."""
    scale: Literal["rms_forces"] | Annotated[float, Field(gt=0)] = "rms_forces"
    """eV, of the interaction energy; or the RMS force of the training frames."""
    shift: Literal["mean"] | float = "mean"
    """eV per atom; or the mean of the training frames. 0 is what mace-torch's --model=MACE has."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the parameters, as stored."""
    seed: int = Field(0, ge=0, lt=1 << 32)
    """Of the parameters."""

    @model_validator(mode="after")
    def _is_known(self) -> Shape:
        checked(Architecture, dict(self.architecture), "architecture")
        known_symbols(dict.fromkeys(self.elements or [], 0.0))
        if self.head is not None and self.like is None:
            raise ValueError("head is of `like`, and there is none")
        return self


class Scratch(Shape):
    """A new bundle."""

    train: list[Path] | Path
    """Labelled frames, for the statistics; those with config_type IsolatedAtom give E0s."""
    e0s: Annotated[
        Literal["isolated_atoms", "average", "like"] | dict[str, float],
        AfterValidator(known_symbols),
    ]
    """Isolated-atom energies: those of IsolatedAtom frames, a least-squares fit to total energies
    (it swallows cohesive energies), those of the bundle ``like``, or {symbol: eV}."""
    keys: KeysConfig = KeysConfig()


def read(words: Sequence[str], path: Path | None = None) -> Scratch:
    """The settings of a new bundle, from a file, if there is one, and ``key=value`` words."""
    document = {} if path is None else read_yaml(path, hint="docs/training.md")
    for word in words:
        override(document, word)
    return checked(Scratch, document, "the new model" if path is None else str(path))


def make(settings: Scratch, output: Path, *, console: Console | None = None) -> Path:
    """Write the bundle that the settings describe.

    Raises:
      FileExistsError: ``output`` exists.
      ValueError: the data or the bundle ``like`` do not suit the settings.
    """
    bundle.refuse_existing(output)
    frames = data.read(settings.train, keys=Keys(**settings.keys.model_dump()))
    like = template(settings)
    e0s = _e0s(settings, frames, like)
    model, params = drawn(settings, frames, e0s, like)
    provenance = {
        "made_by": f"jaxft {__version__}",
        "jax": jax.__version__,
        "scratch": settings.model_dump(mode="json"),
        "random": True,
    }
    bundle.save(output, model, params, provenance=provenance)
    if console is not None:
        console.print(f"{summary(model, params)}\nwrote {output}", highlight=False)
    return output


def template(settings: Shape) -> Potential | None:
    """The model whose architecture is to be taken, with one head and the elements asked for."""
    if settings.like is None:
        return None
    model, params, _ = bundle.load_numpy(settings.like)
    head = model.heads[model.head_index(settings.head)]
    model, params = surgery.select_head(model, params, head)
    if settings.elements is not None:
        model, params = surgery.select_elements(model, params, settings.elements)
    return model


def drawn(
    settings: Shape,
    frames: Sequence[Frame],
    e0s: Mapping[int, float],
    like: Potential | None = None,
) -> tuple[Potential, Params]:
    """The new model and its parameters, numpy, in the dtype asked for.

    Args:
      settings: its shape.
      frames: training frames.
      e0s: ``{atomic number: eV}``.
      like: from :func:`template`.
    """
    options: Any = {"scale": settings.scale, "shift": settings.shift, "seed": settings.seed}
    if like is not None and not settings.architecture:
        data.check_elements(data.without_isolated_atoms(frames), like.atomic_numbers)
        known = {z: e0 for z, e0 in e0s.items() if z in like.atomic_numbers}
        model, params = scratch.again(like, frames, e0s=known, **options)
    else:
        wanted = settings.elements
        elements = None if wanted is None else [atomic_numbers[symbol] for symbol in wanted]
        chosen = shape_of(settings, None if like is None else like.config)
        model, params = scratch.new(chosen, frames, e0s=e0s, elements=elements, **options)
    return bundle.cast(model, params, settings.dtype)


def shape_of(settings: Shape, like: MACEConfig | None) -> Architecture:
    """The architecture that is to be built."""
    base = {} if like is None else architecture_of(like).model_dump()
    return checked(Architecture, base | settings.architecture, "architecture")


def summary(model: Potential, params: Params) -> str:
    """One line on a new model."""
    config, count = model.config, sum(np.size(leaf) for leaf in tree.flatten(params).values())
    names = " ".join(chemical_symbols[z] for z in model.atomic_numbers)
    scale, shift = (float(getattr(model.constants, name)[0]) for name in ("scale", "shift"))
    return (
        f"{count} random parameters, {len(config.interactions)} layers of "
        f"{config.products[0].irreps_out}, {config.edge_irreps}, r_max {config.r_max:g} Å; "
        f"{names}\naverage neighbours {config.interactions[0].avg_num_neighbors:.4g}, "
        f"scale {scale:.4g} eV, shift {shift:.4g} eV/atom"
    )


def _e0s(settings: Scratch, frames: Sequence[Frame], like: Potential | None) -> dict[int, float]:
    if isinstance(settings.e0s, dict):
        return {atomic_numbers[symbol]: value for symbol, value in settings.e0s.items()}
    if settings.e0s == "average":
        return references.average(data.without_isolated_atoms(frames)).e0s
    if settings.e0s == "isolated_atoms":
        return data.isolated_atom_energies(frames)
    if like is None:
        raise ValueError("e0s: like needs the bundle `like`, and there is none.")
    return references.own_e0s(like, None)
