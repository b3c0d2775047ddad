"""Phonons of crystals whose frequencies, heat capacity and Grüneisen parameter are known."""

import ase.build
import ase.io
import numpy as np
import pytest
from ase.calculators.calculator import Calculator, all_changes
from ase.neighborlist import neighbor_list
from ase.units import _hplanck, _k, kB

pytest.importorskip("phonopy")
pytest.importorskip("seekpath")

from jaxft.evaluate.candidate import AseCandidate
from jaxft.evaluate.crystals import (
    crystal_of,
    new_phonons,
    read_crystal,
    solve,
    sum_rule_residual,
    supercell_of,
    to_ase,
)
from jaxft.evaluate.phonon_tasks import Options
from jaxft.evaluate.phonons import phonons
from jaxft.evaluate.spectra import acoustic_velocities, mesh_numbers, spectrum
from jaxft.evaluate.thermal import debye_temperature, slack, thermal

THZ = 15.633302
"""√(eV/Å²/amu) / 2π."""

A, K = 3.0, 2.0
"""Å, eV/Å²."""

R = 8.31446261815324
FAST = {"mesh": 9.0, "min_length": 8.0}


class Springs(Calculator):
    """Simple cubic; springs of the same strength in all directions between neighbours."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, **constants):
        super().__init__()
        self.constants = constants

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        counts = np.rint(atoms.cell.lengths() / A).astype(int)
        sites = np.rint(atoms.positions / A).astype(int)
        order = np.ravel_multi_index((sites % counts).T, counts)
        u = np.zeros((*counts, 3))
        u.reshape(-1, 3)[order] = atoms.positions - sites * A
        k = self.constants[atoms[0].symbol]
        forces = k * sum(np.roll(u, s, axis) - u for axis in range(3) for s in (1, -1))
        self.results = {
            "energy": -0.5 * float((u * forces).sum()),
            "forces": forces.reshape(-1, 3)[order],
        }


class Power(Calculator):
    """Neighbours repel each other as r^-12 and a pull ``b V`` holds them; all ω ∝ V^-(14/6)."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012
    power, reach, strength, pull = 12, 1.2, 2e4, 0.052

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        nearest = (np.sqrt(2) * atoms.get_volume() / len(atoms)) ** (1 / 3)
        i, d, r = neighbor_list("iDd", atoms, self.reach * nearest)
        forces = np.zeros((len(atoms), 3))
        size = self.strength * self.power * r ** (-self.power - 2)
        np.add.at(forces, i, -size[:, None] * d)
        energy = 0.5 * self.strength * (r**-self.power).sum() + self.pull * atoms.get_volume()
        self.results = {"energy": float(energy), "forces": forces}


class Broken(Calculator):
    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.results = {"energy": 0.0, "forces": np.full((len(atoms), 3), np.nan)}


def cubic(symbol="Po"):
    return ase.Atoms(symbol, cell=np.eye(3) * A, pbc=True)


def springs(name, **constants):
    return AseCandidate(name, Springs(**constants))


def row(finding, model, subject):
    (found,) = [r for r in finding.rows if (r.model, r.subject) == (model, subject)]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What phonopy leaves behind of the spring model: displacements, and FORCE_SETS beside."""
    from phonopy.file_IO import write_FORCE_SETS

    path = tmp_path_factory.mktemp("Po")
    one = new_phonons(cubic(), np.diag([3, 3, 3]))
    one.generate_displacements(distance=0.02)
    one.save(path / "phonopy_disp.yaml", settings={"force_sets": False, "displacements": True})
    outcomes = springs("reference model", Po=K).evaluate(
        [to_ase(cell) for cell in one.supercells_with_displacements]
    )
    one.forces = [outcome.forces for outcome in outcomes]
    write_FORCE_SETS(one.dataset, path / "FORCE_SETS")
    return path


def test_frequencies_of_a_harmonic_crystal(folder):
    crystal = read_crystal(folder)
    found = spectrum(crystal.reference, mesh_numbers(crystal.reference, 20.0))
    stiffness = 2 * K / to_ase(crystal.reference.primitive).get_masses()[0]
    expected = THZ * np.sqrt(stiffness * (1 - np.cos(2 * np.pi * found.qpoints)).sum(axis=1))
    np.testing.assert_allclose(found.frequencies, expected[:, None] * np.ones(3), atol=1e-5)
    assert found.weights.sum() == pytest.approx(1)
    # v = a √(k/m), for all polarisations and directions
    speed = 0.1 * A * 2 * np.pi * THZ * np.sqrt(stiffness / 2)
    np.testing.assert_allclose(acoustic_velocities(crystal.reference), speed, rtol=1e-4)


def test_a_softer_crystal_is_off_by_what_is_known(folder):
    """Springs of 0.81 times the strength: all frequencies are 0.9 times as high."""
    crystal = read_crystal(folder)
    finding = phonons(
        [springs("same", Po=K), springs("soft", Po=0.81 * K)], [crystal], Options(**FAST)
    )
    assert not finding.flags
    name = crystal.name
    same, soft = (row(finding, model, name).values for model in ("same", "soft"))
    reference = row(finding, "reference", name).values
    assert same["mae"] < 1e-6
    assert same["force_rmse"] < 1e-5  # digits of FORCE_SETS
    assert same["curvature_slope"] == pytest.approx(1, abs=1e-6)
    assert soft["mae"] == pytest.approx(0.1 * reference["omega_mean"], rel=1e-4)
    assert soft["w1"] == pytest.approx(soft["mae"], rel=1e-4)
    assert soft["omega_max_bias"] == pytest.approx(-10, abs=1e-3)
    assert soft["curvature_slope"] == pytest.approx(0.81, abs=1e-4)
    assert 5 < soft["dos_error"] < 100
    assert soft["sum_rule"] < 1e-6
    assert soft["stable"]
    assert reference["stable"]
    # displaced by 0.02 Å: the atom and its six neighbours
    off = 0.19 * K * 0.02 * np.sqrt((36 + 6) / (3 * 27)) * 1e3
    assert soft["force_rmse"] == pytest.approx(off, rel=1e-3)
    warm = row(finding, "soft", f"{name} at 300 K").values
    assert warm["heat_capacity_error"] > 0  # softer modes are fuller
    assert warm["heat_capacity"] < 3 * R
    assert {p.title.split(": ")[1] for p in finding.pictures} == {
        "phonons",
        "density of states",
        "heat capacity",
    }


def test_a_model_can_be_the_reference():
    crystal = crystal_of(cubic(), "Po")
    judged = [springs("soft", Po=0.81 * K), springs("hard", Po=K)]
    finding = phonons(judged, [crystal], Options(**FAST), reference="hard")
    assert row(finding, "soft", "Po").values["omega_max_bias"] == pytest.approx(-10, abs=1e-3)
    assert "mae" not in row(finding, "hard", "Po").values


@pytest.mark.filterwarnings("ignore:.*coustic")
def test_heat_capacity_of_an_einstein_solid():
    one = new_phonons(cubic(), np.diag([2, 2, 2]))
    constants = np.zeros((8, 8, 3, 3))
    constants[np.arange(8), np.arange(8)] = K * np.eye(3)
    one.force_constants = constants
    assert sum_rule_residual(constants) == pytest.approx(K)
    frequency = THZ * np.sqrt(K / one.primitive.masses[0])
    for temperature in (30.0, 300.0):
        x = _hplanck * frequency * 1e12 / (_k * temperature)
        found = thermal(one, [3, 3, 3], [temperature])
        expected = 3 * R * x**2 * np.exp(x) / np.expm1(x) ** 2
        assert found.heat_capacity[0] == pytest.approx(expected, rel=1e-5)
        free = 3 * kB * temperature * (x / 2 + np.log1p(-np.exp(-x))) * 96.48533212
        assert found.free_energy[0] == pytest.approx(free, rel=1e-5)
        entropy = 3 * R * (x / np.expm1(x) - np.log1p(-np.exp(-x)))
        assert found.entropy[0] == pytest.approx(entropy, rel=1e-5)


def test_grueneisen_parameter_and_expansion_of_a_power_law():
    """ω ∝ V^-(n+2)/6, so γ = 7/3 for every mode, and α = γ C_V / (B V)."""
    atoms = ase.build.bulk("Ar", "fcc", a=5.0)
    # n/3 of the repulsive energy per volume is what the pull balances
    repulsion = 6 * Power.strength * (5.0 / np.sqrt(2)) ** -12
    volume = (4 * repulsion / Power.pull * atoms.get_volume() ** 4) ** 0.2
    atoms.set_cell(atoms.cell.array * (volume / atoms.get_volume()) ** (1 / 3), scale_atoms=True)
    finding = phonons(
        [AseCandidate("power", Power())],
        [crystal_of(atoms, "Ar", (3, 3, 3))],
        Options(mesh=15.0, slack=True, expansion=True, temperatures=(40.0,)),
    )
    assert not finding.flags
    values = row(finding, "power", "Ar").values
    warm = row(finding, "power", "Ar at 40 K").values
    assert values["gruneisen"] == pytest.approx(7 / 3, rel=2e-3)
    capacity = warm["heat_capacity"] / (1e3 * 96.48533212)  # eV/K
    expected = 7 / 3 * capacity / (warm["bulk_modulus"] / 160.21766208 * warm["volume"])
    assert warm["expansion"] == pytest.approx(1e6 * expected, rel=0.1)
    assert warm["volume"] > volume
    assert warm["slack_kappa"] > 0


def test_an_unstable_crystal_has_no_expansion_and_no_grueneisen_parameter():
    options = Options(**FAST, slack=True, expansion=True)
    finding = phonons([springs("falls", Po=-K)], [crystal_of(cubic(), "Po")], options)
    values, flag = row(finding, "falls", "Po").values, row(finding, "falls", "Po").flag
    assert "no thermal expansion: there are imaginary modes" in flag
    assert "no Slack conductivity" in flag
    assert "gruneisen" not in values
    assert not {"expansion", "slack_kappa"} & set(row(finding, "falls", "Po at 300 K").values)


def test_slack_by_hand():
    """Silicon with Slack's own numbers: θ 395 K, γ 0.56, 28.09 amu, δ 2.71 Å."""
    found = slack(0.56, 395, mass=28.09, volume=2.71**3, atoms=2, temperature=300)
    by_hand = 2.43e-6 / (1 - 0.514 / 0.56 + 0.228 / 0.56**2)
    by_hand *= 28.09 * 395**3 * 2.71 * 2 ** (1 / 3) / (0.56**2 * 300)
    assert found == pytest.approx(by_hand)
    assert 100 < found < 250  # measured: 140 to 166
    frequencies = np.sqrt(3 / 5) * np.ones((4, 6))  # <ν²> of Debye's spectrum up to 1 THz
    assert debye_temperature(frequencies, np.ones(4)) == pytest.approx(47.992, rel=1e-4)


def test_imaginary_modes_are_counted_over_crystals():
    """Three of four truly are; the model says two, one of them wrongly."""
    truth = springs("truth", Po=-K, Cu=-K, Na=-K, Al=K)
    model = springs("model", Po=-K, Cu=K, Na=K, Al=-K)
    crystals = [crystal_of(cubic(s), s) for s in ("Po", "Cu", "Na", "Al")]
    finding = phonons([truth, model], crystals, Options(**FAST), reference="truth")
    total = row(finding, "model", "all crystals").values
    assert total["crystals"] == 4
    assert total["imaginary_precision"] == pytest.approx(1 / 2)
    assert total["imaginary_recall"] == pytest.approx(1 / 3)
    assert row(finding, "model", "Cu").values["stable"]
    lowest = row(finding, "model", "Po").values["omega_min"]
    assert lowest == pytest.approx(-THZ * np.sqrt(12 * K / 208.98), rel=0.01)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("FORCE_SETS", "2\n1\n\n1\n0.02 0 0\n0 0 0\n0 0 0\n", r"FORCE_SETS \(2\) is not 27"),
        ("FORCE_SETS", "27\n1\n\n1\n0.02 0 0\n0 0 0\n", "ends too early"),
        ("FORCE_SETS", "27\n1\n\n5\n0.02 0 0\n" + "0 0 0\n" * 27, "other displacements"),
        ("FORCE_SETS", "<html>not found</html>", "cannot be read"),
        ("BORN", "14.4\nnothing\n", "of this crystal"),
        ("BORN", "14.4\n2 0 0 0 2 0 0 0 2\n1 0 0 0 2 0 0 0 3\n", "symmetry of"),
        ("phonopy_disp.yaml", "a: [1", "no file of phonopy"),
    ],
)
def test_files_that_are_broken_or_of_another_crystal_are_refused(
    folder, tmp_path, name, text, words
):
    for file in ("phonopy_disp.yaml", "FORCE_SETS"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_crystal(tmp_path)


def test_born_charges_of_all_atoms_of_the_unit_cell_are_understood(tmp_path):
    """As phonopy writes them where no symmetry was used; the primitive cell has two of eight."""
    from phonopy.interface.vasp import write_vasp

    cell = ase.build.bulk("LiF", "rocksalt", a=4.0, cubic=True)
    write_vasp(tmp_path / "POSCAR-unitcell", new_phonons(cell, np.eye(3, dtype=int)).unitcell)
    order = read_crystal(tmp_path, (1, 1, 1)).cell.get_chemical_symbols()
    size = {"Li": 1.1, "F": -1.1}
    lines = ["14.4", "2 0 0 0 2 0 0 0 2"]
    lines += [f"{size[s]} 0 0 0 {size[s]} 0 0 0 {size[s]}" for s in order]
    (tmp_path / "BORN").write_text("\n".join(lines) + "\n")
    crystal = read_crystal(tmp_path, (1, 1, 1))
    np.testing.assert_allclose(crystal.nac["born"], [1.1 * np.eye(3), -1.1 * np.eye(3)], atol=1e-9)


def test_what_is_broken_is_flagged_and_the_rest_goes_on(tmp_path):
    pair = ase.Atoms("Po2", [[0, 0, 0], [0, 0, 1e-7]], cell=np.eye(3) * A, pbc=True)
    (tmp_path / "bare").mkdir()
    bare = new_phonons(cubic(), np.diag([3, 3, 3]))
    bare.save(tmp_path / "bare" / "phonopy_disp.yaml")
    crystals = [
        crystal_of(cubic(), "Po"),
        crystal_of(pair, "overlap"),
        read_crystal(tmp_path / "bare"),
        crystal_of(cubic("Xe"), "unknown"),
        crystal_of(cubic(), "one atom", (1, 1, 1)),
    ]
    judged = [AseCandidate("broken", Broken()), springs("sound", Po=K)]
    finding = phonons(judged, crystals, Options(**FAST))
    flags = {(r.model, r.subject): r.flag for r in finding.flags}
    assert "not finite" in flags["broken", "Po"]
    assert ("sound", "overlap") in flags
    assert "FORCE_SETS" in flags["sound", "bare"]
    assert "KeyError" in flags["sound", "unknown"]
    assert "are zero" in flags["sound", "one atom"]
    assert not {("sound", "Po"), ("sound", "Po at 300 K")} & set(flags)
    assert row(finding, "sound", "Po").values["stable"]
    assert row(finding, "sound", "bare").values["omega_max"] > 1
    finding.to_dict()


def test_relaxation_finds_the_equilibrium_and_keeps_the_symmetry():
    from ase.calculators.emt import EMT

    crystal = crystal_of(ase.build.bulk("Cu", "fcc", a=3.75, cubic=True), "Cu", (1, 1, 1))
    relaxed = crystal_of(ase.build.bulk("Cu", "fcc", a=3.5898, cubic=True), "Cu", (1, 1, 1))
    found = [
        phonons([AseCandidate("EMT", EMT())], [one], options)
        for one, options in (
            (crystal, Options(mesh=15.0, fmax=1e-4)),
            (relaxed, Options(mesh=15.0)),
            (crystal, Options(mesh=15.0)),
        )
    ]
    ours, theirs, wide = (row(one, "EMT", "Cu").values["omega_max"] for one in found)
    assert ours == pytest.approx(theirs, abs=0.02)
    assert abs(wide - theirs) > 0.2


def test_random_displacements_give_the_same_force_constants(folder):
    one = new_phonons(cubic(), np.diag([3, 3, 3]))
    one.generate_displacements(distance=0.02, number_of_snapshots=4, random_seed=0)
    cells = [to_ase(cell) for cell in one.supercells_with_displacements]
    one.forces = [outcome.forces for outcome in springs("k", Po=K).evaluate(cells)]
    solve(one)
    reference = read_crystal(folder).reference
    at = [[0.5, 0, 0], [0.25, 0.25, 0.1]]
    np.testing.assert_allclose(
        one.run_qpoints(at).frequencies, reference.run_qpoints(at).frequencies, atol=1e-4
    )


def frequencies(candidate, cell, **options):
    crystal = crystal_of(cell, "NaCl", (2, 2, 2))
    from jaxft.evaluate.phonon_tasks import ground_of, solve_all

    ground = ground_of(crystal, Options(mesh=10.0, **options))
    (solved,) = solve_all(candidate, {"NaCl": ground}, Options(mesh=10.0, **options)).values()
    return spectrum(solved.phonons, [3, 3, 3]).frequencies


@pytest.mark.torch
def test_phonopy_agrees_whether_our_calculator_or_torchs_drives_it(tiny, tiny_file):
    pytest.importorskip("mace")
    from converters.verify import torch_calculator
    from jaxft.calculator import JaxftCalculator

    cell = ase.build.bulk("NaCl", "rocksalt", a=5.6)
    ours = frequencies(AseCandidate("ours", JaxftCalculator(*tiny)), cell)
    theirs = frequencies(
        AseCandidate("torch", torch_calculator(tiny_file, dtype="float64", head=None)), cell
    )
    assert abs(ours).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_supercells_are_as_long_as_asked():
    crystal = crystal_of(ase.build.bulk("Cu", "fcc", a=3.6), "Cu")
    matrix = supercell_of(crystal, 10.0)
    cell = matrix @ crystal.cell.cell.array
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    assert heights.min() >= 10
    assert (heights - heights / np.diag(matrix)).max() < 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "magic"}, "displacements, hessian"),
        ({"distance": 0.0}, "above 0"),
        ({"fmax": -1.0}, "fmax"),
        ({"temperatures": (0.0,)}, "above 0 K"),
        ({"temperatures": (300.0, np.nan)}, "above 0 K"),
        ({"distance": np.inf}, "distance"),
        ({"mesh": np.inf}, "mesh"),
    ],
)
def test_options_that_mean_nothing_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Options(**change)


def test_questions_that_mean_nothing_are_refused(tmp_path):
    crystal, model = crystal_of(cubic(), "Po"), springs("k", Po=K)
    with pytest.raises(ValueError, match="none of the models"):
        phonons([model], [crystal], reference="DFT")
    with pytest.raises(ValueError, match="several crystals"):
        phonons([model], [crystal, crystal])
    with pytest.raises(ValueError, match="no crystal"):
        phonons([model], [])
    with pytest.raises(ValueError, match="differentiated twice"):
        phonons([model], [crystal], Options(method="hessian"))
    with pytest.raises(ValueError, match="periodic"):
        crystal_of(ase.build.molecule("H2O"))
    with pytest.raises(ValueError, match="does not exist"):
        read_crystal(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no phonopy_params"):
        read_crystal(tmp_path)
    ase.io.write(tmp_path / "path.xyz", [cubic(), cubic()])
    with pytest.raises(ValueError, match="2 structures"):
        read_crystal(tmp_path / "path.xyz")
    (tmp_path / "junk.cif").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read"):
        read_crystal(tmp_path / "junk.cif")
