"""Surgery: E0s."""

import numpy as np
import pytest

from jaxft import data, surgery
from jaxft.potential import E0_BUFFER


def test_set_e0s_changes_those_and_nothing_else(model):
    before = model.e0s.copy()
    other = surgery.set_e0s(model, {8: -2000.0, 1: -13.6})
    expected = before.copy()
    expected[0, [model.atomic_numbers.index(8), model.atomic_numbers.index(1)]] = -2000.0, -13.6
    np.testing.assert_array_equal(other.e0s, expected)
    np.testing.assert_array_equal(model.e0s, before)
    assert other.config == model.config
    assert all(other.buffers[k] is v for k, v in model.buffers.items() if k != E0_BUFFER)
    assert other.buffers[E0_BUFFER].shape == model.buffers[E0_BUFFER].shape


def test_new_e0s_move_the_labels_and_not_the_prediction(model, frames):
    other = surgery.set_e0s(model, {1: model.e0s[0, 0] + 2.5})
    (old,) = data.epoch(data.prepare(frames, model), 8, dtype="float64")
    (new,) = data.epoch(data.prepare(frames, other), 8, dtype="float64")
    hydrogens = [int((frame.atomic_numbers == 1).sum()) for frame in frames]
    np.testing.assert_allclose(
        new.labels.energy[:8], old.labels.energy[:8] - 2.5 * np.array(hydrogens), atol=1e-9
    )
    for a, b in zip(new.graph, old.graph, strict=True):
        np.testing.assert_array_equal(a, b)


def test_e0s_of_unknown_elements_are_refused(model):
    with pytest.raises(ValueError, match=r"E0s were given for He, Xe, which the model") as caught:
        surgery.set_e0s(model, {54: 1.0, 1: 0.0, 2: 0.0})
    assert "its elements are H C O Na Cl" in str(caught.value)


def test_e0s_that_are_not_finite_are_refused(model):
    with pytest.raises(ValueError, match="the E0s of O are not finite; give energies in eV"):
        surgery.set_e0s(model, {8: float("nan"), 1: -13.6})
