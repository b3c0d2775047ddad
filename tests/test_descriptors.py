"""What a model sees of a frame."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxft import surgery, tree
from jaxft.data import epoch, prepare, select
from jaxft.evaluate.descriptors import descriptors

ROUNDING = 1e-12
"""Of features of order 1, float64."""


@pytest.fixture(scope="module")
def found(model, params, frames):
    return descriptors(model, params, frames, batch_size=len(frames))


def test_a_descriptor_has_the_scalars_of_both_layers_for_each_element(found, frames):
    assert found.shape == (len(frames), 5, 8)  # H C O Na Cl; 4x0e after each of two layers
    assert found.dtype == np.float64


def test_an_element_that_a_frame_lacks_has_zeros(found, frames):
    elements = np.array([1, 6, 8, 11, 17])
    for frame, block in zip(frames, found, strict=True):
        is_present = np.isin(elements, frame.atomic_numbers)
        assert (np.abs(block[is_present]).max(axis=1) > 1e-3).all()
        assert (block[~is_present] == 0).all()


def test_a_descriptor_is_the_mean_over_the_atoms_of_each_element(found, frames, model, params):
    (batch,) = epoch(prepare(frames, model), len(frames), dtype="float64")
    graph = batch.graph
    features = np.asarray(jax.jit(model.invariants)(params, graph))
    z = np.array(model.atomic_numbers)[graph.elements[graph.species]]
    for g, block in enumerate(found):
        mine = graph.is_atom & (graph.graph_index == g)
        for number, row in zip((1, 6, 8, 11, 17), block, strict=True):
            if (mine & (z == number)).any():
                mean = features[mine & (z == number)].mean(axis=0)
                np.testing.assert_allclose(row, mean, atol=ROUNDING)


def test_the_last_readout_reads_what_a_descriptor_holds(frames, model, params):
    """A change of the first layer's readout leaves features alone, one of its product does not."""
    (batch,) = epoch(prepare(frames, model), len(frames), dtype="float64")
    flat = tree.flatten(params)
    evaluate = jax.jit(model.invariants)
    before = np.asarray(evaluate(params, batch.graph))
    for path, columns in (
        ("readouts_0/linear/0e", []),
        ("products_1/linear/0e", [4, 5, 6, 7]),
        ("interactions_0/linear/0e", list(range(8))),
    ):
        changed = tree.unflatten({**flat, path: 1.5 * flat[path]})
        after = np.asarray(evaluate(changed, batch.graph))
        moved = np.abs(after - before)[batch.graph.is_atom].max(axis=0) > 1e-6
        assert np.flatnonzero(moved).tolist() == columns


def test_descriptors_know_nothing_of_rotation_translation_and_order_of_atoms(
    found, frames, model, params
):
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turned = [
        replace(
            f,
            positions=(f.positions @ rotation + [0.1, 0.2, 0.3])[::-1],
            cell=f.cell @ rotation,
            atomic_numbers=f.atomic_numbers[::-1],
            forces=None,
        )
        for f in frames
    ]
    again = descriptors(model, params, turned, batch_size=len(frames))
    np.testing.assert_allclose(again, found, atol=ROUNDING)


def test_descriptors_do_not_depend_on_heads_or_batches(found, frames, model, params):
    two, wide = surgery.add_head(model, params, "new")
    seen = []
    again = descriptors(
        two, wide, frames, batch_size=4, progress=lambda done, total: seen.append((done, total))
    )
    np.testing.assert_allclose(again, found, atol=ROUNDING)
    assert [done for done, _ in seen][-1] == len(frames)
    assert {total for _, total in seen} == {len(frames)}
    with pytest.raises(ValueError, match="head 'pbe' was asked for"):
        descriptors(two, wide, frames, head="pbe")


def test_farthest_frames_by_descriptor_are_of_different_kinds(found, frames):
    """Six salts and three molecules: the molecules are all among the first four."""
    chosen = select(frames, 4, how="farthest", descriptors=found)
    formulas = {tuple(sorted(set(f.atomic_numbers.tolist()))) for f in chosen}
    assert {(1, 8), (1, 6, 8), (11, 17)} <= formulas


def test_no_frames_have_no_descriptors(model, params):
    assert descriptors(model, params, []).shape[0] == 0
