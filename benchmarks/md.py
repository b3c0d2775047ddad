"""Steps of molecular dynamics: jaxft's engine, ASE with jaxft's calculator, ASE with mace-torch's.

    python benchmarks/md.py --model mp0-small --json --write
    python benchmarks/md.py --quick

Velocity Verlet of one rattled NaCl crystal, the same weights and velocities, processes that take
turns (see ``common.py``). Weights are random, so the time step is tiny and atoms hardly move; what
new lists cost is timed apart (``list_seconds``), since a real trajectory needs one every few dozen
steps. Positions and forces after the first turn are compared before anything is timed.

With ``--drift`` instead: energy drift of a trained model (``benchmarks/data/gfn2_small.model``) in
NaCl at 300 K, float32 and float64, at stated time steps.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    FORMS,
    HERE,
    HUGE,
    MALLOCS,
    Case,
    Child,
    Jaxft,
    Side,
    alternate,
    build,
    crystal,
    finish,
    parse,
    parser,
    ratios,
    require_parity,
    seconds,
    settings,
    worst,
)

TIMESTEP = 0.01
"""fs."""

STEPS = 10
"""Of a turn."""

KELVIN = 300.0
LATTICE = 5.75
"""Å, of NaCl in GFN2-xTB's trained model, about."""


def start(case: Case) -> Any:
    from jaxft.md import thermal

    return thermal(case.frames[0], KELVIN, seed=0)


class Ase(Side):
    """ASE's velocity Verlet with some calculator."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        from ase import units
        from ase.md.verlet import VelocityVerlet

        self.atoms = case.frames[0].copy()
        self.atoms.calc = self.calculator(case)
        self.dynamics = VelocityVerlet(self.atoms, TIMESTEP * units.fs)

    def calculator(self, case: Case) -> Any:
        raise NotImplementedError

    def advance(self) -> None:
        self.dynamics.run(STEPS)

    def results(self) -> dict[str, np.ndarray]:
        return {"positions": self.atoms.positions, "forces": self.atoms.get_forces()}


class AseTorch(Ase):
    def calculator(self, case: Case) -> Any:
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
        warnings.simplefilter("ignore")
        import torch
        from mace.calculators import MACECalculator

        torch.set_num_threads(case.threads)
        self.torch = torch
        return MACECalculator(
            model_paths=str(case.torch_file), device="cpu", default_dtype=case.dtype
        )

    def gemm(self) -> None:
        square = self.torch.ones(1024, 1024, dtype=self.torch.float32)
        self.torch.mm(square, square)


class AseJaxft(Ase):
    tunables = HUGE
    _gemm, gemm = Jaxft._gemm, Jaxft.gemm

    def calculator(self, case: Case) -> Any:
        import jax

        if case.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        from jaxft.calculator import JaxftCalculator

        return JaxftCalculator(str(case.bundle), dtype=case.dtype)


class Engine(Side):
    """jaxft's own."""

    tunables = HUGE
    _gemm, gemm = Jaxft._gemm, Jaxft.gemm

    def __init__(self, case: Case) -> None:
        import jax

        if case.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        import jaxft
        from jaxft import md

        super().__init__()
        model, params = jaxft.load(case.bundle, dtype=case.dtype)
        self.md, self.device = md, jax.devices()[0].device_kind
        self.frames = case.frames
        self.simulation = md.Simulation(model, params, case.frames)

    def advance(self) -> None:
        (self.found,) = self.simulation.run(
            self.md.nve(), timestep=TIMESTEP, steps=STEPS, interval=STEPS
        )[:1]

    def results(self) -> dict[str, np.ndarray]:
        n = len(self.frames[0])
        forces = np.asarray(self.simulation._replicas.state.forces)[:n]
        return {"positions": self.found.positions[-1], "forces": forces}

    def list_seconds(self) -> float:
        """Of a new list, median."""
        renew = self.simulation._replicas.renew
        return statistics.median(seconds(renew) for _ in range(5))

    def facts(self) -> dict[str, Any]:
        return {"compilations": self.simulation.compilations, "device": self.device}


class Drift(Side):
    """Energy drift of the trained model."""

    tunables = HUGE

    def __init__(self, bundle: Path, dtype: str) -> None:
        import jax

        jax.config.update("jax_enable_x64", True)
        super().__init__()
        import jaxft

        self.dtype = dtype
        self.model, self.params = jaxft.load(bundle, dtype=dtype)

    def drift(self, timestep: float, picoseconds: float) -> dict[str, Any]:
        import ase.build

        from jaxft import md
        from jaxft.md.drift import drift

        atoms = ase.build.bulk("NaCl", "rocksalt", LATTICE, cubic=True) * 2
        simulation = md.Simulation(
            self.model, self.params, [md.thermal(atoms, 2 * KELVIN, seed=0)], dtype=self.dtype
        )
        steps = round(1000 * picoseconds / timestep)
        (found,) = simulation.run(md.nve(), timestep=timestep, steps=steps, interval=5)
        measured = drift(found)
        return {
            "dtype": self.dtype,
            "timestep_fs": timestep,
            "length_ps": picoseconds,
            "atoms": len(atoms),
            "temperature_K": round(float(found.temperature.mean()), 1),
            "drift_meV_per_atom_ps": float(f"{measured.slope:.2e}"),
            "fluctuation_meV_per_atom": float(f"{measured.fluctuation:.2e}"),
            "lists": simulation.rebuilds,
            "compilations": simulation.compilations,
            "ended": None if found.ended is None else found.ended.reason,
        }


def drifts(args: Any) -> None:
    from converters.to_jax import convert
    from jaxft import save

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "gfn2.jaxft"
        save(bundle, *convert(HERE / "data" / "gfn2_small.model"))
        found = []
        for dtype in ("float64", "float32"):
            with Child(Drift, bundle, dtype) as child:
                found += [child.call("drift", timestep, args.length) for timestep in (2.0, 1.0)]
    result = {"drifts": found, **settings(args, torch=False)}
    finish("md", "drift, gfn2_small, NaCl", result, args)


def speeds(args: Any) -> None:
    say = (lambda *_: None) if args.json else print
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        atoms = crystal(args.atoms)
        case = Case(args.model, args.dtype, Path(folder), [atoms], threads=args.threads)
        build(case)
        frames = [start(case)] * args.replicas
        case = Case(args.model, args.dtype, Path(folder), frames, threads=args.threads)
        children = {
            **{n: Child(AseTorch, case, tunables=FORMS[n]) for n in MALLOCS[args.malloc]},
            "ase_jaxft": Child(AseJaxft, case),
            "jaxft": Child(Engine, case),
        }
        for child in children.values():
            stack.enter_context(child)
            child.call("advance")
        results = {name: child.call("results") for name, child in children.items()}
        expected = next(iter(results.values()))
        deviations = {
            name: max(worst({k: found[k]}, expected) for k in expected)
            for name, found in results.items()
        }
        require_parity(deviations, args.dtype)
        timing = alternate(
            {name: functools.partial(child.turn, "advance") for name, child in children.items()},
            args.rounds,
        )
        facts = children["jaxft"].call("facts")
        listing = children["jaxft"].call("list_seconds")
    steps = {name: STEPS / value for name, value in timing.medians.items()}
    steps["jaxft"] *= args.replicas
    for name, value in steps.items():
        say(f"{name:12s} {value:8.2f} steps/s")
    scaled = {**timing.medians, "jaxft": timing.medians["jaxft"] / args.replicas}
    result = {
        **ratios(scaled),
        "ratio_ase_jaxft": round(scaled["ase_jaxft"] / scaled["jaxft"], 2),
        "steps_per_second": {name: round(value, 3) for name, value in steps.items()},
        "list_seconds": round(listing, 4),
        **timing.summary(),
        "deviation": {name: float(f"{value:.1e}") for name, value in deviations.items()},
        **settings(args, model=args.model, atoms=len(atoms), replicas=args.replicas, **facts),
    }
    key = f"{args.model} {args.dtype} {len(atoms)} atoms, {args.replicas} replicas"
    finish("md", key, result, args)


def main() -> None:
    found = parser(__doc__.splitlines()[0])
    found.add_argument("--atoms", type=int, default=256)
    found.add_argument("--replicas", type=int, default=1, help="at once, of jaxft's engine")
    found.add_argument("--drift", action="store_true", help="energy drift instead of speed")
    found.add_argument("--length", type=float, default=5.0, help="ps, of a drift's trajectory")
    args = parse(found)
    if args.quick:
        args.atoms, args.length = min(args.atoms, 32), min(args.length, 0.5)
    drifts(args) if args.drift else speeds(args)


if __name__ == "__main__":
    main()
