"""Radial functions and networks: mace-torch's own numbers, closed forms and limits."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.data import covalent_radii
from numpy.polynomial import chebyshev as series

from jaxft.models import radial

pytestmark = pytest.mark.filterwarnings("error")

CLOSED = 1e-12
"""Relative: float64 evaluations of the same formula in another order."""

AGNESI = {"q": 0.9183, "p": 4.5791, "a": 1.0805}
"""mace-torch's defaults; Witt et al., J. Chem. Phys. 159, 164101 (2023)."""

ZBL = {
    "c": np.array([0.1818, 0.5099, 0.2802, 0.02817]),
    "a_exp": np.array(0.300),
    "a_prefactor": np.array(0.4543),
}
"""mace-torch's defaults; Ziegler, Biersack, Littmark (1985)."""

PAIRS = (6, 1), (1, 6), (6, 6)
"""Sender and receiver of the three edges of ``tests/modules/test_radial.py`` in mace-torch."""


def radii(pairs):
    return np.array([covalent_radii[a] + covalent_radii[b] for a, b in pairs])


def repulsion(r, pairs, p=6):
    z = np.array(pairs, float).T
    return radial.zbl(jnp.asarray(r), (z[0], z[1]), radii(pairs), p, ZBL)


def derivatives(function, r, order=2):
    """[function, its first derivative, …] at the numbers ``r``."""
    found = []
    for _ in range(order + 1):
        found.append(jax.jit(jax.vmap(function))(jnp.asarray(r, float)))
        function = jax.grad(function)
    return np.array(found)


# --- mace-torch's numbers -------------------------------------------------------------------------
# Inputs are those of mace-torch's tests/modules/test_radial.py and test_modules.py, which state
# fewer digits (in comments below, rtol 1e-2 there). The digits here are torch's formulas in
# float64, evaluated apart from jaxft.


def test_zbl_says_what_mace_says():
    edges = [(1, 6), (6, 1), (6, 6)]
    atoms = np.zeros(2)
    np.add.at(atoms, [1, 0, 1], np.asarray(repulsion([1.0, 1.0, 2.0], edges)))
    np.testing.assert_allclose(atoms, [0.0031046655395640097] * 2, rtol=CLOSED)  # 0.0031


def test_agnesi_says_what_mace_says():
    found = radial.agnesi(jnp.array([1.0, 2.0, 3.0]), radii(PAIRS), **AGNESI)
    expected = [0.3646287614294511, 0.21749055850819923, 0.20886932437463707]
    np.testing.assert_allclose(found, expected, rtol=CLOSED)  # 0.3646, 0.2175, 0.2089


def test_soft_says_what_mace_says():
    found = radial.soft(jnp.array([1.0, 2.0, 3.0]), radii(PAIRS), jnp.array(4.0))
    expected = [0.8394624652035069, 1.9999858845463427, 2.9999947714742894]
    np.testing.assert_allclose(found, expected, rtol=CLOSED)


def test_bessel_says_what_mace_says():
    frequencies = np.arange(1, 6) * np.pi / 6.0
    found = radial.bessel(jnp.array([2.0]), frequencies, math.sqrt(2 / 6.0))
    np.testing.assert_allclose(found, [[0.25, 0.25, 0.0, -0.25, -0.25]], rtol=CLOSED, atol=1e-16)
    assert radial.bessel(jnp.linspace(0.1, 6.0, 10), frequencies, 1.0).shape == (10, 5)


def test_the_cutoff_says_what_mace_says():
    found = radial.polynomial_cutoff(jnp.array([2.5, 4.9, 5.0]), 5.0, 6)
    assert found[0] == 0.85546875
    assert found[2] == 0.0
    # nine digits are known; the terms cancel to about eleven
    np.testing.assert_allclose(found[1], 4.15457433e-4, rtol=1e-9)


# --- closed forms ---------------------------------------------------------------------------------


def test_bessel_functions_are_orthonormal_in_the_sphere():
    r_max, n = 3.5, 6
    x, weights = np.polynomial.legendre.leggauss(60)
    r, weights = 0.5 * r_max * (x + 1), 0.5 * r_max * weights
    values = radial.bessel(jnp.asarray(r), np.arange(1, n + 1) * np.pi / r_max, (2 / r_max) ** 0.5)
    gram = np.einsum("ra,rb,r->ab", values, values, weights * r**2)
    np.testing.assert_allclose(gram, np.eye(n), atol=CLOSED)


def test_gaussian_is_the_exponential_of_each_distance_to_a_center():
    centers = np.linspace(0.0, 5.0, 6)
    coefficient = -0.5 / (centers[1] - centers[0]) ** 2
    r = np.linspace(0.1, 5.0, 13)
    found = radial.gaussian(jnp.asarray(r), centers, coefficient)
    for (i, x), (j, center) in itertools.product(enumerate(r), enumerate(centers)):
        expected = math.exp(-((x - center) ** 2) / 2)
        assert found[i, j] == pytest.approx(expected, rel=CLOSED)
    assert found[0].argmax() == 0
    assert found[-1].argmax() == 5


def test_chebyshev_is_the_cosine_of_multiples_inside_and_the_polynomial_everywhere():
    n = 8
    inside = np.linspace(-1.0, 1.0, 41)
    cosines = np.cos(np.arange(1, n + 1) * np.arccos(inside)[:, None])
    found = radial.chebyshev(jnp.asarray(inside), n)
    # at the ends arccos is the inexact side, by the square root of an ulp over many multiples
    np.testing.assert_allclose(found, cosines, rtol=0, atol=CLOSED)
    outside = np.array([-2.5, 1.2, 3.0, 5.9])
    expected = np.stack([series.chebval(outside, np.eye(n + 1)[k]) for k in range(1, n + 1)], -1)
    np.testing.assert_allclose(radial.chebyshev(jnp.asarray(outside), n), expected, rtol=CLOSED)
    np.testing.assert_array_equal(radial.chebyshev(jnp.asarray(outside), 1)[:, 0], outside)


@pytest.mark.parametrize("p", [3, 5, 6, 8])
def test_the_cutoff_is_its_polynomial(p):
    r_max = 4.5
    coefficients = np.zeros(p + 3)
    coefficients[[0, p, p + 1, p + 2]] = (
        1.0,
        -(p + 1) * (p + 2) / 2,
        p * (p + 2),
        -p * (p + 1) / 2,
    )
    polynomial = np.polynomial.Polynomial(coefficients)
    u = np.linspace(0.05, 0.99, 30)
    found = derivatives(lambda r: radial.polynomial_cutoff(r, r_max, p), u * r_max)
    for order in range(3):
        expected = polynomial.deriv(order)(u) if order else polynomial(u)
        scale = np.abs(coefficients).max() * (p + 2) ** order  # its terms cancel
        np.testing.assert_allclose(
            found[order] * r_max**order, expected, rtol=0, atol=CLOSED * scale
        )


@pytest.mark.parametrize("p", [3, 5, 6, 8])
def test_the_cutoff_and_two_derivatives_reach_zero_and_stay_there(p):
    r_max = 4.5

    def cutoff(r):
        return radial.polynomial_cutoff(r, r_max, p)

    beyond = derivatives(cutoff, [r_max, np.nextafter(r_max, 9.0), 4.6, 9.0, 1e3])
    np.testing.assert_array_equal(beyond, 0.0)
    # (1 - u)³ p (p + 1) (p + 2) / 6 leads: the third derivative is the first to jump
    delta = 1e-4
    leading = p * (p + 1) * (p + 2) / 6
    found = derivatives(cutoff, [r_max * (1 - delta)])[:, 0] * r_max ** np.arange(3)
    expected = leading * np.array([delta**3, -3 * delta**2, 6 * delta])
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=1e-13)
    assert cutoff(1e-9) == 1.0


def test_the_old_soft_is_its_formula():
    a, b, r = 0.2, 3.0, (0.7, 1.1, 2.3)  # mace-torch's defaults until 0.3.9
    found = radial.soft_0_3_6(jnp.array(r), radii(PAIRS), jnp.array(a), jnp.array(b))
    for value, x, (z, other) in zip(found, r, PAIRS, strict=True):
        s = x / ((covalent_radii[z] + covalent_radii[other]) / 4)
        expected = x + math.tanh(-s - a * s**b) / 2 + 0.5
        assert value == pytest.approx(expected, rel=CLOSED)


def test_zbl_is_coulombs_law_screened_and_cut():
    r, (z, other) = 0.6, (8, 26)
    outer = covalent_radii[z] + covalent_radii[other]
    length = 0.4543 * 0.529 / (z**0.3 + other**0.3)
    terms = zip((0.1818, 0.5099, 0.2802, 0.02817), (3.2, 0.9423, 0.4028, 0.2016), strict=True)
    screening = sum(c * math.exp(-d * r / length) for c, d in terms)
    for p in (5, 6):
        u = r / outer
        cut = 1 - (p + 1) * (p + 2) / 2 * u**p + p * (p + 2) * u ** (p + 1)
        cut -= p * (p + 1) / 2 * u ** (p + 2)
        expected = 0.5 * 14.3996 * z * other / r * screening * cut
        (found,) = repulsion([r], [(z, other)], p)
        assert found == pytest.approx(expected, rel=CLOSED)


# --- limits ---------------------------------------------------------------------------------------


def test_agnesi_falls_from_one_to_zero():
    r = np.geomspace(1e-2, 1e6, 60)
    values = radial.agnesi(jnp.asarray(r), 1.4, **AGNESI)
    assert (np.diff(values) < 0).all()
    # s**(q - p) is what diverges at 0 and vanishes far away, so 1 - a s**p and 1 / (a s**q)
    s, a = r / 0.7, AGNESI["a"]
    np.testing.assert_allclose(1 - values[:5], a * s[:5] ** AGNESI["p"], rtol=1e-2)
    np.testing.assert_allclose(values[-5:], s[-5:] ** -AGNESI["q"] / a, rtol=1e-4)
    assert radial.agnesi(jnp.array(1e-9), 1.4, **AGNESI) == 1.0


@pytest.mark.parametrize("pair", PAIRS)
def test_soft_is_the_distance_far_away_and_stops_inside_the_bond(pair):
    (outer,) = radii([pair])
    far = jnp.linspace(4 * outer, 9 * outer, 5)
    np.testing.assert_allclose(radial.soft(far, outer, jnp.array(4.0)), far, rtol=CLOSED)
    near = jnp.linspace(0.0, 0.1 * outer, 5)
    inner = np.full(5, 0.75 * outer)
    np.testing.assert_allclose(radial.soft(near, outer, jnp.array(4.0)), inner, rtol=1e-4)


def test_the_old_soft_is_the_distance_far_away_and_half_an_angstrom_at_zero():
    far = jnp.linspace(5.0, 9.0, 5)
    found = radial.soft_0_3_6(far, 1.07, jnp.array(0.2), jnp.array(3.0))
    np.testing.assert_allclose(found, far, rtol=CLOSED)
    assert radial.soft_0_3_6(jnp.array(1e-14), 1.07, 0.2, 3.0) == pytest.approx(0.5, abs=1e-13)


@pytest.mark.parametrize("pair", [(1, 1), (1, 8), (6, 6), (26, 82)])
def test_zbl_repels_inside_the_bond_and_is_exactly_zero_outside(pair):
    (outer,) = radii([pair])
    inside = np.linspace(0.05, 0.98 * outer, 40)
    values = np.asarray(repulsion(inside, [pair] * 40))
    assert (values > 0).all()
    assert (np.diff(values) < 0).all()
    outside = np.array([outer, 1.0001 * outer, 2 * outer, 7.0, 200.0])

    def energy(r):
        return repulsion(r[None], [pair])[0]

    np.testing.assert_array_equal(derivatives(energy, outside), 0.0)
    smallest = repulsion([1e-3], [pair])[0]  # Coulomb's law for half the pair
    assert smallest == pytest.approx(0.5 * 14.3996 * pair[0] * pair[1] / 1e-3, rel=0.05)


@pytest.mark.parametrize("r_max", [3.5, 6.0, 12.0])
def test_padding_distances_have_finite_values_and_no_gradient_in_float32(r_max):
    """Padding edges lie at twice the cutoff."""
    r = jnp.float32(2 * r_max)
    one = jnp.float32(1.0)
    numbers = {name: jnp.asarray(value, jnp.float32) for name, value in ZBL.items()}
    frequencies = jnp.arange(1, 11, dtype=jnp.float32) * jnp.float32(np.pi / r_max)

    def cut(values, r):
        return (values * radial.polynomial_cutoff(r, r_max, 6)).sum()

    functions = {
        "zbl, light": lambda r: radial.zbl(r, (one, one), 0.62 * one, 6, numbers),
        "zbl, heavy": lambda r: radial.zbl(r, (94 * one, 94 * one), 3.74 * one, 6, numbers),
        "cutoff": lambda r: radial.polynomial_cutoff(r, r_max, 6),
        "bessel": lambda r: cut(radial.bessel(r, frequencies, one), r),
        "agnesi": lambda r: cut(radial.agnesi(r, 0.62 * one, **AGNESI), r),
        "soft": lambda r: cut(radial.soft(r, 0.62 * one, jnp.float32(4.0)), r),
    }
    for name, function in functions.items():
        value, slope = jax.value_and_grad(function)(r)
        assert value.dtype == jnp.float32, name
        assert value == 0.0, name
        assert slope == 0.0, name


# --- networks -------------------------------------------------------------------------------------


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x, weight, bias, eps):
    """torch's: the variance is the biased one, eps inside the root."""
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def randomised(module, *args, seed=0):
    """Parameters that leave no default of 0 or 1 in place."""
    rng = np.random.default_rng(seed)
    params = module.init(jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) + 0.3, params)


def test_layer_norm_is_torchs():
    x = np.random.default_rng(0).normal(size=(4, 3, 5)) * [1.0, 2.0, 3.0, 4.0, 5.0]
    for eps in (1e-5, 0.5):
        module = radial.LayerNorm(eps)
        params = randomised(module, x)
        expected = layer_norm(x, params["weight"], params["bias"], eps)
        found = module.apply({"params": params}, x)
        np.testing.assert_allclose(found, expected, rtol=CLOSED, atol=CLOSED)
    constant = module.apply({"params": params}, np.full((2, 5), 7.0))
    np.testing.assert_allclose(constant, np.tile(params["bias"], (2, 1)), rtol=CLOSED)


@pytest.mark.parametrize("widths", [(), (6,), (6, 5, 4)])
def test_the_radial_network_is_e3nns(widths):
    """silu times its second-moment constant, every matrix over the root of its fan-in."""
    x, constant = np.random.default_rng(1).normal(size=(5, 2, 4)), 1.6791
    module = radial.RadialMLP(widths, 7, constant)
    params = randomised(module, x)
    hidden, matrix = module.apply({"params": params}, x)
    expected = x
    for i in range(len(widths)):
        weight = params[f"layer{i}"]
        expected = constant * silu(expected @ weight / weight.shape[0] ** 0.5)
    weight = params[f"layer{len(widths)}"]
    expected = expected @ weight / weight.shape[0] ** 0.5
    np.testing.assert_allclose(hidden @ matrix, expected, rtol=CLOSED, atol=CLOSED)


@pytest.mark.parametrize("widths", [(6,), (6, 5, 4)])
def test_the_network_of_edges_and_elements_acts_on_their_concatenation(widths):
    rng = np.random.default_rng(2)
    basis = rng.normal(size=(5, 2, 4))
    source, target = rng.normal(size=(3, 2)), rng.normal(size=(3, 2))
    senders, receivers = rng.integers(3, size=(5, 2)), rng.integers(3, size=5)
    elements = np.eye(3)[senders], np.eye(3)[receivers]
    module = radial.EdgeMLP(widths, 7, 1e-5)
    args = basis, source, target, elements
    params = randomised(module, *args)
    hidden, matrix = module.apply({"params": params}, *args)

    of_receiver = np.broadcast_to(target[receivers][:, None], (5, 2, 2))
    x = np.concatenate([basis, source[senders], of_receiver], axis=-1)
    for i in range(len(widths)):
        x = x @ params[f"net_{3 * i}"]["weight"] + params[f"net_{3 * i}"]["bias"]
        norm = params[f"net_{3 * i + 1}"]
        x = silu(layer_norm(x, norm["weight"], norm["bias"], 1e-5))
    last = params[f"net_{3 * len(widths)}"]
    expected = x @ last["weight"] + last["bias"]
    np.testing.assert_allclose(hidden @ matrix, expected, rtol=CLOSED, atol=CLOSED)
    assert hidden.shape == (5, 2, widths[-1] + 1)
