"""What a model reads of a frame besides elements and positions: charge, spin, …"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxft.data.frames import Frame
from jaxft.typing import Feature

USUAL = {"total_charge": ("charge", 0), "total_spin": ("spin", 1)}
"""Other names of features, and what they are where a frame is silent, as in mace-torch: a neutral
singlet. All other features must be given."""


def feature_of(frame: Frame, feature: Feature) -> np.ndarray:
    """What a frame says of a feature, checked: [], or [n, …]."""
    name, (alias, default) = feature.name, USUAL.get(feature.name, (feature.name, None))
    told: Mapping[str, object] = frame.features if feature.per == "graph" else frame.atom_features
    given = {key: told[key] for key in (name, alias) if key in told}
    try:
        values = [np.asarray(value, np.float64) for value in given.values()]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{frame.source} says {given}; expected numbers.") from error
    if not values and default is None:
        raise ValueError(
            f"{frame.source} has no {name!r}, which the model reads; set it in atoms."
            f"{'info' if feature.per == 'graph' else 'arrays'}[{name!r}]."
        )
    value = values[0] if values else np.asarray(default, np.float64)
    if any(not np.array_equal(value, other) for other in values[1:]):
        raise ValueError(f"{frame.source} says {given}; expected the same under both names.")
    shape: tuple[int, ...] = () if feature.per == "graph" else (len(frame),)
    wide = (*shape, feature.in_dim) if feature.in_dim > 1 else shape
    if value.size != np.prod(wide, dtype=int) or value.shape[: len(shape)] != shape:
        raise ValueError(
            f"{frame.source}: {name!r} has shape {value.shape}; expected {wide} "
            f"(per {'frame' if feature.per == 'graph' else 'atom'})."
        )
    value = value.reshape(wide)
    if feature.num_classes is not None:
        low, high = -feature.offset, feature.num_classes - 1 - feature.offset
        if ((value != np.round(value)) | (value < low) | (value > high)).any():
            raise ValueError(
                f"{frame.source}: {name!r} is {value}; this model knows whole numbers from "
                f"{low} to {high}."
            )
    elif not np.isfinite(value).all():
        raise ValueError(f"{frame.source}: {name!r} is {value}; expected finite numbers.")
    return value
