"""The inverse of y = x + g(x): right, per example, honest about its status, with the implicit derivative."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from resflow_jax.functional.fixed_point import FixedPoint, residual_inverse

from tests.functional.contractions import check_two_orders, conv_net, dense_net, jacobians, quick_jit

IDS = ["easy", "hard", "conv"]
with_status = partial(residual_inverse, return_status=True)


def sine(params, x):
    """An elementwise contraction, also in the maximum norm, of Lipschitz constant 0.9."""
    return 0.9 * jnp.sin(params * x)


@pytest.mark.parametrize("net", [partial(dense_net, 0.3), partial(dense_net, 0.9), partial(conv_net, 0.9)], ids=IDS)
def test_round_trip(net):
    """inverse(x + g(x)) = x to 1e-10, converged, in as many iterations as L^n = tolerance needs."""
    g, params, x = net()
    inverse, status = quick_jit(lambda p, y: with_status(g, p, y))(params, x + g(params, x))
    np.testing.assert_allclose(inverse, x, atol=1e-10)
    assert jnp.all(status.converged)
    assert status.iterations.shape == status.residual.shape == status.converged.shape == (len(x),)
    assert jnp.all(status.iterations <= 2 + np.log(1e-12) / np.log(params["out"][1]))


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-9])
def test_the_iterates(tolerance):
    """x_n, the iteration count and the last step of every example are those of a Python loop, x <- y - g(x)."""
    y = np.array([[0.0, 0.0], [0.3, -0.2], [50.0, 1.0], [-1.0, 0.7]])
    x, status = with_status(sine, jnp.asarray(1.0), jnp.asarray(y), solver=FixedPoint(tolerance))
    for n in range(len(y)):
        expected, count, change = y[n], 0, np.inf
        while change > tolerance * max(1, np.abs(y[n]).max(), np.abs(expected).max()):
            step = y[n] - 0.9 * np.sin(expected) - expected
            expected, count, change = expected + step, count + 1, np.abs(step).max()
        np.testing.assert_allclose(x[n], expected, atol=1e-13)
        assert status.iterations[n] == count
        np.testing.assert_allclose(status.residual[n], change, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-10])
def test_the_residual_is_within_tolerance(tolerance):
    """max |y - g(x) - x| <= tolerance max(1, |x|, |y|) at the x returned, not its square root."""
    y = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)))
    x, status = with_status(sine, jnp.asarray(1.0), y, solver=FixedPoint(tolerance))
    scale = jnp.maximum(1, jnp.maximum(jnp.abs(x).max(axis=1), jnp.abs(y).max(axis=1)))
    residual = jnp.abs(y - sine(1.0, x) - x).max(axis=1)
    assert jnp.all(residual <= tolerance * scale)
    assert jnp.all(residual <= status.residual) and jnp.all(status.residual <= tolerance * scale)
    assert jnp.all(status.converged)


def test_every_example_stops_by_itself():
    """An easy and a hard example take different numbers of iterations, each exactly what it gets alone."""
    y = jnp.array([[0.0, 0.0], [2.5, 2.0], [0.3, 0.2]])
    solve = quick_jit(lambda y: with_status(sine, jnp.asarray(1.0), y))
    x, status = solve(y)
    assert status.iterations[0] == 1 and jnp.max(status.iterations) > 50
    for n in range(3):
        x_alone, alone = solve(y[n : n + 1])
        np.testing.assert_array_equal(x_alone[0], x[n])
        jax.tree.map(lambda a, b, n=n: np.testing.assert_array_equal(a[0], b[n]), alone, status)


def test_a_bad_example_spoils_no_other():
    """An example of NaN is reported as not converged; its neighbours are as they were."""
    y = jnp.array([[0.3, 0.2], [jnp.nan, 0.0]])
    x, status = with_status(sine, jnp.asarray(1.0), y)
    expected, _ = with_status(sine, jnp.asarray(1.0), y[:1])
    np.testing.assert_array_equal(status.converged, [True, False])
    np.testing.assert_array_equal(x[:1], expected)


# Status and warnings


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_too_few_iterations_warn(wrap):
    """At the cap: a RuntimeWarning that counts the examples, and with return_status the status and no warning."""
    y = jnp.array([[0.0, 0.0], [0.3, 0.2]])
    y = y[None] if wrap is jax.vmap else y
    options = {"solver": FixedPoint(max_iterations=5)}
    with pytest.warns(RuntimeWarning, match="residual_inverse: 1 of 2 examples did not converge"):
        jax.block_until_ready(wrap(lambda y: residual_inverse(sine, jnp.asarray(1.0), y, **options))(y))
        jax.effects_barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, status = wrap(lambda y: with_status(sine, jnp.asarray(1.0), y, **options))(y)
        jax.effects_barrier()
    np.testing.assert_array_equal(status.converged.ravel(), [True, False])
    np.testing.assert_array_equal(status.iterations.ravel(), [1, 5])
    assert status.residual.ravel()[1] > 1e-3


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_unconverged_derivative_warns(mode):
    """The linear solve of the derivative reports as well: y = 0 has x = 0 at once, where J = 0.9 I is hardest."""
    y, solver = jnp.zeros((2, 3)), FixedPoint(max_iterations=5)

    def inverse(y):
        return residual_inverse(sine, jnp.asarray(1.0), y, solver=solver)

    with pytest.warns(RuntimeWarning, match="derivative of the inverse: 2 of 2 examples"):
        if mode == "forward":
            jax.block_until_ready(jax.jit(lambda y: jax.jvp(inverse, (y,), (y + 1,)))(y))
        else:
            jax.block_until_ready(jax.jit(jax.grad(lambda y: jnp.sum(inverse(y))))(y))
        jax.effects_barrier()


# Derivatives


@pytest.mark.parametrize("net", [partial(dense_net, 0.3), partial(dense_net, 0.9), partial(conv_net, 0.8)], ids=IDS)
def test_implicit_derivative(net):
    """dx = (I + J)^-1 (dy - dg), in forward and reverse mode, in params and y, against dense solves."""
    g, params, x = net()
    y = x + g(params, x)
    rng = np.random.default_rng(3)
    dparams, dy, cotangent = (
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), tree) for tree in (params, y, x)
    )

    def inverse(params, y):
        return residual_inverse(g, params, y)

    @quick_jit
    def derivatives():
        _, dx = jax.jvp(inverse, (params, y), (dparams, dy))
        _, pullback = jax.vjp(inverse, params, y)
        _, dg = jax.jvp(lambda params: g(params, x), (params,), (dparams,))
        transposed_g = jax.vjp(lambda params: g(params, x), params)[1]
        matrix = jnp.eye(x[0].size) + jacobians(g, params, x)
        flat = lambda a: a.reshape(len(x), -1, 1)  # noqa: E731
        dx_dense = jnp.linalg.solve(matrix, flat(dy - dg)).reshape(x.shape)
        y_bar = jnp.linalg.solve(matrix.swapaxes(1, 2), flat(cotangent)).reshape(x.shape)
        return (dx, *pullback(cotangent)), (dx_dense, *transposed_g(-y_bar), y_bar)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), *derivatives())


@pytest.mark.parametrize("size", [1.0, 1e-7, 1e-12, 1e12])
def test_derivative_is_linear(size):
    """The derivative of s * loss is s times that of the loss, however small s: a mean over a large batch is small."""
    g, params, x = dense_net(0.9)
    y = x + g(params, x)
    gradient = quick_jit(lambda s: jax.grad(lambda y: s * jnp.sum(residual_inverse(g, params, y)))(y))
    np.testing.assert_allclose(gradient(jnp.asarray(size)) / size, gradient(jnp.asarray(1.0)), rtol=1e-8)


def test_derivative_of_a_small_loss_in_float32():
    """The same in float32 with its default tolerance, for the mean over a batch of 4096."""
    y = jnp.full((4096, 2), 0.1, jnp.float32)
    gradient = quick_jit(jax.grad(lambda y: jnp.mean(residual_inverse(sine, jnp.float32(1.0), y))))(y)
    x, _ = with_status(sine, jnp.float32(1.0), y)
    np.testing.assert_allclose(gradient * y.size, 1 / (1 + 0.9 * jnp.cos(x)), rtol=1e-4)


def test_check_grads_to_second_order():
    """jax.test_util.check_grads, order 2, forward and reverse."""
    args = jnp.asarray(0.7), jnp.array([[0.4, -0.2]])
    check_grads(jax.jit(partial(residual_inverse, sine)), args, order=2, modes=("fwd", "rev"), rtol=1e-4)


def test_two_orders():
    """Gradient and Hessian-vector product in params and y of a dense net."""
    g, params, x = dense_net(0.5)
    check_two_orders(lambda params, y: jnp.sum(jnp.sin(3 * residual_inverse(g, params, y))), params, x)


def test_transformations():
    """jit, vmap over y and params, and grad of all of it = a loop of single calls."""
    g, params, x = dense_net(0.6)
    stacked, ys = jax.tree.map(lambda leaf: jnp.stack([leaf, -0.8 * leaf]), (params, x))

    def value_and_gradient(params, y):
        return jax.value_and_grad(lambda p, y: jnp.sum(residual_inverse(g, p, y) ** 3), (0, 1))(params, y)

    result, one = quick_jit(jax.vmap(value_and_gradient))(stacked, ys), quick_jit(value_and_gradient)
    for n in range(2):
        expected = one(*jax.tree.map(lambda leaf, n=n: leaf[n], (stacked, ys)))
        nth = jax.tree.map(lambda leaf, n=n: leaf[n], result)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11), nth, expected)


def test_closed_over_arrays():
    """The gradient in arrays that g closes over is that in the same params; integers may be closed over too."""
    g, params, y = dense_net(0.6)

    @quick_jit
    def gradients(params, y, count):
        def by_closure(params):
            return jnp.sum(residual_inverse(lambda _, x: g(params, x) / count, None, y) ** 3)

        return jax.grad(by_closure)(params), jax.grad(lambda p: jnp.sum(residual_inverse(g, p, y) ** 3))(params)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10), *gradients(params, y, jnp.asarray(1)))


def test_integer_leaf_in_params():
    """A pytree may hold integers."""
    y = jnp.array([[0.4, -0.2]])

    def loss(params, y):
        return jnp.sum(residual_inverse(lambda p, x: sine(p["rate"], x) / p["count"], params, y))

    gradient = jax.grad(loss, allow_int=True)({"rate": jnp.asarray(1.0), "count": jnp.asarray(1)}, y)
    expected = jax.grad(lambda rate: jnp.sum(residual_inverse(sine, rate, y)))(jnp.asarray(1.0))
    np.testing.assert_allclose(gradient["rate"], expected, rtol=1e-10)


# Types and bad input


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)], ids=["float32", "bfloat16"])
def test_default_tolerance_follows_the_dtype(dtype, error):
    """In narrow floats it converges by default, keeps the dtype and is as right as the dtype allows."""
    g, params, x = dense_net(0.7, dtype=dtype)
    inverse, status = with_status(g, params, x + g(params, x))
    assert inverse.dtype == status.residual.dtype == dtype
    assert jnp.all(status.converged) and jnp.all(status.iterations < 60)
    np.testing.assert_allclose(inverse.astype(float), x.astype(float), atol=error)


def test_rank_one_and_empty_batch():
    """y may be [B], one number an example, and a batch may be empty."""
    y = jnp.linspace(-1, 1, 5)
    x = residual_inverse(sine, jnp.asarray(1.0), y)
    np.testing.assert_allclose(x + sine(1.0, x), y, atol=1e-11)
    assert residual_inverse(sine, jnp.asarray(1.0), jnp.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tolerance", {"tolerance": 0.0}),
        ("tolerance", {"tolerance": -1.0}),
        ("tolerance", {"tolerance": float("nan")}),
        ("max_iterations", {"max_iterations": 0}),
    ],
)
def test_bad_settings(name, options):
    """A tolerance is positive and a cap at least one."""
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        FixedPoint(**options)


@pytest.mark.parametrize(
    ("name", "g", "y"),
    [
        ("y", sine, jnp.zeros((2, 3), int)),
        ("y", sine, jnp.zeros(())),
        ("y", sine, [[0.0, 1.0]]),
        ("g", lambda p, x: x[:, :1], jnp.zeros((2, 3))),
        ("g", lambda p, x: x.astype(jnp.float32), jnp.zeros((2, 3))),
    ],
)
def test_bad_arguments(name, g, y):
    """`residual_inverse` names the argument that is wrong."""
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        residual_inverse(g, jnp.asarray(1.0), y)


@pytest.mark.parametrize("lipschitz", [0.95, 0.98])
@pytest.mark.parametrize("offset", [1.0, 20.0, 100.0])
def test_converges_down_to_rounding_in_float32(lipschitz, offset):
    """Large values and a constant near one: rounding alone does not count as non-convergence."""
    y = jax.random.normal(jax.random.key(0), (200, 1), jnp.float32)
    x, status = residual_inverse(lambda p, x: p * jnp.sin(x) + offset, jnp.float32(lipschitz), y, return_status=True)
    assert x.dtype == jnp.float32 and status.converged.all()
    assert status.iterations.max() < 900
    error = jnp.abs(x + lipschitz * jnp.sin(x) + offset - y).max()
    assert error <= 64 * jnp.finfo(jnp.float32).eps * offset
