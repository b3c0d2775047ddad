"""The label audit: silent on sound sets, and each defect found when it is put in."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import ase
import ase.build
import numpy as np
import pytest
from ase import units
from ase.calculators.emt import EMT
from rich.console import Console

from jaxft import data
from jaxft.data.audit_trends import trends

RESERVED = data.Keys(energy="energy", forces="forces", stress="stress", virials="virial")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "data"


def computed(atoms, kind, number):
    """Energy, forces and stress of effective medium theory: they belong together."""
    atoms.calc = EMT()
    return data.Frame(
        atoms.numbers,
        atoms.positions,
        atoms.cell.array,
        tuple(bool(p) for p in atoms.pbc),
        energy=float(atoms.get_potential_energy()),
        forces=atoms.get_forces(),
        stress=atoms.get_stress(voigt=False) if atoms.pbc.all() else None,
        config_type=kind,
        source=f"{kind}:{number}",
    )


@pytest.fixture(scope="module")
def sound():
    """Isolated atoms; rattled, and strained, Cu, Ni and CuNi; molecules."""
    rng = np.random.default_rng(0)
    frames = [computed(ase.Atoms(s), "IsolatedAtom", s) for s in ("Cu", "Ni", "H", "C", "O")]
    for symbols in ("Cu4", "CuNiCu2", "Ni4"):
        cell = ase.build.bulk("Cu", cubic=True, a=3.6)
        cell.symbols[:] = ase.Atoms(symbols).symbols
        for k in range(8):
            rattled = cell.copy()
            rattled.positions += rng.normal(scale=0.05, size=(4, 3))
            frames.append(computed(rattled, "rattled", len(frames)))
            strained = cell.copy()
            strain = rng.normal(scale=0.01, size=(3, 3)) + np.eye(3) * (1 + 0.005 * k)
            strained.set_cell(cell.cell @ (strain + strain.T) / 2, scale_atoms=True)
            frames.append(computed(strained, "strained", len(frames)))
    frames.append(computed(cell.repeat((2, 1, 1)), "large", len(frames)))
    for name in ("CH3OH", "H2O"):
        for _ in range(4):
            molecule = ase.build.molecule(name)
            molecule.positions += rng.normal(scale=0.02, size=(len(molecule), 3))
            frames.append(computed(molecule, "molecule", len(frames)))
    return frames


def names(frames, **options):
    return {f.name: f for f in data.audit(frames, **options).findings}


def changed(frames, kind, **change):
    """The frames, those of one kind with functions of the frame for fields."""
    return [
        replace(f, **{k: v(f) for k, v in change.items()}) if f.config_type == kind else f
        for f in frames
    ]


def one(frames, kind="rattled", **change):
    """The frames, the first of a kind changed."""
    index = next(i for i, f in enumerate(frames) if f.config_type == kind)
    fields = {k: v(frames[index]) for k, v in change.items()}
    return [*frames[:index], replace(frames[index], **fields), *frames[index + 1 :]]


# --- sound sets -----------------------------------------------------------------------------------


def test_a_sound_set_gives_one_note(sound):
    found = data.audit(sound)
    assert [(f.name, f.severity, f.count) for f in found.findings] == [
        ("isolated-atoms", "note", 5)
    ]
    assert found.is_ok
    kinds = {k.config_type: k for k in found.kinds}
    assert (kinds["rattled"].frames, kinds["rattled"].atoms, kinds["rattled"].stress) == (
        24,
        96,
        24,
    )
    assert (kinds["molecule"].forces, kinds["molecule"].stress) == (8, 0)
    assert found.elements == {"H": 25, "C": 5, "O": 9, "Ni": 89, "Cu": 113}
    assert found.rank == 4, "CH3OH and H2O leave one sum of H, C and O open"
    assert found.undetermined == ("H", "C", "O")
    sizes = np.linalg.norm(np.concatenate([f.forces for f in sound[5:]]), axis=1)
    assert found.forces["max"] == pytest.approx(sizes.max())
    assert found.forces["rms"] == pytest.approx(np.sqrt(np.mean(sizes**2) / 3))


def test_energies_follow_forces_and_stress_with_slope_one(sound):
    found = {trend.label: trend for trend in data.audit(sound).trends}
    for label in ("forces", "stress"):
        # trapezoid rule over 0.1 Å and 5 %
        assert found[label].slope == pytest.approx(1, abs=0.05)
        assert found[label].agreement > 0.95
        assert found[label].pairs >= 30


def test_the_choice_of_periodic_images_changes_no_trend(sound):
    rng = np.random.default_rng(2)
    moved = [
        replace(f, positions=f.positions + rng.integers(-1, 2, size=(len(f), 3)) @ f.cell)
        for f in sound
    ]
    for ours, expected in zip(trends(moved)[0], trends(sound)[0], strict=True):
        assert ours.pairs == expected.pairs
        assert ours.slope == pytest.approx(expected.slope, rel=1e-6)


def test_the_work_of_stress_is_told_from_that_of_forces():
    rng = np.random.default_rng(3)
    frames = []
    for k in range(12):
        atoms = ase.build.bulk("Cu", cubic=True, a=3.6)
        atoms.set_cell(atoms.cell * (1 + 0.002 * k), scale_atoms=True)
        atoms.positions += rng.normal(scale=0.01, size=(4, 3))
        atoms.positions[0] += 0.003 * k
        frames.append(computed(atoms, "both", k))
    (stress,) = (t for t in trends(frames)[0] if t.label == "stress")
    assert stress.slope == pytest.approx(1, abs=0.02)
    assert stress.agreement == 1


@pytest.mark.parametrize("name", ["base", "ethanol", "nacl"])
def test_the_benchmarks_own_sets_have_no_errors_and_few_warnings(name):
    files = [BENCHMARKS / f"{name}_{part}.xyz" for part in ("atoms", "train", "test")]
    found = data.audit(data.read(files))
    assert found.is_ok
    assert [f.name for f in found.findings if f.severity == "warning"] == []


# --- labels ---------------------------------------------------------------------------------------


def test_frames_without_labels_are_found(sound):
    bare = {"energy": lambda f: None, "forces": lambda f: None, "stress": lambda f: None}
    found = names(one(sound, **bare))["unlabelled-frames"]
    assert (found.count, found.sources) == (1, ("rattled:5",))
    everything = [replace(f, energy=None, forces=None, stress=None) for f in sound]
    assert names(everything)["no-labels"].severity == "error"


def test_placeholder_zeros_are_errors(sound):
    for label, zero in (
        ("energy", lambda f: 0.0),
        ("forces", lambda f: 0 * f.forces),
        ("stress", lambda f: 0 * f.stress),
    ):
        found = names(one(sound, **{label: zero}))[f"zero-{label}"]
        assert (found.severity, found.count, found.sources) == ("error", 1, ("rattled:5",))


def test_zero_forces_are_right_where_symmetry_asks_for_them(sound):
    assert "zero-forces" not in names(changed(sound, "strained", forces=lambda f: 0 * f.forces))


def test_zeroed_forces_of_some_atoms_are_found(sound):
    frozen = one(sound, forces=lambda f: f.forces * (np.arange(4) > 0)[:, None])
    assert names(frozen)["frozen-atoms"].severity == "warning"


def test_large_and_unbalanced_forces_are_found(sound):
    push = np.array([0.1, 0, 0])
    assert names(one(sound, forces=lambda f: f.forces + push))["net-force"].count == 1
    assert names(one(sound, forces=lambda f: f.forces + 60 * (np.arange(4) - 1.5)[:, None]))[
        "large-forces"
    ].sources == ("rattled:5",)


def test_forces_of_another_orientation_turn_the_molecule(sound):
    turned = changed(sound, "molecule", forces=lambda f: f.forces[:, [1, 2, 0]])
    assert names(turned)["net-torque"].count >= 4


def test_stresses_of_wrong_size_shape_or_place_are_found(sound):
    skew = np.array([[0, 0.1, 0], [0, 0, 0], [0, 0, 0]])
    assert names(one(sound, stress=lambda f: f.stress + skew))["asymmetric-stress"].count == 1
    assert names(one(sound, stress=lambda f: f.stress + np.eye(3)))["high-pressure"].count == 1
    in_kbar = changed(sound, "rattled", stress=lambda f: -1602 * f.stress)
    found = names(changed(in_kbar, "strained", stress=lambda f: -1602 * f.stress))
    assert found["stress-size"].severity == "error"
    useless = one(sound, "molecule", stress=lambda f: np.eye(3))
    assert names(useless)["stress-without-volume"].severity == "note"


# --- energies -------------------------------------------------------------------------------------


def test_an_energy_that_is_off_is_found(sound):
    found = names(one(sound, energy=lambda f: f.energy + 40))["energy-outliers"]
    assert (found.count, found.sources) == (1, ("rattled:5",))
    assert "10 eV/atom" in found.text or "9." in found.text


def test_energies_per_atom_are_found(sound):
    # copper and nickel alone, at absolute energies as codes give them
    metals = [
        replace(f, energy=f.energy - 50.0 * len(f))
        for f in sound[5:]
        if f.config_type != "molecule"
    ]
    assert names(metals) == {}
    per_atom = [replace(f, energy=f.energy / len(f)) for f in metals]
    found = names(per_atom)
    assert found["energies-per-atom"].severity == "error"
    assert "energies are per atom" in found["forces-unit-or-sign"].text


def test_compositions_that_leave_e0s_open_are_noted(sound):
    water = [f for f in sound if f.config_type == "molecule" and len(f) == 3]
    found = names(water)["undetermined-e0s"]
    assert found.text.startswith("Compositions determine 1 of 2 E0s: those of H O in sums only")
    assert "undetermined-e0s" not in names([*water, *sound[:5]])


def test_isolated_atoms_are_checked(sound):
    twice = [*sound, replace(sound[0], energy=1.0)]
    assert names(twice)["isolated-atoms-ambiguous"].count == 2
    damaged = [replace(sound[0], energy=None), *sound[1:]]
    assert names(damaged)["isolated-atoms-damaged"].severity == "error"
    unmarked = [replace(sound[0], config_type="Default"), *sound[1:]]
    found = names(unmarked)
    assert found["isolated-atoms-unmarked"].count == 1
    assert "energy-outliers" not in found, "said once"
    regression = [replace(f, energy=f.energy - 3.4) for f in sound[:5]]
    assert "isolated-atoms-implausible" in names([*regression, *sound[5:37]])


# --- units and signs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "factor", "message"),
    [
        ("forces", -1, "forces are gradients, of the wrong sign"),
        (
            "forces",
            units.Bohr / units.Hartree,
            "the force unit is Hartree/Bohr, the energy unit eV",
        ),
        ("forces", units.mol / units.kcal, "the force unit is kcal/mol/Å, the energy unit eV"),
        ("energy", units.mol / units.kcal, "the energy unit is kcal/mol, the force unit eV/Å"),
        ("energy", 1 / units.Hartree, "the energy unit is Hartree, the force unit eV/Å"),
        ("stress", -1, "positive is compression, as in VASP's output"),
        ("stress", 1 / units.GPa, "the unit is GPa"),
        (
            "stress",
            -10 / units.GPa,
            "positive is compression, as in VASP's output, and the unit is",
        ),
        ("stress", 7.0, "a unit that is not known here"),
    ],
)
def test_wrong_units_and_signs_are_seen_in_energy_differences(sound, label, factor, message):
    wrong = [
        f if getattr(f, label) is None else replace(f, **{label: factor * getattr(f, label)})
        for f in sound
    ]
    (found,) = trends(wrong)[1]
    assert found.severity == "error"
    assert found.name == f"{'stress' if label == 'stress' else 'forces'}-unit-or-sign"
    assert f"Likely {message}" in found.text
    assert found.text.startswith("Suspicion")
    assert not data.audit(wrong).is_ok


def test_forces_of_other_frames_are_found(sound):
    several = [f for f in sound if f.config_type == "rattled"]
    rolled = [replace(f, forces=several[i - 3].forces) for i, f in enumerate(several)]
    (found,) = trends(rolled)[1]
    assert (found.name, found.severity) == ("forces-unrelated", "warning")


def test_few_or_distant_frames_say_nothing(sound):
    rng = np.random.default_rng(1)
    far = [replace(f, positions=rng.uniform(0, 3.6, size=(len(f), 3))) for f in sound]
    assert trends(far) == ([], [])
    assert trends(sound[5:9]) == ([], [])
    assert trends([]) == ([], [])


# --- structures -----------------------------------------------------------------------------------


def test_close_contacts_are_found_worst_first(sound):
    def closer(frame, gap):
        positions = frame.positions.copy()
        positions[1] = positions[0] + [gap, 0, 0]
        return replace(frame, positions=positions)

    frames = [*sound[:5], closer(sound[5], 1.2), closer(sound[7], 1.0), *sound[9:]]
    found = names(frames)["close-contacts"]
    assert found.sources == ("rattled:7", "rattled:5")
    assert "0.38 times" in found.text, "1 Å over twice the radius of copper, 1.32 Å"
    frames = [closer(sound[5], 1e-4), *sound[6:]]
    assert names(frames)["impossible-geometry"].severity == "error"


@pytest.mark.parametrize("factor", [1 / units.Bohr, units.Bohr, 0.1])
def test_lengths_in_another_unit_are_found(sound, factor):
    scaled = [replace(f, positions=factor * f.positions, cell=factor * f.cell) for f in sound]
    assert names(scaled)["length-unit"].severity == "error"


def test_copies_are_found_and_told_from_contradictions(sound):
    copy = replace(sound[6], source="copy")
    found = names([*sound, copy])
    assert found["duplicates"].sources == (f"{sound[6].source} = copy",)
    assert "contradictions" not in found
    for other in (
        replace(copy, energy=copy.energy + 0.3),
        replace(copy, forces=copy.forces + 0.1),
    ):
        found = names([*sound, other])
        assert "duplicates" not in found
        assert (found["contradictions"].severity, found["contradictions"].count) == ("error", 1)
    assert (
        "differ by up to 0.3 eV"
        in names([*sound, replace(copy, energy=copy.energy + 0.3)])["contradictions"].text
    )


def test_boundaries_that_are_odd_are_found(sound):
    assert "cell-without-periodicity" in names(one(sound, pbc=lambda f: 3 * (False,)))
    assert "mixed-boundaries" in names(one(sound, pbc=lambda f: (True, True, False)))
    assert "impossible-geometry" in names(one(sound, cell=lambda f: 0 * f.cell))
    box = {"pbc": lambda f: 3 * (True,), "cell": lambda f: 20 * np.eye(3)}
    assert "mostly-vacuum" in names(one(sound, "molecule", **box))
    assert "dense" in names(one(sound, cell=lambda f: 0.6 * f.cell))


def test_elements_that_the_model_lacks_are_errors(sound, model):
    found = names(sound, model=model)["unknown-elements"]
    assert found.severity == "error"
    assert "does not know Ni Cu" in found.text
    assert "unknown-elements" not in names([f for f in sound if not f.is_periodic][2:], model=model)


# --- the page -------------------------------------------------------------------------------------


def test_an_audit_is_plain_json_and_a_page(sound):
    found = data.audit(one(sound, energy=lambda f: 0.0))
    told = json.loads(json.dumps(found.to_dict()))
    assert told["is_ok"] is False
    assert told["findings"][0]["name"] == "zero-energy", "errors first"
    assert told["findings"][0]["sources"] == ["rattled:5"]
    console = Console(file=io.StringIO(), width=200)
    console.print(found.render())
    page = console.file.getvalue()
    for text in (
        "error zero-energy (1)",
        "rattled:5",
        "config_type",
        "molecule",
        "a zero is learnt",
    ):
        assert text in page


def test_progress_counts_frames_and_an_empty_set_is_refused(sound):
    seen = []
    data.audit(sound, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(sound), len(sound))
    with pytest.raises(ValueError, match="no frames to audit were given; expected one"):
        data.audit([])


# --- public sets and their known defects ----------------------------------------------------------


def public(*parts):
    root = os.environ.get("JAXFT_DATA")
    files = [Path(root) / part for part in parts] if root else []
    if not files or not all(file.is_file() for file in files):
        pytest.skip("JAXFT_DATA does not name a folder with this set")
    return data.read(files, keys=None if "extxyz/" in parts[0] else RESERVED)


BPA = "raw/davkovacs+BOTNet-datasets/dataset_3BPA"
LI = "raw/Fung-Lab+MatterTune/examples/finetune-test/data/Li_electrode"
WATER = "raw/Fung-Lab+MatterTune/examples/water-thermodynamics/data"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([f"extxyz/mlearn_{x}.extxyz.gz"], {})
        for x in ("Mo_training", "Li_training", "Cu_test", "Ni_test")
    ]
    + [
        (["extxyz/maml_MoNbTaW_test.extxyz.gz"], {"close-contacts": 1}),
        (["raw/BAMeScience+equitrain/tests/data.xyz"], {"undetermined-e0s": 63}),
        (
            ["extxyz/mlearn_Mo_training.extxyz.gz", "extxyz/maml_MoNbTaW_train_small.extxyz.gz"],
            {"duplicates": 9},
        ),
        (
            [f"{BPA}/train_300K.xyz", f"{BPA}/train_mixedT.xyz"],
            {"duplicates": 31, "undetermined-e0s": 1000},
        ),
        ([f"{LI}_val.xyz", f"{LI}_test.xyz"], {"contradictions": 1}),
        (
            [f"{WATER}/train_30_water_1000_eVAng.xyz"],
            {"net-force": 30, "undetermined-e0s": 30},
        ),
        (
            ["extxyz/janus_mlip_sets.extxyz.gz"],
            {"isolated-atoms": 4, "isolated-atoms-implausible": 4, "undetermined-e0s": 26},
        ),
        (
            ["extxyz/phonopy_KCl_rd120.extxyz.gz"],
            {"close-contacts": 57, "large-forces": 44, "undetermined-e0s": 120},
        ),
        ([f"{BPA}/iso_atoms.xyz"], {"isolated-atoms-unmarked": 4}),
        (
            ["raw/ACEsuit+mace-tutorials/mace-users/data/ECEMC.xyz"],
            {"isolated-atoms-unmarked": 3, "undetermined-e0s": 203},
        ),
        (
            ["extxyz/vasp_magnetic_mix.extxyz.gz"],
            {"high-pressure": 1, "undetermined-e0s": 22},
        ),
    ],
    ids=lambda value: value[0].split("/")[-1] if isinstance(value, list) else "",
)
def test_public_sets_give_their_known_defects_and_nothing_else(files, expected):
    found = data.audit(public(*files))
    assert {f.name: f.count for f in found.findings} == expected
    for trend in found.trends:
        if trend.agreement > 0.6:
            assert trend.slope == pytest.approx(1, abs=0.2), trend


@pytest.mark.parametrize(("label", "factor"), [("stress", -1602.2), ("stress", -1), ("forces", -1)])
def test_public_sets_with_a_wrong_sign_or_unit_are_refused(label, factor):
    frames = public("extxyz/mlearn_Mo_training.extxyz.gz")
    wrong = [replace(f, **{label: factor * getattr(f, label)}) for f in frames]
    assert f"{label}-unit-or-sign" in names(wrong)
