"""What training changed, and what interpolating weights makes of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxft import data, surgery, tree
from jaxft.changes import OTHER, changes
from jaxft.data import Frame
from jaxft.evaluate import pareto, predict_frames, predictions
from jaxft.strategies.sparse import sparse, sparsity


@pytest.fixture(scope="module")
def before():
    rng = np.random.default_rng(0)
    shapes = {
        "node_embedding/linear/0e": (2, 3),
        "interactions_0/linear/0e": (3, 3),
        "interactions_0/conv_tp_weights/layer0": (4, 3),
        "interactions_0/skip_tp/0e": (2, 3, 3),
        "interactions_0/skip_tp/1o": (2, 3, 2),
        "interactions_1/skip_tp/0e": (2, 2),
        "products_0/symmetric_contractions/1o/weights_max": (2, 5, 3),
        "readouts_0/linear/0e": (3, 1),
    }
    return tree.unflatten({path: rng.normal(size=shape) for path, shape in shapes.items()})


@pytest.fixture(scope="module")
def after(before):
    """The second element's skip connections doubled; two numbers of the radial network moved."""
    flat = {path: leaf.copy() for path, leaf in tree.flatten(before).items()}
    flat["interactions_0/skip_tp/0e"][1] *= 2
    flat["interactions_0/skip_tp/1o"][1] *= 2
    flat["interactions_0/conv_tp_weights/layer0"][0, :2] += (0.3, -0.4)
    return tree.unflatten(flat)


def named(rows):
    return {row.name: row for row in rows}


def written(renderable):
    console = Console(width=100, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_numbers_are_counted_by_leaf_group_irrep_and_element(before, after):
    found = changes(before, after, elements=(1, 8))
    assert {row.name: row.changed for row in found.leaves if row.changed} == {
        "interactions_0/conv_tp_weights/layer0": 2,
        "interactions_0/skip_tp/0e": 9,
        "interactions_0/skip_tp/1o": 6,
    }
    assert {row.name: (row.changed, row.numbers) for row in found.groups} == {
        "node_embedding": (0, 6),
        "interactions_0": (17, 9 + 12 + 18 + 12),
        "interactions_1": (0, 4),
        "products_0": (0, 30),
        "readouts_0": (0, 3),
    }
    assert {row.name: (row.changed, row.numbers) for row in found.irreps} == {
        "0e": (9, 6 + 9 + 18 + 4 + 3),
        OTHER: (2, 12),
        "1o": (6, 12 + 30),
    }
    # embedding, skip connections per element and contractions; not the skip connection of two axes
    assert {row.name: (row.changed, row.numbers) for row in found.elements} == {
        "H": (0, 3 + 9 + 6 + 15),
        "O": (15, 3 + 9 + 6 + 15),
    }
    assert {row.name: row.changed for row in found.element_irreps} == {
        "H 0e": 0,
        "H 1o": 0,
        "O 0e": 9,
        "O 1o": 6,
    }
    assert (found.total.changed, found.total.numbers) == (17, tree.size(before))
    assert found.total.share == 17 / tree.size(before)
    assert changes(before, after).elements == ()


def test_relative_change_and_scatter_are_those_of_numpy(before, after):
    found = named(changes(before, after, elements=(1, 8)).leaves)
    old, new = (p["interactions_0"]["conv_tp_weights"]["layer0"].ravel() for p in (before, after))
    row = found["interactions_0/conv_tp_weights/layer0"]
    np.testing.assert_allclose(row.relative, 0.5 / np.linalg.norm(old), rtol=1e-12)
    np.testing.assert_allclose(row.scatter, 1 - np.corrcoef(old, new)[0, 1] ** 2, rtol=1e-9)
    row = named(changes(before, after, elements=(1, 8)).element_irreps)["O 1o"]
    old = before["interactions_0"]["skip_tp"]["1o"][1]
    contraction = before["products_0"]["symmetric_contractions"]["1o"]["weights_max"][1]
    size = np.hypot(np.linalg.norm(old), np.linalg.norm(contraction))
    np.testing.assert_allclose(row.relative, np.linalg.norm(old) / size, rtol=1e-12)


def test_scatter_ignores_a_common_factor_and_offset_and_is_exactly_0_of_no_change():
    old = {"w": np.array([1.0, 2.0, 4.0])}
    same = changes(old, old).total
    assert (same.changed, same.relative, same.scatter) == (0, 0.0, 0.0)
    moved = changes(old, {"w": 3 * old["w"] + 1}).total
    assert moved.scatter < 1e-30
    assert moved.share == 1.0


def test_what_has_no_value_is_none_and_never_nan():
    old = {"zero": np.zeros(3), "one": np.ones(1)}
    rows = named(changes(old, {"zero": np.arange(3.0), "one": np.ones(1)}).leaves)
    assert (rows["zero"].relative, rows["zero"].scatter) == (None, None)
    assert (rows["one"].relative, rows["one"].scatter) == (0.0, None)


def test_it_reports_the_sparsity_of_a_sparse_update(params, model):
    strategy = sparse(threshold=0.005)
    coords, consts = strategy.init(jnp.asarray(np.array([0, 7], np.uint32)), params)
    tuned = strategy.apply(params, coords, consts)
    found = changes(params, tuned, elements=model.atomic_numbers)
    wanted = sparsity(coords).leaves
    for path, row in named(found.leaves).items():
        assert row.share == pytest.approx(1 - wanted.get(path, 1.0))
    assert [row.name for row in found.elements] == ["H", "C", "O", "Na", "Cl"]
    assert {name.split()[1] for name in named(found.element_irreps)} == {"0e", "1o"}


def test_the_record_is_json_and_a_table(before, after):
    found = changes(before, after, elements=(1, 8))
    document = json.loads(json.dumps(found.to_dict()))
    assert document["elements"]["O"]["changed"] == 15
    assert document["total"] == found.total.to_dict()
    text = written(found.render())
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert rows["interactions_0"][:3] == ["51", "17", "33.33"]
    assert rows["total"][:2] == ["94", "17"]
    assert "O" in rows
    assert "H" not in rows, "an element that did not change has no row"


def test_other_models_and_element_tables_are_refused(before, after):
    with pytest.raises(ValueError, match="not of the same model") as caught:
        changes(before, {**after, "readouts_0": {"linear": {"0e": np.ones((4, 1))}}})
    assert "- readouts_0/linear/0e (3, 1)\n+ readouts_0/linear/0e (4, 1)" in str(caught.value)
    with pytest.raises(ValueError, match="numbers of 2 elements, but 3 elements were given"):
        changes(before, after, elements=(1, 6, 8))


# --- interpolation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(structures, model, params):
    """A sweep over a set that the tuned model labelled, with E0s of its own, and one that the base
    labelled; and how many programs it compiled."""
    plain = [data.from_atoms(atoms) for atoms in structures[:3]]
    tuned = tree.unflatten({path: leaf * 1.05 for path, leaf in tree.flatten(params).items()})
    e0s = {z: float(z) for z in model.atomic_numbers}
    other = surgery.set_e0s(model, e0s)
    shift = dict(zip(model.atomic_numbers, (other.e0s - model.e0s)[0], strict=True))
    target, replay = (
        [
            Frame(
                f.atomic_numbers,
                f.positions,
                f.cell,
                f.pbc,
                energy=r.energy + is_target * sum(shift[z] for z in f.atomic_numbers),
                forces=r.forces,
                source=f.source,
            )
            for f, r in zip(plain, predict_frames(model, weights, plain), strict=True)
        ]
        for weights, is_target in ((tuned, 1), (params, 0))
    )
    sets = {"target": (target, other), "replay": (replay, model)}
    compiled = programs()
    assert compiled > 0
    points = pareto.sweep(model, params, tuned, sets, (0, 0.5, 1.0))
    return points, programs() - compiled, sets, tuned


def programs():
    quick = predictions._quickly(predictions._prediction)
    return predictions._predict._cache_size() + quick._cache_size()


def test_a_sweep_ends_at_the_base_and_at_the_tuned_model(swept):
    points, *_ = swept
    assert [point.amount for point in points] == [0, 0.5, 1]
    first, middle, last = (point.errors for point in points)
    for key in ("energy", "forces"):
        # meV; E0s of up to 17 eV per atom are added and removed in float64
        assert first["replay"][key] < 1e-9
        assert last["target"][key] < 1e-9
        assert 0.1 < middle["replay"][key] < last["replay"][key]
        assert 0.1 < middle["target"][key] < first["target"][key]
    assert first["target"]["stress"] is None


def test_a_sweep_of_all_sets_and_amounts_compiles_nothing_new(swept):
    """The labels were predicted by the same program."""
    assert swept[1] == 0


def test_a_sweep_is_json_and_a_table(swept):
    points, *_ = swept
    rows = json.loads(json.dumps(pareto.to_dict(points)))
    assert rows[1]["amount"] == 0.5
    assert rows[1]["target"] == points[1].errors["target"]
    text = written(pareto.render(points))
    assert "target" in text
    assert text.split("0.5")[1].split()[0] == f"{points[1].errors['target']['energy']:.2f}"


def test_models_that_differ_in_more_than_e0s_are_refused(swept, model, params):
    *_, sets, tuned = swept
    shifted = surgery.set_scale_shift(model, scale=2.0, shift=0.1)
    with pytest.raises(ValueError, match=r"'target' differs in .* E0s: scale_shift/scale, scale"):
        pareto.sweep(model, params, tuned, {"target": (sets["target"][0], shifted)})
    with pytest.raises(ValueError, match="not of the same model"):
        pareto.sweep(model, params, {"readouts_0": params["readouts_0"]}, sets)
    with pytest.raises(ValueError, match="a sweep over nothing"):
        pareto.sweep(model, params, tuned, {})
