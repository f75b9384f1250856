"""Activations: their Lipschitz constants are true, attained, and their kinks are where they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.activations import ACTIVATIONS, get_activation, lipschitz_cube, lipswish
from tests.functional.contractions import quick_jit

GRID = jnp.linspace(-60.0, 60.0, 240_001)


def derivative(function, x=GRID):
    return quick_jit(jax.vmap(jax.grad(function)))(x)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_lipschitz_constant_is_the_largest_slope(name):
    """max |phi'| = the stated constant <= 1, attained to 1e-3."""
    activation = get_activation(name)
    params = {key: jnp.asarray(value) for key, value in activation.initial}
    slope = jnp.max(jnp.abs(derivative(lambda x: activation(params, x))))
    assert slope <= activation.lipschitz * (1 + 1e-14) <= 1 + 1e-14
    assert slope >= activation.lipschitz - 1e-3


@pytest.mark.parametrize("beta", [-2.0, -0.5, 0.0, 0.5, 1.0, 5.0])
def test_lipswish_constant_does_not_depend_on_beta(beta):
    """sup |d lipswish / dx| is the same number for every beta, the maximum to ten digits."""
    bound = ACTIVATIONS["lipswish"].lipschitz
    scaled = jnp.linspace(2.3, 2.5, 20_001) / jax.nn.softplus(beta)  # the peak is at 2.3994 / softplus(beta)
    for grid in (GRID, scaled):
        assert jnp.max(jnp.abs(derivative(lambda x: lipswish(x, beta), grid))) <= bound * (1 + 1e-14)
    np.testing.assert_allclose(jnp.max(derivative(lambda x: lipswish(x, beta), scaled)), bound, rtol=1e-9)


def test_lipswish_formula():
    """lipswish(x) = x * sigmoid(softplus(beta) * x) / 1.1, here written with exponentials."""
    x, beta = np.linspace(-5, 5, 101), 0.7
    expected = x / (1 + np.exp(-np.log1p(np.exp(beta)) * x)) / 1.1
    np.testing.assert_allclose(lipswish(jnp.asarray(x), beta), expected, rtol=1e-13)


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"relu"}))
def test_continuously_differentiable(name):
    """phi' moves by at most 2 h over a step h (|phi''| <= 2 for all of them): no jump anywhere."""
    activation = get_activation(name)
    params = {key: jnp.asarray(value) for key, value in activation.initial}
    jumps = jnp.abs(jnp.diff(derivative(lambda x: activation(params, x))))
    assert jnp.max(jumps) <= 2.01 * (GRID[1] - GRID[0])


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_lipschitz_cube_at_its_joint(sign):
    """x^3/3 and x - sign(x) 2/3 meet at +-1 with one value and one slope."""
    x = sign * jnp.array([1 - 1e-9, 1.0, 1 + 1e-9])
    np.testing.assert_allclose(lipschitz_cube(x), sign / 3, atol=2e-9)
    np.testing.assert_allclose(derivative(lipschitz_cube, x), 1.0, atol=3e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float32_and_large_inputs(name):
    """The dtype is kept, and values and slopes stay finite far out."""
    activation = get_activation(name)
    params = {key: jnp.asarray(value, jnp.float32) for key, value in activation.initial}
    x = jnp.array([-1e6, -100.0, 0.0, 100.0, 1e6], jnp.float32)
    y, slope = activation(params, x), derivative(lambda x: activation(params, x), x)
    assert y.dtype == slope.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(y)) and jnp.all(jnp.isfinite(slope))


def test_unknown_name():
    """The error names what was asked for and what exists."""
    with pytest.raises(ValueError, match=r"activation: .*elu.*got 'swishh'"):
        get_activation("swishh")
