"""Losses against mace-torch's own modules, given the same predictions and labels; float64."""

from types import SimpleNamespace

import ase.build
import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mace")
from mace.modules import loss as theirs  # noqa: E402

from jaxft import data, loss  # noqa: E402
from jaxft.graph import Labels  # noqa: E402

pytestmark = pytest.mark.torch

ROUNDING = 1e-12
"""Relative; sums of a few hundred numbers in float64."""

LAMBDAS = {"energy": 3.0, "forces": 7.0, "stress": 11.0}
DELTA = 0.05
SIZES = (50.0, 100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 0.0)
"""eV/Å; reference forces in and at the ends of all four ranges of the conditional Huber loss."""


class Named(dict):
    """A batch of mace-torch, as its losses see it: attributes that are items too."""

    __getattr__ = dict.__getitem__


@pytest.fixture(scope="module")
def batch():
    """Three crystals with all labels and weight 1, and padding; volumes and sizes differ."""
    rng = np.random.default_rng(0)
    frames = []
    for a, repeat in ((5.6, 1), (5.8, 2), (5.4, 3)):
        atoms = ase.build.bulk("NaCl", "rocksalt", a) * (repeat, 1, 1)
        atoms.info["REF_energy"] = rng.normal()
        atoms.info["REF_stress"] = 0.1 * np.sum(rng.normal(size=(2, 3, 3)), axis=0)
        forces = rng.normal(size=(len(atoms), 3))
        sizes = np.resize(SIZES, len(atoms))
        forces *= (sizes / np.linalg.norm(forces, axis=1))[:, None]
        forces[1] = (100.0, 0.0, 0.0)  # a bound itself, without rounding
        atoms.arrays["REF_forces"] = forces
        frames.append(data.from_atoms(atoms))
    model = SimpleNamespace(
        atomic_numbers=(11, 17),
        r_max=3.0,
        e0s=np.zeros((1, 2)),
        embeddings=(),
        moments=None,
        head_index=lambda head: 0,
    )
    (found,) = data.epoch(data.prepare(frames, model), 3, dtype="float64")
    return found


@pytest.fixture(scope="module", params=[1.0, 0.02], ids=["far", "near"])
def predicted(batch, request):
    """Off by about so much, so that Huber functions are met on both sides of δ."""
    rng = np.random.default_rng(1)
    scale = request.param
    return Labels(*(x + rng.normal(scale=scale, size=x.shape) for x in batch.labels[:3]))


def tensors(values, batch):
    """Energies, forces, stresses and virials of the real frames; torch, with gradients."""
    graphs, atoms = batch.graph.is_graph, batch.graph.is_atom
    energy, forces, stress = values.energy[graphs], values.forces[atoms], values.stress[graphs]
    virials = -stress * batch.graph.volume[graphs][:, None, None]
    found = {"energy": energy, "forces": forces, "stress": stress, "virials": virials}
    return {name: torch.tensor(x, requires_grad=True) for name, x in found.items()}


def reference(module, predicted, batch):
    """The value, and its gradients by predicted energies, forces and (unless virials) stresses."""
    graphs = batch.graph.is_graph
    ones = torch.ones(int(graphs.sum()), dtype=torch.float64)
    weights = dict.fromkeys(
        ("weight", "energy_weight", "forces_weight", "stress_weight", "virials_weight"), ones
    )
    ptr = torch.tensor(np.concatenate([[0], np.cumsum(batch.n_atoms[graphs])]))
    ref = Named(tensors(batch.labels, batch) | weights | {"ptr": ptr})
    given = tensors(predicted, batch)
    value = module(ref, given)
    value.backward()
    return value.item(), {name: x.grad for name, x in given.items() if x.grad is not None}


CASES = {
    "mse": ("mse", lambda e, f, s: theirs.WeightedEnergyForcesStressLoss(e, f, s)),
    "virials": ("mse", lambda e, f, s: theirs.WeightedEnergyForcesVirialsLoss(e, f, s)),
    "huber": ("huber", lambda e, f, s: theirs.WeightedHuberEnergyForcesStressLoss(e, f, s, DELTA)),
    "universal": ("universal", lambda e, f, s: theirs.UniversalLoss(e, f, s, DELTA)),
    "l2": ("l2", lambda e, f, s: theirs.WeightedEnergyForcesL1L2Loss(e, f)),
}


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_its_gradients_are_those_of_mace_torch(name, batch, predicted):
    error, make = CASES[name]
    expected, gradients = reference(make(*LAMBDAS.values()), predicted, batch)
    lambdas = dict(LAMBDAS)
    if name == "virials":
        lambdas["virials"] = lambdas.pop("stress")
    if name == "l2":
        del lambdas["stress"]

    def value(predicted):
        found = loss.terms(predicted, batch, error=error, delta=DELTA)
        return sum(weight * found[term] for term, weight in lambdas.items())

    ours, gradient = jax.value_and_grad(value)(predicted)
    assert float(ours) == pytest.approx(expected, rel=ROUNDING)
    assert {"energy", "forces"} <= set(gradients)
    for term in ("energy", "forces", "stress"):
        real = batch.graph.is_atom if term == "forces" else batch.graph.is_graph
        found = np.asarray(getattr(gradient, term))
        assert not found[~real].any()
        if term in gradients:
            np.testing.assert_allclose(found[real], gradients[term], rtol=1e-11, atol=1e-14)


def test_all_ranges_of_the_conditional_huber_loss_are_met(batch):
    atoms = batch.graph.is_atom
    size = np.linalg.norm(batch.labels.forces[atoms], axis=1)
    assert set(np.searchsorted(loss.BOUNDS, size, side="right")) == {0, 1, 2, 3}
    assert (size == 100.0).any()
