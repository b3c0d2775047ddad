"""``lora_torch`` is torch MACE's ``inject_lora``; ``elora`` is the update that its authors publish.

Both sides get the same random factors. torch computes with activations, y = W x + s B(A(x)), and we
with weights, so the agreement of gradients also tests the scales.
"""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
pytest.importorskip("mace")

from mace.modules.lora import inject_LoRAs, merge_lora_weights  # noqa: E402
from parity import reference  # noqa: E402

from converters.rules import parameter_rules  # noqa: E402
from converters.to_jax import convert  # noqa: E402
from jaxft import data, loss, predict, tree  # noqa: E402
from jaxft.strategies import base  # noqa: E402
from jaxft.strategies.elora import elora  # noqa: E402
from jaxft.strategies.lora import layer_kind, lora_torch  # noqa: E402

AGREEMENT = 1e-10
"""Relative to the largest component of an array; float64 sums of a few thousand terms."""
ROUNDING = 1e-14
"""Of one matrix product."""
FEW_DRAWS = 0.15
"""Relative error of a standard deviation of some hundred numbers, about four times its own."""

RANK, ALPHA = 3, 2.0
WEIGHTS = {"energy": 3.0, "forces": 100.0, "stress": 0.0}


class Adapted(NamedTuple):
    """A torch model with LoRA and the same model in jaxft."""

    module: Any
    model: Any
    params: Any
    names: dict[str, str]
    """torch's name of the parameter that holds a leaf."""
    start: dict[str, np.ndarray]
    """torch's factors as injected."""


@functools.cache
def adapted(name, folder):
    module = reference.build(name)
    model, params = convert(reference.save(module, folder / f"{name}.model"))
    names = {
        block.path: rule.name for rule in parameter_rules(model.config) for block in rule.blocks
    }
    with reference.default_dtype("float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        inject_LoRAs(module, rank=RANK, alpha=ALPHA)
    start = {key: value.numpy().copy() for key, value in factors_of(module, names).items()}
    return Adapted(module, model, jax.tree.map(jnp.asarray, params), names, start)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield tmp_path_factory.mktemp("models")
    adapted.cache_clear()


def factors_of(module, names, *, gradient=False):
    """torch's factors (or their gradients) as views of its memory, by our names.

    The weights of an equivariant linear are flat, one block per instruction.
    """
    modules, found = dict(module.named_modules()), {}
    for path, name in names.items():
        layer = modules[name.rpartition(".")[0]]
        if name.endswith(".bias") or not hasattr(layer, "lora_A"):
            continue
        for factor in "AB":
            owner = getattr(layer, f"lora_{factor}")
            weight = owner if isinstance(owner, torch.nn.Parameter) else owner.weight
            values = weight.grad if gradient else weight.data
            if hasattr(owner, "instructions"):
                values = block_of(owner, values, path.rpartition("/")[2])
            elif isinstance(owner, torch.nn.Linear):
                values = values.T
            found[f"{path}/{factor}"] = values
    return found


def block_of(linear, flat, irrep):
    """The rows of all inputs of an irrep: they are neighbours and share one bottleneck."""
    start, stop, width = 0, 0, 0
    for step in linear.instructions:
        n_in, n_out = step.path_shape
        if str(linear.irreps_in[step.i_in].ir) == irrep:
            stop, width = (stop or start) + n_in * n_out, n_out
        elif not stop:
            start += n_in * n_out
    return flat[start:stop].view(-1, width)


def share_random_factors(module, params, names):
    """Draw every factor, as after a training, in torch's memory and in our coordinates."""
    recipe = (lora_torch(rank=RANK, alpha=ALPHA),)
    coords, _ = jax.eval_shape(lambda: base.init(recipe, jax.random.key(0), params))
    ours, theirs = tree.flatten(coords["lora"]), factors_of(module, names)
    assert {k: v.shape for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}
    rng = np.random.default_rng(5)
    drawn = {key: 0.3 * rng.normal(size=value.shape) for key, value in ours.items()}
    for key, value in theirs.items():
        value.copy_(torch.tensor(drawn[key]))
    return {"lora": tree.unflatten({key: jnp.asarray(value) for key, value in drawn.items()})}


def relative(found, wanted):
    wanted = np.asarray(wanted)
    return float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", ["small-zbl", "small-d", "small-mh-1"])
def test_energies_forces_and_gradients_in_every_factor_agree(name, folder, record_property):
    module, model, params, names, _ = adapted(name, folder)
    recipe = (lora_torch(rank=RANK, alpha=ALPHA),)
    coords = share_random_factors(module, params, names)
    frames = reference.labelled_crystals(model, head=model.heads[-1])
    theirs = reference.evaluate(module, frames, head=model.heads[-1])
    value, _ = reference.gradient(module, frames, head=model.heads[-1], **WEIGHTS)
    dataset = data.prepare([data.from_atoms(a) for a in frames], model, head=model.heads[-1])
    (batch,) = data.epoch(dataset, len(frames), dtype="float64")
    objective = loss.weighted(model, energy=WEIGHTS["energy"], forces=WEIGHTS["forces"])

    @jax.jit
    def step(coords):
        def loss_of(coords):
            effective = base.apply(recipe, params, coords, {"lora": {}})
            return objective(effective, batch)[0], predict(model, effective, batch.graph)

        return jax.value_and_grad(loss_of, has_aux=True)(coords)

    (ours, out), gradient = step(coords)
    found = {
        "energy": relative(out.energy[: len(frames)], theirs.interaction),
        "forces": relative(out.forces[: len(theirs.forces)], theirs.forces),
        "loss": abs(float(ours) / value - 1),
    }
    wanted = factors_of(module, names, gradient=True)
    gradients = tree.flatten(gradient["lora"])
    assert gradients.keys() == wanted.keys()
    by_leaf = {key: relative(gradients[key], wanted[key].numpy()) for key in wanted}
    worst = max(by_leaf, key=by_leaf.get)
    found["gradient"] = by_leaf[worst]
    print(f"{len(by_leaf)} factors, worst in {worst}", found)
    for quantity, error in found.items():
        record_property(quantity, error)
        assert error <= AGREEMENT, quantity


# torch itself cannot merge the readouts of MH-1: an equivariant linear with a bias stops it.
@pytest.mark.parametrize("name", ["small-zbl", "small-embedding-mixed"])
def test_what_torch_merges_is_what_we_merge(name, folder):
    module, _, params, names, _ = adapted(name, folder)
    coords = share_random_factors(module, params, names)
    recipe = (lora_torch(rank=RANK, alpha=ALPHA),)
    merged = tree.flatten(
        jax.jit(base.apply, static_argnums=0)(recipe, params, coords, {"lora": {}})
    )
    theirs = merge_lora_weights(module, inplace=False)
    _, theirs = convert(reference.save(theirs, folder / "merged.model"))
    given = tree.flatten(params)
    for path, wanted in tree.flatten(theirs).items():
        assert relative(merged[path], wanted) <= ROUNDING, path
        is_adapted = f"{path}/A" in tree.flatten(coords["lora"])
        assert np.array_equal(given[path], wanted) != is_adapted, path


@pytest.mark.parametrize("name", ["small-d", "small-mh-1", "small-embedding-mixed"])
def test_factors_start_as_torchs_do(name, folder):
    module, _, params, _, theirs = adapted(name, folder)
    coords, _ = base.init((lora_torch(rank=RANK, alpha=ALPHA),), jax.random.key(0), params)
    ours = tree.flatten(coords["lora"])
    assert ours.keys() == theirs.keys()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == sum(value.size for value in ours.values())
    for found in (ours, theirs):
        assert not any(value.any() for key, value in found.items() if key.endswith("/B"))
        for kind, std in {"equivariant": 1.0, "dense": 1e-3}.items():
            drawn = [
                np.ravel(found[f"{path}/A"])
                for path, leaf in tree.flatten(params).items()
                if layer_kind(path, leaf) == kind
            ]
            assert abs(np.std(np.concatenate(drawn)) / std - 1) < FEW_DRAWS, kind


def test_elora_is_the_published_update(tmp_path):
    """A literal transcription in torch: flat weights, pairs (mul1, mul2) in one axis, shared B."""
    rank, alpha = 3, 2.0
    module = reference.build("small-d")
    model, params = convert(reference.save(module, tmp_path / "random.model"))
    params = jax.tree.map(jnp.asarray, params)
    recipe = (elora(rank=rank, alpha=alpha),)
    coords, _ = jax.eval_shape(lambda: base.init(recipe, jax.random.key(0), params))
    rng = np.random.default_rng(5)
    coords = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), coords)
    ours = tree.flatten(
        jax.jit(base.apply, static_argnums=0)(recipe, params, coords, {"elora": {}})
    )
    factors = {k: torch.tensor(np.asarray(v)) for k, v in tree.flatten(coords["elora"]).items()}
    state = module.state_dict()
    for rule in parameter_rules(model.config):
        pieces = []
        for block in rule.blocks:
            if f"{block.path}/A" not in factors:
                continue
            a, b = factors[f"{block.path}/A"], factors[f"{block.path}/B"]
            if "skip_tp" in block.path:  # torch's A is [mul1 · mul2, r], ours [mul2, mul1, r]
                a = a.transpose(0, 1).reshape(-1, rank)
            pieces.append((alpha / rank * (a @ b)).flatten())
        if pieces:
            state[rule.name] += torch.cat(pieces).view(state[rule.name].shape)
    module.load_state_dict(state)
    _, theirs = convert(reference.save(module, tmp_path / "merged.model"))
    adapted_leaves = {key.rpartition("/")[0] for key in factors}
    for path, wanted in tree.flatten(theirs).items():
        assert relative(ours[path], wanted) <= ROUNDING, path
        assert np.array_equal(tree.flatten(params)[path], wanted) != (path in adapted_leaves), path
    whole = {path for path, on in tree.flatten(base.trains(recipe, params)).items() if on}
    names = {
        block.path: rule.name for rule in parameter_rules(model.config) for block in rule.blocks
    }
    assert whole == {
        path
        for path, name in names.items()
        if "symmetric_contractions" in name and "weights_max" not in name
    }
    assert adapted_leaves | whole == names.keys()
