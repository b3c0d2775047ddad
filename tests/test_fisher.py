"""The Fisher of a loss, empirical and sampled, its files, and what λ means with it."""

import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import labelled
from rich.console import Console
from safetensors.numpy import save_file

from jaxft import data, fisher, loss, tree
from jaxft.calibration import calibration, group_of
from jaxft.fisher import load, sampled, save
from jaxft.strategies import ewc
from jaxft.strategies.ewc import Fisher, digest

PROBES = 512
"""Every value is then known to √(2/512) = 6 % of itself (one standard error, at most)."""


def linear(params, example):
    """Least squares of one frame: ½ (w·x - y)²."""
    x, y = example
    return 0.5 * (jnp.vdot(params["w"], x) - y) ** 2, {}


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(1)
    return [(rng.normal(size=4), rng.normal()) for _ in range(7)]


@pytest.fixture(scope="module")
def start():
    return {"w": jnp.array([0.3, -1.0, 2.0, 0.1])}


def one_by_one(frames, model, *, shape=None):
    """Batches of one frame, all of one static shape: one compilation for all tests."""
    dataset = data.prepare(frames, model, row_width=16)
    shape = shape or data.shapes(dataset, 1)[-1]
    return [data.pack(dataset, [i], shape, "float64") for i in range(len(frames))]


@pytest.fixture(scope="module")
def singles(frames, model):
    """Labelled by another model."""
    return one_by_one(frames, model)


@pytest.fixture(scope="module")
def found(objective, params, singles):
    return fisher(objective, params, singles)


def by_hand(examples, start):
    """Squared gradients per frame, ((w·x - y) x)², and losses."""
    w = np.asarray(start["w"])
    residuals = np.array([w @ x - y for x, y in examples])
    return (residuals[:, None] * np.array([x for x, _ in examples])) ** 2, residuals**2 / 2


def assert_bitwise(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- the Fisher -----------------------------------------------------------------------------------


def test_fisher_is_the_mean_of_squared_gradients(examples, start):
    squares, losses = by_hand(examples, start)
    found = fisher(linear, start, examples)
    np.testing.assert_allclose(found.values["w"], squares.mean(0), rtol=1e-12)
    assert found.provenance["frames"] == 7
    assert found.provenance["kind"] == "empirical"
    np.testing.assert_allclose(found.provenance["mean_loss"], losses.mean(), rtol=1e-12)
    assert found.parameters == digest(start)


def test_fisher_takes_the_first_n_and_tells_its_progress(examples, start):
    squares, _ = by_hand(examples, start)
    seen = []
    found = fisher(linear, start, iter(examples), n=3, progress=lambda *at: seen.append(at))
    np.testing.assert_allclose(found.values["w"], squares[:3].mean(0), rtol=1e-12)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_fisher_leaves_frames_of_large_loss_out_of_sum_and_count(examples, start):
    squares, losses = by_hand(examples, start)
    threshold = float(np.sort(losses)[4])  # itself left out
    found = fisher(linear, start, examples, threshold=threshold)
    np.testing.assert_allclose(found.values["w"], squares[losses < threshold].mean(0), rtol=1e-12)
    assert (found.provenance["frames"], found.provenance["skipped"]) == (4, 3)
    with pytest.raises(ValueError, match=r"all 7 frames reach the threshold 1e-09; the smallest"):
        fisher(linear, start, examples, threshold=1e-9)


@pytest.mark.parametrize(("how", "of"), [("mean", np.mean), ("max", np.max)])
def test_fisher_is_normalised_on_request(how, of, examples, start):
    plain = fisher(linear, start, examples)
    found = fisher(linear, start, examples, normalise=how)
    assert of(found.values["w"]) == pytest.approx(1.0, rel=1e-12)
    back = found.values["w"] * found.provenance["scale"]
    np.testing.assert_allclose(back, plain.values["w"], rtol=1e-12)


def test_twice_the_loss_is_four_times_the_fisher(examples, start):
    once = fisher(linear, start, examples)
    twice = fisher(lambda p, b: (2 * linear(p, b)[0], {}), start, examples)
    np.testing.assert_allclose(twice.values["w"], 4 * once.values["w"], rtol=1e-12)


def test_small_float32_gradients_do_not_vanish_when_squared():
    params = {"w": np.float32(0.0)}
    found = fisher(lambda p, x: (1e-25 * p["w"] * x, {}), params, [np.float32(1.0)])
    assert float(found.values["w"]) == pytest.approx(1e-50, rel=1e-6)


def test_fisher_of_a_potential_does_not_see_the_padding(frames, model, found, objective, params):
    shape = data.Shape(24, 40, 4)
    roomy = one_by_one(frames[:2], model, shape=shape)
    tight = one_by_one(frames, model)[:2]
    assert roomy[0].graph.n_node > tight[0].graph.n_node
    a, b = (fisher(objective, params, batches).values for batches in (roomy, tight))
    for (path, x), y in zip(tree.flatten(a).items(), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-12 * np.max(y), err_msg=path)


def test_fisher_of_a_potential_is_the_mean_of_those_of_its_frames(
    found, objective, params, singles
):
    each = [fisher(objective, params, [batch]) for batch in singles]
    for path, leaf in tree.flatten(found.values).items():
        mean = np.mean([tree.flatten(e.values)[path] for e in each], axis=0)
        np.testing.assert_allclose(leaf, mean, rtol=1e-12)
        assert (leaf >= 0).all()


def test_fisher_compiles_once_per_shape():
    traced = []

    def counting(params, x):
        traced.append(x.shape)
        return jnp.sum(params["w"] * x), {}

    for _ in range(2):
        fisher(counting, {"w": jnp.ones(())}, [np.ones(2), np.ones(3), np.ones(2), np.ones(3)])
    assert traced == [(2,), (3,)]


def test_fisher_refuses_batches_of_several_frames(objective, params, batch):
    with pytest.raises(ValueError, match=r"batch 0 holds 8 frames; .*one frame per batch"):
        fisher(objective, params, [batch])


def test_fisher_refuses_labels_of_the_model_itself(
    frames, model, params, predictor, objective, start, examples
):
    own = labelled(model, params, predictor, frames)
    rounded = [
        data.Frame(
            f.atomic_numbers,
            f.positions,
            f.cell,
            f.pbc,
            energy=round(f.energy, 6),
            forces=np.round(f.forces, 8),
            source=f.source,
        )
        for f in own
    ]
    for given in (own, rounded):
        with pytest.raises(ValueError, match=r"A Fisher of self-labelled data is zero") as caught:
            fisher(objective, params, one_by_one(given, model))
        assert "labels of the pretraining data" in " ".join(str(caught.value).split())
    exact = [(x, float(np.asarray(start["w"]) @ x)) for x, _ in [(np.eye(4)[0], 0)]]
    with pytest.raises(ValueError, match=r"loss of these 1 frames is 0.0e\+00 .*by this model"):
        fisher(linear, start, exact, normalise="mean")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "takes no frame"),
        ({"normalise": "sum"}, "'sum'.* is unknown"),
        ({"batches": []}, "no batches"),
        ({"batches": [(np.ones(4), np.nan)]}, "the loss of batch 0 is nan"),
    ],
)
def test_fisher_refuses(arguments, message, examples, start):
    with pytest.raises(ValueError, match=message):
        fisher(linear, start, **{"batches": examples} | arguments)


def test_fisher_names_a_gradient_that_is_not_finite():
    def root(params, x):
        return jnp.sqrt(params["w"] * x).sum(), {}

    with pytest.raises(ValueError, match="gradient of batch 1 at 'w' is not finite"):
        fisher(root, {"w": jnp.ones(2)}, [np.ones(2), np.array([1.0, 0.0]) * 0.0])


# --- the sampled Fisher ---------------------------------------------------------------------------

DESIGN = np.random.default_rng(5).normal(size=(4, 3))
WEIGHTS = np.array([0.5, 2.0, 1.0, 4.0])


def four(params, scale):
    """Four Gaussian outputs, linear in three parameters: y = √w J θ, times a number per frame."""
    return jnp.sqrt(WEIGHTS) * (DESIGN @ params["w"]) * scale


THREE = {"w": jnp.array([0.3, -1.0, 2.0])}


def test_probing_each_output_gives_the_diagonal_of_jt_w_j():
    frames = [1.0, 3.0]
    got = sampled(four, THREE, frames, probes=None)
    expected = np.einsum("o,oi->i", WEIGHTS, DESIGN**2) * (1 + 9) / 2
    np.testing.assert_allclose(got.values["w"], expected, rtol=1e-13)
    for at_once in (2, 3, 100):
        again = sampled(four, THREE, frames, probes=None, at_once=at_once)
        np.testing.assert_allclose(again.values["w"], expected, rtol=1e-13)
    assert got.provenance["kind"] == "sampled"
    assert got.provenance["frames"] == 2
    assert got.parameters == digest(THREE)


def test_over_all_signs_the_sampled_fisher_is_exact():
    """The mean over every v in {-1, 1}⁴, by hand, and the library's draws among its terms."""
    jacobian = np.sqrt(WEIGHTS)[:, None] * DESIGN
    terms = [(np.array(v) @ jacobian) ** 2 for v in itertools.product((-1.0, 1.0), repeat=4)]
    exact = sampled(four, THREE, [1.0], probes=None).values["w"]
    np.testing.assert_allclose(np.mean(terms, axis=0), exact, rtol=1e-13)
    for seed in range(10):
        drawn = sampled(four, THREE, [1.0], seed=seed).values["w"]
        assert min(np.abs(drawn - term).max() for term in terms) < 1e-12
    many = sampled(four, THREE, [1.0], probes=20_000, at_once=20_000).values["w"]
    np.testing.assert_allclose(many, exact, rtol=5 * np.sqrt(2 / 20_000))


def test_signs_depend_on_seed_frame_and_probe_and_on_nothing_else():
    def values(frames=(1.0, 1.0, 1.0), **options):
        return sampled(four, THREE, frames, **options).values["w"]

    np.testing.assert_array_equal(values(probes=5), values(probes=5))
    np.testing.assert_allclose(values(probes=5), values(probes=5, at_once=2), rtol=1e-13)
    assert not np.allclose(values(), values(seed=1))
    # Three equal frames with the same signs would give the values of one.
    assert not np.allclose(values(), values(frames=(1.0,)))
    # More probes go on where fewer stopped.
    two, three = 2 * values((1.0,), probes=2), 3 * values((1.0,), probes=3)
    assert (three - two > -1e-12).all()


def test_outputs_times_c_are_c_squared_times_the_fisher():
    """A loss times c is outputs times √c: unlike the empirical one, F takes c once."""
    once = sampled(four, THREE, [1.0], probes=3)
    twice = sampled(lambda p, b: 2 * four(p, b), THREE, [1.0], probes=3)
    np.testing.assert_allclose(twice.values["w"], 4 * once.values["w"], rtol=1e-13)


def test_terms_of_the_sampled_fisher_add_up():
    def part(chosen):
        return sampled(lambda p, b: four(p, b)[chosen], THREE, [1.0], probes=None).values["w"]

    np.testing.assert_allclose(part(slice(0, 1)) + part(slice(1, 4)), part(slice(0, 4)), rtol=1e-13)


def test_small_float32_outputs_do_not_vanish_when_squared():
    got = sampled(lambda p, x: 1e-25 * p["w"] * x, {"w": np.float32(1.0)}, [np.ones(2, "float32")])
    assert float(got.values["w"]) in (0.0, pytest.approx(4e-50, rel=1e-5))
    exact = sampled(
        lambda p, x: 1e-25 * p["w"] * x, {"w": np.float32(1.0)}, [np.ones(2, "f4")], probes=None
    )
    assert float(exact.values["w"]) == pytest.approx(2e-50, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probes": 0}, "samples nothing"),
        ({"at_once": 0}, "samples nothing"),
        ({"n": 0}, "takes no frame"),
        ({"normalise": "sum"}, "is unknown"),
        ({"batches": []}, "no batches"),
        ({"outputs": lambda p, b: p["w"].sum()}, r"have shape \(\); expected a vector"),
        ({"outputs": lambda p, b: jnp.ones(3) * b}, "no output of these 2 frames depends"),
        (
            {"outputs": lambda p, b: jnp.sqrt(p["w"] * 0)},
            "gradient of batch 0 at 'w' is not finite",
        ),
    ],
)
def test_sampled_refuses(arguments, message):
    options = {"outputs": four, "params": THREE, "batches": [1.0, 2.0]} | arguments
    with pytest.raises(ValueError, match=message):
        sampled(**options)


@pytest.fixture(scope="module")
def outputs(model):
    """Energy per atom and forces, weighted."""
    return loss.outputs(model, energy=4.0, forces=30.0)


@pytest.fixture(scope="module")
def water(structures, model):
    """One unlabelled molecule."""
    return one_by_one([data.unlabelled(structures[0])], model)


@pytest.fixture(scope="module")
def gauss_newton(outputs, params, water):
    return sampled(outputs, params, water, probes=None, at_once=32)


def test_on_a_potential_the_exact_one_is_the_sum_of_squared_derivatives(
    outputs, params, water, gauss_newton
):
    """Forward differentiation, one parameter of each leaf at a time."""
    flat = tree.flatten(params)

    @jax.jit
    def along(tangent):
        return jax.jvp(lambda p: outputs(p, water[0]), (params,), (tangent,))[1]

    for path, leaf in flat.items():
        middle = np.unravel_index(leaf.size // 2, leaf.shape)
        tangent = {p: jnp.zeros_like(x) for p, x in flat.items()}
        tangent[path] = tangent[path].at[middle].set(1.0)
        expected = np.sum(np.asarray(along(tree.unflatten(tangent))) ** 2)
        got = tree.flatten(gauss_newton.values)[path][middle]
        assert got == pytest.approx(expected, rel=1e-8, abs=1e-20), path
    assert sum(np.any(leaf) for leaf in jax.tree.leaves(gauss_newton.values)) > 20


def test_on_a_potential_many_probes_come_close_to_the_exact_one(
    outputs, params, water, gauss_newton
):
    """Not one of some thousand values is six standard errors off, and the mean error is one."""
    got = sampled(outputs, params, water, probes=PROBES, at_once=32)
    exact = np.concatenate([x.ravel() for x in jax.tree.leaves(gauss_newton.values)])
    drawn = np.concatenate([x.ravel() for x in jax.tree.leaves(got.values)])
    error = np.abs(drawn - exact)[exact > 0] / exact[exact > 0] / np.sqrt(2 / PROBES)
    assert error.max() < 6
    assert 0.1 < np.sqrt(np.mean(error**2)) < 1.5
    assert not drawn[exact == 0].any()


def test_the_sampled_fisher_is_there_where_labels_are_the_models_own(gauss_newton, water):
    """No label at all in the batch: fisher() would refuse it, see the test above."""
    assert not water[0].weights.forces.any()
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gauss_newton.values))
    ewc(gauss_newton, strength=1.0)


# --- what λ means ---------------------------------------------------------------------------------

SMALL = {
    "node_embedding": {"linear": {"0e": np.array([0.0, 0.0, 2e-3])}},
    "interactions_0": {"linear_up": {"0e": np.array([[1e-6, 3e-6], [0.0, 5e-5]])}},
    "readouts_1": {"linear_1": {"0e": np.array([40.0])}},
}


def test_calibration_counts_and_averages_by_group():
    found = calibration(SMALL)
    assert list(found.groups) == ["embedding", "interactions.0", "readouts.1", "total"]
    block = found.groups["interactions.0"]
    assert (block.numbers, block.zero, block.min, block.max) == (4, 0.25, 0.0, 5e-5)
    assert block.mean == pytest.approx(5.4e-5 / 4)
    assert block.median == pytest.approx(2e-6)
    assert block.unit_mean * block.mean == pytest.approx(1.0)
    assert block.unit_median == pytest.approx(1 / 3e-6)  # of those that are not zero
    assert block.histogram == {-6: 2, -5: 1}
    assert sum(found.groups["total"].histogram.values()) == 5
    # The mean of all eight is 5, so the decades are centred on 0.1.
    assert found.sweep == pytest.approx((1e-3, 1e-2, 0.1, 1.0, 10.0))


def test_with_a_strength_curvatures_are_counted():
    plain, stiff = calibration(SMALL), calibration(SMALL, strength=1e3)
    for name, spread in plain.groups.items():
        moved = {k + 3: count for k, count in spread.histogram.items()}
        assert stiff.groups[name].histogram == moved
    assert stiff.groups["total"].mean == plain.groups["total"].mean


def test_at_the_suggested_mean_the_penalty_curves_like_l2sp():
    flat = Fisher(SMALL)
    strength = calibration(flat).groups["total"].unit_mean
    curvatures = np.concatenate([strength * x.ravel() for x in jax.tree.leaves(SMALL)])
    assert curvatures.mean() == pytest.approx(1.0, rel=1e-12)


def test_a_group_without_information_has_no_strength():
    found = calibration({"products_0": {"linear": {"0e": np.zeros(2)}}, "other": np.ones(1)})
    assert found.groups["products.0"].unit_mean is None
    assert found.groups["products.0"].zero == 1.0
    assert found.groups["other"].unit_median == 1.0
    text = rendered(found)
    assert "products.0" in text
    assert "–" in text


def test_every_leaf_of_a_model_has_a_group(params):
    groups = {group_of(path) for path in tree.flatten(params)}
    expected = {f"{kind}.{i}" for kind in ("interactions", "products", "readouts") for i in (0, 1)}
    assert groups == {"embedding", *expected}


def rendered(report):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.render())
    return console.export_text()


def test_a_calibration_is_read_by_people_and_programs(found):
    report = calibration(found, strength=1e4)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["strength"] == 1e4
    assert again["provenance"]["kind"] == "empirical"
    assert (
        sum(again["groups"]["total"]["histogram"].values()) <= again["groups"]["total"]["numbers"]
    )
    text = rendered(report)
    assert "interactions.1" in text
    assert "λF, λ = 10000" in text
    assert "suggested sweep" in text


def test_calibration_refuses():
    with pytest.raises(ValueError, match="use a finite number >= 0"):
        calibration(SMALL, strength=-1.0)
    with pytest.raises(ValueError, match="has no curvature"):
        calibration(SMALL, strength=0.0)
    with pytest.raises(ValueError, match="zero everywhere"):
        calibration({"a": np.zeros(2)})


def test_the_digest_of_a_fisher_knows_values_and_provenance():
    one = Fisher(SMALL, "abc", {"frames": 3})
    same = Fisher(jax.tree.map(np.copy, SMALL), "abc", {"frames": 3})
    assert one.digest == same.digest
    other = jax.tree.map(np.copy, SMALL)
    other["readouts_1"]["linear_1"]["0e"] += 1e-12  # float32 would not tell
    others = [Fisher(other, "abc", {"frames": 3}), Fisher(SMALL, "abc", {"frames": 4})]
    others.append(Fisher(SMALL, "abd", {"frames": 3}))
    assert len({one.digest, *(f.digest for f in others)}) == 4


# --- files ----------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(found, tmp_path, objective, params, singles):
    given = fisher(objective, params, singles, n=2, provenance={"loss": {"energy": 1.0}})
    path = save(tmp_path / "new" / "base.fisher", given)
    again = load(path)
    assert_bitwise(given.values, again.values)
    assert set(tree.flatten(given.values)) == set(tree.flatten(again.values))
    assert again.parameters == given.parameters == digest(params)
    assert again.provenance == given.provenance
    assert again.provenance["loss"] == {"energy": 1.0}
    assert again.digest == given.digest
    assert [p.name for p in path.parent.iterdir()] == ["base.fisher"]


def test_saving_overwrites_nothing(found, tmp_path):
    path = tmp_path / "base.fisher"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        save(path, found)
    assert path.read_text() == "mine"


def header(record):
    return {"format": "jaxft-fisher", "version": "1", "record": record}


RECORD = json.dumps({"parameters": None, "provenance": {}})
ONES = {"w": np.ones(2)}


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        (ONES, None, "says format None"),
        (ONES, header(RECORD) | {"version": "2"}, "version '2'"),
        (ONES, header("{"), "is not a Fisher"),
        (ONES, header("[" * 100_000), "is not a Fisher"),
        (ONES, header("{}"), "is not a Fisher"),
        (ONES, header(json.dumps({"parameters": None, "provenance": 3})), "is not a Fisher"),
        ({"w": -np.ones(2)}, header(RECORD), "negative or non-finite numbers in 'w'"),
        ({"w": np.ones(2), "w/x": np.ones(2)}, header(RECORD), "is not a Fisher"),
        ({"w": np.zeros(2)}, header(RECORD), "zero everywhere"),
    ],
)
def test_files_that_are_no_fisher_are_refused(arrays, metadata, message, tmp_path):
    save_file(arrays, tmp_path / "x.fisher", metadata=metadata)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "x.fisher")
    assert str(caught.value).startswith(f"{tmp_path / 'x.fisher'} is not a Fisher")


def test_absent_and_cut_files_are_refused(found, tmp_path):
    with pytest.raises(ValueError, match="is not a Fisher"):
        load(tmp_path / "none.fisher")
    whole = save(tmp_path / "base.fisher", found).read_bytes()
    (tmp_path / "cut.fisher").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a Fisher"):
        load(tmp_path / "cut.fisher")
