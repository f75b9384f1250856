"""The inverse of y = x + g(x): right, per example, honest about its status, with the implicit derivative."""

import warnings
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from resflow_jax.functional.inverse import InverseError, reported, residual_inverse
from resflow_jax.functional.iteration import Evaluation, InverseStatus
from resflow_jax.functional.solvers import Anderson, Broyden, FixedPoint
from tests.compilations import compilations
from tests.functional.contractions import (
    check_two_orders,
    conv_net,
    dense_net,
    jacobians,
)

IDS = ["easy", "hard", "conv"]
SOLVERS = {"fixed point": FixedPoint(), "anderson": Anderson(), "broyden": Broyden()}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
with_status = partial(residual_inverse, return_status=True)


def sine(params, x):
    """An elementwise contraction, also in the maximum norm, of Lipschitz constant 0.9."""
    return 0.9 * jnp.sin(params * x)


@pytest.mark.parametrize("net", [partial(dense_net, 0.3), partial(dense_net, 0.9), partial(conv_net, 0.9)], ids=IDS)
@every_solver
def test_round_trip(net, solver):
    """inverse(x + g(x)) = x to 1e-10, converged, in no more iterations than L^n = tolerance needs."""
    g, params, x = net()
    inverse, status = jax.jit(lambda p, y: with_status(g, p, y, solver=solver))(params, x + g(params, x))
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


# What the solvers promise beyond the right answer


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
    """Proposes nonsense for ever: the worst rule there is."""

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


# Status and warnings


@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_too_few_iterations(wrap):
    """At the cap the status says so; where nothing can be said, nothing is, and the program calls nothing back."""
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
    """It is NaN, since nothing in a compiled program can warn: y = 0 has x = 0 at once, where J = 0.9 I is hardest."""
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


# Derivatives


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


@pytest.mark.parametrize("solver", [FixedPoint(), Anderson()], ids=["fixed point", "anderson"])
def test_check_grads_to_second_order(solver):
    """jax.test_util.check_grads, order 2, forward and reverse."""
    args = jnp.asarray(0.7), jnp.array([[0.4, -0.2]])
    check_grads(jax.jit(partial(residual_inverse, sine, solver=solver)), args, order=2, modes=("fwd", "rev"), rtol=1e-4)


def test_two_orders():
    """Gradient and Hessian-vector product in params and y of a dense net."""
    g, params, x = dense_net(0.5)
    check_two_orders(lambda params, y: jnp.sum(jnp.sin(3 * residual_inverse(g, params, y))), params, x)


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


@every_solver
def test_rank_one_and_empty_batch(solver):
    """y may be [B], one number an example, and a batch may be empty."""
    y = jnp.linspace(-1, 1, 5)
    x = residual_inverse(sine, jnp.asarray(1.0), y, solver=solver)
    np.testing.assert_allclose(x + sine(1.0, x), y, atol=1e-11)
    for shape in [(0, 3), (2, 0)]:
        assert residual_inverse(sine, jnp.asarray(1.0), jnp.zeros(shape), solver=solver).shape == shape


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
@every_solver
def test_converges_down_to_rounding_in_float32(lipschitz, offset, solver):
    """Large values and a constant near one: rounding alone does not count as non-convergence."""
    y = jax.random.normal(jax.random.key(0), (200, 1), jnp.float32)
    x, status = with_status(lambda p, x: p * jnp.sin(x) + offset, jnp.float32(lipschitz), y, solver=solver)
    assert x.dtype == jnp.float32 and status.converged.all()
    assert status.iterations.max() < 900
    error = jnp.abs(x + lipschitz * jnp.sin(x) + offset - y).max()
    assert error <= 64 * jnp.finfo(jnp.float32).eps * offset
