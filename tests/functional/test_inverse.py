"""The inverse of y = x + g(x): right, per example, under transformations, in every dtype."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.inverse import residual_inverse
from resflow_jax.functional.solvers import Anderson, Broyden, FixedPoint
from tests.compilations import compilations
from tests.functional.contractions import (
    conv_net,
    dense_net,
)
from tests.functional.inverses import every_solver, sine, with_status

IDS = ["easy", "hard", "conv"]


@partial(jax.jit, static_argnums=(0, 1))
def solve(g, solver, params, y):
    return with_status(g, params, y, solver=solver)


@pytest.mark.parametrize("net", [partial(dense_net, 0.3), partial(dense_net, 0.9), partial(conv_net, 0.9)], ids=IDS)
@every_solver
def test_round_trip(net, solver):
    """inverse(x + g(x)) = x to 1e-10, converged, in no more iterations than L^n = tolerance needs."""
    g, params, x = net()
    inverse, status = solve(g, solver, params, x + g(params, x))
    np.testing.assert_allclose(inverse, x, atol=1e-10)
    assert jnp.all(status.converged)
    assert status.iterations.shape == status.residual.shape == status.converged.shape == (len(x),)
    assert np.all(np.asarray(status.iterations) <= 2 + np.log(1e-12) / np.log(params["out"][1]))


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
@pytest.mark.parametrize("method", [FixedPoint, Anderson, Broyden])
def test_the_residual_is_within_tolerance(tolerance, method):
    """max |y - g(x) - x| <= tolerance max(1, |x|, |y|) at the last x evaluated, not its square root, and about that
    at the x returned.
    """
    y = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)))
    x, status = with_status(sine, jnp.asarray(1.0), y, solver=method(tolerance))
    scale = jnp.maximum(1, jnp.maximum(jnp.abs(x).max(axis=1), jnp.abs(y).max(axis=1)))
    residual = jnp.abs(y - sine(1.0, x) - x).max(axis=1)
    assert jnp.all(residual <= (1 if method is FixedPoint else 2) * tolerance * scale)
    assert jnp.all(status.residual <= tolerance * scale)
    assert jnp.all(status.converged)


@every_solver
def test_every_example_stops_by_itself(solver):
    """An easy and a hard example take different numbers of iterations, each exactly what it gets alone."""
    y = jnp.array([[0.0, 0.0], [2.5, 2.0], [0.3, 0.2]])
    solve = jax.jit(lambda y: with_status(sine, jnp.asarray(1.0), y, solver=solver))
    x, status = solve(y)
    assert status.iterations[0] == 1 and jnp.max(status.iterations) > 5
    for n in range(3):
        x_alone, alone = solve(y[n : n + 1])
        np.testing.assert_array_equal(x_alone[0], x[n])
        jax.tree.map(lambda a, b, n=n: np.testing.assert_array_equal(a[0], b[n]), alone, status)


@every_solver
def test_a_bad_example_spoils_no_other(solver):
    """An example of NaN is reported as not converged; its neighbours are as they were."""
    y = jnp.array([[0.3, 0.2], [jnp.nan, 0.0]])
    solver = replace(solver, max_iterations=300)
    x, status = with_status(sine, jnp.asarray(1.0), y, solver=solver)
    expected, _ = with_status(sine, jnp.asarray(1.0), y[:1], solver=solver)
    np.testing.assert_array_equal(status.converged, [True, False])
    np.testing.assert_array_equal(x[:1], expected)


def test_a_new_tolerance_compiles_nothing():
    """Tolerance and cap are arguments of the compiled program."""
    y = jnp.ones((2, 3))
    solve = lambda **limits: residual_inverse(sine, jnp.asarray(1.0), y, solver=Anderson(**limits), return_status=True)  # noqa: E731
    solve()
    with compilations() as found:
        loose = solve(tolerance=1e-3)[1].iterations
        tight = solve(tolerance=1e-11)[1].iterations
        capped = solve(max_iterations=3)[1].iterations
    assert not found
    assert loose.max() < tight.max() and capped.max() == 3


@pytest.mark.parametrize("solver", [FixedPoint(), Anderson()], ids=["fixed point", "anderson"])
def test_transformations(solver):
    """jit, vmap over y and params, and grad of all of it = a loop of single calls."""
    g, params, x = dense_net(0.6)
    stacked, ys = jax.tree.map(lambda leaf: jnp.stack([leaf, -0.8 * leaf]), (params, x))

    def value_and_gradient(params, y):
        return jax.value_and_grad(lambda p, y: jnp.sum(residual_inverse(g, p, y, solver=solver) ** 3), (0, 1))(
            params, y
        )

    result, one = jax.jit(jax.vmap(value_and_gradient))(stacked, ys), jax.jit(value_and_gradient)
    for n in range(2):
        expected = one(*jax.tree.map(lambda leaf, n=n: leaf[n], (stacked, ys)))
        nth = jax.tree.map(lambda leaf, n=n: leaf[n], result)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11), nth, expected)


def test_closed_over_arrays():
    """The gradient in arrays that g closes over is that in the same params; integers may be closed over too."""
    g, params, y = dense_net(0.6)

    @jax.jit
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
@every_solver
def test_default_tolerance_follows_the_dtype(dtype, error, solver):
    """In narrow floats it converges by default, keeps the dtype and is as right as the dtype allows."""
    g, params, x = dense_net(0.7, dtype=dtype)
    inverse, status = with_status(g, params, x + g(params, x), solver=solver)
    assert inverse.dtype == status.residual.dtype == dtype
    assert jnp.all(status.converged) and jnp.all(status.iterations < 60)
    np.testing.assert_allclose(inverse.astype(float), x.astype(float), atol=error)


@every_solver
def test_rank_one_and_empty_batch(solver):
    """y may be [B], one number an example, and a batch may be empty."""
    y = jnp.linspace(-1, 1, 5)
    x = residual_inverse(sine, jnp.asarray(1.0), y, solver=solver)
    np.testing.assert_allclose(x + sine(1.0, x), y, atol=1e-11)
    for shape in [(0, 3), (2, 0)]:
        assert residual_inverse(sine, jnp.asarray(1.0), jnp.zeros(shape), solver=solver).shape == shape


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
