"""Molecular dynamics on the device: laws of mechanics and of statistical mechanics, and ASE."""

import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import units
from ase.md.verlet import VelocityVerlet
from matscipy.neighbours import neighbour_list
from pair_potential import ARGON, Abrupt, LennardJones, Springs

from jaxft import md
from jaxft.calculator import JaxftCalculator
from jaxft.md import placement, replicas
from jaxft.md.drift import drift

MODEL = LennardJones()
PARAMS = jax.tree.map(jnp.asarray, ARGON)
ANYWAY = md.Limits(np.inf, 0.0)
"""Nothing ends a replica but numbers that are not finite."""


def crystal(cells=2, kelvin=40.0, seed=0):
    atoms = ase.build.bulk("Ar", "fcc", 5.4, cubic=True) * ((cells,) * 3)
    return md.thermal(atoms, kelvin, seed=seed)


def cluster(kelvin=20.0, seed=0):
    """Not periodic."""
    atoms = ase.build.bulk("Ar", "fcc", 5.4, cubic=True) * (2, 1, 1)
    atoms.set_pbc(False)
    return md.thermal(atoms, kelvin, seed=seed)


def gas(n=8, edge=15.0, seed=0, kelvin=300.0):
    rng = np.random.default_rng(seed)
    atoms = ase.Atoms("Ar" * n, rng.uniform(0, edge, (n, 3)), cell=[edge] * 3, pbc=True)
    return md.thermal(atoms, kelvin, seed=seed)


def gases():
    """Many, for statistics; all tests share their shape."""
    return [gas(n=4, seed=i) for i in range(48)]


FREE = PARAMS | {"epsilon": jnp.asarray(0.0)}
"""An ideal gas."""
SHORT = LennardJones(r_max=1.0)
"""For gases: atoms that do not interact need no neighbours."""


def energies_of(frames, smoothing=3):
    """Of argon, from all pairs anew, with a plain sum."""
    found = []
    for atoms in frames:
        d = neighbour_list("d", atoms, cutoff=MODEL.r_max)
        sixth = (ARGON["sigma"] / d) ** 6
        pairs = (
            4 * ARGON["epsilon"] * (sixth**2 - sixth) * (1 - (d / MODEL.r_max) ** 2) ** smoothing
        )
        found.append(0.5 * pairs.sum() - 3.0 * len(atoms))
    return np.array(found)


def pressures_of(frames):
    """GPa, of argon: from its energies when scaled, and its velocities."""
    found = []
    for atoms in frames:
        scaled = [atoms.copy() for _ in range(2)]
        for other, sign in zip(scaled, (1, -1), strict=True):
            other.set_cell(atoms.cell * (1 + sign * 1e-4), scale_atoms=True)
        less, more = (other.get_volume() for other in reversed(scaled))
        static = -np.subtract(*energies_of(scaled)) / (more - less)
        found.append(
            (static + 2 * atoms.get_kinetic_energy() / (3 * atoms.get_volume())) / units.GPa
        )
    return np.array(found)


@pytest.fixture
def ample(monkeypatch):
    """Room enough for one program to last."""
    monkeypatch.setattr(placement, "HEADROOM", 2.5)
    monkeypatch.setattr(replicas, "HEADROOM", 2.5)


# --- mechanics ---------------------------------------------------------------------------------


def test_it_follows_ase_for_a_hundred_steps_through_many_lists(small):
    """Velocity Verlet of a hot crystal whose lists wear out, and whose cell holds images of a
    neighbour several times: the same trajectory to rounding."""
    model, params = small
    start = ase.build.bulk("NaCl", "rocksalt", 5.6, cubic=True)
    start.rattle(0.05, seed=1)
    start = md.thermal(start, 2000, seed=0)
    ours = md.Simulation(model, params, [start], skin=0.15, limits=ANYWAY)
    (found,) = ours.run(md.nve(), timestep=0.25, steps=100, interval=10)
    atoms = start.copy()
    atoms.calc = JaxftCalculator(model, params)
    positions, total, pressure = [], [], []
    for step, _ in enumerate(VelocityVerlet(atoms, 0.25 * units.fs).irun(100)):
        if step % 10 == 0:
            positions.append(atoms.positions.copy())
            total.append(atoms.get_total_energy())
            stress = atoms.get_stress(include_ideal_gas=True)
            pressure.append(-stress[:3].mean() / units.GPa)
    assert ours.rebuilds >= 3
    np.testing.assert_allclose(found.positions, positions, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.total, total, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.pressure, pressure, rtol=1e-7)


def test_energy_is_conserved_to_second_order_of_the_time_step():
    runs = []
    for timestep in (8.0, 4.0):
        simulation = md.Simulation(MODEL, PARAMS, [crystal()])
        steps = round(2000 / timestep)
        (found,) = simulation.run(md.nve(), timestep=timestep, steps=steps, interval=5)
        assert found.ended is None
        runs.append(drift(found))
    coarse, fine = runs
    assert abs(fine.slope) < 1e-3  # meV/atom/ps; the total kinetic energy is 5 meV/atom
    assert coarse.fluctuation / fine.fluctuation == pytest.approx(4.0, rel=0.15)


def test_lists_are_renewed_in_time(ample):
    """Along a melt, the energies are those of all pairs found anew."""
    simulation = md.Simulation(Abrupt(), PARAMS, [crystal(kelvin=800.0)], skin=0.5)
    (found,) = simulation.run(md.nve(), timestep=5.0, steps=100, interval=2)
    frames = [found.atoms(i) for i in range(len(found))]
    assert simulation.rebuilds > 3
    np.testing.assert_allclose(found.potential, energies_of(frames, 0), rtol=0, atol=1e-9)


def test_no_pair_is_missed_that_comes_from_beyond_the_skin():
    """Two atoms, just too far for the first list, fly at each other: the worst case of a skin."""
    pair = ase.Atoms("Ar2", [[0, 0, 0], [0, 0, MODEL.r_max + 0.51]], cell=[40.0] * 3)
    pair.set_velocities([[0, 0, 0.05], [0, 0, -0.05]])
    simulation = md.Simulation(Abrupt(), PARAMS, [pair], skin=0.5)
    (found,) = simulation.run(md.nve(), timestep=2.0, steps=40, interval=1)
    lengths = np.linalg.norm(found.positions[:, 1] - found.positions[:, 0], axis=1)
    assert lengths[-1] < MODEL.r_max
    frames = [found.atoms(i) for i in range(len(found))]
    np.testing.assert_allclose(found.potential, energies_of(frames, 0), rtol=0, atol=1e-9)


def test_float32_loses_nothing_far_from_the_origin():
    near, far = crystal(), crystal()
    far.positions += 1e5  # float32 resolves 8e-3 Å there
    found = [
        md.Simulation(MODEL, PARAMS, [atoms], dtype="float32").run(
            md.nve(), timestep=4.0, steps=100, interval=50
        )[0]
        for atoms in (near, far)
    ]
    np.testing.assert_allclose(found[0].potential, found[1].potential, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[0].positions, found[1].positions - 1e5, rtol=0, atol=1e-5)


def test_a_batch_does_what_each_replica_does_alone():
    """Of other sizes, boundaries, ensembles and temperatures."""
    starts = [crystal(kelvin=90.0), cluster(), crystal(seed=1)]
    ensembles = [md.npt(60.0, 0.1), md.langevin(30.0), md.bussi(80.0)]
    options = {"timestep": 4.0, "steps": 60, "interval": 20}
    together = md.Simulation(MODEL, PARAMS, starts, seeds=[5, 6, 7]).run(ensembles, **options)
    for atoms, ensemble, seed, found in zip(starts, ensembles, (5, 6, 7), together, strict=True):
        (alone,) = md.Simulation(MODEL, PARAMS, [atoms], seeds=[seed]).run(ensemble, **options)
        np.testing.assert_allclose(found.positions, alone.positions, rtol=0, atol=1e-9)
        np.testing.assert_allclose(found.total, alone.total, rtol=0, atol=1e-9)
        np.testing.assert_allclose(found.cells, alone.cells, rtol=0, atol=1e-9)


def test_seeds_decide_what_happens():
    def final(seed):
        simulation = md.Simulation(MODEL, PARAMS, [cluster()], seeds=[seed])
        return simulation.run(md.langevin(30.0), timestep=4.0, steps=20)[0].positions[-1]

    np.testing.assert_array_equal(final(1), final(1))
    assert np.abs(final(1) - final(2)).max() > 1e-3


def test_two_runs_are_one_run_in_two_parts():
    whole = md.Simulation(MODEL, PARAMS, [crystal()])
    (expected,) = whole.run(md.langevin(50.0), timestep=4.0, steps=40, interval=10)
    parts = md.Simulation(MODEL, PARAMS, [crystal()])
    (first,) = parts.run(md.langevin(50.0), timestep=4.0, steps=20, interval=10)
    (second,) = parts.run(md.langevin(50.0), timestep=4.0, steps=20, interval=10)
    np.testing.assert_array_equal(first.positions[-1], second.positions[0])
    np.testing.assert_array_equal(expected.positions[-1], second.positions[-1])
    np.testing.assert_allclose(second.times, expected.times[2:])


# --- capacity ----------------------------------------------------------------------------------


def test_edges_without_a_place_make_room_instead_of_vanishing(monkeypatch):
    """In blocks, whose rows do not share room."""
    options = {"timestep": 4.0, "steps": 20, "interval": 10}
    roomy = md.Simulation(MODEL, PARAMS, [crystal()])
    (expected,) = roomy.run(md.nve(), **options)
    assert roomy.compilations == 1
    monkeypatch.setattr(placement, "num_blocks", lambda *_: 3)
    tight = md.Simulation(MODEL, PARAMS, [crystal()])
    tight._replicas.layout = tight._replicas.layout._replace(n_row=3 * 8)
    (found,) = tight.run(md.nve(), **options)
    assert tight.compilations > 1
    assert tight._replicas.layout.n_row % 3 == 0
    np.testing.assert_allclose(found.total, expected.total, rtol=0, atol=1e-10)


# --- failures ----------------------------------------------------------------------------------


def test_a_replica_without_repulsion_collapses_and_the_others_go_on():
    """The same model; atoms that see each other fall into each other."""
    soft = PARAMS | {"repulsion": jnp.asarray(0.0)}
    apart = ase.Atoms("Ar2", [[0, 0, 0], [0, 0, 8.0]], cell=[30] * 3, pbc=True)
    close = ase.Atoms("Ar2", [[0, 0, 0], [0, 0, 3.0]], cell=[30] * 3, pbc=True)
    limits = md.Limits(temperature=np.inf)
    simulation = md.Simulation(MODEL, soft, [close, apart], limits=limits)
    collapsed, sound = simulation.run(md.nve(), timestep=1.0, steps=400, interval=10)
    assert "0.5 of the sum of their covalent radii" in collapsed.ended.reason
    assert 0 < collapsed.ended.time < 0.4
    assert collapsed.steps < 400
    assert collapsed.times[-1] < collapsed.ended.time
    assert np.isfinite(collapsed.positions).all()
    assert sound.ended is None
    assert len(sound) == 41


def test_parameters_that_are_not_numbers_are_reported():
    broken = PARAMS | {"sigma": jnp.asarray(np.nan)}
    (found,) = md.Simulation(MODEL, broken, [crystal()]).run(md.nve(), timestep=1.0, steps=5)
    assert found.ended == md.Ended(0.0, "energy or forces are not finite")
    assert len(found) == 0


def test_too_hot_and_overlapping_replicas_end_with_their_reason():
    hot, overlapping = crystal(kelvin=2e4), crystal()
    overlapping.positions[1] = overlapping.positions[0]
    limits = md.Limits(distance=0.0)
    simulation = md.Simulation(MODEL, FREE, [overlapping, hot], limits=limits)
    found = simulation.run(md.nve(), timestep=1.0, steps=20, interval=10)
    assert "remove the duplicate atom" in found[0].ended.reason
    assert found[1].ended.reason == "hotter than 10000 K"


def test_too_fast_and_evaporating_atoms_end_their_replicas(ample):
    fast, dimer = gas(), ase.Atoms("Ar2", [[0, 0, 0], [0, 0, 996.0]])
    fast.set_velocities(np.full((8, 3), 5.0))
    dimer.set_velocities([[0, 0, 0], [0, 0, 0.2]])
    starts = [fast, dimer, gas(seed=2)]
    simulation = md.Simulation(MODEL, FREE, starts, limits=ANYWAY, skin=8.0)
    outran, evaporated, sound = simulation.run(md.nve(), timestep=20.0, steps=30)
    assert "more than 4 Å in one step" in outran.ended.reason
    assert outran.steps == 0
    assert "Å apart" in evaporated.ended.reason
    assert 0 < evaporated.steps < 30
    assert sound.ended is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": 0.0}, "use positive numbers"),
        ({"steps": 0}, "use positive numbers"),
        ({"ensembles": [md.nve()] * 2}, "2 ensembles for 1 replicas"),
        ({"ensembles": md.npt(300.0)}, "constant pressure needs"),
    ],
)
def test_impossible_runs_are_refused(change, message):
    simulation = md.Simulation(MODEL, PARAMS, [cluster()])
    options = {"ensembles": md.nve(), "timestep": 1.0, "steps": 1} | change
    with pytest.raises(ValueError, match=message):
        simulation.run(**options)


@pytest.mark.parametrize("make", [lambda: md.langevin(-1.0), lambda: md.bussi(1.0, tau=0.0)])
def test_impossible_ensembles_are_refused(make):
    with pytest.raises(ValueError, match="is not possible"):
        make()


# --- statistical mechanics ---------------------------------------------------------------------


@pytest.mark.parametrize("thermostat", [md.langevin, md.bussi])
def test_kinetic_energies_are_distributed_as_boltzmann_says(thermostat):
    """Of an ideal gas: the mean is kT/2 per degree of freedom, the variance 2 T²/degrees."""
    starts = [md.thermal(atoms, 600.0, seed=i) for i, atoms in enumerate(gases())]
    simulation = md.Simulation(SHORT, FREE, starts, limits=ANYWAY, skin=4.0)
    ensemble = thermostat(300.0, tau=10.0)
    found = simulation.run(ensemble, timestep=2.0, steps=1000, interval=20)
    temperatures = np.concatenate([t.temperature[5:] for t in found])
    degrees = ensemble.degrees_of_freedom(4)
    spread = 300 * np.sqrt(2 / degrees)
    error = spread / np.sqrt(len(temperatures) / 1.5)
    assert temperatures.mean() == pytest.approx(300, abs=4 * error)
    assert temperatures.std() == pytest.approx(spread, rel=0.05)


def test_langevin_samples_a_spring_exactly_at_a_large_time_step():
    """BAOAB's configurations of a harmonic oscillator do not depend on the time step: here half a
    radian, where velocity Verlet's would be 6 % too wide."""
    k, r0, kelvin = 5.0, 3.0, 100.0
    params = {"k": jnp.asarray(k), "r0": jnp.asarray(r0)}
    start = ase.Atoms("Ar2", [[0, 0, 0], [0, 0, r0]])
    omega = np.sqrt(k / (start.get_masses()[0] / 2))
    timestep = 0.5 / omega / units.fs
    starts = [md.thermal(start, kelvin, seed=i) for i in range(48)]
    simulation = md.Simulation(Springs(), params, starts, limits=ANYWAY, skin=4.0)
    ensemble = md.langevin(kelvin, tau=2 * timestep)
    found = simulation.run(ensemble, timestep=timestep, steps=1000, interval=10)
    lengths = np.concatenate(
        [np.linalg.norm(t.positions[5:, 0] - t.positions[5:, 1], axis=1) for t in found]
    )
    r = np.linspace(2.0, 4.0, 4001)
    weight = r**2 * np.exp(-0.5 * k * (r - r0) ** 2 / (units.kB * kelvin))
    mean = (weight * r).sum() / weight.sum()
    variance = (weight * (r - mean) ** 2).sum() / weight.sum()
    assert lengths.var() == pytest.approx(variance, rel=0.04)
    assert lengths.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / len(lengths) * 2))


def test_the_volume_of_an_ideal_gas_is_distributed_as_it_must():
    """Its centre of mass rests, p(V) ~ V^(n-1) exp(-PV/kT): mean n kT/P, variance mean²/n."""
    n, kelvin = 4, 300.0
    pressure = n * units.kB * kelvin / 15.0**3 / units.GPa
    ensemble = md.npt(kelvin, pressure, tau=20.0, tau_pressure=50.0, compressibility=1 / pressure)
    simulation = md.Simulation(SHORT, FREE, gases(), limits=ANYWAY, skin=4.0)
    found = simulation.run(ensemble, timestep=2.0, steps=1500, interval=50)
    volumes = np.concatenate([np.linalg.det(t.cells[8:]) for t in found]) / 15.0**3
    assert volumes.mean() == pytest.approx(1.0, abs=0.05)
    assert volumes.std() == pytest.approx(np.sqrt(1 / n), rel=0.1)
    measured = np.concatenate([t.pressure[8:] for t in found])
    assert measured.mean() == pytest.approx(pressure, rel=0.08)


def test_constant_pressure_reaches_the_pressure_that_was_asked_for():
    simulation = md.Simulation(MODEL, PARAMS, [crystal(kelvin=20.0)], limits=ANYWAY)
    ensemble = md.npt(20.0, 0.2, tau_pressure=200.0, compressibility=0.3)
    (found,) = simulation.run(ensemble, timestep=4.0, steps=800, interval=10)
    half = len(found) // 2
    assert found.pressure[0] < 0.05
    assert found.pressure[half:].mean() == pytest.approx(0.2, abs=0.03)


def test_the_volume_follows_the_cell_within_a_list_and_from_list_to_list():
    """A crystal is compressed through many lists and through few: the same trajectory, with the
    pressures of its frames by themselves."""
    ensemble = md.npt(40.0, 0.3, tau_pressure=200.0, compressibility=0.3)
    found, lists = [], []
    for skin in (0.7, 1.0):
        simulation = md.Simulation(MODEL, PARAMS, [crystal()], skin=skin, limits=ANYWAY)
        found += simulation.run(ensemble, timestep=4.0, steps=150, interval=15)
        lists.append(simulation.rebuilds)
    often, rarely = found
    assert lists[0] > lists[1]
    volumes = np.linalg.det(rarely.cells)
    assert volumes.min() < 0.95 * volumes[0]
    np.testing.assert_allclose(often.cells, rarely.cells, rtol=0, atol=1e-9)
    np.testing.assert_allclose(often.positions, rarely.positions, rtol=0, atol=1e-9)
    expected = pressures_of([rarely.atoms(i) for i in range(len(rarely))])
    for run in found:
        np.testing.assert_allclose(run.pressure, expected, rtol=0, atol=1e-5)


# --- trajectories ------------------------------------------------------------------------------


def test_trajectories_are_written_once_and_read_back(tmp_path):
    (found,) = md.Simulation(MODEL, PARAMS, [crystal()]).run(
        md.nve(), timestep=4.0, steps=10, interval=2
    )
    path = tmp_path / "run.xyz"
    assert found.write(path, stride=2) == 3
    frames = ase.io.read(path, index=":")
    np.testing.assert_allclose(
        [a.get_total_energy() for a in frames], found.total[::2], rtol=0, atol=1e-5
    )
    with pytest.raises(FileExistsError):
        found.write(path)


def test_the_cells_own_motion_is_no_diffusion():
    atoms = crystal()
    scales = np.linspace(1.0, 1.1, 5)
    n = len(atoms)
    empty = np.zeros(5)
    found = md.Trajectory(
        atoms,
        np.arange(5.0),
        scales[:, None, None] * atoms.positions,
        np.zeros((5, n, 3)),
        scales[:, None, None] * atoms.cell.array,
        *[empty] * 4,
    )
    assert np.ptp(found.positions, axis=0).max() > 0.5
    assert np.ptp(found.unstrained(), axis=0).max() < 1e-12
