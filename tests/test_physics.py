"""Laws that any interatomic potential obeys, for every family of models that is read.

The models are files that mace-torch wrote, and a few of them with one option changed, so that
options without a file of their own are judged too. Nothing here needs torch.
"""

import functools
import itertools
import lzma
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import ase
import jax
import numpy as np
import pytest

from converters.to_jax import convert
from jaxft import data, predict, tree

FOLDER = Path(__file__).parent / "data" / "writers"

SHAPE = data.Shape(n_node=120, n_row=160, n_graph=33)
"""One shape for all calls of this file, so that each model compiles once."""

WIDTH = 8
"""Slots per edge row."""

EXACT = 1e-11
"""Relative to the largest value: float64 sums in another order."""

NUMERIC = 1e-6
"""Relative to the largest force or stress: fourth-order differences, but a third derivative that
jumps where a neighbour comes into reach."""

SINGLE = 1e-4
"""Relative to the largest value: float32 has 6e-8, steep radial functions and sums that cancel
cost three digits."""

predictor = jax.jit(predict, static_argnums=0)


class Family(NamedTuple):
    """A file, and what is changed in it."""

    file: str
    changes: dict = {}  # noqa: RUF012, nothing writes to it
    order: int = 3
    """With which power of the distance to the cutoff a neighbour's energy vanishes: three of the
    polynomial's, and one of the Bessel functions, where the network has no biases and no transform
    changes distances near the cutoff."""


GAUSSIAN = {"radial_type": "gaussian", "gaussian_coefficient": -0.5 / 0.9**2}

FAMILIES = {
    "residual": Family("0.3.16-residual", order=4),
    "one layer": Family("0.3.13-one-layer", order=4),
    "reduced products": Family("0.3.16-reduced", order=4),
    "plain MACE": Family("0.3.16-plain", order=4),
    "Agnesi, ZBL": Family("0.3.16-agnesi-zbl"),
    "Soft": Family("0.3.10-soft", order=4),
    "Soft of 0.3.6": Family("0.3.6-soft", order=4),
    "density, two heads": Family("0.3.16-density-heads"),
    "non-linear, two heads": Family("0.3.15-edges-first"),
    "non-linear, embedding readout": Family("0.3.14-nonlinear", {"embedding_readout": True}),
    "residual, cutoff on weights": Family("0.3.16-residual", {"apply_cutoff": False}, order=4),
    "density, cutoff on weights": Family("0.3.16-density-heads", {"apply_cutoff": False}),
    "Gaussian": Family("0.3.13-one-layer", GAUSSIAN),
    "Chebyshev": Family("0.3.13-one-layer", {"radial_type": "chebyshev"}),
}
"""Interaction blocks and options of models; the last six differ from their file by an option."""

JUMPING = {
    "non-linear, cutoff on radial functions": Family("0.3.14-nonlinear", {"apply_cutoff": True})
}
"""mace-torch builds such a model if asked to, and it is not smooth."""

HEADS = ["density, two heads", "non-linear, two heads", "density, cutoff on weights"]

EMBEDDING = ["non-linear, two heads", "non-linear, embedding readout"]

PRECISION = ["residual", "Agnesi, ZBL", "density, two heads", "non-linear, two heads"]
"""Compiled for float32 too: one for each kind of block."""


@functools.cache
def loaded(family):
    """(model, params) in float64. Shared by all tests, so that each model compiles once."""
    name, changes, _ = (FAMILIES | JUMPING)[family]
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(lzma.decompress((FOLDER / f"{name}.model.xz").read_bytes()))
        file.flush()
        model, params = convert(file.name)
    config, buffers = model.config.model_copy(update=changes), dict(model.buffers)
    flat = tree.flatten(params)
    if changes.get("radial_type", "bessel") != "bessel":
        buffers = {k: v for k, v in buffers.items() if not k.startswith("radial_embedding/bessel")}
    if config.radial_type == "gaussian":
        centers = np.linspace(0.0, config.r_max, config.num_bessel)
        buffers["radial_embedding/bessel_fn/gaussian_weights"] = centers
    if config.embedding_readout:
        channels = flat["node_embedding/linear/0e"].shape[-1]
        weights = np.random.default_rng(0).normal(size=(channels, len(config.heads)))
        flat["embedding_readout/linear/0e"] = weights
    model = replace(model, config=config, buffers=buffers)
    return model, jax.tree.map(jax.numpy.asarray, tree.unflatten(flat))


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


class Result(NamedTuple):
    """Of one structure, padding removed."""

    energy: float
    node_energy: np.ndarray
    forces: np.ndarray
    stress: np.ndarray


def batches(model, structures, head=None, dtype="float64"):
    """Packed into SHAPE, as many at a time as it holds."""
    frames = [data.from_atoms(atoms) for atoms in structures]
    dataset = data.prepare(frames, model, head=head or model.heads[0], row_width=WIDTH)
    every = np.arange(len(model.atomic_numbers), dtype=np.int32)
    start = 0
    while start < len(frames):
        stop, nodes, rows = start, 1, 0
        while stop < len(frames):
            nodes += len(frames[stop])
            rows += len(dataset.samples[stop].receivers)
            if nodes > SHAPE.n_node or rows > SHAPE.n_row or stop - start == SHAPE.n_graph - 1:
                break
            stop += 1
        assert stop > start, "a structure that does not fit in SHAPE"
        graph = data.pack(dataset, range(start, stop), SHAPE, dtype).graph
        species = graph.elements[graph.species]
        yield stop - start, graph._replace(elements=every, species=species)
        start = stop


def results(model, params, graph, count):
    """Of the first ``count`` graphs, as float64."""
    out = predictor(model, params, graph)
    energy, node_energy, forces, stress = (
        np.asarray(x, np.float64) for x in (out.energy, out.node_energy, out.forces, out.stress)
    )
    atoms = [graph.is_atom & (graph.graph_index == g) for g in range(count)]
    return [
        Result(energy[g], node_energy[own], forces[own], stress[g]) for g, own in enumerate(atoms)
    ]


def evaluate(family, structures, *, head=None, params=None, dtype="float64"):
    """``[Atoms] -> [Result]``: interaction energies, of the first head unless said."""
    model, own = loaded(family)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), own if params is None else params)
    found = []
    for count, graph in batches(model, structures, head, dtype):
        found += results(model, params, graph, count)
    return found


MOLECULE = ase.Atoms(
    [8, 1, 26, 1],
    [[0.0, 0.0, 0.0], [0.7, 0.5, -0.3], [-0.8, 1.4, 0.5], [0.3, -0.9, 1.2]],
    info={"charge": -2, "spin": 3},
)
"""O-H and O-Fe are closer than their covalent radii reach: ZBL and the transforms matter."""

CRYSTAL = ase.Atoms(
    [26, 8, 1],
    [[0.1, 0.2, 0.3], [1.5, 1.2, 0.8], [0.2, 2.3, 0.4]],
    cell=[[3.4, 0.1, -0.3], [0.9, 3.7, 0.2], [-0.5, 0.8, 3.2]],
    pbc=True,
    info={"charge": 1, "spin": 2},
)
"""Triclinic; atoms see their own images."""

BOTH = pytest.mark.parametrize("atoms", [MOLECULE, CRYSTAL], ids=["molecule", "crystal"])


def close(found, expected, tolerance=EXACT):
    """Within ``tolerance`` of the largest value, or of 1 eV, eV/Å."""
    atol = tolerance * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def same(found, expected, tolerance=EXACT, *, stress=True):
    close(found.energy, expected.energy, tolerance)
    close(found.node_energy, expected.node_energy, tolerance)
    close(found.forces, expected.forces, tolerance)
    if stress:
        close(found.stress, expected.stress, tolerance)


def rotation(seed):
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return matrix * np.linalg.det(matrix)


def moved(atoms, positions=None, cell=None):
    other = atoms.copy()
    if cell is not None:
        other.set_cell(cell)
    if positions is not None:
        other.positions = positions
    return other


# --- symmetry -------------------------------------------------------------------------------------


@BOTH
def test_rotations_and_reflections_turn_forces_and_stress(family, atoms):
    matrices = [rotation(0), -np.eye(3), -rotation(1)]
    turned = [moved(atoms, atoms.positions @ m.T, atoms.cell.array @ m.T) for m in matrices]
    expected, *found = evaluate(family, [atoms, *turned])
    for m, result in zip(matrices, found, strict=True):
        stress = m @ expected.stress @ m.T
        same(result, expected._replace(forces=expected.forces @ m.T, stress=stress))
        assert np.abs(result.forces - expected.forces).max() > 0.05


@BOTH
def test_translations_and_other_images_change_nothing(family, atoms):
    shifted = moved(atoms, atoms.positions + np.array([1.3, -2.7, 4.1]))
    wrapped = shifted.copy()
    wrapped.wrap()
    expected, *found = evaluate(family, [atoms, shifted, wrapped])
    for result in found:
        same(result, expected)


@BOTH
def test_the_order_of_atoms_changes_nothing(family, atoms):
    orders = [np.random.default_rng(seed).permutation(len(atoms)) for seed in range(3)]
    expected, *found = evaluate(family, [atoms, *(atoms[order] for order in orders)])
    for order, result in zip(orders, found, strict=True):
        forces, node_energy = expected.forces[order], expected.node_energy[order]
        same(result, expected._replace(forces=forces, node_energy=node_energy))
    assert np.ptp(expected.node_energy) > 1e-3  # the atoms are not alike


# --- extensivity ----------------------------------------------------------------------------------


def test_a_supercell_has_its_multiple_of_energy(family):
    expected, double = evaluate(family, [CRYSTAL, CRYSTAL.repeat((2, 1, 1))])
    close(double.energy, 2 * expected.energy)
    close(double.forces, np.tile(expected.forces, (2, 1)))
    close(double.node_energy, np.tile(expected.node_energy, 2))
    close(double.stress, expected.stress)


def test_far_molecules_add_up(family):
    a, b = MOLECULE, MOLECULE[[1, 0, 2]]
    b.positions += [0.0, 0.0, 30.0]
    b.info = dict(a.info)  # features of a graph are felt by all of its atoms
    first, second, both = evaluate(family, [a, b, a + b])
    close(both.energy, first.energy + second.energy)
    close(both.forces, np.concatenate([first.forces, second.forces]))


def test_an_isolated_atom_feels_no_force_and_depends_on_nothing_else(family):
    """What it has beyond its E0 is what it has beside another atom that is out of reach."""
    model, _ = loaded(family)
    alone = [ase.Atoms([z], info=MOLECULE.info) for z in model.atomic_numbers]
    other = ase.Atoms([8], [[0, 0, 1.0001 * model.r_max]])
    with_other = [ase.Atoms([z], info=MOLECULE.info) + other for z in model.atomic_numbers]
    found = evaluate(family, alone + with_other)
    for one, two in zip(found[: len(alone)], found[len(alone) :], strict=True):
        np.testing.assert_array_equal(one.forces, 0.0)
        np.testing.assert_array_equal(one.stress, 0.0)
        np.testing.assert_array_equal(two.forces, 0.0)
        close(one.node_energy, two.node_energy[:1])


def test_an_isolated_atom_has_its_self_energy(family):
    model, _ = loaded(family)
    alone = [ase.Atoms([z], info=MOLECULE.info) for z in model.atomic_numbers]
    for head in range(len(model.heads)):
        found = evaluate(family, alone, head=model.heads[head])
        expected = [self_energy(family, element, head) for element in range(len(alone))]
        close([result.energy for result in found], expected)


def silu(x):
    return x / (1 + np.exp(-x))


def self_energy(family, element, head):
    """What follows from the scalars of one atom without neighbours, in plain numpy.

    Its message is nothing, or in a non-linear block the gated self-residual; the rest comes through
    the self-connections, if there are any: in the others E = E0 + shift.
    """
    model, params = loaded(family)
    config = model.config
    flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}

    def linear(x, path):
        return x @ flat[path].reshape(x.size, -1) / x.size**0.5

    own = np.eye(len(model.atomic_numbers))[element]
    x = linear(own, "node_embedding/linear/0e")
    if config.embeddings:
        usual = {"total_charge": MOLECULE.info["charge"], "total_spin": MOLECULE.info["spin"]}
        rows = [
            flat[f"joint_embedding/embedders_{spec.name}/weight"][usual[spec.name] + spec.offset]
            for spec in config.embeddings
        ]
        x = x + silu(np.concatenate(rows) @ flat["joint_embedding/project"])
    outside = linear(x, "embedding_readout/linear/0e")[head] if config.embedding_readout else 0.0
    total = 0.0
    for i, (block, readout) in enumerate(zip(config.interactions, config.readouts, strict=True)):
        path = f"interactions_{i}"
        if block.is_nonlinear:
            message = linear(linear(x, f"{path}/linear_up/0e"), f"{path}/linear_res/0e")
            message = block.gate.scalar_constant * silu(message[: x.size])
            message = linear(message, f"{path}/linear_2/0e")
            contracted = self_contraction(model, flat, f"products_{i}", message)
            x = linear(x, f"{path}/skip_tp/0e") + linear(contracted, f"products_{i}/linear/0e")
        elif block.is_residual:
            weight = f"{path}/skip_tp/0e"
            x = linear(np.outer(own, x).ravel(), weight)
        else:
            x = np.zeros_like(x)
        total += self_readout(config, readout, linear, flat, f"readouts_{i}", x, head)
    return outside + model.constants.scale[head] * total + model.constants.shift[head]


def self_contraction(model, flat, path, message):
    """Powers of the scalars alone, with the file's own U tensors."""
    found = 0.0
    orders = range(1, model.config.products[0].correlation + 1)
    names = dict(zip(reversed(orders), ("weights_max", "weights_0", "weights_1"), strict=False))
    for nu in orders:
        u = model.buffers[f"{path}/symmetric_contractions/0e/U_matrix_{nu}"][(0,) * nu]
        found = found + u @ flat[f"{path}/symmetric_contractions/0e/{names[nu]}"][0] * message**nu
    return found


def self_readout(config, readout, linear, flat, path, x, head):
    if readout.kind == "linear":
        return linear(x, f"{path}/linear/0e")[head]
    width = flat[f"{path}/linear_1/0e"].shape[-1]
    mask = np.arange(width) // (width // len(config.heads)) == head
    x = config.gate_constant * silu(linear(x, f"{path}/linear_1/0e")) * mask
    if readout.kind == "nonlinear":
        return linear(x, f"{path}/linear_2/0e")[head]
    x = linear(x, f"{path}/linear_mid/0e") + flat[f"{path}/linear_mid/bias"]
    x = config.gate_constant * silu(x) * mask
    return (linear(x, f"{path}/linear_2/0e") + flat[f"{path}/linear_2/bias"])[head]


def test_labels_lose_the_e0s_of_their_own_head(family):
    """So that a potential that says E - ΣE0 of a frame fits its energy E."""
    model, _ = loaded(family)
    frame = replace(data.from_atoms(MOLECULE), energy=-7.25)
    rows = [model.atomic_numbers.index(z) for z in frame.atomic_numbers]
    for head, e0s in zip(model.heads, model.e0s, strict=True):
        dataset = data.prepare([frame], model, head=head, row_width=WIDTH)
        label = data.pack(dataset, [0], SHAPE, "float64").labels.energy[0]
        assert label == pytest.approx(-7.25 - e0s[rows].sum(), rel=1e-14)


# --- derivatives ----------------------------------------------------------------------------------

STENCIL = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
"""Of the first derivative, fourth order in the step."""

STEP = 2e-4
"""Å, or strain."""


def slopes(family, displaced):
    """dE/ds at s = 0 for each function s -> Atoms."""
    structures = [at(k * STEP) for at in displaced for k in STENCIL]
    energies = np.array([result.energy for result in evaluate(family, structures)])
    return energies.reshape(-1, len(STENCIL)) @ list(STENCIL.values()) / STEP


@BOTH
def test_forces_are_minus_the_gradient_and_sum_to_zero(family, atoms):
    def along(i, axis):
        direction = np.zeros((len(atoms), 3))
        direction[i, axis] = 1.0
        return lambda s: moved(atoms, atoms.positions + s * direction)

    (result,) = evaluate(family, [atoms])
    numeric = -slopes(family, [along(i, axis) for i in range(len(atoms)) for axis in range(3)])
    largest = np.abs(result.forces).max()
    assert largest > 0.03
    np.testing.assert_allclose(
        numeric.reshape(-1, 3), result.forces, rtol=0, atol=NUMERIC * largest
    )
    net = [result.forces.sum(axis=0)]
    if not atoms.pbc.any():
        net.append(np.cross(atoms.positions, result.forces).sum(axis=0))
    np.testing.assert_allclose(net, 0.0, atol=EXACT * largest)


def test_stress_is_the_strain_derivative_over_the_volume(family):
    pairs = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]

    def along(a, b):
        strain = np.zeros((3, 3))
        strain[a, b] += 0.5
        strain[b, a] += 0.5

        def at(s):
            deform = np.eye(3) + s * strain
            return moved(CRYSTAL, CRYSTAL.positions @ deform, CRYSTAL.cell.array @ deform)

        return at

    (result,) = evaluate(family, [CRYSTAL])
    np.testing.assert_array_equal(result.stress, result.stress.T)
    numeric = slopes(family, [along(a, b) for a, b in pairs]) / CRYSTAL.get_volume()
    expected = np.array([result.stress[a, b] for a, b in pairs])
    np.testing.assert_allclose(numeric, expected, rtol=0, atol=NUMERIC * np.abs(expected).max())
    assert np.abs(expected).max() > 0.005


# --- the cutoff -----------------------------------------------------------------------------------


def leaving(family, distances):
    """Energies and forces as an atom leaves a pair that stays, less those when it is far away."""
    r_max = loaded(family)[0].r_max

    def at(distance):
        return ase.Atoms([8, 1, 26], [[0, 0, 0], [0, -distance, 0], [0.0, 1.9, 0.4]])

    far, *near = evaluate(family, [at(3 * r_max), *map(at, distances)])
    return [(result.energy - far.energy, result.forces - far.forces) for result in near]


def test_a_neighbour_leaves_with_the_power_of_the_cutoff(family):
    """E ~ δⁿ and F ~ δⁿ⁻¹ at the distance r_max - δ, and nothing at all is left beyond."""
    r_max, n = loaded(family)[0].r_max, FAMILIES[family].order
    deltas = [0.004, 0.002, 0.0, -1e-9, -0.5]
    (e, f), (e2, f2), *rest = leaving(family, [r_max - delta for delta in deltas])
    assert e / e2 == pytest.approx(2**n, rel=0.15)
    assert np.abs(f).max() / np.abs(f2).max() == pytest.approx(2 ** (n - 1), rel=0.15)
    for energy, forces in rest:
        close(energy, 0.0, EXACT)
        close(forces, 0.0, EXACT)


def test_energy_and_forces_are_continuous_through_the_cutoff(family):
    """Half the step, half the largest change: a jump would stay as it is."""
    r_max = loaded(family)[0].r_max
    coarse = np.linspace(r_max - 0.2, r_max + 0.05, 26)
    fine = np.linspace(r_max - 0.2, r_max + 0.05, 51)
    found = leaving(family, [*coarse, *fine])

    def largest(part):
        return [
            max(np.abs(b - a).max() for a, b in itertools.pairwise(values))
            for values in zip(*part, strict=True)
        ]

    changes, halved = largest(found[: len(coarse)]), largest(found[len(coarse) :])
    np.testing.assert_allclose(changes, 2 * np.array(halved), rtol=0.2)
    assert min(changes) > 1e-9


def test_a_biased_network_under_the_cutoff_jumps_as_in_mace():
    """Not a law but mace-torch's behaviour, reproduced.

    With ``apply_cutoff`` the cutoff multiplies the radial functions, but the network of a
    non-linear block has biases and sees the elements: at r_max it does not vanish, and an edge
    appears with a finite weight. Published non-linear models put the cutoff on the weights.
    """
    (name,) = JUMPING
    r_max = loaded(name)[0].r_max
    (e, _), (e2, _), (beyond, _) = leaving(name, [r_max - 1e-5, r_max - 1e-9, r_max])
    assert abs(e2) > 1e-3
    assert e == pytest.approx(e2, rel=1e-3)
    close(beyond, 0.0)


# --- padding and precision ------------------------------------------------------------------------


def test_padding_changes_nothing(family):
    """Nearly empty batches and full ones; padding of other elements, heads, features, lengths."""
    model, params = loaded(family)
    structures = [MOLECULE, CRYSTAL]
    others = [CRYSTAL.repeat((2, 1, 1))] * 6 + [MOLECULE] * 12
    expected = evaluate(family, structures)
    # at the end of a full batch
    (count, graph), *more = batches(model, others + structures)
    assert not more
    crowded = results(model, params, graph, count)[-2:]
    for result, alone in zip(crowded, expected, strict=True):
        same(result, alone, 1e-13)
    ((count, graph),) = batches(model, structures)
    lengths = np.linalg.norm(graph.vectors, axis=-1, keepdims=True)
    is_padding = lengths >= model.r_max
    assert is_padding.mean() > 0.5
    far = np.where(is_padding, [-1.3 * model.r_max, 3.0, 1.0], graph.vectors)
    exactly = np.where(is_padding, [0.0, 0.0, model.r_max], graph.vectors)
    species = np.where(graph.is_atom, graph.species, len(model.atomic_numbers) - 1)
    head = np.where(graph.is_graph, graph.head, len(model.heads) - 1).astype(np.int32)
    features = {
        name: np.where(graph.is_graph, value, 1.0) for name, value in graph.features.items()
    }
    for vectors in (far, exactly):
        changed = graph._replace(
            vectors=vectors, species=species.astype(np.int32), head=head, features=features
        )
        for result, alone in zip(results(model, params, changed, count), expected, strict=True):
            same(result, alone, 1e-13)


@pytest.mark.parametrize("name", PRECISION)
def test_single_precision_agrees_with_double(name):
    structures = [MOLECULE, CRYSTAL, CRYSTAL.repeat((2, 1, 1))]
    double = evaluate(name, structures)
    single = evaluate(name, structures, dtype="float32")
    for a, b in zip(single, double, strict=True):
        same(a, b, SINGLE, stress=b.stress.any())
    assert any(a.energy != b.energy for a, b in zip(single, double, strict=True))


# --- heads and features ---------------------------------------------------------------------------


def test_families_with_heads_and_with_embeddings_are_all_listed():
    assert {name for name in FAMILIES if len(loaded(name)[0].heads) > 1} == set(HEADS)
    assert {name for name in FAMILIES if loaded(name)[0].embeddings} == set(EMBEDDING)


@pytest.mark.parametrize("name", HEADS)
def test_heads_differ_and_do_not_mix(name):
    """Also within a batch: each graph has its own head."""
    model, params = loaded(name)
    per_head = [evaluate(name, [MOLECULE, CRYSTAL], head=head) for head in model.heads]
    for one, other in zip(*per_head, strict=True):
        assert abs(one.energy - other.energy) > 1e-2
        assert np.abs(one.forces - other.forces).max() > 1e-2
    ((count, graph),) = batches(model, [MOLECULE, CRYSTAL])
    head = graph.head.copy()
    head[1] = 1
    first, second = results(model, params, graph._replace(head=head), count)
    same(first, per_head[0][0], 1e-13)
    same(second, per_head[1][1], 1e-13)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_does_not_depend_on_the_parameters_of_the_other(name):
    model, params = loaded(name)

    def other_head(path, leaf):
        """Noise in the columns, rows or entries that belong to the second head."""
        if not path.startswith("readouts"):
            return leaf
        noise = np.array(leaf)
        last = noise.shape[-1] // 2
        noise[..., last:] += 0.7
        if path.endswith(("linear_2/0e", "linear_mid/0e")):
            noise[noise.shape[0] // 2 :] += 0.7
        return noise

    flat = {path: other_head(path, leaf) for path, leaf in tree.flatten(params).items()}
    changed = jax.tree.map(jax.numpy.asarray, tree.unflatten(flat))
    same_head, other = (
        evaluate(name, [MOLECULE, CRYSTAL], head=head, params=changed) for head in model.heads
    )
    for result, expected in zip(same_head, evaluate(name, [MOLECULE, CRYSTAL]), strict=True):
        same(result, expected, 1e-13)
    before = evaluate(name, [MOLECULE, CRYSTAL], head=model.heads[1])
    assert all(abs(a.energy - b.energy) > 1e-3 for a, b in zip(other, before, strict=True))


def test_a_head_does_not_depend_on_the_scale_shift_and_e0s_of_the_other():
    model, params = loaded("density, two heads")
    buffers = dict(model.buffers)
    for path in ("scale_shift/scale", "scale_shift/shift", "atomic_energies_fn/atomic_energies"):
        value = np.array(buffers[path])
        value[1] += 0.5
        buffers[path] = value
    changed = replace(model, buffers=buffers)
    np.testing.assert_array_equal(changed.e0s[0], model.e0s[0])
    for index, head in enumerate(model.heads):
        ((count, graph),) = batches(model, [MOLECULE, CRYSTAL], head)
        before = results(model, params, graph, count)
        after = results(changed, params, graph, count)
        scale, shift = model.constants.scale[index], model.constants.shift[index]
        for a, b, n in zip(before, after, (len(MOLECULE), len(CRYSTAL)), strict=True):
            if index == 0:
                same(b, a, 1e-13)
            else:
                close(b.forces, a.forces * (scale + 0.5) / scale)
                close(b.energy, (a.energy - n * shift) * (scale + 0.5) / scale + n * (shift + 0.5))


@pytest.mark.parametrize("name", EMBEDDING)
def test_charge_and_spin_change_energy_and_forces(name):
    def with_info(**info):
        other = MOLECULE.copy()
        other.info = info
        return other

    states = [(0, 1), (-2, 1), (1, 1), (0, 2), (0, 3)]
    found = evaluate(name, [with_info(charge=q, spin=s) for q, s in states])
    energies = np.array([result.energy for result in found])
    gaps = np.abs(np.subtract.outer(energies, energies)) + np.eye(len(states))
    assert gaps.min() > 1e-3
    for result in found[1:]:
        assert np.abs(result.forces - found[0].forces).max() > 1e-3
    silent, spelled = evaluate(name, [with_info(), with_info(total_charge=-2, total_spin=1)])
    same(silent, found[0], 1e-13)
    same(spelled, found[1], 1e-13)
