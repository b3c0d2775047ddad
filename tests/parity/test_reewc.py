"""reEWC as published, written out in torch, against a recipe of ``ewc`` on alternating batches.

The torch side is the released loop (``sevenn/train/reewc``), in this file's own words: EWC in both
steps of an iteration, one Adam for both. The research version left out ``zero_grad`` between them.
Float64, the same weights, the same batches; the Fisher is torch's own on its side.
"""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
pytest.importorskip("mace")

from mace import modules  # noqa: E402
from parity import reference  # noqa: E402

import jaxft  # noqa: E402
from converters.rules import parameter_rules  # noqa: E402
from converters.to_jax import convert  # noqa: E402
from jaxft import data, loss, tree  # noqa: E402
from jaxft.optimizer import add_previous  # noqa: E402
from jaxft.strategies.ewc import ewc  # noqa: E402

ITERATIONS, RATE, STRENGTH = 10, 4e-3, 0.1
"""The rate is the preset's; λ is chosen so that the penalty turns the trajectory visibly."""

WEIGHTS = {"energy": 1.0, "forces": 1.0, "stress": 10.0}

PARITY = 1e-10
"""Of parameters of order 1, after 20 updates of about 4e-3 each; 2e-15 was seen."""

FISHER = 1e-9
"""Relative to the largest value of a leaf."""


class Case:
    """A small torch MACE with target and memory frames, in both worlds."""

    def __init__(self, folder) -> None:
        self.path = folder / "start.model"
        reference.save(reference.build("small-1-layer"), self.path)
        self.model, params = convert(self.path)
        self.params = jax.tree.map(jnp.asarray, params)
        rng = np.random.default_rng(7)
        self.atoms = []
        for _ in range(4):
            for atoms in reference.labelled_crystals(self.model):
                atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
                atoms.info["REF_energy"] += rng.normal()
                self.atoms.append(atoms)
        self.target, self.memory = [[0, 1], [2, 3]], [[4, 5], [6, 7]]
        frames = [data.from_atoms(atoms) for atoms in self.atoms]
        self.dataset = data.prepare(frames, self.model, row_width=16)
        self.objective = loss.weighted(self.model, **WEIGHTS)

    def ours(self, chosen):
        size = 2 if len(chosen) > 1 else 1
        return data.pack(self.dataset, chosen, data.shapes(self.dataset, size)[-1], "float64")

    def leaves(self, tensors):
        """Arrays by torch name as arrays by leaf path."""
        found = {}
        for rule in parameter_rules(self.model.config):
            found |= rule.to_leaves(tensors[rule.name])
        return found


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("reewc"))


def in_torch(case):
    """The module, ``chosen -> loss``, and a fresh batch each time, since mace writes into it."""
    module = reference.load(case.path)
    with reference.default_dtype("float64"):
        measure = modules.WeightedEnergyForcesStressLoss(*WEIGHTS.values())

    def data_loss(chosen):
        batch = reference.batch_of(module, [case.atoms[i] for i in chosen])
        out = module(batch.to_dict(), training=True, compute_force=True, compute_stress=True)
        return measure(batch, out)

    return module, data_loss


def torch_fisher(module, data_loss, frames):
    """Squares of the gradient of the whole loss of one configuration at a time, averaged."""
    fisher = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for frame in frames:
        module.zero_grad()
        data_loss([frame]).backward()
        for name, p in module.named_parameters():
            if p.grad is not None:
                fisher[name] += p.grad.data.clone().pow(2) / len(frames)
    module.zero_grad()
    return fisher


def published_loop(case, *, strength, has_zero_grad):
    """The parameters after ``ITERATIONS``, and the two losses of each."""
    module, data_loss = in_torch(case)
    fisher = torch_fisher(module, data_loss, [*case.memory[0], *case.memory[1]])
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)

    def ewc_loss():
        return sum(
            (fisher[name] * (p - start[name]).pow(2)).sum() for name, p in module.named_parameters()
        )

    losses = []
    memory = itertools.cycle(case.memory)
    for _, target in zip(range(ITERATIONS), itertools.cycle(case.target), strict=False):
        optimizer.zero_grad()
        first = data_loss(target) + strength / 2 * ewc_loss()
        first.backward()
        optimizer.step()
        if has_zero_grad:
            optimizer.zero_grad()
        second = data_loss(next(memory)) + strength / 2 * ewc_loss()
        second.backward()
        optimizer.step()
        losses.append((first.item(), second.item()))
    return {name: p.detach().numpy() for name, p in module.named_parameters()}, losses


@pytest.fixture(scope="module")
def fisher(case):
    singles = [case.ours([i]) for i in [*case.memory[0], *case.memory[1]]]
    return jaxft.fisher(case.objective, case.params, singles)


def test_the_fisher_is_torchs(case, fisher):
    expected = torch_fisher(*in_torch(case), [*case.memory[0], *case.memory[1]])
    leaves = case.leaves({name: value.numpy() for name, value in expected.items()})
    for path, value in tree.flatten(fisher.values).items():
        scale = max(np.abs(leaves[path]).max(), 1e-20)
        np.testing.assert_allclose(value / scale, leaves[path] / scale, atol=FISHER, err_msg=path)


@pytest.mark.parametrize("has_zero_grad", [True, False], ids=["released", "research"])
def test_twenty_updates_end_at_the_same_parameters(case, fisher, has_zero_grad, record_property):
    expected, losses = published_loop(case, strength=STRENGTH, has_zero_grad=has_zero_grad)
    tx = optax.adam(RATE)
    if not has_zero_grad:
        tx = optax.chain(add_previous(), tx)
    recipe = (ewc(fisher, strength=STRENGTH),)
    init, step = jaxft.finetune(case.objective, recipe, tx)
    state, seen, penalties = init(jax.random.key(0), case.params), [], []
    turns = zip(itertools.cycle(case.target), itertools.cycle(case.memory))
    for chosen in itertools.islice(itertools.chain.from_iterable(turns), 2 * ITERATIONS):
        state, info = step(state, case.ours(chosen))
        seen.append(float(info["loss"]))
        penalties.append(float(info["penalty/ewc"]))
    np.testing.assert_allclose(seen, np.ravel(losses), rtol=1e-8)
    got, wanted = tree.flatten(jaxft.merge(recipe, state)), case.leaves(expected)
    apart = {path: np.abs(np.asarray(got[path]) - wanted[path]).max() for path in wanted}
    moved = max(np.abs(got[p] - leaf).max() for p, leaf in tree.flatten(case.params).items())
    record_property("apart", json.dumps(max(apart.values())))
    record_property("moved", json.dumps(float(moved)))
    record_property("penalty", json.dumps(penalties[-1] / seen[-1]))
    assert max(apart.values()) <= PARITY, apart
    assert moved > 5 * RATE
    # Zero at the start, so the first update is that of plain fine-tuning; then in both kinds.
    assert penalties[0] == 0.0
    assert all(penalty > 1e-3 * total for penalty, total in zip(penalties[2:], seen[2:]))


def test_without_strength_the_loop_is_alternating_replay_and_ewc_does_change_it(case):
    """Of the transcription itself: parity would not see a λ that does nothing."""
    plain, _ = published_loop(case, strength=0.0, has_zero_grad=True)
    leashed, _ = published_loop(case, strength=STRENGTH, has_zero_grad=True)
    research, _ = published_loop(case, strength=STRENGTH, has_zero_grad=False)
    for other in (plain, research):
        assert max(np.abs(leashed[name] - other[name]).max() for name in leashed) > 1e-3
