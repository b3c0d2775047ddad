"""Second derivatives of a teacher: what the labels are, who learns them, what changes without."""

import json

import ase
import ase.io
import jax
import numpy as np
import pytest
from conftest import first_layer

from jaxft import bundle, config, data
from jaxft.data.curvatures import displacements
from jaxft.evaluate import hessian as products
from jaxft.evaluate.candidate import JaxCandidate
from jaxft.evaluate.hessian import products_of_frames
from jaxft.surrogate import hessians, run
from jaxft.surrogate.config import Hessian, SurrogateConfig

LOSS = {"energy": 0, "forces": 0, "hessian": 1.0}
TRAINING = {
    "epochs": 12,
    "batch_size": 9,
    "valid": 0.25,
    "dtype": "float64",
    "loss": LOSS,
    "optimizer": {"learning_rate": 5e-2},
    "ema_decay": None,
}


@pytest.fixture(scope="module")
def teacher(small):
    return JaxCandidate("teacher", *small)


@pytest.fixture(scope="module")
def mixed(structures):
    """A molecule, a primitive cell and a cubic one: they share a batch."""
    return [structures[i] for i in (0, 3, 5)]


def test_labels_are_minus_the_change_of_the_teachers_forces(teacher, mixed, tmp_path):
    found = hessians.labelled(teacher, mixed, Hessian(probes=2), 5)
    ase.io.write(tmp_path / "pool.xyz", found)
    step, moved = 1e-4, []
    read = data.read(tmp_path / "pool.xyz")
    for frame, atoms in zip(read, mixed, strict=True):
        for u in frame.hessian.displacements:
            for s in (step, -step):
                moved.append(atoms.copy())
                moved[-1].positions += s * u
    forces = iter([said.forces for said in teacher.evaluate(moved)])
    for frame in read:
        assert len(frame.hessian.products) == 2
        for product in frame.hessian.products:
            expected = -(next(forces) - next(forces)) / (2 * step)
            assert abs(expected).max() > 1
            # the file has eight decimals, of u as well; entries of a Hessian are up to 100 eV/Å²
            np.testing.assert_allclose(product, expected, atol=2e-6)


def test_labels_follow_from_the_seed(teacher, mixed):
    one, again, other = (
        hessians.labelled(teacher, mixed, Hessian(probes=2), seed) for seed in (5, 5, 6)
    )
    for name in ("probe", "REF_hvp"):
        np.testing.assert_array_equal(one[1].arrays[name], again[1].arrays[name])
        assert abs(one[1].arrays[name] - other[1].arrays[name]).min() > 0
    # every structure has displacements of its own, whatever the others are
    first, second = (
        np.sqrt(3 * len(atoms)) * data.from_atoms(atoms).hessian.displacements.ravel()[:6]
        for atoms in one[:2]
    )
    assert abs(first - second).min() > 1e-3


def test_blocks_and_batches_change_nothing(small, mixed, monkeypatch):
    frames = [data.unlabelled(atoms) for atoms in mixed]
    rng = np.random.default_rng(0)
    given = [rng.normal(size=(2, len(frame), 3)) for frame in frames]
    told = []
    whole = products_of_frames(*small, frames, given, progress=lambda *n: told.append(n))
    assert told == [(3, 3)]
    monkeypatch.setattr(products, "edges_per_block", lambda _: 128)
    parts = products_of_frames(*small, frames, given, batch_size=1)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 3\) were given;\nuse \[2, 2, 3\]"):
        products_of_frames(*small, frames, [given[0], given[1][:1], given[2]])
    with pytest.raises(ValueError, match="of 2 frames were given for 3"):
        products_of_frames(*small, frames, given[:2])


def test_displacements_are_of_mean_square_one():
    rng = np.random.default_rng(0)
    for n, count in ((2, 6), (2, 15), (5, 4)):
        columns = displacements(n, count, "column", rng).reshape(count, -1)
        assert set(np.unique(columns)) == {0, 1}
        np.testing.assert_array_equal(columns.sum(axis=1), 1)
        uses = columns.sum(axis=0)
        assert uses.max() - uses.min() <= 1
    lengths = (displacements(5, 4000, "gaussian", rng) ** 2).sum(axis=(1, 2))
    # 4000 sums of 15 squares: 0.6 % to one standard deviation
    assert lengths.mean() == pytest.approx(1, abs=0.03)


def test_a_reports_error_is_that_of_the_whole_hessian(mixed, monkeypatch):
    """Of matrices that are given: all columns of two atoms; none of a teacher against itself."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 6, 6))

    def times(matrix, params, frames, given, **options):
        return [u.reshape(-1, 6) @ matrix for u in given]

    monkeypatch.setattr(hessians, "products_of_frames", times)
    teacher, student = JaxCandidate("teacher", theirs, {}), JaxCandidate("student", ours, {})
    sets = [("cells", [data.unlabelled(mixed[1])] * 2)]
    found = hessians.errors((teacher, student), sets, Hessian(probes=6, kind="column"), 0)
    (row,) = found.rows
    assert (row.model, row.subject, row.values["frames"]) == ("student", "cells", 2)
    assert row.values["hv_rmse"] == pytest.approx(np.sqrt(np.mean((ours - theirs) ** 2)))
    assert row.values["hv_mae"] == pytest.approx(np.mean(abs(ours - theirs)))
    assert row.values["teacher_rms"] == pytest.approx(np.sqrt(np.mean(theirs**2)))
    same = hessians.errors((teacher, teacher), sets, Hessian(), 0)
    assert same.rows[0].values["hv_rmse"] == 0


def test_sets_that_cannot_be_computed_are_flagged_and_labels_that_are_none_refused(small, mixed):
    model, params = small
    broken = JaxCandidate("broken", model, jax.tree.map(lambda leaf: np.nan * leaf, params))
    with pytest.raises(ValueError, match=r"Hessian of structure 0 .*not finite;\nkeep calmer"):
        hessians.labelled(broken, mixed, Hessian(), 0)
    fine = [data.unlabelled(atoms) for atoms in mixed]
    gold = [data.unlabelled(ase.Atoms("Au2", [[0] * 3, [2] * 3]))]
    found = hessians.errors((broken, broken), [("gold", gold), ("fine", fine)], Hessian(), 0)
    assert [row.values for row in found.rows] == [{}, {}]
    assert "Au" in found.rows[0].flag
    assert "not finite" in found.rows[1].flag


def settings(folder, **changes):
    document = {
        "teacher": str(folder / "teacher.jaxft"),
        "output": str(folder / "out"),
        "seeds": str(folder / "seeds.xyz"),
        "rattle": {"frames": 4, "amplitude": [0.02, 0.1]},
        "keep": {"frames": 12, "max_force": 1e4, "closest": 0.3},
        "hessian": {"probes": 3},
        "student": {
            "architecture": {
                "hidden": "4x0e",
                "layers": 1,
                "l_max": 1,
                "correlation": 1,
                "r_max": 4.0,
            }
        },
        "training": TRAINING,
        "speed": None,
    }
    return config.checked(SurrogateConfig, document | changes, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": None}, "loss.hessian is 1, but the teacher labels no second derivatives"),
        (
            {"training": TRAINING | {"loss": {"forces": 1}}},
            "asks for 3 displacements of every frame, but training.loss.hessian is 0",
        ),
        ({"hessian": {"probes": 0}}, "probes"),
        ({"hessian": {"probe": 1}}, "did you mean 'probes'"),
        ({"hessian": {"kind": "row"}}, "'column' or 'gaussian'"),
    ],
)
def test_probes_and_their_weight_go_together(change, message, tmp_path):
    with pytest.raises(config.ConfigError, match=message):
        settings(tmp_path, **change)


def test_a_source_may_bring_hessians_that_the_teacher_does_not(tmp_path):
    source = {"strategy": "replay", "name": "curvature", "files": "hessian.xyz", "watch": 0}
    settings(tmp_path, hessian=None, training=TRAINING | {"recipe": [source]})


PLAIN = {
    "student": {"architecture": {"hidden": "4x0e", "layers": 1, "l_max": 1, "correlation": 2}},
    "hessian": None,
    "training": {"epochs": 1, "batch_size": 4, "loss": {"energy": 1.0, "forces": 10.0}},
}
NAMES = [
    "structures-e0cac4623e.xyz",
    "pool-8f39e214d2.xyz",
    "start-4d2a2414a3.jaxft",
    "run-51b7c35db0",
    "report-df2004c78f.json",
]
"""Of the files of PLAIN before there were Hessians, at commit d179466: finished stages stay."""


def test_without_hessians_files_are_called_as_they_were(tmp_path):
    plain = run._stages(settings(tmp_path, **PLAIN), "teacher", ["seed"])
    found = [plain.structures, plain.pool, plain.start, plain.run, plain.report]
    assert [path.name for path in found] == NAMES
    assert plain.train == plain.pool
    student = {"student": PLAIN["student"]}
    curved = run._stages(settings(tmp_path, **student), "teacher", ["seed"])
    assert (curved.pool, curved.start) == (plain.pool, plain.start)
    more = run._stages(settings(tmp_path, hessian={"probes": 4}, **student), "teacher", ["seed"])
    files = [{stage.train, stage.run, stage.report} for stage in (plain, curved, more)]
    assert len(set.union(*files)) == 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny, structures):
    """A teacher and seeds, of two atoms each."""
    folder = tmp_path_factory.mktemp("hessians")
    bundle.save(folder / "teacher.jaxft", *first_layer(*tiny))
    ase.io.write(folder / "seeds.xyz", [structures[i] for i in (3, 4, 7)])
    return folder


def test_a_student_learns_hessians_in_stages_and_a_killed_one_goes_on(
    folder, monkeypatch, few_shapes
):
    chosen = settings(folder)
    stages = run.read(chosen).stages

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hessians, "products_of_frames", killed)
        with pytest.raises(KeyboardInterrupt):
            run.distill(chosen)
    assert stages.pool.exists()
    assert not stages.train.exists()

    def refuse(*args, **kwargs):
        raise AssertionError("a finished stage was done again")

    with monkeypatch.context() as patch:
        for name in ("_make_structures", "_make_pool"):
            patch.setattr(run, name, refuse)
        found = run.distill(chosen)
    before, after = data.read(stages.pool), data.read(stages.train)
    assert {frame.hessian for frame in before} == {None}
    for one, other in zip(before, after, strict=True):
        assert other.hessian.displacements.shape == (3, len(one), 3)
        assert one.energy == other.energy
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.forces, other.forces)
    facts = json.loads(stages.train.with_suffix(".json").read_text())
    assert facts["hessian"]["probes"] == 3
    assert facts["teacher"] == json.loads(stages.pool.with_suffix(".json").read_text())["teacher"]

    # nothing else was learnt, and without it all of the teacher's would be missing
    error = found[hessians.CHECK]["validation frames"]
    assert error["teacher_rms"] > 0.1
    assert error["hv_rmse"] < 0.5 * error["teacher_rms"]
    assert hessians.CHECK in stages.report.with_suffix(".html").read_text()

    with monkeypatch.context() as patch:
        for name in ("_make_hessians", "_make_start", "_make_report"):
            patch.setattr(run, name, refuse)
        patch.setattr(run.run, "finetune", killed)
        assert run.distill(chosen) == found
