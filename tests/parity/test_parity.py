"""jaxft computes what torch MACE computes: energies, forces, stresses, losses, gradients.

Measured maxima are attached to the tests (``pytest -rP`` prints them) and are five orders of
magnitude below the float64 bounds.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.torch
pytest.importorskip("torch")
pytest.importorskip("mace")

from parity import reference  # noqa: E402

from converters.rules import parameter_rules  # noqa: E402
from converters.to_jax import convert  # noqa: E402
from converters.to_torch import export  # noqa: E402
from converters.verify import structures  # noqa: E402
from jaxft import data, loss, predict, tree  # noqa: E402
from jaxft.bundle import cast  # noqa: E402

SHIPPED = Path(__file__).parents[2] / "benchmarks" / "data" / "gfn2_small.model"
FULL_SIZE = ("mp0-small", "mp0-medium", "mp0-large")

# Absolute bounds of energy (eV/atom), forces (eV/Å) and stress (eV/Å³). In float64 they leave room
# for other BLAS libraries; in float32 they are below the errors of any potential.
FLOAT64 = {"energy": 1e-10, "forces": 1e-9, "stress": 1e-10}
FLOAT32 = {"energy": 1e-5, "forces": 1e-4, "stress": 1e-5}
# torch keeps Clebsch-Gordan constants inside a float32 file, rounded; ours are exact.
FLOAT64_OF_FLOAT32_FILE = {"energy": 1e-8, "forces": 1e-7, "stress": 1e-8}
VIRIAL = 1e-9  # eV, of structures without a volume
GRADIENT = 1e-8  # of the largest component of each leaf


def shipped(tmp_path, dtype):
    """The shipped model, which is a float64 file; in float32 by way of an export."""
    path = SHIPPED
    if dtype == "float32":
        path = export(cast(*convert(SHIPPED), dtype), tmp_path / "narrowed.model")
    return reference.load(path), *convert(path)


def case(name, tmp_path, dtype, elements=reference.MP_ELEMENTS):
    """A torch module and the same model in jaxft, by way of a file."""
    if name == "shipped":
        return shipped(tmp_path, dtype)
    module = reference.build(name, elements=elements, dtype=dtype, message=4.0)
    return module, *convert(reference.save(module, tmp_path / "random.model"))


def jax_batch(model, atoms, dtype):
    dataset = data.prepare([data.from_atoms(a) for a in atoms], model)
    (batch,) = data.epoch(dataset, len(atoms), dtype=dtype)
    return batch


def deviations(module, model, params, dtype):
    """{structure: {quantity: largest absolute difference}}, and the largest force."""
    frames = structures(model.atomic_numbers, model.r_max)
    atoms = list(frames.values())
    theirs = reference.evaluate(module, atoms)
    batch = jax_batch(model, atoms, dtype)
    params = jax.tree.map(functools.partial(jnp.asarray, dtype=dtype), params)
    ours = jax.jit(functools.partial(predict, model))(params, batch.graph)
    ours = jax.tree.map(lambda x: np.asarray(x, np.float64), ours)
    e0 = dict(zip(model.atomic_numbers, model.e0s[0], strict=True))
    found, start = {}, 0
    for g, (name, frame) in enumerate(frames.items()):
        n = len(frame)
        rows = slice(start, start + n)
        start += n
        total = ours.energy[g] + sum(e0[z] for z in frame.numbers.tolist())
        found[name] = {
            "energy": abs(ours.energy[g] - theirs.interaction[g]) / n,
            "total": abs(total - theirs.energy[g]) / n,
            "forces": np.abs(ours.forces[rows] - theirs.forces[rows]).max(),
        }
        if frame.pbc.all():
            found[name]["stress"] = np.abs(ours.stress[g] - theirs.stress[g]).max()
        else:
            virial = ours.stress[g] * float(batch.graph.volume[g])
            found[name]["virial"] = np.abs(virial - theirs.virial[g]).max()
    return found, np.abs(theirs.forces).max()


def maxima(found, size, record_property):
    """Largest deviations by quantity, printed structure by structure."""
    quantities = ("energy", "total", "forces", "stress", "virial")
    print(f"\n{'':<20}" + "".join(f"{q:>10}" for q in quantities))
    for name, row in found.items():
        cells = (f"{row[q]:>10.1e}" if q in row else f"{'-':>10}" for q in quantities)
        print(f"{name:<20}" + "".join(cells))
    print(f"largest force {size:.1f} eV/Å")
    worst = {q: max(row[q] for row in found.values() if q in row) for q in quantities}
    for quantity, value in worst.items():
        record_property(quantity, float(value))
    return worst


@pytest.mark.parametrize("name", ["shipped", "small", *FULL_SIZE])
def test_energies_forces_and_stresses_agree_in_float64(name, tmp_path, record_property):
    module, model, params = case(name, tmp_path, "float64")
    found, size = deviations(module, model, params, "float64")
    worst = maxima(found, size, record_property)
    assert 1.0 < size < 100.0  # eV/Å: absolute bounds mean something
    assert worst["energy"] <= FLOAT64["energy"]
    assert worst["total"] <= FLOAT64["energy"]
    assert worst["forces"] <= FLOAT64["forces"]
    assert worst["stress"] <= FLOAT64["stress"]
    assert worst["virial"] <= VIRIAL


@pytest.mark.parametrize("name", ["shipped", "small", *FULL_SIZE])
def test_energies_forces_and_stresses_agree_in_float32(name, tmp_path, record_property):
    module, model, params = case(name, tmp_path, "float32")
    found, size = deviations(module, model, params, "float32")
    worst = maxima(found, size, record_property)
    assert 1.0 < size < 100.0
    # Total energies are not compared: torch's own sum of float32 E0s would be what is measured.
    assert worst["energy"] <= FLOAT32["energy"]
    assert worst["forces"] <= FLOAT32["forces"]
    assert worst["stress"] <= FLOAT32["stress"]


def test_a_float32_file_agrees_in_float64_to_the_rounding_of_its_constants(
    tmp_path, record_property
):
    module, model, params = case("shipped", tmp_path, "float32")
    found, size = deviations(module.double(), model, params, "float64")
    worst = maxima(found, size, record_property)
    assert worst["energy"] <= FLOAT64_OF_FLOAT32_FILE["energy"]
    assert worst["forces"] <= FLOAT64_OF_FLOAT32_FILE["forces"]
    assert worst["stress"] <= FLOAT64_OF_FLOAT32_FILE["stress"]


WEIGHTS = {"energy": 3.0, "forces": 100.0, "stress": 500.0}


@pytest.mark.parametrize("name", ["shipped", "small", *FULL_SIZE])
def test_loss_and_its_gradient_in_every_parameter_agree(name, tmp_path, record_property):
    module, model, params = case(name, tmp_path, "float64", reference.TEN_ELEMENTS)
    frames = reference.labelled_crystals(model)
    value, gradient = reference.gradient(module, frames, **WEIGHTS)
    objective = loss.weighted(model, **WEIGHTS)
    batch = jax_batch(model, frames, "float64")
    (ours, info), ours_gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        jax.tree.map(jnp.asarray, params), batch
    )
    terms = {key: WEIGHTS[key] * float(info[key]) / value for key in WEIGHTS}
    print("shares of the loss", {key: f"{share:.2g}" for key, share in terms.items()})
    assert min(terms.values()) > 1e-4  # every term is seen
    assert float(ours) == pytest.approx(value, rel=1e-12)

    leaves = tree.flatten(ours_gradient)
    expected = {}
    for rule in parameter_rules(model.config):
        expected |= rule.to_leaves(gradient[rule.name])
    assert leaves.keys() == expected.keys()
    relative = {}
    for path, theirs in expected.items():
        size = np.abs(theirs).max()
        assert size > 0.0, f"{path}: a gradient of zeros tests nothing"
        relative[path] = float(np.abs(np.asarray(leaves[path]) - theirs).max() / size)
    worst = max(relative, key=relative.get)
    print(f"{len(relative)} leaves, largest relative difference {relative[worst]:.1e} in {worst}")
    record_property("gradient", relative[worst])
    assert relative[worst] <= GRADIENT
