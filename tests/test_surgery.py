"""Surgery: E0s, heads and elements of the tiny model; tests/parity has every architecture."""

import functools
import itertools

import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import bundle, data, predict, surgery, tree
from jaxft.potential import E0_BUFFER

EXACT = {"rtol": 1e-12, "atol": 1e-10}
"""eV, eV/Å and eV/Å³: float64 rounding of energies of a few hundred eV; a lost √ factor is 1e-1."""


def test_set_e0s_changes_those_and_nothing_else(model):
    before = model.e0s.copy()
    other = surgery.set_e0s(model, {8: -2000.0, 1: -13.6})
    expected = before.copy()
    expected[0, [model.atomic_numbers.index(8), model.atomic_numbers.index(1)]] = -2000.0, -13.6
    np.testing.assert_array_equal(other.e0s, expected)
    np.testing.assert_array_equal(model.e0s, before)
    assert other.config == model.config
    assert all(other.buffers[k] is v for k, v in model.buffers.items() if k != E0_BUFFER)
    assert other.buffers[E0_BUFFER].shape == model.buffers[E0_BUFFER].shape


def test_new_e0s_move_the_labels_and_not_the_prediction(model, frames):
    other = surgery.set_e0s(model, {1: model.e0s[0, 0] + 2.5})
    (old,) = data.epoch(data.prepare(frames, model), 8, dtype="float64")
    (new,) = data.epoch(data.prepare(frames, other), 8, dtype="float64")
    hydrogens = [int((frame.atomic_numbers == 1).sum()) for frame in frames]
    np.testing.assert_allclose(
        new.labels.energy[:8], old.labels.energy[:8] - 2.5 * np.array(hydrogens), atol=1e-9
    )
    for a, b in zip(new.graph, old.graph, strict=True):
        np.testing.assert_array_equal(a, b)


def test_e0s_of_unknown_elements_are_refused(model):
    with pytest.raises(ValueError, match=r"E0s were given for He, Xe, which the model") as caught:
        surgery.set_e0s(model, {54: 1.0, 1: 0.0, 2: 0.0})
    assert "its elements are H C O Na Cl" in str(caught.value)


def test_e0s_that_are_not_finite_are_refused(model):
    with pytest.raises(ValueError, match="the E0s of O are not finite; give energies in eV"):
        surgery.set_e0s(model, {8: float("nan"), 1: -13.6})


HEADS = ("pbe", "r2scan", "cc")


@pytest.fixture(scope="module")
def several(model, params):
    """(model, params) with three heads that differ in every number, off-diagonal blocks too."""
    name = model.heads[0]
    model = surgery.rename_head(model, name, "pbe")
    for i, head in enumerate(HEADS[1:]):
        model, params = surgery.add_head(model, params, head, like="pbe", e0s={8: -5.0 * i})
        model = surgery.set_scale_shift(model, scale=8.0 + i, shift=0.1 * i, head=head)
    return model, randomised(params)


def randomised(params):
    noisy = {
        path: leaf * (1 + 0.3 * jax.random.normal(jax.random.key(i), leaf.shape))
        for i, (path, leaf) in enumerate(tree.flatten(params).items())
    }
    return tree.unflatten(noisy)


def answers(model, params, frames, heads=(None,), jitted=None):
    """{head: [total energy, forces and, of crystals, stress; one vector per frame]}."""
    jitted = jitted or jax.jit(functools.partial(predict, model))
    found = {}
    for head in heads:
        (batch,) = data.epoch(data.prepare(frames, model, head=head), len(frames), dtype="float64")
        out = jax.tree.map(np.asarray, jitted(params, batch.graph))
        assert np.abs(out.forces).max() > 0.1  # eV/Å
        e0s = dict(zip(model.atomic_numbers, model.e0s[model.head_index(head)], strict=True))
        found[head] = []
        for g, frame in enumerate(frames):
            e0 = sum(e0s[z] for z in frame.atomic_numbers.tolist())
            forces = out.forces[batch.graph.is_atom & (batch.graph.graph_index == g)]
            stress = out.stress[g] if frame.is_periodic else np.zeros(0)
            found[head].append(np.array([out.energy[g] + e0, *forces.flat, *stress.flat]))
    return found


def assert_same(given, expected):
    for a, b in zip(given, expected, strict=True):
        np.testing.assert_allclose(a, b, **EXACT)


def assert_bundle(model, params):
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    bundle.check(model, flat, source="the model after surgery")


@pytest.fixture(scope="module")
def of_heads(several, frames):
    """What the three heads say."""
    found = answers(*several, frames, HEADS)
    for a, b in itertools.combinations(HEADS, 2):
        differences = [np.abs(x - y).max() for x, y in zip(found[a], found[b], strict=True)]
        assert min(differences) > 0.1  # eV, eV/Å: no two heads are alike
    return found


@pytest.mark.parametrize("head", ["pbe", "cc"])
def test_a_selected_head_is_the_model_at_that_head(several, frames, of_heads, head):
    model, params = surgery.select_head(*several, head)
    assert model.heads == (head,)
    assert_bundle(model, params)
    assert_same(answers(model, params, frames)[None], of_heads[head])


def test_a_new_head_is_a_copy_and_leaves_the_others(several, frames, of_heads):
    old, _ = several
    model, params = surgery.add_head(*several, "water", like="r2scan", e0s={1: -13.0})
    assert model.heads == (*HEADS, "water")
    assert_bundle(model, params)
    found = answers(model, params, frames, model.heads)
    for head in HEADS:
        assert_same(found[head], of_heads[head])
    for frame, new, copied in zip(frames, found["water"], of_heads["r2scan"], strict=True):
        difference = -13.0 - old.e0s[1, old.atomic_numbers.index(1)]
        new[0] -= difference * (frame.atomic_numbers == 1).sum()
        np.testing.assert_allclose(new, copied, **EXACT)


def test_adding_a_head_to_the_only_one_needs_no_name(model, params):
    two, _ = surgery.add_head(model, params, "water")
    assert two.heads == (*model.heads, "water")
    np.testing.assert_array_equal(two.e0s[0], two.e0s[1])
    np.testing.assert_array_equal(two.constants.scale[0], two.constants.scale[1])


def assert_close_trees(given, expected):
    given, expected = tree.flatten(given), tree.flatten(expected)
    assert list(given) == list(expected)
    for path, leaf in expected.items():
        assert given[path].dtype == leaf.dtype, path
        np.testing.assert_allclose(given[path], leaf, rtol=1e-14, err_msg=path)


def test_adding_a_head_and_selecting_it_is_the_identity(model, params):
    back, same = surgery.select_head(*surgery.add_head(model, params, "water"), "water")
    assert_close_trees(same, params)
    assert surgery.rename_head(back, "water", model.heads[0]).config == model.config
    np.testing.assert_array_equal(back.e0s, model.e0s)


def test_the_only_head_selected_is_the_model_itself(model, params):
    assert surgery.select_head(model, params, model.heads[0]) == (model, params)


def test_blocks_between_heads_are_copied_along(several):
    """They never act, but a file holds them."""
    model, params = several
    _, more = surgery.add_head(model, params, "water", like="r2scan")
    hidden, count = 4, len(HEADS)
    old = params["readouts_1"]["linear_2"]["0e"].reshape(count, hidden, count)
    new = more["readouts_1"]["linear_2"]["0e"].reshape(count + 1, hidden, count + 1)
    factor = np.sqrt((count + 1) / count)
    np.testing.assert_allclose(new[:3, :, :3], factor * old, rtol=1e-14)
    np.testing.assert_allclose(new[3, :, :3], factor * old[1], rtol=1e-14)
    np.testing.assert_allclose(new[:3, :, 3], factor * old[:, :, 1], rtol=1e-14)
    np.testing.assert_allclose(new[3, :, 3], factor * old[1, :, 1], rtol=1e-14)


def test_a_renamed_head_keeps_every_number(several):
    model, _ = several
    other = surgery.rename_head(model, "r2scan", "r2scan+d4")
    assert other.heads == ("pbe", "r2scan+d4", "cc")
    assert other.buffers is model.buffers
    assert surgery.rename_head(model, "cc", "cc") is model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a head was to be called ''; expected a string, not empty"),
        (" cc", "a head was to be called ' cc'"),
        (3, "a head was to be called 3"),
        ("cc", "there is a head 'cc' already; the heads are 'pbe', 'r2scan', 'cc'"),
    ],
)
def test_bad_names_of_heads_are_refused(several, name, message):
    model, params = several
    with pytest.raises(ValueError, match=message):
        surgery.add_head(model, params, name, like="pbe")
    with pytest.raises(ValueError, match=message):
        surgery.rename_head(model, "pbe", name)


def test_unknown_heads_are_refused(several):
    model, params = several
    message = "head 'hf' was asked for, but the model's heads are 'pbe', 'r2scan', 'cc'"
    with pytest.raises(ValueError, match=message):
        surgery.select_head(model, params, "hf")
    with pytest.raises(ValueError, match=message):
        surgery.add_head(model, params, "water", like="hf")
    with pytest.raises(ValueError, match=message):
        surgery.rename_head(model, "hf", "water")
    with pytest.raises(ValueError, match="no head was named, but the model's heads are 'pbe'"):
        surgery.add_head(model, params, "water")


def test_bad_e0s_of_a_new_head_are_refused(model, params):
    with pytest.raises(ValueError, match="E0s were given for Xe, which the model does not know"):
        surgery.add_head(model, params, "water", e0s={54: 1.0})
    with pytest.raises(ValueError, match="E0s were given for 200, 'O', which"):
        surgery.add_head(model, params, "water", e0s={"O": 1.0, 200: 1.0})
    with pytest.raises(ValueError, match="the E0s of H are not finite"):
        surgery.add_head(model, params, "water", e0s={1: float("inf")})


def test_parameters_of_another_model_are_refused(several, params):
    model, own = several
    with pytest.raises(
        ValueError, match=r"'readouts_0/linear/0e' has shape \(4, 1\); expected 3 in"
    ):
        surgery.select_head(model, params, "cc")
    with pytest.raises(ValueError, match="'readouts_0/linear/0e' is missing"):
        surgery.select_head(model, {"readouts_1": own["readouts_1"]}, "cc")


@pytest.fixture(scope="module")
def of_frames(model, params, predictor, frames):
    """What the tiny model says."""
    return answers(model, params, frames, jitted=predictor)[None]


def test_fewer_elements_say_the_same_of_their_structures(model, params, frames, of_frames):
    small, fewer = surgery.select_elements(model, params, ["O", 17, np.int64(1), "Na", "O"])
    assert small.atomic_numbers == (1, 8, 11, 17)
    assert_bundle(small, fewer)
    kept = [g for g, frame in enumerate(frames) if 6 not in frame.atomic_numbers]
    assert {frames[g].is_periodic for g in kept} == {True, False}
    found = answers(small, fewer, [frames[g] for g in kept])[None]
    assert_same(found, [of_frames[g] for g in kept])


def test_a_model_of_fewer_elements_is_saved_and_loaded(model, params, tmp_path):
    small, fewer = surgery.select_elements(model, params, ["Na", "Cl"])
    loaded, back = bundle.load(bundle.save(tmp_path / "small.jaxft", small, fewer))
    assert loaded.config == small.config
    jax.tree.map(np.testing.assert_array_equal, back, fewer)
    assert loaded.buffers.keys() == model.buffers.keys()


def test_all_elements_selected_are_the_model_itself(model, params):
    assert surgery.select_elements(model, params, reversed(model.atomic_numbers)) == (model, params)


@pytest.fixture(scope="module")
def with_bromine(model, params):
    """Like chlorine."""
    e0s = {model.heads[0]: -2.5}
    return surgery.add_element(model, params, "Br", like="Cl", e0s=e0s)


@pytest.fixture(scope="module")
def salts():
    """Sodium chloride and sodium bromide, each atom in the same place."""
    found = []
    for symbol in ("Cl", "Br"):
        atoms = ase.build.bulk("NaCl", "rocksalt", 5.6)
        atoms.positions[1] += [0.2, -0.1, 0.3]
        atoms.symbols[1] = symbol
        found.append(data.from_atoms(atoms))
    return found


def test_a_new_element_leaves_the_old_ones_and_begins_as_the_one_it_is_like(
    with_bromine, model, frames, of_frames, salts
):
    """The tiny model has no radii and no repulsion: only the E0 tells chlorine from bromine."""
    other, more = with_bromine
    assert other.atomic_numbers == (1, 6, 8, 11, 17, 35)
    assert_bundle(other, more)
    *old, chloride, bromide = answers(other, more, [*frames, *salts])[None]
    assert_same(old, of_frames)
    bromide[0] -= -2.5 - model.e0s[0, model.atomic_numbers.index(17)]
    np.testing.assert_allclose(bromide, chloride, **EXACT)


def test_ascending_tables_stay_ascending_and_others_grow_at_the_end(model, params):
    other, _ = surgery.add_element(model, params, 7, like=6, e0s=-1.0)
    assert other.atomic_numbers == (1, 6, 7, 8, 11, 17)
    np.testing.assert_array_equal(other.buffers["atomic_numbers"], other.atomic_numbers)
    assert other.e0s[0, 2] == -1.0
    shuffled, _ = surgery._with_elements(model, params, [2, 0, 1, 3, 4], [8, 1, 6, 11, 17])
    other, _ = surgery.add_element(shuffled, params, 7, like=6, e0s=-1.0)
    assert other.atomic_numbers == (8, 1, 6, 11, 17, 7)


def test_adding_an_element_and_selecting_the_others_is_the_identity(model, params, with_bromine):
    back, same = surgery.select_elements(*with_bromine, model.atomic_numbers)
    assert_close_trees(same, params)
    assert back.config == model.config
    np.testing.assert_array_equal(back.e0s, model.e0s)


def test_a_new_element_has_the_e0_of_each_head(several):
    model, params = several
    e0s = {"pbe": -1.0, "cc": -3.0, "r2scan": -2.0}
    other, _ = surgery.add_element(model, params, "N", like="C", e0s=e0s)
    np.testing.assert_array_equal(other.e0s[:, 2], [-1.0, -2.0, -3.0])
    np.testing.assert_array_equal(np.delete(other.e0s, 2, axis=1), model.e0s)


def test_bad_elements_are_refused(several):
    model, params = several
    add = functools.partial(surgery.add_element, model, params)
    with pytest.raises(ValueError, match="Cl is one of the model's elements, H C O Na Cl;"):
        add("Cl", like="Na", e0s=0.0)
    with pytest.raises(
        ValueError, match="Br was to begin as I, which the model does not know; its"
    ):
        add("Br", like="I", e0s=0.0)
    with pytest.raises(ValueError, match=r"\+ hf\n- cc\n- r2scan|- cc\n- r2scan\n\+ hf"):
        add("Br", like="Cl", e0s={"pbe": 0.0, "hf": 0.0})
    with pytest.raises(ValueError, match="the E0s of Br are not finite"):
        add("Br", like="Cl", e0s=float("nan"))
    with pytest.raises(
        ValueError, match="restricted to He, which the model does not know; its ele"
    ):
        surgery.select_elements(model, params, ["H", "He"])
    with pytest.raises(ValueError, match="no elements were named; choose among H C O Na Cl"):
        surgery.select_elements(model, params, [])
    with pytest.raises(ValueError, match="elements='HO' is one string; give a list such as"):
        surgery.select_elements(model, params, "HO")


@pytest.mark.parametrize("element", ["Xx", "X", "", 0, 119, -1, True, 8.0, None])
def test_what_is_no_element_is_refused(model, params, element):
    with pytest.raises(ValueError, match="is no element; give a symbol such as 'O' or an atomic"):
        surgery.add_element(model, params, element, like="Cl", e0s=0.0)
    with pytest.raises(ValueError, match="is no element"):
        surgery.select_elements(model, params, [element])


OPERATIONS = {
    "select_head": lambda m, p: surgery.select_head(m, p, "cc"),
    "add_head": lambda m, p: surgery.add_head(m, p, "water", like="cc"),
    "select_elements": lambda m, p: surgery.select_elements(m, p, [1, 8]),
    "add_element": lambda m, p: surgery.add_element(m, p, "Br", like="Cl", e0s=0.0),
}


@pytest.mark.parametrize("operate", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize(("kind", "dtype"), [(np.asarray, "float32"), (jnp.asarray, "float64")])
def test_leaves_stay_what_they_are(several, operate, kind, dtype):
    """Numpy or jax, in their dtype; what does not change is not copied; the input is untouched."""
    model, params = several
    given = jax.tree.map(lambda leaf: kind(leaf, dtype=dtype), params)
    before = {path: np.array(leaf) for path, leaf in tree.flatten(given).items()}
    other, result = operate(model, given)
    old, new = tree.flatten(given), tree.flatten(result)
    assert list(new) == list(old)
    for path, leaf in new.items():
        assert leaf.dtype == dtype, path
        assert isinstance(leaf, np.ndarray if kind is np.asarray else jax.Array), path
        assert leaf is old[path] or leaf.shape != old[path].shape, path
        np.testing.assert_array_equal(old[path], before[path])
    changed = {path for path, leaf in new.items() if leaf is not old[path]}
    assert 0 < len(changed) < len(new)
    for path, buffer in other.buffers.items():
        assert buffer is model.buffers[path] or buffer.shape != model.buffers[path].shape, path
        assert buffer.dtype == model.buffers[path].dtype, path
