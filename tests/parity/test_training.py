"""jaxft trains as torch MACE trains: 20 updates, float64, same weights, same batches.

The reference is mace-torch's own step (``take_step``), its own parameter groups and optimisers
(``get_params_options``, ``get_optimizer``) and its own loss. The largest difference of each run is
attached to its test (``pytest -rP`` prints it).
"""

import argparse
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
pytest.importorskip("mace")

from mace import modules  # noqa: E402
from mace.tools.scripts_utils import get_optimizer, get_params_options  # noqa: E402
from mace.tools.train import take_step  # noqa: E402
from parity import reference  # noqa: E402

import jaxft  # noqa: E402
from converters.rules import parameter_rules  # noqa: E402
from converters.to_jax import convert  # noqa: E402
from jaxft import data, loss, tree  # noqa: E402
from jaxft.optimizer import Plateau, optimizer  # noqa: E402
from jaxft.strategies import freeze  # noqa: E402
from jaxft.train import Trainable  # noqa: E402

STEPS = 20
WEIGHTS = {"energy": 3.0, "forces": 10.0, "stress": 50.0}
PARITY = 1e-8
"""Of every parameter after 20 updates; parameters are of order 1, and move by ``MOVED`` or more."""
MOVED = 1e-3
OUTPUTS = {"forces": True, "virials": True, "stress": True}


class Case:
    """A random torch MACE, its weights in jaxft, and three batches for both."""

    def __init__(self, name, tmp_path):
        self.name, self.file = name, tmp_path / "start.model"
        reference.save(reference.build(name), self.file)
        self.model, params = convert(self.file)
        self.params = jax.tree.map(jnp.asarray, params)
        rng = np.random.default_rng(3)
        self.frames = []
        for _ in range(3):
            crystals = reference.labelled_crystals(self.model, head=self.model.heads[-1])
            for atoms in crystals:
                atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
                atoms.info["REF_energy"] += rng.normal()
                atoms.arrays["REF_forces"] += rng.normal(size=atoms.positions.shape)
            self.frames.append(crystals)
        flat = [data.from_atoms(atoms) for crystals in self.frames for atoms in crystals]
        dataset = data.prepare(flat, self.model, head=self.model.heads[-1])
        shape = data.shapes(dataset, 2)[-1]
        self.batches = [data.pack(dataset, [2 * i, 2 * i + 1], shape, "float64") for i in range(3)]
        self.objective = loss.weighted(self.model, **WEIGHTS)
        self.gradient = jax.jit(jax.grad(lambda p, b: self.objective(p, b)[0]))

    def theirs(self, *, clip_norm=None, **settings):
        """Leaves after torch MACE's own training."""
        module = reference.load(self.file)
        optimiser = (
            torch.optim.SGD(module.parameters(), **settings["sgd"])
            if "sgd" in settings
            else _mace_optimizer(module, **settings)
        )
        batches = [
            reference.batch_of(module, frames, head=self.model.heads[-1]) for frames in self.frames
        ]
        with reference.default_dtype("float64"):
            loss_fn = modules.WeightedEnergyForcesStressLoss(*WEIGHTS.values())
            for i in range(STEPS):
                take_step(
                    module, loss_fn, batches[i % 3], optimiser, None, OUTPUTS, clip_norm, "cpu"
                )
        tensors = {name: p.detach().numpy() for name, p in module.named_parameters()}
        leaves = {}
        for rule in parameter_rules(self.model.config):
            leaves |= rule.to_leaves(tensors[rule.name])
        return leaves

    def ours(self, tx):
        """Leaves after ours, with one compiled gradient for every optimiser."""
        trainable = Trainable(self.params, {})
        state = tx.init(trainable)
        for i in range(STEPS):
            gradient = Trainable(self.gradient(trainable.params, self.batches[i % 3]), {})
            updates, state = tx.update(gradient, state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        return tree.flatten(trainable.params)

    def engine(self, recipe, tx):
        """Leaves after ours, by the engine."""
        init, step = jaxft.finetune(self.objective, recipe, tx)
        state = init(jax.random.key(0), self.params)
        for i in range(STEPS):
            state, _ = step(state, self.batches[i % 3])
        return tree.flatten(jaxft.merge(recipe, state))


def _mace_optimizer(module, *, name="adam", lr, amsgrad=False, weight_decay=0.0, level=0):
    arguments = argparse.Namespace(
        optimizer=name,
        lr=lr,
        amsgrad=amsgrad,
        weight_decay=weight_decay,
        beta=0.9,
        freeze=level,
        lr_params_factors=json.dumps({}),
    )
    return get_optimizer(arguments, get_params_options(arguments, module))


def compare(case, theirs, ours, record_property, bound=PARITY):
    """Largest absolute difference of a leaf, and how far training went."""
    assert theirs.keys() == ours.keys()
    start = tree.flatten(case.params)
    gaps = {path: float(np.abs(theirs[path] - ours[path]).max()) for path in ours}
    moved = max(float(np.abs(theirs[path] - start[path]).max()) for path in ours)
    worst = max(gaps, key=gaps.get)
    print(f"{case.name}: moved {moved:.1e}, largest difference {gaps[worst]:.1e} in {worst}")
    record_property("difference", gaps[worst])
    record_property("moved", moved)
    assert moved >= MOVED
    assert gaps[worst] <= bound


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Each model once, with its compiled gradient."""
    return functools.cache(lambda name: Case(name, tmp_path_factory.mktemp(name)))


DECAYING = {"params/interactions_*/linear/**": 5.0, "params/products_*/**": 5.0}
"""The groups of torch MACE: names with ``linear.weight`` among interactions, and all products."""

RUNS = {
    "sgd": ({"sgd": {"lr": 1e-5}}, ("sgd", 1e-5), {}),
    "momentum": ({"sgd": {"lr": 1e-6, "momentum": 0.9}}, ("momentum", 1e-6), {}),
    "adam": ({"lr": 1e-3}, ("adam", 1e-3), {}),
    "amsgrad": ({"lr": 1e-3, "amsgrad": True}, ("amsgrad", 1e-3), {}),
    "adamw, decay by group": (
        {"lr": 1e-3, "name": "adamw", "weight_decay": 5.0},
        ("adamw", 1e-3),
        {"weight_decay": DECAYING},
    ),
    "adam, clipped": ({"lr": 1e-3, "clip_norm": 1.0}, ("adam", 1e-3), {"clip_norm": 1.0}),
    "sgd, clipped": ({"sgd": {"lr": 1e-3}, "clip_norm": 1.0}, ("sgd", 1e-3), {"clip_norm": 1.0}),
}
"""{name: (torch MACE's settings, ours, our options)}."""


@pytest.mark.parametrize("run", RUNS)
def test_parameters_after_20_updates_are_those_of_torch_mace(cases, run, record_property):
    """Where it clips, torch divides by the norm + 1e-6 and we by the norm: 1e-11 in the end."""
    case = cases("small-d")
    given, arguments, options = RUNS[run]
    theirs = case.theirs(**given)
    compare(case, theirs, case.ours(optimizer(*arguments, **options)), record_property)


ENGINE = {
    "a larger variety": ("small-mh-1", (), 0),
    "freeze 5": ("small-d", (freeze(["node_embedding/**", "interactions_*/**"]),), 5),
}


@pytest.mark.parametrize("what", ENGINE if os.environ.get("JAXFT_ALL_PARITY") else ["freeze 5"])
def test_the_engine_trains_as_torch_mace_does(cases, what, record_property):
    """With torch MACE's defaults, amsgrad and clipping; frozen leaves are out of the norm too."""
    name, recipe, level = ENGINE[what]
    case = cases(name)
    theirs = case.theirs(lr=1e-3, amsgrad=True, level=level, clip_norm=10.0)
    ours = case.engine(recipe, optimizer("amsgrad", 1e-3, clip_norm=10.0))
    compare(case, theirs, ours, record_property)
    still = {path for path, leaf in tree.flatten(case.params).items() if (ours[path] == leaf).all()}
    frozen = {path for path in ours if path.startswith(("node_embedding/", "interactions_"))}
    assert still == (frozen if level else set())


@pytest.mark.parametrize("scale", [1.0, 1e-8], ids=["large", "about eps"])
@pytest.mark.parametrize("name", ["adam", "amsgrad"])
def test_epsilon_and_the_maximum_are_where_torch_has_them(name, scale):
    """Gradients shrink from the first on, which is what distinguishes the maxima."""
    rng = np.random.default_rng(0)
    gradients = scale * rng.normal(size=(30, 5)) / np.arange(1, 31)[:, None]
    theirs = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimiser = torch.optim.Adam([theirs], lr=0.1, amsgrad=name == "amsgrad")
    ours = jnp.zeros(5)
    tx = optimizer(name, 0.1)
    state = tx.init(ours)
    for gradient in gradients:
        theirs.grad = torch.as_tensor(gradient)
        optimiser.step()
        updates, state = tx.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-12)


def test_a_plateau_reduces_when_torch_does():
    rng = np.random.default_rng(0)
    values = np.maximum(1.0 - 0.05 * np.arange(80), 0.3) + 0.02 * rng.normal(size=80)
    values[40] = np.nan
    options = {"factor": 0.7, "patience": 4, "threshold": 0.01}
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, **options, min_lr=0.1)
    ours = Plateau(**options, min_factor=0.1)
    found, expected = [], []
    for value in values:
        theirs.step(value)
        ours = ours.update(value)
        expected.append(optimiser.param_groups[0]["lr"])
        found.append(ours.scale)
    assert found == expected
    assert min(found) == 0.1
