"""Shared by all tests: float64, a tiny converted model, structures that it labels."""

import functools
import gzip
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

# Halves the time that the suite spends in the compiler; read when JAX starts its backend.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import ase.build
import jax
import numpy as np
import pytest

from jaxft import compilation, data, loss, predict, tree
from jaxft.data import Frame, packing

jax.config.update("jax_enable_x64", True)

TINY = Path(__file__).parent / "data" / "tiny.model.gz"
"""A torch model with random weights; tests/data/make_tiny.py wrote it."""


PROGRAMS = "JAXFT_XLA_CACHE"
"""Tests, workers and the commands that they run share compiled programs, in a folder of theirs."""


def pytest_configure(config):
    if not hasattr(config, "workerinput") and PROGRAMS not in os.environ:
        folder = tempfile.mkdtemp(prefix="jaxft-programs-")
        os.environ[PROGRAMS] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    compilation.enable_cache(os.environ[PROGRAMS])


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Programs map memory, and a process may only have so many mappings."""
    yield
    jax.clear_caches()


@pytest.fixture
def few_shapes(monkeypatch):
    """Two static shapes even of small sets, but not more: compiling is what costs time."""
    monkeypatch.setattr(packing, "MAX_SHAPES", 2)
    monkeypatch.setattr(packing, "WORTH", 0.0)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    """The torch file of the tiny model."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.model"
    path.write_bytes(gzip.decompress(TINY.read_bytes()))
    return path


@pytest.fixture(scope="session")
def tiny(tiny_file):
    """(model, params) in float64: H C O Na Cl, 4x0e+4x1o, two layers, forces of a few eV/Å."""
    from converters.to_jax import convert

    model, params = convert(tiny_file)
    return model, jax.tree.map(jax.numpy.asarray, params)


def first_layer(model, params):
    """A model of one layer with its linear readout; it compiles three times faster."""
    kept = {"interactions": 1, "products": 1, "readouts": 1}
    config = model.config.model_dump()
    small = type(model.config)(**config | {name: config[name][:n] for name, n in kept.items()})
    buffers = {k: v for k, v in model.buffers.items() if not k.split("/")[0].endswith("_1")}
    buffers["num_interactions"] = np.array(1)
    params = {k: v for k, v in params.items() if not k.endswith("_1")}
    return replace(model, config=small, buffers=buffers), params


@pytest.fixture(scope="session")
def small(tiny):
    """The first layer of ``tiny``: for tests that compile much and look at the loop."""
    return first_layer(*tiny)


@pytest.fixture(scope="session")
def model(tiny):
    return tiny[0]


@pytest.fixture(scope="session")
def params(tiny):
    return tiny[1]


@pytest.fixture(scope="session")
def predictor(model):
    """``(params, graph) -> Prediction``, jitted once for all tests."""
    return jax.jit(functools.partial(predict, model))


@pytest.fixture(scope="session")
def objective(model):
    """A loss with all three terms."""
    return loss.weighted(model, energy=1.0, forces=1.0, stress=10.0)


@pytest.fixture(scope="session")
def structures():
    """Rattled molecules and crystals, some of them triclinic, as ``ase.Atoms``."""
    rng = np.random.default_rng(0)
    found = [ase.build.molecule(name) for name in ("H2O", "CH3OH", "CH3COOH")]
    found += [ase.build.bulk("NaCl", "rocksalt", a) for a in (5.5, 5.8)]
    found += [ase.build.bulk("NaCl", "rocksalt", a, cubic=True) for a in (5.5, 5.8)]
    for atoms in found:
        atoms.positions += rng.normal(scale=0.08, size=atoms.positions.shape)
    sheared = found[3].copy()
    sheared.set_cell(sheared.cell @ (np.eye(3) + rng.normal(scale=0.04, size=(3, 3))), True)
    return [*found, sheared]


@pytest.fixture(scope="session")
def frames(structures, model, params, predictor):
    """``structures`` with energies, forces and stresses of a model whose weights are 5 % off."""
    noise = tree.flatten(params)
    teacher = tree.unflatten(
        {
            path: leaf * (1 + 0.05 * jax.random.normal(jax.random.key(i), leaf.shape))
            for i, (path, leaf) in enumerate(noise.items())
        }
    )
    return labelled(model, teacher, predictor, [data.from_atoms(a) for a in structures])


def labelled(model, params, predictor, unlabelled):
    """The frames with the predictions of a model as labels."""
    dataset = data.prepare(unlabelled, model)
    (batch,) = data.epoch(dataset, len(unlabelled), dtype="float64")
    out = predictor(params, batch.graph)
    frames = []
    for g, frame in enumerate(unlabelled):
        e0 = sum(model.e0s[0, model.atomic_numbers.index(z)] for z in frame.atomic_numbers)
        atoms = batch.graph.is_atom & (batch.graph.graph_index == g)
        frames.append(
            Frame(
                frame.atomic_numbers,
                frame.positions,
                frame.cell,
                frame.pbc,
                energy=float(out.energy[g]) + e0,
                forces=np.asarray(out.forces)[atoms],
                stress=np.asarray(out.stress[g]) if frame.is_periodic else None,
                source=f"frame {g}",
            )
        )
    return frames


@pytest.fixture(scope="session")
def batch(frames, model):
    """All frames in one float64 batch with padding atoms, edges and three padding graphs."""
    dataset = data.prepare(frames, model)
    (shape,) = data.shapes(dataset, len(frames))[-1:]
    bigger = shape._replace(n_graph=shape.n_graph + 2)
    batch = data.pack(dataset, range(len(frames)), bigger, "float64")
    assert not batch.graph.is_atom.all()
    assert (~batch.graph.is_graph).sum() == 3
    return batch
