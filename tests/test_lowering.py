"""Every program lowers for CUDA and TPU, which nobody needs to own: no callbacks, no float64.

Lowering makes the StableHLO that the platform's compiler would be given. It shows operations that
the platform lacks, calls back to the host, library calls and dtypes; not memory and not speed.
"""

import functools
import re

import ase.build
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import data, finetune, loss, parallel, strategies
from jaxft.calculator import JaxftCalculator
from jaxft.evaluate import predictions
from jaxft.graph import Batch
from jaxft.validation import validator

PLATFORMS = ("cuda", "tpu")

KNOWN_CALLS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
"""Custom calls that are annotations for XLA itself, on every platform."""

ATTRIBUTE = re.compile(r"\w+ = dense<[^>]*> : tensor<[^>]*>")
"""Of an operation, such as the devices that it adds over: no value of the program."""

WEIGHTS = {"energy": 1.0, "forces": 10.0, "stress": 1.0}

RECIPES = {
    "full": (),
    "frozen": (strategies.freeze("interactions_*/**"),),
    "lora": (strategies.lora(rank=1, also_train="readouts_*/**"),),
}

KINDS = ("mp-0", "0b3", "mh-1", "embedding")
"""Residual blocks; density, Agnesi and ZBL; non-linear blocks; charge and spin as in OMOL."""


def violations(module: str, *, enable_x64: bool) -> list[str]:
    """What a program in StableHLO should not hold.

    With x64 on, Python's numbers are float64 scalars until they meet an array, and XLA folds them;
    arrays of 64 bits are leaks. With x64 off there is nothing of 64 bits at all.
    """
    shape = r"(?:\d+x)+" if enable_x64 else r"(?:\d+x)*"
    wide = re.compile(rf"tensor<{shape}(?:f64|u?i64|ui64|complex<f64>)>")
    values = ATTRIBUTE.sub("", module)
    found = [f"64 bits: {line.strip()[:200]}" for line in values.splitlines() if wide.search(line)]
    calls = set(re.findall(r"custom_call @([\w.$]+)", module)) - KNOWN_CALLS
    return [f"calls {name}" for name in sorted(calls)] + found


def check(jitted, *args, platform: str) -> None:
    """Lower a jitted function of float32 arrays and look at the program."""
    enable_x64 = jax.config.read("jax_enable_x64")
    exported = jax.export.export(jitted, platforms=[platform])(*args)
    found = violations(exported.mlir_module(), enable_x64=enable_x64)
    assert not found, "\n".join(found)
    assert not exported.ordered_effects
    assert not exported.unordered_effects


@pytest.fixture(scope="module")
def models(small, tmp_path_factory):
    """``kind -> model, float32 params, batch, atoms``, made when asked for."""

    @functools.cache
    def made(kind):
        if kind == "mp-0":
            model, params = small
        else:
            pytest.importorskip("mace")
            from parity import reference

            from converters.to_jax import convert

            file = tmp_path_factory.mktemp(kind) / "random.model"
            density = reference.AGNESI_ZBL | {"blocks": "D DR"}
            name, changes = {
                "0b3": ("small-d", density),
                "mh-1": ("small-mh-1", {}),
                "embedding": ("small-charge-spin", {}),
            }[kind]
            model, params = convert(reference.save(reference.build(name, **changes), file))
        atoms = ase.build.molecule("H2O", vacuum=3.0)
        atoms.pbc = True
        atoms.info |= {"REF_energy": -14.0, "REF_stress": np.eye(3)}
        atoms.arrays["REF_forces"] = np.ones((3, 3))
        dataset = data.prepare([data.from_atoms(atoms)], model, head=model.heads[0])
        (batch,) = data.epoch(dataset, 1, dtype="float32")
        return model, jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), params), batch, atoms

    return made


def lower_step(model, params, batch, *, recipe, platform, accumulate=1):
    objective = loss.weighted(model, **WEIGHTS)
    init, step = finetune(objective, recipe, optax.adamw(1e-3), accumulate=accumulate)
    state = jax.eval_shape(init, jax.random.key(0), params)
    if accumulate > 1:
        batch = jax.tree.map(lambda leaf: np.stack([leaf] * accumulate), batch)
    check(step, state, batch, platform=platform)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_training_step_lowers(models, kind, platform):
    model, params, batch, _ = models(kind)
    lower_step(model, params, batch, recipe=(), platform=platform)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("recipe", ["frozen", "lora"])
def test_the_step_of_a_recipe_lowers(models, recipe, platform):
    model, params, batch, _ = models("mp-0")
    lower_step(model, params, batch, recipe=RECIPES[recipe], platform=platform)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_accumulated_step_lowers(models, platform):
    model, params, batch, _ = models("mp-0")
    lower_step(model, params, batch, recipe=(), platform=platform, accumulate=2)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_step_lowers_without_x64(models, platform):
    """As `jaxft finetune` runs it in float32."""
    model, params, batch, _ = models("mp-0")
    with jax.enable_x64(False):
        lower_step(model, params, batch, recipe=(), platform=platform)


class Lowered:
    """In place of a jitted function: lowers what it is called with, and ends the run."""

    def __init__(self, jitted, platform, seen):
        self._jitted, self._platform, self._seen = jitted, platform, seen

    def __call__(self, *args):
        if not any(isinstance(arg, Batch) for arg in args):
            return self._jitted(*args)
        check(self._jitted, *args, platform=self._platform)
        self._seen.append(args)
        raise InterruptedError

    lower = __call__


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_evaluation_step_lowers(models, platform, monkeypatch):
    model, params, _, atoms = models("mp-0")
    seen, jitted = [], jax.jit
    monkeypatch.setattr(
        jax, "jit", lambda function, **options: Lowered(jitted(function, **options), platform, seen)
    )
    validate = validator(
        model,
        loss.weighted(model, **WEIGHTS),
        {"valid": data.prepare([data.from_atoms(atoms)], model)},
        weights=WEIGHTS,
        batch_size=1,
        dtype="float32",
        mesh=parallel.mesh(),
    )
    with pytest.raises(InterruptedError):
        validate(params)
    ((judged, _),) = seen
    assert jax.tree.structure(judged) == jax.tree.structure(params)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_calculator_runs_lowers(models, kind, platform, monkeypatch):
    model, params, _, atoms = models(kind)
    seen = []

    def lowered(alike, *args):
        run = jax.jit(lambda *arrays: program.__wrapped__(alike, *arrays))
        check(run, *args, platform=platform)
        seen.append(args)
        raise InterruptedError

    program = predictions._predict
    monkeypatch.setattr(predictions, "_predict", lowered)
    calculator = JaxftCalculator(model, params, dtype="float32", head=model.heads[0])
    with pytest.raises(InterruptedError):
        calculator.calculate(atoms)
    assert len(seen) == 1


def leak(x):
    return x * np.arange(3, dtype="float64")


def wide_index(x):
    return x[jnp.argsort(x).astype("int64")]


def calls_back(x):
    return jax.pure_callback(np.sin, x, x, vmap_method="sequential")


def prints(x):
    jax.debug.print("{}", x)
    return x


def general_eigenvalues(x):
    return jnp.linalg.eigvals(x * jnp.eye(3, dtype="float32"))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("function", "error"),
    [
        (leak, AssertionError),
        (wide_index, AssertionError),
        (calls_back, ValueError),
        (prints, ValueError),
        (general_eigenvalues, (ValueError, NotImplementedError)),  # a library's, and none at all
    ],
)
def test_what_a_platform_should_not_be_given_is_seen(function, error, platform):
    with pytest.raises(error):
        check(jax.jit(function), jax.ShapeDtypeStruct((3,), "float32"), platform=platform)


def test_a_sound_program_passes():
    for platform in PLATFORMS:
        for enable_x64 in (True, False):
            with jax.enable_x64(enable_x64):
                check(
                    jax.jit(lambda x: jnp.sqrt(2 * x) @ x + x[jnp.array([2, 0, 1], "int32")]),
                    jax.ShapeDtypeStruct((3,), "float32"),
                    platform=platform,
                )
