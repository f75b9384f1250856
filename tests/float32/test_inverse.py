"""The inverse and its implicit derivative against dense mathematics in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflow_jax as rf
from tests.float32 import dense

PARAMS, X = dense.network(norm=0.9)
Y = X + dense.dense_g(PARAMS, X)
SOLVERS = [rf.Anderson(), rf.FixedPoint(), rf.Broyden()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_value_and_derivative(solver):
    """x to 1e-5, and d(c . x) = (I + J)^-T c . (dy - dg), whose solve leaves up to 1 / (1 - L) times 1e-5.

    Under jit, and once without.
    """
    params, y = dense.single((PARAMS, Y))
    weights = np.sin(np.arange(X.size)).reshape(X.shape)

    def total(params, y):
        x = rf.residual_inverse(dense.g, params, y, solver=solver)
        return jnp.sum(jnp.asarray(weights, jnp.float32) * x), x

    adjoint = np.linalg.solve(np.eye(X.shape[1]) + dense.jacobians(PARAMS, X).swapaxes(1, 2), weights[..., None])[
        ..., 0
    ]
    hidden = np.tanh(X @ PARAMS["w"] + PARAMS["b"])
    for function in (total, jax.jit(total)) if isinstance(solver, rf.Anderson) else (jax.jit(total),):
        (_, x), (of_params, of_y) = jax.value_and_grad(function, (0, 1), has_aux=True)(params, y)
        np.testing.assert_allclose(x, X, atol=1e-5)
        np.testing.assert_allclose(of_y, adjoint, rtol=1e-4, atol=2e-4)
        np.testing.assert_allclose(of_params["v"], -hidden.T @ adjoint, rtol=1e-4, atol=2e-4)


def test_status():
    """Every example converges, in fewer evaluations than plain iteration takes; one that is not finite ends at once."""
    params, y = dense.single((PARAMS, Y))
    y = y.at[1].set(jnp.nan)
    counts = {}
    for solver in SOLVERS[:2]:
        solve = jax.jit(
            lambda y, solver=solver: rf.residual_inverse(dense.g, params, y, solver=solver, return_status=True)
        )
        x, status = solve(y)
        np.testing.assert_allclose(x[jnp.array([0, 2])], X[[0, 2]], atol=1e-5)
        assert status.converged.tolist() == [True, False, True] and status.iterations[1] <= 2
        counts[type(solver).__name__] = int(status.iterations.max())
    assert counts["Anderson"] < counts["FixedPoint"]
