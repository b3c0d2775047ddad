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


def test_it_is_the_derivative_of_the_forces(matrix, crystal, small):
    step, cells = 1e-4, []
    for atom, axis in ((0, 0), (5, 2)):
        for sign in (1, -1):
            moved = crystal.copy()
            moved.positions[atom, axis] += sign * step
            cells.append(moved)
    forces = [o.forces.ravel() for o in JaxCandidate("own", *small).evaluate(cells)]
    for row, (up, down) in zip((0, 17), (forces[:2], forces[2:]), strict=True):
        np.testing.assert_allclose(matrix[row], -(up - down) / (2 * step), atol=1e-5)


def test_products_chunks_and_chosen_rows_are_of_the_same_matrix(matrix, crystal, small):
    vectors = np.random.default_rng(0).normal(size=(5, len(crystal), 3))
    expected = (vectors.reshape(5, -1) @ matrix).reshape(vectors.shape)
    for chunk in (2, 5):
        found = hessian_products(*small, crystal, vectors, chunk=chunk)
        np.testing.assert_allclose(found, expected, atol=ROUNDING)
    rows = force_constants(*small, crystal, [6, 1], chunk=5)
    full = matrix.reshape(len(crystal), 3, len(crystal), 3).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(rows, full[[6, 1]], atol=ROUNDING)
    assert hessian_products(*small, crystal, vectors[:0]).shape == (0, len(crystal), 3)


def test_large_structures_are_evaluated_in_blocks(matrix, crystal, small, monkeypatch):
    monkeypatch.setattr(module, "edges_per_block", lambda _: 128)
    assert module._graph(small[0], crystal, None).blocks.count > 1
    row = force_constants(*small, crystal, [3])[0]
    full = matrix.reshape(len(crystal), 3, len(crystal), 3).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(row, full[3], atol=ROUNDING)


def test_a_molecule_turns_freely_where_there_is_no_force(small):
    """At a stationary distance of a dimer, H has five zero modes and one of stretching."""
    candidate = JaxCandidate("own", *small)
    apart = np.linspace(1.0, 3.5, 400)
    pulls = np.array(
        [
            o.forces[1, 0]
            for o in candidate.evaluate([ase.Atoms("OH", [[0, 0, 0], [d, 0, 0]]) for d in apart])
        ]
    )
    crossing = np.flatnonzero(np.sign(pulls[1:]) != np.sign(pulls[:-1]))
    assert len(crossing)
    low, high = apart[crossing[0]], apart[crossing[0] + 1]
    still = low - pulls[crossing[0]] * (high - low) / np.diff(pulls)[crossing[0]]
    matrix = hessian(*small, ase.Atoms("OH", [[0, 0, 0], [still, 0, 0]]))
    sizes = np.sort(abs(np.linalg.eigvalsh(matrix)))
    assert sizes[-1] > 0.1
    assert sizes[-2] < 1e-3 * sizes[-1]


def test_what_cannot_be_is_refused(small, crystal):
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        hessian_products(*small, crystal, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="chunk >= 1"):
        hessian(*small, crystal, chunk=0)
    with pytest.raises(ValueError, match="holds Si"):
        hessian(*small, ase.build.bulk("Si"))
