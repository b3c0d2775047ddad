"""Surrogates: pools and their filters, labels that are the teacher's, stages that resume."""

import json
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from conftest import first_layer

from jaxft import bundle, config, data
from jaxft.evaluate import errors, predict_frames
from jaxft.evaluate.candidate import Flag, JaxCandidate
from jaxft.evaluate.predictions import FrameResult
from jaxft.surrogate import config as configs
from jaxft.surrogate import pool, report, run
from jaxft.surrogate.config import Dynamics, Keep, Rattle, Speed, SurrogateConfig

CONFIGS = Path(__file__).parents[1] / "configs" / "surrogate"
STUDENT = {"architecture": {"hidden": "4x0e", "layers": 1, "l_max": 1, "correlation": 1}}
TRAINING = {"epochs": 1, "batch_size": 4, "valid": 0.25, "dtype": "float64"}


def pair(distance, *, kind="H2"):
    return ase.Atoms(kind, [(0, 0, 0), (distance, 0, 0)])


@pytest.mark.parametrize(
    ("atoms", "expected"),
    [
        (pair(0.31), 0.5),
        (pair(0.62, kind="HCl"), 0.62 / (0.31 + 1.02)),
        (pair(5.0), np.inf),
        (pair(0.0), 0.0),
        (ase.Atoms("H", cell=[0.62, 9, 9], pbc=True), 1.0),
    ],
)
def test_the_closest_pair_is_in_units_of_covalent_radii(atoms, expected):
    assert pool.closest(data.unlabelled(atoms)) == pytest.approx(expected)


class Told:
    """A teacher that says what a structure's ``info`` says."""

    def evaluate(self, structures):
        return [self._of(atoms) for atoms in structures]

    def _of(self, atoms):
        if "flag" in atoms.info:
            return Flag(atoms.info["flag"])
        forces = np.full((len(atoms), 3), atoms.info["force"])
        return FrameResult(-1.5, np.zeros(len(atoms)), forces, None)


def told(distance, **info):
    atoms = pair(distance)
    atoms.info |= {"force": 0.5, **info}
    return atoms


def test_a_pool_drops_and_counts_what_cannot_be_learnt():
    made = [told(0.7), told(0.8), told(0.9), told(0.7), told(0.2)]
    made += [told(1.0, flag="no"), told(1.1, force=20.0), told(1.2, force=17.0)]
    found = pool.labelled(Told(), made, Keep(max_force=30.0, closest=0.6), 0)
    assert found.counts == {
        "made": 8,
        "too_close": 1,
        "repeated": 1,
        "not_finite": 1,
        "forces_too_large": 1,  # 20·√3 eV/Å
        "not_chosen": 0,
        "kept": 4,
    }
    assert [atoms.info["REF_energy"] for atoms in found.structures] == [-1.5] * 4
    assert found.structures[-1].arrays["REF_forces"].tolist() == [[17.0] * 3] * 2
    few = pool.labelled(Told(), made, Keep(frames=2, how="random"), 0)
    assert (few.counts["not_chosen"], few.counts["kept"]) == (2, 2)


def test_too_small_a_pool_says_where_structures_were_lost():
    with pytest.raises(ValueError, match=r"1 structures are left .* too_close 1.* 2 are needed"):
        pool.labelled(Told(), [told(0.2), told(0.8)], Keep(), 0)


def test_rattling_strains_crystals_alone_and_carries_no_label():
    crystal = ase.Atoms("NaCl", [(0, 0, 0), (2.8, 0, 0)], cell=[5.6, 5.6, 5.6], pbc=True)
    molecule = pair(0.8)
    molecule.info["REF_energy"] = 3.0
    plan = Rattle(frames=6, volume=(0.8, 1.2), strain=0.05, amplitude=(0.01, 0.1))
    found = pool.rattled([crystal, molecule], plan, 1)
    volumes = np.array([atoms.get_volume() for atoms in found[:6]]) / crystal.get_volume()
    assert np.all((volumes > 0.8) & (volumes < 1.2))
    assert np.ptp(volumes) > 0.05
    assert {tuple(atoms.cell.lengths()) for atoms in found[6:]} == {(0.0, 0.0, 0.0)}
    assert all("REF_energy" not in atoms.info for atoms in found)
    assert {atoms.info["config_type"] for atoms in found} == {"rattle"}
    again, other = (pool.rattled([crystal, molecule], plan, seed) for seed in (1, 2))
    np.testing.assert_array_equal(found[0].positions, again[0].positions)
    assert np.abs(found[0].positions - other[0].positions).max() > 0


def settings(folder, **changes):
    document = {
        "teacher": str(folder / "teacher.jaxft"),
        "output": str(folder / "out"),
        "seeds": str(folder / "seeds.xyz"),
        "rattle": {"frames": 4, "amplitude": [0.02, 0.1]},
        "keep": {"frames": 12, "max_force": 1e4, "closest": 0.3},
        "student": STUDENT,
        "training": TRAINING,
        "test": {"dft": str(folder / "test.xyz")},
        "speed": None,
    }
    return config.checked(SurrogateConfig, document | changes, "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny, frames):
    """A teacher, seeds and labelled test frames."""
    folder = tmp_path_factory.mktemp("surrogate")
    bundle.save(folder / "teacher.jaxft", *first_layer(*tiny))
    salts = [f for f in frames if f.is_periodic]
    for name, chosen in {"seeds": salts, "test": salts[:3]}.items():
        images = []
        for frame in chosen:
            atoms = ase.Atoms(frame.atomic_numbers, frame.positions, cell=frame.cell, pbc=True)
            atoms.info["REF_energy"], atoms.info["REF_stress"] = frame.energy, frame.stress
            atoms.arrays["REF_forces"] = frame.forces
            images.append(atoms)
        ase.io.write(folder / f"{name}.xyz", images)
    return folder


def forbid(monkeypatch, *names):
    def refuse(*args, **kwargs):
        raise AssertionError("a finished stage was done again")

    for name in names:
        monkeypatch.setattr(run, name, refuse)


def test_a_surrogate_is_made_in_stages_and_a_killed_one_goes_on(folder, monkeypatch, few_shapes):
    chosen = settings(folder)
    stages = run.read(chosen).stages

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.run, "finetune", killed)
        with pytest.raises(KeyboardInterrupt):
            run.distill(chosen)
    assert stages.start.exists()
    assert not stages.student.exists()

    # the labels are the teacher's, at the very positions that the file has
    labelled = data.read(stages.pool)
    model, params = bundle.load(folder / "teacher.jaxft", dtype="float64")
    table = errors(labelled, predict_frames(model, params, labelled)).total
    assert len(labelled) == 12
    assert table.energy.rmse < 1e-7
    assert table.forces.rmse < 1e-7
    assert table.stress.rmse < 1e-7
    facts = json.loads(stages.pool.with_suffix(".json").read_text())
    assert facts["teacher"]["digest"] and facts["seeds"]  # noqa: PT018
    assert facts["counts"]["made"] == 4 * len(ase.io.read(folder / "seeds.xyz", ":"))

    # the student starts with the teacher's E0s and the pool's statistics
    student, _, provenance = bundle.load_numpy(stages.start)
    own = [model.atomic_numbers.index(z) for z in student.atomic_numbers]
    assert student.e0s[0].tolist() == model.e0s[0, own].tolist()
    rms = np.sqrt(np.mean(np.concatenate([f.forces for f in labelled]) ** 2))
    assert float(student.constants.scale[0]) == pytest.approx(rms)
    assert provenance["surrogate_of"] == facts

    with monkeypatch.context() as patch:
        forbid(patch, "_make_structures", "_make_pool", "_make_start")
        found = run.distill(chosen)
    assert set(found["errors on dft"]) == {"teacher", "student"}
    assert found["errors on dft"]["student"]["forces_rmse"] > 0
    assert found["student against teacher on dft"]["student"]["energy_rmse"] > 0
    assert "surrogate of teacher.jaxft" in stages.report.with_suffix(".html").read_text()

    with monkeypatch.context() as patch:
        forbid(patch, "_make_structures", "_make_pool", "_make_start", "_make_report")
        patch.setattr(run.run, "finetune", killed)
        assert run.distill(chosen) == found
    other = run.read(settings(folder, keep={"frames": 8})).stages
    assert other.structures == stages.structures
    assert other.pool != stages.pool
    more = run.read(settings(folder, training=TRAINING | {"epochs": 2})).stages
    assert (more.pool, more.start) == (stages.pool, stages.start)
    assert more.run != stages.run


def test_input_that_cannot_be_used_is_refused_before_anything_is_made(folder, tmp_path):
    ase.io.write(tmp_path / "gold.xyz", ase.Atoms("Au"))
    with pytest.raises(ValueError, match="Au"):
        run.read(settings(folder, seeds=str(tmp_path / "gold.xyz")))
    ase.io.write(tmp_path / "bare.xyz", ase.Atoms("Na"))
    with pytest.raises(ValueError, match="label"):
        run.read(settings(folder, test={"dft": str(tmp_path / "bare.xyz")}))
    with pytest.raises(ValueError, match="no folder of jaxft distill"):
        run.read(settings(folder, output=str(folder)))
    with pytest.raises(ValueError, match="is not a jaxft bundle"):
        run.read(settings(folder, teacher=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keeep": {}}, "did you mean 'keep'"),
        ({"rattle": None}, "give md, rattle or both"),
        ({"training": TRAINING | {"model": "x"}}, "model follows from the surrogate's own keys"),
        ({"training": TRAINING | {"epoch": 3}}, "did you mean 'epochs'"),
        ({"student": {"architecture": {"chanels": 3}}}, "unknown key 'chanels'"),
        ({"keep": {"max_force": 0}}, "max_force"),
    ],
)
def test_configs_are_strict(change, message, tmp_path):
    with pytest.raises(config.ConfigError, match=message):
        settings(tmp_path, **change)


@pytest.mark.parametrize("name", ["nacl.yaml", "nacl-hessian.yaml"])
def test_configs_of_the_project_can_be_read_in_both_forms(name):
    long, short = (configs.load(CONFIGS / name, small=small) for small in (False, True))
    assert long.keep.frames > short.keep.frames
    assert long.output != short.output


class Named:
    """What is timed of a model."""

    def __init__(self, name, seconds):
        self.name, self.seconds = name, seconds
        self.params, self.working_dtype = {"w": np.zeros(round(1 / seconds))}, "float32"


def test_speeds_are_medians_of_alternating_turns(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])

    def timed(model, *args):
        def call(turn):
            order.append((model.name, turn))
            # the first two turns compile, one is disturbed
            clock[0] += model.seconds * {0: 1000, 1: 50, 3: 20}.get(turn, 1)

        return call

    def ended(model, *args):
        raise report.Unmeasured(f"{model.name}: 2 replicas ended")

    monkeypatch.setattr(report, "_evaluating", timed)
    monkeypatch.setattr(report, "_moving", ended)
    models = [Named("teacher", 0.5), Named("student", 0.1)]
    found = report.speed(models, ase.Atoms("H2", [(0, 0, 0), (0, 0, 1)]), Speed(turns=3))
    assert [name for name, _ in order[:4]] == ["teacher", "student", "teacher", "student"]
    alone, batch = found.of("student")[0], found.of("student")[1]
    assert (alone.values["atoms"], batch.values["atoms"]) == (2, 16)
    assert alone.values["time"] == pytest.approx(100.0)
    assert alone.values["speedup"] == pytest.approx(5.0)
    (flag,) = found.flags
    assert "2 replicas ended" in flag.flag
    assert list(report.headline([found], models)["speedup"]) == [alone.subject, batch.subject]


def test_the_teacher_moves_its_seeds(folder):
    """Of each start and temperature the frames after the start, bare."""
    model, params = bundle.load(folder / "teacher.jaxft", dtype="float64")
    teacher = JaxCandidate("teacher", model, params)
    seeds = [atoms for atoms in data.read_atoms(folder / "seeds.xyz") if len(atoms) == 2][:2]
    plan = Dynamics(temperatures=[10.0, 20.0], timestep=0.01, steps=4, interval=2, starts=1)
    found, ended = pool.moved(teacher, seeds, plan, 3)
    assert ended == 0
    assert [atoms.info["surrogate_kelvin"] for atoms in found] == [10.0, 10.0, 20.0, 20.0]
    assert {atoms.info["config_type"] for atoms in found} == {"md"}
    assert all(set(atoms.arrays) == {"numbers", "positions"} for atoms in found)
    start = min(seeds, key=lambda seed: np.abs(seed.positions - found[0].positions).max())
    moved = [np.abs(atoms.positions - start.positions).max() for atoms in found]
    assert min(moved) > 0
    assert max(moved) < 0.01
