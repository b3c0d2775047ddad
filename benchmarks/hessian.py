"""What second derivatives in the loss cost: a training step with and without them, in turn.

    python benchmarks/hessian.py --json                          the shipped small model
    python benchmarks/hessian.py --model mp0-small --json        MACE-MP-0's architecture, random
    python benchmarks/hessian.py --quick

The step is: energy, forces and stress of a batch of frames of rock salt, gradient of all
parameters, Adam. With the Hessian, the loss has the term of ``loss.hessian``, too: the Hessian of
every frame times one random displacement. Frames, model and everything else are the same; times do
not depend on the labels, which are random.

``ratio`` is the time of a step with the term over that of one without it. ``ratio_unlabelled`` is
the same of a step whose loss has the term while no frame of its batch has such a label, as batches
of co-training do. All three take turns in one process.
``compile_seconds`` and ``temporaries_MB`` are of the compiled step, by XLA's own account. The last
line is a JSON object.
"""

from __future__ import annotations

import argparse
import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import (
    HUGE,
    PRECISION,
    RATE,
    WEIGHTS,
    Child,
    Side,
    alternate,
    confine,
    finish,
    output_options,
    seconds,
    settings,
)
from surrogate import BIG

HERE = Path(__file__).parent
FRAMES = HERE / "data" / "nacl_train.xyz"
MODELS = ("gfn2_small", "mp0-small")
HESSIAN = 1.0
"""Weight of the term."""


class Steps(Side):
    """One process with both programs and their batches."""

    tunables = HUGE

    def __init__(self, name: str, dtype: str, count: int) -> None:
        import jax

        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        import jax.numpy as jnp
        import numpy as np

        from jaxft import bundle, data
        from jaxft.data.curvatures import Curvatures, displacements

        self.device = jax.devices()[0].device_kind
        super().__init__()
        frames, rng = data.read(FRAMES)[:count], np.random.default_rng(0)
        self.model, params = bundle.cast(*_model(name, frames), dtype)
        curved = [
            replace(
                frame,
                hessian=Curvatures(
                    displacements(len(frame), 1, "gaussian", rng),
                    rng.normal(size=(1, len(frame), 3)),
                ),
            )
            for frame in frames
        ]
        dataset = data.prepare(curved, self.model, head=self.model.heads[0], probes="column")
        batch = next(data.epoch(dataset, len(curved), dtype=dtype))
        given = batch.curvature
        absent = given._replace(weight=0 * given.weight, total=0 * given.total)
        self.batches = {
            "without": jax.device_put(batch._replace(curvature=None)),
            "with": jax.device_put(batch),
            "unlabelled": jax.device_put(batch._replace(curvature=absent)),
        }
        self.atoms, self.edges = int(dataset.nodes.sum()), int(dataset.edges.sum())
        self.square = jnp.ones((1024, 1024), jnp.float32)
        self.product = jax.jit(lambda x: jnp.dot(x, x, precision=PRECISION))
        self.programs, self.states, self.costs = {}, {}, {}
        for side, weight in (("without", 0.0), ("with", HESSIAN)):
            step, state = self._step(params, weight)
            lowered = step.lower(state, self.batches[side])
            took = seconds(lambda: self.programs.update({side: lowered.compile()}))  # noqa: B023
            self.states[side] = state
            self.costs[side] = took, self.programs[side].memory_analysis().temp_size_in_bytes
        self.programs["unlabelled"] = self.programs["with"]
        _, self.states["unlabelled"] = self._step(params, HESSIAN)

    def _step(self, params: Any, weight: float) -> tuple[Any, Any]:
        """jaxft's own training step, and its first state."""
        import jax
        import optax

        from jaxft import finetune, loss

        init, step = finetune(
            loss.weighted(self.model, **WEIGHTS, hessian=weight), (), optax.adam(RATE)
        )
        return step, init(jax.random.key(0), params)

    def facts(self) -> dict[str, Any]:
        costs = {side: {"s": s, "MB": size / 1e6} for side, (s, size) in self.costs.items()}
        return {
            "compile_seconds": {side: round(cost["s"], 2) for side, cost in costs.items()},
            "temporaries_MB": {side: round(cost["MB"], 1) for side, cost in costs.items()},
            "atoms": self.atoms,
            "edges": self.edges,
            "device": self.device,
        }

    def gemm(self) -> None:
        self.product(self.square).block_until_ready()

    def step(self, side: str) -> None:
        import jax

        self.states[side], info = self.programs[side](self.states[side], self.batches[side])
        jax.block_until_ready((self.states[side], info))


def _model(name: str, frames: list[Any]) -> tuple[Any, Any]:
    """The shipped model, or a published architecture with random weights."""
    from converters.to_jax import convert
    from jaxft import scratch, surgery
    from jaxft.architecture import Architecture

    if name == "gfn2_small":
        model, params = convert(HERE / "data" / "gfn2_small.model")
        return surgery.select_elements(model, params, ["Na", "Cl"])
    shape = Architecture(**BIG[name], r_max=6.0, num_bessel=10)
    return scratch.new(shape, frames, e0s={11: 0.0, 17: 0.0}, scale=1e-3, shift=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--frames", type=int, default=8, help="of 8 atoms each, in a batch")
    parser.add_argument("--rounds", type=int, default=7, help="steady ones")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="two frames and rounds, as a trial")
    output_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.frames = args.rounds = 2
    if min(args.frames, args.rounds, args.threads) < 1:
        parser.error("--frames, --rounds and --threads have to be at least 1.")
    confine(args.threads)
    with Child(Steps, args.model, args.dtype, args.frames) as child:
        sides = ("without", "with", "unlabelled")
        runners = {side: functools.partial(child.turn, "step", side) for side in sides}
        timing = alternate(runners, args.rounds)
        facts = child.call("facts")
    medians = timing.medians
    for name, value in () if args.json else medians.items():
        print(f"{name:12s}{1e3 * value:10.2f} ms per step")
    result = {
        "ratio": round(medians["with"] / medians["without"], 3),
        "ratio_unlabelled": round(medians["unlabelled"] / medians["without"], 3),
        **timing.summary(),
        **facts,
        **settings(args, torch=False, model=args.model, loss="E+F+S, Adam; Hessian: one v"),
        "frames": args.frames,
    }
    finish("hessian", f"{args.model} {args.dtype} {facts['atoms']} atoms", result, args)


if __name__ == "__main__":
    main()
