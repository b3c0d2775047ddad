"""Short runs are compiled quickly, with the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import effort as efforts
from jaxft.compilation import Ahead
from jaxft.effort import QUICK, SHORT, effort


@pytest.fixture
def fresh(monkeypatch):
    """What is known of the compiler is asked anew, and forgotten afterwards."""
    efforts._known.cache_clear()
    yield monkeypatch
    efforts._known.cache_clear()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="options of the compiler for CPUs")
def test_few_edges_are_compiled_quickly_and_many_are_not():
    assert effort(SHORT).options["xla_backend_optimization_level"] == 1
    assert effort(SHORT + 1).options == {}
    assert effort(SHORT / 128, 128).options == effort(SHORT).options
    assert effort(SHORT / 64, 128).options == {}
    assert "short" in str(effort(0))
    assert "short" not in str(effort(float("inf")))


def test_what_the_compiler_does_not_know_is_left_out(fresh):
    """Also of ``QUICK`` itself: newer versions of XLA have no other emitters to choose."""
    known = dict(efforts._known("cpu"))
    assert "xla_backend_optimization_level" in known
    assert known.items() <= QUICK.items()
    efforts._known.cache_clear()
    fresh.setattr(efforts, "QUICK", {"xla_no_such_option": 1, **QUICK})
    assert efforts._known("cpu") == known
    assert efforts._known("cuda") == {}


def test_an_error_of_another_kind_is_not_taken_for_an_unknown_option(fresh):
    fresh.setattr(efforts, "QUICK", {"xla_backend_optimization_level": "much"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_backend_optimization_level"):
        efforts._known("cpu")


def test_a_program_is_compiled_with_the_options_that_ahead_was_given():
    jitted = jax.jit(lambda x: jnp.sin(x) ** 2)
    x = np.linspace(0, 1, 7, dtype=np.float32)
    np.testing.assert_allclose(
        Ahead(jitted, options=effort(0).options)(x), np.sin(x) ** 2, rtol=1e-6
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        Ahead(jitted, options={"xla_no_such_option": 1})(x)
