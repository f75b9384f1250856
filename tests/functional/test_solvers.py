"""Solvers: the error bound holds, they need no more evaluations than plain iteration, failures are reported."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.iteration import Evaluation, InverseStatus
from resflow_jax.functional.solvers import Anderson, Broyden, FixedPoint, _solve_positive
from tests.functional.contractions import (
    dense_net,
)
from tests.functional.inverses import SOLVERS, every_solver, with_status


def random_contraction(rng, lipschitz, dim):
    """g(x) = L U f(V x + b) with orthonormal U and V and f of slope at most one; also kinked, also linear."""
    u, v = (jnp.asarray(np.linalg.qr(rng.normal(size=(dim, dim)))[0]) for _ in range(2))
    f = [jnp.tanh, jnp.sin, jnp.abs, lambda x: x, jax.nn.relu][rng.integers(5)]
    b = jnp.asarray(rng.normal(size=dim))
    return lambda _, x: lipschitz * f(x @ v + b[None]) @ u


@every_solver
@pytest.mark.parametrize("max_iterations", [7, 1000])
def test_the_error_bound_holds(solver, max_iterations):
    """|x - x*|_2 <= residual_norm / (1 - L), converged or not, on many random contractions."""
    rng = np.random.default_rng(0)
    options = {"solver": replace(solver, tolerance=1e-5, max_iterations=max_iterations)}
    for lipschitz, dim in [(0.6, 3), (0.97, 2), (0.97, 8)]:
        g = random_contraction(rng, lipschitz, dim)
        exact = jnp.asarray(3 * rng.normal(size=(40, dim)))
        x, status = jax.jit(lambda y, g=g: with_status(g, None, y, **options))(exact + g(None, exact))
        error = jnp.linalg.norm(x - exact, axis=1)
        assert jnp.all(error <= status.error_bound(lipschitz) * (1 + 1e-9) + 1e-14)


def test_error_bound_broadcasts():
    """Constants with leading axes; no bound where L >= 1."""
    status = InverseStatus(jnp.ones(2, int), jnp.ones(2), jnp.array([1.0, 2.0]), jnp.ones(2, bool))
    bound = status.error_bound(jnp.array([[0.5], [0.0], [1.0]]))
    np.testing.assert_array_equal(bound, [[2, 4], [1, 2], [np.inf, np.inf]])


@jax.jit
def iterations_of_all(lipschitz):
    """Evaluations that each solver spends on three contractions, [solver, 3, B]: symmetric, skew and general J."""
    rng = np.random.default_rng(1)
    q, u = (np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(2))
    spectrum = jnp.linspace(-1, 1, 8)
    skew = q - q.T
    skew = skew / np.linalg.norm(skew, 2)
    y = jnp.asarray(rng.normal(size=(32, 8)))
    problems = [
        lambda c, x: c * (jnp.tanh(x @ q + 0.1) * spectrum[None]) @ q.T,
        lambda c, x: c * jnp.tanh(x @ skew),
        lambda c, x: c * (jnp.tanh(x @ q + 0.1) * spectrum[None]) @ u,
    ]
    return [[with_status(g, lipschitz, y, solver=s)[1].iterations for g in problems] for s in SOLVERS.values()]


@pytest.mark.parametrize("lipschitz", [0.1, 0.3, 0.5, 0.8, 0.9, 0.98])
def test_fewer_evaluations(lipschitz):
    """Never more than plain iteration takes; at most half as many from L = 0.9 on where J has eigenvalues near L."""
    plain, *others = np.array(iterations_of_all(lipschitz))
    for iterations in others:
        assert np.all(iterations.mean(axis=1) <= plain.mean(axis=1))
        assert np.all(iterations.max(axis=1) <= plain.max(axis=1))
        if lipschitz >= 0.9:
            assert np.all(2 * iterations.mean(axis=1)[:2] <= plain.mean(axis=1)[:2])


@dataclass(frozen=True)
class Obstinate(FixedPoint):
    """A worst-case rule that always proposes nonsense."""

    nonsense: float = 0.0

    def propose(self, turn, memory, change, new, trusted):
        return memory, jnp.full_like(new.image, self.nonsense) + new.residual


@pytest.mark.parametrize("nonsense", [0.0, 1e3, np.nan, np.inf])
@pytest.mark.parametrize("lipschitz", [0.5, 0.95])
def test_no_proposal_prevents_convergence(nonsense, lipschitz):
    """However bad the rule, it costs at most 1 + log2(n + 1) evaluations more than plain iteration."""
    g, params, x = dense_net(lipschitz)
    y = x + g(params, x)
    _, plain = with_status(g, params, y, solver=FixedPoint())
    inverse, status = with_status(g, params, y, solver=Obstinate(nonsense=nonsense))
    assert jnp.all(status.converged)
    np.testing.assert_allclose(inverse, x, atol=1e-9)
    iterations, plain = np.asarray(status.iterations), np.asarray(plain.iterations)
    assert np.all(iterations <= plain + 2 + np.log2(plain + 1))


@every_solver
def test_no_contraction_no_claim(solver):
    """A g without a solution is reported, within the cap, and its neighbour in the batch solved all the same."""
    y = jnp.array([[0.3, -0.2], [-1.0, -1.0]])

    def g(_, x):
        hopeless = -x + jnp.exp(x)  # x + g(x) = exp(x) > 0 never is y = -1
        return jnp.stack([0.5 * jnp.sin(x[0]), hopeless[1]])

    solver = replace(solver, max_iterations=60)
    x, status = with_status(g, None, y, solver=solver)
    np.testing.assert_array_equal(status.converged, [True, False])
    assert status.iterations[1] == 60
    np.testing.assert_allclose(x[0] + 0.5 * jnp.sin(x[0]), y[0], atol=1e-11)


def test_error_bound_of_a_narrow_residual_does_not_round_the_constant():
    """0.997 is 0.9961 in bfloat16, and 0.999 is 1."""
    ones = jnp.ones(2, jnp.bfloat16)
    status = InverseStatus(ones, ones, ones, ones > 0)
    np.testing.assert_allclose(status.error_bound(0.997), 1 / 0.003, rtol=1e-4)
    np.testing.assert_allclose(status.error_bound(np.asarray([0.999, 1.0])), [1e3, np.inf], rtol=1e-3)


def test_a_gram_matrix_that_rounding_spoiled_gives_a_plain_step():
    """One that has no Cholesky factor: of that example T(x) is proposed, of the others nothing changes."""
    new, change = (Evaluation(*jax.random.normal(key, (2, 2, 5))) for key in jax.random.split(jax.random.key(0)))
    memory = Anderson(memory=3).initialize(new.image)
    turn, trusted = jnp.asarray(1), jnp.asarray([True, True])
    _, expected = Anderson(memory=3).propose(turn, memory, change, new, trusted)
    spoiled = memory._replace(gram=memory.gram.at[0, 2, 2].set(-1.0))
    _, found = Anderson(memory=3).propose(turn, spoiled, change, new, trusted)
    np.testing.assert_array_equal(found[0], new.image[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert not np.allclose(expected, new.image)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tolerance", {"tolerance": 0.0}),
        ("tolerance", {"tolerance": -1.0}),
        ("tolerance", {"tolerance": float("nan")}),
        ("max_iterations", {"max_iterations": 0}),
        ("on_failure", {"on_failure": "ignore"}),
        ("memory", {"memory": 0}),
    ],
)
def test_bad_settings(name, options):
    """A tolerance is positive, a cap and a memory at least one, and a failure warns or raises."""
    for method in [Anderson, Broyden] if name == "memory" else [FixedPoint, Anderson, Broyden]:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            method(**options)


@pytest.mark.parametrize("lipschitz", [0.95, 0.98])
@pytest.mark.parametrize("offset", [1.0, 20.0, 100.0])
@every_solver
def test_converges_down_to_rounding_in_float32(lipschitz, offset, solver):
    """Large values and a constant near one: rounding alone does not count as non-convergence."""
    y = jax.random.normal(jax.random.key(0), (200, 1), jnp.float32)
    x, status = with_status(lambda p, x: p * jnp.sin(x) + offset, jnp.float32(lipschitz), y, solver=solver)
    assert x.dtype == jnp.float32 and status.converged.all()
    assert status.iterations.max() < 900
    error = jnp.abs(x + lipschitz * jnp.sin(x) + offset - y).max()
    assert error <= 64 * jnp.finfo(jnp.float32).eps * offset


@pytest.mark.parametrize("size", [1, 2, 5])
def test_small_positive_systems(size):
    """Elimination gives the solution of each system; one that is not positive definite gives NaN, and it alone."""
    a = jax.random.normal(jax.random.key(0), (4, size, size))
    matrix, vector = a @ a.mT + 1e-3 * jnp.eye(size)[None], jax.random.normal(jax.random.key(1), (4, size))
    matrix = matrix.at[2].multiply(-1)
    found = jax.jit(_solve_positive)(matrix, vector)
    expected = np.linalg.solve(matrix, vector[..., None])[..., 0]
    np.testing.assert_allclose(np.delete(found, 2, 0), np.delete(expected, 2, 0), rtol=1e-9)
    assert np.all(np.isnan(found[2]))
