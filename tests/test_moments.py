"""Magnetic moments: symmetry, the energy that they add, masks, and the way from files to files."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import ase
import ase.build
import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.calculators.calculator import PropertyNotImplementedError
from scipy.spatial.transform import Rotation

import jaxft
from jaxft import adapter, bundle, config, data, loss, moments, predict, presets, run, surgery, tree
from jaxft.calculator import JaxftCalculator
from jaxft.data import Frame, Keys, Spread
from jaxft.evaluate.errors import errors
from jaxft.evaluate.predictions import predict_file, predict_frames
from jaxft.graph import in_blocks, totals_of, with_shared_totals
from jaxft.inspection import of_bundle
from jaxft.objective import outputs
from jaxft.page import rows
from jaxft.report import Judged
from jaxft.study.results import of_set

EXACT = 1e-11
MEANS = {11: 1.5, 17: 0.2, 8: 0.0}
KINDS = ("collinear", "signed", "vector")


def awake(params, seed=0):
    """The parameters with random numbers wherever a head begins at zero; the hidden vectors of the
    tiny model are short, and their products are to be of about 1 µB."""
    rng = np.random.default_rng(seed)
    head = {
        path: jnp.asarray(leaf + rng.normal(scale=0.3, size=leaf.shape))
        * (12 if path.endswith("1o") else 1)
        for path, leaf in tree.flatten(params["moments"]).items()
    }
    return {**params, "moments": tree.unflatten(head)}


SHAPE = data.Shape(48, 160, 6)


def packed(model, frames, order):
    return data.pack(data.prepare(frames, model, row_width=8), order, SHAPE, "float64")


class Head:
    """A tiny model with a head of one kind, whose energy part is awake, and its jitted predict."""

    def __init__(self, base, kind):
        self.model, self.start = surgery.add_moments(*base, kind=kind, energy=True, means=MEANS)
        self.params = awake(self.start)
        self.jitted = jax.jit(functools.partial(predict, self.model))

    def __call__(self, atoms, params=None):
        """Prediction (numpy) of one structure, and its number of atoms."""
        out, _ = self.of([data.unlabelled(atoms)], [0], params)
        return jax.tree.map(np.asarray, out), len(atoms)

    def of(self, frames, order, params=None):
        """Prediction and batch, all in one static shape: compiling is what costs time."""
        batch = packed(self.model, frames, order)
        return self.jitted(params or self.params, batch.graph), batch

    def moments(self, atoms, params=None):
        out, n = self(atoms, params)
        return out.moments[:n]


@pytest.fixture(scope="module")
def heads(tiny, small):
    """Vectors of a model whose last layer has none, as usual; for the others one layer will do."""
    return {kind: Head(tiny if kind == "vector" else small, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def bases(tiny, small, predictor):
    """What the heads were added to."""
    one = jax.jit(functools.partial(predict, small[0]))
    of_tiny, of_small = (*tiny, predictor), (*small, one)
    return {kind: of_tiny if kind == "vector" else of_small for kind in KINDS}


@pytest.fixture(scope="module")
def crystal():
    atoms = ase.build.bulk("NaCl", "rocksalt", 5.6, cubic=True)
    atoms.rattle(0.3, seed=1)
    return atoms


@pytest.fixture(scope="module")
def labelled(structures):
    """Crystals and a molecule with random moments, one without, of unequal weight."""
    rng = np.random.default_rng(3)
    found = []
    for i, atoms in enumerate([*structures[3:6], structures[0]]):
        frame = data.from_atoms(atoms, source=f"frame {i}")
        told = None if i == 1 else rng.normal(size=len(frame))
        found.append(replace(frame, moments=told, weight=1.0 + i))
    return found


def test_a_model_without_the_head_is_what_it_was(tiny, predictor, batch) -> None:
    model, params = tiny
    assert "moments" not in model.config.model_dump()
    assert "moments" not in model.config.model_dump_json()
    assert batch.labels.moments is batch.weights.moments is batch.totals.moments is None
    assert jax.eval_shape(predictor, params, batch.graph).moments is None
    with_head = surgery.add_moments(model, params)
    assert with_head[0].digest != model.digest
    again, same = surgery.remove_moments(*with_head)
    assert again.digest == model.digest
    assert jax.tree.structure(same) == jax.tree.structure(params)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_reproduced_and_magnitudes_begin_at_the_means(
    kind, heads, bases, crystal
) -> None:
    head, (model, params, jitted) = heads[kind], bases[kind]
    out, n = head(crystal, head.start)
    expected = jitted(params, packed(model, [data.unlabelled(crystal)], [0]).graph)
    np.testing.assert_array_equal(out.energy[0], expected.energy[0])
    np.testing.assert_allclose(out.forces, expected.forces, atol=EXACT)
    np.testing.assert_allclose(out.stress, expected.stress, atol=EXACT)
    if kind == "vector":
        assert (np.linalg.norm(out.moments[:n], axis=-1) > 0).all()
    else:
        means = [MEANS[z] for z in crystal.numbers]
        np.testing.assert_allclose(out.moments[:n], means, rtol=1e-12)
    woken, _ = head(crystal)
    assert abs(woken.energy[0] - out.energy[0]) > 1e-3


def test_magnitudes_are_not_negative_even_far_from_the_means(heads, crystal) -> None:
    head = heads["collinear"]
    params = jax.tree.map(lambda leaf: leaf * 30, awake(head.start, 5)["moments"])
    found = head.moments(crystal, {**head.params, "moments": params})
    assert (found >= 0).all()
    assert np.ptp(found) > 1
    signed = heads["signed"]
    assert (signed.moments(crystal, {**signed.params, "moments": params}) < 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_turn_as_axial_ones_and_magnitudes_do_not(kind, heads, crystal) -> None:
    """A proper rotation turns them, inversion does not, and a mirror does both."""
    head, n = heads[kind], len(crystal)
    before, _ = head(crystal)
    turn = Rotation.from_rotvec([0.4, -1.1, 0.7]).as_matrix()
    for matrix in (turn, -np.eye(3), turn @ np.diag([1.0, -1.0, 1.0])):
        turned = ase.Atoms(
            crystal.numbers, crystal.positions @ matrix.T, cell=crystal.cell @ matrix.T, pbc=True
        )
        after, _ = head(turned)
        expected = before.moments[:n]
        if kind == "vector":
            assert np.abs(expected).max() > 1e-3
            expected = np.linalg.det(matrix) * expected @ matrix.T
        np.testing.assert_allclose(after.moments[:n], expected, atol=1e-10)
        assert after.energy[0] == pytest.approx(before.energy[0], abs=1e-10)
        np.testing.assert_allclose(after.forces[:n], before.forces[:n] @ matrix.T, atol=1e-9)


def test_a_vector_is_zero_where_the_site_allows_none(heads) -> None:
    """Documented, and the reason for magnitudes."""
    perfect = ase.build.bulk("NaCl", "rocksalt", 5.6, cubic=True)
    assert np.abs(heads["vector"].moments(perfect)).max() < 1e-10
    assert np.abs(heads["collinear"].moments(perfect)).min() > 1e-3


@pytest.mark.parametrize(
    ("kind", "leaves"), [("signed", ("bias", "linear_2/0e")), ("vector", ("linear_u/1o",))]
)
def test_the_energy_does_not_change_under_time_reversal(kind, leaves, heads, crystal) -> None:
    head = heads[kind]
    flat = tree.flatten(head.params["moments"])
    flipped = {path: -leaf if path in leaves else leaf for path, leaf in flat.items()}
    before, n = head(crystal)
    after, _ = head(crystal, {**head.params, "moments": tree.unflatten(flipped)})
    np.testing.assert_allclose(after.moments[:n], -before.moments[:n], rtol=1e-12)
    assert np.abs(before.moments[:n]).max() > 1e-3
    assert after.energy[0] == pytest.approx(before.energy[0], rel=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_forces_and_stress_are_finite_differences_with_the_moments_in_the_energy(
    kind, heads, crystal
) -> None:
    head, step = heads[kind], 1e-4
    out, _ = head(crystal)

    def energy(shift=0.0, strain=0.0):
        moved = crystal.copy()
        moved.positions[2, 1] += shift
        matrix = np.eye(3)
        matrix[0, 1] += strain / 2
        matrix[1, 0] += strain / 2
        moved.set_cell(moved.cell @ matrix, scale_atoms=True)
        return head(moved)[0].energy[0]

    force = -(energy(shift=step) - energy(shift=-step)) / (2 * step)
    assert out.forces[2, 1] == pytest.approx(force, rel=1e-5, abs=1e-7)
    stress = (energy(strain=step) - energy(strain=-step)) / (2 * step * crystal.get_volume())
    assert out.stress[0, 0, 1] == pytest.approx(stress, rel=1e-5, abs=1e-9)
    asleep, _ = head(crystal, head.start)
    assert abs(out.forces[2, 1] - asleep.forces[2, 1]) > 1e-3


def test_atoms_far_apart_exchange_nothing(heads) -> None:
    """Extensive, and smooth at the cutoff."""
    head = heads["collinear"]

    def energy(distance):
        atoms = ase.Atoms("Na2", [[0, 0, 0], [0, 0, distance]])
        return head(atoms)[0].energy[0]

    r_max = head.model.r_max
    assert energy(r_max - 1e-3) == pytest.approx(energy(r_max + 1.0), abs=1e-7)
    assert abs(energy(0.6 * r_max) - energy(r_max + 1.0)) > 1e-4


def test_a_missing_label_is_left_out_and_weight_two_is_the_frame_twice(heads, labelled) -> None:
    head = heads["collinear"]
    plain = [replace(frame, weight=1.0) for frame in labelled]

    def term(frames, order):
        return {
            k: float(v)
            for k, v in (
                loss.moment_term(*head.of(frames, order), error="huber")
                | loss.moment_errors(head.model, *head.of(frames, order))
            ).items()
        }

    whole = term(plain, [0, 1, 2])
    assert whole.keys() == {"moments", *loss.MOMENT_ERRORS}
    for name, value in term(plain, [0, 2]).items():
        assert value == pytest.approx(whole[name], rel=1e-12), name
    heavy = [replace(frame, moments_weight=2.0 if i == 2 else 1.0) for i, frame in enumerate(plain)]
    twice, doubled = term(plain, [0, 2, 2]), term(heavy, [0, 1, 2])
    for name, value in twice.items():
        assert value == pytest.approx(doubled[name], rel=1e-12), name
        assert value != pytest.approx(whole[name], rel=1e-3), name
    # written out: the mean over labelled atoms
    out, batch = head.of(plain, [0, 1, 2])
    has = np.asarray(batch.weights.moments) > 0
    assert has.sum() == len(plain[0]) + len(plain[2])
    labels = np.concatenate([np.abs(plain[i].moments) for i in (0, 2)])
    numbers = np.concatenate([plain[i].atomic_numbers for i in (0, 2)])
    means = np.array([MEANS[z] for z in numbers])
    delta = np.asarray(out.moments)[has] - labels
    assert whole["moments_squares"] == pytest.approx(np.mean(delta**2), rel=1e-12)
    assert whole["moments_errors"] == pytest.approx(np.abs(delta).mean(), rel=1e-12)
    assert whole["moments_mean_errors"] == pytest.approx(np.abs(means - labels).mean(), rel=1e-12)


def test_shares_of_devices_and_micro_batches_add_up(heads, labelled) -> None:
    head = heads["collinear"]
    whole = float(loss.moment_term(*head.of(labelled, range(4)))["moments"])
    outs, batches = zip(*(head.of(labelled, order) for order in ([0, 1], [2, 3])), strict=True)
    shared = with_shared_totals(batches)
    assert float(totals_of(batches[0].weights).moments) < float(shared[0].totals.moments)
    shares = [
        loss.moment_term(out, batch)["moments"] for out, batch in zip(outs, shared, strict=True)
    ]
    assert float(sum(shares)) == pytest.approx(whole, rel=1e-12)
    dataset = data.prepare(labelled, head.model, row_width=8)
    spread = Spread(data.alone(dataset, 4), seed=None, dtype="float64", parts=2)
    parts = [part for (part,) in next(spread.batches(0))]
    assert sum(float(part.totals.moments) for part in parts) == float(shared[0].totals.moments)


def test_comparisons_know_what_is_arbitrary(heads, labelled) -> None:
    """Magnitudes know no sign; ``sign`` reverses a whole graph, not a part of it."""
    head = heads["signed"]
    reversed_ = [f if f.moments is None else replace(f, moments=-f.moments) for f in labelled]
    partly = [
        *labelled[:2],
        replace(labelled[2], moments=labelled[2].moments * np.resize([1, -1], len(labelled[2]))),
        labelled[3],
    ]

    def terms(frames):
        out, batch = head.of(frames, range(4))
        return {
            c: float(loss.moment_term(out, batch, compare=c)["moments"])
            for c in moments.COMPARISONS
        }

    as_is, flipped, mixed = terms(labelled), terms(reversed_), terms(partly)
    assert as_is["magnitude"] == pytest.approx(flipped["magnitude"], rel=1e-12)
    assert as_is["magnitude"] == pytest.approx(mixed["magnitude"], rel=1e-12)
    assert as_is["sign"] == pytest.approx(flipped["sign"], rel=1e-12)
    assert as_is["sign"] != pytest.approx(mixed["sign"], rel=1e-3)
    assert as_is["direct"] != pytest.approx(flipped["direct"], rel=1e-3)
    assert as_is["magnitude"] <= as_is["sign"] <= min(as_is["direct"], flipped["direct"])


def test_the_gradient_of_the_loss_reaches_head_and_trunk(small, labelled) -> None:
    """Also where a magnitude is 0, whose gradient is not a number in a careless code."""
    model, params = surgery.add_moments(*small, kind="vector")
    dataset = data.prepare(
        [
            replace(f, moments=None if f.moments is None else np.zeros((len(f), 3)))
            for f in labelled
        ],
        model,
    )
    (batch,) = data.epoch(dataset, 4, dtype="float64")
    objective = loss.weighted(model, energy=0.0, forces=0.0, moments=1.0)
    gradient = jax.jit(jax.grad(lambda p, b: objective(p, b)[0]))
    found = tree.flatten(gradient(params, batch))
    assert all(np.isfinite(leaf).all() for leaf in found.values())
    for path in ("moments/bias", "moments/linear_u/1o", "interactions_0/linear_up/0e"):
        assert np.abs(found[path]).max() > 0, path
    zero = {
        **params,
        "moments": {**params["moments"], "bias": jnp.zeros_like(params["moments"]["bias"])},
    }
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(zero, batch)))
    bare = data.epoch(data.prepare(labelled, small[0]), 4, dtype="float64")
    with pytest.raises(ValueError, match="the batch carries none"):
        objective(params, next(bare))


@pytest.mark.parametrize("kind", ["collinear", "vector"])
def test_blocks_give_the_same_moments_and_energy(kind, heads, crystal) -> None:
    head = heads[kind]
    whole, batch = head.of([data.unlabelled(crystal)], [0])
    blocks = head.jitted(head.params, in_blocks(batch.graph, 3, r_max=head.model.r_max))
    for name in ("energy", "forces", "stress", "moments"):
        a, b = (np.asarray(getattr(out, name)) for out in (whole, blocks))
        np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(a).max(), err_msg=name)


def test_surgery_on_elements_and_heads_keeps_the_moments(heads, crystal) -> None:
    head = heads["collinear"]
    before, n = head(crystal)
    model, params = surgery.select_elements(head.model, head.params, ["Cl", "Na", "O"])
    model, params = surgery.add_element(model, params, "K", like="Na", e0s=-1.0)
    model, params = surgery.add_head(model, params, "other")
    (after,) = predict_frames(model, params, [data.unlabelled(crystal)], head="other")
    np.testing.assert_allclose(after.moments, before.moments[:n], rtol=1e-10)
    np.testing.assert_allclose(after.forces, before.forces[:n], atol=1e-10)
    np.testing.assert_array_equal(after.mean_moments, [MEANS[z] for z in crystal.numbers])
    assert model.mean_moments[model.atomic_numbers.index(19)] == MEANS[11]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "spiral"}, "kind='spiral' is unknown; use 'collinear', 'signed', 'vector'"),
        ({"means": {26: 2.2}}, "given for Fe, which the model does not know"),
        ({"means": {11: -1.0}}, "mean moments of Na are no magnitudes"),
        ({"kind": "vector"}, r"(?s)couples two hidden vectors \(1o\).*use kind='collinear'"),
    ],
)
def test_a_head_that_cannot_be_is_refused(arguments, words, tiny) -> None:
    model, params = tiny
    if arguments.get("kind") == "vector":  # of layers with scalars alone
        scalars = tuple(
            p.model_copy(update={"irreps_out": "4x0e", "paths": p.paths[:1]})
            for p in model.config.products
        )
        model = replace(model, config=model.config.model_copy(update={"products": scalars}))
    with pytest.raises(ValueError, match=words):
        surgery.add_moments(model, params, **arguments)


def test_a_second_head_and_the_removal_of_one_with_energy_are_refused(heads, tmp_path) -> None:
    head = heads["collinear"]
    with pytest.raises(ValueError, match="has a head for collinear moments already"):
        surgery.add_moments(head.model, head.params)
    with pytest.raises(ValueError, match="would be another model"):
        surgery.remove_moments(head.model, head.params)


def test_an_export_says_that_torch_has_no_moments(heads, small, tmp_path) -> None:
    from converters.to_torch import export

    plain = surgery.add_moments(*small)
    with pytest.raises(ValueError, match=r"(?s)no counterpart.*--without-moments"):
        export(plain, tmp_path / "a.model")
    head = heads["collinear"]
    for flag in (False, True):
        with pytest.raises(ValueError, match=r"(?s)no counterpart.*energy=False"):
            export((head.model, head.params), tmp_path / "a.model", without_moments=flag)
    assert not (tmp_path / "a.model").exists()


def test_an_export_without_the_head_is_that_of_the_base(small, monkeypatch, tmp_path) -> None:
    """All that is left to do for torch is what tests of conversion look at."""
    from converters import to_torch

    class Reached(Exception):
        pass

    def stop(config, params):
        given.append((config, params))
        raise Reached

    given = []
    monkeypatch.setattr(to_torch, "_checked_leaves", stop)
    with pytest.raises(Reached):
        to_torch.export(
            surgery.add_moments(*small, means=MEANS), tmp_path / "a.model", without_moments=True
        )
    ((found, params),) = given
    assert found == small[0].config
    assert jax.tree.all(jax.tree.map(np.array_equal, params, small[1]))


def test_a_bundle_keeps_the_head(heads, crystal, tmp_path) -> None:
    head = heads["vector"]
    jaxft.save(tmp_path / "m.jaxft", head.model, head.params)
    model, params = jaxft.load(tmp_path / "m.jaxft")
    assert model.moments == head.model.moments
    assert model.digest == head.model.digest
    (found,) = predict_frames(model, params, [data.unlabelled(crystal)])
    np.testing.assert_allclose(found.moments, head.moments(crystal), atol=1e-13)
    told = dict(rows(of_bundle(tmp_path / "m.jaxft")))
    assert told["magnetic moments"] == "vector, adds to the energy"
    without = {k: v for k, v in model.buffers.items() if not k.startswith("moments")}
    with pytest.raises(bundle.BundleError, match="disagree on the moments"):
        jaxft.save(tmp_path / "n.jaxft", replace(model, buffers=without), params)


def test_the_calculator_and_predicted_files_speak_of_moments(
    heads, tiny, crystal, tmp_path
) -> None:
    for kind in ("collinear", "vector"):
        head = heads[kind]
        atoms = crystal.copy()
        atoms.calc = JaxftCalculator(head.model, head.params)
        found = atoms.get_magnetic_moments()
        np.testing.assert_allclose(found, head.moments(crystal), atol=1e-12)
        np.testing.assert_allclose(atoms.get_magnetic_moment(), found.sum(axis=0), atol=1e-12)
    ase.io.write(tmp_path / "in.xyz", crystal)
    predict_file(head.model, head.params, tmp_path / "in.xyz", tmp_path / "out.xyz")
    (read,) = data.read(tmp_path / "out.xyz", keys=Keys(energy="energy", moments="magmoms"))
    np.testing.assert_allclose(read.moments, found, atol=1e-6)
    silent = crystal.copy()
    silent.calc = JaxftCalculator(*tiny)
    with pytest.raises(PropertyNotImplementedError):
        silent.get_magnetic_moments()


def test_labels_are_read_by_their_key_and_checked(crystal, heads) -> None:
    n = len(crystal)
    atoms = crystal.copy()
    assert data.from_atoms(atoms).moments is None
    atoms.arrays["REF_magmoms"] = np.linspace(-1, 2, n)
    atoms.info["config_moments_weight"] = 3.0
    frame = data.from_atoms(atoms, source="x")
    np.testing.assert_array_equal(frame.moments, np.linspace(-1, 2, n))
    assert frame.moments_weight == 3.0
    assert data.has_label(frame, "moments")
    assert data.coverage([frame]).moments == 1
    assert data.from_atoms(atoms, keys=Keys(moments="other")).moments is None
    vectors = replace(frame, moments=np.outer(np.ones(n), [0.0, 3.0, 4.0]))
    (sample,) = data.prepare([vectors], heads["collinear"].model).samples
    np.testing.assert_allclose(sample.moments[0], 5.0)
    np.testing.assert_array_equal(sample.moments[1], 3.0)
    with pytest.raises(ValueError, match=r"(?s)x has magnetic moments of shape \(8,\).*kind: coll"):
        data.prepare([frame], heads["vector"].model)
    atoms.arrays["REF_magmoms"] = np.zeros((n, 2))
    with pytest.raises(ValueError, match=r"'REF_magmoms' has shape \(8, 2\); expected \(8,\) or"):
        data.from_atoms(atoms, source="x")


def test_means_are_of_magnitudes_and_count_weights() -> None:
    pair = Frame(np.array([26, 8]), np.zeros((2, 3)), np.eye(3), (True,) * 3)
    frames = [
        replace(pair, moments=np.array([-2.0, 0.1])),
        replace(pair, moments=np.array([3.0, 0.0]), weight=3.0),
        replace(pair, moments=np.array([9.0, 9.0]), moments_weight=0.0),
        pair,
    ]
    assert data.mean_moments(frames) == pytest.approx({8: 0.025, 26: 2.75})


def test_errors_stand_beside_those_of_the_means(heads, labelled) -> None:
    head = heads["collinear"]
    results = predict_frames(head.model, head.params, labelled)
    table = errors(labelled, results)
    labels = [np.abs(f.moments) for f in labelled if f.moments is not None]
    own = [r.moments for f, r in zip(labelled, results, strict=True) if f.moments is not None]
    expected = np.abs(np.concatenate(own) - np.concatenate(labels)).mean()
    assert table.total.moments.mae == pytest.approx(expected, rel=1e-12)
    assert table.total.moments.frames == 3
    means = [MEANS.get(z, 0) for f in labelled if f.moments is not None for z in f.atomic_numbers]
    by_means = np.abs(np.array(means) - np.concatenate(labels)).mean()
    assert table.to_dict()["total"]["moments_of_means"]["mae"] == pytest.approx(1e3 * by_means)
    none = errors([replace(f, moments=None) for f in labelled], results)
    assert "moments" not in none.to_dict()["total"]


def test_a_study_shows_moments_beside_those_of_the_means(heads, labelled) -> None:
    head = heads["collinear"]
    after = predict_frames(head.model, head.params, labelled)
    before = [replace(r, moments=2 * r.moments) for r in after]
    found = {q.name: q for q in of_set(Judged("iron", labelled, before, after), False)}
    total = errors(labelled, after).total
    assert found["moments_mae"].value == pytest.approx(1e3 * total.moments.mae)
    assert found["moments_mean_mae"].value == pytest.approx(1e3 * total.mean_moments.mae)
    doubled = errors(labelled, before).total
    assert found["before_moments_mae"].value == pytest.approx(1e3 * doubled.moments.mae)
    assert {q.unit for name, q in found.items() if "moments" in name} == {"mµB"}
    bare = [replace(f, moments=None) for f in labelled]
    unlabelled = of_set(Judged("iron", bare, before, after), False)
    assert not [q.name for q in unlabelled if "moments" in q.name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small, frames) -> Path:
    """small.jaxft and frames.xyz, on which moments follow from the forces; one lacks them."""
    folder = tmp_path_factory.mktemp("moments")
    jaxft.save(folder / "small.jaxft", *small)
    images = []
    for i, frame in enumerate(frames[2:6]):
        atoms = ase.Atoms(frame.atomic_numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
        atoms.info["REF_energy"] = frame.energy
        atoms.arrays["REF_forces"] = frame.forces
        if i % 4:
            size = np.linalg.norm(frame.forces, axis=-1)
            atoms.arrays["REF_magmoms"] = 0.1 * atoms.numbers + size
        images.append(atoms)
    ase.io.write(folder / "frames.xyz", images)
    return folder


def settings(folder: Path, output: Path, **changes):
    (folder / "moments.yaml").write_text(presets.text("moments"))
    words = {
        "model": folder / "small.jaxft",
        "output": output,
        "train": folder / "frames.xyz",
        "valid": f"[{folder / 'frames.xyz'}]",
        "test": f"{{all: {{files: {folder / 'frames.xyz'}}}}}",
        "epochs": 2,
        "batch_size": 8,
        "dtype": "float64",
        "e0s": "foundation",
    } | changes
    return config.load(folder / "moments.yaml", [f"{key}={value}" for key, value in words.items()])


def test_a_config_adds_the_head_trains_and_keeps_it(folder, tmp_path) -> None:
    recipe = '[{strategy: lora, rank: 1, also_train: "moments/**"}]'
    asked = settings(folder, tmp_path / "run", recipe=recipe, **{"loss.error": "mse"})
    result = run.finetune(asked)
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert log[0]["valid/moments_mae"] == pytest.approx(log[0]["valid/moments_mean_mae"])
    assert log[-1]["valid/moments"] < log[0]["valid/moments"]
    assert log[-1]["valid/moments_mean_mae"] == log[0]["valid/moments_mean_mae"]
    model, params = jaxft.load(result.path, dtype="float64")
    assert model.moments.kind == "collinear"
    assert not model.moments.energy
    frames = data.read(folder / "frames.xyz")
    means = data.mean_moments(frames)
    assert {z: m for z, m in zip(model.atomic_numbers, model.mean_moments, strict=True) if m} == (
        pytest.approx(means)
    )
    (judged,) = result.judged
    found = errors(frames, judged.after).total
    assert found.moments.frames == sum(f.moments is not None for f in frames)
    assert "magnetic moments" in (tmp_path / "run/report.html").read_text()
    base = jaxft.load(folder / "small.jaxft", dtype="float64")
    _, merged = adapter.merge(adapter.load(tmp_path / "run/adapter"), *base)
    flat = tree.flatten(params)
    for path, leaf in tree.flatten(merged).items():
        np.testing.assert_allclose(leaf, flat[path], rtol=1e-13, atol=1e-15, err_msg=path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moments": "null", "recipe": "[]"}, "has no head for magnetic moments;\nadd one"),
        ({"loss.moments": 0, "loss.forces": 1}, "nothing would train it: loss.moments is 0"),
        ({"recipe": "[{strategy: freeze, where: moments/**}]"}, "freezes all of it"),
        ({"keys.moments": "spins"}, "has moments under the key 'spins'"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_training(
    changes, words, folder, tmp_path
) -> None:
    with pytest.raises(ValueError, match=words):
        run.finetune(settings(folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_sampled_fisher_refuses_moments(folder, small, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"loss\.moments=0"):
        outputs(settings(folder, tmp_path / "run", **{"loss.error": "mse"}), small[0])


def test_an_unknown_comparison_and_a_weight_without_a_head_are_refused(small) -> None:
    with pytest.raises(ValueError, match="compare='angle' is unknown"):
        loss.weighted(small[0], compare="angle")
    with pytest.raises(ValueError, match=r"no head for them;\nadd one \(jaxft.surgery.add_moments"):
        loss.weighted(small[0], moments=1.0)
