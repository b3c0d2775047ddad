"""Static shapes, batches that trade frames, the cache of neighbour lists, prefetching, weighing."""

import itertools
import threading
import time
from dataclasses import replace

import ase.build
import numpy as np
import pytest

from jaxft import data
from jaxft.data import cache, packing
from jaxft.data.neighbours import neighbours

MOST_PADDING = 0.1
"""Of atoms and of edge slots, free slots in rows included."""


def spread(count=300, seed=0):
    """Atoms and rows of frames from 2 to 100 atoms, most of them small."""
    rng = np.random.default_rng(seed)
    nodes = np.clip(rng.lognormal(2.5, 0.8, count), 2, 100).astype(int)
    return nodes, nodes * 3 + rng.integers(0, 4, count)


def totals(batches, *sizes):
    return np.array([[size[batch].sum() for size in sizes] for batch in batches])


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(1, 1), (5, 8), (37, 4), (300, 7), (194, 16)])
@pytest.mark.parametrize("seed", [None, 0])
def test_a_plan_holds_every_frame_once_in_batches_of_equal_numbers(count, size, seed):
    _, rows = spread(count)
    rng = None if seed is None else np.random.default_rng(seed)
    batches = list(packing.plan(rows, size, rng))
    assert sorted(np.concatenate(batches)) == list(range(count))
    lengths = [len(batch) for batch in batches]
    assert len(batches) == -(-count // size)
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
    if seed is None:
        assert np.concatenate(batches).tolist() == list(range(count))


def test_traded_batches_are_about_equally_large():
    _, rows = spread()
    batches = list(packing.plan(rows, 6, np.random.default_rng(0)))
    plain = np.array_split(np.random.default_rng(0).permutation(len(rows)), len(batches))
    traded, before = (np.std(totals(found, rows)) for found in (batches, plain))
    assert traded < before / 4


def test_frames_trade_places_with_neighbours_in_the_shuffled_order_alone():
    """So that a window of an epoch is a random sample of the set, whatever the sizes."""
    _, rows = spread()
    batches = list(packing.plan(rows, 3, np.random.default_rng(5)))
    order = np.random.default_rng(5).permutation(len(rows))
    count = len(batches) // packing.WINDOW
    edges = np.linspace(0, len(batches), count + 1).astype(int)
    assert count > 1
    for start, stop in itertools.pairwise(edges):
        assert sorted(np.concatenate(batches[start:stop])) == sorted(order[3 * start : 3 * stop])


def test_where_a_batch_comes_in_its_window_does_not_tell_its_largest_frame():
    _, rows = spread(48)
    first = [rows[next(packing.plan(rows, 3, np.random.default_rng(s)))].max() for s in range(40)]
    assert np.mean(np.array(first) == rows.max()) < 0.3


def test_frames_of_equal_cost_stay_in_shuffled_order():
    found = packing.balance(np.array_split(np.arange(12)[::-1], 3), np.ones(12))
    assert sorted(np.concatenate(found)) == list(range(12))
    assert [batch[0] for batch in found] == [11, 10, 9]


def test_trading_keeps_the_number_of_frames_of_each_kind():
    _, rows = spread(60)
    kinds = np.arange(60) % 3 // 2  # two of three are of kind 0
    batches = np.array_split(np.random.default_rng(0).permutation(60), 10)
    traded = packing.balance(batches, rows, kinds)
    for before, after in zip(batches, traded, strict=True):
        assert np.bincount(kinds[before], minlength=2).tolist() == (
            np.bincount(kinds[after], minlength=2).tolist()
        )
    assert np.std(totals(traded, rows)) < np.std(totals(batches, rows)) / 2


# --- shapes ---------------------------------------------------------------------------------------


def cost(shapes, sizes, width=16):
    """Of batches in the shapes that they take, in edge slots."""
    taken = [packing.smallest(shapes, *size) for size in sizes]
    return sum(packing.ATOM_COST * s.n_node + (width + packing.ROW_COST) * s.n_row for s in taken)


@pytest.fixture
def cheap(monkeypatch):
    """Another shape costs nothing."""
    monkeypatch.setattr(packing, "WORTH", 0.0)


def test_the_shapes_are_the_best_that_there_are(cheap):
    """Against all ways to cut a few batches into runs: where sizes are few, nothing is lost."""
    sizes = np.array([(9, 20), (19, 21), (10, 30), (20, 44), (7, 45), (60, 90), (41, 91), (40, 99)])
    found = packing.ladder(sizes, n_graph=5, row_width=16)
    best = np.inf
    for k in range(1, packing.MAX_SHAPES + 1):
        for cuts in itertools.combinations(range(len(sizes) - 1), k - 1):
            tops = [run.max(axis=0) for run in np.split(sizes, np.array(cuts, int) + 1)]
            shapes = [packing.Shape(int(n) + 1, int(r), 5) for n, r in tops]
            best = min(best, cost(shapes, sizes))
    assert best <= cost(found, sizes) <= (1 + packing.NEGLIGIBLE) * best
    assert len(found) <= packing.MAX_SHAPES


def test_a_shape_that_saves_less_than_its_compilation_is_not_made():
    sizes = np.array([(36, 36)] * 45 + [(27, 27)] * 3)
    few = packing.ladder(sizes, n_graph=5, row_width=8)
    assert few == [packing.Shape(37, 36, 5)]
    often = packing.ladder(sizes, n_graph=5, row_width=8, per_pass=100 * len(sizes))
    assert len(often) == 2


def test_equal_batches_have_one_shape():
    sizes = np.full((50, 2), (36, 90))
    assert packing.ladder(sizes, n_graph=5, row_width=8) == [packing.Shape(37, 90, 5)]


def test_what_no_simulated_batch_reached_has_a_shape_too():
    nodes, rows = spread()
    batches = totals(packing.plan(rows, 4, np.random.default_rng(0)), nodes, rows)
    shapes = packing.ladder(batches, n_graph=5, row_width=16, most=(400, 1300))
    assert shapes[-1].n_node >= 401
    assert shapes[-1].n_row >= 1300
    assert len(shapes) <= packing.MAX_SHAPES
    assert packing.smallest(shapes, 400, 1300) == shapes[-1]


@pytest.fixture(scope="module")
def dataset(model):
    """Crystals of 2 to 48 atoms, strained and rattled."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(90):
        repeat = rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1])
        atoms = ase.build.bulk("NaCl", "rocksalt", rng.uniform(5.4, 5.9)) * (repeat, repeat, 1)
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
        frames.append(data.from_atoms(atoms))
    return data.prepare(frames, model)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("seed", [None, 0])
def test_padding_is_what_the_batches_hold(dataset, size, seed):
    told = data.padding(dataset, size, seed=seed, number=3)
    batches = list(data.epoch(dataset, size, seed=seed, number=3))
    is_edge = [np.linalg.norm(b.graph.vectors, axis=-1) < dataset.r_max for b in batches]
    atoms = np.mean(np.concatenate([b.graph.is_atom for b in batches]))
    rows = np.mean(np.concatenate([edge.any(axis=1) for edge in is_edge]))
    edges = np.mean(np.concatenate([edge.ravel() for edge in is_edge]))
    np.testing.assert_allclose(told[:3], [1 - atoms, 1 - rows, 1 - edges], atol=1e-12)
    assert told.shapes == len({b.graph.n_node for b in batches})


@pytest.mark.parametrize("size", [4, 8, 16])
def test_little_of_a_shuffled_epoch_is_padding(dataset, size, cheap):
    told = data.padding(dataset, size)
    assert told.atoms < MOST_PADDING
    assert told.rows < MOST_PADDING / 2


def test_an_empty_dataset_has_no_batches(model):
    empty = data.prepare([], model)
    assert data.shapes(empty, 4) == []
    assert list(data.epoch(empty, 4, seed=0)) == []


# --- cache ----------------------------------------------------------------------------------------


@pytest.fixture
def crystals():
    found = [ase.build.bulk("NaCl", "rocksalt", a) for a in (5.5, 5.7)]
    return [data.from_atoms(atoms) for atoms in found]


def test_cached_neighbours_are_those_of_a_first_run(tmp_path, crystals, model, monkeypatch):
    lone = replace(crystals[0], pbc=(False,) * 3, positions=crystals[0].positions * 9)
    frames = [*crystals, lone]
    folder = tmp_path / "new" / "cache"
    first = data.prepare(frames, model, cache=folder)
    (file,) = folder.iterdir()
    plain = data.prepare(frames, model)
    monkeypatch.setattr(cache, "neighbour_lists", None)  # is not called again
    again = data.prepare(frames, model, cache=folder)
    assert plain.samples[2].n_edge == 0
    for dataset in (first, again):
        for a, b in zip(dataset.samples, plain.samples, strict=True):
            for x, y in ((a.vectors, b.vectors), (a.senders, b.senders)):
                assert x.tobytes() == y.tobytes()
    assert file.suffix == ".npz"


@pytest.mark.parametrize("change", ["positions", "cell", "pbc", "order", "r_max"])
def test_other_structures_or_cutoffs_have_another_file(crystals, change):
    a, b = crystals
    other = {
        "positions": [replace(a, positions=a.positions + np.array([0.0, 0.0, 1e-14])), b],
        "cell": [replace(a, cell=a.cell * (1 + 1e-15)), b],
        "pbc": [replace(a, pbc=(True, True, False)), b],
        "order": [b, a],
        "r_max": crystals,
    }[change]
    r_max = 4.5 if change != "r_max" else 4.6
    assert cache.digest(other, r_max) != cache.digest(crystals, 4.5)
    relabelled = [replace(a, energy=1.0, weight=2.0), b]
    assert cache.digest(relabelled, 4.5) == cache.digest(crystals, 4.5)


def damaged(path, crystals):
    """Contents that are not this set's neighbour lists."""
    content = path.read_bytes()
    middle = len(content) // 2
    edges = [neighbours(frame, 4.5) for frame in crystals]
    yield b""
    yield content[:middle]
    yield content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    yield b"nothing of this kind"
    whole = arrays(edges)
    for found in (
        {"counts": np.array([{}], object)},  # needs pickle
        {"counts": np.zeros(2, np.int64)},
        arrays(edges[:1]),
        whole | {"senders": whole["senders"] + 2},
        whole | {"vectors": whole["vectors"][1:]},
    ):
        np.savez(path, **found)
        yield path.read_bytes()


def arrays(edges):
    return {
        "counts": np.array([len(e.senders) for e in edges]),
        "senders": np.concatenate([e.senders for e in edges]).astype(np.int32),
        "receivers": np.concatenate([e.receivers for e in edges]).astype(np.int32),
        "vectors": np.concatenate([e.vectors for e in edges]),
    }


def test_a_damaged_or_foreign_cache_file_is_named(tmp_path, crystals):
    cache.cached_neighbours(crystals, 4.5, tmp_path)
    (path,) = tmp_path.iterdir()
    for content in list(damaged(path, crystals)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged, or no .*\n.*Delete it"):
            cache.cached_neighbours(crystals, 4.5, tmp_path)
    path.unlink()
    cache.cached_neighbours(crystals, 4.5, tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, crystals, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(cache.np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        cache.cached_neighbours(crystals, 4.5, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_a_file_is_refused(tmp_path, crystals):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ValueError, match="file is not a folder; name one where"):
        cache.cached_neighbours(crystals, 4.5, path)


# --- prefetch -------------------------------------------------------------------------------------


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetching_keeps_items_and_order():
    for depth in (1, 2, 50):
        assert list(data.prefetch(range(20), depth)) == list(range(20))
    assert list(data.prefetch([])) == []
    assert not threads()


def test_the_thread_stays_ahead_but_not_further():
    made = []
    items = data.prefetch((made.append(i) or i for i in range(10)), depth=3)
    assert made == []
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == [0, 1, 2, 3]
    items.close()
    assert not threads()


def test_an_error_comes_in_its_place_and_ends_the_thread():
    def items():
        yield 1
        yield 2
        raise ZeroDivisionError("in the thread")

    found = data.prefetch(items(), depth=5)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(found)
    assert not threads()
    assert list(found) == []


def test_leaving_early_closes_the_source_and_leaves_no_thread():
    closed = []

    def items():
        try:
            yield from itertools.count()
        finally:
            closed.append(True)

    source = items()  # so that it is not closed by being forgotten
    for item in (found := data.prefetch(source)):
        if item == 3:
            break
    assert threads()
    found.close()
    assert closed == [True]
    assert not threads()


def test_prefetching_nothing_ahead_is_refused():
    with pytest.raises(ValueError, match=r"prefetch\(depth=0\) makes nothing ahead; use depth"):
        data.prefetch([], depth=0)


# --- weighing -------------------------------------------------------------------------------------


def test_frames_are_weighed_by_config_type_and_factor(crystals):
    a, b = crystals
    named = [replace(a, config_type="bulk", weight=3.0), replace(b, config_type="slab")]
    found = data.weigh(named, config_types={"bulk": 0.5}, factor=4.0)
    assert [frame.weight for frame in found] == [6.0, 4.0]
    assert [frame.weight for frame in named] == [3.0, 1.0]
    assert [frame.weight for frame in data.weigh(named)] == [3.0, 1.0]


def test_a_config_type_that_no_frame_has_is_refused(crystals):
    message = r"no frame has config_type 'bulk'; known are 'Default'\.\nCorrect the name"
    with pytest.raises(ValueError, match=message):
        data.weigh(crystals, config_types={"bulk": 2.0})
    with pytest.raises(ValueError, match=r"weigh: Default is -1\.0; expected finite numbers >= 0"):
        data.weigh(crystals, config_types={"Default": -1.0})
