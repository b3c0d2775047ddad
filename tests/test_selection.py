"""Which frames of a large set to replay."""

import numpy as np
import pytest
from ase.data import atomic_numbers

from jaxft.data import Frame, filter_elements, select
from jaxft.data.selection import farthest_points


def frame(*symbols):
    numbers = np.array([atomic_numbers[s] for s in symbols])
    return Frame(numbers, np.zeros((len(numbers), 3)), np.zeros((3, 3)), (False,) * 3)


FRAMES = [
    frame("H", "H", "O"),
    frame("O"),
    frame("C", "O"),
    frame("H", "C", "O"),
    frame("Si"),
    frame("H", "C", "O", "Si"),
]
PASS = {
    "none": [0, 1, 2, 3, 4, 5],
    "combinations": [0, 1],
    "inclusive": [0, 3, 5],
    "exclusive": [0],
}


@pytest.mark.parametrize("rule", list(PASS))
def test_rules_on_elements_mean_what_they_say(rule):
    found = filter_elements(FRAMES, ["H", "O"], rule=rule)
    assert [FRAMES.index(f) for f in found] == PASS[rule]
    assert filter_elements(FRAMES, [8, 1, 1], rule=rule) == found


def test_a_filter_that_nothing_passes_is_an_error():
    with pytest.raises(ValueError, match="none of 6 frames passes the filter 'exclusive' on C Si"):
        filter_elements(FRAMES, ["C", "Si"], rule="exclusive")


@pytest.mark.parametrize(
    ("elements", "rule", "message"),
    [
        ([], "combinations", "rule='combinations' needs elements"),
        ("HO", "combinations", "elements='HO' is one string"),
        (["Xx"], "inclusive", "'Xx' is no element"),
        ([0], "inclusive", "0 is no element"),
        ([8], "any", "rule='any' is unknown; use 'none', 'combinations'"),
    ],
)
def test_elements_and_rules_that_do_not_exist_are_refused(elements, rule, message):
    with pytest.raises(ValueError, match=message):
        filter_elements(FRAMES, elements, rule=rule)


# --- how many -------------------------------------------------------------------------------------

MANY = [frame("H")] * 1000
MANY = [frame("H") for _ in MANY]
POINTS = np.random.default_rng(1).normal(size=(1000, 3, 2))


def order(found):
    position = {id(f): i for i, f in enumerate(MANY)}
    return [position[id(f)] for f in found]


@pytest.mark.parametrize("options", [{}, {"how": "farthest", "descriptors": POINTS}])
def test_a_smaller_selection_begins_a_larger_one_and_nothing_is_taken_twice(options):
    large = order(select(MANY, 300, **options))
    assert order(select(MANY, 40, **options)) == large[:40]
    assert len(set(large)) == 300
    assert sorted(order(select(MANY, 1000, **options))) == list(range(1000))


def test_random_selections_follow_from_their_seed():
    assert order(select(MANY, 50, seed=3)) == order(select(MANY, 50, seed=3))
    assert order(select(MANY, 50, seed=3)) != order(select(MANY, 50, seed=4))


def test_random_selections_prefer_no_place():
    hits = np.zeros(10)
    for seed in range(2000):
        hits[order(select(MANY[:10], 3, seed=seed))] += 1
    assert np.abs(hits / 600 - 1).max() < 0.15  # 1/√600 is 4 %


def test_farthest_points_are_those_of_the_definition():
    """Greedy, written over the full matrix of distances."""
    points = POINTS.reshape(1000, -1)[:150]
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    chosen = [int(np.linalg.norm(points - points.mean(axis=0), axis=1).argmin())]
    while len(chosen) < 150:
        nearest = distance[:, chosen].min(axis=1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    assert farthest_points(points, 150) == chosen


def test_farthest_points_cover_better_than_random_ones():
    points = POINTS.reshape(1000, -1)

    def covering(chosen):
        return np.linalg.norm(points[:, None] - points[chosen], axis=-1).min(axis=1).max()

    random = [covering(order(select(MANY, 40, seed=seed))) for seed in range(20)]
    assert covering(farthest_points(points, 40)) < min(random)


def test_farthest_points_do_not_depend_on_the_order_of_the_frames():
    points = POINTS.reshape(1000, -1)
    shuffle = np.random.default_rng(0).permutation(1000)
    found = farthest_points(points[shuffle], 60)
    assert [shuffle[i] for i in found] == farthest_points(points, 60)


def test_copies_come_last_among_farthest_points():
    points = np.array([[0.0], [0.0], [1.0], [1.0], [5.0]])
    found = farthest_points(points, 5)
    assert sorted(points[found[:3], 0]) == [0.0, 1.0, 5.0]
    assert sorted(found) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (7, {}, "7 frames were asked for and 6 are there"),
        (0, {}, "0 frames were asked for"),
        (2, {"how": "fps"}, "how='fps' is unknown; use 'random', 'farthest'"),
        (2, {"how": "farthest"}, "needs a descriptor of each frame"),
        (2, {"descriptors": np.zeros((6, 2))}, "a random selection reads no descriptors"),
        (2, {"how": "farthest", "descriptors": np.zeros((5, 2))}, r"shape \(5, 2\) for 6 frames"),
        (2, {"how": "farthest", "descriptors": np.zeros(6)}, r"shape \(6,\) for 6 frames"),
        (
            2,
            {"how": "farthest", "descriptors": np.array([[0.0]] * 5 + [[np.nan]])},
            "descriptors of 1 frames are not finite, the first is number 5",
        ),
    ],
)
def test_a_selection_that_cannot_be_made_is_refused(n, options, message):
    with pytest.raises(ValueError, match=message):
        select(FRAMES, n, **options)
