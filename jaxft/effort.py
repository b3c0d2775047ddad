"""How hard XLA works at a program: whoever computes for seconds should not wait longer for LLVM.

On CPUs half of compiling a training step is LLVM's optimisation of kernels that are small loops,
and XLA's newer emitters of such loops; what takes the time of a step are products of matrices,
which are library code. Without both a program is ready 1.2 to 1.8 times as fast and runs 0 to 7 %
slower. Results differ by rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

SHORT = 64e6
"""Edges times channels. A small model takes 20 to 40 s for so many in training, of which quick
compilation costs 2 to 5 %, and it saves 2 to 3 s; MACE-MP-0 medium takes 16 s, of which it costs
and saves one."""

QUICK: Mapping[str, Any] = {
    "xla_backend_optimization_level": 1,
    "xla_cpu_use_fusion_emitters": False,
}
"""XLA's options."""


class Effort(NamedTuple):
    """Options for one program."""

    options: Mapping[str, Any]
    """For ``compiler_options`` of JAX; empty is XLA's default."""

    def __str__(self) -> str:
        return "quickly, for a short run" if self.options else "with all optimisations"


def effort(edges: float, channels: int = 1) -> Effort:
    """What suits a program that sees so many edges in all its calls: QUICK up to ``SHORT``.

    It follows from the data, the model and the length of a run alone, so a run that is resumed
    compiles the same program.

    Args:
      edges: how many, over all calls.
      channels: features per edge, :attr:`jaxft.potential.Potential.channels`.
    """
    return Effort(_known(jax.default_backend()) if edges * channels <= SHORT else {})


@functools.cache
def _known(platform: str) -> dict[str, Any]:
    """Those of ``QUICK`` that this version of XLA has; they are options of its compiler for CPUs,
    and may go when it changes."""
    if platform != "cpu":
        return {}
    found: dict[str, Any] = {}
    for name, value in QUICK.items():
        try:
            jax.jit(lambda x: x).lower(0.0).compile(compiler_options={name: value})
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
        else:
            found[name] = value
    return found
