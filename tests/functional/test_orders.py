"""Orders of norms: parsed from what a user writes, and learnable."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional import orders as orders_module
from resflow_jax.functional.orders import parse_norms

learnable_order = jax.jit(orders_module.learnable_order)
slopes_of = jax.jit(jax.vmap(jax.grad(orders_module.learnable_order)))


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ("222f", (2.0, 2.0, 2.0, math.inf)),
        ("1f", (1.0, math.inf)),
        ((2, 2.5, 2), (2.0, 2.5, 2.0)),
        ([1.0, np.inf], (1.0, math.inf)),
    ],
)
def test_parse_norms(norms, expected):
    orders = parse_norms(norms)
    assert orders == expected and all(type(order) is float for order in orders)
    assert parse_norms(norms, layers=len(expected) - 1) == expected


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ("2x2", "norms: expected digits from 1 to 9 and 'f' .*got 'x' in '2x2'"),
        ("20", "norms: expected digits from 1 to 9 and 'f' .*got '0' in '20'"),
        ("2 2", "norms: expected digits"),
        ("2", "norms: .* at least 2, got 1"),
        ("", "norms: .* at least 2, got 0"),
        ((2, 0.5), r"norms\[1\]: expected an order of at least 1 .*got 0.5"),
        ((math.nan, 2), r"norms\[0\]: expected an order"),
        ((2, "f"), r"norms\[1\]: expected an order"),
        (2.0, "norms: expected a string such as '222f' or a sequence of numbers, got 2.0"),
        (None, "norms: expected a string"),
    ],
)
def test_bad_norms(norms, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_norms(norms)


def test_number_of_orders():
    with pytest.raises(ValueError, match=r"^norms: expected 4 orders for 3 layers, got 3 in '222'"):
        parse_norms("222", layers=3)


def test_learnable_order():
    """3 - 2 tanh(h(atanh(1/2) - r)): 2 at zero, increasing from 1 to 5, with the values written out by hand."""
    np.testing.assert_allclose(learnable_order(jnp.asarray(0.0)), 2, rtol=1e-7)
    raw = np.linspace(-3, 8, 200)
    orders = learnable_order(jnp.asarray(raw))
    assert np.all(np.diff(orders) > 0)
    for r, p in zip(raw, orders, strict=True):
        t = 0.5493061829986572 - r
        h = t if t > 0 else 0.3 * t + 0.7 * math.expm1(t)
        np.testing.assert_allclose(p, 3 - 2 * math.tanh(h), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_learnable_order_stays_inside(dtype):
    """Never 1 or 5, whose dual orders would be infinite or arbitrary; a parameter there can come back."""
    raw = jnp.asarray([-1e4, -30, -5, 12, 100, 1e4], dtype)
    orders = learnable_order(raw)
    assert orders.dtype == dtype and np.all(orders >= 1.0009) and np.all(orders <= 4.9991)
    slopes = slopes_of(raw)
    assert np.all(np.isfinite(slopes)) and slopes[2] > 0 and slopes[3] > 0


def test_slope_of_the_learnable_order():
    raw, h = jnp.asarray([-1.0, 0.0, 0.5, 0.6, 2.0]), 1e-6
    expected = (learnable_order(raw + h) - learnable_order(raw - h)) / (2 * h)
    np.testing.assert_allclose(slopes_of(raw), expected, rtol=1e-7)
