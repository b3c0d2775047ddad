"""Backends: the policy that chooses one, and cueq against xla."""

import functools
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import ase.io
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from test_lowering import violations
from typer.testing import CliRunner

import jaxft
from jaxft import bundle, compilation, finetune, loss, predict, surgery, tree
from jaxft.calculator import JaxftCalculator
from jaxft.cli import app
from jaxft.evaluate import predictions
from jaxft.models import backend, contraction, cueq
from jaxft.models.cueq import Cueq
from jaxft.models.irreps import multiplicities, tensor_product_paths

RTOL = 1e-10
"""Of the largest value; sums in another order, in float64."""

WEIGHTS = {"energy": 1.0, "forces": 1.0, "stress": 10.0}


@pytest.fixture(scope="module")
def naive():
    """The same polynomials, evaluated by plain JAX: as the library does without a GPU."""
    pytest.importorskip("cuequivariance_jax")
    return Cueq(method="naive")


def by(model, backend):
    return replace(model, backend=backend)


def close(found, expected):
    scale = max(float(jnp.abs(expected).max()), 1e-300)
    np.testing.assert_allclose(found / scale, expected / scale, atol=RTOL, rtol=0)


def agree(function, other, arguments):
    """Values, gradients, and gradients of a function of the gradients, as training takes them."""

    def derived(function, *arguments):
        def first(*arguments):
            leaves = jax.tree.leaves(function(*arguments))
            return sum(jnp.sin(leaf).sum() for leaf in leaves)

        everything = tuple(range(len(arguments)))
        gradient = jax.grad(first, everything)

        def second(*arguments):
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(gradient(*arguments)))

        return function(*arguments), gradient(*arguments), jax.grad(second, everything)(*arguments)

    found = jax.jit(functools.partial(derived, function))(*arguments)
    expected = jax.jit(functools.partial(derived, other))(*arguments)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize(
    ("sent", "edges", "target"),
    [
        ("3x0e", "0e+1o+2e+3o", "3x0e+3x1o+3x2e+3x3o"),
        ("3x0e+3x1o", "0e+1o+2e", "3x0e+3x1o+3x2e"),
        ("2x1o+2x0e+2x2e", "0e+1o+2e", "2x2e+2x1e+2x0e+2x0o+2x1o"),
    ],
)
def test_messages_are_those_of_xla(naive, sent, edges, target):
    rng = np.random.default_rng(0)
    n, rows, slots = 5, 7, 4
    paths = tensor_product_paths(sent, edges, target)
    sizes = multiplicities(sent)
    features = {ir: rng.normal(size=(n, 2 * int(ir[:-1]) + 1, mul)) for ir, mul in sizes.items()}
    harmonics = {
        ir: rng.normal(size=(rows, slots, 2 * int(ir[:-1]) + 1)) for ir in multiplicities(edges)
    }
    width = sum(sizes[path.node] for path in paths)
    radial = rng.normal(size=(rows, slots, 6)), rng.normal(size=(6, width))
    graph = SimpleNamespace(
        senders=rng.integers(0, n, (rows, slots)).astype(np.int32),
        receivers=np.sort(rng.integers(0, n, rows)).astype(np.int32),
        n_node=n,
    )

    def of(backend):
        return lambda *arrays: backend.convolve(*arrays, paths, graph)

    agree(of(naive), of(backend.XLA), (features, harmonics, radial))


def random_couplings(rng, lm, paths):
    """Of a scalar and a vector, to third order; the last path of each order repeats the first."""
    found = {}
    for name, components in (("0e", 1), ("1o", 3)):
        u = {nu: rng.normal(size=(components, *[lm] * nu, paths)) for nu in (1, 2, 3)}
        for tensor in u.values():
            tensor[..., -1] = tensor[..., 0]
        squeezed = {nu: tensor[0] if components == 1 else tensor for nu, tensor in u.items()}
        found[name] = contraction.compress(squeezed, components)
    return found


def test_contractions_are_those_of_xla(naive):
    rng = np.random.default_rng(0)
    n, lm, channels, elements, paths = 5, 3, 4, 2, 3
    couplings = random_couplings(rng, lm, paths)
    x = rng.normal(size=(n, lm, channels))
    weights = {name: rng.normal(size=(elements, 3 * paths, channels)) for name in couplings}
    one_hot = np.eye(elements)[rng.integers(0, elements, n)]

    def of(backend):
        coupled = backend.couple(couplings, channels, 1e-12)
        return lambda x, weights: backend.contract(x, weights, one_hot, coupled)

    agree(of(naive), of(backend.XLA), (x, weights))


def test_a_sparse_coupling_is_the_same_one_with_fewer_terms():
    rng = np.random.default_rng(1)
    for coupling in random_couplings(rng, 3, 4).values():
        rank = coupling.basis.shape[1]
        sparse = cueq.sparsify(coupling, 1e-12)
        found, expected = (
            np.einsum("mrt,rk->mtk", one.basis, one.projection) for one in (sparse, coupling)
        )
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert np.count_nonzero(sparse.basis) <= np.count_nonzero(coupling.basis) - rank
    coupling = coupling._replace(basis=coupling.basis + 0.3 * (np.abs(coupling.basis) > 0))
    with pytest.raises(ValueError, match="no clean sparse basis"):
        cueq.sparsify(coupling, 0.5)


def test_energies_forces_and_stresses_are_those_of_xla(model, params, batch, predictor, naive):
    expected = predictor(params, batch.graph)
    found = jax.jit(functools.partial(predict, by(model, naive)))(params, batch.graph)
    jax.tree.map(close, found, expected)


def test_gradients_of_a_loss_are_those_of_xla(small, batch, naive):
    """All parameters, through forces and stress."""
    model, params = small

    def gradient(model):
        objective = loss.weighted(model, **WEIGHTS)
        return tree.flatten(jax.jit(jax.grad(lambda p: objective(p, batch)[0]))(params))

    expected, found = gradient(model), gradient(by(model, naive))
    assert found.keys() == expected.keys()
    for name in found:
        close(found[name], expected[name])


class Segments(NamedTuple):
    """What the kernels' library is given: as its ``Operation`` and its ``Path``."""

    one: object
    two: object
    three: object = None


@pytest.fixture
def kernels(monkeypatch):
    """In place of the library of kernels, which loads NVIDIA's driver: calls that only lower."""
    pytest.importorskip("cuequivariance_jax")

    def call(inputs, outputs, indices, configuration, **settings):
        assert len(configuration) == len(inputs) + len(outputs) + len(indices)
        outputs = [jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outputs]
        return jax.ffi.ffi_call("uniform_1d_cuda", outputs)(*inputs, *indices)

    library = SimpleNamespace(
        uniform_1d=call, Operation=Segments, Path=Segments, __version__="0.13.0"
    )
    monkeypatch.setitem(sys.modules, "cuequivariance_ops_jax", library)
    return library


def test_the_training_step_lowers_for_cuda_with_nothing_but_the_kernels(small, batch, kernels):
    model, params = small
    single = jax.tree.map(
        lambda leaf: leaf.astype("float32") if leaf.dtype == np.float64 else leaf, (params, batch)
    )
    init, step = finetune(loss.weighted(by(model, Cueq()), **WEIGHTS), (), optax.adamw(1e-3))
    state = jax.eval_shape(init, jax.random.key(0), single[0])
    allowed = jax.export.DisabledSafetyCheck.custom_call("uniform_1d_cuda")
    exported = jax.export.export(step, platforms=["cuda"], disabled_checks=[allowed])(
        state, single[1]
    )
    program = exported.mlir_module()
    assert violations(program, enable_x64=True) == ["calls uniform_1d_cuda"]
    assert program.count("@uniform_1d_cuda") >= 6  # forward, forces, and gradients of both


@pytest.fixture
def on_cuda(monkeypatch, kernels):
    monkeypatch.setattr(cueq, "_platform", lambda: "cuda")


def test_auto_is_xla_everywhere_and_looks_at_nothing_else(monkeypatch, small):
    monkeypatch.setattr(cueq, "require", lambda: pytest.fail("cueq was tried"))
    choice = backend.choose()
    assert choice.backend == backend.XLA
    assert str(choice).startswith("xla (the default on every platform)")
    assert small[0].backend == backend.XLA
    assert small[0].with_backend("auto").backend == backend.XLA
    assert str(backend.choose("xla")).startswith("xla (as asked for)")


def test_cueq_is_used_where_it_is_asked_for(on_cuda, small):
    choice = backend.choose("cueq")
    assert choice.backend == Cueq()
    assert "not kept: programs of cueq hold handles" in str(choice)
    assert backend.usable().startswith("xla (the default on every platform)")
    assert backend.usable().endswith("; cueq can be asked for")
    model = small[0].with_backend("cueq")
    assert model.module.backend == Cueq(method="uniform_1d")
    assert surgery.set_e0s(model, {1: -1.0}).backend == Cueq()
    assert bundle.cast(model, small[1], "float32")[0].backend == Cueq()
    assert JaxftCalculator(model, small[1]).model.backend == Cueq()
    assert predictions._Alike(model) != predictions._Alike(small[0])
    assert model.digest == small[0].digest


@pytest.mark.parametrize(
    ("package", "platform", "message"),
    [
        ("cuequivariance_jax", "cuda", r"needs cuequivariance_jax.*\n.*jaxft\[cuda,cueq\]"),
        ("cuequivariance_ops_jax", "cuda", r"needs cuequivariance_ops_jax.*\n.*jaxft\[cuda,cueq\]"),
        ("none", "cpu", r"needs an NVIDIA GPU, but JAX computes on cpu;\nuse backend: xla"),
        ("none", "rocm", "needs an NVIDIA GPU, but JAX computes on rocm"),
        ("none", "tpu", "needs an NVIDIA GPU, but JAX computes on tpu"),
    ],
)
def test_cueq_that_cannot_be_used_is_an_error(
    on_cuda, small, monkeypatch, package, platform, message
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(cueq, "_platform", lambda: platform)
    with pytest.raises(ValueError, match=message):
        small[0].with_backend("cueq")
    with pytest.raises(ValueError, match=message):
        JaxftCalculator(*small, backend="cueq")
    assert "cueq cannot be used here: " in backend.usable()


def test_cueq_refuses_a_cache_of_compiled_programs(on_cuda, small, monkeypatch, tmp_path):
    monkeypatch.setattr(compilation, "cache", lambda: compilation.Cache(tmp_path, "in use"))
    with pytest.raises(ValueError, match=r"handles of their process.*\n.*disable_cache"):
        small[0].with_backend("cueq")


@pytest.mark.parametrize(
    ("block", "irreps", "message"),
    [
        ("interactions", "node_feats_irreps", r"interactions_1 sends 4x0e\+2x1o"),
        ("products", "irreps_in", r"products_1 contracts 4x0e\+2x1o"),
    ],
)
def test_cueq_refuses_irreps_of_unequal_multiplicity(on_cuda, model, block, irreps, message):
    config = model.config
    blocks = [*getattr(config, block)]
    blocks[1] = blocks[1].model_copy(update={irreps: "4x0e+2x1o"})
    changed = replace(model, config=config.model_copy(update={block: tuple(blocks)}))
    with pytest.raises(ValueError, match=message):
        changed.with_backend("cueq")


def test_an_unknown_backend_is_refused(small):
    with pytest.raises(ValueError, match="no backend 'e3j'; use auto, xla or cueq"):
        small[0].with_backend("e3j")


def test_commands_refuse_cueq_where_it_cannot_be_used(small, frames, tmp_path):
    """And write nothing; jaxft info says why not."""
    path = tmp_path / "small.jaxft"
    jaxft.save(path, *small)
    images = [ase.Atoms(f.atomic_numbers, f.positions, cell=f.cell, pbc=f.pbc) for f in frames]
    for image, frame in zip(images, frames, strict=True):
        image.info["REF_energy"] = frame.energy
        image.arrays["REF_forces"] = frame.forces
    ase.io.write(tmp_path / "frames.xyz", images)
    config = {
        "model": str(path),
        "output": str(tmp_path / "run"),
        "train": str(tmp_path / "frames.xyz"),
        "e0s": "foundation",
        "epochs": 1,
        "backend": "cueq",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def run(*arguments):
        return CliRunner().invoke(app, list(map(str, arguments)))

    predicted = run(
        "predict", path, tmp_path / "frames.xyz", tmp_path / "out.xyz", "--backend", "cueq"
    )
    trained = run("finetune", tmp_path / "config.yaml")
    for result in (predicted, trained):
        assert result.exit_code == 1
        assert "backend: cueq needs" in result.output
    assert not (tmp_path / "out.xyz").exists()
    assert not (tmp_path / "run").exists()
    misspelt = run("finetune", tmp_path / "config.yaml", "backend=cuda")
    assert "backend: Input should be 'auto', 'xla' or 'cueq'" in misspelt.output
    shown = run("info", path).output
    assert "backend            xla (the default on every platform)" in shown
    assert "; cueq cannot be used here: backend: cueq needs" in shown
