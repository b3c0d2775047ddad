"""Descriptors and element filters are mace-torch's."""

import warnings

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.torch
pytest.importorskip("torch")
pytest.importorskip("mace")

import ase  # noqa: E402
from parity import reference  # noqa: E402

from converters.to_jax import convert  # noqa: E402
from converters.verify import structures  # noqa: E402
from jaxft import data  # noqa: E402
from jaxft.data import Frame, filter_elements  # noqa: E402
from jaxft.evaluate.descriptors import descriptors  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mace.calculators import MACECalculator
    from mace.cli import fine_tuning_select

ROUNDING = 1e-10
"""Of the largest feature of an element in a frame, float64."""


@pytest.mark.parametrize("name", ["small", "small-mace-zbl-heads", "small-mh-1"])
def test_descriptors_are_those_of_mace_torch(name, tmp_path, record_property):
    module = reference.build(name)
    model, params = convert(reference.save(module, tmp_path / "random.model"))
    images = list(structures(model.atomic_numbers, model.r_max).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calculator = MACECalculator(
            models=[module], device="cpu", default_dtype="float64", head=model.heads[0]
        )
    fine_tuning_select.calculate_descriptors(images, calculator)
    frames = [data.from_atoms(atoms) for atoms in images]
    params = jax.tree.map(jax.numpy.asarray, params)
    ours = descriptors(model, params, frames, batch_size=len(frames))
    present = sorted({int(z) for atoms in images for z in atoms.numbers})
    worst = 0.0
    for atoms, found in zip(images, ours, strict=True):
        theirs = atoms.info["mace_descriptors"]
        for z, block in zip(present, found, strict=True):
            expected = theirs.get(ase.data.chemical_symbols[z])
            if expected is None:
                assert (block == 0).all()
            else:
                worst = max(worst, np.abs(block - expected).max() / np.abs(expected).max())
    record_property("descriptors", float(worst))
    assert worst <= ROUNDING


@pytest.mark.parametrize("rule", ["none", "combinations", "inclusive", "exclusive"])
def test_rules_on_elements_are_those_of_mace_torch(rule):
    rng = np.random.default_rng(0)
    images = [ase.Atoms(rng.choice(["H", "C", "O", "Si"], rng.integers(1, 5))) for _ in range(200)]
    frames = [
        Frame(a.numbers, np.zeros((len(a), 3)), np.zeros((3, 3)), (False,) * 3) for a in images
    ]
    theirs = fine_tuning_select.FilteringType(rule)
    for elements in (["H"], ["H", "O"], ["C", "O", "Si"], ["H", "C", "O", "Si"]):
        passes = [fine_tuning_select.filter_atoms(a, elements, theirs) for a in images]
        assert any(passes)
        expected = [frame for frame, is_in in zip(frames, passes, strict=True) if is_in]
        assert filter_elements(frames, elements, rule=rule) == expected
