"""Second derivatives of estimates: unbiased where they exist; where they do not, an error names the remedy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.estimators import Exact, Roulette, Truncated
from resflow_jax.functional.length_laws import Geometric, Poisson
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.primitives.derivatives import forward_only, reverse_only
from tests.functional.contractions import z_scores
from tests.functional.estimates import of_keys

NEUMANN = {
    "default": Roulette(),
    "papers": Roulette(Poisson(2.0), exact_terms=2, minres_steps=0),
    "truncated": Truncated(3),
}
DIM = 2


def net(params, x):
    return 0.8 * jnp.tanh(x @ params)


def problem(dim=DIM, batch=2, dtype=jnp.float64):
    rng = np.random.default_rng(dim)
    params, direction = (jnp.asarray(rng.normal(size=(dim, dim)), dtype) for _ in range(2))
    params = 0.9 * params / jnp.linalg.norm(params, 2)
    return params, direction, jnp.asarray(rng.normal(size=(batch, dim)), dtype)


def log_det(estimator, params, x, key):
    return jnp.sum(residual(net, params, x, key=key, estimator=estimator)[1])


@partial(jax.jit, static_argnums=0)
def hessian_vector(estimator, params, direction, x, key, along_x=1.0):
    """Forward over reverse, in params and x."""
    gradient = jax.grad(log_det, (1, 2))
    tangents = direction, jnp.full_like(x, along_x)
    return jax.jvp(lambda p, x: gradient(estimator, p, x, key), (params, x), tangents)[1]


@pytest.mark.parametrize("name", ["default", "papers"])
def test_forward_over_reverse_is_unbiased(name):
    """The mean over keys of a Hessian-vector product is that of the exact log-det, |z| < 4.5."""
    params, direction, x = problem()
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = of_keys(lambda key: hessian_vector(NEUMANN[name], params, direction, x, key))
    expected = hessian_vector(Exact(), params, direction, x, None)
    for found, truth in zip(draw(keys), expected, strict=True):
        assert np.abs(z_scores(found, truth)).max() < 4.5
        assert np.std(found, axis=0).max() > 1e-3


def test_forward_over_reverse_is_the_derivative_of_the_gradient():
    """For a fixed key it is the limit of differences of the gradient, in chunks too."""
    params, direction, x = problem()

    def gradient(params, x):
        loss = lambda p, x: jnp.sum(residual(net, p, x, key=jax.random.key(3), chunk_size=1)[1])  # noqa: E731
        return jax.grad(loss, (0, 1))(params, x)

    step = 1e-6
    forward = jax.jit(lambda p, x: jax.jvp(gradient, (p, x), (direction, jnp.ones_like(x)))[1])(params, x)
    of_point = jax.jit(gradient)
    ends = [of_point(params + s * direction, x + s) for s in (step, -step)]
    for found, high, low in zip(forward, *ends, strict=True):
        np.testing.assert_allclose(found, (high - low) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NEUMANN)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_what_cannot_work_raises(name, wrap):
    """jvp, and grad of grad, say what to use in their place."""
    params, direction, x = problem()
    key = jax.random.key(0)

    def loss(params):
        y, log_det = residual(net, params, x, key=key, estimator=NEUMANN[name])
        return jnp.sum(log_det) + jnp.sum(y)

    remedy = r'^estimator: .*Exact\(\).*gradient="autodiff"'
    with pytest.raises(TypeError, match=remedy):
        wrap(lambda p: jax.jvp(loss, (p,), (direction,))[1])(params)
    with pytest.raises(TypeError, match=remedy):
        wrap(jax.jacfwd(loss))(params)
    with pytest.raises(ValueError, match=remedy):
        wrap(jax.grad(lambda p: jnp.sum(jax.grad(loss)(p) ** 2)))(params)


@pytest.mark.parametrize(("dim", "dtype"), [(2, jnp.float32), (1, jnp.float64)], ids=str)
def test_second_derivatives_after_the_residual_has_vanished(dim, dtype):
    """In D dimensions minimal residuals end after D steps; what follows is rounding, whose derivatives stay small.

    The length is fixed at 6 terms, so that the value is exact up to the noise of the probes, which is zero in one
    dimension.
    """
    params, direction, x = problem(dim, dtype=dtype)
    estimator = Roulette(Geometric(0.9), exact_terms=6, probe="orthogonal", probes=dim, gradient="autodiff")
    key, tolerance = jax.random.key(1), 2e-3 if dtype == jnp.float32 else 1e-5
    expected = hessian_vector(Exact(), params, direction, x, None, along_x=1.0)
    forward = hessian_vector(estimator, params, direction, x, key)
    for found, truth in zip(forward, expected, strict=True):
        np.testing.assert_allclose(found, truth, rtol=tolerance, atol=tolerance)
    reverse = jax.jit(jax.grad(lambda p: jnp.vdot(jax.grad(log_det, 1)(estimator, p, x, key), direction)))(params)
    of_params = hessian_vector(Exact(), params, direction, x, None, along_x=0.0)[0]
    np.testing.assert_allclose(reverse, of_params, rtol=tolerance, atol=tolerance)


def test_guards():
    """A token is 0 and lets reverse mode pass; a mark is the identity and lets forward mode pass."""
    x = jnp.arange(3.0)
    guarded = lambda x: jnp.sum(x**2) + reverse_only({"x": x, "n": jnp.arange(2)}).astype(x.dtype)  # noqa: E731
    for wrap in (lambda f: f, jax.jit, lambda f: jax.jit(jax.vmap(f, axis_size=2, in_axes=None))):
        np.testing.assert_array_equal(wrap(guarded)(x), np.full_like(wrap(guarded)(x), 5))
        gradient = np.asarray(wrap(jax.grad(guarded))(x))
        np.testing.assert_array_equal(gradient, np.broadcast_to(2 * x, gradient.shape))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(guarded, (x,), (x,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(jax.jacfwd(guarded))(x)
    np.testing.assert_array_equal(jax.jit(jax.vmap(forward_only))(x), x)
    assert forward_only({"n": jnp.arange(2)})["n"].dtype == jnp.arange(2).dtype
    np.testing.assert_array_equal(jax.jvp(lambda x: forward_only(x) ** 2, (x,), (x,))[1], 2 * x * x)
    with pytest.raises(ValueError, match="reverse-mode"):
        jax.grad(lambda x: jnp.sum(forward_only(x)))(x)
