"""Large systems in blocks: the same numbers as in one piece, in memory that blocks bound."""

import functools

import ase.build
import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import data, loss, predict
from jaxft.calculator import JaxftCalculator
from jaxft.evaluate import predictions
from jaxft.evaluate.predictions import predict_file, predict_frames
from jaxft.graph import edges_per_block, in_blocks

ROUNDING = 1e-12
"""Relative to the largest of an array, in float64: sums are taken in another order; seen: 8e-15."""

KINDS = ("residual", "density", "non-linear", "embedding")
"""R R; D DR with Agnesi and ZBL; blocks as of MH-1 with six heads; A R with features of graphs and
atoms."""


@pytest.fixture(scope="module")
def of_kind(tmp_path_factory):
    """``kind -> model, params``, two layers and as few paths as show everything."""

    def made(kind):
        pytest.importorskip("mace")
        from parity import reference

        from converters.to_jax import convert

        lean = {"hidden": "2x0e+2x1o", "max_ell": 1, "correlation": 2}
        name, changes = {
            "residual": ("small-heads", {}),
            "density": ("small-d", reference.AGNESI_ZBL | {"blocks": "D DR"}),
            "non-linear": ("small-mh-1", {"edge_irreps": "2x0e+2x1o"}),
            "embedding": ("small-embedding-mixed", {"blocks": "A R"}),
        }[kind]
        file = tmp_path_factory.mktemp(kind) / "random.model"
        torch_model = reference.build(name, **lean | changes)
        model, params = convert(reference.save(torch_model, file))
        return model, jax.tree.map(jnp.asarray, params)

    return made


def structures():
    """A rattled crystal, whose atoms have many neighbours, and a molecule, whose have few."""
    rng = np.random.default_rng(0)
    crystal = ase.build.bulk("FeO", "rocksalt", 4.2, cubic=True)
    crystal.info["REF_stress"] = 0.1 * np.eye(3)
    found = [crystal, ase.build.molecule("H2O")]
    for atoms in found:
        atoms.rattle(0.1, rng=rng)
        atoms.info |= {"total_charge": 1, "total_spin": 2, "REF_energy": 1.0}
        atoms.arrays |= {
            "REF_forces": rng.normal(size=(len(atoms), 3)),
            "extra": rng.normal(size=len(atoms)),
        }
    return found


def packed(model, n_node, *, dtype="float64"):
    """Both structures in one batch with free rows."""
    frames = [data.from_atoms(atoms) for atoms in structures()]
    dataset = data.prepare(frames, model, head=model.heads[-1], row_width=8)
    shape = data.Shape(n_node, int(dataset.rows.sum()) + 3, 3)
    return data.pack(dataset, [0, 1], shape, dtype)


def assert_equal(found, expected):
    """Every array up to rounding of its largest entry."""
    found, expected = (dict(jax.tree.leaves_with_path(t)) for t in (found, expected))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        limit = ROUNDING * np.abs(value).max()
        np.testing.assert_allclose(found[path], value, rtol=0, atol=limit, err_msg=str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_change_energies_forces_and_stresses_by_rounding(of_kind, kind):
    model, params = of_kind(kind)
    graph = packed(model, 15).graph
    predictor = jax.jit(functools.partial(predict, model))
    whole = jax.device_get(predictor(params, graph))
    for name in ("energy", "forces", "stress"):
        assert np.abs(getattr(whole, name)).max() > 1e-3, name  # otherwise nothing is tested
    # of 5 atoms each; 8 of 11 atoms have many rows, so blocks are uneven
    parted = in_blocks(graph, 3, r_max=model.r_max)
    rows = np.bincount(graph.receivers[graph.is_atom[graph.receivers]] // 5, minlength=3)
    assert len(set(rows.tolist())) == 3
    assert_equal(jax.device_get(predictor(params, parted)), whole)


def test_blocks_change_gradients_of_the_loss_by_rounding(of_kind):
    model, params = of_kind("residual")
    batch = packed(model, 12)
    objective = loss.weighted(model, energy=1.0, forces=1.0, stress=10.0)
    gradient = jax.jit(jax.grad(lambda params, batch: objective(params, batch)[0]))
    whole = jax.device_get(gradient(params, batch))
    parted = batch._replace(graph=in_blocks(batch.graph, 2, r_max=model.r_max))
    assert_equal(jax.device_get(gradient(params, parted)), whole)


def test_memory_is_that_of_a_block_and_not_of_the_system(small):
    model, params = small
    sizes = {}
    for cells in (1, 8):
        atoms = ase.build.bulk("NaCl", "rocksalt", 5.6, cubic=True).repeat((cells, 4, 4))
        dataset = prepared(model, atoms)
        shape = data.Shape(len(atoms) + 2 * cells, len(dataset.samples[0].receivers), 2)
        graph = data.pack(dataset, [0], shape, "float64").graph
        for blocks in {1, 2 * cells}:
            laid = graph if blocks == 1 else in_blocks(graph, blocks, r_max=model.r_max)
            predictor = jax.jit(functools.partial(predict, model))
            analysis = predictor.lower(params, laid).compile().memory_analysis()
            sizes[cells, blocks] = analysis.temp_size_in_bytes
    assert sizes[8, 1] > 6 * sizes[1, 1]
    # what remains are a few arrays of atoms and channels, and gradients of edge vectors
    assert sizes[8, 16] < 0.25 * sizes[8, 1]


def test_blocks_hold_every_row_once_and_receivers_ascend(small):
    model, _ = small
    graph = packed_nacl(model)
    parted = in_blocks(graph, 4, r_max=model.r_max, n_row=4 * 40)
    assert len(parted.receivers) == 160
    assert (np.diff(parted.receivers) >= 0).all()
    assert (parted.receivers // (graph.n_node // 4) == np.arange(160) // 40).all()
    assert parted.senders.dtype == parted.receivers.dtype == np.int32

    def edges(g):
        inside = np.linalg.norm(g.vectors, axis=-1) < model.r_max
        receivers = np.broadcast_to(g.receivers[:, None], g.senders.shape)
        return sorted(
            zip(receivers[inside], g.senders[inside], map(tuple, g.vectors[inside]), strict=True)
        )

    assert edges(parted) == edges(graph)
    free = np.linalg.norm(parted.vectors, axis=-1) >= model.r_max
    assert np.unique(parted.vectors[free], axis=0).tolist() == [[2 * model.r_max, 0, 0]]


def packed_nacl(model):
    atoms = ase.build.bulk("NaCl", "rocksalt", 5.6, cubic=True)
    dataset = prepared(model, atoms)
    return data.pack(dataset, [0], data.Shape(12, 64, 2), "float64").graph


def test_layouts_that_cannot_be_are_refused(small):
    model, _ = small
    graph = packed_nacl(model)
    with pytest.raises(ValueError, match=r"12 atoms cannot be divided into 5 equal blocks"):
        in_blocks(graph, 5, r_max=model.r_max)
    with pytest.raises(ValueError, match=r"12 atoms cannot be divided into 0 equal blocks"):
        in_blocks(graph, 0, r_max=model.r_max)
    for n_row in (3, 5):
        with pytest.raises(ValueError, match=r"rows of the fullest one;\nuse n_row="):
            in_blocks(graph, 3, r_max=model.r_max, n_row=n_row)
    for make in (
        functools.partial(JaxftCalculator, *small),
        functools.partial(predict_frames, *small, []),
    ):
        with pytest.raises(ValueError, match="blocks of 0 edges are not possible"):
            make(max_edges_per_block=0)


def solid(seed=0):
    """64 atoms, of which those at one end have few neighbours."""
    atoms = ase.build.bulk("NaCl", "rocksalt", 5.6, cubic=True).repeat((2, 2, 2))
    atoms.set_cell(np.diag([22.4, 11.2, 11.2]))
    atoms = atoms[np.argsort(atoms.positions[:, 0], kind="stable")]
    atoms.rattle(0.05, seed=seed)
    return atoms


def prepared(model, atoms):
    return data.prepare([data.unlabelled(atoms)], model, row_width=16)


def test_the_calculator_says_the_same_in_any_number_of_blocks(small):
    atoms = solid()
    found = {}
    for most in (None, 1000, 100):
        calc = JaxftCalculator(*small, max_edges_per_block=most)
        atoms.calc = calc
        found[most] = [
            atoms.get_potential_energy(),
            atoms.get_potential_energies(),
            atoms.get_forces(),
            atoms.get_stress(),
        ]
        assert f"max_edges_per_block={edges_per_block(most)}, blocks={calc.blocks}" in repr(calc)
        assert (calc.blocks > 1) == (most is not None)
    assert calc.blocks > 10
    assert_equal(found[1000], found[None])
    assert_equal(found[100], found[None])


def test_a_calculator_in_blocks_compiles_once_while_atoms_move(small):
    calc = JaxftCalculator(*small, max_edges_per_block=1100)
    rows = set()
    for seed in range(20):
        atoms = solid(seed)
        atoms.rattle(0.2, seed=seed)
        atoms.calc = calc
        atoms.get_forces()
        rows.add(int(prepared(calc.model, atoms).rows.sum()))
    assert len(rows) >= 4
    assert calc.compilations <= 2
    assert calc.blocks > 1
    lone = atoms[:1]
    lone.calc = calc
    lone.get_forces()
    assert calc.blocks == 1  # small ones stay in one piece
    grown = calc.compilations
    atoms.rattle(0.01)
    atoms.get_forces()
    assert calc.compilations == grown


def test_batches_are_evaluated_in_blocks_where_they_are_large(small, monkeypatch, tmp_path):
    model, params = small
    seen = []
    plain = predictions.in_blocks

    def watched(graph, blocks, **options):
        seen.append(plain(graph, blocks, **options))
        return seen[-1]

    monkeypatch.setattr(predictions, "in_blocks", watched)
    images = [solid(), ase.build.molecule("H2O"), *(solid(seed)[:40] for seed in (1, 2))]
    frames = [data.unlabelled(atoms) for atoms in images]
    whole = predict_frames(model, params, frames, batch_size=1)
    assert not seen
    parted = predict_frames(model, params, frames, batch_size=1, max_edges_per_block=1000)
    assert len({graph.vectors.shape for graph in seen}) == 1 < len(seen)
    slots = [graph.senders.size / graph.blocks.count for graph in seen]
    assert max(slots) < 2000
    for a, b in zip(parted, whole, strict=True):
        assert_equal([a.energy, a.energies, a.forces], [b.energy, b.energies, b.forces])
    file, out = tmp_path / "in.xyz", tmp_path / "out.xyz"
    ase.io.write(file, images)
    seen.clear()
    predict_file(model, params, file, out, max_edges_per_block=1000)
    assert seen
