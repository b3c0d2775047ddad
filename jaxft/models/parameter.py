"""Parameters of flax modules."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
from flax.errors import ScopeParamShapeError

from jaxft.typing import Array


def parameter(
    module: nn.Module, name: str, init: Callable[..., Array], shape: tuple[int, ...]
) -> Array:
    """As ``module.param``, which traces the initialiser whenever it reads, for its shape alone.

    Raises:
      ScopeParamShapeError: the parameter has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value = module.get_variable("params", name)
    if value.shape != tuple(shape):
        raise ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
    return value
