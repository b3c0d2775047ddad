"""Every matrix product says how exactly it is computed, as the policy wants it."""

import re

import jax
import pytest

from jaxft import loss
from jaxft.models.precision import POLICIES


def products(model, params, batch) -> dict[bool, set[str]]:
    """Precisions of the products in a gradient of the loss, as lowered, by whether one of their
    sides is a matrix with a row per edge slot, as in radial networks alone."""
    objective = loss.weighted(model, energy=1.0, forces=1.0)
    text = jax.jit(jax.grad(lambda p: objective(p, batch)[0])).lower(params).as_text()
    rows = f"tensor<1x{batch.graph.senders.size}x"
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for line in text.splitlines():
        if "stablehlo.dot_general" in line:
            level = re.search(r"precision = \[(\w+), (\w+)\]", line)
            found[rows in line].add(level.group(1) if level else "DEFAULT")
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_products_follow_the_policy(name, model, params, batch):
    found = products(model.with_backend("xla", name), params, batch)
    policy = POLICIES[name]
    assert found[True] == {policy.radial.upper()}
    # the virial is always exact
    assert found[False] == {policy.features.upper(), "HIGHEST"}


def test_an_unknown_policy(model):
    with pytest.raises(ValueError, match="no precision 'tf32'; use parity, train, fast"):
        model.with_backend("auto", "tf32")
