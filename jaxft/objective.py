"""What a config asks to minimise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxft import loss
from jaxft.config import Config
from jaxft.potential import Potential
from jaxft.train import in_precision
from jaxft.typing import LossFn, Params


def objective(config: Config, model: Potential) -> LossFn:
    """The loss that a config asks for, in its precision."""
    chosen = loss.weighted(
        model.with_backend(config.backend, config.precision),
        **config.loss.terms,
        error=config.loss.error,
        delta=config.loss.delta,
        compare=config.loss.compare,
    )
    if config.compute_dtype == config.parameter_dtype:
        return chosen
    return in_precision(chosen, config.compute_dtype)


def outputs(config: Config, model: Potential) -> Callable[[Params, Any], Any]:
    """What a sampled Fisher differentiates, weighed as the config's loss.

    Raises:
      ValueError: the loss is not one of squared errors, or has a term of the Hessian or of
        moments.
    """
    if config.loss.hessian:
        raise ValueError(
            "a sampled Fisher knows no Hessian, but the loss has a term of it;\n"
            "override it for this command: loss.hessian=0."
        )
    if config.loss.error != "mse":
        raise ValueError(
            f"a sampled Fisher is that of squared errors, but the loss is {config.loss.error!r};\n"
            "override it for this command: loss.error=mse."
        )
    if config.loss.moments:
        raise ValueError(
            "a sampled Fisher is that of energies, forces and stresses, but the loss has "
            "moments;\noverride it for this command: loss.moments=0."
        )
    others = ("hessian", "moments")
    terms = {n: weight for n, weight in config.loss.terms.items() if n not in others}
    vector = loss.outputs(model, labelled_only=False, **terms)
    dtype = config.compute_dtype
    return lambda params, batch: vector(
        jax.tree.map(lambda leaf: leaf.astype(dtype), params), batch
    )
