"""The check ``md``: models side by side, failures as flags; jax-md's energy function."""

import io
import json

import ase.build
import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from pair_potential import ARGON, LennardJones
from rich.console import Console
from typer.testing import CliRunner

import jaxft
from jaxft.calculator import JaxftCalculator
from jaxft.cli import app
from jaxft.evaluate.candidate import AseCandidate, JaxCandidate
from jaxft.evaluate.layout import fitted
from jaxft.evaluate.md import GROUPS, UNITS, tables
from jaxft.evaluate.md import md as evaluate_md
from jaxft.evaluate.mdruns import Plan, names_of

MODEL = LennardJones()
PARAMS = jax.tree.map(jnp.asarray, ARGON)


class PairCalculator(Calculator):
    """The same pair potential for ASE, in numpy."""

    implemented_properties = ("energy", "forces", "stress")

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        from matscipy.neighbours import neighbour_list

        super().calculate(atoms, properties, system_changes)
        i, d, vectors = neighbour_list("idD", atoms, cutoff=MODEL.r_max)
        sixth = (ARGON["sigma"] / d) ** 6
        bare = 4 * ARGON["epsilon"] * (sixth**2 - sixth)
        slope = 4 * ARGON["epsilon"] * (-12 * sixth**2 + 6 * sixth) / d
        x = (d / MODEL.r_max) ** 2
        slope = slope * (1 - x) ** 3 - bare * 6 * d / MODEL.r_max**2 * (1 - x) ** 2
        pull = (slope / d)[:, None] * vectors
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, pull)
        virial = 0.5 * (pull.T @ vectors) / atoms.get_volume()
        e0 = -3.0 * len(atoms)
        stress = virial.ravel()[[0, 4, 8, 5, 2, 1]]
        self.results = {
            "energy": 0.5 * (bare * (1 - x) ** 3).sum() + e0,
            "forces": forces,
            "stress": stress,
        }


def crystal():
    return ase.build.bulk("Ar", "fcc", 5.4, cubic=True) * 2


@pytest.fixture(scope="module")
def ours():
    return JaxCandidate("ours", MODEL, PARAMS)


PLAN = Plan(temperatures=(40.0,), timestep=4.0, steps=200, interval=4)


@pytest.mark.parametrize("equilibration", [0, 20])
def test_ours_and_ase_find_the_same(ours, equilibration):
    """Constant energy from the same velocities: the same numbers, no distance between curves."""
    plan = Plan(temperatures=(40.0,), timestep=4.0, steps=200, equilibration=equilibration)
    found = evaluate_md([ours, AseCandidate("ase", PairCalculator())], [crystal()], plan)
    one, two = found.rows
    assert not found.flags
    if not equilibration:  # whose noise would differ
        for column in ("temperature", "pressure", "energy_fluctuation", "diffusion"):
            assert one.values[column] == pytest.approx(two.values[column], rel=1e-6), column
        assert two.values["rdf_error"] == pytest.approx(0.0, abs=1e-6)
        assert two.values["vdos_error"] == pytest.approx(0.0, abs=1e-6)
    assert abs(one.values["energy_drift"]) < 0.05
    assert one.values["survival_time"] == two.values["survival_time"]
    assert one.values["survival_time"] == pytest.approx(0.004 * (200 + equilibration))
    assert "rdf_error" not in one.values
    assert {picture.title.split(":")[0] for picture in found.pictures} == {
        "total energy",
        "radial distribution",
        "vibrational density of states",
        "mean squared displacement",
    }
    json.dumps(found.to_dict())


def test_a_broken_model_is_a_flagged_row_and_the_report_intact(ours):
    broken = JaxCandidate("broken", MODEL, PARAMS | {"epsilon": jnp.asarray(np.nan)})
    hollow = JaxCandidate("hollow", MODEL, PARAMS | {"repulsion": jnp.asarray(-3.0)})
    helpless = AseCandidate("helpless", EMT())  # knows no argon
    found = evaluate_md([ours, broken, hollow, helpless], [crystal()], PLAN)
    sound, no_number, collapsed, unknown = found.rows
    assert sound.flag is None
    assert "not finite" in no_number.flag
    assert no_number.values["survival_time"] == 0.0
    assert "replica 1 of 1 ended" in collapsed.flag
    assert 0 < collapsed.values["survival_time"] < 0.8
    assert "NotImplementedError" in unknown.flag
    assert [row.values["survived"] for row in found.rows] == [1, 0, 0, 0]


def test_molecules_run_through_ase_too():
    dimer = ase.Atoms("Cu2", [[0, 0, 0], [0, 0, 2.3]])
    (row,) = evaluate_md([AseCandidate("emt", EMT())], [dimer], Plan(steps=300)).rows
    assert row.flag is None
    assert row.values["pressure"] is None
    assert "rdf_error" not in row.values


def test_a_structure_that_cannot_be_run_does_not_stop_the_others(ours):
    overlapping, foreign = crystal(), crystal()
    overlapping.positions[1] = overlapping.positions[0]
    foreign.symbols[0] = "Xe"
    found = evaluate_md([ours], [overlapping, crystal(), foreign], PLAN)
    first, second, third = found.rows
    assert "duplicate" in first.flag
    assert second.flag is None
    assert "Xe" in third.flag


@pytest.mark.parametrize("repeats", [(1, 1, 1), (2, 1, 1)])
def test_a_cell_too_thin_for_pairs_is_flagged_and_the_rest_goes_on(repeats):
    """One atom, and two whose distance is more than half the shortest lattice vector."""
    copper = ase.build.bulk("Cu")
    models = [AseCandidate("one", EMT()), AseCandidate("two", EMT())]
    found = evaluate_md(models, [copper * repeats, copper * 3], Plan(steps=60, interval=1))
    flags = {(row.model, row.subject): row.flag for row in found.rows}
    thin = [f for (_, subject), f in flags.items() if not subject.startswith("Cu27")]
    assert len(thin) == 2
    assert all("no radial distribution" in flag for flag in thin)
    assert "rdf_error" in found.rows[-1].values
    assert found.rows[-1].flag is None


def test_temperatures_and_replicas_become_rows_and_means():
    plan = Plan("bussi", (30.0, 60.0), timestep=4.0, steps=100, replicas=2, interval=4)
    one_by_one = JaxCandidate("ours", MODEL, PARAMS, batch_size=1)
    found = evaluate_md([one_by_one], [crystal()], plan)
    cold, warm, law = found.rows
    assert [row.subject for row in found.rows] == ["Ar32, 30 K", "Ar32, 60 K", "Ar32, Arrhenius"]
    assert cold.values["replicas"] == 2
    assert cold.values["temperature"] < warm.values["temperature"]
    assert cold.values["diffusion_error"] > 0
    assert law.flag is not None or law.values["activation_energy_error"] > 0
    parts = tables(found)
    shown = {column for part in parts for row in part.rows for column in row.values}
    assert shown == {c for row in found.rows for c, v in row.values.items() if v is not None}
    assert set(" ".join(GROUPS.values()).split()) == set(UNITS)
    console = Console(width=80, file=io.StringIO())
    for part in (shown for each in parts for shown in fitted(each, console)):
        console.print(part)
    text = console.file.getvalue()
    assert "…" not in text


def test_a_reference_trajectory_replaces_the_first_model(ours):
    frames = [crystal() for _ in range(3)]
    for i, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=i)
    (row,) = evaluate_md([ours], [crystal()], PLAN, reference=frames).rows
    assert 0 < row.values["rdf_error"] < 100
    assert 0 < row.values["rdf_earth_mover"] < 1
    with pytest.raises(ValueError, match="only one and one temperature"):
        evaluate_md([ours], [crystal()] * 2, PLAN, reference=frames)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ensemble": "nvt"}, "use one of nve, langevin, bussi, npt"),
        ({"steps": 0}, "at least one of each"),
        ({"temperatures": ()}, "at least one of each"),
        ({"timestep": -1.0}, "positive"),
        ({"temperatures": (300.0, 300.0)}, "not all different"),
        ({"temperatures": (-5.0,)}, "temperature=-5.0"),
        ({"temperatures": (np.nan,)}, "temperature=nan"),
        ({"pressure": np.inf}, "pressure=inf"),
        ({"seed": -1}, "seed=-1 is not possible"),
    ],
)
def test_impossible_plans_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Plan(**change)


def test_structures_that_cannot_be_told_apart_are_refused():
    cells = [ase.Atoms("Ar", info={"name": name}) for name in ("a", "a", "a #1")]
    assert names_of(cells[:2]) == ["a #1", "a #2"]
    with pytest.raises(ValueError, match="rename them"):
        names_of(cells)


def test_npt_of_a_molecule_and_a_foreign_element_are_refused(ours):
    with pytest.raises(ValueError, match="periodic in three"):
        evaluate_md([ours], [ase.Atoms("Ar2", [[0, 0, 0], [0, 0, 4]])], Plan("npt"))
    with pytest.raises(ValueError, match="holds Xe"):
        evaluate_md([ours], [crystal()], Plan(element="Xe"))


def test_the_command_writes_what_it_was_asked_for(small, tmp_path):
    jaxft.save(tmp_path / "small.jaxft", *small)
    ase.io.write(tmp_path / "start.xyz", ase.build.bulk("NaCl", "rocksalt", 5.6, cubic=True))
    words = ["evaluate", "md", tmp_path / "small.jaxft", "--structure", tmp_path / "start.xyz"]
    words += ["--timestep", 0.1, "--steps", 20, "--interval", 2, "--trajectories", tmp_path / "t"]
    words += ["--stride", 5, "--save", tmp_path / "md.json", "--report", tmp_path / "md.html"]
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert row["model"] == "small"
    assert row["survival_time"] == pytest.approx(0.002)
    (written,) = (tmp_path / "t").iterdir()
    assert len(ase.io.read(written, index=":")) == 3
    assert "<svg" in (tmp_path / "md.html").read_text()
    again = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert again.exit_code == 1


def test_jax_md_sees_the_energies_and_forces_of_the_calculator(small):
    space = pytest.importorskip("jax_md.space")
    from jaxft.integrations.jaxmd import isolated_atom_energy, neighbor_list_energy

    model, params = small
    atoms = ase.build.bulk("NaCl", "rocksalt", 5.6, cubic=True) * 2
    atoms.rattle(0.1, seed=0)
    edges = jnp.asarray(atoms.cell.lengths())
    displacement, _ = space.periodic(edges)
    with pytest.raises(ValueError, match="twice the cutoff"):
        neighbor_list_energy(model, params, displacement, 0.3 * edges, atoms.numbers)
    neighbor_fn, energy_fn = neighbor_list_energy(
        model, params, displacement, edges, atoms.numbers, dr_threshold=0.5
    )
    positions = jnp.asarray(atoms.positions)
    neighbor = neighbor_fn.allocate(positions)
    energy, gradient = jax.jit(jax.value_and_grad(energy_fn))(positions, neighbor)
    atoms.calc = JaxftCalculator(model, params)
    total = float(energy) + isolated_atom_energy(model, atoms.numbers)
    assert total == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(-gradient, atoms.get_forces(), atol=1e-10)
