"""Displacive transitions of a lattice whose double wells are known."""

import ase
import numpy as np
import pytest
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from matscipy.neighbours import neighbour_list

from jaxft.evaluate.candidate import AseCandidate
from jaxft.evaluate.phase import ALL, check
from jaxft.evaluate.softmodes import repeats, spectrum
from jaxft.evaluate.spacegroups import named_group, space_group
from jaxft.evaluate.walks import Protocol

A = 4.0
"""Å, of the lattice."""


class DoubleWell(Calculator):
    r"""Atoms B in cages of heavy atoms A, each in :math:`\sum_\alpha -\frac{a}{2}s_\alpha^2 +
    \frac{b}{4}s_\alpha^4 + \frac{c}{2}\sum_{\alpha\neq\beta} s_\alpha^2 s_\beta^2/2` of its
    displacement s from the middle of its cage, coupled by :math:`J s_i\cdot s_j` to its neighbours,
    with springs between the A."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, a=-1.4, b=16.0, c=0.0, j=-0.5, spring=3.0):
        super().__init__()
        self.a, self.b, self.c, self.j, self.spring = a, b, c, j, spring

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        is_b = self.atoms.numbers == 8
        pairs = {("Pb", "O"): 4.6, ("Pb", "Pb"): 4.8, ("O", "O"): 4.8}
        i, j, vectors = neighbour_list("ijD", self.atoms, pairs)
        forces, virial = np.zeros((len(self.atoms), 3)), np.zeros((3, 3))
        cage = is_b[i] & ~is_b[j]
        s = np.zeros((len(self.atoms), 3))
        np.add.at(s, i[cage], -vectors[cage] / 8)
        near = is_b[i] & is_b[j]
        field = np.zeros_like(s)
        np.add.at(field, i[near], self.j * s[j[near]])
        square = (s**2).sum(axis=1, keepdims=True)
        gradient = -self.a * s + self.b * s**3 + self.c * s * (square - s**2) + field
        energy = (-self.a / 2 * s**2 + self.b / 4 * s**4 + field * s / 2).sum()
        energy += self.c / 4 * (s**2 * (square - s**2)).sum()
        g = -gradient[i[cage]] / 8  # of the energy by the bond vector
        np.add.at(forces, i[cage], g)
        np.add.at(forces, j[cage], -g)
        virial += g.T @ vectors[cage]
        heavy = ~is_b[i] & ~is_b[j]
        away = vectors[heavy] - A * np.rint(vectors[heavy] / A)
        energy += self.spring / 4 * (away**2).sum()
        np.add.at(forces, i[heavy], self.spring * away)
        virial += self.spring / 2 * away.T @ vectors[heavy]
        stress = full_3x3_to_voigt_6_stress((virial + virial.T) / 2 / self.atoms.get_volume())
        self.results = {"energy": energy, "free_energy": energy, "forces": forces, "stress": stress}


@pytest.fixture
def cage():
    atoms = ase.Atoms("PbO", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[A] * 3, pbc=True)
    atoms.set_masses([1e8, 16.0])  # only B moves in a mode
    return atoms


def model(name="model", **settings):
    return AseCandidate(name, DoubleWell(**settings))


WALK = tuple(0.1 * i for i in range(1, 8))
FIXED = Protocol(min_length=2 * A, cell=False, amplitudes=WALK)


def test_forces_and_stress_of_the_lattice_are_derivatives_of_its_energy(cage):
    from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress

    atoms = cage.repeat((2, 2, 1))
    atoms.rattle(0.05, seed=1)
    atoms.calc = DoubleWell(c=3.0)
    np.testing.assert_allclose(
        atoms.get_forces(), calculate_numerical_forces(atoms, eps=1e-5), atol=1e-8
    )
    np.testing.assert_allclose(
        atoms.get_stress(), calculate_numerical_stress(atoms, eps=1e-6), atol=1e-7
    )


def test_the_double_well_has_its_depth_and_position(cage):
    """Every component has its minimum at s² = (a - 6J)/b, (a - 6J)²/4b deep; c = 0: along 111."""
    finding = check([model()], {"cage": cage}, protocol=FIXED)
    (row,) = finding.rows
    soft, b = -1.4 + 6 * 0.5, 16.0
    assert row.flag is None
    assert row.values["soft_modes"] == 1
    assert row.values["wave_vector"] == "0 0 0"
    np.testing.assert_allclose(row.values["depth"], 1e3 * 3 * soft**2 / (4 * b) / 2, rtol=1e-4)
    np.testing.assert_allclose(row.values["position"], np.sqrt(3 * soft / b), rtol=1e-3)
    np.testing.assert_allclose(row.values["gain"], row.values["depth"], rtol=1e-3)
    assert (row.values["before"], row.values["after"]) == ("Pm-3m (221)", "R3m (160)")
    (line,) = finding.pictures[0].lines
    at = np.asarray(line.x)[np.argmin(line.y)]
    assert abs(abs(at) - row.values["position"]) <= 0.1


def test_the_frequency_of_the_soft_mode_is_that_of_its_spring(cage):
    from ase import units

    found = spectrum(model(), cage, (2, 2, 2), displacement=1e-3, threshold=0.1, symprec=1e-5)
    omega = np.sqrt(1.6 / 16 * units._e / units._amu) * 1e10
    np.testing.assert_allclose(found.lowest, -omega / (2 * np.pi * 1e12), rtol=1e-3)
    assert found.modes[0].directions.shape == (7, 16, 3)  # x, y, z and their sums
    largest = np.linalg.norm(found.modes[0].directions, axis=2).max(axis=1)
    np.testing.assert_allclose(largest, 1.0)


def test_components_that_avoid_one_another_choose_one_axis(cage):
    """Where c is large, one component lies deeper than two or three."""
    (row,) = check([model(c=40.0)], {"cage": cage}, protocol=FIXED).rows
    assert row.values["after"] == "P4mm (99)"
    np.testing.assert_allclose(row.values["depth"], 1e3 * 1.6**2 / 64 / 2, rtol=1e-4)


def test_cells_are_relaxed_before_and_after(cage):
    """The springs want A; without the first relaxation the volume would change by 6 %."""
    cage.set_cell([1.02 * A] * 3, scale_atoms=True)
    free = Protocol(min_length=2 * A, amplitudes=WALK)
    (row,) = check([model(c=40.0)], {"cage": cage}, protocol=free).rows
    assert row.flag is None
    assert row.values["after"] == "P4mm (99)"
    assert abs(row.values["volume_change"]) < 0.1
    np.testing.assert_allclose(row.values["gain"], row.values["depth"], rtol=1e-2)


def test_a_zone_boundary_mode_doubles_the_cell(cage):
    """J > 0: neighbours move against each other; the softest point is R, and Γ is stable."""
    (row,) = check([model(j=0.5)], {"cage": cage}, protocol=FIXED).rows
    assert row.values["wave_vector"] == "0.5 0.5 0.5"
    np.testing.assert_allclose(row.values["depth"], 1e3 * 3 * 1.6**2 / 64 / 2, rtol=1e-4)
    np.testing.assert_allclose(row.values["position"], np.sqrt(3 * 1.6 / 16), rtol=1e-3)


def test_a_harmonic_crystal_that_is_stable_has_no_transition(cage):
    finding = check([model(a=-4.0, b=0.0)], {"cage": cage}, expected={"cage": 221}, protocol=FIXED)
    row, score = finding.rows
    assert row.values["soft_modes"] == 0
    assert row.values["lowest"] > -0.05
    assert row.values["after"] == row.values["before"] == "Pm-3m (221)"
    assert row.values["is_right"] is True
    assert finding.pictures == ()
    assert score.values["accuracy"] == 1.0
    assert score.values["f1"] is None  # nothing was predicted and nothing expected


def test_precision_and_recall_count_wrong_phases_against_both(cage):
    twin = cage.copy()
    models = [model(), model("other", c=40.0), model("stable", a=-4.0, b=0.0)]
    finding = check(
        models, {"one": cage, "two": twin}, expected={"one": "R 3 m", "two": 99}, protocol=FIXED
    )
    scores = {row.model: row.values for row in finding.rows if row.subject == ALL}
    assert scores["model"]["precision"] == scores["model"]["recall"] == 0.5
    assert scores["other"]["f1"] == 0.5
    assert [scores[name]["accuracy"] for name in ("model", "other", "stable")] == [0.5, 0.5, 0.0]
    assert scores["stable"]["precision"] is None
    assert scores["stable"]["recall"] == scores["stable"]["f1"] == 0.0


def test_a_phase_that_stays_is_neither_predicted_nor_expected(cage):
    """What moves is one atom alone in its cage; what stays has no such atom."""
    still = ase.Atoms("Pb", cell=[A] * 3, pbc=True)
    finding = check(
        [model()],
        {"moves": cage, "still": still},
        expected={"moves": 99, "still": 221},
        protocol=FIXED,
    )
    assert [row.values.get("is_right") for row in finding.rows] == [False, True, None]
    assert finding.rows[-1].values == {
        "counted": 2,
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "accuracy": 0.5,
    }


def test_another_model_is_a_reference(cage):
    finding = check([model("base"), model("tuned")], {"cage": cage}, against="base", protocol=FIXED)
    assert [row.subject for row in finding.rows if row.model == "base"] == ["cage"]
    score = finding.of("tuned")[-1]
    assert (score.subject, score.values["f1"]) == (ALL, 1.0)


def test_what_fails_is_a_flagged_row_and_the_rest_goes_on(cage):
    class Broken(DoubleWell):
        def calculate(self, *args, **kwargs):
            raise RuntimeError("exploded")

    molecule = ase.Atoms("O2", [[0, 0, 0], [0, 0, 1.2]])
    finding = check(
        [AseCandidate("broken", Broken()), model()],
        {"cage": cage, "molecule": molecule},
        expected={"cage": 160},
        protocol=FIXED,
    )
    rows = {(row.model, row.subject): row for row in finding.rows}
    assert "exploded" in rows["broken", "cage"].flag
    assert "three periodic" in rows["model", "molecule"].flag
    assert rows["model", "cage"].flag is None
    assert rows["broken", ALL].values["counted"] == 0
    assert rows["model", ALL].values["f1"] == 1.0


def spoilt(kind):
    atoms = ase.Atoms("PbO", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[A] * 3, pbc=True)
    if kind == "overlapping":
        atoms += ase.Atoms("O", [atoms.positions[1]])
    elif kind == "flat":
        atoms.cell[2] = 0
    elif kind == "lost":
        atoms.positions[1] = np.nan
    elif kind == "empty":
        del atoms[:]
    return atoms


@pytest.mark.parametrize("kind", ["overlapping", "flat", "lost", "empty"])
def test_structures_that_are_none_are_flagged(cage, kind):
    rows = check([model()], {"bad": spoilt(kind), "cage": cage}, protocol=FIXED).rows
    assert rows[0].flag is not None
    assert rows[0].values == {}
    assert rows[1].flag is None


def test_a_supercell_beyond_the_limit_is_flagged(cage):
    large = Protocol(min_length=2 * A, cell=False, most_atoms=15)
    (row,) = check([model()], {"cage": cage}, protocol=large).rows
    assert "16 atoms" in row.flag


def test_a_walk_that_is_too_short_says_so(cage):
    short = Protocol(min_length=A, cell=False, amplitudes=(0.05, 0.1), steps=1)
    (row,) = check([model()], {"cage": cage}, protocol=short).rows
    assert "walk of 0.1 Å" in row.flag
    assert "not converged" in row.flag


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expected": {"other": 1}}, "'other'"),
        ({"expected": {"cage": "Pm-5m"}}, "no space group"),
        ({"expected": {"cage": 1}, "against": "model"}, "give one of them"),
        ({"against": "nobody"}, "'nobody'"),
    ],
)
def test_bad_references_are_refused(cage, settings, message):
    with pytest.raises(ValueError, match=message):
        check([model()], {"cage": cage}, **settings)


@pytest.mark.parametrize(
    "wrong", [{"threshold": 0}, {"amplitudes": (0.1,)}, {"amplitudes": (0.2, 0.1)}, {"relaxed": 0}]
)
def test_impossible_protocols_are_refused(wrong):
    with pytest.raises(ValueError, match="not possible"):
        Protocol(**wrong)


def test_space_groups_go_by_number_or_any_setting(cage):
    assert named_group("Pbnm") == named_group(62) == named_group("P n m a")
    assert space_group(cage, 1e-3) == named_group("Pm-3m")


def test_supercells_are_as_thick_as_asked():
    cell = [[0, 2, 2], [2, 0, 2], [2, 2, 0]]
    atoms = ase.Atoms("He", cell=cell, pbc=True)
    assert repeats(atoms, 6.9) == (3, 3, 3)  # 4/√3 Å between planes
    assert repeats(ase.Atoms("He", cell=[4.0] * 3, pbc=(True, False, True)), 8.0) == (2, 1, 2)
    with pytest.raises(ValueError, match="flat"):
        repeats(ase.Atoms("He", pbc=True), 5.0)
