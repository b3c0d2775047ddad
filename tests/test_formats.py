"""HDF5 and LMDB in mace-torch's layouts, and ASE databases."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib

import ase
import ase.build
import ase.db
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from jaxft import data

STRESS = np.array([[1.0, 0.6, 0.5], [0.6, 2.0, 0.4], [0.5, 0.4, 3.0]])
VOIGT = np.array([1.0, 2.0, 3.0, 0.4, 0.5, 0.6])
"""xx, yy, zz, yz, xz, xy of STRESS."""
RESERVED = data.Keys(energy="energy", forces="forces", stress="stress")


@pytest.fixture(scope="module")
def images():
    """With all labels, with weights, with virials, a molecule without any."""
    rng = np.random.default_rng(0)
    salt = ase.build.bulk("NaCl", "rocksalt", 5.6)
    full, weighted, virials, bare = salt.copy(), salt.copy(), salt.copy(), ase.build.molecule("H2O")
    for energy, atoms in enumerate((full, weighted, virials)):
        atoms.positions += rng.normal(scale=0.05, size=(2, 3))
        atoms.info["REF_energy"] = -3.25 - energy
        atoms.arrays["REF_forces"] = rng.normal(size=(2, 3))
    full.info |= {"REF_stress": STRESS, "config_type": "bulk", "total_charge": -1.0}
    full.arrays["REF_charges"] = np.array([0.5, -0.5])
    weighted.info |= {"config_weight": 2.0, "config_forces_weight": 0.5, "REF_stress": VOIGT}
    virials.info["REF_virials"] = -STRESS * virials.get_volume()
    return [full, weighted, virials, bare]


def same(frame, other):
    for name in ("atomic_numbers", "cell", "forces", "stress"):
        ours, theirs = getattr(frame, name), getattr(other, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-14, err_msg=name)
    # JSON and HDF5 hold float64 to the last bit; ASE's cell costs an ulp
    np.testing.assert_allclose(frame.positions, other.positions, rtol=1e-14)
    for name in ("energy", "pbc", "config_type", "weight", "energy_weight", "forces_weight"):
        assert getattr(frame, name) == getattr(other, name), name


# --- HDF5, written by mace-torch ------------------------------------------------------------------


def write_hdf5(path, images):
    """As ``mace_prepare_data`` does."""
    h5py = pytest.importorskip("h5py")
    utils = pytest.importorskip("mace.data.utils", reason="mace-torch writes the files")
    keys = utils.KeySpecification.from_defaults()
    with h5py.File(path, "w") as file:
        file.attrs["drop_last"] = False
        configs = utils.config_from_atoms_list(list(images), keys)
        utils.save_configurations_as_HDF5(configs, 0, file)
    return path


@pytest.fixture(scope="module")
def hdf5(tmp_path_factory, images):
    return write_hdf5(tmp_path_factory.mktemp("hdf5") / "a.h5", images)


@pytest.mark.torch
def test_hdf5_of_mace_torch_holds_the_same_frames(hdf5, images):
    frames = data.read(hdf5)
    for frame, atoms in zip(frames, images, strict=True):
        same(frame, data.from_atoms(atoms))
    full, weighted, virials, bare = frames
    assert full.features["total_charge"] == -1
    assert full.atom_features["REF_charges"].tolist() == [0.5, -0.5]
    assert (weighted.weight, weighted.forces_weight, weighted.energy_weight) == (2, 0.5, 1)
    np.testing.assert_allclose(virials.stress, STRESS, rtol=1e-12)
    assert (bare.energy, bare.forces, bare.stress, bare.weight) == (None, None, None, 1)
    assert full.source == f"{hdf5}:0"
    same(data.read(hdf5, keys=RESERVED)[0], full)


@pytest.mark.torch
def test_hdf5_zeros_of_no_weight_are_missing_labels(tmp_path, images):
    atoms = images[0].copy()
    atoms.info |= {"REF_energy": 0.0, "config_energy_weight": 0.0, "config_forces_weight": 0.0}
    (frame,) = data.read(write_hdf5(tmp_path / "a.h5", [atoms]))
    assert frame.energy is None
    assert frame.forces is not None
    assert frame.forces_weight == 0
    atoms.info["config_energy_weight"] = 1.0
    (frame,) = data.read(write_hdf5(tmp_path / "b.h5", [atoms]))
    assert frame.energy == 0, "what has weight is a label"


@pytest.mark.torch
def test_shards_come_in_the_order_of_their_numbers(tmp_path):
    for k in range(12):
        atoms = ase.Atoms("H", info={"REF_energy": float(k)})
        write_hdf5(tmp_path / f"train_{k}.h5", [atoms])
    (tmp_path / "notes.txt").write_text("left alone")
    assert [frame.energy for frame in data.read(tmp_path)] == list(range(12))
    write_hdf5(tmp_path / "train_3.h5", [])  # more processes than frames leave empty shards
    assert len(data.read(tmp_path)) == 11
    (tmp_path / "train.lmdb").touch()
    with pytest.raises(ValueError, match=r"HDF5 and LMDB; expected the\s+shards of one data set"):
        data.read(tmp_path)


def test_batches_and_configurations_of_hdf5_come_in_order(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for batch in range(2):
            for k in range(11):
                group = file.create_group(f"config_batch_{batch}/config_{k}")
                group["atomic_numbers"], group["positions"] = [1], [[0.0, 0.0, 0.0]]
                for name in ("cell", "pbc", "weight", "config_type"):
                    group[name] = "None"
                group.create_group("property_weights")["energy"] = 1.0
                group.create_group("properties")["energy"] = 100.0 * batch + k
    frames = data.read(tmp_path / "a.hdf5")
    assert [frame.energy for frame in frames] == [100.0 * b + k for b in (0, 1) for k in range(11)]
    assert frames[0].pbc == (False, False, False)
    assert (frames[0].config_type, frames[0].weight) == ("Default", 1)


def test_damaged_hdf5_is_refused_by_name(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.h5"

    def refused(message):
        with pytest.raises(ValueError, match=rf"(?s)a\.h5.*{message}"):
            data.read(path)

    path.write_bytes(b"")
    refused("cannot be read .*write it again")
    path.write_bytes(b"prose" * 500)
    refused("cannot be read .*write it again")
    with h5py.File(path, "w") as file:
        file["other"] = 1
    refused(r"holds \['other'\] at the top; expected config_batch_0/config_0")
    with h5py.File(path, "w") as file:
        file.create_group("config_0")["node_attrs"] = np.eye(2)
    refused("holds graphs without atomic numbers; expected config_batch_0")
    with h5py.File(path, "w") as file:
        file.create_group("config_batch_0/config_0")["positions"] = np.zeros((2, 3))
    refused("config_batch_0/config_0 is no structure .*write the file again")
    with h5py.File(path, "w") as file:
        group = file.create_group("config_batch_0/config_0")
        group.create_dataset("cell", shape=(10**10,), dtype="f8", chunks=(1000,))
    refused("config_0 is no structure .*MemoryError")
    with h5py.File(path, "w") as file:
        file.create_group("config_batch_0")
    refused("holds no frames")


@pytest.mark.torch
def test_a_shortened_hdf5_file_is_refused(hdf5, tmp_path):
    content = hdf5.read_bytes()
    for share in (0.2, 0.5, 0.9):
        path = tmp_path / "short.h5"
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"short\.h5 cannot be read"):
            data.read(path)


# --- LMDB, written by mace-torch ------------------------------------------------------------------


def write_lmdb(path, images):
    """With mace-torch's copy of fairchem's database."""
    pytest.importorskip("lmdb")
    tools = pytest.importorskip("mace.tools.fairchem_dataset.lmdb_dataset_tools")
    db = tools.LMDBDatabase(path)
    for atoms in images:
        db.write(atoms, data={})  # its default is one dict, in which labels of earlier rows stay
    return db


def put(path, rows):
    """Raw keys and values."""
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        for key, value in rows.items():
            txn.put(key, value)
    return path


def packed(**row):
    return zlib.compress(json.dumps(row).encode())


@pytest.fixture(scope="module")
def lmdb_file(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("lmdb") / "a.aselmdb"
    write_lmdb(path, images).close()
    return path


@pytest.mark.torch
def test_lmdb_of_mace_torch_holds_the_same_frames(lmdb_file, images):
    frames = data.read(lmdb_file)
    for frame, atoms in zip(frames, images, strict=True):
        same(frame, data.from_atoms(atoms))
    assert frames[0].features["total_charge"] == -1
    assert frames[0].atom_features["REF_charges"].tolist() == [0.5, -0.5]
    assert (frames[1].weight, frames[1].forces_weight) == (2, 0.5)


@pytest.mark.torch
def test_mace_torch_reads_the_same_labels_from_the_lmdb(lmdb_file, tmp_path):
    pytest.importorskip("lmdb")
    from mace.data import LMDBDataset
    from mace.tools import AtomicNumberTable

    copy = shutil.copy(lmdb_file, tmp_path)  # theirs stays open, and a process may open it once
    theirs = LMDBDataset(str(copy), r_max=3.0, z_table=AtomicNumberTable([1, 8, 11, 17]))
    for frame, graph in zip(data.read(lmdb_file), (theirs[i] for i in range(4)), strict=True):
        assert (frame.energy or 0) == pytest.approx(float(graph.energy), rel=1e-6)
        expected = np.zeros((len(frame), 3)) if frame.forces is None else frame.forces
        np.testing.assert_allclose(expected, graph.forces, rtol=1e-6)


@pytest.mark.torch
def test_deleted_rows_are_gone(tmp_path, images):
    db = write_lmdb(tmp_path / "a.lmdb", images[:3])
    db.delete([2])
    db.close()
    energies = [frame.energy for frame in data.read(tmp_path / "a.lmdb")]
    assert energies == [-3.25, -5.25]


@pytest.mark.torch
def test_lmdb_labels_of_the_calculator_come_under_both_names(tmp_path, images):
    atoms = ase.build.bulk("NaCl", "rocksalt", 5.6)
    atoms.calc = SinglePointCalculator(atoms, energy=-2.0, forces=np.ones((2, 3)), stress=VOIGT)
    named = atoms.copy()
    named.calc = SinglePointCalculator(named, energy=-2.0)
    named.info["REF_energy"] = -5.0
    write_lmdb(tmp_path / "a.lmdb", [atoms, named]).close()
    for keys in (None, RESERVED):
        frame, other = data.read(tmp_path / "a.lmdb", keys=keys)
        assert frame.energy == -2.0
        assert frame.forces.tolist() == [[1.0] * 3] * 2
        np.testing.assert_array_equal(frame.stress, STRESS)
        assert other.energy == (-2.0 if keys else -5.0), "the label that is asked for"
        assert other.forces is None


def test_lmdb_rows_come_by_number_and_arrays_in_ases_json_too(tmp_path):
    zeros = {"__ndarray__": [[1, 3], "float64", [0.0, 0.0, 0.5]]}
    rows = {
        str(k).encode(): packed(numbers=[1], positions=zeros, energy=float(k)) for k in range(1, 12)
    }
    frames = data.read(put(tmp_path / "a.lmdb", rows | {b"nextid": b"ignored"}))
    assert [frame.energy for frame in frames] == list(range(1, 12))
    assert frames[0].positions.tolist() == [[0, 0, 0.5]]


def test_pickles_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "opened"),)

    for value in (pickle.dumps(Bomb()), zlib.compress(pickle.dumps(Bomb()))):
        path = put(tmp_path / "a.lmdb", {b"0": value})
        with pytest.raises(ValueError, match=r"(?s)a\.lmdb: row 0 is a pickle, .* never opened"):
            data.read(path)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"prose", r"row 1 is damaged .*expected JSON, compressed"),
        (zlib.compress(b"{"), r"row 1 is not JSON .*write the file again"),
        (zlib.compress(b"[" * 10**5), r"row 1 is not JSON"),
        (zlib.compress(b"3"), r"row 1 is 3; expected a structure, a dict"),
        (packed(positions=[[0, 0, 0]]), r"row 1 is no structure \(KeyError: 'numbers'\)"),
        (packed(numbers=[1], positions=[[0, 0]]), r"row 1 is no structure"),
        (
            packed(numbers=[1], positions=[[0, 0, 0]], data={"__arrays__": {"x": [1, 2]}}),
            r"row 1 is no structure .*'x' has 2 rows for 1 atoms",
        ),
        (packed(numbers=[1], positions=[[0, 0, 0]], energy="low"), r"row 1 is no structure"),
        (packed(numbers=[1], positions=[[0, 0, 0]], energy=None), r":0: 'REF_energy' holds NaN"),
        (zlib.compress(b"{}")[:-3], r"row 1 is cut short"),
    ],
    ids=["prose", "JSON", "deep", "number", "keys", "shape", "arrays", "letters", "null", "short"],
)
def test_damaged_rows_are_refused_by_name(tmp_path, value, message):
    with pytest.raises(ValueError, match=rf"(?s)a\.lmdb.*{message}"):
        data.read(put(tmp_path / "a.lmdb", {b"1": value}))


def test_a_deep_row_is_refused_whatever_a_library_did_to_the_recursion_limit(tmp_path):
    path = put(tmp_path / "a.lmdb", {b"1": zlib.compress(b"[" * 10**6)})
    code = (
        "import sys; sys.setrecursionlimit(10**6); from jaxft import data\n"
        f"try: data.read({str(path)!r})\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "row 1 is not JSON" in done.stdout


def test_a_row_that_inflates_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxft.data.formats.MAX_FRAME_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1000 bytes when inflated"):
        data.read(put(tmp_path / "a.lmdb", {b"1": packed(text="a" * 2000)}))


def test_damaged_lmdb_files_are_refused_by_name(tmp_path):
    pytest.importorskip("lmdb")
    path = tmp_path / "a.lmdb"
    for content in (b"", b"prose" * 5000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.lmdb cannot be read .*\n.*write it again"):
            data.read(path)
    path.unlink()
    rows = {str(k).encode(): packed(numbers=[1], positions=np.eye(3).tolist()) for k in range(999)}
    content = put(path, rows).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"a\.lmdb has \d+ bytes; expected \d+: it is cut short"):
        data.read(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.lmdb holds no frames"):
        data.read(put(path, {}))


# --- others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "module"), [("a.h5", "h5py"), ("a.aselmdb", "lmdb")])
def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch, name, module):
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{name} needs the package {module}.*jaxft\[formats\]"):
        data.read(tmp_path / name)


def test_absent_files_and_folders_without_shards_are_refused(tmp_path):
    for path in (tmp_path / "a.h5", tmp_path / "a.lmdb", tmp_path):
        with pytest.raises(ValueError, match="is not a file; give a file of structures"):
            data.read(path)


def test_ase_databases_are_read(tmp_path):
    atoms = ase.build.bulk("NaCl", "rocksalt", 5.6)
    atoms.calc = SinglePointCalculator(atoms, energy=-2.0, forces=np.ones((2, 3)), stress=VOIGT)
    for name in ("a.db", "a.json"):
        with ase.db.connect(tmp_path / name) as db:
            db.write(atoms, REF_energy=-2.5)
            db.write(atoms)
        frame, _ = data.read(tmp_path / name, keys=RESERVED)
        assert frame.energy == -2.0
        np.testing.assert_array_equal(frame.forces, np.ones((2, 3)))
        np.testing.assert_array_equal(frame.stress, STRESS)
