"""How exactly float32 matrix products are computed, where the hardware offers less than float32.

JAX's default for float32 is TF32 on recent NVIDIA GPUs and bfloat16 on TPUs; torch's is float32.
On CPUs, and for float64, all three policies are the same.

======  ==============================================================================
parity  float32 everywhere, as torch
train   the radial networks, most of the arithmetic, in TF32 (GPU) or three bfloat16 (TPU);
        node features and contractions as in ``parity``
fast    whatever is fastest on the platform, everywhere
======  ==============================================================================
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Name = Literal["parity", "train", "fast"]


class Precision(NamedTuple):
    """A policy; values as of ``jax.default_matmul_precision``."""

    name: Name
    features: str
    """Of products over node features: linear maps, messages, contractions."""
    radial: str
    """Of the radial networks."""


PARITY = Precision("parity", features="highest", radial="highest")
TRAIN = Precision("train", features="highest", radial="high")
FAST = Precision("fast", features="default", radial="default")

POLICIES: dict[str, Precision] = {policy.name: policy for policy in (PARITY, TRAIN, FAST)}


def named(name: str) -> Precision:
    """The policy of this name.

    Raises:
      ValueError: there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"there is no precision {name!r}; use {', '.join(POLICIES)}.")
    return POLICIES[name]
