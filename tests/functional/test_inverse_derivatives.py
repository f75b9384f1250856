"""The implicit derivative of the inverse: against dense solves, to second order, of losses of any size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from resflow_jax.functional.inverse import residual_inverse
from resflow_jax.functional.solvers import Anderson, Broyden, FixedPoint
from tests.functional.contractions import (
    check_two_orders,
    conv_net,
    dense_net,
    jacobians,
)
from tests.functional.inverses import every_solver, sine, with_status


@pytest.mark.parametrize(
    ("net", "solver"),
    [
        (partial(dense_net, 0.3), FixedPoint()),
        (partial(dense_net, 0.9), FixedPoint()),
        (partial(conv_net, 0.8), Anderson()),
        (partial(dense_net, 0.9), Anderson()),
        (partial(dense_net, 0.9), Broyden()),
    ],
    ids=["easy", "hard", "conv, anderson", "hard, anderson", "hard, broyden"],
)
def test_implicit_derivative(net, solver):
    """dx = (I + J)^-1 (dy - dg), in forward and reverse mode, in params and y, against dense solves."""
    g, params, x = net()
    y = x + g(params, x)
    rng = np.random.default_rng(3)
    dparams, dy, cotangent = (
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), tree) for tree in (params, y, x)
    )

    def inverse(params, y):
        return residual_inverse(g, params, y, solver=solver)

    @jax.jit
    def derivatives():
        _, dx = jax.jvp(inverse, (params, y), (dparams, dy))
        _, pullback = jax.vjp(inverse, params, y)
        _, dg = jax.jvp(lambda params: g(params, x), (params,), (dparams,))
        transposed_g = jax.vjp(lambda params: g(params, x), params)[1]
        matrix = jnp.eye(x[0].size)[None] + jacobians(g, params, x)
        flat = lambda a: a.reshape(len(x), -1, 1)  # noqa: E731
        dx_dense = jnp.linalg.solve(matrix, flat(dy - dg)).reshape(x.shape)
        y_bar = jnp.linalg.solve(matrix.swapaxes(1, 2), flat(cotangent)).reshape(x.shape)
        return (dx, *pullback(cotangent)), (dx_dense, *transposed_g(-y_bar), y_bar)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), *derivatives())


@every_solver
def test_derivative_is_linear(solver):
    """The derivative of s * loss is s times that of the loss, however small s: a mean over a large batch is small."""
    g, params, x = dense_net(0.9)
    y = x + g(params, x)
    gradient = jax.jit(lambda s: jax.grad(lambda y: s * jnp.sum(residual_inverse(g, params, y, solver=solver)))(y))
    for size in [1e-7, 1e-12, 1e12]:
        np.testing.assert_allclose(gradient(jnp.asarray(size)) / size, gradient(jnp.asarray(1.0)), rtol=1e-8)


@every_solver
def test_derivative_of_a_small_loss_in_float32(solver):
    """The same in float32 with its default tolerance, for the mean over a batch of 4096."""
    y = jnp.full((4096, 2), 0.1, jnp.float32)
    gradient = jax.jit(jax.grad(lambda y: jnp.mean(residual_inverse(sine, jnp.float32(1.0), y, solver=solver))))(y)
    x, _ = with_status(sine, jnp.float32(1.0), y)
    np.testing.assert_allclose(gradient * y.size, 1 / (1 + 0.9 * jnp.cos(x)), rtol=1e-4)


def test_check_grads_to_second_order():
    """jax.test_util.check_grads, order 2, forward and reverse."""
    args = jnp.asarray(0.7), jnp.array([[0.4, -0.2]])
    check_grads(
        jax.jit(partial(residual_inverse, sine, solver=Anderson())), args, order=2, modes=("fwd", "rev"), rtol=1e-4
    )


def test_two_orders():
    """Gradient and Hessian-vector product in params and y of a dense net, by plain iteration."""
    g, params, x = dense_net(0.5)
    check_two_orders(
        lambda params, y: jnp.sum(jnp.sin(3 * residual_inverse(g, params, y, solver=FixedPoint()))), params, x
    )
