"""The ASE calculator: derivatives, symmetries, dynamics, and how often it compiles."""

import logging
from dataclasses import replace
from pathlib import Path

import ase
import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.filters import FrechetCellFilter
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

import jaxft
from converters.to_jax import convert
from jaxft.calculator import JaxftCalculator
from jaxft.evaluate import predictions
from jaxft.models.config import EmbeddingConfig
from jaxft.potential import Prediction, predict
from jaxft.surgery import add_head, set_e0s

TRAINED = Path(__file__).parents[1] / "benchmarks" / "data" / "gfn2_small.model"

STEP = 1e-4
"""Å or strain; central differences of float64 energies are good to about STEP² and 1e-16 E/STEP."""

DERIVATIVE = 1e-6
"""eV/Å or eV/Å³·volume; seen: below 1e-7."""

ROUNDING = 1e-9
"""eV and eV/Å in float64; energies are 1e4 eV, whose last digit is 2e-12."""


@pytest.fixture
def calc(tiny):
    return JaxftCalculator(*tiny)


def molecule(seed=1):
    atoms = ase.build.molecule("CH3COOH")
    atoms.rattle(0.05, seed=seed)
    return atoms


def crystal(seed=1):
    atoms = ase.build.bulk("NaCl", "rocksalt", 5.5, cubic=True)
    atoms.rattle(0.08, seed=seed)
    skew = np.eye(3) + 0.03 * np.random.default_rng(seed).normal(size=(3, 3))
    atoms.set_cell(atoms.cell @ skew, scale_atoms=True)
    return atoms


def slab(seed=1):
    """Periodic in x and y only; the cell has no third vector."""
    atoms = ase.build.fcc100("Na", (2, 2, 2), a=4.3, periodic=False)
    atoms.pbc = (True, True, False)
    atoms.rattle(0.05, seed=seed)
    return atoms


def wire(seed=1):
    """Periodic along y only."""
    atoms = ase.Atoms("HOCl", [[0, 0, 0], [0.8, 0.5, 0], [0.4, 2.0, 0.3]])
    atoms.set_cell([0, 3.5, 0])
    atoms.pbc = (False, True, False)
    atoms.rattle(0.05, seed=seed)
    return atoms


STRUCTURES = {"molecule": molecule, "crystal": crystal, "slab": slab, "wire": wire}


@pytest.fixture(params=STRUCTURES)
def atoms(request, calc):
    atoms = STRUCTURES[request.param]()
    atoms.calc = calc
    return atoms


def energy_of(atoms, calc):
    copy = atoms.copy()
    copy.calc = calc
    return copy.get_potential_energy()


def test_forces_are_the_derivative_of_the_energy(atoms, calc):
    forces = atoms.get_forces()
    assert np.abs(forces).max() > 0.1  # otherwise nothing is tested
    for i in range(len(atoms)):
        for axis in range(3):
            energies = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions[i, axis] += sign * STEP
                energies.append(energy_of(moved, calc))
            slope = (energies[0] - energies[1]) / (2 * STEP)
            assert forces[i, axis] == pytest.approx(-slope, abs=DERIVATIVE)


def test_stress_is_the_derivative_of_the_energy_by_strain(calc):
    atoms = crystal()
    atoms.calc = calc
    voigt = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]
    # four points: the third derivative of a strained crystal is 1e4 times that of a moved atom
    weights = {1: 8 / 12, -1: -8 / 12, 2: -1 / 12, -2: 1 / 12}
    expected = []
    for a, b in voigt:
        slope = 0.0
        for steps, weight in weights.items():
            strain = np.zeros((3, 3))
            strain[a, b] += 0.5 * steps * STEP
            strain[b, a] += 0.5 * steps * STEP
            strained = atoms.copy()
            strained.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
            slope += weight * energy_of(strained, calc) / STEP
        expected.append(slope / atoms.get_volume())
    stress = atoms.get_stress()
    assert np.abs(stress).min() > 1e-4
    np.testing.assert_allclose(stress, expected, rtol=0, atol=DERIVATIVE / atoms.get_volume())
    full = atoms.get_stress(voigt=False)
    np.testing.assert_array_equal(full, full.T)


def test_energies_sum_to_the_energy_and_it_is_the_free_energy(atoms):
    energy = atoms.get_potential_energy()
    assert atoms.get_potential_energies().sum() == pytest.approx(energy, abs=ROUNDING)
    assert atoms.get_potential_energy(force_consistent=True) == energy
    assert isinstance(energy, float)
    assert atoms.get_forces().dtype == np.float64


def test_energy_holds_the_isolated_atoms(calc, model):
    lone = ase.Atoms("O", calculator=calc)
    far = ase.Atoms("OO", [[0, 0, 0], [0, 0, 50]], calculator=calc)
    interaction = lone.get_potential_energy() - model.e0s[0, model.atomic_numbers.index(8)]
    assert abs(interaction) < 100  # shift and self-connection; E0s of this model are of its size
    assert far.get_potential_energy() == pytest.approx(2 * lone.get_potential_energy(), abs=1e-9)
    np.testing.assert_array_equal(lone.get_forces(), 0)


def test_e0s_shift_energies_and_nothing_else(tiny):
    model, params = tiny
    atoms = molecule()
    shifted = set_e0s(model, {1: -1e5})
    before, after = JaxftCalculator(model, params), JaxftCalculator(shifted, params)
    shift = 4 * (-1e5 - model.e0s[0, model.atomic_numbers.index(1)])
    assert energy_of(atoms, after) - energy_of(atoms, before) == pytest.approx(shift, abs=1e-8)
    np.testing.assert_allclose(after.results["forces"], before.results["forces"], atol=ROUNDING)


def test_energy_is_invariant_and_forces_turn_with_the_structure(calc):
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]  # proper or not: the energy is a scalar
    for make in (molecule, crystal):
        atoms = make()
        atoms.calc = calc
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        turned = atoms.copy()
        turned.set_cell(atoms.cell @ rotation)
        turned.positions = (atoms.positions + rng.normal(size=3)) @ rotation
        turned.calc = calc
        assert turned.get_potential_energy() == pytest.approx(energy, abs=ROUNDING)
        np.testing.assert_allclose(turned.get_forces(), forces @ rotation, atol=ROUNDING)
        order = rng.permutation(len(atoms))
        shuffled = atoms[order]
        shuffled.calc = calc
        assert shuffled.get_potential_energy() == pytest.approx(energy, abs=ROUNDING)
        np.testing.assert_allclose(shuffled.get_forces(), forces[order], atol=ROUNDING)
        np.testing.assert_allclose(forces.sum(axis=0), 0, atol=ROUNDING)


def test_stress_turns_with_the_crystal(calc):
    atoms = crystal()
    rotation = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))[0]
    turned = atoms.copy()
    turned.set_cell(atoms.cell @ rotation, scale_atoms=True)
    atoms.calc = turned.calc = calc
    stress = atoms.get_stress(voigt=False)
    np.testing.assert_allclose(
        turned.get_stress(voigt=False), rotation.T @ stress @ rotation, atol=1e-12
    )


def test_a_supercell_is_so_many_cells(calc):
    cell = crystal()
    cell.calc = calc
    supercell = cell.repeat((2, 1, 2))
    supercell.calc = calc
    assert supercell.get_potential_energy() == pytest.approx(
        4 * cell.get_potential_energy(), abs=4 * ROUNDING
    )
    np.testing.assert_allclose(
        supercell.get_forces(), np.tile(cell.get_forces(), (4, 1)), atol=ROUNDING
    )
    np.testing.assert_allclose(supercell.get_stress(), cell.get_stress(), atol=1e-12)


def test_wrapping_atoms_into_the_cell_changes_nothing(calc):
    atoms = crystal()
    wrapped = atoms.copy()
    wrapped.positions += 3 * atoms.cell[0] - 2 * atoms.cell[2]
    energies = [energy_of(a, calc) for a in (atoms, wrapped)]
    assert energies[1] == pytest.approx(energies[0], abs=ROUNDING)


@pytest.mark.parametrize("make", [molecule, slab, wire])
def test_stress_of_an_open_structure_is_refused(make, calc):
    atoms = make()
    atoms.calc = calc
    with pytest.raises(PropertyNotImplementedError, match="periodic in three directions"):
        atoms.get_stress()
    assert np.isfinite(atoms.get_potential_energy())
    assert "stress" not in calc.results


def test_results_follow_positions_cell_pbc_and_numbers(calc):
    atoms = crystal()
    atoms.calc = calc
    seen = [atoms.get_potential_energy()]
    atoms.positions[0] += 0.1
    seen.append(atoms.get_potential_energy())
    atoms.set_cell(atoms.cell * 1.02)
    seen.append(atoms.get_potential_energy())
    atoms.pbc = False
    seen.append(atoms.get_potential_energy())
    atoms.numbers[:] = atoms.numbers[::-1].copy()
    seen.append(atoms.get_potential_energy())
    assert len({round(energy, 6) for energy in seen}) == len(seen)


def test_labels_of_the_structure_are_not_looked_at(calc):
    atoms = molecule()
    energy = energy_of(atoms, calc)
    atoms.info["REF_energy"] = np.nan
    atoms.arrays["REF_forces"] = np.zeros((len(atoms), 2))
    atoms.info["config_type"] = "IsolatedAtom"
    assert energy_of(atoms, JaxftCalculator(calc.model, calc._params)) == energy


def test_unknown_elements_fail_before_anything_is_compiled(calc):
    atoms = ase.build.molecule("SiH4")
    atoms.calc = calc
    with pytest.raises(ValueError, match=r"SiH4 holds Si.*its elements are H C O Na Cl"):
        atoms.get_potential_energy()
    assert calc.compilations == 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ase.Atoms(), "no atoms"),
        (ase.Atoms("HH", [[0, 0, 0], [0, 0, np.nan]]), "not finite"),
        (ase.Atoms("HH", [[0, 0, 0], [0, 0, 0]]), "apart"),
        (ase.Atoms("HH", [[0, 0, 0], [0, 0, 1]], pbc=True), "lattice vector"),
    ],
)
def test_impossible_structures_are_refused(broken, message, calc):
    broken.calc = calc
    with pytest.raises(ValueError, match=message):
        broken.get_potential_energy()
    assert calc.compilations == 0


def test_a_failed_structure_leaves_no_stale_results(calc):
    atoms = molecule()
    atoms.calc = calc
    energy = atoms.get_potential_energy()
    good = atoms.positions.copy()
    atoms.positions[0] = np.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="not finite"):
            atoms.get_forces()
    atoms.positions = good
    assert atoms.get_potential_energy() == energy


@pytest.fixture(scope="module")
def trained():
    """A model that was trained: dynamics on a random one ends in a collapse."""
    return convert(TRAINED)


@pytest.fixture(scope="module")
def trained_calc(trained):
    return JaxftCalculator(*trained, dtype="float64")


def test_nve_conserves_the_energy(trained_calc):
    drifts = []
    for dt, steps in ((0.5, 100), (0.25, 200)):
        atoms = ase.build.molecule("CH3OH")
        atoms.calc = trained_calc
        thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(0))
        total, kinetic = [], []
        dynamics = VelocityVerlet(atoms, dt * units.fs)
        for step in range(steps + 1):
            if step:
                dynamics.run(1)
            total.append(atoms.get_total_energy())
            kinetic.append(atoms.get_kinetic_energy())
        assert np.ptp(kinetic) > 0.05
        drifts.append(np.ptp(total))
        assert drifts[-1] < 0.05 * np.ptp(kinetic)
    # the error of velocity Verlet falls as dt²; that of wrong forces does not
    assert drifts[0] / drifts[1] == pytest.approx(4, rel=0.25)


def test_a_relaxation_of_positions_and_cell_arrives(trained_calc):
    atoms = ase.build.bulk("NaCl", "rocksalt", 5.6, cubic=True)
    atoms.rattle(0.05, seed=0)
    atoms.calc = trained_calc
    start = atoms.get_potential_energy()
    assert BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.01, steps=100)
    assert atoms.get_potential_energy() < start
    assert np.abs(atoms.get_forces()).max() < 0.01
    assert np.abs(atoms.get_stress()).max() < 0.01


@pytest.fixture
def compiled(caplog, monkeypatch):
    """A function: how often jax itself says that it compiled the model."""

    def predict_afresh(alike, params, graph):
        return predict(alike.model, params, graph)

    monkeypatch.setattr(predictions, "_predict", jax.jit(predict_afresh, static_argnums=0))

    def count():
        texts = [record.getMessage() for record in caplog.records]
        return sum(text.startswith("Compiling jit(predict_afresh)") for text in texts)

    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        yield count


def test_200_steps_compile_once(calc, compiled):
    atoms = crystal()
    atoms.calc = calc
    rng = np.random.default_rng(0)
    neighbours = set()
    for _ in range(200):
        atoms.positions += rng.normal(scale=0.02, size=atoms.positions.shape)
        atoms.set_cell(atoms.cell * rng.normal(1, 1e-3), scale_atoms=True)
        atoms.get_potential_energy()
        neighbours.add(round(float(atoms.get_volume()), 3))
    assert len(neighbours) > 100
    assert calc.compilations <= 2
    assert compiled() == calc.compilations


@pytest.fixture
def traced(monkeypatch):
    """Shapes that jax traces, with a model that says nothing and compiles at once."""
    found = []

    def nothing(model, params, graph):
        found.append((graph.n_node, graph.senders.shape, graph.elements.shape))
        return Prediction(
            jnp.zeros(graph.n_graph),
            jnp.zeros(graph.n_node),
            jnp.zeros((graph.n_node, 3)),
            jnp.zeros((graph.n_graph, 3, 3)),
        )

    monkeypatch.setattr(predictions, "_predict", jax.jit(nothing, static_argnums=0))
    return found


def test_changing_atom_counts_compile_logarithmically_often(calc, traced):
    bulk = ase.build.bulk("NaCl", "rocksalt", 5.6, cubic=True).repeat((4, 4, 4))
    counts = [*range(1, 513, 7), *range(512, 0, -7)]
    for count in counts:
        atoms = bulk[:count]
        atoms.pbc = count % 2 == 0  # an open cluster has fewer neighbours
        atoms.calc = calc
        atoms.get_potential_energy()
    # ×1.25 from 32 to 512 atoms is 13 shapes; shrinking, rows that outgrow atoms, add some
    assert calc.compilations <= 26
    assert len(traced) == calc.compilations
    for count in counts:
        atoms = bulk[:count]
        atoms.pbc = count % 2 == 0
        atoms.calc = calc
        atoms.get_forces()
    assert len(traced) == calc.compilations <= 26


def test_elements_in_turn_share_shapes(calc, traced):
    for _ in range(2):
        for name in ("CH3OH", "H2O", "CO2", "CH3COOH", "HCl", "CH3Cl", "O"):
            energy_of(ase.build.molecule(name), calc)
    assert len(traced) == calc.compilations <= 3


def test_a_large_structure_does_not_slow_small_ones_down(calc, traced):
    energy_of(crystal().repeat((3, 3, 3)), calc)
    energy_of(molecule(), calc)
    (large, _, _), (small, _, _) = traced
    assert large > 216
    assert small < 40


def test_padding_changes_nothing_beyond_rounding(tiny):
    fresh, used = JaxftCalculator(*tiny), JaxftCalculator(*tiny)
    small, large = crystal(), crystal(seed=2) * (2, 1, 1)
    energy_of(large, used)
    assert energy_of(small, used) == pytest.approx(energy_of(small, fresh), abs=ROUNDING)
    np.testing.assert_allclose(used.results["forces"], fresh.results["forces"], atol=ROUNDING)
    np.testing.assert_allclose(used.results["stress"], fresh.results["stress"], atol=1e-12)


def test_a_bundle_gives_the_same_as_its_model(tiny, tmp_path):
    path = jaxft.save(tmp_path / "tiny.jaxft", *tiny)
    calc = JaxftCalculator(str(path))
    assert energy_of(molecule(), calc) == energy_of(molecule(), JaxftCalculator(*tiny))
    assert JaxftCalculator(path).model.config == calc.model.config


def test_dtype_is_the_stored_one_by_default(tiny, tmp_path):
    model, params = tiny
    single = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    path = jaxft.save(tmp_path / "tiny.jaxft", model, params)
    assert JaxftCalculator(model, params).dtype == "float64"
    assert JaxftCalculator(model, single).dtype == "float32"
    assert JaxftCalculator(model, params, dtype="float32").dtype == "float32"
    with jax.enable_x64(False):
        assert JaxftCalculator(path).dtype == "float32"
        assert JaxftCalculator(model, params).dtype == "float32"
        with pytest.raises(ValueError, match="jax_enable_x64"):
            JaxftCalculator(model, params, dtype="float64")
        with pytest.raises(ValueError, match="jax_enable_x64"):
            JaxftCalculator(path, dtype="float64")
    with pytest.raises(ValueError, match="float16"):
        JaxftCalculator(model, params, dtype="float16")


def test_float32_agrees_with_float64(tiny):
    atoms = crystal()
    single, double = (JaxftCalculator(*tiny, dtype=dtype) for dtype in ("float32", "float64"))
    # interaction energies are about 1e2 eV per atom here, float32 resolves 1e-5 of them
    assert energy_of(atoms, single) == pytest.approx(energy_of(atoms, double), abs=1e-2)
    np.testing.assert_allclose(
        single.results["forces"], double.results["forces"], rtol=0, atol=1e-3
    )
    assert single.results["energies"].dtype == np.float64


def test_head_is_checked_by_name(tiny):
    model, params = tiny
    (only,) = model.config.heads
    JaxftCalculator(model, params, head=only)
    with pytest.raises(ValueError, match=f"'water'.*{only}"):
        JaxftCalculator(model, params, head="water")


def test_a_model_of_several_heads_wants_to_know_which(tiny):
    water = ase.build.molecule("H2O")
    several = add_head(*tiny, "rpbe", e0s={1: -1.0, 8: -2.0})
    for head in (None, "pbe"):
        with pytest.raises(ValueError, match="'Default', 'rpbe'"):
            JaxftCalculator(*several, head=head)
    energies = []
    for head in ("Default", "rpbe"):
        atoms = water.copy()
        atoms.calc = JaxftCalculator(*several, head=head)
        energies.append(atoms.get_potential_energy())
    model = tiny[0]
    own = {z: model.e0s[0, model.atomic_numbers.index(z)] for z in (1, 8)}
    change = sum({1: -1.0, 8: -2.0}[z] - own[z] for z in water.numbers.tolist())
    assert energies[1] - energies[0] == pytest.approx(change, abs=1e-9)


def test_model_and_parameters_come_together(tiny, tmp_path):
    model, params = tiny
    with pytest.raises(ValueError, match="without parameters"):
        JaxftCalculator(model)
    with pytest.raises(ValueError, match="a bundle has its own"):
        JaxftCalculator(tmp_path, params)
    with pytest.raises(ValueError, match="not a jaxft bundle"):
        JaxftCalculator(tmp_path)


def test_a_change_of_charge_or_spin_is_a_change(tiny):
    model, _ = tiny
    charge = EmbeddingConfig(
        name="total_charge", kind="categorical", per="graph", num_classes=11, offset=5, emb_dim=4
    )
    charged = replace(model, config=model.config.model_copy(update={"embeddings": (charge,)}))
    params = charged.init(jax.random.key(0), dtype="float64")
    atoms = ase.build.molecule("H2O")
    atoms.calc = JaxftCalculator(charged, params)
    neutral = atoms.get_potential_energy()
    atoms.info["charge"] = 1
    positive = atoms.get_potential_energy()
    assert positive != neutral
    atoms.info = {"total_charge": 0}
    assert atoms.get_potential_energy() == neutral
    assert atoms.calc.compilations == 1
    atoms.info = {"charge": np.array([1])}
    assert atoms.get_potential_energy() == positive
    wrongs = ((6, "from -5 to 5"), (0.5, "whole numbers"), ("two", "expected numbers"))
    for wrong, message in (*wrongs, (np.nan, "whole numbers"), ([1, 1], "has shape")):
        atoms.info = {"charge": wrong}
        with pytest.raises(ValueError, match=message):
            atoms.get_potential_energy()
    atoms.info = {"charge": 1, "total_charge": 2}
    with pytest.raises(ValueError, match="the same under both names"):
        atoms.get_potential_energy()
