"""Second derivatives in the loss: what they are, what is drawn, what is counted, what is masked."""

import itertools
from dataclasses import replace
from functools import partial

import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import data, loss
from jaxft.data.curvatures import Curvatures, arrays_of, columns, curvatures_of
from jaxft.evaluate.hessian import force_constants
from jaxft.graph import with_shared_totals
from jaxft.potential import hvp, predict, predict_along
from jaxft.source import Source

EXACT = 1e-11
"""Relative, of float64 sums in another order; entries of the Hessian are up to 100 eV/Å²."""

SHAPE = data.Shape(48, 300, 8)
KEYS = ("probe", "REF_hvp")


@pytest.fixture(scope="module")
def teacher(small):
    return jax.tree.map(lambda leaf: leaf * 1.1, small[1])


@pytest.fixture(scope="module")
def crystals(small, teacher):
    """Two small cells with the teacher's Hessians, and a molecule that has none."""
    model, _ = small
    found = []
    for a, cubic in ((5.5, False), (5.7, True)):
        atoms = ase.build.bulk("NaCl", "rocksalt", a, cubic=cubic)
        atoms.rattle(0.05, seed=2)
        constants = force_constants(model, teacher, atoms)
        atoms.arrays |= arrays_of(columns(constants, np.arange(len(atoms))), KEYS)
        found.append(data.from_atoms(atoms, source=f"cell {len(found)}"))
    return [*found, data.from_atoms(ase.build.molecule("H2O"), source="water")]


@pytest.fixture(scope="module")
def dataset(crystals, small):
    return data.prepare(crystals, small[0], probes="column")


@pytest.fixture(scope="module")
def packed(dataset):
    return data.pack(dataset, [0, 1, 2], SHAPE, "float64")


@pytest.fixture(scope="module")
def product(small):
    return jax.jit(partial(hvp, small[0]))


@pytest.fixture(scope="module")
def prediction(small):
    return jax.jit(partial(predict, small[0]))


@pytest.fixture(scope="module")
def value(small):
    """``(params, batch) -> loss, info`` of the Hessian alone, in absolute values."""
    return jax.jit(loss.weighted(small[0], energy=0, forces=0, hessian=2.0, error="mae"))


@pytest.fixture(scope="module")
def gradient(small):
    alone = loss.weighted(small[0], energy=0, forces=0, hessian=2.0)
    return jax.jit(jax.value_and_grad(alone, has_aux=True))


def directions(batch, n, seed=0):
    """[n, N, 3], zero where there is padding."""
    shape = (n, batch.graph.n_node, 3)
    return np.random.default_rng(seed).normal(size=shape) * batch.graph.is_atom[:, None]


def moved(batch, step):
    """The graph with its atoms displaced, edges kept: they are all within the cutoff, or out."""
    graph = batch.graph
    change = step[graph.receivers][:, None] - step[graph.senders]
    return graph._replace(vectors=graph.vectors + change)


def test_it_is_minus_the_change_of_the_forces(small, packed, product, prediction):
    _, params = small
    (v,) = directions(packed, 1)
    step = 1e-4
    forces = [prediction(params, moved(packed, s * v)).forces for s in (step, -step)]
    expected = -(forces[0] - forces[1]) / (2 * step)
    found = product(params, packed.graph, v)
    assert abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * abs(expected).max())


def test_it_is_symmetric_and_blind_to_translations(small, packed, product):
    u, v = directions(packed, 2)
    one, other = (product(small[1], packed.graph, x) for x in (u, v))
    assert float(np.sum(u * other)) == pytest.approx(float(np.sum(v * one)), rel=EXACT)
    common = np.broadcast_to([0.3, -0.2, 0.1], u.shape)
    np.testing.assert_allclose(product(small[1], packed.graph, common), 0, atol=1e-10)


def test_the_prediction_that_comes_along_is_the_prediction(small, packed, product, prediction):
    model, params = small
    (v,) = directions(packed, 1)
    predicted, along = jax.jit(partial(predict_along, model))(params, packed.graph, v)
    alone = prediction(params, packed.graph)
    assert predicted.moments is None
    for a, b in zip(jax.tree.leaves(predicted), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=EXACT, atol=EXACT)
    np.testing.assert_allclose(along, product(params, packed.graph, v), rtol=EXACT, atol=EXACT)


def test_graphs_do_not_feel_one_anothers_displacements(small, packed, product):
    (v,) = directions(packed, 1)
    own = v * (packed.graph.graph_index == 1)[:, None]
    both, one = (product(small[1], packed.graph, x) for x in (v, own))
    of_one = packed.graph.graph_index == 1
    np.testing.assert_allclose(np.asarray(both)[of_one], np.asarray(one)[of_one], atol=1e-10)
    assert not np.any(np.asarray(one)[~of_one])


def test_the_mean_of_all_columns_is_the_error_of_the_whole_hessian(value, small, crystals, dataset):
    """Of one cell: mean absolute error over its (3 n)² numbers."""
    model, params = small
    cell, batch = crystals[0], data.pack(dataset, [0], SHAPE, "float64")
    given, n = cell.hessian, len(cell)
    found = []
    for u, h in zip(given.displacements, given.products, strict=True):
        probe, label = np.zeros_like(batch.curvature.probe), np.zeros_like(batch.curvature.probe)
        probe[:n], label[:n] = u, h
        curvature = batch.curvature._replace(probe=probe, product=label)
        total, info = value(params, batch._replace(curvature=curvature))
        assert float(total) == 2 * float(info["hessian"])
        found.append(float(info["hessian"]))
    atoms = ase.Atoms(cell.atomic_numbers, cell.positions, cell=cell.cell, pbc=True)
    ours = force_constants(model, params, atoms).transpose(0, 2, 1, 3).reshape(3 * n, 3 * n)
    theirs = given.products.reshape(3 * n, 3 * n)
    assert np.mean(found) == pytest.approx(np.mean(abs(ours - theirs)), rel=1e-9)
    assert np.mean(found) > 1e-3


def test_draws_are_columns_that_follow_from_seed_epoch_and_frame(dataset, crystals):
    keys = list(itertools.product((0, 1), (0, 1), (0, 1)))
    seen = set()
    for seed, number, frame in keys:
        batch, again = (
            data.pack(dataset, [frame], SHAPE, "float64", key=(seed, number)) for _ in range(2)
        )
        probe = batch.curvature.probe
        np.testing.assert_array_equal(probe, again.curvature.probe)
        (place,) = np.flatnonzero(probe)
        assert probe.flat[place] == 1
        column = crystals[frame].hessian.products[place]
        np.testing.assert_array_equal(batch.curvature.product[: len(column)], column)
        seen.add((frame, place))
    assert len(seen) > 4  # not always the same
    together = data.pack(dataset, [2, 1], SHAPE, "float64", key=(1, 1))
    first = data.pack(dataset, [1], SHAPE, "float64", key=(1, 1))
    np.testing.assert_array_equal(together.curvature.probe[3:11], first.curvature.probe[:8])


def test_gaussian_displacements_have_the_mean_square_of_columns():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 6))
    given = Curvatures(np.eye(6).reshape(6, 2, 3), matrix.reshape(6, 2, 3))
    squares = []
    for i in range(4000):
        u, h = given.draw("gaussian", (0, 0, i))
        np.testing.assert_allclose(u.reshape(6) @ matrix, h.reshape(6), atol=1e-12)
        squares.append(np.mean(h**2))
    # 4000 draws of a sum of squares of 6 numbers: 2 % to one standard deviation
    assert np.mean(squares) == pytest.approx(np.mean(matrix**2), rel=0.08)


def test_nothing_is_lost_or_learnt_at_the_teacher(gradient, teacher, packed):
    (total, info), slope = gradient(teacher, packed)
    assert float(total) < 1e-18
    assert float(info[loss.HESSIAN_SQUARES]) < 1e-18
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(slope)) < 1e-9


def test_the_gradient_is_that_of_finite_differences(gradient, small, packed):
    _, params = small
    rng = np.random.default_rng(3)
    way = jax.tree.map(lambda leaf: leaf * rng.normal(size=leaf.shape), params)
    step = 1e-4
    ends = [
        float(gradient(jax.tree.map(lambda p, w: p + s * w, params, way), packed)[0][0])  # noqa: B023
        for s in (step, -step)
    ]
    (_, _), slope = gradient(params, packed)
    found = sum(jax.tree.leaves(jax.tree.map(lambda g, w: jnp.sum(g * w), slope, way)))
    assert float(found) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_missing_labels_and_padding_do_not_count(value, small, dataset, packed):
    """A molecule without, and padding atoms with numbers that mean nothing."""
    _, params = small
    total = float(value(params, packed)[0])
    alone = data.pack(dataset, [0, 1], SHAPE, "float64")
    assert float(packed.curvature.total) == 10
    assert total == pytest.approx(float(value(params, alone)[0]), rel=EXACT)
    absent = packed.curvature.weight == 0
    odd = packed.curvature.product + 7.0 * absent[:, None]
    curvature = packed.curvature._replace(product=odd)
    assert float(value(params, packed._replace(curvature=curvature))[0]) == total


def test_batches_without_such_labels_are_zero_with_zero_gradient(gradient, small, dataset):
    batch = data.pack(dataset, [2], SHAPE, "float64")
    assert float(batch.curvature.total) == 0
    (total, _), slope = gradient(small[1], batch)
    assert float(total) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))


def test_micro_batches_share_their_totals(value, small, dataset, packed):
    _, params = small
    parts = [data.pack(dataset, chosen, SHAPE, "float64") for chosen in ([0, 2], [1])]
    shared = with_shared_totals(parts)
    assert [float(part.curvature.total) for part in shared] == [10, 10]
    found = sum(float(value(params, part)[0]) for part in shared)
    assert found == pytest.approx(float(value(params, packed)[0]), rel=EXACT)


def test_weight_two_is_the_frame_twice(value, small, crystals, dataset):
    """With one column as its label, so that there is nothing to draw."""
    model, params = small
    one, other = (
        replace(frame, hessian=Curvatures(*(array[:1] for array in frame.hessian)))
        for frame in crystals[:2]
    )
    found = []
    for frames in ([replace(one, hessian_weight=2.0), other], [one, one, other]):
        prepared = data.prepare(
            [*frames, crystals[2]], model, probes="column", row_width=dataset.row_width
        )
        batch = data.pack(prepared, range(len(frames)), SHAPE, "float64")
        found.append(float(value(params, batch)[0]))
    assert found[0] == pytest.approx(found[1], rel=EXACT)


def test_weight_zero_is_the_ordinary_program(small, packed):
    """Labels that nobody asks for change no word of what is compiled."""
    model, params = small

    def text(batch, **lambdas):
        loss_fn = loss.weighted(model, energy=1, forces=1, **lambdas)
        return jax.jit(jax.grad(loss_fn, has_aux=True)).lower(params, batch).as_text()

    ordinary = text(packed._replace(curvature=None))
    assert text(packed) == text(packed, hessian=0.0) == ordinary
    assert text(packed, hessian=1.0) != ordinary


def test_batches_carry_displacements_only_if_asked(crystals, small):
    plain = data.prepare(crystals, small[0])
    assert data.pack(plain, [0], SHAPE, "float64").curvature is None
    with pytest.raises(ValueError, match="prepare their frames with probes"):
        loss.weighted(small[0], hessian=1.0)(small[1], data.pack(plain, [0], SHAPE, "float64"))
    with pytest.raises(ValueError, match="probes='row' is unknown"):
        data.prepare(crystals, small[0], probes="row")


def test_files_keep_the_labels(tmp_path, crystals):
    atoms = ase.build.bulk("NaCl", "rocksalt", 5.5)
    atoms.arrays |= arrays_of(crystals[0].hessian, KEYS)
    atoms.info["config_hessian_weight"] = 0.5
    atoms.write(tmp_path / "labelled.xyz", format="extxyz")
    (frame,) = data.read(tmp_path / "labelled.xyz")
    np.testing.assert_allclose(frame.hessian.products, crystals[0].hessian.products, atol=1e-7)
    np.testing.assert_array_equal(frame.hessian.displacements, np.eye(6).reshape(6, 2, 3))
    assert frame.hessian_weight == 0.5
    assert data.has_label(frame, "hessian")
    assert not frame.atom_features  # labels are none


@pytest.mark.parametrize(
    ("displacements", "products", "message"),
    [
        (np.zeros((2, 6)), None, "has 'probe' but not 'REF_hvp'"),
        (None, np.zeros((2, 6)), "has 'REF_hvp' but not 'probe'"),
        (np.zeros((2, 4)), np.zeros((2, 4)), "expected \\(2, 3 k\\)"),
        (np.zeros((2, 6)), np.zeros((2, 3)), "'REF_hvp' has shape"),
        (np.full((2, 3), np.nan), np.zeros((2, 3)), "NaN"),
    ],
)
def test_labels_that_cannot_be_are_refused(displacements, products, message):
    with pytest.raises(ValueError, match=message):
        curvatures_of(displacements, products, 2, KEYS, "frame 7")


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(crystals, small, few_shapes):
    """Of epochs with co-training: batches follow from (seed, epoch, place) alone, on any number of
    devices; those of the source carry no labels."""
    frames = [*crystals[:2], crystals[0], crystals[1]]
    source = Source(
        name="upstream", frames=crystals[2:], schedule="alternate", steps=2, batch_size=1
    )
    mixture = data.mixture(frames, small[0], size=2, sources=[source], probes="column")
    whole = list(data.Spread(mixture, seed=5, dtype="float64").epoch(3))
    rest = list(data.Spread(mixture, seed=5, dtype="float64").epoch(3, start=3))
    assert len(whole) == 6
    for a, b in zip(whole[3:], rest, strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y)
    weights = [float(batch.curvature.weight.sum()) for batch in whole]
    assert [w > 0 for w in weights] == [True, False, False] * 2
    other = next(data.Spread(mixture, seed=5, dtype="float64").epoch(4)).curvature
    assert not np.array_equal(other.probe, whole[0].curvature.probe)
    two = next(data.Spread(mixture, seed=5, dtype="float64", parts=2).epoch(3)).curvature
    products = [p[w > 0] for p, w in zip(two.product, two.weight, strict=True)]
    whole_product = whole[0].curvature.product[0][whole[0].curvature.weight[0] > 0]
    rows = [np.sort(np.round(x, 9), axis=0) for x in (np.concatenate(products), whole_product)]
    np.testing.assert_array_equal(*rows)
