"""New models: constants as mace-torch writes them, random parameters, statistics of the data."""

import ase
import e3nn_jax as e3nn
import jax
import numpy as np
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from jaxft import bundle, data, scratch, scratchrun, tree
from jaxft.architecture import FREE, Architecture, architecture_of, build
from jaxft.cli import app
from jaxft.config import ConfigError
from jaxft.models.couplings import coupling_tensors

E0S = {1: -13.0, 6: -1000.0, 8: -2000.0, 11: -50.0, 17: -400.0}
LEAN = Architecture(hidden="16x0e+16x1o", l_max=2, correlation=2, r_max=4.0, num_bessel=5)


@pytest.fixture(scope="module")
def lean(frames):
    """A small new model and its parameters."""
    return scratch.new(LEAN, frames, e0s=E0S, seed=3)


@pytest.mark.parametrize(("output", "nu"), [("0e", 3), ("1o", 2), ("1o", 3), ("2e", 3)])
def test_coupling_tensors_are_equivariant(output, nu):
    irreps = e3nn.Irreps("0e+1o+2e")
    tensor = coupling_tensors(str(irreps), output, 3)[nu]
    tensor = tensor[None] if output == "0e" else tensor
    x = np.random.default_rng(0).normal(size=irreps.dim)
    rotation = np.asarray(e3nn.rand_matrix(jax.random.key(1), ()), np.float64)
    turned = np.asarray(irreps.D_from_matrix(rotation)) @ x

    def coupled(features):
        out = tensor
        for _ in range(nu):
            out = np.einsum("mi...,i->m...", out, features)
        return out

    expected = np.asarray(e3nn.Irrep(output).D_from_matrix(rotation)) @ coupled(x)
    assert np.abs(coupled(x)).max() > 0.1
    np.testing.assert_allclose(coupled(turned), expected, atol=1e-6)  # D itself is of float32 kind


def test_a_file_of_mace_torch_is_built_again_from_its_architecture(model):
    """Every constant, name by name; coupling tensors up to the sign of a path."""
    architecture = architecture_of(model.config)
    e0s = dict(zip(model.atomic_numbers, model.e0s[0].tolist(), strict=True))
    again = build(
        architecture,
        model.atomic_numbers,
        avg_num_neighbors=model.config.interactions[0].avg_num_neighbors,
        e0s=e0s,
        scale=float(model.constants.scale[0]),
        shift=float(model.constants.shift[0]),
    )
    ours, theirs = again.config.model_dump(), model.config.model_dump()
    for name in ours.keys() - FREE:
        assert ours[name] == theirs[name], name
    known = {k: v for k, v in model.buffers.items() if not k.endswith("_zeroed")}
    assert again.buffers.keys() == known.keys()
    for name, value in known.items():
        found = again.buffers[name]
        assert (found.shape, found.dtype) == (value.shape, value.dtype), name
        if "U_matrix" in name:
            found = found * np.sign((found * value).reshape(-1, value.shape[-1]).sum(axis=0))
        np.testing.assert_allclose(found, value, atol=1e-14, rtol=1e-14, err_msg=name)


def test_parameters_begin_with_the_distributions_of_mace_torch(lean):
    """Normal of deviation 1, in the products 1 / number of paths."""
    model, params = lean
    assert {leaf.dtype.name for leaf in tree.flatten(params).values()} == {"float32"}
    checked = 0
    for path, leaf in tree.flatten(params).items():
        width = leaf.shape[-2] if "symmetric_contractions" in path else 1
        if leaf.size > 300:
            checked += 1
            error = 4 / np.sqrt(leaf.size)  # four standard errors
            assert abs(float(np.mean(leaf)) * width) < error, path
            assert abs(float(np.std(leaf)) * width - 1) < error, path
    assert checked > 10
    assert tree.flatten(scratch.randomised(model, 3)).keys() == tree.flatten(params).keys()


def test_the_seed_decides_the_parameters(lean):
    model, params = lean
    same, other = scratch.randomised(model, 3), scratch.randomised(model, 4)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert np.abs(other["readouts_0"]["linear"]["0e"] - params["readouts_0"]["linear"]["0e"]).max()


def chain(energy, forces, *, n=3, gap=1.0, kind="Default"):
    atoms = ase.Atoms("H" * n, [(gap * i, 0, 0) for i in range(n)])
    atoms.info |= {"REF_energy": energy, "config_type": kind}
    atoms.arrays["REF_forces"] = np.asarray(forces, float)
    return data.from_atoms(atoms)


def test_statistics_of_a_set_with_a_known_answer():
    """Two chains, within 1.5 Å 1, 2, 1 and 1, 1 neighbours; an atom alone is not counted."""
    frames = [
        chain(-30.0, [(3, 0, 0), (0, 0, 0), (-3, 0, 0)]),
        chain(-26.0, [(0, 0, 0), (0, 0, 0)], n=2),
        chain(-11.0, [(0, 0, 0)], n=1),
        chain(-99.0, [(0, 0, 0)], n=1, kind="IsolatedAtom"),
    ]
    found = scratch.statistics(frames, 1.5, {1: -9.0})
    assert found.avg_num_neighbors == pytest.approx((1 + 2 + 1 + 1 + 1) / 5)
    assert found.scale == pytest.approx(np.sqrt(18 / 18))
    assert found.shift == pytest.approx(np.mean([-3 / 3, -8 / 2, -2]))
    given = scratch.statistics(frames, 1.5, {}, scale=2.5, shift=0.0)
    assert given[1:] == (2.5, 0.0)


def test_a_new_model_carries_its_statistics(lean, frames):
    model, _ = lean
    found = scratch.statistics(frames, LEAN.r_max, E0S)
    assert {b.avg_num_neighbors for b in model.config.interactions} == {found.avg_num_neighbors}
    assert (float(model.constants.scale[0]), float(model.constants.shift[0])) == found[1:]
    assert dict(zip(model.atomic_numbers, model.e0s[0].tolist(), strict=True)) == E0S


def test_a_bundle_lends_its_architecture_alone(small, frames):
    model, params = small
    own = dict(zip(model.atomic_numbers, model.e0s[0].tolist(), strict=True))
    again, drawn = scratch.again(model, frames, e0s={1: -1.0}, seed=5)
    found = scratch.statistics(frames, model.r_max, own | {1: -1.0})
    assert again.e0s[0].tolist() == [-1.0, *model.e0s[0, 1:].tolist()]
    assert again.config.interactions[0].avg_num_neighbors == found.avg_num_neighbors
    assert float(again.constants.scale[0]) == found.scale
    before, after = tree.flatten(params), tree.flatten(drawn)
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    assert all(np.abs(after[k] - before[k]).max() > 0 for k in before if before[k].size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": "16x0e+8x1o"}, "every irrep as often"),
        ({"hidden": "16x1o"}, "in this order, with 0e"),
        ({"hidden": "16x0e+16x1e"}, "in this order, with 0e"),
        ({"hidden": "16x0e+16x1o+16x2e", "l_max": 1}, "above l_max"),
        ({"hidden": "a few"}, "is no list such as"),
        ({"correlation": 4}, "correlation"),
        ({"radial_mlp": [8, 0]}, "widths must be positive"),
        ({"chanels": 4}, "chanels"),
    ],
)
def test_architectures_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        Architecture(**change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"e0s": {1: 0.0}}, "E0s of C, O, Na, Cl are missing"),
        ({"e0s": E0S, "elements": [1, 8]}, "hold C, Na, Cl, which the model is not to know"),
    ],
)
def test_data_that_do_not_suit_the_model_are_refused(options, message, frames):
    with pytest.raises(ValueError, match=message):
        scratch.new(LEAN, frames, **options)


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (chain(0.0, np.zeros((3, 3))), {}, "all forces are zero"),
        (chain(0.0, np.ones((3, 3)), gap=9.0), {}, "no atom has a neighbour"),
        (chain(0.0, np.ones((3, 3)), kind="IsolatedAtom"), {}, "no frames but isolated"),
    ],
)
def test_data_without_statistics_are_refused(frame, options, message):
    with pytest.raises(ValueError, match=message):
        scratch.statistics([frame], 1.5, {1: 0.0}, **options)


def test_an_unknown_key_names_the_closest_one():
    with pytest.raises(ConfigError, match="did you mean 'hidden'"):
        scratchrun.read(["train=a.xyz", "e0s=average", "architecture.hiden=8x0e"])
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        scratchrun.read(["trian=a.xyz", "e0s=average"])


def test_the_command_writes_a_bundle_and_overwrites_none(tmp_path, tiny, frames):
    source, output = tmp_path / "like.jaxft", tmp_path / "new.jaxft"
    bundle.save(source, *tiny)
    waters = [f for f in frames if set(f.atomic_numbers.tolist()) == {1, 8}]
    assert waters
    water = ase.Atoms(waters[0].atomic_numbers, waters[0].positions)
    water.info["REF_energy"], water.arrays["REF_forces"] = waters[0].energy, waters[0].forces
    water.write(tmp_path / "train.xyz")
    words = [f"train={tmp_path / 'train.xyz'}", f"like={source}", "e0s=like", "elements=[H,O]"]
    words += ["architecture.hidden=4x0e", "architecture.correlation=1", "dtype=float64"]
    result = CliRunner().invoke(app, ["new", str(output), *words])
    assert result.exit_code == 0, result.output
    model, params, provenance = bundle.load_numpy(output)
    assert model.atomic_numbers == (1, 8)
    assert provenance["random"]
    assert model.config.products[0].irreps_out == "4x0e"
    assert model.config.num_bessel == tiny[0].config.num_bessel  # kept from the bundle
    assert bundle.stored_dtype(params) == "float64"
    again = CliRunner().invoke(app, ["new", str(output), *words])
    assert again.exit_code == 1
