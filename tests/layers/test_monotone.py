"""Monotone and implicit blocks in flows: gradients of a stack, certificates, statuses, failures, files."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import resflow_jax as rf
from tests.moving import add_noise

SERIES = rf.Truncated(100, probe="orthogonal", probes=3)  # D probes give exact traces: nothing is random
X = 0.5 * jax.random.normal(jax.random.key(1), (4, 3))
C = jax.random.normal(jax.random.key(2), (4, 2))


def mlp(rngs, condition_dim=None):
    options = {"activation": "tanh", "coefficient": 0.8, "condition_dim": condition_dim}
    return rf.LipschitzMLP(3, (4,), **options, rngs=rngs)


def flow(kind):
    """A stack of two conditional blocks with an ActNorm after each."""

    def step(rngs):
        block = rf.MonotoneBlock(mlp(rngs, 2)) if kind == "monotone" else rf.ImplicitBlock(mlp(rngs), mlp(rngs, 2))
        return rf.Chain([block, rf.ActNorm((3,))])

    made = rf.Flow(rf.ResidualStack(step, 2, rngs=nnx.Rngs(0)))
    add_noise(made, 0.3)
    made.converge_norms()
    return made


def test_a_gradient_keeps_no_activations():
    """Ten blocks more keep their inputs, outputs and cotangents, and none of their 512 hidden units."""

    def temporary(depth):
        def contraction(rngs):
            return rf.LipschitzMLP(3, (512,), rngs=rngs)

        def step(rngs):
            return rf.ImplicitBlock(contraction(rngs), contraction(rngs))

        graphdef, params, rest = nnx.split(rf.Flow(rf.ResidualStack(step, depth, rngs=nnx.Rngs(0))), nnx.Param, ...)

        def loss(x):
            flow = nnx.merge(graphdef, params, rest)
            return jnp.sum(flow.log_prob(x, key=jax.random.key(0), estimator=rf.Truncated(2)))

        return jax.jit(jax.grad(loss)).lower(jnp.zeros((256, 3))).compile().memory_analysis().temp_size_in_bytes

    shallow, deep = temporary(2), temporary(12)
    assert deep - shallow < 0.2 * 10 * 256 * 512 * 8


class Scaled(nnx.Module):
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


@pytest.mark.parametrize("kind", ["monotone", "implicit"])
def test_gradients_of_a_stack(kind):
    """log p and its gradients in parameters, x and c by the Neumann series are those of `Exact`."""
    graphdef, params, rest = nnx.split(flow(kind), nnx.Param, ...)

    @partial(jax.jit, static_argnums=0)
    def value_and_gradient(estimator, params, x, c):
        def loss(params, x, c):
            found = nnx.merge(graphdef, params, rest)
            log_p = found.log_prob(x, condition=c, key=jax.random.key(0), estimator=estimator)
            return log_p @ jnp.arange(1.0, 5.0), log_p

        return jax.grad(loss, (0, 1, 2), has_aux=True)(params, x, c)

    found, expected = (value_and_gradient(estimator, params, X, C) for estimator in (SERIES, rf.Exact()))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), found, expected)


@pytest.mark.parametrize("kind", ["monotone", "implicit"])
def test_a_flow_of_these_blocks(kind, tmp_path):
    """Training's upkeep, certificate, error bounds and files work as with residual blocks."""
    made = flow(kind)
    made.initialize(X, condition=C)
    made.update_norms()
    made.tighten()
    report = rf.certify(made)
    assert report.is_certified and len(report.bounds) == made.bijector.blocks
    z, log_det, found = made.forward(X, condition=C, key=jax.random.key(0), return_diagnostics=True)
    assert found.length.shape == (made.bijector.blocks,) and np.isfinite(log_det).all()
    back, status = made.inverse(z, condition=C, return_status=True)
    np.testing.assert_allclose(back, X, atol=1e-8)
    assert status.converged.shape == report.error_bounds(status).shape == (made.bijector.blocks, 4)
    rf.save(tmp_path / "flow.safetensors", made)
    np.testing.assert_array_equal(rf.load(tmp_path / "flow.safetensors")(X, C), made(X, C))


@pytest.mark.parametrize("factor", [-0.5, 0.5])
def test_bounds_are_attained(factor):
    """For g = -x/2 Lip(f) is 1.5 / 0.5, for g = x/2 Lip(f^-1) is; a block reports both bounds."""
    block = rf.MonotoneBlock(Scaled(factor), lipschitz=0.5, event_shape=(3,))
    y, log_det = block.forward(X, estimator=rf.Exact())
    scale = (1 - factor) / (1 + factor)
    np.testing.assert_allclose(y, scale * X, rtol=1e-9)
    np.testing.assert_allclose(log_det, 3 * np.log(scale), rtol=1e-9)
    assert block.lipschitz_bounds() == (3, 3) and max(scale, 1 / scale) == 3
    assert rf.Invert(block).lipschitz_bounds() == (3, 3)


def test_the_error_bound_of_an_inverse():
    """`error_bound` of the status bounds the error in x of a solve that stops early."""
    block = rf.MonotoneBlock(Scaled(0.9), lipschitz=0.9)
    rough = rf.FixedPoint(max_iterations=3)
    x, status = block.inverse(X, solver=rough, return_status=True)
    error = jnp.linalg.norm(x - 19 * X, axis=1)
    assert np.all(error <= status.error_bound(0.9)[0] * (1 + 1e-9)) and np.all(error > 0.1 * status.error_bound(0.9)[0])


def test_a_failed_solve_of_the_map():
    """It raises in an eager call, or warns, and is NaN in a compiled one, as its gradient is. A flow warns of NaN."""
    raises, warns = (
        rf.MonotoneBlock(
            Scaled(0.9), lipschitz=0.9, solver=rf.FixedPoint(tolerance=1e-9, max_iterations=2, on_failure=what)
        )
        for what in ("raise", "warn")
    )
    with pytest.raises(rf.InverseError, match=r"MonotoneBlock: 4 of 4 examples did not converge"):
        raises.forward(X, estimator=rf.Exact())
    with pytest.warns(RuntimeWarning, match=r"MonotoneBlock: 4 of 4"):
        warns(X)
    assert np.isnan(jax.jit(lambda x: raises.forward(x, estimator=rf.Exact())[1])(X)).all()
    for block in (raises, warns):
        assert np.isnan(jax.jit(jax.grad(lambda x, block=block: jnp.sum(block(x))))(X)).all()
    with pytest.warns(RuntimeWarning, match=r"^Flow.log_prob: 4 of 4 examples are NaN$"):
        rf.Flow(raises, event_shape=X.shape[1:]).log_prob(X, estimator=rf.Exact())


def test_the_implicit_equation():
    """y + g_y(y) = x + g_x(x), and the log-det is the difference of both."""
    g_x, g_y = (mlp(nnx.Rngs(n)) for n in range(2))
    block = rf.ImplicitBlock(g_x, g_y, solver=rf.Anderson(tolerance=1e-13))
    y, log_det = block.forward(X, estimator=rf.Exact())
    np.testing.assert_allclose(y + g_y(y), X + g_x(X), atol=1e-11)
    of_x, of_y = (rf.ResidualBlock(g).forward(at, estimator=rf.Exact())[1] for g, at in ((g_x, X), (g_y, y)))
    np.testing.assert_allclose(log_det, of_x - of_y, atol=1e-11)
    assert block.g_x is g_x and block.g_y is g_y and repr(block).startswith("ImplicitBlock(LipschitzMLP(3")


def test_roulette_of_an_implicit_block():
    """`Exact` has the gradient of dense Jacobians, and the mean over keys agrees with it: |z| < 4.5."""
    graphdef, params, rest = nnx.split(rf.ImplicitBlock(mlp(nnx.Rngs(0)), mlp(nnx.Rngs(1))), nnx.Param, ...)
    params = jax.tree.map(lambda leaf: leaf.astype(X.dtype), params)

    def gradient(of, params, x, *options):
        def loss(params, x):
            y, log_det = of(nnx.merge(graphdef, params, rest), x, *options)
            return jnp.sum(jnp.sin(3 * y)) + log_det @ jnp.arange(1.0, 5.0), log_det

        return ravel_pytree(jax.grad(loss, (0, 1), has_aux=True)(params, x))[0]

    def dense(block, x):
        y = jax.lax.scan(lambda y, _: (x + block.g_x(x) - block.g_y(y), None), x, length=150)[0]
        of_x, of_y = (jax.vmap(jax.jacfwd(g))(at) for g, at in ((block.g_x, x), (block.g_y, y)))
        return y, jnp.linalg.slogdet(jnp.eye(3)[None] + of_x)[1] - jnp.linalg.slogdet(jnp.eye(3)[None] + of_y)[1]

    def estimate(block, x, key, estimator):
        return block.forward(x, key=key, estimator=estimator)

    expected = jax.jit(partial(gradient, dense))(params, X)
    exact = jax.jit(lambda: gradient(estimate, params, X, None, rf.Exact()))()
    np.testing.assert_allclose(exact, expected, rtol=1e-7, atol=1e-7)
    of_key = lambda key: gradient(estimate, params, X, key, rf.Roulette())  # noqa: E731
    draws = np.asarray(jax.jit(jax.vmap(of_key))(jax.random.split(jax.random.key(3), 1000)))
    assert np.abs((draws.mean(axis=0) - expected) / (draws.std(axis=0) / 1000**0.5 + 1e-7)).max() < 4.5
