"""What is measured of trajectories, where the answer is known."""

import ase.build
import numpy as np
import pytest
from ase import units

from jaxft.md.diffusion import (
    Diffusion,
    arrhenius,
    diffusion,
    mean_squared_displacement,
    without_drift,
)
from jaxft.md.drift import drift
from jaxft.md.rdf import Rdf, earth_mover, rdf, rdf_error
from jaxft.md.spectrum import spectrum, spectrum_error
from jaxft.md.trajectory import Trajectory


def ideal_gas(count, n=200, edge=12.0, seed=0):
    rng = np.random.default_rng(seed)
    cell = np.array([[edge, 0, 0], [2.0, edge, 0], [0, 1.0, edge]])
    return [
        ase.Atoms("He" * (n // 2) + "Ar" * (n // 2), rng.random((n, 3)) @ cell, cell=cell, pbc=True)
        for _ in range(count)
    ]


@pytest.mark.parametrize("pair", [None, ("He", "Ar"), ("Ar", "Ar")])
def test_an_ideal_gas_has_no_structure(pair):
    found = rdf(ideal_gas(50), bins=12, pair=pair)
    assert found.r[-1] == pytest.approx(0.5 * 12.0 * 23 / 24)
    np.testing.assert_allclose(found.g[4:], 1.0, atol=0.03)
    assert found.g.mean() == pytest.approx(1.0, abs=0.05)


def test_the_shells_of_a_crystal_hold_its_neighbours():
    simple_cubic = ase.Atoms("Ar", cell=[3.0] * 3, pbc=True) * (4, 4, 4)
    found = rdf([simple_cubic], r_max=5.0, bins=500)
    density = (len(simple_cubic) - 1) / simple_cubic.get_volume()  # other atoms
    counts = found.g * density * 4 / 3 * np.pi * np.diff(np.linspace(0, 5, 501) ** 3)
    shells = {round(float(r), 1): n for r, n in zip(found.r, counts, strict=True) if n > 0.1}
    assert shells == pytest.approx({3.0: 6.0, 4.2: 12.0}, abs=1e-6)


def test_distances_between_distribution_functions():
    r = np.linspace(0.005, 4.995, 500)
    one, two = (np.exp(-0.5 * ((r - mid) / 0.1) ** 2) for mid in (2.0, 2.7))
    first, second = Rdf(r, one), Rdf(r, 3 * two)
    assert earth_mover(first, second) == pytest.approx(0.7, abs=1e-6)
    assert earth_mover(first, first) == rdf_error(first, first) == 0.0
    assert rdf_error(first, Rdf(r, np.ones(500))) == pytest.approx(100.0)
    half = Rdf(r, 0.5 * (one + 1))
    assert rdf_error(first, half) == pytest.approx(50.0)
    with pytest.raises(ValueError, match="use the same r_max and bins"):
        earth_mover(first, Rdf(r[:-1], one[:-1]))


def test_what_has_no_density_is_refused():
    with pytest.raises(ValueError, match="periodic in three directions"):
        rdf([ase.build.molecule("H2O")])
    with pytest.raises(ValueError, match="has no pair of"):
        rdf(ideal_gas(1), pair=("He", "Xe"))


def test_displacements_agree_with_the_plain_sum():
    positions = np.random.default_rng(0).normal(size=(30, 4, 3)).cumsum(0) + 100.0
    expected = [
        ((positions[lag:] - positions[: 30 - lag]) ** 2).sum(-1).mean() for lag in range(30)
    ]
    np.testing.assert_allclose(mean_squared_displacement(positions), expected, atol=1e-9)


def test_free_flight_is_quadratic():
    times, velocities = np.arange(20.0), np.random.default_rng(1).normal(size=(5, 3))
    positions = times[:, None, None] * velocities
    found = mean_squared_displacement(positions)
    np.testing.assert_allclose(found, (velocities**2).sum(1).mean() * times**2, atol=1e-9)
    assert np.ptp(without_drift(positions + 3.0 * times[:, None, None], np.ones(5)).mean(1)) < 1e-12


def brownian(seed, n_frame=1500, n=8, step=0.3):
    rng = np.random.default_rng(seed)
    return rng.normal(scale=step, size=(n_frame, n, 3)).cumsum(0)


def test_brownian_motion_gives_its_coefficient_and_an_honest_error():
    """D = step²/(2 interval); deviations of many measurements are as large as their errors say."""
    interval = 0.02
    expected = 0.3**2 / (2 * interval)
    found = [diffusion([brownian(2 * i), brownian(2 * i + 1)], interval) for i in range(40)]
    scaled = np.array([(d.value - expected) / d.error for d in found])
    assert np.mean([d.value for d in found]) == pytest.approx(expected, rel=0.02)
    assert 0.7 < np.sqrt((scaled**2).mean()) < 1.6
    assert found[0].window == pytest.approx((0.02 * 38, 0.02 * 188), abs=0.03)


def test_too_short_a_run_gives_no_coefficient():
    with pytest.raises(ValueError, match="too few"):
        diffusion([brownian(0, n_frame=12)], 1.0)


def test_arrhenius_law_is_recovered_with_its_error():
    temperatures = [300.0, 400.0, 600.0, 900.0]
    exact = [2.0 * np.exp(-0.25 / (units.kB * t)) for t in temperatures]
    law = arrhenius(temperatures, [Diffusion(d, 0.1 * d, (0, 1)) for d in exact])
    assert (law.energy, law.prefactor) == pytest.approx((0.25, 2.0))
    rng = np.random.default_rng(0)
    energies = [
        arrhenius(
            temperatures,
            [Diffusion(d * np.exp(0.1 * rng.normal()), 0.1 * d, (0, 1)) for d in exact],
        ).energy
        for _ in range(300)
    ]
    assert np.std(energies) == pytest.approx(law.error, rel=0.15)
    with pytest.raises(ValueError, match="two temperatures"):
        arrhenius([300.0], [Diffusion(1.0, 0.1, (0, 1))])
    with pytest.raises(ValueError, match="nothing diffuses"):
        arrhenius([300.0, 400.0], [Diffusion(-1.0, 0.1, (0, 1))] * 2)


def oscillators(frequencies, n_frame=2000, interval=0.002, seed=0):
    rng = np.random.default_rng(seed)
    times = interval * np.arange(n_frame)
    phases = rng.uniform(0, 2 * np.pi, len(frequencies))
    amplitudes = rng.uniform(0.5, 2.0, len(frequencies))
    waves = amplitudes * np.cos(2 * np.pi * times[:, None] * frequencies + phases)
    return waves.reshape(n_frame, -1, 3)


def test_oscillators_have_peaks_at_their_frequencies_with_equal_weight():
    found = spectrum([oscillators(np.array([5.0, 5.0, 20.0]))], 0.002)
    spacing = found.frequency[1]
    assert found.density.sum() * spacing == pytest.approx(1.0)
    assert found.frequency[found.density.argmax()] == pytest.approx(5.0, abs=spacing)
    low = found.frequency < 12.0
    assert found.density[low].sum() * spacing == pytest.approx(2 / 3, abs=1e-4)
    near = (np.abs(found.frequency - 5.0) < 3 * spacing) | (np.abs(found.frequency - 20) < 0.75)
    assert found.density[near].sum() * spacing > 0.999  # without the window, 0.97


def test_spectra_are_compared_in_units_of_their_spread():
    low, high = np.array([4.0, 4.0, 4.0]), np.array([6.0, 6.0, 6.0])
    one = spectrum([np.concatenate([oscillators(low), oscillators(high)], axis=1)], 0.002)
    assert spectrum_error(one, one) == 0.0
    shifted = [np.concatenate([oscillators(low + 0.5), oscillators(high - 0.5)], axis=1)]
    assert spectrum_error(one, spectrum(shifted, 0.002)) == pytest.approx(50.0, abs=2.0)
    with pytest.raises(ValueError, match="nothing moves"):
        spectrum([np.zeros((100, 2, 3))], 0.002)
    with pytest.raises(ValueError, match="equal lengths"):
        spectrum([np.ones((100, 2, 3)), np.ones((90, 2, 3))], 0.002)


def test_a_drift_is_a_slope_per_atom():
    atoms = ase.Atoms("Ar4")
    times = np.linspace(0, 2.0, 21)
    wave = 0.001 * (-1.0) ** np.arange(21)
    found = drift(
        Trajectory(
            atoms,
            times,
            np.zeros((21, 4, 3)),
            np.zeros((21, 4, 3)),
            np.zeros((21, 3, 3)),
            -3.0 + 0.008 * times,
            4 * wave,
            np.zeros(21),
            np.zeros(21),
        )
    )
    assert found.slope == pytest.approx(2.0, abs=0.05)
    assert found.fluctuation == pytest.approx(1.0, rel=0.02)
