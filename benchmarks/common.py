"""What the benchmarks share: structures, the two sides, and turns that they take.

Each side lives in a process of its own, child of one parent, because allocator settings belong to a
process: torch's must not be those of jaxft, nor the reverse. A child does one step when it is told
so over a pipe and else sleeps in a read, so that sides alternate without disturbing each other.

torch eager spends much of its time in page faults of glibc's allocator. It runs in two forms, as
its users run it (``default``) and as a careful user would (``tuned``, ``TUNED`` in the child's
environment); on request with the setting that the command ``jaxft`` gives itself (``huge``), too.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import ase.build
import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results"
WEIGHTS = {"energy": 1.0, "forces": 10.0, "stress": 1.0}
CRYSTALS = {"NaCl": 5.64, "LiCl": 5.13, "MgO": 4.21, "KF": 5.34}
"""Rocksalt lattice constants, Å."""

MODELS = ("mp0-small", "mp0-medium", "mp0-large", "0b3-medium", "mh-1", "small")
"""Published architectures of ``tests/parity/reference.py`` with random weights: MACE-MP-0, 0b3 (and
MPA-0: density, Agnesi, ZBL), MH-1 (non-linear blocks, six heads), and a small one for trials."""

FULL = {"model": "mp0-medium", "rounds": 7, "cells": 2}
QUICK = {"model": "small", "rounds": 2, "cells": 1}
"""What ``--quick`` sets instead, unless it is given."""

TUNED = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
)
HUGE = "glibc.malloc.hugetlb=1"
"""What the command ``jaxft`` sets for itself, see :mod:`jaxft.hugepages`; here a child's has to be
set for it."""

FORMS = {"torch": "", "torch_tuned": TUNED, "torch_huge": HUGE}
"""Allocator settings of torch, by the name of the side."""

MALLOCS = {
    "both": ("torch", "torch_tuned"),
    "all": tuple(FORMS),
    "default": ("torch",),
    "tuned": ("torch_tuned",),
    "huge": ("torch_huge",),
}
"""Values of ``--malloc``."""

PRECISION = "highest"
"""Of matrix products in float32; torch's own on CPU, and what jaxft asks XLA for."""

RATE = 1e-4
"""Of Adam."""

WARM_UP = 2
"""Turns before the first round; TorchScript optimises its graphs in the first ones."""

SETTLE = 2.0
"""Seconds of calls that go before the timed ones, and of those."""

UNSTEADY = 0.3
"""A round is discarded if a calibrating product took so much more or less than its median."""

LIMITS = {"float64": 1e-8, "float32": 1e-3}
"""Relative difference beyond which a side is wrong, and not timed."""


def structures(repeats: int = 1, seed: int = 0, *, cells: int = 2) -> list[ase.Atoms]:
    """Four rattled rocksalt crystals of 8 cells³ atoms, ``repeats`` times, with random labels."""
    rng = np.random.default_rng(seed)
    return [
        labelled(ase.build.bulk(name, "rocksalt", a=a, cubic=True) * ((cells,) * 3), rng)
        for name, a in list(CRYSTALS.items()) * repeats
    ]


def crystal(n_atoms: int, seed: int = 0) -> ase.Atoms:
    """A rattled NaCl crystal of ``n_atoms`` atoms, rounded up to 8, as cubic as that goes."""
    n = -(-n_atoms // 8)
    splits = [
        (a, b, n // (a * b))
        for a in range(1, round(n ** (1 / 3)) + 1)
        for b in range(a, round(n**0.5) + 1)
        if n % (a * b) == 0 and b <= n // (a * b)
    ]
    unit = ase.build.bulk("NaCl", "rocksalt", a=CRYSTALS["NaCl"], cubic=True)
    return labelled(unit * max(splits), np.random.default_rng(seed))


def labelled(atoms: ase.Atoms, rng: np.random.Generator) -> ase.Atoms:
    """The structure, rattled, with random energy (eV), forces (eV/Å) and stress (eV/Å³)."""
    atoms.positions += rng.normal(scale=0.08, size=atoms.positions.shape)
    atoms.info["REF_energy"] = -5.0 * len(atoms) + rng.normal()
    atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
    atoms.info["REF_stress"] = 0.01 * rng.normal(size=(3, 3))
    return atoms


@dataclass(frozen=True)
class Case:
    """What is benchmarked."""

    model: str
    dtype: str
    folder: Path
    """Where the model's files are, see :func:`build`."""
    frames: Sequence[ase.Atoms] = ()
    trained: str = "all"
    """``all``, or ``products+readouts``: embedding and interactions frozen."""
    threads: int = 1
    wrong: bool = False
    """Give jaxft one wrong weight."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the model that differ from the published ones."""

    @property
    def torch_file(self) -> Path:
        return self.folder / "reference.model"

    @property
    def bundle(self) -> Path:
        return self.folder / "reference.jaxft"


class Turn(NamedTuple):
    """One turn of one side, wall seconds."""

    gemm: float
    """Of a calibrating matrix product, the slower of one just before and one just after."""
    seconds: float


class Side:
    """What runs in a child. Subclasses call ``__init__`` when their imports are done."""

    tunables = ""
    """``GLIBC_TUNABLES`` of the child, unless others are asked for."""

    def __init__(self) -> None:
        self.baseline = peak_rss()

    def gemm(self) -> None:
        """A product of two 1024² float32 matrices, with the threads that the steps use."""
        raise NotImplementedError

    def turn(self, method: str = "step", *args: Any) -> Turn:
        """Time calls, and the calibrating product before and after them.

        As in a run, where a step follows a step: the calls of the first ``SETTLE`` seconds, one at
        least, are not timed, since while this side slept its memory may have gone back to the
        kernel and, on virtual machines, to the host. Then the median of another ``SETTLE`` seconds
        of calls, one at least.
        """
        step = functools.partial(getattr(self, method), *args)
        before = self._product()
        _calls(step)
        call = statistics.median(_calls(step))
        return Turn(max(before, self._product()), call)

    def _product(self) -> float:
        return statistics.median(seconds(self.gemm) for _ in range(5))

    def memory(self) -> dict[str, float]:
        """MB: the peak so far, and that after the imports."""
        return {"peak": round(peak_rss(), 1), "imports": round(self.baseline, 1)}


def _calls(call: Callable[[], object]) -> list[float]:
    """Seconds of each of as many calls as take ``SETTLE`` seconds."""
    found = [seconds(call)]
    while sum(found) < SETTLE:
        found.append(seconds(call))
    return found


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_rss() -> float:
    """Largest resident memory of this process so far, MB (10⁶ bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Builder(Side):
    """Writes the model of a case, as torch file and as bundle; needs both packages."""

    def __init__(self, case: Case) -> None:
        sys.path.insert(0, str(HERE.parent / "tests" / "parity"))
        import reference

        import jaxft
        from converters.to_jax import convert

        super().__init__()
        reference.save(
            reference.build(case.model, dtype=case.dtype, **case.changes), case.torch_file
        )
        jaxft.save(case.bundle, *convert(case.torch_file))


class TorchMace(Side):
    """torch MACE eager with Adam. jaxft, whose allocator settings would apply, is not imported."""

    def __init__(self, case: Case) -> None:
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn 0.4.4 under torch >= 2.6
        warnings.simplefilter("ignore")
        import torch
        from mace import data, tools

        super().__init__()
        self.torch = torch
        torch.set_num_threads(case.threads)
        torch.set_default_dtype(getattr(torch, case.dtype))
        self.model = torch.load(case.torch_file, weights_only=False)
        heads = list(getattr(self.model, "heads", ["Default"]))
        keys = data.KeySpecification(
            info_keys={"energy": "REF_energy", "stress": "REF_stress"},
            arrays_keys={"forces": "REF_forces"},
        )
        items = [
            data.AtomicData.from_config(
                data.config_from_atoms(atoms.copy(), key_specification=keys, head_name=heads[0]),
                z_table=tools.AtomicNumberTable([int(z) for z in self.model.atomic_numbers]),
                cutoff=float(self.model.r_max),
                heads=heads,
            )
            for atoms in case.frames
        ]
        loader = tools.torch_geometric.dataloader.DataLoader(items, len(items), shuffle=False)
        self.batch = next(iter(loader)).to_dict()
        self.counts = torch.tensor([float(len(atoms)) for atoms in case.frames])
        self.labels = [
            torch.tensor(np.array(values), dtype=torch.get_default_dtype())
            for values in (
                [atoms.info["REF_energy"] for atoms in case.frames],
                np.concatenate([atoms.arrays["REF_forces"] for atoms in case.frames]),
                [atoms.info["REF_stress"] for atoms in case.frames],
            )
        ]
        self.frozen: set[str] = set()

    def facts(self) -> dict[str, Any]:
        return {"edges": int(self.batch["edge_index"].shape[1])}

    def gemm(self) -> None:
        square = self.torch.ones(1024, 1024, dtype=self.torch.float32)
        self.torch.mm(square, square)

    def _outputs(self, *, training: bool) -> dict[str, Any]:
        # a copy: the model stores strained positions, and with them the old graph, in its input
        return self.model(
            dict(self.batch), training=training, compute_force=True, compute_stress=True
        )

    def _loss(self) -> Any:
        out = self._outputs(training=True)
        energy, forces, stress = self.labels
        return (
            WEIGHTS["energy"] * ((out["energy"] - energy) / self.counts).square().mean()
            + WEIGHTS["forces"] * (out["forces"] - forces).square().mean()
            + WEIGHTS["stress"] * (out["stress"] - stress).square().mean()
        )

    def results(self) -> dict[str, np.ndarray]:
        """Energies without those of isolated atoms [G], forces [N, 3], stresses [G, 3, 3]."""
        out = self._outputs(training=False)
        names = {"energy": "interaction_energy", "forces": "forces", "stress": "stress"}
        return {name: out[key].detach().numpy() for name, key in names.items()}

    def gradient(self) -> tuple[float, dict[str, np.ndarray]]:
        """Of the loss, by torch's names, flat; parameters that it does not depend on left out."""
        self.model.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        named = self.model.named_parameters()
        return loss.item(), {n: p.grad.numpy().ravel() for n, p in named if p.grad is not None}

    def freeze(self, trained: set[str]) -> None:
        """Say what :meth:`frozen_step` trains."""
        self.frozen = {name for name, _ in self.model.named_parameters()} - trained

    @functools.cached_property
    def _optimizer(self) -> Any:
        return self.torch.optim.Adam(self.model.parameters(), lr=RATE)

    def step(self) -> None:
        """All parameters train."""
        self._optimizer.zero_grad(set_to_none=True)
        self._loss().backward()
        self._optimizer.step()

    def frozen_step(self) -> None:
        """``requires_grad`` is off for what is frozen; Adam skips parameters without gradient."""
        chosen = [p for name, p in self.model.named_parameters() if name in self.frozen]
        for parameter in chosen:
            parameter.requires_grad_(False)
        self.step()
        for parameter in chosen:
            parameter.requires_grad_(True)

    def infer(self) -> None:
        """Energies, forces and stresses, not kept."""
        self._outputs(training=False)


class Recorded(NamedTuple):
    """State of an optimiser that moves nothing and keeps the gradient."""

    gradient: Any


class Jaxft(Side):
    """The same with jaxft, jitted; programs are compiled when first used."""

    tunables = HUGE

    def __init__(self, case: Case) -> None:
        import jax

        if case.dtype == "float64":
            jax.config.update("jax_enable_x64", True)
        import jaxft
        from converters.rules import parameter_rules
        from jaxft import data

        self.device = jax.devices()[0].device_kind
        super().__init__()
        self.model, self.params = jaxft.load(case.bundle, dtype=case.dtype)
        if case.wrong:
            linear = self.params["interactions_0"]["linear_up"]
            linear["0e"] = 1.02 * linear["0e"]
        self.rules = parameter_rules(self.model.config)
        self.trained, self.size = case.trained, len(case.frames)
        dataset = data.prepare(
            [data.from_atoms(atoms) for atoms in case.frames],
            self.model,
            head=self.model.heads[0],
        )
        batch = next(data.epoch(dataset, self.size, dtype=case.dtype))
        self.fill = float(dataset.edges.sum() / batch.graph.senders.size)
        self.edges, self.atoms = int(dataset.edges.sum()), int(dataset.nodes.sum())
        self.batch = jax.device_put(batch)

    def facts(self) -> dict[str, Any]:
        found = {"edges": self.edges, "atoms": self.atoms, "fill": round(self.fill, 4)}
        return found | {"device": self.device}

    @functools.cached_property
    def _gemm(self) -> Any:
        import jax
        import jax.numpy as jnp

        square = jnp.ones((1024, 1024), jnp.float32)
        return jax.jit(lambda x: jnp.dot(x, square, precision=PRECISION)), square

    def gemm(self) -> None:
        product, square = self._gemm
        product(square).block_until_ready()

    def _engine(self, tx: Any) -> tuple[Any, Any]:
        """State and step of jaxft's own training with an optimiser."""
        import jax

        from jaxft import finetune, loss
        from jaxft.strategies import freeze

        recipe = () if self.trained == "all" else (freeze(level=5),)
        init, step = finetune(loss.weighted(self.model, **WEIGHTS), recipe, tx)
        return init(jax.random.key(0), self.params), step

    def gradient(self) -> tuple[float, dict[str, np.ndarray]]:
        """What the training step differentiates, by torch's names, flat; frozen ones left out."""
        import jax
        import jax.numpy as jnp
        import optax

        from jaxft import tree

        recorder = optax.GradientTransformation(
            lambda params: Recorded(jax.tree.map(jnp.zeros_like, params)),
            lambda updates, _, params=None: (
                jax.tree.map(jnp.zeros_like, updates),
                Recorded(updates),
            ),
        )
        state, step = self._engine(recorder)
        state, info = step(state, self.batch)
        is_record = lambda node: isinstance(node, Recorded)  # noqa: E731
        (record,) = filter(is_record, jax.tree.leaves(state.opt_state, is_leaf=is_record))
        leaves = jax.device_get(tree.flatten(record.gradient.params))
        moved = {path for path, leaf in leaves.items() if leaf is not None}
        return float(info["loss"]), {
            rule.name: rule.to_tensor(leaves)
            for rule in self.rules
            if moved.issuperset(block.path for block in rule.blocks)
        }

    @functools.cached_property
    def _training(self) -> list[Any]:
        import optax

        return list(self._engine(optax.adam(RATE)))

    def step(self) -> None:
        import jax

        state, step = self._training
        self._training[0], info = step(state, self.batch)
        jax.block_until_ready((self._training[0], info))

    def roofline(self) -> dict[str, float]:
        """What XLA counts of a step, what this machine can do at most, and the time these imply.

        Peaks are the best of ten: a product of two matrices of 2048, and ``a + b`` of 64 MiB each.
        """
        import jax
        import jax.numpy as jnp

        state, step = self._training
        counts = step.lower(state, self.batch).compile().cost_analysis()
        dtype = self.batch.graph.vectors.dtype
        square, long = jnp.ones((2048, 2048), dtype), jnp.ones(2**26 // dtype.itemsize, dtype)
        product = jax.jit(lambda x: jnp.dot(x, x, precision=PRECISION))
        triad = jax.jit(jnp.add)
        jax.block_until_ready((product(square), triad(long, long + 1)))
        other = long + 1
        rate = (
            2
            * 2048**3
            / min(seconds(lambda: product(square).block_until_ready()) for _ in range(10))
        )
        width = (
            3
            * 2**26
            / min(seconds(lambda: triad(long, other).block_until_ready()) for _ in range(10))
        )
        limit = max(counts["flops"] / rate, counts["bytes accessed"] / width)
        return {
            "counted_GFLOP": round(counts["flops"] / 1e9, 1),
            "counted_GB": round(counts["bytes accessed"] / 1e9, 1),
            "peak_GFLOP_per_s": round(rate / 1e9),
            "peak_GB_per_s": round(width / 1e9),
            "limit_seconds": round(limit, 3),
        }

    @functools.cached_property
    def _predict(self) -> Any:
        import jax

        from jaxft import predict

        return jax.jit(functools.partial(predict, self.model))

    def infer(self) -> Any:
        import jax

        return jax.block_until_ready(self._predict(self.params, self.batch.graph))

    def results(self) -> dict[str, np.ndarray]:
        """As those of :class:`TorchMace`."""
        found = self.infer()
        atoms = np.asarray(self.batch.graph.is_atom)
        return {
            "energy": np.asarray(found.energy)[: self.size],
            "forces": np.asarray(found.forces)[atoms],
            "stress": np.asarray(found.stress)[: self.size],
        }


class Child:
    """A side in a process of its own, alive until closed; a context manager.

    Args:
      side: a subclass of :class:`Side`, made in the child from ``args``.
      tunables: ``GLIBC_TUNABLES`` of its environment, by default the side's; whatever allocator
        settings the parent has are not passed on.
    """

    def __init__(self, side: type[Side], *args: Any, tunables: str | None = None) -> None:
        self.name = side.__name__
        chosen = side.tunables if tunables is None else tunables
        spawn = multiprocessing.get_context("spawn")
        self._pipe, far = spawn.Pipe()
        before = dict(os.environ)
        for name in [name for name in os.environ if name.startswith(("GLIBC_TUNABLES", "MALLOC_"))]:
            del os.environ[name]
        if chosen:
            os.environ["GLIBC_TUNABLES"] = chosen
        try:
            self.process = spawn.Process(target=_serve, args=(far, side, args), daemon=True)
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        far.close()
        self.answer()

    def call(self, method: str, *args: Any) -> Any:
        """Let the child call a method of its side, and wait for what it returns."""
        self.send(method, *args)
        return self.answer()

    def send(self, method: str, *args: Any) -> None:
        """The same, to ask for the :meth:`answer` later."""
        self._pipe.send((method, args))

    def turn(self, method: str = "step", *args: Any) -> Turn:
        return self.call("turn", method, *args)

    def answered(self, timeout: float) -> bool:
        """Whether an answer is there within so many seconds."""
        return self._pipe.poll(timeout)

    def answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self.process.join()
            sys.exit(
                f"error: the process of {self.name} ended with exit code {self.process.exitcode}; "
                "its own message is above, and none means that it was killed for memory."
            )

    def close(self) -> None:
        self._pipe.close()
        self.process.join(10)
        self.process.kill()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Any, side: type[Side], args: tuple[Any, ...]) -> None:
    """The child: do what is asked until the parent hangs up."""
    os.dup2(2, 1)  # what libraries print must not come after the parent's last line
    served = side(*args)
    pipe.send(None)
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(served, method)(*given))


def build(case: Case) -> Case:
    """Write the model's files, in a process that ends."""
    Child(Builder, case).close()
    return case


class Timing(NamedTuple):
    """Wall seconds of the rounds that were kept, by runner, and how many were not."""

    seconds: dict[str, list[float]]
    gemm: float
    """The median calibrating product: beside other runs' it tells how busy the machine was."""
    discarded: int

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.seconds.items()}

    def summary(self) -> dict[str, Any]:
        """For the JSON: medians, spreads, rounds."""
        return {
            "seconds": {name: round(value, 5) for name, value in self.medians.items()},
            "spread": {n: [round(min(v), 5), round(max(v), 5)] for n, v in self.seconds.items()},
            "rounds": min(len(values) for values in self.seconds.values()),
            "discarded": self.discarded,
            "gemm_milliseconds": round(1e3 * self.gemm, 2),
        }


def alternate(
    runners: Mapping[str, Callable[[], Turn]], rounds: int, *, together: bool = True
) -> Timing:
    """All runners in turn, after ``WARM_UP`` turns each, until enough rounds were steady.

    A round is discarded if a calibrating product of any runner moved more than ``UNSTEADY`` from
    that runner's median; after twice ``rounds`` in all, what is there has to do. Where no ratio is
    taken within a round (``together=False``) only the unsteady turns of a round are.
    """
    for run in [*runners.values()] * WARM_UP:
        run()
    history: list[dict[str, Turn]] = []
    kept: dict[str, list[Turn]] = {name: [] for name in runners}
    while min(map(len, kept.values())) < rounds and len(history) < 2 * rounds:
        history.append({name: run() for name, run in runners.items()})
        usual = {n: statistics.median(turns[n].gemm for turns in history) for n in runners}
        steady = [
            {n for n in runners if abs(turns[n].gemm / usual[n] - 1) <= UNSTEADY}
            for turns in history
        ]
        whole = [names if not together or len(names) == len(runners) else () for names in steady]
        kept = {
            n: [t[n] for t, names in zip(history, whole, strict=True) if n in names]
            for n in runners
        }
    if not all(kept.values()):
        sys.exit("error: no round was steady; measure when the machine is less busy.")
    return Timing(
        {name: [turn.seconds for turn in turns] for name, turns in kept.items()},
        statistics.median(turn.gemm for turns in kept.values() for turn in turns),
        len(history) - min(map(len, kept.values())),
    )


def worst(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """Largest difference of any array of ``ours``, relative to the largest number of theirs.

    NaN counts as infinitely wrong; where theirs is all zero the difference is absolute.
    """
    found = 0.0
    for name, array in ours.items():
        size = np.abs(theirs[name]).max() or 1.0
        found = max(found, float(np.nan_to_num(np.abs(array - theirs[name]).max() / size, nan=1e9)))
    return found


def require_parity(deviations: Mapping[str, float], dtype: str) -> None:
    """Exit with an error if any deviation is beyond ``LIMITS``."""
    wrong = {name: value for name, value in deviations.items() if not value < LIMITS[dtype]}
    if wrong:
        found = ", ".join(f"{name} by {value:.1e}" for name, value in wrong.items())
        sys.exit(
            f"error: jaxft and torch differ in {found}, relative, where {LIMITS[dtype]:.0e} is "
            f"allowed in {dtype}; what is wrong is not timed."
        )


def parser(
    description: str, *, models: Sequence[str] = MODELS, sides: Sequence[str] = ("torch", "jaxft")
) -> argparse.ArgumentParser:
    """The options that the scripts have in common; fewer where jaxft is alone."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--model", choices=models, help=f"default {FULL['model']}")
    found.add_argument("--dtype", choices=sorted(LIMITS), default="float32")
    found.add_argument("--rounds", type=int, help=f"steady ones; default {FULL['rounds']}")
    found.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    found.add_argument("--quick", action="store_true", help="tiny, to try the script")
    if "torch" in sides:
        found.add_argument("--cells", type=int, help="crystals of 8 cells³ atoms; default 2")
        found.add_argument("--repeats", type=int, default=1, help="times four crystals")
        found.add_argument("--malloc", choices=MALLOCS, default="both")
        found.add_argument("--wrong", action="store_true", help="give jaxft one wrong weight")
    output_options(found)
    return found


def output_options(found: argparse.ArgumentParser) -> None:
    """The options that say where results go."""
    found.add_argument("--json", action="store_true", help="only the last line")
    found.add_argument("--write", action="store_true", help="merge the case into results/NAME.json")


def parse(found: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with their defaults; holds this process and its children to the threads."""
    args = found.parse_args()
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)
    if min(vars(args).get("rounds", 1), vars(args).get("cells", 1), args.threads) < 1:
        found.error("--rounds, --cells and --threads have to be at least 1.")
    confine(args.threads)
    return args


def confine(threads: int) -> None:
    """Let this process and all its children run on so many processors only."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        sys.exit(f"error: {threads} threads were asked for; {len(allowed)} processors are there.")
    os.sched_setaffinity(0, allowed[:threads])


def torch_children(case: Case, malloc: str) -> dict[str, Child]:
    """``{"torch": …, "torch_tuned": …}``, or others of ``FORMS``."""
    return {name: Child(TorchMace, case, tunables=FORMS[name]) for name in MALLOCS[malloc]}


def ratios(medians: Mapping[str, float], *, suffix: str = "") -> dict[str, float]:
    """``ratio``: torch over jaxft; ``ratio_tuned``: torch with a tuned allocator over jaxft; …

    If torch ran in one other form alone, ``ratio`` is that, as ``malloc`` in the settings says.
    """
    names = {f"ratio{form.removeprefix('torch')}": f"{form}{suffix}" for form in FORMS}
    found = {k: medians[name] / medians["jaxft"] for k, name in names.items() if name in medians}
    found.setdefault("ratio", next(iter(found.values())))
    return {f"{key}{suffix}": round(value, 2) for key, value in sorted(found.items())}


PACKAGES = ("jax", "jaxlib", "jaxft", "torch", "mace-torch", "e3nn", "numpy")


def settings(args: argparse.Namespace, *, torch: bool = True, **more: Any) -> dict[str, Any]:
    """What the figures depend on besides the case; ``torch``: whether torch ran too."""
    forms = {n: FORMS[n] or "default" for n in MALLOCS[args.malloc]} if torch else {}
    return {
        **more,
        "dtype": getattr(args, "dtype", None),
        "precision": PRECISION,
        "threads": args.threads,
        "malloc": forms | {"jaxft": HUGE},
        "processor": processor(),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((li.partition(":")[2].strip() for li in lines if li.startswith("model name")), "")


def commit() -> str:
    """The commit, with ``+`` if code differs from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(HERE.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "jaxft", "converters", "benchmarks/*.py")
    return f"{git('rev-parse', '--short=12', 'HEAD')}{'+' if changed else ''}"


def finish(name: str, key: str, result: dict[str, Any], args: argparse.Namespace) -> None:
    """Merge the case into ``results/NAME.json`` if asked to, and print it as the last line."""
    if args.write:
        path = RESULTS / f"{name}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {key: result}, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, ensure_ascii=False), flush=True)
