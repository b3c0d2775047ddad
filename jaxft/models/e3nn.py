"""e3nn_jax, without what it imports for plots on spheres and for printing polynomials alone."""

from __future__ import annotations

from jaxft.postponed import postponed

with postponed("scipy.signal", "scipy.spatial", "sympy"):
    import e3nn_jax as e3nn

__all__ = ["e3nn"]
