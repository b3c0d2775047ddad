"""Replay strategies, and labels that the starting model makes."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxft import data, surgery, tree
from jaxft import loss as losses
from jaxft.evaluate.predictions import predict_frames
from jaxft.evaluate.pseudolabel import pseudolabel, resolve
from jaxft.strategies import base
from jaxft.strategies.replay import multihead_replay, pseudolabel_replay, replay

STRATEGIES = [replay, multihead_replay, pseudolabel_replay]
ROUNDING = 1e-10
"""eV, eV/Å: float64 through another padding."""


@pytest.fixture(scope="module")
def labelled(model, params, frames):
    return pseudolabel(model, params, frames, batch_size=len(frames))


@pytest.fixture(scope="module")
def two_heads(model, params):
    return surgery.add_head(model, params, "new", e0s={1: -20.0, 8: -3.0})


@pytest.fixture(scope="module")
def gradient(two_heads):
    """``(params, batch) -> (loss, terms), gradient`` of a smooth loss on the two-headed model."""
    objective = losses.weighted(two_heads[0], energy=1.0, forces=1.0, stress=10.0)
    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def packed(mixture, batch):
    """A batch of the first epoch, in one shape for all tests: one compilation."""
    chosen = mixture.indices(0, batch, seed=0)
    return data.pack(mixture.dataset, chosen, data.Shape(80, 300, 10), "float64")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replay_brings_a_source_and_touches_no_parameter(strategy, frames):
    made = strategy(frames, head="Default", fraction=0.25, weight=2.0)
    (source,) = made.sources
    assert (source.name, source.frames, source.head) == (made.name, frames, "Default")
    assert (source.fraction, source.weight, source.schedule) == (0.25, 2.0, "mixed")
    neutral = base.Strategy(name="neutral")
    for slot in ("trains", "init", "apply", "penalty", "project"):
        assert getattr(made, slot) is getattr(neutral, slot)
    assert made.cites


def test_the_three_differ_in_labels_and_in_whose_head_they_want(frames):
    found = [strategy(frames, head="Default").sources[0] for strategy in STRATEGIES]
    assert [s.labels for s in found] == ["given", "given", "base"]
    assert [s.is_apart for s in found] == [False, True, False]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_updates_of_its_own_are_passed_on(strategy, frames):
    made = strategy(frames, head="x", schedule="alternate", batch_size=3, steps=2, name="mine")
    (source,) = made.sources
    assert (source.schedule, source.batch_size, source.steps) == ("alternate", 3, 2)
    assert (made.name, source.name) == ("mine", "mine")


def test_sources_of_a_recipe_are_gathered_and_names_unique(frames):
    recipe = (replay(frames), multihead_replay(frames, head="Default"))
    assert [s.name for s in base.sources(recipe)] == ["replay", "multihead_replay"]
    twice = (replay(frames, name="a"), pseudolabel_replay(frames, name="a"))
    with pytest.raises(ValueError, match="more than one source named 'a'"):
        base.sources(twice)


# --- labels of the starting model -----------------------------------------------------------------


def test_pseudolabels_are_the_predictions_of_the_model(model, params, frames, labelled):
    results = predict_frames(model, params, frames, batch_size=len(frames))
    for frame, made, result in zip(frames, labelled, results, strict=True):
        assert made.energy == result.energy != frame.energy
        np.testing.assert_array_equal(made.forces, result.forces)
        assert (made.stress is None) == (not frame.is_periodic)
        if made.stress is not None:
            np.testing.assert_array_equal(made.stress, result.stress)
        np.testing.assert_array_equal(made.positions, frame.positions)


def test_stress_can_be_kept_to_frames_that_had_one_and_weights_stay(model, params, frames):
    given = [
        replace(f, stress=f.stress if i % 2 else None, weight=2.5) for i, f in enumerate(frames)
    ]
    had = [f.stress is not None for f in given]
    assert 0 < sum(had) < sum(f.is_periodic for f in frames)
    for stress, expected in (("labelled", had), (None, [f.is_periodic for f in frames])):
        found = pseudolabel(model, params, given, stress=stress, batch_size=len(frames))
        assert [f.stress is not None for f in found] == expected
        assert {f.weight for f in found} == {2.5}
    with pytest.raises(ValueError, match="stress='all' is unknown"):
        pseudolabel(model, params, given, stress="all")


def test_a_frame_that_cannot_be_labelled_is_named_and_keeps_nothing(model, params, frames):
    flat = tree.flatten(params)
    broken = tree.unflatten({**flat, "readouts_0/linear/0e": flat["readouts_0/linear/0e"] * np.nan})
    with pytest.raises(ValueError, match=r"prediction for frame 0 is not finite"):
        pseudolabel(model, broken, frames, batch_size=len(frames))


def test_loss_and_gradient_on_pseudolabels_are_zero_at_the_start(two_heads, gradient, frames):
    """In another padding, and in the E0s of the head that made them."""
    model, params = two_heads
    recipe = (pseudolabel_replay(frames, head="new", schedule="alternate", batch_size=5),)
    (source,) = resolve(base.sources(recipe), model, params, "Default")
    assert source.labels == "given"
    mixture = data.mixture(frames, model, head="Default", sources=(source,), size=8)
    batch = packed(mixture, 1)
    (value, terms), slope = gradient(params, batch)
    assert float(value) <= ROUNDING**2 * 1e3
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(slope)) <= 1e3 * ROUNDING
    assert {"energy", "forces", "stress"} <= set(terms)


def test_a_head_that_was_copied_makes_the_same_labels(two_heads, labelled, frames, model, params):
    sources = base.sources((pseudolabel_replay(frames), replay(frames)))
    before = resolve(sources, model, params, batch_size=len(frames))
    after = resolve(sources, *two_heads, "Default", batch_size=len(frames))
    assert before[1] is sources[1]
    for a, b, c in zip(before[0].frames, after[0].frames, labelled, strict=True):
        assert a.energy == pytest.approx(b.energy, abs=ROUNDING)
        assert a.energy == pytest.approx(c.energy, abs=ROUNDING)
        np.testing.assert_allclose(a.forces, b.forces, atol=ROUNDING)


# --- heads ----------------------------------------------------------------------------------------


def test_frames_of_one_head_have_no_gradient_in_the_readouts_of_another(
    two_heads, gradient, frames
):
    model, params = two_heads
    strategy = multihead_replay(frames, head="Default", schedule="alternate", batch_size=8)
    mixture = data.mixture(frames, model, head="new", sources=strategy.sources, size=8)
    for update, (own, other) in enumerate([(1, 0), (0, 1)]):
        _, slope = gradient(params, packed(mixture, update))
        last = np.asarray(slope["readouts_0"]["linear"]["0e"])
        assert np.abs(last[:, own]).max() > 1e-3
        assert (last[:, other] == 0).all()
        hidden = np.asarray(slope["readouts_1"]["linear_1"]["0e"])
        mine, theirs = np.split(hidden, 2, axis=1)[own], np.split(hidden, 2, axis=1)[other]
        assert np.abs(mine).max() > 1e-6
        assert (theirs == 0).all()
        assert np.abs(np.asarray(slope["interactions_0"]["linear_up"]["0e"])).max() > 1e-6


def test_a_head_of_its_own_is_wanted_of_multihead_replay(two_heads, frames):
    model, _ = two_heads
    strategy = multihead_replay(frames, head="new")
    with pytest.raises(ValueError, match="but 'new' is the target's"):
        data.mixture(frames, model, head="new", sources=strategy.sources, size=4)
    with pytest.raises(TypeError, match="head"):
        multihead_replay(frames)
    with pytest.raises(ValueError, match="needs a head other than the target's"):
        multihead_replay(frames, head=None)
    sources = replay(frames, head="pbe").sources
    with pytest.raises(ValueError, match=r"the model's heads are 'Default', 'new'"):
        data.mixture(frames, model, head="new", sources=sources, size=4)


def test_the_weight_of_replay_is_the_frame_as_often(model, frames):
    """3 is each frame three times, in every weighted mean."""
    (source,) = replay(frames[:3], fraction=0.5, weight=3.0).sources
    heavy = data.mixture(frames[3:6], model, sources=(source,), size=6)
    copies = data.prepare(frames[3:6] + 3 * frames[:3], model)
    (a,) = heavy.epoch(0, seed=0, dtype="float64")
    (b,) = data.epoch(copies, 12, seed=0, dtype="float64")
    for label in ("energy", "forces", "stress"):
        means = [
            np.tensordot(getattr(x.weights, label), getattr(x.labels, label) ** 2, axes=(0, 0))
            / getattr(x.weights, label).sum()
            for x in (a, b)
        ]
        np.testing.assert_allclose(*means, rtol=1e-12)
