"""Physics of the potential: symmetries, derivatives, limits, extensivity; exact compression."""

import json
from pathlib import Path

import ase
import ase.build
import jax
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError

from converters.to_jax import convert
from jaxft import data, tree
from jaxft.models.contraction import compress
from jaxft.models.irreps import multiplicities
from jaxft.models.radial import polynomial_cutoff
from jaxft.potential import _smallest_graph

TORCH = Path(__file__).parent / "data" / "tiny_torch.json"
"""What torch MACE 0.3.16 says of two frames; tests/data/make_tiny.py wrote it."""

SHIPPED = Path(__file__).parents[1] / "benchmarks" / "data" / "gfn2_small.model"

SHAPE = data.Shape(n_node=48, n_row=160, n_graph=12)
"""One shape for all calls of this file, so that the model compiles once."""

EXACT = 1e-11
"""eV, eV/Å, eV/Å³: float64 sums in another order; energies are tens of eV."""

RANKS = {
    ("0e+1o", "0e"): {1: (1, 1), 2: (2, 2), 3: (4, 2)},
    ("0e+1o", "1o"): {1: (1, 1), 2: (2, 1), 3: (6, 2)},
    ("0e+1o+2e", "0e"): {1: (1, 1), 2: (3, 3), 3: (11, 5)},
    ("0e+1o+2e", "1o"): {1: (1, 1), 2: (4, 2), 3: (21, 5)},
    ("0e+1o+2e", "2e"): {1: (1, 1), 2: (4, 3), 3: (23, 6)},
    ("0e+1o+2e+3o", "0e"): {1: (1, 1), 2: (4, 4), 3: (23, 8)},
    ("0e+1o+2e+3o", "1o"): {1: (1, 1), 2: (6, 3), 3: (51, 12)},
    ("0e+1o+2e+3o", "2e"): {1: (1, 1), 2: (7, 5), 3: (65, 14)},
}
"""{(message, output): {ν: (paths, rank)}}; the ranks are the sizes of cuequivariance's reduced
basis of symmetric products."""


@pytest.fixture(scope="module")
def evaluate(model, params, predictor):
    """``[Atoms] -> [(energy, forces, stress)]``: interaction energies, in SHAPE."""

    def run(structures):
        frames = [data.from_atoms(atoms) for atoms in structures]
        dataset = data.prepare(frames, model, row_width=8)
        batch = data.pack(dataset, range(len(frames)), SHAPE, "float64")
        every = np.arange(len(model.atomic_numbers), dtype=np.int32)
        graph = batch.graph
        graph = graph._replace(elements=every, species=graph.elements[graph.species])
        out = predictor(params, graph)
        energy, forces, stress = (np.asarray(x) for x in (out.energy, out.forces, out.stress))
        return [
            (energy[g], forces[graph.is_atom & (graph.graph_index == g)], stress[g])
            for g in range(len(frames))
        ]

    return run


@pytest.fixture(params=range(8))
def atoms(request, structures):
    return structures[request.param]


def rotation(seed):
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return matrix * np.linalg.det(matrix)


def turned(atoms, matrix):
    other = atoms.copy()
    other.set_cell(atoms.cell.array @ matrix.T)
    other.positions = atoms.positions @ matrix.T
    return other


def test_the_converted_model_says_what_torch_said(evaluate, model):
    answers = json.loads(TORCH.read_text())
    keys = ("numbers", "positions", "cell", "pbc")
    found = evaluate([ase.Atoms(**{key: answer[key] for key in keys}) for answer in answers])
    for answer, (energy, forces, stress) in zip(answers, found, strict=True):
        e0 = sum(model.e0s[0, model.atomic_numbers.index(z)] for z in answer["numbers"])
        assert abs(energy + e0 - answer["energy"]) < EXACT
        np.testing.assert_allclose(forces, answer["forces"], atol=EXACT)
        if answer["stress"] is not None:
            np.testing.assert_allclose(stress, answer["stress"], atol=EXACT)


@pytest.mark.parametrize("matrix", [rotation(0), -np.eye(3), -rotation(1)], ids=["R", "I", "IR"])
def test_rotated_and_inverted_structures(evaluate, atoms, matrix):
    (e, f, s), (e2, f2, s2) = evaluate([atoms, turned(atoms, matrix)])
    assert abs(e - e2) < EXACT
    np.testing.assert_allclose(f2, f @ matrix.T, atol=EXACT)
    np.testing.assert_allclose(s2, matrix @ s @ matrix.T, atol=EXACT)
    assert np.abs(f2 - f).max() > 0.1


def test_translated_and_wrapped_structures(evaluate, atoms):
    moved = atoms.copy()
    moved.positions += [1.3, -2.7, 4.1]
    moved.wrap()
    (e, f, s), (e2, f2, s2) = evaluate([atoms, moved])
    assert abs(e - e2) < EXACT
    np.testing.assert_allclose(f2, f, atol=EXACT)
    np.testing.assert_allclose(s2, s, atol=EXACT)


def test_permuted_atoms(evaluate, atoms):
    order = np.random.default_rng(1).permutation(len(atoms))
    (e, f, s), (e2, f2, s2) = evaluate([atoms, atoms[order]])
    assert abs(e - e2) < EXACT
    np.testing.assert_allclose(f2, f[order], atol=EXACT)
    np.testing.assert_allclose(s2, s, atol=EXACT)


def test_forces_are_minus_the_gradient_and_sum_to_zero(evaluate, atoms):
    step, rng = 1e-4, np.random.default_rng(2)
    directions = rng.normal(size=(5, len(atoms), 3))
    moved = []
    for direction in directions:
        for sign in (1, -1):
            other = atoms.copy()
            other.positions += sign * step * direction
            moved.append(other)
    fits = min(5, (SHAPE.n_node - 1) // (2 * len(atoms)))
    moved, directions = moved[: 2 * fits], directions[:fits]
    energies = [e for e, _, _ in evaluate(moved)]
    ((_, forces, _),) = evaluate([atoms])
    for n, direction in enumerate(directions):
        numeric = -(energies[2 * n] - energies[2 * n + 1]) / (2 * step)
        exact = np.sum(forces * direction)
        assert abs(numeric - exact) < 1e-5 * max(1.0, np.abs(forces).max())  # step² f'' / 6
    np.testing.assert_allclose(forces.sum(axis=0), 0.0, atol=EXACT)
    assert np.abs(forces).max() > 0.05


def test_stress_is_the_strain_derivative_over_the_volume(evaluate, structures):
    step, rng = 1e-5, np.random.default_rng(3)
    for atoms in structures[3:]:
        strain = rng.normal(size=(3, 3))
        strain = strain + strain.T
        strained = []
        for sign in (1, -1):
            other = atoms.copy()
            other.set_cell(atoms.cell @ (np.eye(3) + sign * step * strain), scale_atoms=True)
            strained.append(other)
        (up, _, _), (down, _, _), (_, _, stress) = evaluate([*strained, atoms])
        numeric = (up - down) / (2 * step) / atoms.get_volume()
        assert abs(numeric - np.sum(stress * strain)) < 1e-6
        np.testing.assert_array_equal(stress, stress.T)
        assert np.abs(stress).max() > 1e-2


def test_a_supercell_has_its_multiple_of_energy(evaluate, structures):
    atoms = structures[-1]
    (e, f, s), (e2, f2, s2) = evaluate([atoms, atoms.repeat((2, 3, 1))])
    assert abs(6 * e - e2) < 10 * EXACT
    np.testing.assert_allclose(f2, np.tile(f, (6, 1)), atol=EXACT)
    np.testing.assert_allclose(s2, s, atol=EXACT)


def test_far_molecules_do_not_feel_each_other(evaluate, structures, model):
    a, b = structures[0].copy(), structures[1].copy()
    b.positions += [0.0, 0.0, 2 * model.r_max + 5.0]
    (ea, fa, _), (eb, fb, _), (e, f, _) = evaluate([a, b, a + b])
    assert abs(ea + eb - e) < EXACT
    np.testing.assert_allclose(f, np.concatenate([fa, fb]), atol=EXACT)


@pytest.mark.parametrize("mate", [[], [("Na", (0.0, 2.4, 0.0))]], ids=["pair", "triple"])
def test_a_neighbour_leaves_smoothly(evaluate, model, mate):
    """At r_max the cutoff (p = 5) vanishes as δ³ and the Bessel functions as δ: E ~ δ⁴, F ~ δ³."""
    symbols = ["Na", "Cl", *(symbol for symbol, _ in mate)]
    rest = [position for _, position in mate]

    def at(distance):
        return ase.Atoms(symbols, [[0, 0, 0], [0, -distance, 0], *rest])

    deltas = [0.02, 0.01, -1e-12, -0.5]
    far, *near = evaluate([at(3 * model.r_max), *(at(model.r_max - delta) for delta in deltas)])
    energy = [e - far[0] for e, _, _ in near]
    force = [np.abs(f - far[1]).max() for _, f, _ in near]
    assert energy[0] / energy[1] == pytest.approx(16.0, rel=0.1)
    assert force[0] / force[1] == pytest.approx(8.0, rel=0.1)
    assert abs(energy[1]) < 1e-3
    for e, f in zip(energy[2:], force[2:], strict=True):
        assert abs(e) < EXACT
        assert f < EXACT


def test_an_isolated_atom_has_its_self_energy_and_no_force(evaluate, model, params):
    """E = shift + scale (readouts of the embedding through the self-connections)."""
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    found = evaluate([ase.Atoms([z]) for z in model.atomic_numbers])
    size, channels = flat["node_embedding/linear/0e"].shape
    for z, (energy, forces, _) in enumerate(found):
        x = flat["node_embedding/linear/0e"][z] / size**0.5
        x = x @ flat["interactions_0/skip_tp/0e"][z] / (size * channels) ** 0.5
        total = (x @ flat["readouts_0/linear/0e"] / channels**0.5)[0]
        x = x @ flat["interactions_1/skip_tp/0e"][z] / (size * channels) ** 0.5
        hidden = x @ flat["readouts_1/linear_1/0e"] / channels**0.5
        hidden = model.config.gate_constant * hidden / (1 + np.exp(-hidden))
        total += (hidden @ flat["readouts_1/linear_2/0e"] / hidden.size**0.5)[0]
        expected = model.constants.scale * total + model.constants.shift
        assert abs(energy - expected) < EXACT
        np.testing.assert_array_equal(forces, 0.0)


def test_the_elements_of_a_batch_may_come_in_any_order_and_number(predictor, params, batch):
    """``elements`` lists the table rows that occur; more of them, or shuffled, is the same."""
    graph = batch.graph
    plain = predictor(params, graph)
    order = np.array([3, 0, 4, 2, 1])
    shuffled = graph._replace(
        elements=graph.elements[order], species=np.argsort(order)[graph.species].astype(np.int32)
    )
    padded = graph._replace(elements=np.append(graph.elements, graph.elements[:2]))
    for other in (shuffled, padded):
        out = predictor(params, other)
        np.testing.assert_allclose(out.node_energy, plain.node_energy, atol=EXACT)
        np.testing.assert_allclose(out.forces, plain.forces, atol=EXACT)


@pytest.mark.parametrize("p", [5, 6])
def test_the_cutoff_goes_from_one_to_exactly_zero(p):
    """Beyond r_max no derivative is left either: padding edges lie there, and enter the virial."""

    def derivatives(r):
        f = [lambda x: polynomial_cutoff(x, 4.5, p)]
        for _ in range(3):
            f.append(jax.grad(f[-1]))
        return [float(g(r)) for g in f]

    assert derivatives(1e-9) == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-9)
    for r in (4.5, 4.5001, 9.0, 100.0):
        assert derivatives(r) == [0.0] * 4
    inside = [derivatives(r)[0] for r in np.linspace(0.5, 4.49, 9)]
    assert (np.diff(inside) < 0).all()
    near = derivatives(4.5 * (1 - 1e-6))
    assert np.abs(near[:3]).max() < 1e-3


def test_elements_are_told_apart(evaluate):
    pairs = [ase.Atoms([a, "Cl"], [[0, 0, 0], [0, 0, 2.0]]) for a in ("H", "C", "O", "Na", "Cl")]
    energies = [e for e, _, _ in evaluate(pairs)]
    assert np.min(np.abs(np.subtract.outer(energies, energies)) + 9 * np.eye(5)) > 1e-3


def test_a_parameter_of_another_shape_is_refused(model, params):
    wrong = jax.tree.map(lambda x: x, params)
    wrong["interactions_0"]["linear_up"]["0e"] = np.ones((1, 2))
    graph = _smallest_graph(model, "float64")
    with pytest.raises(ScopeParamShapeError, match="interactions_0/linear_up"):
        jax.eval_shape(lambda: model.node_energies(wrong, graph))


def test_random_parameters_have_the_structure_of_converted_ones(model, params):
    drawn = jax.eval_shape(lambda: model.init(jax.random.key(0), dtype="float64"))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


# --- compression ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["tiny", "shipped"])
def test_compressed_contraction_is_the_dense_one(source, tiny):
    potential = tiny[0] if source == "tiny" else convert(SHIPPED)[0]
    rng = np.random.default_rng(4)
    checked = 0
    for layer, product in enumerate(potential.config.products):
        message = "+".join(multiplicities(product.irreps_in))
        for name in multiplicities(product.irreps_out):
            prefix = f"products_{layer}/symmetric_contractions/{name}/U_matrix_"
            u = {nu: potential.buffers[f"{prefix}{nu}"] for nu in (1, 2, 3)}
            components = 2 * int(name[0]) + 1
            coupling = compress(u, components)
            lm = u[1].shape[-2]
            x = rng.normal(size=lm)
            weights = {nu: rng.normal(size=u[nu].shape[-1]) for nu in u}
            dense = np.zeros(components)
            for nu, tensor in u.items():
                value = tensor.reshape(components, *[lm] * nu, -1) @ weights[nu]
                for _ in range(nu):
                    value = value @ x
                dense += value
            monomials = np.prod(coupling.selectors @ np.append(x, 1.0), axis=0)
            reduced = coupling.projection @ np.concatenate([weights[nu] for nu in (3, 2, 1)])
            sparse = np.einsum("mrt,t,r->m", coupling.basis, monomials, reduced)
            error = {"float64": 1e-12, "float32": 1e-6}[u[1].dtype.name]  # of the file's numbers
            np.testing.assert_allclose(sparse, dense, rtol=0, atol=error * np.abs(dense).max())
            assert ranks(coupling, u) == RANKS[message, name]
            checked += 1
    assert checked == sum(len(multiplicities(p.irreps_out)) for p in potential.config.products)


def ranks(coupling, u):
    """{ν: (paths, rank)}: rows of the block-diagonal projection that reach the paths of ν."""
    found, start = {}, 0
    for nu in (3, 2, 1):
        k = u[nu].shape[-1]
        block = coupling.projection[:, start : start + k]
        found[nu] = (k, int(np.any(block, axis=1).sum()))
        start += k
    return found


def test_a_coupling_without_paths_contributes_nothing():
    u = {1: np.ones((2, 1)), 2: np.zeros((2, 2, 0))}
    coupling = compress(u, 1)
    assert coupling.basis.shape == (1, 1, 2)
    assert coupling.projection.shape == (1, 1)


def test_an_antisymmetric_coupling_has_rank_zero():
    """Only the symmetric part meets copies of one vector."""
    u = {1: np.eye(2)[:, :1], 2: np.array([[0.0, 1.0], [-1.0, 0.0]])[..., None]}
    assert compress(u, 1).projection.shape == (1, 2)
