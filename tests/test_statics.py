"""Equations of state, elasticity, relaxation, pairs, smoothness and holes, on analytic models."""

import sys

import ase
import ase.build
import numpy as np
import pytest
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.eos import EquationOfState
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from ase.units import GPa

from jaxft.evaluate import diatomics, elastic, eos, probes, relax, rss, smoothness
from jaxft.evaluate.candidate import AseCandidate, JaxCandidate
from jaxft.evaluate.equation import Equation, delta, fit
from jaxft.evaluate.randomstructures import formula_of, random_crystals
from jaxft.evaluate.relaxation import closeness
from jaxft.evaluate.relaxation import relax as relax_all
from jaxft.report.findings import findings_page


class Pair(Calculator):
    """A pair potential given by its energy and slope, with a hard end at ``r_max``."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, energy, slope, r_max):
        super().__init__()
        self.pair, self.slope, self.r_max = energy, slope, r_max

    def calculate(self, atoms=None, properties=(), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        from ase.neighborlist import neighbor_list

        i, d, v = neighbor_list("idD", atoms, self.r_max)
        pull = (self.slope(d) / d)[:, None] * v
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, pull)
        self.results = {"energy": 0.5 * self.pair(d).sum(), "forces": forces}
        if atoms.pbc.all():
            stress = 0.5 * np.einsum("ni,nj->ij", v, pull) / atoms.get_volume()
            self.results["stress"] = stress.ravel()[[0, 4, 8, 5, 2, 1]]


def morse(depth=0.4, length=2.6, width=1.5, r_max=6.0):
    """Smooth to rounding at its end."""

    def energy(d):
        x = np.exp(-width * (d - length))
        return depth * (x * x - 2 * x) * smooth(d)

    def smooth(d):
        return np.where(d < r_max, (1 - (d / r_max) ** 2) ** 4, 0.0)

    def slope(d):
        x = np.exp(-width * (d - length))
        inner = depth * (-2 * width * x * x + 2 * width * x) * smooth(d)
        return inner + depth * (x * x - 2 * x) * (1 - (d / r_max) ** 2) ** 3 * (-8 * d / r_max**2)

    return AseCandidate("morse", Pair(energy, slope, r_max))


def springs(stiffness=2.0):
    """Nearest neighbours of a simple cubic crystal of lattice constant 3 Å; nothing else."""
    return AseCandidate(
        "springs",
        Pair(
            lambda d: 0.5 * stiffness * (d - 3.0) ** 2, lambda d: stiffness * (d - 3.0), r_max=3.9
        ),
    )


class Broken(Calculator):
    """Energies that are not finite."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=(), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        nan = np.full((len(atoms), 3), np.nan)
        self.results = {"energy": np.nan, "forces": nan, "stress": np.zeros(6)}


class Doubled(Calculator):
    """Twice EMT."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=(), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        copy = atoms.copy()
        copy.calc = EMT()
        found = copy.get_potential_energy(), copy.get_forces(), copy.get_stress()
        self.results = dict(zip(self.implemented_properties, (2 * x for x in found), strict=True))


EMT_ONE = AseCandidate("emt", EMT())
BROKEN = AseCandidate("broken", Broken())


# equations of state


def test_the_fit_finds_the_equation_that_made_the_points():
    true = Equation(v0=11.3, e0=-3.7, b0=1.04, b1=4.9, rms=0.0)
    volumes = 11.3 * np.linspace(0.93, 1.08, 9)
    found = fit(volumes, true.energy(volumes) + true.e0)
    for name in ("v0", "e0", "b0", "b1"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-8)
    assert found.rms < 1e-12


@pytest.mark.parametrize("b1", [3.0, 4.0, 4 + 1e-9])
def test_the_fit_is_exact_where_the_cubic_term_vanishes(b1):
    true = Equation(v0=12.3, e0=0.0, b0=0.81, b1=b1, rms=0.0)
    volumes = 11.76 * np.linspace(0.94, 1.06, 11)
    found = fit(volumes, true.energy(volumes))
    assert found.v0 == pytest.approx(12.3, rel=1e-9)
    assert found.b0 == pytest.approx(0.81, rel=1e-9)


def test_the_fit_is_that_of_ase():
    volumes = np.linspace(10.5, 12.9, 9)
    energies = [
        EMT_ONE.evaluate([eos.scaled_to(ase.build.bulk("Cu"), v)])[0].energy for v in volumes
    ]
    found = fit(volumes, np.array(energies))
    v0, e0, b0 = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()
    assert found.v0 == pytest.approx(v0, rel=1e-6)
    assert found.e0 == pytest.approx(e0, abs=1e-7)
    assert found.b0 == pytest.approx(b0, rel=1e-5)


def test_delta_is_zero_of_equal_curves_and_known_of_parallel_parabolas():
    a = Equation(v0=10.0, e0=-1.0, b0=1.0, b1=4.0, rms=0.0)
    assert delta(a, a) == 0.0
    assert delta(a, Equation(10.0, 5.0, 1.0, 4.0, 0.0)) == 0.0  # a shift of energy is none
    # stiffness alone: the curves differ by one times the other
    b = Equation(v0=10.0, e0=-1.0, b0=2.0, b1=4.0, rms=0.0)
    volumes = np.linspace(9.4, 10.6, 20001)
    expected = np.sqrt(np.trapezoid(a.energy(volumes) ** 2, volumes) / 1.2)
    assert delta(a, b) == pytest.approx(expected, rel=1e-6)
    assert delta(a, b) == delta(b, a)


@pytest.mark.parametrize(
    ("volumes", "energies"),
    [([1, 2, 3, 4], [1, 0, 0, 1]), ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1]), ([1] * 4 + [0], [1] * 5)],
)
def test_what_has_no_equation_is_refused(volumes, energies):
    with pytest.raises(ValueError, match=r"points|minimum"):
        fit(np.array(volumes, float), np.array(energies, float))


def test_the_range_follows_the_minimum_and_a_reference_is_compared():
    cu = ase.build.bulk("Cu", a=3.9)  # 27 % too large
    near = eos.check([EMT_ONE], {"Cu": ase.build.bulk("Cu", a=3.6)})
    curve = eos.Curve(volumes := np.linspace(10.9, 12.3, 9), np.array([
        EMT_ONE.evaluate([eos.scaled_to(cu, v)])[0].energy for v in volumes
    ]))  # fmt: skip
    found = eos.check([EMT_ONE, BROKEN], {"Cu": cu}, references={"Cu": curve})
    reference, row, broken = found.rows
    assert row.flag is None
    assert row.values["v0"] == pytest.approx(near.rows[0].values["v0"], rel=1e-4)
    assert row.values["delta"] < 0.05
    assert reference.model == eos.REFERENCE
    assert abs(row.values["b0_error"]) < 0.5
    assert "finite" in broken.flag


def test_phases_are_told_by_the_energy_above_the_first_of_their_composition():
    phases = {
        "fcc": ase.build.bulk("Cu", a=3.6),
        "bcc": ase.build.bulk("Cu", "bcc", a=2.86, cubic=True),
        "Al": ase.build.bulk("Al"),
    }
    double = AseCandidate("double", Doubled())
    found = eos.check([EMT_ONE, double], phases, against="emt")
    rows = {(row.model, row.subject): row for row in found.rows}
    above = rows["emt", "bcc"].values["phase_energy"]
    calculators = []
    for name in ("fcc", "bcc"):
        atoms = phases[name].copy()
        atoms.calc = EMT()
        FIRE(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-3)
        calculators.append(1e3 * atoms.get_potential_energy() / len(atoms))
    assert above == pytest.approx(calculators[1] - calculators[0], abs=0.05)
    assert rows["double", "bcc"].values["phase_error"] == pytest.approx(above)
    assert "phase_error" not in rows["emt", "bcc"].values
    assert "phase_energy" not in rows["emt", "fcc"].values
    assert "phase_energy" not in rows["emt", "Al"].values


def test_what_has_no_volume_is_a_flag_and_the_others_stay():
    some = {
        "molecule": ase.Atoms("Cu2", [[0, 0, 0], [0, 0, 2]], cell=[9] * 3),
        "Cu": ase.build.bulk("Cu", a=3.6),
    }
    lost, sound = eos.check([EMT_ONE], some).rows
    assert "no volume" in lost.flag
    assert sound.flag is None
    rows = elastic.check([EMT_ONE], some, fmax=0.05).rows
    assert "no volume" in rows[0].flag
    assert rows[2].values["k_vrh"] > 0


def test_repulsion_alone_has_no_equation_of_state():
    repulsive = AseCandidate("wall", Pair(lambda d: np.exp(-d), lambda d: -np.exp(-d), 6.0))
    (row,) = eos.check([repulsive], {"Cu": ase.build.bulk("Cu")}).rows
    assert "no minimum" in row.flag


def test_references_of_other_cells_are_refused(tmp_path):
    path = tmp_path / "e-v.dat"
    path.write_text("# volume energy\n" + "".join(f"{v} {(v - 46) ** 2}\n" for v in range(42, 51)))
    curve = eos.read_curve(path, 4)
    assert curve.volumes[0] == 10.5
    cu = {"Cu": ase.build.bulk("Cu", a=3.6)}
    with pytest.raises(ValueError, match="per cell of this structure"):
        eos.check([EMT_ONE], cu, references={"Cu": eos.read_curve(path, 1)})
    with pytest.raises(ValueError, match="no structure"):
        eos.check([EMT_ONE], cu, references={"Al": curve})


# elasticity


def test_a_cubic_crystal_of_springs_has_the_constants_of_the_textbook():
    """c11 = k/a; neighbours along the axes alone resist neither c12 nor c44."""
    atoms = ase.Atoms("Cu", cell=[3.0] * 3, pbc=True)
    assert elastic._strains([0.01, 0.02], [0.01, 0.02])[-1].tolist() == [0, 0, 0, 0, 0, 0.04]
    found = elastic.check([springs()], {"sc": atoms}, relax_first=False)
    rows = {row.subject: row for row in found.rows}
    k_over_a = 2.0 / 3.0 / GPa
    assert rows["sc, clamped ions, xx"].values["c_xx"] == pytest.approx(k_over_a, rel=1e-3)
    assert rows["sc, clamped ions, xx"].values["c_yy"] == pytest.approx(0.0, abs=0.01 * k_over_a)
    assert rows["sc, clamped ions, yz"].values["c_yz"] == pytest.approx(0.0, abs=0.01 * k_over_a)


def test_bulk_modulus_is_that_of_the_equation_of_state():
    cu = {"Cu": ase.build.bulk("Cu", a=3.6)}
    found = elastic.check([EMT_ONE], cu, fmax=1e-4)
    row = found.rows[0]
    expected = eos.check([EMT_ONE], cu, span=0.02).rows[0].values["b0"]
    assert row.flag is None
    assert row.values["k_vrh"] == pytest.approx(expected, rel=5e-3)
    assert row.values["asymmetry"] < 0.5
    assert found.settings["normal_strains"] == list(elastic.NORMAL)
    moduli, tensors = elastic.tables(found)
    assert [r.subject for r in moduli.rows] == [f"Cu, {kind}" for kind in elastic.KINDS]
    assert len(tensors.rows) == 12
    assert set(moduli.units) | set(tensors.units) == set(elastic.UNITS)


def test_relaxed_ions_are_those_of_an_optimiser():
    """hcp has internal freedom; the response must be what FIRE finds in the strained cell."""
    atoms = ase.build.bulk("Mg", "hcp", a=2.6, c=4.2)
    (start,) = relax_all(morse(), [atoms], fmax=1e-5, steps=2000)
    found = elastic.check([morse()], {"hcp": start.atoms}, relax_first=False)
    rows = {row.subject: row.values for row in found.rows}
    clamped, relaxed = (rows[f"hcp, {kind}, xx"]["c_xx"] for kind in elastic.KINDS)
    assert relaxed < clamped - 0.1
    stress = []
    for strain in (-2e-3, 2e-3):
        strained = start.atoms.copy()
        strained.set_cell(strained.cell.array @ np.diag([1 + strain, 1, 1]), scale_atoms=True)
        (end,) = relax_all(morse(), [strained], fmax=1e-5, steps=2000, cell=False)
        stress.append(end.atoms.get_stress()[0] / GPa)
    assert relaxed == pytest.approx((stress[1] - stress[0]) / 4e-3, rel=2e-3)


def test_moduli_of_an_isotropic_tensor_are_its_own():
    bulk, shear = 150.0, 60.0
    c = np.zeros((6, 6))
    c[:3, :3] = bulk - 2 / 3 * shear
    c[range(3), range(3)] = bulk + 4 / 3 * shear
    c[range(3, 6), range(3, 6)] = shear
    assert elastic.moduli(c) == pytest.approx((bulk, shear))


def test_elasticity_of_a_broken_model_is_a_flag():
    found = elastic.check([BROKEN], {"Cu": ase.build.bulk("Cu")})
    assert [row.values for row in found.rows] == [{}, {}]
    assert all("finite" in row.flag for row in found.rows)


# relaxation


def rattled(a, seed):
    atoms = ase.build.bulk("Cu", a=a, cubic=True)
    atoms.rattle(0.1, seed=seed)
    return atoms


def test_structures_relax_together_as_each_would_alone():
    starts = [rattled(3.5, 1), rattled(3.8, 2)]
    found = relax_all(EMT_ONE, starts, fmax=0.05, pressure=2 * GPa)
    for start, result in zip(starts, found, strict=True):
        alone = start.copy()
        alone.calc = EMT()
        optimizer = FIRE(FrechetCellFilter(alone, scalar_pressure=2 * GPa), logfile=None)
        optimizer.run(fmax=0.05, steps=500)
        assert result.steps == optimizer.nsteps
        assert result.is_converged
        np.testing.assert_allclose(result.atoms.positions, alone.positions, atol=1e-10)
        np.testing.assert_allclose(result.atoms.cell, alone.cell, atol=1e-10)


def test_structures_that_move_share_programs(small):
    ours = JaxCandidate("ours", *small).steady()
    found, shapes = [], []
    for a in (7.0, 5.6, 4.4, 3.6, 7.0):
        (outcome,) = ours.evaluate([ase.build.bulk("NaCl", "rocksalt", a=a)])
        found.append(outcome.energy)
        shapes.append((ours.room.row_width, ours.room.shape))
    assert len(set(shapes)) <= 3
    assert shapes[4] == shapes[3] != shapes[0]  # nothing shrinks
    assert found[4] == pytest.approx(found[0], abs=1e-9)
    assert found[0] != pytest.approx(found[1], abs=1e-3)


def test_relaxations_that_fail_are_flagged_and_the_others_go_on():
    pytest.importorskip("spglib")
    atoms = {"near": ase.build.bulk("Cu", a=3.6, cubic=True), "far": rattled(3.2, 0)}
    found = relax.check([EMT_ONE, BROKEN], atoms, steps=3)
    near, far, *broken = found.rows
    assert near.flag is None
    assert near.values["space_group_before"] == near.values["space_group_after"] == "Fm-3m (225)"
    assert near.values["keeps_symmetry"] is True
    assert "not converged in 3 steps" in far.flag
    assert far.values["steps"] == 3
    assert all("finite" in row.flag for row in broken)


def test_what_collapses_is_stopped_and_flagged():
    """Attraction without a wall: the cell would shrink for as many steps as there are."""
    sink = AseCandidate("sink", Pair(lambda d: -90 / d, lambda d: 90 / d**2, 4.0))
    cells = {"Cu": rattled(3.6, 0), "near": ase.build.bulk("Cu", a=3.6)}
    cells["on top"] = ase.Atoms("Cu2", [[0, 0, 0], [0, 0, 1e-9]], cell=[4] * 3, pbc=True)
    pytest.importorskip("spglib")
    found = relax.check([sink, EMT_ONE], cells, fmax=1e-3, steps=40)
    rows = {(row.model, row.subject): row for row in found.rows}
    assert "collapsed" in rows["sink", "Cu"].flag
    assert rows["sink", "Cu"].values["steps"] < 40
    assert "fell onto each other" in rows["emt", "on top"].flag
    assert rows["emt", "near"].flag is None
    assert "collapsed" in elastic.check([sink], {"Cu": cells["near"]}).rows[0].flag


def test_displacements_ignore_shifts_strains_and_cell_boundaries():
    atoms = rattled(3.6, 0)
    other = atoms.copy()
    other.set_cell(atoms.cell.array * 1.03, scale_atoms=True)
    other.positions += [7.0, -2.0, 1.0]
    other.wrap()
    assert relax.displacement(atoms, other) == pytest.approx(0.0, abs=1e-10)
    moved = atoms.copy()
    moved.positions[0, 0] += 0.1
    moved.positions[1, 0] -= 0.1
    assert relax.displacement(atoms, moved) == pytest.approx(0.1 * np.sqrt(2 / 4))


def test_closeness_counts_images():
    atoms = ase.Atoms("H", cell=[0.31, 9, 9], pbc=True)
    assert closeness(atoms) == pytest.approx(0.5)  # the radius of H is 0.31 Å
    assert closeness(ase.Atoms("H2", [[0, 0, 0], [0, 0, 3]])) == 1.0


# pairs


def test_a_lennard_jones_dimer_is_what_it_is():
    lj = AseCandidate("lj", LennardJones(sigma=2.5, epsilon=0.4, rc=50.0))
    found = diatomics.check([lj], ["Cu"], shortest=1.5, points=901)
    (row,) = found.rows
    values = row.values
    assert row.flag is None
    assert values["force_flips"] == values["minima"] == 1
    assert values["tortuosity"] == pytest.approx(1.0)
    assert values["spearman_repulsion"] == pytest.approx(-1.0)
    assert values["spearman_attraction"] == pytest.approx(1.0)
    assert values["bond_length"] == pytest.approx(2.5 * 2 ** (1 / 6), abs=2e-3)
    tail = 4 * 0.4 * ((2.5 / 6) ** 12 - (2.5 / 6) ** 6)
    assert values["well_depth"] == pytest.approx(0.4 + tail, abs=1e-4)
    # k = 72 ε / (2^(1/3) σ²), reduced mass half of copper's
    stiffness = 72 * 0.4 / (2 ** (1 / 3) * 2.5**2)
    expected = np.sqrt(stiffness * ase.units._e * 1e20 / (63.546 / 2 * ase.units._amu))
    assert values["frequency"] == pytest.approx(
        expected / (2 * np.pi * ase.units._c * 100), rel=5e-3
    )


def holey():
    """A wall that turns over at 1 Å and falls."""

    def energy(d):
        return 20 * np.exp(-((d - 1.2) ** 2) / 0.1) - np.exp(-((d - 2.5) ** 2)) - 40 * (d < 1.0)

    step = 1e-6

    def slope(d):
        return (energy(d + step) - energy(d - step)) / (2 * step)

    return AseCandidate("holey", Pair(energy, slope, 6.0))


def test_a_hole_in_the_wall_of_a_pair_is_seen():
    found = diatomics.check([morse(depth=2.0), holey(), BROKEN], ["Cu", "Cu"], against="morse")
    good, bad, broken = found.rows
    assert good.flag is None
    assert "wall_distance" not in good.values
    assert "hole" in bad.flag
    assert bad.values["force_flips"] > 1
    assert bad.values["tortuosity"] > 1
    assert bad.values["wall_distance"] > 0.1
    assert "100 of 100 points" in broken.flag


@pytest.mark.parametrize(
    ("place", "deep", "said"), [(1.5, 6.0, "2 minima"), (1.2, 60.0, "a hole: the lowest energy")]
)
def test_a_spurious_well_is_found_where_it_was_put(place, deep, said):
    plain = morse().calculator

    def well(d):
        return deep * np.exp(-(((d - place) / 0.1) ** 2))

    spurious = Pair(
        lambda d: plain.pair(d) - well(d),
        lambda d: plain.slope(d) + 2 * (d - place) / 0.01 * well(d),
        6.0,
    )
    judged = [morse(), AseCandidate("spurious", spurious)]
    good, bad = diatomics.check(judged, ["Cu"], against="morse", points=300).rows
    assert (good.values["minima"], good.values["force_flips"]) == (1, 1)
    assert (bad.values["minima"], bad.values["force_flips"]) == (2, 3)
    assert said in bad.flag
    # up to the well, down to its side, up again, down: what the plain curve does not walk
    assert bad.values["tortuosity"] > good.values["tortuosity"] + 1e-3
    # the difference of the curves is the well; its integral is known
    expected = deep * 0.1 * np.sqrt(np.pi) / (6.0 - 0.18)
    assert bad.values["energy_mae"] == pytest.approx(expected, rel=5e-3)


def test_pairs_are_all_pairs_and_have_a_mean():
    found = diatomics.check([EMT_ONE], ["Cu", "Al"])
    assert [row.subject for row in found.rows] == ["Cu–Cu", "Cu–Al", "Al–Al", diatomics.ALL]
    assert found.rows[3].values["minima"] == 1
    rows = diatomics.check([EMT_ONE], ["Cu", "Xe"]).rows  # which EMT does not know
    assert [row.values.get("pairs") for row in rows] == [None, None, None, 1]
    assert rows[3].flag == "2 of 3 pairs left out"
    with pytest.raises(ValueError, match="Xy is no element"):
        diatomics.check([EMT_ONE], ["Xy"])


# smoothness


@pytest.fixture
def rattled_cells():
    cluster = ase.Atoms("CuCuAl", [[0, 0, 0], [2.4, 0.2, 0], [0.9, 2.3, 0.5]])
    return {"crystal": rattled(3.7, 3), "cluster": cluster}


def test_a_smooth_potential_has_no_flags(rattled_cells):
    found = smoothness.check([morse()], rattled_cells, r_max=6.0)
    for row in found.rows:
        assert row.flag is None
        assert row.values["force_difference"] < 1e-2  # meV/Å
        assert row.values["rotation_forces"] < 1e-6
    assert found.rows[0].values["stress_difference"] < 1e-2
    assert found.rows[0].values["supercell"] < 1e-9
    assert "torque" in found.rows[1].values
    assert "torque" not in found.rows[0].values


def test_a_jump_at_the_cutoff_is_caught_with_its_height(rattled_cells):
    cut = Pair(lambda d: lj_energy(d), lambda d: lj_slope(d), r_max=5.0)

    def lj_energy(d):
        return 4 * 0.5 * ((2.2 / d) ** 12 - (2.2 / d) ** 6)

    def lj_slope(d):
        return 4 * 0.5 * (-12 * (2.2 / d) ** 12 + 6 * (2.2 / d) ** 6) / d

    (row,) = smoothness.check(
        [AseCandidate("cut", cut)], {"cluster": rattled_cells["cluster"]}, r_max=5.0
    ).rows
    assert "energy_jump" in row.flag
    assert row.values["energy_jump"] == pytest.approx(-1e3 * lj_energy(5.0), rel=1e-2)
    assert row.values["force_jump"] == pytest.approx(1e3 * lj_slope(5.0), rel=0.1)


class Wrong(Calculator):
    """Morse with one thing spoiled."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, spoil):
        super().__init__()
        self.inner, self.spoil = morse().calculator, spoil

    def calculate(self, atoms=None, properties=(), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        copy = atoms.copy()
        copy.calc = self.inner
        self.results = {"energy": copy.get_potential_energy(), "forces": copy.get_forces()}
        if atoms.pbc.all():
            self.results["stress"] = copy.get_stress()
        self.spoil(atoms, self.results)


def field(atoms, results):
    """Along x, so that turning and shifting cost energy."""
    results["energy"] += 0.1 * atoms.positions[:, 0].sum()
    results["forces"] = results["forces"] - [0.1, 0, 0]


def first_atom(atoms, results):
    results["energy"] += 0.1 * np.sin(atoms.positions[0] - atoms.positions.mean(axis=0)).sum()


def pressure(atoms, results):
    if "stress" in results:
        results["stress"] = results["stress"] + 0.01


def squared(atoms, results):
    results["energy"] += 1e-3 * len(atoms) ** 2


def no_derivatives(atoms, results):
    results["forces"] = 1.02 * results["forces"]
    if "stress" in results:
        results["stress"] = 1.02 * results["stress"]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (field, ["net_force", "rotation_energy", "translation_energy"]),
        (first_atom, ["permutation_energy", "force_difference"]),
        (pressure, ["stress_difference"]),
        (squared, ["extensivity", "supercell"]),
        (no_derivatives, ["force_difference", "stress_difference"]),
    ],
)
def test_each_kind_of_wrong_is_named(spoil, named, rattled_cells):
    wrong = AseCandidate("wrong", Wrong(spoil))
    crystal, _ = smoothness.check([wrong], rattled_cells, r_max=6.0).rows
    for name in named:
        assert f"{name} " in crystal.flag


def test_an_unknown_cutoff_is_said(rattled_cells):
    rows = smoothness.check([morse(), BROKEN], rattled_cells).rows
    assert "give r_max" in rows[0].flag
    assert "energy_jump" not in rows[0].values
    assert "finite" in rows[-1].flag


def test_a_potential_of_ours_is_smooth(small):
    ours = JaxCandidate("ours", *small)
    atoms = ase.Atoms("OCH", [[0, 0, 0], [1.3, 0.1, 0], [2.0, 0.9, 0.2]])
    crystal = ase.build.bulk("NaCl", "rocksalt", a=5.0)
    crystal.rattle(0.1, seed=1)
    assert crystal.cell.lengths().max() < ours.model.r_max  # images of images are neighbours
    found = smoothness.check([ours], {"molecule": atoms, "crystal": crystal})
    for row in found.rows:
        assert row.flag is None
        assert row.values["force_jump"] < 1e-3
        assert row.values["force_difference"] < 1e-2
        assert set(row.values) <= set(smoothness.UNITS)
    assert found.rows[1].values["supercell"] < 1e-8
    assert found.rows[1].values["stress_difference"] < 1e-2
    assert 2 * ours.model.r_max < probes.APART


# holes


def crystals(count, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        atoms = ase.build.bulk("Cu", a=4.0 + rng.uniform(-0.3, 0.3), cubic=True)
        atoms.positions += rng.normal(scale=0.3, size=(4, 3))
        found.append(atoms)
    return found


def test_a_holey_potential_is_caught_and_a_sound_one_is_not():
    some = crystals(3)
    fallen = crystals(1)[0]
    fallen.positions[1] = fallen.positions[0] + [0.7, 0, 0]  # beyond the wall
    found = rss.check(
        [morse(), holey()], {"Cu": [*some, fallen]}, pressures=[0.1], rounds=2, steps=8
    )
    good, bad = found.rows
    assert good.values["holes"] == 0
    assert good.flag is None
    assert bad.values["too_close"] >= 1
    assert bad.values["holes_percent"] >= 20.0
    assert bad.values["more_than_base"] == bad.values["holes_percent"]
    assert "too close" in bad.flag


def ends(volumes, energies):
    from ase.calculators.singlepoint import SinglePointCalculator

    from jaxft.evaluate.relaxation import Relaxed

    found = []
    for volume, energy in zip(volumes, energies, strict=True):
        atoms = ase.Atoms("H", cell=[volume ** (1 / 3)] * 3, pbc=True)
        if energy is not None:
            atoms.calc = SinglePointCalculator(atoms, energy=energy)
        found.append(Relaxed(atoms, 1, None, None if energy is not None else "exploded"))
    return rss.Ends(found)


def test_each_flag_of_a_hole_is_its_definition():
    flags = ends(
        # median volume 10, median energy -1, MAD 0: the limit is 5 eV/atom
        [10, 10, 10, 10, 2.9, 4.9, 4.9, 10, 10, 10],
        [-1, -1, -1, -1, 0.0, -1.1, 0.0, -6.1, -5.9, None],
    ).flags()
    assert np.flatnonzero(flags["too_dense"]).tolist() == [4]
    assert np.flatnonzero(flags["dense_and_low"]).tolist() == [5]
    assert np.flatnonzero(flags["too_deep"]).tolist() == [7]
    assert np.flatnonzero(flags["failed"]).tolist() == [9]
    assert not flags["too_close"].any()
    spread = ends([10] * 5, [-3.0, -2.0, -1.0, 0.0, -10.9])  # MAD 2: the limit is 20 below
    assert not spread.flags()["too_deep"].any()
    assert ends([0.02, 1, 1], [0, 0, 0]).flags()["too_close"].tolist() == [True, False, False]


def test_a_broken_model_is_all_holes_and_says_why():
    (row,) = rss.check([BROKEN], {"Cu": crystals(3)}, pressures=[0.1], steps=2).rows
    assert row.values["failed"] == row.values["holes"] == 3
    assert "finite" in row.flag
    again = AseCandidate("again", Broken())
    two = rss.check([BROKEN, again], {"Cu": crystals(3)}, pressures=[0.1], steps=2).rows
    assert two[1].values["holes_percent"] == 100.0
    assert two[1].values["more_than_base"] == 0.0
    with pytest.raises(ValueError, match="a median needs three"):
        rss.check([BROKEN], {"Cu": crystals(2)})


def test_random_crystals_are_what_was_asked_for_and_repeatable():
    with pytest.raises(ValueError, match="no formula"):
        formula_of("Xx3")
    with pytest.raises(ValueError, match="empty composition"):
        formula_of("")
    pytest.importorskip("pyxtal")
    found = random_crystals("Na4Cl4", 2, seed=3)
    again = random_crystals("Na4Cl4", 2, seed=3)
    for atoms, same in zip(found, again, strict=True):
        assert str(atoms.symbols.formula.reduce()[0]) in ("NaCl", "ClNa")
        assert atoms.pbc.all()
        np.testing.assert_allclose(atoms.positions, same.positions)


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("pyxtal", "rss", lambda: random_crystals("Na4Cl4", 1, seed=0)),
        ("spglib", "phonons", lambda: relax.check([EMT_ONE], {"Cu": ase.build.bulk("Cu")})),
        (
            "matplotlib",
            "plots",
            lambda: findings_page("page", [diatomics.check([EMT_ONE], ["Cu"])]),
        ),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, package, extra, use):
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"jaxft\[{extra}\]"):
        use()
