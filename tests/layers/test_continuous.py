"""Continuous flows: the solution of a linear equation, dense Jacobians, the probes of the estimators, gradients."""

import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.probes import draw_seeds, make_probes, seed_keys
from resflow_jax.layers.continuous import ADJOINTS

pytest.importorskip("diffrax")

MATRIX = np.asarray([[-0.3, 0.8, 0.1], [-0.5, 0.2, 0.3], [0.1, 0.4, -0.6]])
X = jax.random.normal(jax.random.key(0), (4, 3))


class Linear(nnx.Module):
    """dx/dt = x A^T + c, whose solution and divergence are known."""

    def __init__(self):
        self.matrix = nnx.Param(jnp.asarray(MATRIX))

    def __call__(self, t, x, condition=None):
        y = x @ self.matrix[...].T
        return y if condition is None else y + condition


def velocity(**settings):
    return rf.VelocityField((3,), rf.MLPConditioner((6,), "tanh", zero=False), **settings, rngs=nnx.Rngs(0))


def test_a_linear_equation():
    """y = exp(T A) x, log_det = T tr A; both directions; the status counts the steps."""
    block = rf.ContinuousBlock(Linear(), time=1.5, tolerance=1e-10)
    y, log_det, status = jax.jit(lambda x: block.forward_with_status(x, estimator=rf.Exact()))(X)
    np.testing.assert_allclose(y, X @ scipy.linalg.expm(1.5 * MATRIX).T, atol=1e-8)
    np.testing.assert_allclose(log_det, 1.5 * np.trace(MATRIX), atol=1e-8)
    assert status.converged.all() and (status.iterations > 3).all() and (status.residual == 0).all()
    back, status = block.inverse(y, return_status=True)
    np.testing.assert_allclose(back, X, atol=1e-8)
    assert status.converged.shape == (1, 4) and status.converged.all()


@cache
def closed_form_gradients():
    def total(matrix, x):
        return (x @ jax.scipy.linalg.expm(matrix).T).sum() + 2 * len(x) * jnp.trace(matrix)

    return jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.asarray(MATRIX), X)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_gradients(adjoint):
    """d/dA of the sum of y and of the log-dets, by every adjoint, against the closed form."""
    block = rf.ContinuousBlock(Linear(), tolerance=1e-10, adjoint=adjoint)
    graphdef, state = nnx.split(block)

    def total(state, x):
        y, log_det = nnx.merge(graphdef, state).forward(x, estimator=rf.Exact())
        return y.sum() + 2 * log_det.sum()

    found = jax.jit(jax.grad(total, argnums=(0, 1)))(state, X)
    wanted = closed_form_gradients()
    np.testing.assert_allclose(jax.tree.leaves(found[0])[0], wanted[0], atol=1e-7)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-7)


@pytest.mark.parametrize("depth", [None, 2])
def test_log_det_of_a_network(depth):
    """Against the dense Jacobian, with a condition; `solve_and_estimate` gives the same at x; a scanned stack too."""

    def made(rngs):
        field = rf.VelocityField((3,), rf.MLPConditioner((6,), "tanh", zero=False), condition_dim=2, rngs=rngs)
        return rf.ContinuousBlock(field, tolerance=1e-9, adjoint="direct")

    block = made(nnx.Rngs(0)) if depth is None else rf.ResidualStack(made, depth, rngs=nnx.Rngs(0))
    condition = jax.random.normal(jax.random.key(1), (4, 2))

    @jax.jit
    def run(x, condition):
        y, log_det = block.forward(x, condition=condition, estimator=rf.Exact(chunk_size=2))
        at = jax.vmap(jax.jacfwd(lambda e, c: block(e[None], c[None])[0]))(x, condition)
        return y, log_det, at, block.solve_and_estimate(y, None, rf.Exact(), rf.Anderson(), condition)

    y, log_det, jacobians, (back, again, _, _) = run(X, condition)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], atol=1e-7)
    np.testing.assert_allclose(again, log_det, atol=1e-7)
    np.testing.assert_allclose(back, X, atol=1e-7)
    assert not np.allclose(y, run(X, condition + 1)[0], atol=1e-3)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian", "orthogonal", "hadamard"])
def test_hutchinson(probe):
    """The estimate is v^T A v for the probes that a residual block draws with this key; D orthogonal ones are exact."""
    key, number = jax.random.key(5), 3
    block = rf.ContinuousBlock(Linear(), tolerance=1e-8)
    log_det = block.forward(X, key=key, estimator=rf.Roulette(probe=probe, probes=number))[1]
    keys = seed_keys(probe, number, key, X)[1]
    probes = make_probes(probe, number, draw_seeds(probe, number, keys, X), X).reshape(number, 4, 3)
    np.testing.assert_allclose(log_det, np.einsum("nbi,ij,nbj->b", probes, MATRIX, probes) / number, atol=1e-6)
    if probe == "orthogonal":
        np.testing.assert_allclose(log_det, np.trace(MATRIX), atol=1e-6)


def test_a_solve_that_does_not_finish():
    """NaN and a status; an inverse without status warns."""
    block = rf.ContinuousBlock(Linear(), tolerance=1e-12, max_steps=3)
    y, log_det, status = block.forward_with_status(X, estimator=rf.Exact())
    assert jnp.isnan(y).all() and jnp.isnan(log_det).all()
    assert not status.converged.any() and jnp.isinf(status.residual).all()
    with pytest.warns(RuntimeWarning, match="ContinuousBlock: 4 of 4 examples did not converge"):
        block.inverse(X)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_a_solve_that_does_not_finish_has_no_gradient(adjoint):
    """Its derivatives are NaN in a compiled program, not zero; an eager call of a flow warns of its values."""
    flow = rf.Flow(rf.ContinuousBlock(Linear(), tolerance=1e-12, max_steps=3, adjoint=adjoint), event_shape=(3,))
    graphdef, state = nnx.split(flow)

    def total(state, x):
        return nnx.merge(graphdef, state).log_prob(x, estimator=rf.Exact()).sum()

    for part in jax.tree.leaves(jax.jit(jax.grad(total, (0, 1)))(state, X)):
        assert jnp.isnan(part).all()
    if adjoint != ADJOINTS[0]:  # of no matter without derivatives
        return
    with pytest.warns(RuntimeWarning, match=r"^Flow.log_prob: 4 of 4 examples are NaN$"):
        flow.log_prob(X, estimator=rf.Exact())
    with pytest.warns(RuntimeWarning, match=r"^Flow: 4 of 4 examples are NaN$"):
        flow(X)


class Waves(nnx.Module):
    def __call__(self, t, x, condition=None):
        return 6 * jnp.sin(3 * x[:, ::-1]) + (0 if condition is None else condition)


def test_an_example_that_is_not_finite():
    """It becomes NaN alone, in both directions; the steps of the others are those without it."""
    block = rf.ContinuousBlock(Waves(), tolerance=1e-6)
    x = jax.random.normal(jax.random.key(0), (4, 2))
    run = jax.jit(lambda x: block.forward_with_status(x, estimator=rf.Exact()))
    inverse = jax.jit(lambda y: block.inverse(y, return_status=True))
    expected, wanted, clean = run(x.at[0].set(0.0))
    for bad in (np.nan, np.inf):
        y, log_det, status = run(x.at[0, 0].set(bad))
        np.testing.assert_array_equal(y[1:], expected[1:])
        np.testing.assert_array_equal(log_det[1:], wanted[1:])
        np.testing.assert_array_equal(status.iterations, clean.iterations)
        assert jnp.isnan(y[0]).all() and jnp.isnan(log_det[0]) and jnp.isinf(status.residual[0])
        assert status.converged.tolist() == [False, True, True, True] and clean.converged.all()
        back, status = inverse(y.at[0].set(bad))
        np.testing.assert_allclose(back[1:], x[1:], atol=1e-3)
        assert status.converged.tolist() == [[False, True, True, True]] and jnp.isnan(back[0]).all()


class Masked(nnx.Module):
    """-x / 2 by a softmax over numbers of which one is masked."""

    def __init__(self):
        self.mask = nnx.Variable(jnp.array([0.0, 0.0, -jnp.inf]))

    def __call__(self, t, x):
        return -x * jax.nn.softmax(self.mask[...])[0]


def test_a_field_with_an_infinite_number():
    """It is no reason for NaN in the results."""
    y, log_det = rf.ContinuousBlock(Masked()).forward(X, estimator=rf.Exact())
    np.testing.assert_allclose(y, X * np.exp(-0.5), atol=1e-4)
    np.testing.assert_allclose(log_det, -1.5, atol=1e-4)


def test_a_condition_that_is_not_finite():
    block = rf.ContinuousBlock(Waves(), condition_shape=(2,))
    condition = jnp.zeros((3, 2)).at[1, 1].set(jnp.nan)
    y = block(jnp.ones((3, 2)), condition)
    assert jnp.isnan(y[1]).all() and jnp.isfinite(y[::2]).all()


class Above(nnx.Module):
    """Decays to 1, and is NaN below, where the stages of a long step are."""

    def __call__(self, t, x):
        return jnp.where(x >= 1, -30 * (x - 1), jnp.nan)


def test_an_example_that_is_not_finite_beside_a_domain():
    """The field gets a finite example in its place, where it is defined."""
    y = rf.ContinuousBlock(Above(), tolerance=1e-2)(jnp.asarray([[jnp.nan], [2.0], [3.0]]))
    assert jnp.isnan(y[0]).all() and jnp.isfinite(y[1:]).all()


def test_a_step_that_leaves_the_domain_is_repeated():
    block = rf.ContinuousBlock(Above(), tolerance=1e-2)
    y, _, status = block.forward_with_status(jnp.full((1, 1), 2.0), estimator=rf.Exact())
    assert status.converged.all() and 1 <= float(y[0, 0]) < 1.01


def test_in_a_flow_of_float32():
    """Stacked and in a chain with a residual block, with the keys of a flow; the density integrates to one in 1D."""

    def step(rngs):
        field = rf.VelocityField((1,), rf.MLPConditioner((4,), "tanh", zero=False), rngs=rngs)
        return rf.Chain([rf.ContinuousBlock(field), rf.ActNorm((1,))])

    with jax.enable_x64(False):
        g = rf.LipschitzMLP(1, (4,), rngs=nnx.Rngs(1))
        flow = rf.Flow(rf.Chain([rf.ResidualStack(step, 2, rngs=nnx.Rngs(0)), rf.ResidualBlock(g)]))
        x = jnp.linspace(-8, 8, 2001)[:, None]
        z, log_prob = flow.forward_and_log_prob(x, estimator=rf.Exact())
        assert log_prob.dtype == jnp.float32
        np.testing.assert_allclose(np.exp(log_prob).sum() * 16 / 2000, 1, atol=1e-3)
        noisy = flow.log_prob(x, key=jax.random.key(0), estimator=rf.Roulette(exact_terms=20))
        np.testing.assert_allclose(noisy, log_prob, atol=1e-3)  # one element: v^2 = 1
        back, status = flow.inverse(z[:5], return_status=True)
        assert status.converged.shape == (3, 5) and status.converged.all()
        np.testing.assert_allclose(back, x[:5], atol=1e-3)
    assert [name for name, _ in rf.certify(flow).unbounded] == ["ContinuousBlock"]


class Wrong(nnx.Module):
    def __call__(self, t, x):
        return x[:, :1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rf.ContinuousBlock(lambda t, x: x), "field: expected a module"),
        (lambda: rf.ContinuousBlock(Linear(), time=0.0), "time: expected a positive number"),
        (lambda: rf.ContinuousBlock(Linear(), time=np.inf), "time: expected a finite number"),
        (lambda: rf.ContinuousBlock(Linear(), tolerance=np.inf), "tolerance: expected a finite number"),
        (lambda: rf.ContinuousBlock(Linear(), tolerance=-1.0), "tolerance: expected a positive number"),
        (lambda: rf.ContinuousBlock(Linear(), max_steps=0), "max_steps: expected"),
        (lambda: rf.ContinuousBlock(Linear(), adjoint="none"), "adjoint: expected one of checkpointed, backsolve"),
        (lambda: rf.ContinuousBlock(velocity(), event_shape=(2,)), r"event_shape: expected \(3,\), that of the field"),
        (lambda: rf.ContinuousBlock(Linear()).forward(X), "key: expected a PRNG key for the probes"),
        (lambda: rf.ContinuousBlock(Linear()).forward(X, estimator=Own()), "estimator: expected Exact, or Roulette"),
        (lambda: rf.ContinuousBlock(Wrong())(X), r"field: expected an output float64 \(4, 3\) like x, got .*\(4, 1\)"),
        (lambda: velocity(condition_dim=0), "condition_dim: expected"),
        (lambda: rf.VelocityField((0,), rngs=nnx.Rngs(0)), "shape: expected"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


class Own:
    needs_key = False

    def estimate(self, g, x, key):
        return x, x[:, 0]


def test_without_diffrax(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"needs the extra diffrax: pip install 'resflow_jax\[diffrax\]'"):
        rf.ContinuousBlock(Linear())
