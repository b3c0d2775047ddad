"""Estimated and averaged E0s are mace-torch's own, to rounding."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from ase import Atoms

pytestmark = pytest.mark.torch
pytest.importorskip("torch")
pytest.importorskip("mace")

from mace import data as mace_data  # noqa: E402
from mace.data.utils import compute_average_E0s, estimate_e0s_from_foundation  # noqa: E402
from mace.tools import AtomicNumberTable  # noqa: E402
from mace.tools.scripts_utils import remove_pt_head  # noqa: E402
from parity import reference  # noqa: E402

from converters.to_jax import convert  # noqa: E402
from jaxft import data  # noqa: E402
from jaxft.e0s import average, estimate  # noqa: E402

PARITY = 1e-8
"""eV; of E0s of thousands of eV, from energies that agree to 1e-10."""

DISTINCT = ("H2O", "OFe", "H3FeO", "O3Fe2", "H5", "Fe4O", "HFe")
"""Seven compositions of three elements."""

FIXED = ("H2O", "H4O2", "H2O")
"""One composition of two."""

DEFICIENT = ("H2O", "H2O2Fe", "H4O3Fe")
"""Two independent compositions of three."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A torch MACE of two heads, and the same model here."""
    module = reference.build("small-1-layer-heads")
    path = reference.save(module, tmp_path_factory.mktemp("e0s") / "two.model")
    model, params = convert(path)
    return module, model, jax.tree.map(jax.numpy.asarray, params)


def clusters(formulas):
    """Random clusters with energies of another level of theory: thousands of eV away."""
    rng = np.random.default_rng(4)
    far = {1: -13.6, 8: -2041.3, 26: -34_560.7}
    found = []
    for formula in formulas:
        atoms = Atoms(formula)
        atoms.positions = 1.5 * np.argwhere(np.ones((3, 3, 3)))[: len(atoms)]
        atoms.positions += rng.normal(scale=0.1, size=atoms.positions.shape)
        energy = sum(far[z] for z in atoms.numbers.tolist()) + 2.0 * rng.normal()
        atoms.info["REF_energy"] = energy
        found.append(atoms)
    return found


def torchs(module, atoms):
    """Their estimate, with the E0s of the head that their function evaluates, the first."""
    configs = [
        mace_data.config_from_atoms(a.copy(), key_specification=reference.LABELS) for a in atoms
    ]
    table = AtomicNumberTable(sorted({int(z) for a in atoms for z in a.numbers}))
    e0s = np.atleast_2d(module.atomic_energies_fn.atomic_energies.numpy())[0]
    known = {int(z): float(e0) for z, e0 in zip(module.atomic_numbers, e0s, strict=True)}
    with reference.default_dtype("float64"):
        return estimate_e0s_from_foundation(module, known, configs, table), compute_average_E0s(
            configs, table
        )


@pytest.mark.parametrize(
    ("head", "formulas", "rank"),
    [("dft", DISTINCT, 3), ("cc", DISTINCT, 3), ("cc", FIXED, 1), ("cc", DEFICIENT, 2)],
)
def test_estimates_are_mace_torchs_for_each_head(formulas, rank, head, made):
    module, model, params = made
    atoms = clusters(formulas)
    with reference.default_dtype("float64"):
        single = remove_pt_head(module, head)  # their function knows no head but the first
    estimated, averaged = torchs(single, atoms)
    frames = [data.from_atoms(a) for a in atoms]
    got = estimate(model, params, frames, head=head)
    assert got.rank == rank
    assert got.e0s == pytest.approx(estimated, rel=0, abs=PARITY)
    assert average(frames).e0s == pytest.approx(averaged, rel=0, abs=PARITY)
    # Each element outside the groups is determined, and in them as many sums as are listed.
    alone = len(got.e0s) - sum(len(group.elements) for group in got.undetermined)
    assert alone + sum(len(group.sums) for group in got.undetermined) == rank
    for group in got.undetermined:
        for known in group.sums:
            theirs, ours = (sum(n * e[z] for z, n in known.items()) for e in (estimated, got.e0s))
            assert ours == pytest.approx(theirs, rel=0, abs=PARITY)
