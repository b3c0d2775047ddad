"""Parameters of flax modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import numpy as np
from flax.errors import ScopeParamShapeError

from jaxft.typing import Array


def parameter(
    module: nn.Module, name: str, init: Callable[..., Array], shape: Sequence[int | None]
) -> Array:
    """As ``module.param``, which traces the initialiser whenever it reads, for its shape alone.

    Raises:
      ScopeParamShapeError: the parameter has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value: Array = module.get_variable("params", name)
    if np.shape(value) != tuple(shape):
        raise ScopeParamShapeError(name, "/".join(module.path), np.shape(value), shape)
    return value
