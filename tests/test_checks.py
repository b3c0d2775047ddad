"""Every check that a comparison knows: its options, its headlines, its failures."""

import sys

import ase.build
import ase.io
import numpy as np
import pytest
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from matscipy.neighbours import neighbour_list

from jaxft.evaluate import compare
from jaxft.evaluate.bindings import Headline
from jaxft.evaluate.candidate import AseCandidate
from jaxft.evaluate.checks import CHECKS
from jaxft.evaluate.compare import FAILED

R_MAX = 6.0
"""Å; longer than the cells are thick."""


class Pairs(Calculator):
    """Lennard-Jones argon with a smooth end; its failures are an argument."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012

    def __init__(self, epsilon=0.0104, fails=None):
        super().__init__()
        self.epsilon, self.fails = epsilon, fails

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        if self.fails == "raises":
            raise RuntimeError("no such kernel")
        boxed = self.atoms.copy()
        if boxed.cell.rank < 3:
            boxed.center(vacuum=R_MAX)
        i, r, vectors = neighbour_list("idD", boxed, R_MAX)
        if (r < 1e-6).any():
            raise ValueError("two atoms are in one place")
        u, end = (3.4 / r) ** 6, 1 - (r / R_MAX) ** 2
        pair = 4 * self.epsilon * (u**2 - u)
        slope = 4 * self.epsilon * (6 * u - 12 * u**2) / r * end**3
        slope -= 6 * pair * end**2 * r / R_MAX**2
        energy = 0.5 * (pair * end**3).sum()
        pulls = (slope / r)[:, None] * vectors
        forces = np.zeros((len(self.atoms), 3))
        np.add.at(forces, i, pulls)
        if self.fails == "explodes":
            energy, forces = np.nan, forces * np.nan
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}
        if self.atoms.pbc.all():
            stress = 0.5 * pulls.T @ vectors / self.atoms.get_volume()
            self.results["stress"] = full_3x3_to_voigt_6_stress((stress + stress.T) / 2)


BASE = AseCandidate("base", Pairs())
TUNED = AseCandidate("tuned", Pairs(epsilon=0.0094))
NAN = AseCandidate("nan", Pairs(fails="explodes"))
RAISES = AseCandidate("raises", Pairs(fails="raises"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One crystal that is sound and one with two atoms in one place; frames with labels."""
    folder = tmp_path_factory.mktemp("checks")
    argon = ase.build.bulk("Ar", "fcc", 5.25)
    ase.io.write(folder / "sound.xyz", argon)
    double = ase.build.bulk("Ar", "fcc", 5.25, cubic=True)
    double.positions[1] = double.positions[0]
    ase.io.write(folder / "double.xyz", double)
    rattled = []
    for seed in range(4):
        atoms = ase.build.bulk("Ar", "fcc", 5.25, cubic=True)
        atoms.rattle(0.1, seed=seed)
        atoms.calc = Pairs(epsilon=0.01)
        labels = atoms.get_potential_energy(), atoms.get_forces()
        bare = atoms.copy()
        bare.info["REF_energy"], bare.arrays["REF_forces"] = labels
        rattled.append(bare)
    ase.io.write(folder / "frames.xyz", rattled)
    wrong = double.copy()
    wrong.info["REF_energy"], wrong.arrays["REF_forces"] = 0.0, np.zeros((4, 3))
    ase.io.write(folder / "spoiled.xyz", [*rattled, wrong])
    ase.io.write(folder / "large.xyz", argon.repeat(2))
    bare = [ase.Atoms(a.numbers, a.positions, cell=a.cell, pbc=True) for a in rattled]
    ase.io.write(folder / "bare.xyz", bare)
    return folder


def options(folder, name, *, frames="spoiled.xyz"):
    """The cheapest that every check can be asked, with all that can go wrong in structures."""
    sound, double = folder / "sound.xyz", folder / "double.xyz"
    labelled = {"frames": folder / frames}
    two = {"structures": {"Ar": sound, "double": double}}
    return {
        "errors": labelled,
        "forget": labelled | {"base": "base"},
        "softening": labelled,
        "phonons": {
            "crystals": {
                "Ar": {"file": sound, "supercell": (2, 2, 2)},
                "double": {"file": double, "supercell": (1, 1, 1)},
            },
            "reference": "base",
            "options": {"mesh": 10.0},
        },
        "phase": two | {"expected": {"Ar": "R3m"}, "protocol": {"min_length": 5.0}},
        "eos": two | {"against": "base", "points": 5},
        "elastic": two | {"against": "base"},
        "relax": two,
        "diatomics": {"elements": ["Ar"], "against": "base", "points": 30, "shortest": 1.0},
        "smoothness": two | {"r_max": R_MAX},
        "rss": {
            "structures": {"Ar4": folder / "frames.xyz"},
            "pressures": [0.1],
            "rounds": 1,
            "steps": 5,
        },
        "md": {
            "structures": {"Ar": folder / "large.xyz", "double": double},
            "plan": {"steps": 5, "interval": 1, "temperatures": [10.0]},
        },
        "uncertainty": labelled | {"ensembles": {"both": ["base", "tuned"]}},
    }[name]


def run(folder, name, candidates, **choice):
    check = CHECKS[name]
    bound = check.bind(check.options.model_validate(options(folder, name, **choice)))
    return compare.run_check(name, bound, candidates)


@pytest.mark.parametrize("name", CHECKS)
def test_bad_models_and_bad_structures_are_flagged_and_the_rest_is_intact(folder, name):
    """Of four models one explodes and one raises; in one structure two atoms are in one place."""
    found, alone = (run(folder, name, c) for c in ([BASE, TUNED, NAN, RAISES], [BASE, TUNED]))
    assert found.check == name
    assert FAILED not in {row.subject for row in found.rows}, found.flags
    for headline in CHECKS[name].headlines:
        assert headline.column in found.units
        number = headline.of(found, "tuned")
        assert np.isfinite(number), headline
        assert number == headline.of(alone, "tuned")
        assert headline.of(found, "nan") in (None, 0.0, 100.0)  # nothing survives, all are holes
    for model in ("nan", "raises") if CHECKS[name].of_models else ():
        assert any(row.flag for row in found.of(model)), model
    if CHECKS[name].of_models:
        assert any("no such kernel" in row.flag for row in found.of("raises") if row.flag)
    if name not in ("diatomics", "rss"):
        assert any("one place" in r.flag or "double" in r.subject for r in alone.flags), alone.rows


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("errors", "has a label"),
        ("softening", "none of 4 frames has forces"),
        ("forget", "No frame is labelled"),
        ("uncertainty", "No frame is labelled"),
    ],
)
def test_missing_labels_are_told(folder, name, words):
    found = run(folder, name, [BASE, TUNED], frames="bare.xyz")
    for headline in CHECKS[name].headlines:
        if headline.column != "forces_drift":
            assert headline.of(found, "tuned") is None
    assert words in " ".join([*(row.flag or "" for row in found.rows), *found.notes])


@pytest.mark.parametrize(
    ("name", "package"),
    [("phonons", "phonopy"), ("phase", "phonopy"), ("relax", "spglib"), ("rss", "pyxtal")],
)
def test_a_missing_package_is_a_reason_and_other_checks_go_on(folder, name, package, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, module, None)
    given = options(folder, name) | ({"structures": {"Ar4": 3}} if name == "rss" else {})
    check, errors = CHECKS[name], CHECKS["errors"]
    bound = {
        name: check.bind(check.options.model_validate(given)),
        "errors": errors.bind(errors.options.model_validate(options(folder, "errors"))),
    }
    found = compare.compare([BASE, TUNED], bound)
    missing, other, _ = found.findings
    assert [row.model for row in missing.flags] == ["base", "tuned"]
    assert all(package in row.flag and "jaxft[" in row.flag for row in missing.flags)
    assert Headline("forces_rmse", "total").of(other, "tuned") > 0
    assert f"Without a number here: {name}" in " ".join(found.summary.notes)
    assert f"{name} (1)" in found.summary.rows[0].flag


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_refuses_what_it_is_not_asked(folder, name):
    given = options(folder, name)
    with pytest.raises(ValueError, match="unheard_of"):
        CHECKS[name].options.model_validate(given | {"unheard_of": 1})
    nested = [key for key in ("options", "plan", "protocol") if key in given]
    for key in nested:
        with pytest.raises(ValueError, match="unheard_of"):
            CHECKS[name].options.model_validate(given | {key: {"unheard_of": 1}})
    assert not set(CHECKS[name].options.model_fields) & {"progress", "trajectories"}
