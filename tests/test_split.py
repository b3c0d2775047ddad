"""Splits into training and validation: decided by what a structure is."""

import ase
import ase.build
import ase.io
import numpy as np
import pytest

from jaxft import data
from jaxft.data import structure_key


def rattled(number, **labels):
    atoms = ase.build.molecule("CH3OH")
    atoms.positions += np.random.default_rng(number).normal(scale=0.05, size=(6, 3))
    atoms.info.update(labels)
    return data.from_atoms(atoms, source=f"set.xyz:{number}")


def lone(symbol):
    info = {"config_type": "IsolatedAtom", "REF_energy": -13.6}
    return data.from_atoms(ase.Atoms(symbol, info=info))


@pytest.fixture(scope="module")
def frames():
    return [rattled(i) for i in range(200)]


def test_splits_are_disjoint_reproducible_and_keep_isolated_atoms_for_training(frames):
    frames = [*frames[:10], lone("H"), *frames[10:20]]
    train, valid = data.split(frames, valid=0.25, seed=3)
    assert len(valid) == 5
    assert sorted(map(id, train + valid)) == sorted(map(id, frames))
    assert train[0] is frames[10]
    assert data.split(frames, valid=0.25, seed=3) == (train, valid)
    assert data.split(frames, valid=0.25, seed=4) != (train, valid)


@pytest.mark.parametrize("valid", [0.01, 0.1, 0.333, 0.5, 0.9])
def test_the_number_of_frames_is_exact(frames, valid):
    assert len(data.split(frames, valid=valid)[1]) == round(valid * len(frames))


def test_a_split_does_not_depend_on_the_order(frames):
    order = np.random.default_rng(0).permutation(len(frames))
    expected = {frame.source for frame in data.split(frames, valid=0.2, seed=1)[1]}
    shuffled = [frames[i] for i in order]
    train, valid = data.split(shuffled, valid=0.2, seed=1)
    assert {frame.source for frame in valid} == expected
    assert train == [frame for frame in shuffled if frame in train], "as given"


def test_one_frame_more_displaces_one_frame_at_most(frames):
    for n in range(20, len(frames)):
        less, more = (
            {frame.source for frame in data.split(frames[:k], valid=0.2)[1]} for k in (n, n + 1)
        )
        assert len(less - more) <= 1
        assert len(more - less) <= 1


def test_frames_are_chosen_evenly(frames):
    counts = np.zeros(len(frames))
    for seed in range(200):
        for frame in data.split(frames, valid=0.2, seed=seed)[1]:
            counts[int(frame.source.split(":")[1])] += 1
    # 200 draws of probability 0.2: 40 ± 5.7
    assert counts.min() > 15
    assert counts.max() < 65


def test_a_split_is_the_same_after_relabelling(frames):
    relabelled = [rattled(i, REF_energy=-1.0 * i) for i in range(200)]
    before, after = (data.split(f, valid=0.2)[1] for f in (frames, relabelled))
    assert [f.source for f in before] == [f.source for f in after]


def test_duplicates_stay_together_whatever_their_labels():
    frames = [rattled(i % 30, REF_energy=float(i)) for i in range(90)]
    for seed in range(10):
        train, valid = data.split(frames, valid=0.2, seed=seed)
        assert len(valid) == 18
        assert not {f.source for f in train} & {f.source for f in valid}


def test_what_duplicates_cannot_fill_stays_empty():
    pairs = [rattled(i % 10) for i in range(20)]
    assert len(data.split(pairs, valid=0.25)[1]) == 4


def test_a_key_knows_elements_positions_cell_and_periodicity_only():
    def key(cell=5.6, symbols="NaCl", shift=0.0, pbc=True, **info):
        atoms = ase.Atoms(symbols, [[shift, 0, 0], [2.8, 0, 0]], cell=[cell] * 3, pbc=pbc)
        atoms.info.update(info)
        return structure_key(data.from_atoms(atoms))

    assert key() == key(REF_energy=1.0, config_type="x", charge=1) == key(shift=-1e-9)
    others = [key(5.7), key(symbols="ClNa"), key(shift=1e-3), key(pbc=False), key(pbc=(1, 1, 0))]
    assert len({key(), *others}) == 6


def test_a_key_survives_a_file_with_fewer_digits(tmp_path, frames):
    atoms = [ase.Atoms(f.atomic_numbers, f.positions) for f in frames]
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    reread = data.read(tmp_path / "a.xyz")
    kept = [structure_key(a) == structure_key(b) for a, b in zip(frames, reread, strict=True)]
    # 8 digits: a coordinate lies within 5e-9 Å of a rounding edge once in 1000
    assert np.mean(kept) > 0.9


def test_impossible_splits_are_refused():
    frames = [rattled(i) for i in range(2)]
    for valid in (0.0, 1.0, -0.1, 7):
        with pytest.raises(ValueError, match=f"valid={valid} is not a fraction; use a number betw"):
            data.split(frames, valid=valid)
    with pytest.raises(ValueError, match=r"1 frames cannot be split with valid=0.5; give more"):
        data.split(frames[:1], valid=0.5)
    with pytest.raises(ValueError, match=r"20 frames hold 1 different structures, the rarest 20"):
        data.split([rattled(0)] * 20, valid=0.2)
