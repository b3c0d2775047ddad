"""Shares, orders and shapes of target and sources in one stream of batches."""

import itertools
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import ase.build
import jax
import numpy as np
import pytest

from jaxft import data
from jaxft.data.mixture import TARGET
from jaxft.data.packing import WINDOW
from jaxft.data.shares import Slots, counts, largest_draw, most, passes
from jaxft.source import Source

EPOCHS = 4


class Toy:
    """What data preparation knows of a model with two heads; no network."""

    atomic_numbers = (1, 6, 8, 17)
    r_max = 2.0
    embeddings = ()
    moments = None
    heads = ("old", "new")
    e0s = np.array([[-1.0, -2.0, -3.0, -4.0], [-10.0, -20.0, -30.0, -40.0]])

    def head_index(self, head=None):
        if head not in self.heads:
            raise ValueError(f"head {head!r}; the model's heads are {self.heads}")
        return self.heads.index(head)


TOY = Toy()
WATER, METHANOL, DIMER = (
    data.unlabelled(ase.build.molecule(name)) for name in ("H2O", "CH3OH", "Cl2")
)


def some(n, frame=WATER, name="frame"):
    """``n`` labelled copies of a frame, told apart by their energies."""
    return [
        replace(frame, energy=float(i), forces=np.ones((len(frame), 3)), source=f"{name} {i}")
        for i in range(n)
    ]


def mixed(n_target, size, *sources, **options):
    return data.mixture(some(n_target), TOY, size=size, head="new", sources=sources, **options)


def source(n, fraction=0.5, name="replay", frame=METHANOL, **options):
    return Source(name=name, frames=some(n, frame, name), fraction=fraction, **options)


def alternating(n, name="other", frame=DIMER, **options):
    return Source(name=name, frames=some(n, frame, name), schedule="alternate", **options)


def epochs(mixture, seed=0):
    """Indices of all batches of the first epochs."""
    return [
        [mixture.indices(e, b, seed=seed) for b in range(mixture.num_batches)]
        for e in range(EPOCHS)
    ]


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


# (target, size, fractions and sizes of the sources); awkward on purpose
CASES = [
    (180, 8, [(0.25, 60)]),
    (7, 4, [(0.5, 3)]),
    (20, 8, [(1 / 3, 10)]),
    (5, 16, [(0.3, 2)]),
    (53, 5, [(0.9, 11)]),
    (11, 3, [(0.01, 40)]),
    (8, 2, [(0.2, 5), (0.15, 9)]),
    (40, 7, [(0.45, 3), (0.45, 8)]),
    (1, 2, [(0.5, 1)]),
]


def case(n_target, size, sources):
    return mixed(n_target, size, *(source(n, f, f"s{i}") for i, (f, n) in enumerate(sources)))


@pytest.mark.parametrize("case_", CASES)
def test_every_target_frame_occurs_once_per_epoch(case_):
    mixture = case(*case_)
    for batches in epochs(mixture):
        held = np.concatenate(batches)
        assert sorted(held[held < len(mixture)]) == list(range(len(mixture)))


@pytest.mark.parametrize("case_", CASES)
def test_shares_are_within_one_frame_at_every_moment_of_all_epochs(case_):
    mixture, fractions = case(*case_), [f for f, _ in case_[2]]
    shares = {TARGET: 1 - sum(fractions)} | {f"s{i}": f for i, f in enumerate(fractions)}
    seen, total = Counter(), 0
    for number in range(50):
        for batch in range(mixture.num_batches):
            held = mixture.composition(number, batch)
            assert all(count >= 0 for count in held.values())
            seen.update(held)
            total += sum(held.values())
            for name, share in shares.items():
                assert abs(seen[name] - share * total) <= 1 + 1e-9
        assert seen[TARGET] == (number + 1) * len(mixture)


@pytest.mark.parametrize("case_", CASES)
def test_batches_hold_what_their_composition_says(case_):
    mixture = case(*case_)
    for number, batches in enumerate(epochs(mixture)):
        for batch, chosen in enumerate(batches):
            held = {part.name: np.isin(chosen, part.indices).sum() for part in mixture.parts}
            assert held == mixture.composition(number, batch)


@pytest.mark.parametrize("case_", CASES)
def test_batches_of_an_epoch_are_equally_large_or_one_less_and_never_empty(case_):
    mixture = case(*case_)
    for batches in epochs(mixture):
        sizes = {len(chosen) for chosen in batches}
        assert max(sizes) <= mixture.size
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1


@pytest.mark.parametrize("case_", CASES)
def test_by_the_end_of_each_epoch_all_frames_of_a_source_were_seen_k_or_k_plus_1_times(case_):
    mixture = case(*case_)
    seen = np.zeros(len(mixture.dataset), int)
    for batches in epochs(mixture):
        np.add.at(seen, np.concatenate(batches), 1)
        for part in mixture.parts:
            times = seen[list(part.indices)]
            assert times.max() - times.min() <= 1


def test_more_sources_are_within_one_and_a_half_frames():
    rng = np.random.default_rng(0)
    for _ in range(40):
        parts = rng.integers(1, 50, size=rng.integers(4, 7))
        shares = [Fraction(int(p), int(parts.sum())) for p in parts]
        before = [0] * len(shares)
        for n in range(1, 300):
            now = counts(n, shares)
            assert sum(now) == n
            assert all(a <= b <= a + 1 for a, b in zip(before, now, strict=True))
            assert all(abs(c - n * s) <= 1.5 for c, s in zip(now, shares, strict=True))
            before = now


def test_no_stretch_of_slots_holds_more_than_the_bound():
    shares = [Fraction(5, 12), Fraction(1, 4), Fraction(1, 3)]
    row = [counts(n, shares) for n in range(400)]
    for length in (1, 2, 5, 7, 12):
        bound = most(length, shares)
        for start in range(400 - length):
            held = np.subtract(row[start + length], row[start])
            assert (held <= bound).all()


def test_epochs_and_batches_tile_the_row_of_slots():
    for count, share, size in itertools.product((1, 5, 53), (1, 0.7, 0.25), (2, 3, 16)):
        slots = Slots(count, Fraction(share).limit_denominator(100), size)
        end = 0
        for number in range(7):
            for batch in range(slots.num_batches):
                start, stop = slots.of(number, batch)
                assert start == end < stop <= start + slots.largest
                end = stop


def test_a_stretch_of_shuffled_passes_is_bounded_by_the_largest_draw():
    sizes = np.array([3, 50, 7, 20])
    rng = np.random.default_rng(0)
    for stretch, n in ((2, 2), (5, 3), (9, 4), (16, 16)):
        for _ in range(200):
            start = rng.integers(0, 40)
            row = sizes[passes((1,), 4, start, start + stretch)]
            assert np.sort(row)[-n:].sum() <= largest_draw(sizes, n, stretch)
    assert largest_draw(sizes, 2, 2) == 100  # the end of a pass and the beginning of the next
    assert largest_draw(sizes, 1, 2) == 50


# --- orders ---------------------------------------------------------------------------------------


def test_without_sources_batches_are_bitwise_those_of_the_dataset():
    frames = some(13) + some(6, METHANOL)
    plain = data.mixture(frames, TOY, size=4, head="new")
    dataset = data.prepare(frames, TOY, head="new")
    assert plain.num_batches == data.num_batches(dataset, 4)
    assert plain.shapes == data.shapes(dataset, 4)
    for number, seed, start in ((0, 5, 0), (3, 5, 2), (0, None, 1)):
        options = {"seed": seed, "start": start, "dtype": "float64"}
        theirs = list(data.epoch(dataset, 4, number=number, **options))
        assert_same(plain.epoch(number, **options), theirs)
        assert_same(data.alone(dataset, 4).epoch(number, **options), theirs)
        for i, batch in enumerate(theirs, start=start):
            chosen = plain.indices(number, i, seed=seed)
            assert batch.frame[: len(chosen)].tolist() == chosen.tolist()
            assert plain.composition(number, i, seed=seed) == {"target": len(chosen)}


def test_a_fraction_of_0_is_bitwise_the_target_alone():
    with_none, plain = mixed(13, 4, source(9, 0.0)), mixed(13, 4)
    assert len(with_none.dataset) == 13
    assert with_none.shapes == plain.shapes
    assert_same(with_none.epoch(2, seed=1), plain.epoch(2, seed=1))
    assert with_none.composition(2, 0) == {"target": 4, "replay": 0}


def test_an_epoch_resumes_anywhere():
    mixture = mixed(30, 4, source(7, 0.3), alternating(5, steps=2, batch_size=3))
    batches = list(mixture.epoch(5, seed=3))
    assert len(batches) == mixture.num_batches
    fresh = mixed(30, 4, source(7, 0.3), alternating(5, steps=2, batch_size=3))
    for start in (1, 10, len(batches) - 1, len(batches)):
        assert_same(fresh.epoch(5, seed=3, start=start), batches[start:])


def test_the_order_follows_from_seed_epoch_and_name():
    def first(seed, number=0, name="replay"):
        mixture = mixed(40, 8, source(400, 0.5, name))
        chosen = np.concatenate([mixture.indices(number, b, seed=seed) for b in range(10)])
        return [sorted(chosen[chosen >= 40]), sorted(chosen[chosen < 40])]

    assert first(1) == first(1)
    assert first(1)[0] != first(2)[0]
    assert first(1)[0] != first(1, number=1)[0]
    assert first(1)[0] != first(1, name="other")[0]


def test_without_a_seed_sources_run_through_their_frames_in_order():
    mixture = mixed(6, 4, source(4, 0.5))
    found = np.concatenate([np.concatenate(batches) for batches in epochs(mixture, seed=None)])
    assert found[found >= 6].tolist() == [6, 7, 8, 9] * 6
    assert found[found < 6].tolist() == [0, 1, 2, 3, 4, 5] * 4


def test_every_pass_over_a_source_is_shuffled_anew():
    rows = [passes((3,), 50, start, start + 50) for start in (0, 50, 100)]
    assert all(sorted(row) == list(range(50)) for row in rows)
    assert len({tuple(row) for row in rows}) == 3
    middle = passes((3,), 50, 30, 120)
    np.testing.assert_array_equal(middle, np.concatenate(rows)[30:120])


def test_a_fraction_of_concatenated_sets_shows_each_replayed_frame_once_per_epoch():
    mixture = mixed(20, 8, source(12, 12 / 32))
    for batches in epochs(mixture):
        assert sorted(np.concatenate(batches)) == list(range(32))


def test_large_and_small_frames_are_traded_between_batches_of_one_origin():
    frames = some(64, DIMER) + some(64, METHANOL)
    rest = some(32, DIMER) + some(32, METHANOL)
    mixture = data.mixture(
        frames,
        TOY,
        size=12,
        head="new",
        sources=(Source(name="replay", frames=rest, fraction=1 / 3),),
    )
    atoms = [mixture.dataset.nodes[c].sum() for c in itertools.chain(*epochs(mixture))]
    shuffled = np.random.default_rng(0).permutation(192)
    loose = [mixture.dataset.nodes[c].sum() for c in np.array_split(shuffled, 16)]
    assert np.ptp(atoms) <= 6 < np.ptp(loose)


# --- updates of their own -------------------------------------------------------------------------


def test_alternating_sources_follow_each_batch_of_the_target_in_turn():
    mixture = mixed(
        8, 4, alternating(5, "a", steps=2, batch_size=3), source(4, 0.5), alternating(2, "b")
    )
    assert mixture.num_batches == 4 * 4
    one = [
        {"target": 2, "replay": 2},
        {"a": 3},
        {"a": 3},
        {"b": 4},  # by default the size of the target's batches
    ]
    for number in range(2):
        found = [mixture.composition(number, b) for b in range(16)]
        assert [{k: n for k, n in held.items() if n} for held in found] == one * 4


def test_alternating_updates_run_through_the_source_across_epochs():
    size = 2 * WINDOW  # so that the batches that trade with one another are a pass
    mixture = mixed(6, 3, alternating(size, batch_size=2, steps=WINDOW - 1))
    batches = itertools.chain(*epochs(mixture))
    held = [chosen for chosen in batches if (chosen >= 6).all()]
    assert len(held) == EPOCHS * 2 * (WINDOW - 1)
    for start in range(0, len(held) - WINDOW + 1, WINDOW):
        seen = np.concatenate(held[start : start + WINDOW])
        assert sorted(seen) == list(range(6, 6 + size))


def test_the_target_of_an_alternating_mixture_is_a_pass_per_epoch():
    mixture = mixed(13, 4, alternating(3))
    for batches in epochs(mixture):
        own = np.concatenate(batches[::2])
        assert sorted(own) == list(range(13))


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sources",
    [
        (source(30, 0.4),),
        (source(2, 0.8),),  # a batch holds copies
        (source(9, 0.3), alternating(2, batch_size=7, steps=2), alternating(3, "third")),
    ],
)
def test_all_batches_fit_a_few_static_shapes(sources):
    frames = some(25) + some(15, METHANOL)
    mixture = data.mixture(frames, TOY, size=6, head="new", sources=sources)
    shapes = mixture.shapes
    assert len(shapes) <= 6 * (1 + len(mixture.alternate))
    used = set()
    for number in range(20):
        for batch in mixture.epoch(number, seed=11):
            graph = batch.graph
            used.add((graph.n_node, len(graph.receivers), graph.n_graph))
            assert not graph.is_graph[-1]
    assert used <= set(shapes)


# --- heads, labels, weights -----------------------------------------------------------------------


def test_each_frame_keeps_its_head_and_that_heads_e0s():
    mixture = mixed(6, 4, source(4, 0.5, head="old"), alternating(2))
    seen = Counter()
    for batch in mixture.epoch(0, seed=0, dtype="float64"):
        for g in np.flatnonzero(batch.graph.is_graph):
            frame = mixture.dataset.frames[batch.frame[g]]
            name = next(p.name for p in mixture.parts if batch.frame[g] in p.indices)
            row = 0 if name == "replay" else 1
            e0 = sum(TOY.e0s[row, TOY.atomic_numbers.index(z)] for z in frame.atomic_numbers)
            assert batch.graph.head[g] == row
            assert batch.labels.energy[g] == pytest.approx(frame.energy - e0)
            seen[name] += 1
    assert set(seen) == {"target", "replay", "other"}


def test_the_weight_of_a_source_multiplies_the_weights_of_its_frames():
    frames = [replace(frame, weight=3.0) for frame in some(4, METHANOL)]
    mixture = mixed(4, 4, Source(name="replay", frames=frames, fraction=0.5, weight=0.5))
    for batch in mixture.epoch(0, seed=0):
        is_source = batch.frame >= 4
        assert set(batch.weights.energy[is_source]) == {1.5}
        assert set(batch.weights.energy[(batch.frame >= 0) & ~is_source]) == {1.0}


def test_structures_only_come_without_labels():
    mixture = mixed(4, 4, source(4, 0.5, labels="none"))
    for batch in mixture.epoch(0, seed=0):
        is_target = (batch.frame >= 0) & (batch.frame < 4)
        assert (batch.weights.energy > 0).tolist() == is_target.tolist()
    assert all(frame.energy is None for frame in mixture.dataset.frames[4:])


def test_what_is_mixed_is_told():
    mixture = mixed(
        180,
        8,
        source(60, 0.25, head="old", weight=2),
        alternating(30, batch_size=4, labels="none"),
        source(5, 0.0, "idle"),
    )
    assert mixture.describe() == [
        "target: 180 frames of head 'new' (75 % of every batch, each seen once per epoch)",
        "replay: 60 frames of head 'old', weight 2 (25 % of every batch, each seen ~1 times per "
        "epoch)",
        "other: 30 frames of the target's head 'new', without labels (an update of 4 frames after "
        "each one of the target, each seen ~4 times per epoch)",
        "idle: 5 frames of the target's head 'new', fraction 0: in no batch",
    ]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((source(2, head="pbe"),), r"head 'pbe'; the model's heads are \('old', 'new'\)"),
        ((source(2), source(3)), r"more than one set of frames is called 'replay'"),
        ((source(2, 0.1, "target"),), "called 'target';\nnames must be unique"),
        ((source(2, labels="base"),), "label them first: jaxft.pseudolabel"),
        ((source(2, head="new", is_apart=True),), "a head of its own, but 'new' is the target's"),
        ((source(2, 0.5, "a"), source(2, 0.5, "b")), r"\(a 0.5, b 0.5\) add up to 1 of every"),
        (
            (source(2, frame=data.unlabelled(ase.build.molecule("SiH4"))),),
            "holds Si, which the model does not know",
        ),
        (
            (source(2, frame=replace(WATER, config_type="IsolatedAtom")),),
            "'replay' holds an isolated atom, replay 0",
        ),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(sources, message):
    with pytest.raises(ValueError, match=message):
        mixed(4, 4, *sources)


def test_batches_of_one_frame_are_not_shared():
    with pytest.raises(ValueError, match="batches of 1 frame cannot be shared with 'replay'"):
        mixed(4, 1, source(2))
    assert mixed(4, 1, alternating(2)).num_batches == 8
    assert mixed(4, 1, source(2, 0.0)).num_batches == 4


def test_a_target_without_frames_and_a_size_of_0_are_refused():
    with pytest.raises(ValueError, match="the target has no frames; give at least one"):
        mixed(0, 4)
    with pytest.raises(ValueError, match="batches of 0 frames are not possible"):
        mixed(4, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": []}, "'x' has no frames"),
        ({"fraction": 1.0}, "a fraction 1.0 of every batch"),
        ({"fraction": float("nan")}, "a fraction nan of every batch"),
        ({"schedule": "sometimes"}, "schedule='sometimes'; use one of 'mixed', 'alternate'"),
        ({"labels": "best"}, "labels='best'; use one of 'given', 'base', 'none'"),
        ({"weight": -1.0}, "weight=-1.0; use a number >= 0"),
        ({"weight": float("inf")}, "weight=inf"),
        ({"schedule": "alternate", "steps": 0}, "steps=0; use >= 1"),
        ({"schedule": "alternate", "fraction": 0.1}, "alternates, so fraction=0.1 would mean"),
        ({"batch_size": 4}, "mixed into the target's batches, so batch_size=4, steps=1 would"),
        ({"is_apart": True}, "needs a head other than the target's; name it with head="),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Source(name="x", **{"frames": [WATER]} | options)
