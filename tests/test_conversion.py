"""From torch files to bundles and back: bit for bit, or refused with a reason."""

import dataclasses
import functools
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
pytest.importorskip("mace")

from parity import reference  # noqa: E402

from converters import to_torch  # noqa: E402
from converters.reader import ModelFileError, read  # noqa: E402
from converters.to_jax import convert, convert_with_provenance, from_file  # noqa: E402
from converters.to_torch import export  # noqa: E402
from converters.verify import structures, verify  # noqa: E402
from jaxft import bundle, data, finetune, loss, merge, predict, surgery, tree  # noqa: E402
from jaxft.strategies.lora import lora  # noqa: E402

SHIPPED = Path(__file__).parents[1] / "benchmarks" / "data" / "gfn2_small.model"
HCO = (1, 6, 8)
E0_NAME = "atomic_energies_fn.atomic_energies"
UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def small(**changes):
    """A small random model of H, C and O that is quick to build."""
    return reference.build("small", elements=HCO, **{"correlation": 2} | changes)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return reference.save(small(), tmp_path_factory.mktemp("small") / "small.model")


def round_trip(path, folder):
    """`.model` → bundle → `.model`."""
    bundle.save(folder / "a.jaxft", *convert(path))
    return export(folder / "a.jaxft", folder / "back.model")


def assert_same_tensors(path, expected):
    """Names, order, shapes, dtypes and bits of all tensors, and what torch trains."""
    found, expected = reference.load(path), reference.load(expected)
    assert list(found.state_dict()) == list(expected.state_dict())
    for (name, ours), theirs in zip(
        found.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert ours.numpy().tobytes() == theirs.numpy().tobytes(), name
    assert dict(found.named_parameters()).keys() == dict(expected.named_parameters()).keys()
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad


def calculate(path, frames, dtype="float64"):
    """Energies, forces and stresses by mace-torch's own calculator."""
    from mace.calculators import MACECalculator

    results = []
    with reference.default_dtype(dtype):
        calculator = MACECalculator(model_paths=str(path), device="cpu", default_dtype=dtype)
        for atoms in frames:
            calculator.calculate(atoms)
            results.append(dict(calculator.results))
    return results


# --- bit for bit ----------------------------------------------------------------------------------


def test_the_shipped_model_survives_the_round_trip_bit_for_bit(tmp_path):
    assert_same_tensors(round_trip(SHIPPED, tmp_path), SHIPPED)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float64"},
        {"dtype": "float32"},
        {"num_interactions": 3, "max_ell": 3, "r_max": 4.7, "radial_MLP": [16, 8]},
        {"correlation": 3, "hidden_irreps": reference.o3.Irreps("8x0e+8x1o+8x2e")},
        {"keep_last_layer_irreps": True},
        {"atomic_inter_scale": [7.0], "atomic_inter_shift": [0.5]},
        {"atomic_energies": np.array([[-1.0, -2.0, -3.0]]), "heads": ["dft"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_random_model_survives_the_round_trip_bit_for_bit(options, tmp_path):
    path = reference.save(small(**options), tmp_path / "a.model")
    back = round_trip(path, tmp_path)
    assert_same_tensors(back, path)
    assert convert(back)[0].config == convert(path)[0].config


def test_a_trainable_bessel_buffer_stays_loadable_and_becomes_a_constant(tmp_path):
    """torch's fine-tuning turns it into a parameter that its optimiser does not know."""
    model = small()
    basis = model.radial_embedding.bessel_fn
    values = basis.bessel_weights.clone() * 1.01
    del basis.bessel_weights
    basis.bessel_weights = torch.nn.Parameter(values)
    path = reference.save(model, tmp_path / "a.model")
    back = reference.load(round_trip(path, tmp_path))
    name = "radial_embedding.bessel_fn.bessel_weights"
    assert list(back.state_dict()) == list(model.state_dict())
    assert torch.equal(back.state_dict()[name], values)
    assert name not in dict(back.named_parameters())
    assert verify(tmp_path / "back.model").forces < 1e-9


def test_flags_that_older_writers_lack_are_not_added(tmp_path):
    model = small()
    for product in model.products:
        for contraction in product.symmetric_contractions.contractions:
            for name in [n for n in contraction._buffers if n.endswith("_zeroed")]:
                del contraction._buffers[name]
    path = reference.save(model, tmp_path / "a.model")
    assert not any("_zeroed" in name for name in read(path).tensors)
    assert_same_tensors(round_trip(path, tmp_path), path)


def test_the_files_own_coupling_tensors_are_kept(tmp_path):
    """Writers with reduced Clebsch-Gordan bases have fewer paths than mace-torch makes here."""
    model = small()
    contraction = model.products[0].symmetric_contractions.contractions[0]
    contraction.U_matrix_2 = contraction.U_matrix_2[..., :-1].contiguous()
    contraction.weights_max = torch.nn.Parameter(contraction.weights_max[:, :-1].contiguous())
    path = reference.save(model, tmp_path / "a.model")
    back = round_trip(path, tmp_path)
    assert_same_tensors(back, path)
    assert verify(back).forces < 1e-9


def test_constants_of_activations_are_the_files_own(tmp_path):
    model = small()
    for block in model.interactions:
        for layer in list(block.conv_tp_weights)[:-1]:
            layer.act.cst = 1.7
    model.readouts[-1].non_linearity.acts[0].cst = 1.9
    path = reference.save(model, tmp_path / "a.model")
    back = reference.load(round_trip(path, tmp_path))
    assert all(block.conv_tp_weights[0].act.cst == 1.7 for block in back.interactions)
    assert back.readouts[-1].non_linearity.acts[0].cst == 1.9
    assert verify(path).forces < 1e-9
    assert verify(tmp_path / "back.model").forces < 1e-9


@pytest.mark.parametrize(
    ("stored", "cast", "exported"),
    [("float64", "float32", "float64"), ("float32", "float64", "float64")],
)
def test_mixed_dtypes_are_exported_in_the_wider_one_with_unrounded_e0s(
    stored, cast, exported, tmp_path
):
    e0s = np.array([-13.587222780835477, -1029.4889999855063, -2042.0330099956639])
    path = reference.save(small(dtype=stored, atomic_energies=e0s), tmp_path / "a.model")
    model, params = convert(path)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, cast), params)
    back = reference.load(export((model, params), tmp_path / "b.model"))
    others = {n: t for n, t in back.state_dict().items() if n != E0_NAME and t.is_floating_point()}
    assert {t.dtype for t in others.values()} == {getattr(torch, exported)}
    kept, original = (m.state_dict()[E0_NAME] for m in (back, reference.load(path)))
    assert kept.dtype == original.dtype == getattr(torch, stored)
    assert torch.equal(kept, original)
    frames = list(structures(HCO, model.r_max).values())
    ours = _predicted(model, params, frames, "float64")
    limit = 1e-9 if stored == "float64" else 1e-6  # the file's constants were rounded
    for (_, forces, _), theirs in zip(ours, calculate(tmp_path / "b.model", frames, "float64")):
        np.testing.assert_allclose(forces, theirs["forces"], atol=limit)


# --- fine-tuned models ----------------------------------------------------------------------------


def _predicted(model, params, frames, dtype):
    """Total energy, forces and stress of each frame."""
    dataset = data.prepare([data.from_atoms(a) for a in frames], model)
    (batch,) = data.epoch(dataset, len(frames), dtype=dtype)
    params = jax.tree.map(functools.partial(jnp.asarray, dtype=dtype), params)
    out = jax.jit(functools.partial(predict, model))(params, batch.graph)
    ends = np.cumsum([len(a) for a in frames])
    forces = np.split(np.asarray(out.forces)[: ends[-1]], ends[:-1])
    e0 = dict(zip(model.atomic_numbers, model.e0s[0], strict=True))
    return [
        (float(out.energy[g]) + sum(e0[z] for z in atoms.numbers.tolist()), f, out.stress[g])
        for g, (atoms, f) in enumerate(zip(frames, forces, strict=True))
    ]


def test_a_fine_tuned_model_gives_the_same_numbers_in_torch(small_file, tmp_path):
    """LoRA, a few steps, merged, other E0s, exported, run by MACECalculator."""
    start, params = convert(small_file)
    model = surgery.set_e0s(start, {1: -13.587222780835477})
    dataset = data.prepare(
        [data.from_atoms(atoms, keys=data.Keys()) for atoms in reference.labelled_crystals(model)],
        model,
    )
    (batch,) = data.epoch(dataset, 2, dtype="float64")
    recipe = (lora(rank=2, also_train="readouts_*/**"),)
    objective = loss.weighted(model, stress=100.0)
    init, step = finetune(objective, recipe, optax.adam(1e-2))
    state = init(jax.random.key(0), jax.tree.map(jnp.asarray, params))
    for _ in range(3):
        state, info = step(state, batch)
    assert info["is_finite"]
    tuned = merge(recipe, state)
    bundle.save(tmp_path / "tuned.jaxft", model, tuned)
    path = export(tmp_path / "tuned.jaxft", tmp_path / "tuned.model")

    frames = list(structures(HCO, model.r_max).values())
    ours = _predicted(model, tuned, frames, "float64")
    before = _predicted(start, params, frames, "float64")
    assert max(np.abs(a[1] - b[1]).max() for a, b in zip(ours, before)) > 1e-2  # it did move
    for atoms, (energy, forces, stress), theirs in zip(frames, ours, calculate(path, frames)):
        assert energy == pytest.approx(theirs["energy"], abs=1e-10 * len(atoms))
        np.testing.assert_allclose(forces, theirs["forces"], atol=1e-9)
        if atoms.pbc.all():
            voigt = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
            np.testing.assert_allclose(voigt, theirs["stress"], atol=1e-10)


def test_an_exported_model_is_a_valid_start(small_file, tmp_path):
    model, params = convert(small_file)
    again, same = convert(export((model, params), tmp_path / "b.model"))
    assert again.config == model.config
    assert again.buffers.keys() == model.buffers.keys()
    jax.tree.map(np.testing.assert_array_equal, params, same)


# --- manners --------------------------------------------------------------------------------------


def test_export_changes_nothing_global(small_file, tmp_path, monkeypatch):
    monkeypatch.delenv(UNSAFE, raising=False)
    random, filters = torch.random.get_rng_state(), list(warnings.filters)
    with reference.default_dtype("float16"):
        export(convert(small_file), tmp_path / "b.model")
        assert torch.get_default_dtype() == torch.float16
    assert UNSAFE not in os.environ
    assert torch.equal(random, torch.random.get_rng_state())
    assert filters == warnings.filters


def test_export_refuses_an_existing_file(small_file, tmp_path):
    (tmp_path / "b.model").write_text("precious")
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        export(convert(small_file), tmp_path / "b.model")
    assert (tmp_path / "b.model").read_text() == "precious"


def test_export_refuses_parameters_of_another_shape_or_name(small_file, tmp_path):
    model, params = convert(small_file)
    flat = dict(tree.flatten(params))
    del flat["readouts_0/linear/0e"]
    flat["lora/A"] = np.zeros((2, 2))
    with pytest.raises(ValueError, match=r"(?s)- readouts_0/linear/0e .*\+ lora/A \(2, 2\)"):
        export((model, tree.unflatten(flat)), tmp_path / "b.model")
    assert not list(tmp_path.iterdir())


def test_export_reads_back_what_it_wrote(small_file, tmp_path, monkeypatch):
    fill = to_torch._fill

    def forgetful(torch, module, tensors):
        name = "products.1.linear.weight"
        fill(torch, module, {**tensors, name: tensors[name] + 1e-12})

    monkeypatch.setattr(to_torch, "_fill", forgetful)
    with pytest.raises(ValueError, match=r"(?s)- params/products_1/linear/0e.*\+ params/"):
        export(convert(small_file), tmp_path / "b.model")
    assert not list(tmp_path.iterdir())


def test_export_of_a_float64_bundle_needs_no_float64_in_jax(small_file, tmp_path):
    bundle.save(tmp_path / "a.jaxft", *convert(small_file))
    jax.config.update("jax_enable_x64", False)
    try:
        export(tmp_path / "a.jaxft", tmp_path / "b.model")
    finally:
        jax.config.update("jax_enable_x64", True)
    assert_same_tensors(tmp_path / "b.model", small_file)


def test_verify_prints_a_table_and_finds_a_wrong_number(small_file, tmp_path, monkeypatch):
    report = verify(small_file)
    assert report.energy < 1e-10
    assert report.forces < 1e-9
    assert report.stress < 1e-10
    assert len(report.rows) == 6
    assert sum(row.stress is not None for row in report.rows) == 2
    assert "triclinic crystal" in str(report)
    assert verify(small_file, dtype="float32").forces < 1e-4

    assert str(report).splitlines()[-1].startswith("agrees (allowed: energy 1e-08")

    def wrong(path):
        model, params, provenance = convert_with_provenance(path)
        return model, jax.tree.map(lambda leaf: leaf * (1 + 1e-6), params), provenance

    monkeypatch.setattr("converters.verify.convert_with_provenance", wrong)
    frames = [structures(HCO, 4.5)["molecule"]]
    report = verify(small_file, frames=frames)
    assert report.forces > 1e-7
    assert not report.agrees
    assert "DIFFERS" in str(report)


@pytest.mark.parametrize("name", ["small-charge-spin", "small-embedding-graph-continuous"])
def test_verify_draws_what_a_model_reads_and_it_arrives(name, tmp_path, monkeypatch):
    path = reference.save(reference.build(name), tmp_path / "a.model")
    seen = []
    prepare = data.prepare

    def spy(frames, model, **options):
        seen.append(prepare(frames, model, **options))
        return seen[-1]

    monkeypatch.setattr("converters.verify.data.prepare", spy)
    assert verify(path).agrees
    drawn = [{k: float(v) for k, v in sample.features.items()} for sample in seen[0].samples]
    assert len({tuple(d.values()) for d in drawn}) > 1
    assert any(d != {"total_spin": 1.0, "total_charge": 0.0} for d in drawn)


# --- refusals -------------------------------------------------------------------------------------


def test_tensors_that_are_missing_or_unknown_are_both_listed(small_file):
    file = read(small_file)
    tensors = dict(file.tensors)
    lost = tensors.pop("interactions.0.skip_tp.weight")
    tensors["interactions.0.alpha"] = lost
    changed = dataclasses.replace(
        file, tensors=tensors, parameters=file.parameters | {"interactions.0.alpha"}
    )
    with pytest.raises(
        ModelFileError,
        match=r"(?s)- interactions\.0\.skip_tp\.weight\n\+ interactions\.0\.alpha",
    ):
        from_file(changed)


def test_a_damaged_attribute_is_an_error_of_the_file(small_file):
    file = read(small_file)
    (instruction, *_) = file.root.module("readouts.0.linear").get("instructions")
    instruction.args = (*instruction.args[:3], b"flipped")
    with pytest.raises(ModelFileError, match="damaged"):
        from_file(file)


def test_a_tensor_of_another_size_is_named(small_file):
    file = read(small_file)
    name = "interactions.1.linear.weight"
    changed = dataclasses.replace(file, tensors={**file.tensors, name: file.tensors[name][:-1]})
    with pytest.raises(ModelFileError, match=r"interactions\.1\.linear\.weight"):
        from_file(changed)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"blocks": "Att Att"}, "RealAgnosticAttResidualInteractionBlock"),
        ({"gate": torch.nn.functional.relu}, "relu"),
        (
            {"cls": reference.modules.MACE, "embedding_specs": reference.SMALL_CHARGE_AND_SPIN}
            | {"heads": ["dft", "cc"], "use_embedding_readout": True},
            "embedding readout of several heads in a plain MACE",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_reproduced_is_refused_by_name(changes, reason, tmp_path):
    path = reference.save(small(**changes), tmp_path / "a.model")
    with pytest.raises(ModelFileError, match=reason):
        convert(path)


@pytest.mark.parametrize(
    ("module", "attribute", "value", "reason"),
    [
        ("spherical_harmonics", "normalization", "norm", "spherical harmonics"),
        ("interactions.0.conv_tp_weights.layer0", "var_in", 2.0, "variances other than 1"),
        ("interactions.1.equivariant_nonlin", "_layout_is_ir_mul", True, "cuEquivariance"),
        ("interactions.1.equivariant_nonlin", "_act_gate", torch.tanh, "silu and sigmoid"),
        ("readouts.1", "num_heads", 3, "a readout has 3 heads, the model 1"),
        ("", "heads", ["a", "b"], "has 1 rows, the heads are"),
    ],
)
def test_attributes_that_change_the_function_are_refused(
    module, attribute, value, reason, tmp_path
):
    model = small(blocks="R NL")
    setattr(model.get_submodule(module), attribute, value)
    with pytest.raises(ModelFileError, match=reason):
        convert(reference.save(model, tmp_path / "a.model"))


def test_networks_and_powers_that_are_not_known_are_refused(tmp_path):
    model = small(blocks="R NL")
    model.interactions[1].density_fn.net[2] = torch.nn.ReLU()
    with pytest.raises(ModelFileError, match="ReLU"):
        convert(reference.save(model, tmp_path / "a.model"))
    model = small()
    model.radial_embedding.cutoff_fn.p = torch.tensor(5.5)
    with pytest.raises(ModelFileError, match=r"cutoff power 5\.5"):
        convert(reference.save(model, tmp_path / "b.model"))


def test_numbers_that_are_not_finite_are_refused_by_name_unless_allowed(tmp_path):
    model = small()
    with torch.no_grad():
        model.interactions[1].linear_up.weight[3] = torch.nan
    path = reference.save(model, tmp_path / "a.model")
    with pytest.raises(ModelFileError, match=r"interactions\.1\.linear_up\.weight.*diverged"):
        convert(path)
    model, params = convert(path, allow_nonfinite=True)
    with pytest.raises(bundle.BundleError, match="interactions_1/linear_up/0e"):
        bundle.save(tmp_path / "a.jaxft", model, params)
    bundle.save(tmp_path / "a.jaxft", model, params, allow_nonfinite=True)
    _, again = bundle.load(tmp_path / "a.jaxft")
    assert np.isnan(again["interactions_1"]["linear_up"]["0e"]).sum() == 1
    assert (
        torch.isnan(
            reference.load(export(tmp_path / "a.jaxft", tmp_path / "back.model"))
            .interactions[1]
            .linear_up.weight
        ).sum()
        == 1
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_widened_exactly(dtype, tmp_path):
    model = small().to(getattr(torch, dtype))
    converted, params = convert(reference.save(model, tmp_path / "a.model"))
    wide = convert(reference.save(model.float(), tmp_path / "b.model"))
    assert bundle.stored_dtype(params) == "float32"
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(wide[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name, buffer in converted.buffers.items():
        np.testing.assert_array_equal(buffer, wide[0].buffers[name])
    assert verify(tmp_path / "a.model").agrees
    assert verify(export((converted, params), tmp_path / "back.model"), dtype="float32").agrees


def test_a_checkpoint_converts_like_the_model_it_belongs_to(small_file, tmp_path):
    model = small(seed=7)
    torch.save({"model": model.state_dict(), "optimizer": {}}, tmp_path / "a.pt")
    with pytest.raises(ModelFileError, match="--like"):
        convert(tmp_path / "a.pt")
    ours = convert(tmp_path / "a.pt", like=small_file)
    whole = convert(reference.save(model, tmp_path / "a.model"))
    assert ours[0].config == whole[0].config
    for mine, theirs in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_array_equal(mine, theirs)


# --- every option ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in reference.OPTIONS if n != "small-attention"])
def test_every_option_survives_the_round_trip_bit_for_bit(name, tmp_path):
    model = reference.build(name)
    path = reference.save(model, tmp_path / "a.model")
    back = round_trip(path, tmp_path)
    if name != "small-trainable":  # what torch's fine-tuning made parameters are constants again
        assert_same_tensors(back, path)
    assert convert(back)[0].config == convert(path)[0].config
    again = reference.load(back)
    own = [{k for k in m.__dict__ if not k.startswith("_")} for m in (model, again)]
    assert type(again) is type(model)
    assert own[0] == own[1]
    frames = list(structures(convert(path)[0].atomic_numbers, 4.5).values())[:4]
    features = reference.random_features(model, frames)
    theirs = reference.evaluate(model, frames, features=features)
    for ours, expected in zip(
        reference.evaluate(again, frames, features=features), theirs, strict=True
    ):
        # tensors are equal bit for bit, but their alignment in memory decides what BLAS does
        size = np.nanmax(np.abs(expected), initial=0.0)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-13 * max(size, 1.0))


def test_a_state_dict_is_the_modules_own(tmp_path):
    model = reference.build("small-mh-1")
    path = reference.save(model, tmp_path / "a.model")
    export(convert(path), tmp_path / "a.pt", state_dict=True)
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_a_transform_that_mace_no_longer_has_is_not_exported(tmp_path):
    model, params = convert(reference.save(small(distance_transform="Soft"), tmp_path / "a.model"))
    old = dataclasses.replace(
        model, config=model.config.model_copy(update={"distance_transform": "Soft 0.3.6"})
    )
    with pytest.raises(ValueError, match=r"Soft until 0\.3\.9"):
        export((old, params), tmp_path / "b.model")
    assert not (tmp_path / "b.model").exists()
