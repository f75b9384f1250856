"""The logit at the ends of its domain: exact for every alpha, finite for values of its own inverse, NaN beyond.

It is tested in the float dtypes that users have, eagerly, and compiled with all of XLA's optimisations, which combine
constants that the formula keeps separate.
"""

from functools import cache

import jax
import numpy as np
import pytest

import resflow_jax as rf
from resflow_jax.layers.logit import Logit, logit_domain

ALPHAS = {"float32": (1e-37, 1e-12, 1e-7, 1e-6, 0.05, 0.4999), "float64": (1e-300, 1e-6, 0.05)}
CASES = [(dtype, alpha) for dtype, alphas in ALPHAS.items() for alpha in alphas]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]:g}")
def layer_and_dtype(request):
    dtype, alpha = request.param
    optimizes = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    with jax.enable_x64(dtype == "float64"):
        yield Logit(alpha), np.dtype(dtype)
    jax.config.update("jax_disable_most_optimizations", optimizes)


def parts(layer):
    """y, the log-det of one value, and the derivatives of both, of values [N]."""

    def of_values(x):
        def one(x):
            y, log_det = layer.forward(x[None, None], estimator=rf.Exact())
            return y[0, 0], log_det[0]

        return jax.vmap(one)(x), jax.vmap(jax.jacrev(one))(x)

    return of_values


@cache
def compiled_parts(alpha, dtype):
    return jax.jit(parts(Logit(alpha)))


def parts_of(layer, x, compiled):
    """`parts` of at most 800 values, repeated to 800, so that one program serves them all."""
    function = compiled_parts(layer.alpha, x.dtype) if compiled else parts(layer)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(x)], function(np.resize(x, 800)))


def inverse(layer):
    return lambda y: layer.inverse(y)


def between_the_ends(dtype):
    """[0, 1] with its ends and the numbers next to them."""
    zero, one = dtype.type(0), dtype.type(1)
    low = [zero, np.finfo(dtype).tiny, np.finfo(dtype).eps, dtype.type(1e-3)]
    high = [one, np.nextafter(one, zero), 1 - 3 * np.finfo(dtype).eps, dtype.type(0.999)]
    return np.concatenate([low, np.linspace(0.01, 0.99, 41), high]).astype(dtype)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_values_between_the_ends(layer_and_dtype, compiled):
    """y = log s - log(1 - s), log dy/dx and d log(dy/dx)/dx to rounding, s and 1 - s each from its own end."""
    layer, dtype = layer_and_dtype
    x = between_the_ends(dtype)
    (y, log_det), (slope, log_det_slope) = parts_of(layer, x, compiled)
    assert y.dtype == log_det.dtype == dtype
    wide = np.longdouble(x)
    scale = 1 - 2 * np.longdouble(layer.alpha)
    s, rest = layer.alpha + scale * wide, layer.alpha + scale * (1 - wide)
    rounding = 8 * np.finfo(dtype).eps
    size = 1 + np.abs(np.log(s)) + np.abs(np.log(rest))
    assert (np.abs(y - (np.log(s) - np.log(rest))) <= rounding * size).all()
    assert (np.abs(log_det - (np.log(scale) - np.log(s) - np.log(rest))) <= rounding * (size - np.log(scale))).all()
    expected = scale / s + scale / rest
    fits = expected < np.finfo(dtype).max
    np.testing.assert_allclose(slope[fits], expected[fits].astype(float), rtol=rounding)
    terms = scale / rest, scale / s
    error = np.abs(log_det_slope - (terms[0] - terms[1]))[fits]
    assert (error <= rounding * (terms[0] + terms[1])[fits]).all()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_what_the_inverse_returns_is_in_the_domain(layer_and_dtype, compiled):
    """Also where a sigmoid is 0 or 1: finite in value and in both derivatives; y comes back where x tells it."""
    layer, dtype = layer_and_dtype
    y = np.concatenate([-np.geomspace(1e30, 1e-3, 400), np.geomspace(1e-3, 1e30, 400)]).astype(dtype)
    wrap = jax.jit if compiled else lambda function: function
    x = np.asarray(wrap(inverse(layer))(y))
    low, high = logit_domain(layer.alpha, dtype)
    assert low <= x.min() and x.max() <= high and x.dtype == dtype
    found = parts_of(layer, x, compiled)
    together = wrap(lambda y: parts(layer)(inverse(layer)(y)))(y)
    for leaf in jax.tree.leaves((found, together)):
        assert np.isfinite(leaf).all()
    again = np.asarray(found[0][0])
    assert (np.diff(again) >= -1e-3).all() and again[0] < 0 < again[-1]
    delta = layer.alpha / (1 - 2 * layer.alpha)
    told = (x > -0.9 * delta) & (x < min(0.999, 1 + 0.9 * delta)) & (np.abs(y) < 1e4)
    s = 1 / (1 + np.exp(-y[told].astype(float)))
    # A rounding of x is one of s by eps * (s + alpha).
    tolerance = 16 * np.finfo(dtype).eps * (1 + layer.alpha / s) / (1 - s) + 1e-6 * np.abs(y[told])
    assert (np.abs(again[told] - y[told]) <= tolerance).all()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_every_number_near_the_ends_of_the_domain(layer_and_dtype, compiled):
    """The ends of `logit_domain` are finite, y never falls as x rises, and what is clearly beyond them is NaN."""
    layer, dtype = layer_and_dtype
    low, high = (dtype.type(end) for end in logit_domain(layer.alpha, dtype))
    inside = np.sort(np.asarray([low, *neighbours(low, 0), *neighbours(high, 0), high], dtype))
    (y, log_det), _ = parts_of(layer, inside, compiled)
    assert np.isfinite(y).all() and np.isfinite(log_det).all() and (np.diff(y) >= 0).all()
    width = max(high - 1, 100 * np.finfo(dtype).eps)
    outside = np.asarray([2 * low - 1e-3, 1 + 2 * width, -1, 5 + 5 * high, 255, -np.inf, np.inf, np.nan], dtype)
    outside = outside[(outside < 2 * low) | (outside > 1 + 1.5 * width) | np.isnan(outside)]
    (y, log_det), _ = parts_of(layer, outside, compiled)
    assert len(outside) > 5 and np.isnan(y).all() and np.isnan(log_det).all()


def neighbours(start, towards, number=60):
    found = [start]
    for _ in range(number):
        found.append(np.nextafter(found[-1], start.dtype.type(towards)))
    return found[1:]


@pytest.mark.parametrize(("dtype", "alpha"), [("float32", 1e-38), ("float32", 1e-45), ("float64", 1e-310)])
def test_alpha_that_the_dtype_does_not_hold(dtype, alpha):
    """Below the smallest normal number it would be flushed to zero: refused by name, also by a flow."""
    with jax.enable_x64(dtype == "float64"):
        message = f"alpha: expected a number that {dtype} holds, at least .*, got {alpha}"
        with pytest.raises(ValueError, match=message):
            Logit(alpha)
    Logit(float(np.finfo(dtype).tiny))
