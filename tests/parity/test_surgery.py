"""Surgery is exact for every architecture: torch says of the original what jaxft says after it."""

import functools

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.torch
pytest.importorskip("torch")
pytest.importorskip("mace")

from parity import reference  # noqa: E402

from converters.to_jax import convert  # noqa: E402
from converters.to_torch import export  # noqa: E402
from converters.verify import structures  # noqa: E402
from jaxft import bundle, data, predict, surgery, tree  # noqa: E402

EXACT = {"rtol": 1e-12, "atol": 1e-10}
"""eV, eV/Å and eV/Å³: what parity in float64 leaves of energies of a few hundred eV."""

WITHOUT_RADII = (
    "small-a-parity",
    "small-d",
    "small-nl",
    "small-bias-heads",
    "small-embedding-readout",
)
"""Here nothing but its rows of parameters tells an element from another."""

WITH_RADII = ("small-mh-1", "small-mace-zbl-heads")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """``name -> (module, model, params)``, the same model in torch and in jaxft."""

    @functools.cache
    def make(name):
        module = reference.build(name)
        path = tmp_path_factory.mktemp(name) / "original.model"
        return module, *convert(reference.save(module, path))

    return make


def frames_of(module, elements):
    """A molecule and a triclinic crystal, with what the model embeds."""
    found = structures(elements, float(module.r_max))
    frames = [found["molecule"], found["triclinic crystal"]]
    for key, values in reference.random_features(module, frames).items():
        for atoms, value in zip(frames, values, strict=True):
            atoms.info[key] = value
    return frames


def as_element(frames, old, new):
    """The same structures with one element called another."""
    found = [atoms.copy() for atoms in frames]
    for atoms in found:
        atoms.numbers[atoms.numbers == old] = new
    assert any(new in atoms.numbers for atoms in found)
    return found


def of_torch(module, frames, head):
    out = reference.evaluate(module, frames, head=head)
    assert np.abs(out.forces).max() > 0.1  # eV/Å
    return out.energy, out.forces, out.stress[-1]


def of_jaxft(model, params, frames, head=None):
    dataset = data.prepare([data.from_atoms(atoms) for atoms in frames], model, head=head)
    (batch,) = data.epoch(dataset, len(frames), dtype="float64")
    out = jax.jit(functools.partial(predict, model))(params, batch.graph)
    table = dict(zip(model.atomic_numbers, model.e0s[model.head_index(head)], strict=True))
    e0s = [sum(table[z] for z in atoms.numbers.tolist()) for atoms in frames]
    energy = np.asarray(out.energy)[: len(frames)] + np.array(e0s)
    forces = np.asarray(out.forces)[batch.graph.is_atom]
    return energy, forces, np.asarray(out.stress)[len(frames) - 1]


def assert_same(given, expected):
    for a, b in zip(given, expected, strict=True):
        np.testing.assert_allclose(a, b, **EXACT)


def e0s_like(model, z):
    """{head: E0}, so that a new element differs from the old one in nothing."""
    row = model.atomic_numbers.index(z)
    return dict(zip(model.heads, model.e0s[:, row].tolist(), strict=True))


def grown(model, params, head, element):
    """One more head and one more element."""
    model, params = surgery.add_head(model, params, "new", like=head)
    return surgery.add_element(model, params, element, like=26, e0s=e0s_like(model, 26))


@pytest.mark.parametrize("name", [*WITHOUT_RADII, *WITH_RADII])
def test_a_grown_model_exported_says_of_old_heads_and_elements_what_it_said(
    converted, tmp_path, name
):
    module, model, params = converted(name)
    head = model.heads[-1]
    model, params = grown(model, params, head, 27)
    assert model.atomic_numbers == (1, 8, 26, 27)
    file = reference.load(export((model, params), tmp_path / "grown.model"))
    frames = frames_of(module, (1, 8, 26))
    for old in model.heads[:-1]:
        assert_same(of_torch(file, frames, old), of_torch(module, frames, old))
    assert_same(of_torch(file, frames, "new"), of_torch(module, frames, head))
    if name in WITHOUT_RADII:
        renamed = as_element(frames, 26, 27)
        assert_same(of_torch(file, renamed, "new"), of_torch(module, frames, head))


@pytest.mark.parametrize("name", [*WITHOUT_RADII, *WITH_RADII])
def test_a_grown_model_reduced_again_is_the_original(converted, name):
    _, model, params = converted(name)
    more = grown(model, params, model.heads[0], 7)
    reduced, same = surgery.select_elements(*more, model.atomic_numbers)
    reduced, same = surgery.select_head(reduced, same, "new")
    reduced = surgery.rename_head(reduced, "new", model.heads[0])
    expected, params = surgery.select_head(model, params, model.heads[0])
    assert reduced.config == expected.config
    same, given = tree.flatten(same), tree.flatten(params)
    assert list(same) == list(given)
    for path, leaf in given.items():
        np.testing.assert_allclose(same[path], leaf, rtol=1e-14, err_msg=path)
    np.testing.assert_array_equal(reduced.e0s, expected.e0s)


@pytest.mark.parametrize("name", ["small-a-parity", "small-bias-heads"])
def test_a_copied_head_and_element_alone_are_the_originals(converted, name):
    """All of it at once: of what was added, the new head and the new element are selected."""
    module, model, params = converted(name)
    head = model.heads[-1]
    model, params = grown(model, params, head, 7)
    model, params = surgery.select_head(model, params, "new")
    model, params = surgery.select_elements(model, params, [7, 8])
    assert (model.heads, model.atomic_numbers) == (("new",), (7, 8))
    frames = frames_of(module, (8, 26))
    found = of_jaxft(model, params, as_element(frames, 26, 7))
    assert_same(found, of_torch(module, frames, head))


@pytest.mark.parametrize("name", [*WITHOUT_RADII, *WITH_RADII])
def test_one_head_and_two_elements_say_what_torch_says(converted, tmp_path, name):
    module, model, params = converted(name)
    head = model.heads[-1]
    small, fewer = surgery.select_head(model, params, head)
    small, fewer = surgery.select_elements(small, fewer, ["H", "Fe"])
    frames = frames_of(module, (1, 26))
    expected = of_torch(module, frames, head)
    if name in WITH_RADII:  # in jaxft, after a bundle
        path = bundle.save(tmp_path / "small.jaxft", small, fewer)
        assert_same(of_jaxft(*bundle.load(path), frames), expected)
    else:  # in torch, after an export
        file = reference.load(export((small, fewer), tmp_path / "small.model"))
        assert_same(of_torch(file, frames, head), expected)


def layout(model, params):
    """{path: (shape, dtype)} of parameters and constants."""
    arrays = {**tree.flatten(params), **model.buffers}
    return {path: (np.shape(array), np.asarray(array).dtype) for path, array in arrays.items()}


@pytest.mark.parametrize("name", ["small-bias-heads", "small-embedding-readout"])
def test_after_surgery_a_model_is_laid_out_as_torch_builds_such_a_model(converted, tmp_path, name):
    _, model, params = converted(name)
    bigger = grown(model, params, "cc", 27)
    small = surgery.select_elements(*surgery.select_head(model, params, "cc"), [1, 26])
    for i, (changed, leaves) in enumerate((bigger, small)):
        heads, elements = list(changed.heads), changed.atomic_numbers
        module = reference.build(name, heads=heads, elements=elements)
        built = convert(reference.save(module, tmp_path / f"{i}.model"))
        assert changed.config == built[0].config
        assert layout(changed, leaves) == layout(*built)


def test_no_head_is_added_where_torch_cannot_tell_heads_apart(converted):
    _, model, params = converted("small-embedding-readout")
    model, params = surgery.select_head(model, params, "cc")
    plain = model.config.model_copy(update={"family": "MACE"})
    with pytest.raises(ValueError, match="a plain MACE with an embedding readout has one head"):
        surgery.add_head(type(model)(plain, model.buffers), params, "water")
