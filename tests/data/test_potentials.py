"""The unnormalised densities: finite, smooth, almost all of their mass in the box, and those of their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.data.potentials import POTENTIAL_BOX, POTENTIALS, log_density


def integral(name, widen, cells=600):
    """By the midpoint rule over the box, `widen` times as wide."""
    low, high = POTENTIAL_BOX
    middles = (low + high) / 2 + widen * (high - low) * ((np.arange(cells) + 0.5) / cells - 0.5)
    points = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2)
    values = np.exp(log_density(name, jnp.asarray(points)))
    return values.sum() * (widen * (high - low) / cells) ** 2


@pytest.mark.parametrize("name", POTENTIALS)
def test_the_box_holds_the_mass(name):
    """A box half as wide again adds less than 1e-4 of the integral, which is positive and finite."""
    inside, wide = integral(name, 1), integral(name, 1.5, cells=900)
    assert 0 < inside < np.inf
    np.testing.assert_allclose(wide, inside, rtol=1e-4)


@pytest.mark.parametrize("name", POTENTIALS)
def test_values_and_gradients_are_finite(name):
    """Also at the origin, on the axes, and far away; also in float32."""
    x = jnp.asarray([[0.0, 0.0], [0.0, 3.0], [-2.0, 0.0], [50.0, -70.0]])
    for points in (x, x.astype(jnp.float32)):
        value, gradient = log_density(name, points), jax.grad(lambda x: log_density(name, x).sum())(points)
        assert value.shape == (4,) and value.dtype == points.dtype
        assert jnp.isfinite(value).all() and jnp.isfinite(gradient).all()


def test_formulas():
    """Against the head of the module, written out in NumPy; up to constants."""
    x = np.random.default_rng(0).normal(size=(20, 2), scale=2)
    x1, x2 = x.T
    modes = np.log(np.exp(-(((x1 - 2) / 0.6) ** 2) / 2) + np.exp(-(((x1 + 2) / 0.6) ** 2) / 2))
    expected = {
        "ring": -(((np.hypot(x1, x2) - 2) / 0.4) ** 2) / 2 + modes,
        "wave": -(((x2 - np.sin(np.pi * x1 / 2)) / 0.4) ** 2) / 2 - (x1 / 2) ** 2 / 2,
        "banana": -(((x2 - x1**2 / 4 + 2) / 0.5) ** 2) / 2 - (x1 / 1.5) ** 2 / 2,
    }
    assert expected.keys() == set(POTENTIALS)
    for name, values in expected.items():
        np.testing.assert_allclose(np.ptp(log_density(name, jnp.asarray(x)) - values), 0, atol=1e-9)


def test_bad_input_is_named():
    """The name and the shape."""
    with pytest.raises(ValueError, match="name: expected one of ring, wave, banana; got 'moon'"):
        log_density("moon", jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"x: expected a float array \[B, 2\], got shape \(1, 3\)"):
        log_density("ring", jnp.zeros((1, 3)))
