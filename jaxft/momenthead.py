"""The head for magnetic moments is added and removed; part of :mod:`jaxft.surgery`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from ase.data import chemical_symbols

from jaxft import tree
from jaxft.models.config import MACEConfig, MomentsConfig
from jaxft.potential import MEANS_BUFFER, Potential
from jaxft.typing import Array, Params

SMALLEST_MOMENT = 0.01
"""µB; a head for magnitudes begins there where an element's mean is smaller: from 0 no gradient
would lead away."""

STARTS = {"linear_2/0e": 0.0, "onsite": 0.0, "exchange_radial/layer1": 0.0, "exchange_bias": 1.0}
"""What leaves of a moment head begin at; the others are random."""


def add_moments(
    model: Potential,
    params: Params,
    *,
    kind: str = "collinear",
    means: Mapping[int, float] | None = None,
    energy: bool = False,
    hidden: int = 16,
    channels: int = 8,
    seed: int = 0,
) -> tuple[Potential, Params]:
    """A head for magnetic moments, on the features that the model has; one for all of its heads.

    Its leaves lie under ``moments/``, to be frozen or trained by pattern like any other; see
    :mod:`jaxft.models.moments` for what they do. Energies, forces and stresses do not change, with
    ``energy`` either: that part begins at zero. Magnitudes and signed moments begin at ``means``
    (magnitudes at ``SMALLEST_MOMENT`` at least). Vectors begin at an arbitrary mixture, scaled by
    the means: zero would have no direction to grow in.

    Args:
      model: the potential.
      params: its parameters, numpy or jax.
      kind: ``collinear`` for magnitudes, ``signed``, or ``vector``.
      means: ``{atomic number: mean |µ| in µB}``, :func:`jaxft.data.mean_moments` of the training
        frames; 0 for elements left out. They are kept with the model, as what its predictions have
        to beat.
      energy: moments add to the energy.
      hidden: scalars of the hidden layer.
      channels: products of vectors, and terms of the exchange.
      seed: of the random leaves.

    Raises:
      ValueError: the model has such a head already; ``kind`` is unknown, or ``vector`` for a model
        without hidden vectors; an element of ``means`` is unknown, or a mean is negative.
    """
    if model.moments is not None:
        raise ValueError(
            f"the model has a head for {model.moments.kind} moments already;\ntrain that one, or "
            "remove it first (jaxft.surgery.remove_moments)."
        )
    known = get_args(MomentsConfig.model_fields["kind"].annotation)
    if kind not in known:
        raise ValueError(f"kind={kind!r} is unknown; use {', '.join(map(repr, known))}.")
    if kind == "vector" and not model.config.has_vectors:
        layers = ", ".join(product.irreps_out for product in model.config.products)
        raise ValueError(
            "a head for vector moments couples two hidden vectors (1o), and the layers of this "
            f"model hold {layers};\nuse kind='collinear', or a model with hidden vectors, such as "
            "the medium ones of MACE-MP."
        )
    means = means or {}
    unknown = [chemical_symbols[z] for z in means if z not in model.atomic_numbers]
    if unknown:
        raise ValueError(
            f"mean moments were given for {', '.join(unknown)}, which the model does not know; "
            "leave them out, or start from a model that covers these elements."
        )
    wrong = [chemical_symbols[z] for z, m in means.items() if not (np.isfinite(m) and m >= 0)]
    if wrong:
        raise ValueError(f"mean moments of {', '.join(wrong)} are no magnitudes; give µB >= 0.")
    table = np.array([float(means.get(z, 0.0)) for z in model.atomic_numbers])
    spec = {"kind": kind, "energy": energy, "hidden": hidden, "channels": channels}
    model = replace(
        model,
        config=_changed(model.config, spec),
        buffers={**model.buffers, MEANS_BUFFER: table},
    )
    return model, {**params, "moments": _new_moments(model, params, table, seed)}


def remove_moments(model: Potential, params: Params) -> tuple[Potential, Params]:
    """The model without its head for magnetic moments; what it was before where there is none.

    Raises:
      ValueError: the moments add to the energy, which would change.
    """
    if model.moments is None:
        return model, params
    if model.moments.energy:
        raise ValueError(
            "the model's magnetic moments add to its energy, so without them (for mace-torch, say, "
            "which has no counterpart) it would be another model;\nonly a head without an energy "
            "part (energy=False) can be removed: fine-tune with one for that."
        )
    buffers = {name: value for name, value in model.buffers.items() if name != MEANS_BUFFER}
    config = _changed(model.config, None)
    rest = {name: branch for name, branch in params.items() if name != "moments"}
    return replace(model, config=config, buffers=buffers), rest


def _new_moments(model: Potential, params: Params, means: np.ndarray, seed: int) -> Params:
    assert model.moments is not None
    shapes = tree.flatten(jax.eval_shape(lambda: model.init(jax.random.key(0))["moments"]))
    some = jax.tree.leaves(params)[0]
    rng = np.random.default_rng([seed, len(shapes)])
    start = np.maximum(means, SMALLEST_MOMENT)
    if model.moments.kind == "collinear":
        start = np.log(np.expm1(start))
    elif model.moments.kind == "signed":
        start = means
    found: dict[str, Array] = {}
    for path, shape in sorted(shapes.items()):
        if path == "bias":
            leaf = np.broadcast_to(start[:, None], shape.shape)
        elif path in STARTS:
            leaf = np.full(shape.shape, STARTS[path])
        else:
            leaf = rng.normal(size=shape.shape)
        leaf = np.array(leaf, some.dtype)
        found[path] = jnp.asarray(leaf) if isinstance(some, jax.Array) else leaf
    return tree.unflatten(found)


def _changed(config: MACEConfig, moments: Mapping[str, Any] | None) -> MACEConfig:
    return MACEConfig.model_validate(config.model_dump() | {"moments": moments})
