"""Thermal conductivity of third order: symmetry, the classical limit, scaled forces, refusals."""

import sys
from dataclasses import replace

import ase.build
import numpy as np
import pytest
from ase.calculators.lj import LennardJones

pytest.importorskip("phonopy")
pytest.importorskip("seekpath")

from jaxft.evaluate.candidate import AseCandidate, Flag
from jaxft.evaluate.crystals import crystal_of
from jaxft.evaluate.kappa import conductivities, phono3py_api
from jaxft.evaluate.phonon_tasks import Options, ground_of, solve_all
from jaxft.evaluate.phonons import phonons

OPTIONS = Options(
    mesh=15.0, kappa=True, kappa_mesh=15.0, kappa_length=10.0, temperatures=(20.0, 500.0, 1000.0)
)
DEEPER = 4
"""A power of two scales every number exactly: which scattering events conserve energy on a coarse
mesh is otherwise a matter of rounding."""


class Counted(AseCandidate):
    """Of Lennard-Jones argon."""

    cells = 0

    def evaluate(self, structures, progress=None):
        object.__setattr__(self, "cells", self.cells + len(structures))
        return super().evaluate(structures, progress)


def argon(name, depth=1.0):
    return Counted(name, LennardJones(sigma=3.4, epsilon=0.0104 * depth, rc=8.0, smooth=True))


def crystal(a=5.25):
    return crystal_of(ase.build.bulk("Ar", "fcc", a=a, cubic=True), "Ar", (2, 2, 2))


@pytest.fixture(scope="module")
def finding():
    pytest.importorskip("phono3py")
    judged = [argon("argon"), argon("deep", DEEPER)]
    return phonons(judged, [crystal()], OPTIONS, reference="argon")


def kappa(finding, model):
    rows = [r for r in finding.rows if r.model == model and "kappa" in r.values]
    return {column: [r.values.get(column) for r in rows] for column in rows[0].values}


def test_a_cubic_crystal_conducts_alike_in_all_directions(finding):
    assert not finding.flags
    found = kappa(finding, "argon")
    assert len(found["kappa"]) == 3
    np.testing.assert_allclose(found["kappa_lowest"], found["kappa_highest"], rtol=1e-8)
    np.testing.assert_allclose(found["kappa_lowest"], found["kappa"], rtol=1e-8)
    assert 0.01 < found["kappa"][1] < 1


def test_it_falls_as_one_over_the_temperature_where_modes_are_classical(finding):
    cold, warm, hot = kappa(finding, "argon")["kappa"]
    assert warm == pytest.approx(2 * hot, rel=1e-3)
    assert cold * 20 != pytest.approx(1000 * hot, rel=0.05)  # not where they are not


def test_it_grows_as_energies_to_the_power_of_three_halves(finding):
    """v² ∝ s, and a mode lives √s as long: its scattering rate is ∝ s² ω^-5 T."""
    ours, theirs = kappa(finding, "deep"), kappa(finding, "argon")
    ratio = DEEPER**1.5
    assert ours["kappa"][-1] / theirs["kappa"][-1] == pytest.approx(ratio, rel=0.02)
    expected = 2 * (ratio - 1) / (ratio + 1)
    assert ours["kappa_srd"][-1] == pytest.approx(expected, rel=0.01)
    # all modes alike: nothing cancels
    assert ours["kappa_srme"][-1] == pytest.approx(expected, rel=0.01)


def test_an_unstable_crystal_has_none_and_costs_nothing():
    pytest.importorskip("phono3py")
    model = argon("argon")
    ground = ground_of(crystal(a=6.6), OPTIONS)  # far beyond the inflection of the potential
    solved = solve_all(model, {"Ar": ground, "none": Flag("no cell")}, OPTIONS)
    before = model.cells
    found = conductivities(model, solved, OPTIONS)
    assert "imaginary" in found["Ar"].reason
    assert found["none"].reason == "no cell"
    assert model.cells == before


def test_a_failure_in_a_displaced_cell_is_a_flag():
    pytest.importorskip("phono3py")

    class Explodes(Counted):
        def evaluate(self, structures, progress=None):
            found = super().evaluate(structures, progress)
            return [*found[:-1], Flag("not finite")]

    sound = argon("argon")
    solved = solve_all(sound, {"Ar": ground_of(crystal(), OPTIONS)}, OPTIONS)
    (found,) = conductivities(Explodes("bad", sound.calculator), solved, OPTIONS).values()
    assert found.reason.startswith("no kappa: not finite (1 of ")


def test_a_mesh_without_scattering_is_flagged():
    """Γ alone carries nothing."""
    pytest.importorskip("phono3py")
    options = replace(OPTIONS, kappa_mesh=3.0, kappa_length=5.0)
    model = argon("argon")
    solved = solve_all(model, {"Ar": ground_of(crystal(), options)}, options)
    (found,) = conductivities(model, solved, options).values()
    assert "kappa_mesh" in found.reason


def test_without_phono3py_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "phono3py", None)
    with pytest.raises(ModuleNotFoundError, match=r"jaxft\[phonons,phono3py\]"):
        phono3py_api()
    with pytest.raises(ModuleNotFoundError, match="phono3py"):
        phonons([argon("argon")], [crystal()], OPTIONS)
    with pytest.raises(ValueError, match="kappa_mesh=0"):
        replace(OPTIONS, kappa_mesh=0.0)
