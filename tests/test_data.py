"""Reading frames, neighbour lists, batches."""

import itertools
import os
from pathlib import Path

import ase
import ase.build
import ase.io
import jax
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import primitive_neighbor_list

from jaxft import data
from jaxft.data.neighbours import neighbours
from jaxft.graph import PADDING_DISTANCE

RESERVED = data.Keys(energy="energy", forces="forces", stress="stress")
STRESS = np.array([[1.0, 0.6, 0.5], [0.6, 2.0, 0.4], [0.5, 0.4, 3.0]])
VOIGT = np.array([1.0, 2.0, 3.0, 0.4, 0.5, 0.6])
"""xx, yy, zz, yz, xz, xy of STRESS."""


def crystal(**info):
    atoms = ase.build.bulk("NaCl", "rocksalt", 5.6)
    atoms.info.update(info)
    return atoms


def write(path, *images):
    ase.io.write(path, list(images), format="extxyz")
    return path


# --- labels ---------------------------------------------------------------------------------------


def test_reads_labels_under_ref_keys(tmp_path):
    atoms = crystal(REF_energy=-3.25, REF_stress=STRESS, config_type="bulk")
    atoms.arrays["REF_forces"] = forces = np.arange(6.0).reshape(2, 3)
    (frame,) = data.read(write(tmp_path / "a.xyz", atoms))
    assert frame.energy == -3.25
    np.testing.assert_array_equal(frame.forces, forces)
    np.testing.assert_array_equal(frame.stress, STRESS)
    assert frame.atomic_numbers.tolist() == [11, 17]
    np.testing.assert_allclose(frame.positions, atoms.positions, atol=1e-7)
    np.testing.assert_array_equal(frame.cell, atoms.cell.array)
    assert frame.pbc == (True, True, True)
    assert frame.is_periodic
    assert frame.volume == pytest.approx(5.6**3 / 4)
    assert frame.config_type == "bulk"
    assert frame.source == f"{tmp_path / 'a.xyz'}:0"


def test_reads_labels_under_custom_keys_and_no_others(tmp_path):
    atoms = crystal(dft_energy=-1.0, dft_virial=1.0, REF_energy=5.0)
    atoms.arrays["dft_forces"] = np.ones((2, 3))
    path = write(tmp_path / "a.xyz", atoms)
    keys = data.Keys(energy="dft_energy", forces="dft_forces", stress="dft_stress")
    (frame,) = data.read(path, keys=keys)
    assert frame.energy == -1.0
    assert frame.forces.tolist() == [[1.0] * 3] * 2
    assert frame.stress is None


def test_reads_reserved_names_from_the_calculator_when_asked(tmp_path):
    atoms = crystal()
    atoms.calc = SinglePointCalculator(atoms, energy=-2.0, forces=np.ones((2, 3)), stress=VOIGT)
    path = write(tmp_path / "a.xyz", atoms)
    (frame,) = data.read(path, keys=RESERVED)
    assert frame.energy == -2.0
    assert frame.forces.tolist() == [[1.0] * 3] * 2
    np.testing.assert_array_equal(frame.stress, STRESS)
    (plain,) = data.read(path)
    assert (plain.energy, plain.forces, plain.stress) == (None, None, None)


@pytest.mark.parametrize("stress", [STRESS, STRESS.reshape(9), VOIGT], ids=["3x3", "9", "Voigt"])
def test_stress_comes_as_matrix_nine_numbers_or_voigt(stress):
    np.testing.assert_array_equal(data.from_atoms(crystal(REF_stress=stress)).stress, STRESS)


def test_a_missing_label_is_none_and_has_no_weight(tmp_path, model):
    full = crystal(REF_energy=1.0, REF_stress=STRESS)
    full.arrays["REF_forces"] = np.zeros((2, 3))
    frames = data.read(write(tmp_path / "a.xyz", full, crystal(REF_energy=1.0), crystal()))
    present = [(f.energy is not None, f.forces is not None, f.stress is not None) for f in frames]
    assert present == [(True, True, True), (True, False, False), (False, False, False)]
    (batch,) = data.epoch(data.prepare(frames, model), 3)
    assert batch.weights.energy.tolist() == [1, 1, 0, 0]
    assert batch.weights.stress.tolist() == [1, 0, 0, 0]
    assert batch.weights.forces.tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert batch.totals.moments is None
    assert [float(total) for total in batch.totals[:3]] == [2, 2, 1]
    counted = data.coverage(frames)
    assert (counted.frames, counted.energy, counted.forces, counted.stress) == (3, 2, 1, 1)
    assert counted.elements == {"Na": 3, "Cl": 3}


def test_virials_are_minus_the_volume_times_the_stress(tmp_path):
    volume = 5.6**3 / 4
    atoms = crystal(REF_virials=-volume * VOIGT)
    (frame,) = data.read(write(tmp_path / "a.xyz", atoms))
    np.testing.assert_allclose(frame.stress, STRESS, rtol=1e-12)
    both = crystal(REF_virials=-volume * VOIGT, REF_stress=np.round(STRESS, 3))
    np.testing.assert_array_equal(data.from_atoms(both).stress, STRESS)
    other = data.Keys(virials="virial")
    assert data.from_atoms(atoms, keys=other).stress is None
    atoms.pbc = (True, True, False)
    assert data.from_atoms(atoms).stress is None


def test_virials_that_contradict_the_stress_are_refused():
    atoms = crystal(REF_virials=5.6**3 / 4 * VOIGT, REF_stress=STRESS)
    message = r"^s.xyz:0: 'REF_stress' is \[1. , 0.6.* but −'REF_virials'/V is \[-1. ,"
    with pytest.raises(ValueError, match=message):
        data.from_atoms(atoms, source="s.xyz:0")


def test_weights_are_read_under_mace_torchs_names(tmp_path, model):
    atoms = crystal(
        REF_energy=1.0,
        REF_stress=STRESS,
        config_weight=2.0,
        config_energy_weight=3.0,
        config_forces_weight=0.5,
        config_stress_weight=0.25,
    )
    atoms.arrays["REF_forces"] = np.zeros((2, 3))
    atoms.arrays["atom_weights"] = np.array([4.0, 0.0])
    plain = crystal(REF_energy=1.0)
    frames = data.read(write(tmp_path / "a.xyz", atoms, plain))
    (batch,) = data.epoch(data.prepare(frames, model), 2)
    assert batch.weights.energy.tolist() == [6.0, 1.0, 0.0]
    assert batch.weights.forces.tolist()[:4] == [4.0, 0.0, 0.0, 0.0]
    assert batch.weights.stress.tolist() == [0.5, 0.0, 0.0]
    assert [float(total) for total in batch.totals[:3]] == [7.0, 4.0, 0.5]
    virials = crystal(REF_virials=-VOIGT, config_virials_weight=3.0)
    assert data.from_atoms(virials).stress_weight == 3.0


@pytest.mark.parametrize(
    ("info", "arrays", "message"),
    [
        ({"config_weight": -1.0}, {}, r"^a:0: weight is -1.0; expected finite numbers >= 0 \(0 l"),
        ({"config_energy_weight": np.inf}, {}, "^a:0: 'config_energy_weight' holds NaN or inf"),
        ({"config_forces_weight": "much"}, {}, "^a:0: 'config_forces_weight' is 'much'; expected"),
        (
            {"config_stress_weight": 1.0, "config_virials_weight": 2.0},
            {},
            "^a:0 says .*'config_virials_weight': 2.0}; expected one value",
        ),
        ({}, {"atom_weight": np.array([1.0, -1.0])}, "^a:0: atom_weights is .*expected finite"),
        ({}, {"atom_weights": np.ones((2, 3))}, r"^a:0: 'atom_weights' has shape \(2, 3\); expec"),
    ],
)
def test_impossible_weights_are_refused(info, arrays, message):
    atoms = crystal(**info)
    atoms.arrays.update(arrays)
    with pytest.raises(ValueError, match=message):
        data.from_atoms(atoms, source="a:0")


@pytest.mark.parametrize(
    ("info", "arrays", "message"),
    [
        ({"REF_energy": np.nan}, {}, "'REF_energy' holds NaN or infinity; remove the label or"),
        ({"REF_energy": "low"}, {}, "'REF_energy' is 'low'; expected numbers"),
        ({"REF_energy": [1.0, 2.0]}, {}, r"'REF_energy' has shape \(2,\); expected \(\)"),
        ({"REF_stress": np.ones(5)}, {}, r"'REF_stress' has shape \(5,\); expected \(3, 3\)"),
        ({"REF_stress": np.full(6, np.inf)}, {}, "'REF_stress' holds NaN or infinity"),
        ({}, {"REF_forces": np.full((2, 3), np.nan)}, "'REF_forces' holds NaN or infinity"),
        ({}, {"REF_forces": np.ones((2, 2))}, r"has shape \(2, 2\); expected \(2, 3\)"),
    ],
)
def test_a_label_that_is_not_finite_or_misshapen_is_refused(tmp_path, info, arrays, message):
    atoms = crystal(**info)
    atoms.arrays.update(arrays)
    with pytest.raises(ValueError, match=f"^set.xyz:7: .*{message}"):
        data.from_atoms(atoms, source="set.xyz:7")


def test_a_nan_label_of_a_file_names_file_and_frame(tmp_path):
    path = write(tmp_path / "a.xyz", crystal(REF_energy=1.0), crystal(REF_energy=np.nan))
    with pytest.raises(ValueError, match=r"a\.xyz:1: 'REF_energy' holds NaN"):
        data.read(path)


def test_positions_that_are_not_finite_are_refused():
    atoms = crystal()
    atoms.positions[1, 2] = np.nan
    with pytest.raises(ValueError, match="frame: positions or cell are not finite"):
        data.from_atoms(atoms)


@pytest.mark.parametrize(
    "text",
    ["", "not a structure\n", "3\n\nH 0 0 0\n", "1\nProperties=species:S:1:pos:R:3\nH 0 zero 0\n"],
    ids=["empty", "prose", "truncated", "letters"],
)
def test_a_file_that_is_no_structure_is_refused_by_name(tmp_path, text):
    path = tmp_path / "bad.xyz"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.xyz") as caught:
        data.read(path)
    assert "ase.io" in str(caught.value) or "holds no frames" in str(caught.value)


def test_an_absent_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.xyz is not a file; give a file of structures"):
        data.read([tmp_path / "gone.xyz"])


def test_required_labels_are_checked_before_training():
    frames = [data.from_atoms(crystal(REF_energy=1.0), source="a.xyz:0")]
    data.require_labels(frames, ["energy"], keys=data.Keys())
    with pytest.raises(
        ValueError, match=r"none of 1 frames \(a\.xyz:0 …\) has forces .*REF_forces"
    ):
        data.require_labels(frames, ["energy", "forces"], keys=data.Keys())
    with pytest.raises(ValueError, match="no frames to train on"):
        data.require_labels([], ["energy"], keys=data.Keys())


# --- isolated atoms -------------------------------------------------------------------------------


def lone(symbol, energy, **info):
    atoms = ase.Atoms(symbol, info={"config_type": "IsolatedAtom", **info})
    if energy is not None:
        atoms.info["REF_energy"] = energy
    return data.from_atoms(atoms, source=f"{symbol}.xyz:0")


def test_isolated_atoms_give_e0s_and_are_not_trained_on():
    frames = [lone("H", -13.6), data.from_atoms(crystal()), lone("O", -2042.0), lone("H", -13.6)]
    assert data.isolated_atom_energies(frames) == {1: -13.6, 8: -2042.0}
    assert data.without_isolated_atoms(frames) == [frames[1]]
    with pytest.raises(
        ValueError, match=r"a second isolated H has energy -13\.0 eV, the first -13"
    ):
        data.isolated_atom_energies([*frames, lone("H", -13.0)])
    with pytest.raises(ValueError, match=r"has 1 atoms and energy None; expected one atom with"):
        data.isolated_atom_energies([lone("H", None)])
    with pytest.raises(ValueError, match=r"H2\.xyz:0 is marked IsolatedAtom but has 2 atoms"):
        data.isolated_atom_energies([lone("H2", -31.0)])


# --- neighbours -----------------------------------------------------------------------------------


def reference(atoms, cutoff):
    """Sorted (sender, receiver, vector) of ASE's neighbour list."""
    i, j, vectors = primitive_neighbor_list(
        "ijD", atoms.pbc, atoms.cell.array, atoms.positions, cutoff, self_interaction=False
    )
    return ordered(i, j, vectors)


def ordered(i, j, vectors):
    rows = np.column_stack([i, j, np.round(vectors, 6) + 0.0])
    return rows[np.lexsort(rows.T[::-1])]


def random_structure(seed, pbc, n=5):
    rng = np.random.default_rng(seed)
    cell = np.eye(3) * rng.uniform(2.5, 5.0, size=3) + rng.normal(scale=0.6, size=(3, 3))
    scaled = rng.uniform(-0.2, 1.2, size=(n, 3))
    scaled[:, ~np.array(pbc)] *= 3.0  # far outside the cell where it is open
    return ase.Atoms(["Na", "Cl", "O", "H", "C"][:n], scaled @ cell, cell=cell, pbc=pbc)


@pytest.mark.parametrize("pbc", list(itertools.product([False, True], repeat=3)), ids=str)
def test_neighbours_are_those_of_ase(pbc):
    for seed in range(4):
        atoms = random_structure(seed, pbc, n=1 + seed)
        edges = neighbours(data.from_atoms(atoms), 4.5)
        np.testing.assert_allclose(
            ordered(edges.senders, edges.receivers, edges.vectors),
            reference(atoms, 4.5),
            atol=2e-6,
        )
        assert (np.diff(edges.receivers) >= 0).all()


def test_a_wire_may_hold_many_atoms_per_period():
    """Open directions count with their true extent in the guess of the number of neighbours."""
    grid = np.array(list(itertools.product(range(10), range(10), (0.0,)))) * 1.5
    atoms = ase.Atoms("C100", grid, cell=[0.0, 0.0, 4.0], pbc=(False, False, True))
    edges = neighbours(data.from_atoms(atoms), 4.5)
    atoms.set_cell([50.0, 50.0, 4.0])
    np.testing.assert_allclose(
        ordered(edges.senders, edges.receivers, edges.vectors), reference(atoms, 4.5), atol=2e-6
    )


def test_neighbours_of_a_slab_with_no_vector_along_the_surface_normal():
    atoms = ase.build.fcc100("Al", (2, 2, 2))
    atoms.set_cell(np.diag([*atoms.cell.lengths()[:2], 0.0]))
    atoms.pbc = (True, True, False)
    edges = neighbours(data.from_atoms(atoms), 4.0)
    tall = atoms.copy()
    tall.set_cell(np.diag([*atoms.cell.lengths()[:2], 50.0]))
    np.testing.assert_allclose(
        ordered(edges.senders, edges.receivers, edges.vectors), reference(tall, 4.0), atol=2e-6
    )


@pytest.mark.parametrize(
    ("atoms", "message"),
    [
        (ase.Atoms("Na2", [[0, 0, 0], [0, 0, 1e-5]]), "atoms 0 and 1 are 1.0e-05 Å apart; remove"),
        (ase.Atoms("Na", cell=[1e-2] * 3, pbc=True), "1.* neighbours each within 4.5 Å; .*unit"),
        (
            ase.Atoms("Na", pbc=True),
            r"pbc=\(True, True, True\) but the cell .* set the cell or pbc",
        ),
        (ase.Atoms("Na", cell=[4, 4, 0], pbc=True), "no independent lattice vector for every"),
        (ase.Atoms("Na", cell=[[4, 0, 0], [8, 0, 0], [0, 0, 4]], pbc=True), "no independent lat"),
    ],
    ids=["coincident", "absurd cell", "no cell", "zero vector", "parallel vectors"],
)
def test_impossible_geometries_are_refused(atoms, message, model):
    frame = data.from_atoms(atoms, source="a.xyz:3")
    with pytest.raises(ValueError, match=f"^a.xyz:3: .*{message}"):
        data.prepare([frame], model)


def test_an_unknown_element_is_refused_by_name(model):
    frame = data.from_atoms(ase.Atoms("HXeC", np.diag([0.0, 2.0, 4.0])), source="a.xyz:3")
    with pytest.raises(ValueError, match=r"a\.xyz:3 holds Xe, which the model does not") as caught:
        data.prepare([frame], model)
    assert "its elements are H C O Na Cl.\nLeave the frame out, or start from" in str(caught.value)


# --- batches --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(frames, model):
    return data.prepare(frames * 4 + frames[:5], model)  # 37 frames


def frames_of(batches):
    return [batch.frame[batch.graph.is_graph].tolist() for batch in batches]


@pytest.mark.parametrize("size", [1, 3, 8, 37, 100])
def test_every_frame_occurs_once_per_epoch(dataset, size):
    for number in range(3):
        found = frames_of(data.epoch(dataset, size, seed=0, number=number))
        assert sorted(itertools.chain(*found)) == list(range(37))
        assert len(found) == data.num_batches(dataset, size)
        counts = {len(batch) for batch in found}
        assert max(counts) <= size
        assert max(counts) - min(counts) <= 1


def test_the_order_is_given_by_seed_and_number(dataset):
    def order(**options):
        return frames_of(data.epoch(dataset, 4, **options))

    assert order(seed=1, number=2) == order(seed=1, number=2)
    assert order(seed=1, number=2) != order(seed=1, number=3)
    assert order(seed=1, number=2) != order(seed=2, number=2)
    assert list(itertools.chain(*order())) == list(range(37))


def test_an_epoch_resumes_exactly(dataset):
    whole = list(data.epoch(dataset, 4, seed=1, number=5))
    resumed = list(data.epoch(dataset, 4, seed=1, number=5, start=7))
    assert len(resumed) == len(whole) - 7
    for a, b in zip(whole[7:], resumed, strict=True):
        for x, y in zip(leaves(a), leaves(b), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def leaves(batch):
    return jax.tree.leaves(batch)


@pytest.mark.parametrize("size", [1, 3, 8, 36])
def test_batches_come_in_few_shapes_of_which_each_takes_the_smallest_that_holds_it(dataset, size):
    for number in (*range(20), None):
        allowed = data.shapes(dataset, size, shuffled=number is not None)
        assert len(allowed) <= 6
        assert allowed == sorted(allowed)
        order = {} if number is None else {"seed": 0, "number": number}
        for batch in data.epoch(dataset, size, **order):
            graph = batch.graph
            used = (graph.n_node, graph.receivers.size, graph.n_graph)
            rows = (np.linalg.norm(graph.vectors, axis=-1) < dataset.r_max).any(axis=1).sum()
            fits = [s for s in allowed if s.n_node > graph.is_atom.sum() and s.n_row >= rows]
            assert used == min(fits, key=lambda shape: (shape.n_row, shape.n_node))


def test_small_batches_are_not_padded_to_the_largest(dataset):
    used = {batch.graph.n_node for batch in data.epoch(dataset, 3, seed=0)}
    largest = data.shapes(dataset, 3)[-1]
    assert max(used) < 0.8 * largest.n_node


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_padding_is_beyond_the_cutoff_and_belongs_to_the_last_graph(dataset, model, dtype):
    for batch in data.epoch(dataset, 5, seed=0, dtype=dtype):
        graph = batch.graph
        length = np.linalg.norm(graph.vectors, axis=-1)
        real = length < model.r_max
        np.testing.assert_allclose(length[~real], PADDING_DISTANCE * model.r_max, rtol=1e-6)
        assert length.min() > 0.5
        senders, receivers = graph.senders, np.broadcast_to(graph.receivers[:, None], real.shape)
        assert graph.is_atom[senders[real]].all()
        assert graph.is_atom[receivers[real]].all()
        np.testing.assert_array_equal(graph.graph_index[senders], graph.graph_index[receivers])
        assert (np.diff(graph.receivers) >= 0).all()
        assert (np.diff(graph.graph_index) >= 0).all()
        assert not graph.is_graph[-1]
        assert (graph.graph_index[~graph.is_atom] == graph.n_graph - 1).all()
        assert (~graph.is_atom).any()
        assert (batch.n_atoms >= 1).all()
        assert (graph.volume > 0).all()
        weights = batch.weights
        assert not weights.energy[~graph.is_graph].any()
        assert not weights.stress[~graph.is_graph].any()
        assert not weights.forces[~graph.is_atom].any()
        floats = jax.tree.leaves(
            (graph.vectors, graph.volume, batch.labels, batch.weights, batch.totals)
        )
        assert {array.dtype.name for array in floats} == {dtype}


def test_a_batch_holds_what_the_frames_hold(dataset, frames, model):
    """Every edge, species, label and volume arrives; energies without the model's E0s."""
    edges = 0
    for batch in data.epoch(dataset, 5, seed=0, dtype="float64"):
        graph, labels = batch.graph, batch.labels
        table = np.array(model.atomic_numbers)[graph.elements]
        for g in np.flatnonzero(graph.is_graph):
            frame = dataset.frames[batch.frame[g]]
            atoms = np.flatnonzero(graph.graph_index == g)
            np.testing.assert_array_equal(table[graph.species[atoms]], frame.atomic_numbers)
            assert batch.n_atoms[g] == len(frame)
            e0 = sum(model.e0s[0, model.atomic_numbers.index(z)] for z in frame.atomic_numbers)
            assert labels.energy[g] == pytest.approx(frame.energy - e0, abs=1e-9)
            np.testing.assert_array_equal(labels.forces[atoms], frame.forces)
            inside = np.linalg.norm(graph.vectors, axis=-1) < model.r_max
            inside &= graph.graph_index[graph.receivers][:, None] == g
            row, slot = np.nonzero(inside)
            expected = neighbours(frame, model.r_max)
            np.testing.assert_array_equal(
                ordered(
                    graph.senders[row, slot] - atoms[0],
                    graph.receivers[row] - atoms[0],
                    graph.vectors[row, slot],
                ),
                ordered(expected.senders, expected.receivers, expected.vectors),
            )
            edges += len(row)
            if frame.is_periodic:
                assert graph.volume[g] == pytest.approx(frame.volume)
                np.testing.assert_array_equal(labels.stress[g], frame.stress)
            else:
                assert graph.volume[g] == 1.0
                assert batch.weights.stress[g] == 0
    assert edges == sum(len(neighbours(f, model.r_max).senders) for f in dataset.frames)


def test_the_row_width_changes_no_prediction(frames, model, params, predictor):
    wide, narrow = (
        next(data.epoch(data.prepare(frames, model, row_width=width), 8, dtype="float64"))
        for width in (32, 4)
    )
    a, b = predictor(params, wide.graph), predictor(params, narrow.graph)
    assert wide.graph.senders.shape[1] == 32
    np.testing.assert_allclose(a.energy[:8], b.energy[:8], atol=1e-11)
    atoms = wide.graph.is_atom.sum()
    np.testing.assert_allclose(a.forces[:atoms], b.forces[:atoms], atol=1e-11)


def test_stress_of_a_frame_that_is_not_fully_periodic_is_not_a_label(model):
    atoms = crystal(REF_stress=STRESS)
    atoms.pbc = (True, True, False)
    (batch,) = data.epoch(data.prepare([data.from_atoms(atoms)], model), 1)
    assert batch.weights.stress.tolist() == [0.0, 0.0]
    assert batch.graph.volume.tolist() == [1.0, 1.0]


def test_batches_of_no_frames_are_refused(dataset):
    with pytest.raises(ValueError, match="batches of 0 frames are not possible; use a size >= 1"):
        next(data.epoch(dataset, 0))


def test_a_frame_without_neighbours_is_a_frame(model):
    (batch,) = data.epoch(data.prepare([data.from_atoms(ase.Atoms("H"))], model), 1)
    assert batch.graph.is_atom.sum() == 1
    assert batch.graph.is_graph.sum() == 1


# --- real files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "frames", "labels"),
    [
        ("mlearn_Li_test", 29, (29, 29, 0)),
        ("mlearn_Cu_test", 31, (31, 31, 31)),
        ("janus_mlip_sets", 26, (26, 26, 22)),
        ("vasp_magnetic_mix", 22, (22, 22, 12)),
        ("phonopy_NaCl_vasprun", 4, (4, 4, 4)),
    ],
)
def test_published_sets_are_read_with_all_their_labels(name, frames, labels):
    path = Path(os.environ.get("JAXFT_DATA", "")) / "extxyz" / f"{name}.extxyz.gz"
    if "JAXFT_DATA" not in os.environ or not path.is_file():
        pytest.skip("JAXFT_DATA does not name a folder with this set")
    found = data.read(path)
    counted = data.coverage(found)
    assert counted.frames == frames
    assert (counted.energy, counted.forces, counted.stress) == labels
    for frame in found:
        assert neighbours(frame, 5.0).receivers.max(initial=0) < len(frame)


def test_a_batch_size_beyond_the_dataset_is_one_batch_of_it_all(frames, model):
    dataset = data.prepare(frames, model)
    assert data.shapes(dataset, 10**9) == data.shapes(dataset, len(frames))
    (batch,) = data.epoch(dataset, 10**9)
    assert (batch.frame >= 0).sum() == len(frames)


def test_frames_of_several_heads_share_a_dataset(frames, model):
    class TwoHeads:
        """The model, with a second head whose E0s are 1 eV higher."""

        atomic_numbers, r_max, embeddings = model.atomic_numbers, model.r_max, model.embeddings
        e0s = np.concatenate([model.e0s, model.e0s + 1.0])
        head_index = staticmethod(["new", "old"].index)
        moments = None

    dataset = data.prepare(frames[:3], TwoHeads, head=["old", "new", "old"])
    (batch,) = data.epoch(dataset, 3, dtype="float64")
    (alone,) = data.epoch(data.prepare(frames[:3], TwoHeads, head="new"), 3, dtype="float64")
    assert batch.graph.head.tolist()[:3] == [1, 0, 1]
    atoms = np.array([len(frame) for frame in frames[:3]])
    shift = alone.labels.energy[:3] - batch.labels.energy[:3]
    np.testing.assert_allclose(shift, atoms * [1, 0, 1], atol=1e-12)
    with pytest.raises(ValueError, match="2 heads were given for 3 frames; give one name for all"):
        data.prepare(frames[:3], TwoHeads, head=["old", "new"])
