"""Spread over ensembles: evaluated together as one by one, and calibrated where it must be."""

from dataclasses import replace

import ase
import ase.io
import jax
import numpy as np
import pytest
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones
from scipy import stats

from jaxft import data, surgery, tree
from jaxft.evaluate import ensemble
from jaxft.evaluate.candidate import AseCandidate, Flag, JaxCandidate
from jaxft.evaluate.ensemble import opinions, predict_ensemble, stack
from jaxft.evaluate.spread import Spread, ranking, spreads, write_ranked
from jaxft.evaluate.uncertainty import ALL, LEVELS, check, coverage, judge, miscalibration


def framed(structures):
    return [data.from_atoms(atoms, source=str(i)) for i, atoms in enumerate(structures)]


def moved(params, seed, where=""):
    """Other parameters in the leaves whose path begins with ``where``."""
    rng = np.random.default_rng(seed)
    return tree.unflatten(
        {
            path: np.asarray(leaf)
            * (1 + 0.1 * path.startswith(where) * rng.normal(size=leaf.shape))
            for path, leaf in tree.flatten(params).items()
        }
    )


@pytest.fixture(scope="module")
def members(small):
    model, params = small
    return model, [moved(params, 100 * seed) for seed in range(3)]


def test_members_together_say_what_they_say_one_by_one(members, structures):
    model, several = members
    shifted = surgery.set_e0s(model, {8: -50.0})
    models = [model, shifted, model]
    together = predict_ensemble(models, several, structures, batch_size=3)
    for own, params, results in zip(models, several, together, strict=True):
        alone = JaxCandidate("alone", own, params).evaluate(structures)
        for a, b in zip(alone, results, strict=True):
            np.testing.assert_allclose(b.energy, a.energy, rtol=1e-12)
            np.testing.assert_allclose(b.energies, a.energies, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(b.forces, a.forces, atol=1e-10)
            assert (a.stress is None) == (b.stress is None)
            if a.stress is not None:
                np.testing.assert_allclose(b.stress, a.stress, atol=1e-12)


def test_a_stack_keeps_shared_leaves_once(small):
    _, params = small
    several = [moved(params, seed, "readouts") for seed in (0, 50)]
    whole = stack(several)
    assert set(whole.own) == {path for path in tree.flatten(params) if path.startswith("readouts")}
    assert whole.shared.keys().isdisjoint(whole.own)
    for i, member in enumerate(several):
        assert all(
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(whole.member(i)), jax.tree.leaves(member), strict=True)
        )


def test_a_last_layer_ensemble_evaluates_the_trunk_once(small, structures, monkeypatch):
    """The products of the forward trunk have no axis of members."""
    model, params = small
    several = [moved(params, seed, "readouts") for seed in (0, 50, 90, 130)]
    candidates = [JaxCandidate(str(i), model, p, batch_size=8) for i, p in enumerate(several)]
    calls = []
    original = ensemble._predict

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(ensemble, "_predict", counted)
    found = opinions(candidates, structures[:4])
    assert len({len(c[3]) for c in calls}) == 1
    assert all(len(c[3]) < len(c[2]) for c in calls)
    same, size, shared, own, graph = calls[0]
    every = stack([moved(params, seed) for seed in (0, 50, 90, 130)])
    costs = [
        original.lower(same, size, kept, batched, graph).cost_analysis()["flops"]
        for kept, batched in ((shared, own), (every.shared, every.own))
    ]
    assert costs[0] < 0.8 * costs[1]
    alone = candidates[2].evaluate(structures[:4])
    for a, b in zip(alone, found[2], strict=True):
        np.testing.assert_allclose(a.forces, b.forces, atol=1e-10)


def test_equal_members_have_no_spread(small, structures):
    model, params = small
    twins = [JaxCandidate(name, model, params) for name in "ab"]
    for found in spreads(twins, structures):
        assert found.energy_std == 0
        assert (found.forces_std == 0).all()


def test_a_structure_that_cannot_be_judged_is_flagged_and_the_rest_is_not(members, structures):
    model, several = members
    gold = ase.Atoms("Au2", [[0, 0, 0], [0, 0, 2.5]])
    candidates = [JaxCandidate(str(i), model, p) for i, p in enumerate(several)]
    found = spreads(candidates, [structures[0], gold, structures[1]])
    assert isinstance(found[1], Flag)
    assert isinstance(found[0], Spread)
    assert isinstance(found[2], Spread)
    assert ranking(found) in ([0, 2], [2, 0])
    finding = judge({"three": found}, framed([structures[0], gold, structures[1]]))
    (flagged,) = finding.flags
    assert flagged.subject == "frame 1: 1"
    assert finding.rows[0].values["frames"] == 2


def test_calculators_of_any_kind_are_an_ensemble():
    pair = ase.Atoms("Ar2", [[0, 0, 0], [0, 0, 1.2]])
    several = [AseCandidate(str(e), LennardJones(epsilon=e, rc=9)) for e in (1.0, 2.0, 3.0)]
    (found,) = spreads(several, [pair])
    energies = [m.evaluate([pair])[0].energy for m in several]
    assert found.members == 3
    np.testing.assert_allclose(found.energy, np.mean(energies))
    np.testing.assert_allclose(found.energy_std, np.std(energies, ddof=1) / 2)
    forces = np.array([m.evaluate([pair])[0].forces for m in several])
    np.testing.assert_allclose(found.forces_std, forces.std(axis=0, ddof=1))
    np.testing.assert_allclose(found.worst, np.linalg.norm(forces[:, 0].std(axis=0, ddof=1)))


class Drawn(Calculator):
    """Force and energy of a frame, drawn around its truth with the frame's own width."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, seed, factor=1.0):
        super().__init__()
        self.seed, self.factor = seed, factor

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        rng = np.random.default_rng([self.seed, self.atoms.info["frame"]])
        width = self.factor * self.atoms.info["width"]
        self.results = {
            "energy": float(width * rng.normal() * len(self.atoms)),
            "forces": width * rng.normal(size=(len(self.atoms), 3)),
        }


@pytest.fixture(scope="module")
def toy():
    """Frames whose labels are one more draw like those of the members."""
    frames = []
    for i in range(200):
        atoms = ase.Atoms("H4", np.eye(4, 3) + i)  # ASE looks at positions alone
        atoms.info |= {"frame": i, "width": 0.1 * 10 ** (i / 200)}
        atoms.calc = Drawn(10**6)
        label = atoms.copy()
        label.info["REF_energy"] = atoms.get_potential_energy()
        label.set_array("REF_forces", atoms.get_forces())
        frames.append(label)
    return frames


def drawn(factor=1.0, count=25):
    return [AseCandidate(str(i), Drawn(i, factor)) for i in range(count)]


def test_a_gaussian_ensemble_is_calibrated(toy):
    finding = judge({"gauss": spreads(drawn(), toy)}, framed(toy))
    values = finding.rows[0].values
    assert finding.rows[0].subject == ALL
    np.testing.assert_allclose(values["forces_scale"], 1.0, atol=0.06)
    np.testing.assert_allclose(values["energy_scale"], 1.0, atol=0.15)
    # A label and 25 members of one distribution: Student's t, a little wider than the normal.
    width = stats.norm.ppf((1 + LEVELS) / 2) / np.sqrt(1 + 1 / 25)
    exact = 2 * stats.t.cdf(width, df=24) - 1
    three_sigma = 3 * np.sqrt(0.25 / 2400)  # of shares of 200 frames x 12 components
    assert abs(values["forces_miscalibration"] - miscalibration(exact)) < three_sigma / 2
    assert values["energy_miscalibration"] < miscalibration(exact) + 3 * np.sqrt(0.25 / 200) / 2
    assert values["forces_correlation"] > 0.4
    (line,) = finding.pictures[1].lines
    np.testing.assert_allclose(line.y, exact, atol=three_sigma)


def test_an_ensemble_that_is_too_sure_has_its_scale(toy):
    values = judge({"narrow": spreads(drawn(0.5), toy)}, framed(toy)).rows[0].values
    np.testing.assert_allclose(values["forces_scale"], 2.0, atol=0.1)
    assert values["forces_miscalibration"] > 0.15


def test_coverage_and_area_in_closed_form():
    """All errors of one spread: covered above 68.27 %. No spread: never covered."""
    ones = np.ones(10)
    np.testing.assert_array_equal(coverage(ones, ones), LEVELS >= 0.6827)
    assert (coverage(ones, 0 * ones) == 0).all()
    assert (coverage(0 * ones, 0 * ones) == 1).all()
    assert miscalibration(LEVELS) < 1e-12
    np.testing.assert_allclose(miscalibration(0 * LEVELS), 0.5, atol=0.03)


def test_frames_without_labels_have_spreads_and_no_errors(toy):
    bare = [ase.Atoms(a.symbols, a.positions, info={**a.info}) for a in toy[:5]]
    for atoms in bare:
        del atoms.info["REF_energy"]
    finding = judge({"gauss": spreads(drawn(count=3), bare)}, framed(bare))
    values = finding.rows[0].values
    assert values["forces_spread"] > 0
    assert "forces_error" not in values
    assert finding.pictures == ()


def test_ranked_frames_are_written_most_uncertain_first(toy, tmp_path):
    some = toy[::20]
    found = spreads(drawn(), some)
    some[0].calc = Drawn(0)
    path = tmp_path / "ranked.xyz"
    assert write_ranked(path, some, found, most=6) == 6
    frames = ase.io.read(path, ":")
    worst = [frame.info["spread_forces_max"] for frame in frames]
    assert worst == sorted(worst, reverse=True)
    assert [frame.info["spread_rank"] for frame in frames] == list(range(6))
    assert all(frame.calc is None for frame in frames)
    np.testing.assert_allclose([f.arrays["spread_forces"].max() for f in frames], worst, rtol=1e-6)
    assert "REF_energy" in frames[0].info  # a label stays one
    with pytest.raises(FileExistsError):
        write_ranked(path, some, found)


def test_candidates_are_one_ensemble_or_several(toy):
    frames, members = framed([ase.Atoms("H4", np.eye(4, 3))] * 2), drawn_from_positions()
    (name,) = {row.model for row in check(members, frames).rows}
    assert name == "ensemble"
    finding = check(members, frames, ensembles={"a": ["0", "1"], "b": ["1", "2", "3"]}, top=1)
    counts = [r.values["members"] for r in finding.rows if r.subject == ALL]
    assert counts == [2, 3]
    assert len(finding.of("a")) == 2
    with pytest.raises(ValueError, match="'9' in an ensemble"):
        check(members, frames, ensembles={"a": ["0", "9"]})


def drawn_from_positions():
    return [AseCandidate(str(i), LennardJones(epsilon=i + 1, rc=9)) for i in range(4)]


def test_ensembles_that_are_none_are_refused(members, structures):
    model, several = members
    with pytest.raises(ValueError, match="two models or more"):
        spreads([JaxCandidate("one", model, several[0])], structures)
    with pytest.raises(ValueError, match="at least one member"):
        stack([])
    with pytest.raises(ValueError, match="2 potentials were given for 3"):
        predict_ensemble([model, model], several, structures)
    other = replace(model, buffers=dict(model.buffers) | {"extra": np.ones(1)})
    with pytest.raises(ValueError, match="members 1 differ"):
        predict_ensemble([model, other, model], several, structures)
    with pytest.raises(ValueError, match="same frames"):
        judge({"a": []}, framed(structures))
