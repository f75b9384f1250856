"""Layers for bounded data: against dense Jacobians, at the edges of float32, and their errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf

INF = math.inf
TABLE = [-2.0, 0.0, -INF, -INF, 5.0, 0.0], [3.0, INF, 1.0, INF, INF, 1.0]
IMAGE = np.asarray([[[-1.0, 0.0]], [[2.0, -INF]]]), np.asarray([[[1.0, INF]], [[INF, 4.0]]])


def inside(low, high, number, key=0):
    """Values in the intervals, [number, *shape]."""
    low, high = np.broadcast_arrays(np.asarray(low, float), np.asarray(high, float))
    u = np.asarray(jax.random.uniform(jax.random.key(key), (number, *low.shape), minval=0.05, maxval=0.95))
    below = np.where(np.isfinite(high), high, 0) - 2 * u
    above = np.where(np.isfinite(low), low, 0) + 2 * u
    with np.errstate(invalid="ignore"):
        between = low + (high - low) * u
    free = np.where(np.isfinite(high), below, 2 * u - 1)
    return jnp.asarray(np.where(np.isfinite(low), np.where(np.isfinite(high), between, above), free))


# name: (layer, x, y as a function of x in NumPy)
LAYERS = {
    "exp": (rf.Exp(), jax.random.normal(jax.random.key(0), (4, 3)), np.exp),
    "softplus": (rf.Softplus(), 2 * jax.random.normal(jax.random.key(0), (4, 2, 3)), lambda x: np.logaddexp(x, 0)),
    "logarithm": (rf.Invert(rf.Exp()), inside([0.0] * 3, INF, 4), np.log),
    "inverse of softplus": (rf.Invert(rf.Softplus()), inside([0.0] * 3, INF, 4), lambda x: np.log(np.expm1(x))),
    "logit": (rf.Logit(0.05, -2.0, 3.0), inside([-2.0] * 3, 3.0, 4), lambda x: logit(0.05, x, -2, 3)),
    "logit by column": (
        rf.Logit(0.01, [-2.0, 0.0, 100.0], [3.0, 0.5, 101.0]),
        inside([-2.0, 0.0, 100.0], [3.0, 0.5, 101.0], 4),
        lambda x: logit(0.01, x, np.asarray([-2.0, 0.0, 100.0]), np.asarray([3.0, 0.5, 101.0])),
    ),
    "exp of a logit's inverse": (
        rf.Chain([rf.Invert(rf.Logit(0.1, -1, 1)), rf.Exp()]),
        jax.random.normal(jax.random.key(0), (4, 3)),
        lambda x: np.exp(-1 + 2 * (1 / (1 + np.exp(-x)) - 0.1) / 0.8),
    ),
    "table": (rf.Bounded(*TABLE, alpha=0.05), inside(*TABLE, 4), lambda x: bounded(x, *TABLE, np.log)),
    "table by softplus": (
        rf.Bounded(*TABLE, alpha=0.05, one_sided="softplus"),
        inside(*TABLE, 4),
        lambda x: bounded(x, *TABLE, lambda d: np.log(np.expm1(d))),
    ),
    "array": (rf.Bounded(*IMAGE, alpha=0.05), inside(*IMAGE, 3), lambda x: bounded(x, *IMAGE, np.log)),
    "positive": (rf.Bounded(0, INF), inside([0.0] * 3, INF, 4), np.log),
    "negative": (rf.Bounded(-INF, 0.0), inside([-INF] * 3, 0.0, 4), lambda x: -np.log(-x)),
    "nowhere bounded": (rf.Bounded(-INF, INF), inside([-INF] * 3, INF, 4), lambda x: x),
}


def logit(alpha, x, low, high):
    s = alpha + (1 - 2 * alpha) * (x - low) / (high - low)
    return np.log(s / (1 - s))


def bounded(x, low, high, one_sided):
    """The formulas of the docstring for each number, with alpha = 0.05."""
    y, low, high = np.empty(x.shape), np.broadcast_to(low, x.shape), np.broadcast_to(high, x.shape)
    for place in np.ndindex(x.shape):
        a, b, value = low[place], high[place], x[place]
        if np.isfinite(a) and np.isfinite(b):
            y[place] = logit(0.05, value, a, b)
        elif np.isfinite(a):
            y[place] = one_sided(value - a)
        else:
            y[place] = -one_sided(b - value) if np.isfinite(b) else value
    return y


def jacobians(function, x):
    dim = x[0].size
    return jax.jit(jax.vmap(jax.jacfwd(lambda e: function(e[None])[0].ravel())))(x).reshape(len(x), dim, dim)


@pytest.mark.parametrize("name", LAYERS)
def test_values_inverse_and_log_det(name):
    """y by NumPy, f^-1(f(x)) = x, log-det and inverse log-det as of the dense Jacobian, bounds, x in the domain."""
    layer, x, expected = LAYERS[name]

    @jax.jit
    def run(x):
        y, log_det = layer.forward(x)
        flow_inverse = layer.solve_and_estimate(y, None, rf.Exact(), rf.Anderson(), None)
        return y, log_det, layer.inverse(y), flow_inverse[0], flow_inverse[1], jacobians(layer, x), layer(x)

    y, log_det, back, again, inverse_log_det, matrices, called = run(x)
    np.testing.assert_allclose(y, expected(np.asarray(x)), rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(called, y)
    for found in (back, again):
        np.testing.assert_allclose(found, x, rtol=1e-12, atol=1e-12)
    slogdet = np.linalg.slogdet(matrices)[1]
    np.testing.assert_allclose(log_det, slogdet, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(inverse_log_det, slogdet, rtol=1e-11, atol=1e-11)
    forward, inverse = layer.lipschitz_bounds()
    singular_values = np.linalg.svd(matrices, compute_uv=False)
    assert singular_values.max() <= forward * (1 + 1e-12) and 1 / singular_values.min() <= inverse * (1 + 1e-12)
    domain = layer.domain(x.dtype)
    assert (domain.low <= np.asarray(x)).all() and (np.asarray(x) <= domain.high).all()
    codomain = layer.codomain(x.dtype)
    assert (codomain.low <= np.asarray(y)).all() and (np.asarray(y) <= codomain.high).all()
    assert layer.output_shape(x.shape[1:]) == x.shape[1:]


def test_a_stack_has_the_intervals_of_its_layers():
    """Of x and of y: its inverse takes what it returns, and refuses the rest."""
    layer = rf.Softplus()
    stack = rf.ResidualStack(lambda rngs: rf.Softplus(), 2, rngs=nnx.Rngs(0))
    assert (stack.domain(float), stack.codomain(float)) == (layer.domain(float), layer.codomain(float))
    assert (stack.support, stack.image) == (layer.support, layer.image)
    flow = rf.Flow(rf.Invert(stack), event_shape=(2,))
    assert np.isfinite(flow(stack(jnp.ones((1, 2))))).all()
    with pytest.raises(ValueError, match="x: expected"):
        flow(-jnp.ones((1, 2)))


def test_lipschitz_bounds_are_attained():
    """By a logit with bounds, at the ends and in the middle, as by that of [0, 1]."""
    layer = rf.Logit(0.05, [-2.0, 1.0], [3.0, 1.5])
    x = jnp.asarray([[-2.0, 1.0], [0.5, 1.25], [3.0, 1.5]])
    slopes = np.stack([np.diag(m) for m in jacobians(layer, x)])
    forward, inverse = layer.lipschitz_bounds()
    np.testing.assert_allclose((slopes.max(), 1 / slopes.min()), (forward, inverse), rtol=1e-10)
    assert rf.Bounded([0, 0], [1, INF]).lipschitz_bounds() == (INF, INF)
    found = rf.Bounded([0, 0], [2, INF], alpha=0.05, one_sided="softplus").lipschitz_bounds()
    np.testing.assert_allclose(found, (INF, max(1.0, 2 / (4 * 0.9))))


def test_a_column_of_zero_to_one_is_the_plain_logit():
    """With scalar bounds [0, 1] the values are equal in every bit, with an array of bounds up to rounding."""
    x = jax.random.uniform(jax.random.key(0), (20, 3))
    y, log_det = rf.Logit(0.05).forward(x)
    for found in (rf.Logit(0.05, 0, 1).forward(x), rf.Logit(0.05, 0.0, 1.0).forward(x)):
        np.testing.assert_array_equal(found[0], y)
        np.testing.assert_array_equal(found[1], log_det)
    found = rf.Logit(0.05, np.zeros(3), 1.0).forward(x)
    np.testing.assert_allclose(found[0], y, rtol=1e-13)
    np.testing.assert_allclose(found[1], log_det, rtol=1e-13)


EDGES = {
    "exp": lambda: rf.Invert(rf.Exp()),
    "softplus": lambda: rf.Invert(rf.Softplus()),
    "logit far from zero": lambda: rf.Logit(1e-6, [1000.0, -1001.0, -1.0, 1e6], [1001.0, -1000.0, 0.0, 1e6 + 1]),
    "logit of rounded ends": lambda: rf.Logit(0.01, [1000.0, -1001.7, 1e4, 77.7], [1001.3, -1000.0, 1e4 + 3, 77.8]),
    "logit near zero": lambda: rf.Logit(1e-6, [0.0, -1e-3, -1e30, 0.1], [1e-30, 0.0, 1e30, 0.3]),
    "logit of large alpha": lambda: rf.Logit(0.4, [0.0, -1e-3, -10.0, 100.0], [1e-3, 0.0, 10.0, 100.3]),
    "table": lambda: rf.Bounded([0.0, -INF, 1000.0, -INF], [INF, 0.0, INF, 0.1]),
    "table by softplus": lambda: rf.Bounded([0.0, -INF, -1e30, 0.0], [INF, 1e30, INF, 1.0], one_sided="softplus"),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", EDGES)
def test_own_samples_are_inside_and_finite(name, compiled):
    """In float32, with all optimisations: of every y the inverse is in the domain; f and its derivatives are finite."""
    optimizes = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    wrap = jax.jit if compiled else lambda function: function
    try:
        with jax.enable_x64(False):
            layer = EDGES[name]()
            y = np.concatenate([-np.geomspace(3e38, 1e-3, 200), [0.0], np.geomspace(1e-3, 3e38, 200)])
            y = jnp.asarray(np.stack([y] * 4, axis=1), jnp.float32)

            def back(y):
                return layer.inverse(y), jax.grad(lambda y: layer.inverse(y).sum())(y)

            def both(x):
                y, log_det = layer.forward(x)
                return y, log_det

            def forth(x):
                derivative = jax.grad(lambda x: sum(part.sum() for part in both(x)))(x)
                return *both(x), derivative, jax.grad(lambda x: layer(x).sum())(x)

            x, slope = wrap(back)(y)
            assert x.dtype == jnp.float32 and jnp.isfinite(x).all()
            domain = layer.domain(x.dtype)
            assert (np.asarray(domain.low) <= np.asarray(x)).all() and (np.asarray(x) <= np.asarray(domain.high)).all()
            assert (np.diff(x, axis=0) >= 0).all()
            again, log_det, derivative, slopes = wrap(forth)(x)
            for found in (slope, again, log_det, derivative):
                assert found.dtype == jnp.float32 and jnp.isfinite(found).all()
            # x is told from its neighbours by a rounding: that times dy/dx is what y may have lost.
            slopes = np.asarray(slopes, float)
            lost = 8 * np.spacing(np.abs(np.asarray(x))).astype(float) * slopes + 1e-5
            middle = (np.abs(np.asarray(y)) < 5) & (slopes > 0)  # farther out x may count as a number inside
            assert middle.sum(axis=0).min() > 5
            assert (np.abs(np.asarray(again, float) - np.asarray(y, float)) <= lost)[middle].all()
    finally:
        jax.config.update("jax_disable_most_optimizations", optimizes)


@pytest.mark.parametrize("x", [0.0, -0.0, -1.0, -INF, math.nan])
def test_what_is_not_positive_is_nan_when_traced(x):
    """Beyond the domain nothing else comes out, whether as log of positive data or as a bounded column."""
    for layer in (rf.Invert(rf.Exp()), rf.Invert(rf.Softplus()), rf.Bounded(0, INF), rf.Bounded([0], [INF])):
        assert jnp.isnan(jax.jit(layer)(jnp.asarray([[x]]))).all()
    for layer in (rf.Bounded([2], [4]), rf.Bounded(2, 4)):
        y, log_det = layer.forward(jnp.asarray([[x]]))
        assert jnp.isnan(y).all() and jnp.isnan(log_det).all()


def test_derivatives_of_a_table_with_other_kinds_beside():
    """A value that one kind could not take does not spoil the derivatives of its column, which is of another kind."""
    layer = rf.Bounded(*TABLE, alpha=0.05)
    x = jnp.asarray([[-2.0, 1e8, -1e8, -5.0, 1e8, 0.0]])
    y, log_det = layer.forward(x)
    gradient = jax.grad(lambda x: layer.forward(x)[1][0] + layer(x).sum())(x)
    assert all(jnp.isfinite(found).all() for found in (y, log_det, gradient))


FLOWS = {
    "table": (lambda: rf.Chain([rf.Bounded([0.0, -1.0, -INF], [INF, 2.0, INF]), rf.ActNorm((3,))]), (3,)),
    "positive": (lambda: rf.Chain([rf.Invert(rf.Softplus()), rf.ActNorm((2,))]), (2,)),
    "logit": (lambda: rf.Logit(0.05, -1.0, 3.0), (2,)),
    "logit by column": (lambda: rf.Logit(0.05, [-1.0, 0.0], [3.0, 0.1]), (2,)),
}


@pytest.mark.parametrize("name", FLOWS)
def test_samples_of_a_flow_are_inside(name):
    """Clipped to the ends, in every leading axis; the log-density of samples is finite."""
    make, shape = FLOWS[name]
    flow = rf.Flow(make(), rf.StandardNormal(shape))
    samples = flow.sample(jax.random.key(0), (20, 50), temperature=3.0)
    low, high = (np.asarray(end) for end in flow.support)
    assert samples.shape == (20, 50, *shape)
    assert (low <= np.asarray(samples)).all() and (np.asarray(samples) <= high).all()
    assert jnp.isfinite(flow.log_prob(samples.reshape(-1, *shape), estimator=rf.Exact())).all()


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (rf.Invert(rf.Exp()), [[1.0, 0.0]], r"x: expected values in \(0, inf\), got \[0\.0, 1\.0\]$"),
        (rf.Bounded([0, 1], [INF, 2]), [[1.0, 1.5], [-3.0, 1.5]], r"in \(0, inf\) in column 0, got \[-3\.0, 1\.0\]$"),
        (rf.Bounded([0, 1], [INF, 2]), [[1.0, 1.5], [3.0, 2.5]], r"in \[1, 2\] in column 1, got \[1\.5, 2\.5\]$"),
        (rf.Bounded([-INF, 1], [0, 2]), [[0.0, 1.5], [-1, 1.5]], r"in \(-inf, 0\) in column 0, got \[-1\.0, 0\.0\]$"),
        (rf.Logit(0.05, [0, 1], [1, 2]), [[1.0, 2.5]], r"in \[1, 2\] in column 1, got \[2\.5, 2\.5\], beyond it"),
        (rf.Logit(0.05, 1, 2), [[1.0, 2.5]], r"in \[1, 2\], got \[1\.0, 2\.5\], beyond it by more than alpha"),
        (rf.Bounded(0, 1), [[1.0, 2.5]], r"in \[0, 1\], got \[1\.0, 2\.5\]$"),
    ],
)
def test_values_outside(layer, x, message):
    """Named with their column, interval and range, also where the array is of NumPy."""
    flow = rf.Flow(layer, rf.StandardNormal((2,)))
    for x_ in (np.asarray(x), jnp.asarray(x)):
        with pytest.raises(ValueError, match=message):
            flow.log_prob(x_, estimator=rf.Exact())


def test_values_outside_of_an_array_of_bounds():
    flow = rf.Flow(rf.Bounded(*IMAGE), rf.StandardNormal((2, 1, 2)))
    x = np.array(inside(*IMAGE, 3))
    x[1, 1, 0, 1] = 4.5
    with pytest.raises(ValueError, match=r"in \(-inf, 4\) at \(1, 0, 1\), got \["):
        flow.log_prob(x, estimator=rf.Exact())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rf.Bounded([0, 1], [1, 1]), "high: expected numbers above low, got 1.0 above 1.0 at 1"),
        (lambda: rf.Bounded(2, 1), "high: expected numbers above low, got 1.0 above 2.0$"),
        (lambda: rf.Bounded([0, 1], [1, 2, 3]), r"high: .* broadcasts with low, of shape \(2,\), got shape \(3,\)"),
        (lambda: rf.Bounded([0, math.nan], 1), "low: expected numbers, got NaN"),
        (lambda: rf.Bounded("a", 1), "low: expected numbers, got 'a'"),
        (lambda: rf.Bounded(0, 1, one_sided="exp"), "one_sided: expected one of log, softplus; got 'exp'"),
        (lambda: rf.Bounded(0, 1, alpha=0.7), "alpha: expected a number in"),
        (lambda: rf.Logit(0.1, 0, INF), "high: expected finite numbers, got inf; rf.Bounded takes infinite ones"),
        (lambda: rf.Logit(0.1, [0, -INF], 1), "low: expected finite numbers"),
        (lambda: rf.Flow(rf.Bounded([0, 1], 2), rf.StandardNormal((3,))), r"shape ends in \(2,\), got \(3,\)"),
        (
            lambda: rf.Logit(0.1, 1.0, 1.0 + 1e-9)(jnp.ones((1, 1), jnp.float32)),
            "high: expected ends that differ in float32",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_density_over_a_table_integrates_to_one():
    """Columns (0, inf) and [-1, 2] and then a residual block: the sum over a fine grid of x, which ends beyond."""
    g = rf.LipschitzMLP(2, (8,), coefficient=0.9, rngs=nnx.Rngs(0))
    for linear in g.linears:
        linear.kernel[...] *= 3
        linear.update_norm()
    table = rf.Bounded([0.0, -1.0], [INF, 2.0], alpha=0.01)
    flow = rf.Flow(rf.Chain([table, rf.ResidualBlock(g)]), rf.DiagonalNormal((2,)))
    # A trapezoid rule in log x, and the midpoints of what the logit's alpha reaches.
    log_x = np.linspace(-9, 9, 241)
    delta = 3 * 0.01 / 0.98
    edges = np.linspace(-1 - delta, 2 + delta, 242)
    x = np.stack(np.meshgrid(np.exp(log_x), (edges[1:] + edges[:-1]) / 2, indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(flow.log_prob(jnp.asarray(x), estimator=rf.Exact()))
    total = np.sum(density * x[:, 0]) * (log_x[1] - log_x[0]) * (edges[1] - edges[0])
    np.testing.assert_allclose(total, 1, atol=2e-3)
