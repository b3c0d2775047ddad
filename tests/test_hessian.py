"""Exact second derivatives: symmetry, sum rule, finite differences, chunks, refusals."""

import ase.build
import numpy as np
import pytest

from jaxft.evaluate import hessian as module
from jaxft.evaluate.candidate import JaxCandidate
from jaxft.evaluate.hessian import force_constants, hessian, hessian_products

ROUNDING = 1e-10
"""eV/Å², of float64; entries are up to 100."""


@pytest.fixture(scope="module")
def crystal():
    """Eight atoms, cells smaller than the cutoff: an atom meets images of itself."""
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.rattle(0.1, seed=1)
    return atoms


@pytest.fixture(scope="module")
def matrix(crystal, small):
    return hessian(*small, crystal)


def test_it_is_symmetric(matrix):
    assert abs(matrix).max() > 0.1
    np.testing.assert_allclose(matrix, matrix.T, atol=ROUNDING)


def test_a_common_displacement_costs_nothing(matrix, crystal):
    sums = matrix.reshape(3 * len(crystal), len(crystal), 3).sum(axis=1)
    np.testing.assert_allclose(sums, 0, atol=ROUNDING)


def test_it_is_what_finite_displacements_converge_to(crystal, small):
    """All of them, as phonopy makes them of a cell without symmetry, in two cells."""
    pytest.importorskip("phonopy")
    from jaxft.evaluate.crystals import new_phonons
    from jaxft.evaluate.lattices import by_displacements, by_hessian, like

    one = new_phonons(crystal, np.diag([1, 1, 2]), np.eye(3))
    other = like(one)
    one.generate_displacements(distance=5e-4, is_plusminus=True)
    assert len(one.displacements) == 6 * len(crystal)
    candidate = JaxCandidate("own", *small, batch_size=1)
    (finite,) = by_displacements(candidate, [one])
    (exact,) = by_hessian(candidate, [other])
    assert other.force_constants.shape == (8, 16, 3, 3)
    assert max(finite.sum_rule, exact.sum_rule) < 1e-6
    assert finite.energy == pytest.approx(exact.energy)
    ours, theirs = (
        phonons.run_qpoints([[0, 0, 0], [0, 0, 0.5], [0.5, 0.2, 0.1]]).frequencies
        for phonons in (one, other)
    )
    assert abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_supercell_thinner_than_the_cutoff_is_flagged(small):
    pytest.importorskip("seekpath")
    from jaxft.evaluate.crystals import crystal_of
    from jaxft.evaluate.phonon_tasks import Options, _folded, ground_of

    unit, cutoff = ase.build.bulk("NaCl", "rocksalt", a=5.6), small[0].r_max
    for repeats, count in ((1, 1), (3, 0)):
        ground = ground_of(crystal_of(unit, supercell=(repeats,) * 3), Options(mesh=9.0))
        assert (5.6 / np.sqrt(3) * repeats < cutoff) == bool(count)
        assert len(_folded(JaxCandidate("own", *small), ground)) == count


def test_products_chunks_and_chosen_rows_are_of_the_same_matrix(matrix, crystal, small):
    vectors = np.random.default_rng(0).normal(size=(5, len(crystal), 3))
    expected = (vectors.reshape(5, -1) @ matrix).reshape(vectors.shape)
    found = hessian_products(*small, crystal, vectors, chunk=2)  # one more than they fill
    np.testing.assert_allclose(found, expected, atol=ROUNDING)
    rows = force_constants(*small, crystal, [6, 1], chunk=2)
    full = matrix.reshape(len(crystal), 3, len(crystal), 3).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(rows, full[[6, 1]], atol=ROUNDING)
    assert hessian_products(*small, crystal, vectors[:0], chunk=1).shape == (0, len(crystal), 3)


def test_large_structures_are_evaluated_in_blocks(matrix, crystal, small, monkeypatch):
    monkeypatch.setattr(module, "edges_per_block", lambda _: 128)
    assert module._graph(small[0], crystal, None).blocks.count > 1
    row = force_constants(*small, crystal, [3])[0]
    full = matrix.reshape(len(crystal), 3, len(crystal), 3).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(row, full[3], atol=ROUNDING)


def test_a_molecule_turns_and_stretches_as_one_curve_says(small):
    """Of a pair E(d): across it a spring E'(d) / d, along it E''(d); and so no others."""
    step = 1e-3

    def springs(distance):
        matrix = hessian(*small, ase.Atoms("OH", [[0, 0, 0], [distance, 0, 0]]))
        along, across = -matrix[0, 3], -matrix[1, 4]
        expected = np.diag([along, across, across])
        blocks = np.block([[expected, -expected], [-expected, expected]])
        np.testing.assert_allclose(matrix, blocks, atol=ROUNDING)
        return along, across

    slopes = [d * springs(d)[1] for d in (1.2 - step, 1.2 + step)]
    along, _ = springs(1.2)
    assert abs(along) > 0.1
    assert (slopes[1] - slopes[0]) / (2 * step) == pytest.approx(along, rel=1e-4)


def test_what_cannot_be_is_refused(small, crystal):
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        hessian_products(*small, crystal, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="chunk >= 1"):
        hessian(*small, crystal, chunk=0)
    with pytest.raises(ValueError, match="holds Si"):
        hessian(*small, ase.build.bulk("Si"))
