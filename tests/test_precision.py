"""Every matrix product says how exactly it is computed, as the policy wants it."""

import re

import jax
import pytest

from jaxft import loss
from jaxft.models.precision import POLICIES


def products(model, params, batch) -> dict[bool, set[str]]:
    """Precisions of the products in a gradient of the loss, as lowered: of radial networks or not.

    A product belongs to a radial network if one of its sides has as many rows or columns as there
    are edge slots, and none of the dimensions of small matrices in rows.
    """
    objective = loss.weighted(model, energy=1.0, forces=1.0)
    value = jax.grad(lambda p: objective(p, batch)[0])
    text = jax.jit(value).lower(params).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert lines
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for line in lines:
        level = re.search(r"precision = \[(\w+), (\w+)\]", line)
        is_radial = "batching_dims" not in line and bool(
            re.search(
                rf"tensor<{batch.graph.senders.shape[0]}x{batch.graph.senders.shape[1]}x", line
            )
        )
        found[is_radial].add(level.group(1) if level else "DEFAULT")
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_products_follow_the_policy(name, model, params, batch):
    found = products(model.with_backend("xla", name), params, batch)
    policy = POLICIES[name]
    assert found[True] >= {policy.radial.upper()}
    assert found[False] <= {policy.features.upper(), policy.radial.upper(), "HIGHEST"}
    if name == "parity":
        assert found[True] | found[False] == {"HIGHEST"}


def test_an_unknown_policy(model):
    with pytest.raises(ValueError, match="no precision 'tf32'; use parity, train, fast"):
        model.with_backend("auto", "tf32")
