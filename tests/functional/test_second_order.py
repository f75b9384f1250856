"""Hessian-vector products of the Neumann estimate: against exact ones, and unbiased over keys."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

import resflow_jax as rf
from tests.functional.estimates import of_keys

pytestmark = pytest.mark.filterwarnings("ignore:length. Geometric:RuntimeWarning")  # short laws; J is small here
RNG = np.random.default_rng(0)
A, B = (jnp.asarray(0.85 * w / np.linalg.norm(w, 2)) for w in (RNG.normal(size=shape) for shape in ((3, 4), (4, 3))))
X, CONDITION, CLOSED_OVER = (jnp.asarray(RNG.normal(size=shape)) for shape in ((4, 3), (4, 4), (3,)))
KEY = jax.random.key(3)
# With all probes of an orthogonal basis and this many exact terms the estimate is exact.
ALL = {"exact_terms": 60, "probe": "orthogonal", "probes": 3, "second_order": True}
EXACT = rf.Roulette(rf.Geometric(0.5), minres_steps=0, trace_probes=1, **ALL)
POWER_SERIES = {"minres_steps": 0, "second_order": True}
# the solver that compiles fastest; a rough solution is enough where there is noise
MAPS = {
    "residual": rf.residual,
    "monotone": partial(rf.monotone, solver=rf.FixedPoint(tolerance=1e-13)),
    "rough monotone": partial(rf.monotone, solver=rf.FixedPoint(tolerance=1e-5)),
}
every_map = pytest.mark.parametrize("form", ["residual", "monotone"])


def g(params, x, condition):
    a, b = params
    return jnp.tanh(x @ a + condition) @ b + 0.1 * jnp.sin(x) * CLOSED_OVER[None]


LINEAR, NONLINEAR = (1.0, 0.0), (0.0, 1.0)  # weights of log_det and of a nonlinear function of it and y


def hessian_vector_product(form, estimator, key, weights, chunk_size=None):
    """The gradient of <gradient of the summed function, fixed directions> in params, x and condition."""

    def loss(params, x, condition):
        options = {"condition": condition, "key": key, "estimator": estimator, "chunk_size": chunk_size}
        y, log_det = MAPS[form](g, params, x, **options, lipschitz=0.9)
        nonlinear = jnp.sin(log_det) + jnp.sum(jnp.cos(y), axis=1) * log_det
        return jnp.sum(weights[0] * log_det + weights[1] * nonlinear)

    def along(*args):
        gradients = jax.grad(loss, (0, 1, 2))(*args)
        return sum(
            jnp.vdot(jnp.cos(arg), part) for arg, part in zip(*map(jax.tree.leaves, (args, gradients)), strict=True)
        )

    return jax.value_and_grad(along, (0, 1, 2))((A, B), X, CONDITION)


@cache
def exact_product(form):
    """One program for all functions: of their weights."""
    return jax.jit(lambda weights: hessian_vector_product(form, rf.Exact(), None, weights))


def check(found, expected, tolerance=1e-10):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("form", "chunk_size"), [("residual", 2), ("monotone", 2)])
def test_exact_where_the_estimate_is(form, chunk_size):
    """In params, x and condition at once, of a nonlinear function of y and log_det."""
    found = jax.jit(lambda: hessian_vector_product(form, EXACT, KEY, NONLINEAR, chunk_size))()
    check(found, exact_product(form)(NONLINEAR), 1e-10 if form == "residual" else 1e-8)


@pytest.mark.parametrize(
    ("form", "estimator"),
    [
        ("residual", rf.Roulette(second_order=True)),
        ("residual", rf.Roulette(rf.Geometric(0.5), 0, 2, "gaussian", probes=2, subsample=2, **POWER_SERIES)),
        ("rough monotone", rf.Roulette(exact_terms=0, second_order=True)),
    ],
    ids=["default", "gaussian, samples", "monotone"],
)
def test_unbiased(form, estimator):
    """The mean over 4000 keys is within five standard errors of the exact product, in every element."""

    draw = of_keys(lambda key: hessian_vector_product(form, estimator, key, LINEAR))
    draws, expected = draw(jax.random.split(KEY, 4000)), exact_product(form.removeprefix("rough "))(LINEAR)
    for drawn, exact in zip(*map(jax.tree.leaves, (draws, expected)), strict=True):
        error = jnp.std(drawn, axis=0) / np.sqrt(len(drawn))
        assert np.all(np.abs(jnp.mean(drawn, axis=0) - exact) < 5 * error + 1e-12)
        assert np.max(error) < 0.2 * np.max(np.abs(exact))  # the check has power


def test_both_series_have_lengths_of_their_own():
    """log(1 + p) of the map p x on the line: with one length for both series its second derivative would be -6, not -4.

    At p = -1/2 the weighted terms of the power series are all 1, so the two sums are 1 + N for lengths N of mean 1 and
    variance 2.
    """
    estimator = rf.Roulette(rf.Geometric(0.5), 0, minres_steps=0, second_order=True)

    def log_det(p, key):
        return rf.residual(lambda p, x: p * x, p, jnp.ones((1, 1)), key=key, estimator=estimator)[1][0]

    second = jax.jit(jax.vmap(jax.grad(jax.grad(log_det)), (None, 0)))(-0.5, jax.random.split(KEY, 20000))
    assert abs(jnp.mean(second) + 4) < 5 * jnp.std(second) / np.sqrt(20000) < 0.5


def test_shard_map():
    """Two devices that share a batch get the second derivative of one, in parameters and in x."""
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    x, condition = X[:4], CONDITION[:4]

    def along(a, x, condition):
        def loss(a, x):
            estimator = rf.Roulette(exact_terms=0, second_order=True)
            return jnp.sum(rf.residual(g, (a, B), x, condition=condition, key=KEY, estimator=estimator)[1])

        return jnp.sum(jax.grad(loss, 1)(a, x) * jnp.cos(x))

    def of_part(a, x, condition):
        return jax.lax.psum(along(a, x, condition), "data")

    batch = PartitionSpec("data")
    parts = jax.shard_map(
        jax.grad(of_part, (0, 1)),
        mesh=mesh,
        in_specs=(PartitionSpec(), batch, batch),
        out_specs=(PartitionSpec(), batch),
    )
    check(jax.jit(parts)(A, x, condition), jax.jit(jax.grad(along, (0, 1)))(A, x, condition), 1e-12)


def test_value_and_gradient_are_those_without():
    """The same key gives the same value and first gradient as with second_order=False."""

    def found(second_order):
        estimator = rf.Roulette(exact_terms=0, second_order=second_order)
        residual = jax.value_and_grad(
            lambda x: jnp.sum(jnp.sin(rf.residual(g, (A, B), x, condition=CONDITION, key=KEY, estimator=estimator)[1]))
        )
        return jax.jit(residual)(X)

    check(found(True), found(False), 1e-14)


@every_map
def test_memory_does_not_grow_with_the_series(form):
    """The compiled product of long series needs as much temporary memory as that of short ones."""

    def temporary(terms):
        estimator = rf.Roulette(rf.Geometric(0.5), exact_terms=terms, minres_steps=0, second_order=True)

        def along(x):
            loss = lambda x: jnp.sum(MAPS[form](wide, 0.5, x, key=KEY, estimator=estimator)[1])  # noqa: E731
            return jnp.sum(jax.grad(loss)(x) * jnp.cos(x))

        return jax.jit(jax.grad(along)).lower(jnp.ones((100, 50))).compile().memory_analysis().temp_size_in_bytes

    def wide(scale, x):
        return scale * jnp.sin(x)

    assert temporary(40) == temporary(2)


def test_flow():
    """A whole flow: the score's squared norm, as in score matching, has the exact gradient in the parameters,
    along a direction of all of them.

    An implicit block is a residual block and the inverse of another one.
    """
    flow = rf.ResidualFlow(rf.VectorFlowConfig(3, 2, (4,), block="implicit"), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(flow)
    state = jax.tree.map(
        lambda leaf: leaf.astype("float64") if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state
    )

    def loss(state, estimator):
        flow = nnx.merge(graphdef, state)
        score = jax.grad(lambda x: jnp.sum(flow.log_prob(x, key=KEY, estimator=estimator)))(X)
        return jnp.mean(jnp.square(score))

    floats, unravel = ravel_pytree(nnx.filter_state(state, nnx.Param))

    def of_floats(floats, estimator):
        return loss(nnx.merge_state(state, unravel(floats)), estimator)

    found = jax.jit(jax.grad(lambda floats: of_floats(floats, EXACT)))(floats)
    # forward mode: JAX below 0.12 cannot differentiate a solve inside of a scan twice in reverse mode
    direction = jnp.cos(jnp.arange(1.0, 1 + floats.size))
    slope = jax.jit(lambda *args: jax.jvp(lambda floats: of_floats(floats, rf.Exact()), *args)[1])
    np.testing.assert_allclose(found @ direction, slope((floats,), (direction,)), rtol=1e-8)


def test_what_has_no_rule_raises():
    """Forward mode, forward over reverse, and third order."""

    def log_det(x):
        return jnp.sum(
            rf.residual(
                g, (A, B), x, condition=CONDITION, key=KEY, estimator=rf.Roulette(exact_terms=0, second_order=True)
            )[1]
        )

    first = lambda x: jax.jvp(log_det, (x,), (x,))  # noqa: E731
    mixed = lambda x: jax.jvp(jax.grad(log_det), (x,), (x,))  # noqa: E731
    twice = jax.grad(lambda x: jnp.sum(jax.grad(log_det)(x) * X))
    third = jax.grad(lambda x: jnp.sum(twice(x) * X))
    for function in (first, mixed):
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jit(function).lower(X)
    with pytest.raises(ValueError, match="reverse-mode derivatives of second order"):
        jax.eval_shape(third, X)


def test_settings():
    """Only the Neumann gradient needs it."""
    with pytest.raises(ValueError, match='second_order: expected False with gradient="autodiff", got True'):
        rf.Roulette(gradient="autodiff", second_order=True)
