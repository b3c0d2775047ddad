"""Rattled supercells: relaxed first, drawn as asked, even in energy, never mistaken for labels."""

import ase.build
import ase.io
import numpy as np
import pytest
from ase.calculators.emt import EMT
from scipy.stats import kstest

from jaxft import data
from jaxft.evaluate import rattle as rattle_module
from jaxft.evaluate.candidate import AseCandidate
from jaxft.evaluate.handover import FRAMES, hand_over
from jaxft.evaluate.rattle import rattle
from jaxft.evaluate.trials import Ranges, even, trials_of, unevenness

BASE = AseCandidate("emt", EMT())
RANGES = Ranges(min_length=3.4, amplitude=(0.0, 0.15))


def stretched(a=3.8):
    return ase.build.bulk("Cu", "fcc", a, cubic=True)


@pytest.fixture(scope="module")
def made():
    return rattle(BASE, {"copper": stretched()}, frames=6, ranges=RANGES, seed=3)


def test_the_parent_is_relaxed_first(made):
    """The minimum of EMT's copper is at 3.59 Å, wherever one begins."""
    frames, finding = made
    assert finding.flags == ()
    other, _ = rattle(BASE, {"copper": stretched(3.5)}, frames=1, ranges=RANGES)
    own, sizes = (
        [f.get_volume() / f.info["rattle_volume"] / len(f) for f in some]
        for some in (frames, other)
    )
    np.testing.assert_allclose(own, own[0], rtol=1e-9)
    np.testing.assert_allclose([*own, *sizes], 3.59**3 / 4, rtol=3e-3)


def test_energies_are_uniform_and_those_of_the_base_model(made):
    frames, finding = made
    energies = np.array([f.info["rattle_base_energy"] for f in frames])
    parts = np.linspace(*RANGES.window, len(frames) + 1)
    assert (np.histogram(energies, parts)[0] == 1).all()
    assert (np.diff(energies) > 0).all()
    distance = finding.rows[0].values["unevenness"]
    uniform = (RANGES.window[0], RANGES.window[1] - RANGES.window[0])
    np.testing.assert_allclose(distance, kstest(energies, "uniform", uniform).statistic)
    assert distance <= 1 / len(frames)
    said = [o.energy / len(f) for o, f in zip(BASE.evaluate(frames), frames, strict=True)]
    np.testing.assert_allclose(np.diff(said), np.diff(energies), atol=1e-9)


def test_amplitudes_volumes_and_strains_are_those_drawn():
    cell = stretched().repeat(3)
    ranges = Ranges(amplitude=(0.02, 0.1), volume=(0.9, 1.1), strain=0.03)
    trials = list(trials_of(cell, 200, ranges, np.random.default_rng(0)))
    for trial in trials[:20]:
        deformed = cell.copy()
        deformed.set_cell(trial.atoms.cell, scale_atoms=True)
        moves = trial.atoms.positions - deformed.positions
        np.testing.assert_allclose(moves.std(), trial.amplitude, rtol=0.15)
        np.testing.assert_allclose(
            trial.atoms.get_volume() / cell.get_volume(), trial.volume, rtol=1e-12
        )
        np.testing.assert_allclose(trial.strain, trial.strain.T)
        assert abs(np.trace(trial.strain)) < 1e-14
    for name, (low, high) in (("amplitude", (0.02, 0.1)), ("volume", (0.9, 1.1))):
        drawn = [getattr(trial, name) for trial in trials]
        assert low <= min(drawn) < max(drawn) <= high
        assert kstest(drawn, "uniform", (low, high - low)).pvalue > 0.01


def test_the_same_seed_gives_the_same_frames_whatever_else_is_made(made):
    frames, _ = made
    both = {"aluminium": ase.build.bulk("Al", "fcc", 4.0), "copper": stretched()}
    again, finding = rattle(BASE, both, frames=6, ranges=RANGES, seed=3)
    copper = [f for f in again if f.info["rattle_parent"] == "copper"]
    for a, b in zip(frames, copper, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
    assert [row.subject for row in finding.rows] == ["aluminium", "copper"]
    other, _ = rattle(BASE, {"copper": stretched()}, frames=6, ranges=RANGES, seed=4)
    assert not np.array_equal(other[0].positions, frames[0].positions)


def test_supercells_are_as_large_as_asked(made):
    assert {len(f) for f in made[0]} == {4}
    frames, _ = rattle(BASE, {"copper": stretched(3.6)}, frames=1, ranges=Ranges(min_length=6.0))
    assert {len(f) for f in frames} == {32}


def test_nothing_written_can_be_taken_for_a_label(made, tmp_path):
    frames, _ = made
    frames[0].calc = EMT()
    frames[0].get_potential_energy()
    hand_over(tmp_path / "frames.xyz", frames)
    back = ase.io.read(tmp_path / "frames.xyz", ":")
    assert all(f.calc is None for f in back)
    names = {key for f in back for key in (*f.info, *f.arrays)}
    assert {n for n in names if not n.startswith("rattle_")} == {"numbers", "positions"}
    assert names >= {"rattle_parent", "rattle_amplitude", "rattle_volume", "rattle_strain"}
    for frame in data.read(tmp_path / "frames.xyz"):
        assert frame.energy is None
        assert frame.forces is None
    with pytest.raises(FileExistsError):
        hand_over(tmp_path / "frames.xyz", frames)


@pytest.mark.parametrize(
    ("code", "name", "reader"),
    [("vasp", "POSCAR", "vasp"), ("espresso", "espresso.pwi", "espresso-in")],
)
def test_folders_hold_an_input_per_frame(made, tmp_path, code, name, reader):
    frames, _ = made
    folder = tmp_path / code
    hand_over(folder, frames[:3], code)
    assert sorted(p.name for p in folder.iterdir()) == ["0000", "0001", "0002", FRAMES]
    for i, frame in enumerate(frames[:3]):
        back = ase.io.read(folder / f"{i:04d}" / name, format=reader)
        np.testing.assert_allclose(back.cell.array, frame.cell.array, atol=1e-8)
        apart = back.get_scaled_positions() - frame.get_scaled_positions()
        np.testing.assert_allclose(apart - np.rint(apart), 0, atol=1e-8)
    with pytest.raises(FileExistsError):
        hand_over(folder, frames, code)


def test_energies_out_of_reach_are_told_with_what_to_change(monkeypatch):
    monkeypatch.setattr(rattle_module, "ROUNDS", 2)
    small = Ranges(min_length=3.0, amplitude=(0.0, 0.01), volume=(1, 1), strain=0.0)
    frames, finding = rattle(BASE, {"cu": stretched()}, frames=4, ranges=small)
    assert 0 < len(frames) < 4
    assert "raise the amplitude" in finding.rows[0].flag
    large = Ranges(min_length=3.0, amplitude=(0.3, 0.4))
    frames, finding = rattle(BASE, {"cu": stretched()}, frames=4, ranges=large)
    assert frames == []
    assert "lower the smallest amplitude" in finding.rows[0].flag


def test_a_structure_that_the_model_does_not_know_is_flagged_and_others_are_made():
    both = {"iron": ase.build.bulk("Fe"), "copper": stretched()}
    frames, finding = rattle(BASE, both, frames=3, ranges=RANGES)
    assert len(frames) == 3
    (flagged,) = finding.flags
    assert flagged.subject == "iron"
    assert "not relaxed" in flagged.flag


def test_structures_that_are_none_are_flagged():
    flat = stretched()
    flat.cell[2] = 0
    doubled = stretched() + stretched()
    frames, finding = rattle(
        BASE, {"flat": flat, "doubled": doubled, "cu": stretched()}, frames=2, ranges=RANGES
    )
    assert [row.subject for row in finding.flags] == ["flat", "doubled"]
    assert len(frames) == 2


def test_molecules_are_rattled_where_no_volume_is_asked_for():
    water = ase.build.molecule("H2O")
    with pytest.raises(ValueError, match="no volume to change"):
        rattle(BASE, {"water": water})
    fixed = Ranges(volume=(1, 1), strain=0.0)
    frames, finding = rattle(BASE, {"water": water}, frames=4, ranges=fixed)
    assert finding.flags == ()
    assert {len(f) for f in frames} == {3}


def test_selection_takes_one_of_every_part():
    energies = np.array([0.05, np.nan, 0.31, 0.09, 0.49, 9.0, -1.0])
    assert even(energies, 5, (0.0, 0.5)) == [0, None, None, 2, 4]
    np.testing.assert_allclose(unevenness(np.array([0.25, 0.75]), (0, 1)), 0.25)


@pytest.mark.parametrize(
    "wrong",
    [
        {"amplitude": (0.2, 0.1)},
        {"amplitude": (0.0, 0.0)},
        {"volume": (0.0, 1.0)},
        {"strain": -0.1},
        {"window": (0.1, 0.1)},
        {"min_length": 0.0},
        {"min_length": np.inf},
        {"window": (0.0, np.inf)},
        {"amplitude": (0.0, np.inf)},
    ],
)
def test_impossible_ranges_are_refused(wrong):
    with pytest.raises(ValueError, match="not possible"):
        Ranges(**wrong)


def test_nothing_asked_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        rattle(BASE, {})
    with pytest.raises(ValueError, match="at least one"):
        rattle(BASE, {"cu": stretched()}, frames=0)
    with pytest.raises(ValueError, match="no frames"):
        hand_over(tmp_path / "a.xyz", [])
    with pytest.raises(ValueError, match="'abinit'"):
        hand_over(tmp_path / "a", [stretched()], "abinit")
    with pytest.raises(ValueError, match=r"no \.xyz"):
        hand_over(tmp_path / "a.poscar", [stretched()])
