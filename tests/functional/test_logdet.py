"""log|det(I + J)|: exact against dense linear algebra; gradients of all estimators; what `residual` refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from resflow_jax.functional.estimators import Exact, Roulette, Truncated
from resflow_jax.functional.length_laws import Geometric, Poisson
from resflow_jax.functional.logdet import residual
from tests.functional.contractions import (
    check_two_orders,
    dense_net,
)
from tests.functional.estimates import (
    GRADIENTS,
    NETS,
    SAFE,
    dense_jacobians,
    estimate,
    exact,
    loss_of,
    net_named,
)


def test_the_nets_are_contractions():
    """|J|_2 < 1 for every example, and near 0.8 for "saturated": there the high orders of the series count."""
    for name in NETS:
        params = net_named(name)[1]
        norms = np.linalg.norm(dense_jacobians(name), 2, axis=(1, 2))
        assert norms.max() <= params["out"][-1] < 1
        assert name != "saturated" or norms.max() > 0.79


def test_the_nonsymmetric_net_is_not_easy():
    """|J - J^T| > |J| / 2, |J| is about 0.7, and all eigenvalues differ, so polynomials of J need eight products."""
    for j in dense_jacobians("nonsymmetric"):
        norm, eigenvalues = np.linalg.norm(j, 2), np.linalg.eigvals(j)
        assert 0.6 < norm < 0.75
        assert np.linalg.norm(j - j.T, 2) > norm / 2
        distances = np.abs(eigenvalues[:, None] - eigenvalues) + np.eye(8)
        assert distances.min() > 1e-2


# Exact


@pytest.mark.parametrize(
    ("name", "chunk_size"), [("saturated", 64), ("near one", 3), ("conv", 64), ("conv near one", 3)]
)
def test_exact_is_slogdet(name, chunk_size):
    """Exact = numpy's slogdet of the dense Jacobian to 1e-10, in chunks of any size; y = x + g(x)."""
    g, params, x = net_named(name)
    y, log_det = jax.jit(lambda p, x: residual(g, p, x, estimator=Exact(chunk_size)))(params, x)
    sign, expected = np.linalg.slogdet(np.eye(x[0].size) + dense_jacobians(name))
    assert np.all(sign == 1)
    np.testing.assert_allclose(log_det, expected, rtol=1e-10)
    np.testing.assert_allclose(y, x + g(params, x), rtol=1e-14)


@pytest.mark.parametrize("name", ["near one", "conv near one"])
def test_exact_gradient(name):
    """Its gradient = autodiff through the dense slogdet to 1e-9 = finite differences to 1e-7."""
    g, params, x = net_named(name)
    result = jax.jit(lambda: estimate(net_named(name), Exact(), None))()
    np.testing.assert_allclose(result, exact(name), rtol=1e-9, atol=1e-9)

    flat, unravel = ravel_pytree((params, x))
    direction = np.random.default_rng(1).normal(size=flat.shape)

    @jax.jit
    def loss(flat):
        params, x = unravel(flat)
        y, log_det = residual(g, params, x, estimator=Exact())
        return loss_of(g, params, x, log_det, y)

    near, far = (loss(flat + h * direction) - loss(flat - h * direction) for h in (1e-5, 2e-5))
    slope = (8 * near - far) / 12e-5  # fourth order: near saturation the third derivative is large
    np.testing.assert_allclose(jnp.vdot(result[len(x) :], direction), slope, rtol=1e-7)


# The two gradients, special cases


@pytest.mark.parametrize(
    "options",
    [
        {"length": Poisson(2.0), "exact_terms": 2, "minres_steps": 0, "samples": 3, "probe": "gaussian"},
        {"length": SAFE, "minres_steps": 2, "probe": "orthogonal", "probes": 3},
        {"terms": 7, "probes": 2},
    ],
    ids=str,
)
def test_both_gradients_share_their_value(options):
    """For one key "neumann" and "autodiff" draw the same and give the same y and log_det, to 1e-12."""
    kind = Truncated if "terms" in options else Roulette
    g, params, x = net_named("saturated")

    @jax.jit
    @jax.vmap
    def values(key):
        return [residual(g, params, x, key=key, estimator=kind(**options, gradient=gradient)) for gradient in GRADIENTS]

    neumann, autodiff = values(jax.random.split(jax.random.key(0), 50))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), neumann, autodiff)
    assert neumann[1].std() > 0.01


@pytest.mark.parametrize(
    "estimator",
    [
        Exact(),
        Roulette(Geometric(0.5), 2, minres_steps=0, gradient="autodiff"),
        Roulette(Geometric(0.5), 0, minres_steps=2, gradient="autodiff"),
    ],
    ids=str,
)
def test_two_orders(estimator):
    """Exact, and the "autodiff" estimate for one key, have the derivatives of their own value, to second order."""
    g, params, x = net_named("moderate")

    def loss(params, x):
        y, log_det = residual(g, params, x, key=jax.random.key(3), estimator=estimator)
        return loss_of(g, params, x, log_det, y)

    check_two_orders(loss, params, x)


def test_default_estimator_and_rank_one_input():
    """Without an estimator it is Roulette(); x may be [B], one number an example, where Truncated has no noise."""
    g, params, x = net_named("saturated")
    key = jax.random.key(0)
    default, explicit = residual(g, params, x, key=key), residual(g, params, x, key=key, estimator=Roulette())
    np.testing.assert_array_equal(default[1], explicit[1])
    x = jnp.linspace(-1, 1, 5)
    _, log_det = residual(lambda p, x: p * jnp.sin(x), jnp.asarray(0.5), x, key=key, estimator=Truncated(60))
    np.testing.assert_allclose(log_det, jnp.log1p(0.5 * jnp.cos(x)), rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "gradient"), [(jnp.float32, "neumann"), (jnp.float32, "autodiff"), (jnp.float64, "autodiff")]
)
def test_a_series_that_has_ended_goes_on(dtype, gradient):
    """Long after the last of four eigenvalues the estimate is v^T log(I + J) v, and its gradient is finite.

    With four orthogonal probes value and gradient are the exact ones: 1e-9, 1e-3 in float32.
    """
    estimator = Roulette(exact_terms=60, probe="orthogonal", probes=4, gradient=gradient)
    net = dense_net(0.8, dtype=dtype)
    result = jax.jit(lambda key: estimate(net, estimator, key))(jax.random.key(1))
    tolerance = 1e-9 if dtype == jnp.float64 else 1e-3
    np.testing.assert_allclose(result, exact("saturated"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_zero_residual(gradient):
    """g = 0 has log_det = 0 without noise, and the gradient of log_det = D log(1 + p) in p is exactly D."""

    def log_det(p):
        x, key, estimator = jnp.ones((3, 5)), jax.random.key(0), Roulette(exact_terms=30, gradient=gradient)
        return residual(lambda p, x: p * x, p, x, key=key, estimator=estimator)[1]

    value, gradient = jax.jit(lambda p: (log_det(p), jax.grad(lambda p: log_det(p).sum())(p)))(jnp.asarray(0.0))
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_allclose(gradient, 15, rtol=1e-12)


# As many orthogonal probes as dimensions


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("moderate", Roulette(exact_terms=50, minres_steps=0, probe="orthogonal", probes=4)),
        ("nonsymmetric", Roulette(exact_terms=50, probe="orthogonal", probes=8)),
        ("nonsymmetric", Roulette(exact_terms=80, minres_steps=3, probe="orthogonal", probes=8)),
    ],
    ids=str,
)
def test_the_exact_trace(name, estimator):
    """With enough terms D orthogonal probes give the dense value and gradient for every key, to 1e-9."""
    keys = jax.random.split(jax.random.key(0), 3)
    results = jax.jit(jax.vmap(lambda key: estimate(net_named(name), estimator, key)))(keys)
    np.testing.assert_allclose(results, np.tile(exact(name), (3, 1)), rtol=1e-9, atol=1e-9)


def _double(params, x):
    return 0.5 * x


@pytest.mark.parametrize(
    ("name", "g", "x", "options"),
    [
        ("key", _double, jnp.ones, {"estimator": Roulette()}),
        ("key", _double, jnp.ones, {"estimator": Truncated(2)}),
        ("key", _double, jnp.ones, {}),
        ("estimator", _double, jnp.ones, {"estimator": "exact"}),
        ("lipschitz", _double, jnp.ones, {"estimator": Exact(), "lipschitz": 1.0}),
        ("g", lambda p, x: x[:, :1], jnp.ones, {"estimator": Exact()}),
        ("g", lambda p, x: x.astype(jnp.float32), jnp.ones, {"estimator": Exact()}),
        ("x", _double, lambda shape: jnp.ones(shape, int), {"estimator": Exact()}),
        ("x", _double, lambda shape: jnp.ones(()), {"estimator": Exact()}),
        ("x", _double, lambda shape: [[0.0, 1.0]], {"estimator": Exact()}),
    ],
)
def test_bad_arguments(name, g, x, options):
    """The error of `residual` names the argument that is missing or wrong."""
    with pytest.raises(ValueError, match=f"^{name}: .*expected"):
        residual(g, None, x((2, 3)), **options)
