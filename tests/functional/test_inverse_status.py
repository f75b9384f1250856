"""Solves that did not converge are reported: by the status, by a warning, by an error or by NaN."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.inverse import InverseError, reported, residual_inverse
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.solvers import Anderson, Broyden, FixedPoint
from tests.functional.inverses import sine, with_status


@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_too_few_iterations(wrap):
    """At the cap the status reports it; a compiled program cannot warn, and has no host callback."""
    y = jnp.array([[0.0, 0.0], [0.3, 0.2]])
    y = y[None] if wrap is jax.vmap else y
    options = {"solver": FixedPoint(max_iterations=5)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = wrap(lambda y: residual_inverse(sine, jnp.asarray(1.0), y, **options))(y)
        again, status = wrap(lambda y: with_status(sine, jnp.asarray(1.0), y, **options))(y)
    np.testing.assert_array_equal(x, again)
    assert "callback" not in str(jax.make_jaxpr(wrap(lambda y: residual_inverse(sine, 1.0, y, **options)))(y))
    np.testing.assert_array_equal(status.converged.ravel(), [True, False])
    np.testing.assert_array_equal(status.iterations.ravel(), [1, 5])
    assert status.residual.ravel()[1] > 1e-3


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_an_unconverged_derivative(mode):
    """It is NaN, since a compiled program cannot warn. y = 0 has x = 0 at once, where J = 0.9 I is hardest."""
    y, solver = jnp.zeros((2, 3)), FixedPoint(max_iterations=5)

    def inverse(y):
        return residual_inverse(sine, jnp.asarray(1.0), y, solver=solver)

    if mode == "forward":
        found = jax.jit(lambda y: jax.jvp(inverse, (y,), (y + 1,))[1])(y)
    else:
        found = jax.jit(jax.grad(lambda y: jnp.sum(inverse(y))))(y)
    assert np.isnan(found).all()


@pytest.mark.parametrize("method", [FixedPoint, Anderson, Broyden])
def test_raising(method):
    """on_failure="raise": an InverseError from an eager call, NaN for what failed alone from a compiled one."""
    y, rate = jnp.array([[0.0, 0.0], [0.3, 0.2], [2.0, 1.0]]), jnp.asarray(1.0)
    solver = method(max_iterations=2, on_failure="raise")
    solve = partial(residual_inverse, sine, rate, solver=solver)
    with pytest.raises(InverseError, match=r"^residual_inverse: 2 of 3 examples did not converge; largest residual"):
        solve(y)
    x, status = solve(y, return_status=True)
    np.testing.assert_array_equal(status.converged, [True, False, False])
    assert np.isfinite(x).all()
    np.testing.assert_array_equal(jax.jit(solve)(y), np.where(status.converged[:, None], x, np.nan))
    np.testing.assert_array_equal(solve(y[:1]), x[:1])


@pytest.mark.parametrize("method", [FixedPoint, Anderson, Broyden])
def test_warning(method):
    """on_failure="warn": a RuntimeWarning from an eager call, under grad too; the best guess from every call."""
    y, rate = jnp.array([[0.0, 0.0], [0.3, 0.2], [2.0, 1.0]]), jnp.asarray(1.0)
    solve = partial(residual_inverse, sine, rate, solver=method(max_iterations=2))
    with pytest.warns(RuntimeWarning, match=r"^residual_inverse: 2 of 3 examples did not converge; largest residual"):
        x = solve(y)
    with pytest.warns(RuntimeWarning, match=r"^residual_inverse: 2 of 3"):
        jax.grad(lambda y: jnp.sum(solve(y)))(y)
    np.testing.assert_array_equal(jax.jit(solve)(y), x)
    np.testing.assert_array_equal(solve(y, return_status=True)[0], x)


def test_a_derivative_that_fails():
    """y = 0 has x = 0 at once; only the derivative's solve fails, and gives NaN."""
    solver = FixedPoint(max_iterations=5, on_failure="raise")
    gradient = jax.grad(lambda y: jnp.sum(residual_inverse(sine, jnp.asarray(1.0), y, solver=solver)))
    assert np.isnan(gradient(jnp.zeros((2, 3)))).all()


def test_a_derivative_that_fails_for_one_example():
    """Only that example's derivative is NaN."""
    rate = jnp.array([[0.0], [1.0]])
    solver = FixedPoint(max_iterations=5)

    def inverse(y):
        return residual_inverse(lambda rate, x: 0.9 * jnp.sin(rate * x), rate, y, solver=solver)

    gradient = jax.grad(lambda y: jnp.sum(inverse(y)))(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(gradient[0], 1)
    assert np.isnan(gradient[1]).all()


@pytest.mark.parametrize("on_failure", ["warn", "raise"])
def test_no_derivative_of_a_solve_that_fails(on_failure):
    """It is NaN in any mode and order, though its own solve converges, also of a loss that leaves the example out.

    The first example has g = 0. The derivatives of the second have one eigenvalue: Anderson needs three turns for them.
    """
    rate, y = jnp.array([[0.0], [1.0]]), jnp.array([[0.3, 0.3], [2.0, 2.0]])
    solver = Anderson(max_iterations=3, on_failure=on_failure)

    def inverse(rate, y):
        return residual_inverse(lambda rate, x: 0.9 * jnp.sin(rate * x), rate, y, solver=solver)

    def of_first(y, rate=rate):
        return jnp.sum(inverse(rate, y)[0])

    def hessian_product(y):
        return jax.grad(lambda y: jnp.sum(jax.grad(of_first)(y)[0]))(y)

    derivatives = {
        "reverse mode": (jax.grad(of_first), 1),
        "in the parameters": (lambda y: jax.grad(of_first, 1)(y, rate), -0.54),
        "forward mode": (lambda y: jax.jvp(partial(inverse, rate), (y,), (jnp.ones_like(y),))[1], 1),
        "forward over reverse": (lambda y: jax.jvp(jax.grad(of_first), (y,), (jnp.ones_like(y),))[1], 0),
        "reverse over reverse": (hessian_product, 0),
        "of a map": (lambda y: jax.vmap(jax.grad(of_first))(y[None])[0], 1),
        "of a scan": (jax.grad(lambda y: jax.lax.scan(lambda _, y: (None, of_first(y)), None, y[None])[1][0]), 1),
    }
    for name, (derivative, of_others) in derivatives.items():
        found = jax.jit(derivative)(y)
        np.testing.assert_allclose(found[0], of_others, rtol=1e-12, err_msg=name)
        assert np.isnan(found[1]).all(), name
    best_guess = lambda y: jnp.sum(with_status(sine, jnp.asarray(1.0), y, solver=solver)[0])  # noqa: E731
    assert np.isfinite(jax.jit(jax.grad(best_guess))(y[1:])).all()
    if on_failure == "warn":
        with pytest.warns(RuntimeWarning, match="1 of 2 examples did not converge"):
            found = jax.grad(of_first)(y)
        np.testing.assert_array_equal(np.isnan(found), [[False] * 2, [True] * 2])


def test_reports_of_several_blocks():
    """An example needs the solves of all blocks; the largest residual is that of a failure; a good status is silent."""
    residual = jnp.array([[9.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    status = InverseStatus(
        jnp.ones((2, 3), int), residual, residual, jnp.array([[True, False, True], [False, True, True]])
    )
    x = jnp.ones((3, 2))
    with pytest.warns(RuntimeWarning, match=r"^a flow: 2 of 3 examples did not converge; largest residual 2.00e\+00"):
        assert reported(x, status, "a flow", "warn") is x
    with pytest.raises(InverseError, match="2 of 3"):
        reported(x, status, "a flow", "raise")
    reported(x, status._replace(converged=residual >= 0), "a flow", "raise")
    marked = jax.jit(lambda x, status: reported(x, status, "a flow", "raise"))(x, status)
    np.testing.assert_array_equal(np.isnan(marked), [[True] * 2, [True] * 2, [False] * 2])


@pytest.mark.parametrize("method", [FixedPoint, Anderson, Broyden])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_example_that_is_not_finite_ends_at_once(method, bad):
    """It is unconverged after one evaluation; the others are solved as without it."""
    y = jnp.array([[0.3, 0.2], [bad, 0.1], [2.0, 1.0]])
    g = lambda rate, x: 0.9 * jnp.sin(rate * x)  # noqa: E731
    x, status = residual_inverse(g, jnp.asarray(1.0), y, solver=method(), return_status=True)
    others, expected = residual_inverse(g, jnp.asarray(1.0), y[::2], solver=method(), return_status=True)
    np.testing.assert_array_equal(status.converged, [True, False, True])
    assert status.iterations[1] == 1
    np.testing.assert_array_equal(status.iterations[::2], expected.iterations)
    np.testing.assert_allclose(x[::2], others, rtol=1e-14)


def test_an_example_that_diverges_ends_where_it_overflows():
    """g of constant 3: the iteration grows until it is not finite, and does not go on to the cap."""
    solver = FixedPoint(max_iterations=100_000)
    _, status = residual_inverse(
        lambda p, x: p * x, jnp.asarray(3.0), jnp.ones((1, 1)), solver=solver, return_status=True
    )
    assert not status.converged[0] and status.iterations[0] < 1000
