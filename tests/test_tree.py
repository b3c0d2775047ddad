"""Paths, patterns, partition and combine."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import tree

SMALL = {
    "interactions_0": {"linear": {"0e": np.ones((2, 3)), "1o": np.zeros((2, 2))}},
    "interactions_1": {"linear": {"0e": np.ones((4, 3))}, "linear_up": {"0e": np.ones((1, 1))}},
    "readouts_0": {"linear": {"0e": np.ones((3, 1))}},
    "scale": np.ones(()),
}


def test_flatten_joins_names_in_tree_order_and_unflatten_undoes_it():
    flat = tree.flatten(SMALL)
    assert list(flat) == [
        "interactions_0/linear/0e",
        "interactions_0/linear/1o",
        "interactions_1/linear/0e",
        "interactions_1/linear_up/0e",
        "readouts_0/linear/0e",
        "scale",
    ]
    assert tree.unflatten(flat) == SMALL


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("scale", ["scale"]),
        ("interactions_*/linear/0e", ["interactions_0/linear/0e", "interactions_1/linear/0e"]),
        ("interactions_1/linear*/0e", ["interactions_1/linear/0e", "interactions_1/linear_up/0e"]),
        ("*/linear/1o", ["interactions_0/linear/1o"]),
        ("*", ["scale"]),
        ("readouts_0/**", ["readouts_0/linear/0e"]),
        ("**/1o", ["interactions_0/linear/1o"]),
        ("**", list(tree.flatten(SMALL))),
        ("i**0/**e", ["interactions_0/linear/0e"]),
        (lambda path, leaf: leaf.ndim == 0, ["scale"]),
        (["scale", "**/1o"], ["interactions_0/linear/1o", "scale"]),
        (["**/1o", lambda path, leaf: path == "scale"], ["interactions_0/linear/1o", "scale"]),
    ],
)
def test_patterns_select(pattern, expected):
    assert tree.select(SMALL, pattern) == expected
    chosen = tree.flatten(tree.mask(SMALL, pattern))
    assert [path for path, value in chosen.items() if value] == expected
    assert {type(value) for value in chosen.values()} == {bool}


@pytest.mark.parametrize("pattern", ["interactions_?/**", "readouts_[0]/**", "r.*", "scal", "*/*"])
def test_only_stars_are_special_and_the_whole_path_must_match(pattern):
    with pytest.raises(ValueError, match="matches none of 6 parameter leaves"):
        tree.select(SMALL, pattern)


def test_a_pattern_that_matches_nothing_names_the_closest_leaves():
    with pytest.raises(ValueError, match="matches none") as caught:
        tree.select(SMALL, ["scale", "readout_0/linear/0e"])
    message = str(caught.value)
    assert message.startswith("pattern 'readout_0/linear/0e' matches none of 6 parameter leaves;")
    assert "closest: 'readouts_0/linear/0e', " in message


def test_a_callable_that_selects_nothing_is_an_error():
    with pytest.raises(ValueError, match="selects none of 6 parameter leaves"):
        tree.select(SMALL, lambda path, leaf: False)


def test_partition_leaves_holes_and_combine_fills_them():
    mask = tree.mask(SMALL, "interactions_0/**")
    where, rest = tree.partition(SMALL, mask)
    flat_where, flat_rest = tree.flatten(where), tree.flatten(rest)
    for path, leaf in tree.flatten(SMALL).items():
        inside = path.startswith("interactions_0/")
        assert (flat_where[path] is leaf) == inside
        assert (flat_rest[path] is leaf) != inside
    combined = tree.flatten(tree.combine(where, rest))
    assert all(combined[path] is leaf for path, leaf in tree.flatten(SMALL).items())


def test_combine_takes_the_first_where_both_are_present():
    assert tree.combine({"a": 1, "b": None}, {"a": 2, "b": 3}) == {"a": 1, "b": 3}


def test_copy_owns_its_buffers():
    leaf = jnp.arange(3.0)
    (copied,) = tree.copy({"a": leaf}).values()
    assert copied.unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()
    assert copied.tolist() == leaf.tolist()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_interpolate_ends_bitwise_and_keeps_the_dtype(dtype, kind):
    start = {"a": {"b": kind(np.array([0.1, 3e7, -0.0], dtype))}}
    end = {"a": {"b": kind(np.array([1e9, -0.3, 0.7], dtype))}}
    assert (start["a"]["b"] + (end["a"]["b"] - start["a"]["b"]) != end["a"]["b"]).any()
    for amount, wanted in ((0, start), (1.0, end)):
        found = np.asarray(tree.interpolate(start, end, amount)["a"]["b"])
        assert found.tobytes() == np.asarray(wanted["a"]["b"]).tobytes()
    for amount in (-0.5, np.float64(0.25), 2):
        found = tree.interpolate(start, end, amount)["a"]["b"]
        assert found.dtype == dtype
        wanted = (1 - amount) * np.asarray(start["a"]["b"]) + amount * np.asarray(end["a"]["b"])
        np.testing.assert_allclose(found, wanted, rtol=1e-6 if dtype == "float32" else 1e-14)


def test_size_counts_numbers_and_skips_holes():
    assert tree.size(SMALL) == 6 + 4 + 12 + 1 + 3 + 1
    assert tree.size(tree.partition(SMALL, tree.mask(SMALL, "**/1o"))[0]) == 4


def test_name_diff_is_sorted_and_signed():
    assert tree.name_diff(["b", "z", "a"], ["b", "d", "c"]) == "- c\n- d\n+ a\n+ z"
    assert tree.name_diff(["a", "b"], ["b", "a"]) == ""
