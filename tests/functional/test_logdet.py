"""log|det(I + J)|: exact against dense linear algebra, estimates against the exact value and gradient.

An estimator is tested through the loss  sum_b c_b log_det_b + sum sin(3 y), with c of different size and sign: its
value and its gradient in every parameter and every element of x, as one vector. "In expectation" is tested in two ways:
exactly, by summing over all lengths and over probes v with mean(v v^T) = I, and by the mean over thousands of keys.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.flatten_util import ravel_pytree

from resflow_jax.functional import logdet
from resflow_jax.functional.logdet import Exact, Roulette, Truncated, residual
from resflow_jax.functional.roulette import Geometric, Poisson
from tests.functional.contractions import (
    check_two_orders,
    conv_net,
    dense_log_det,
    dense_net,
    dense_series,
    jacobians,
    quick_jit,
    z_scores,
)

NETS = {
    "saturated": partial(dense_net, 0.8),
    "moderate": partial(dense_net, 0.5),
    "small": partial(dense_net, 0.3),
    "conv": partial(conv_net, 0.8),
    "near one": partial(dense_net, 0.98),
    "conv near one": partial(conv_net, 0.98),
}
SLOW = Geometric(0.2)  # finite variance (and fourth moment) for the spectral radius 0.8 of "saturated"
GRADIENTS = ["neumann", "autodiff"]
WEIGHTS = jnp.array([1.5, -0.7, 0.3])


@cache
def net_named(name):
    """(g, params, x), made once, and as concrete arrays even when first asked for under jit."""
    with jax.ensure_compile_time_eval():
        return NETS[name]()


def loss_of(g, params, x, log_det, y):
    return jnp.vdot(WEIGHTS[: len(x)], log_det) + jnp.sum(jnp.sin(3 * y))


def flat_value_and_gradient(g, params, x, value):
    """[log_det, d loss / d params, d loss / d x] as one vector, for value: (params, x) -> (y, log_det)."""

    def loss(params, x):
        y, log_det = value(params, x)
        return loss_of(g, params, x, log_det, y), log_det

    gradient, log_det = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return jnp.concatenate([log_det, ravel_pytree(gradient)[0]])


def estimate(net, estimator, key):
    return flat_value_and_gradient(*net, lambda params, x: residual(net[0], params, x, key=key, estimator=estimator))


def reference(net, log_det=dense_log_det):
    """The same vector by autodiff through dense Jacobians, independent of the package."""
    g, params, x = net
    value = lambda params, x: (x + g(params, x), log_det(g, params, x))  # noqa: E731
    return quick_jit(lambda: flat_value_and_gradient(g, params, x, value))()


@cache
def exact(name):
    """The dense reference of a net."""
    return reference(net_named(name))


@cache
def dense_jacobians(name):
    """dg/dx of every example of a net, [B, D, D]."""
    g, params, x = net_named(name)
    return np.asarray(quick_jit(lambda: jacobians(g, params, x))())


def worst_z(name, estimator, keys=4000):
    """The largest |z| of the mean over keys, over all components of value and gradient."""
    run = quick_jit(jax.vmap(lambda key: estimate(net_named(name), estimator, key)))
    return np.abs(z_scores(run(jax.random.split(jax.random.key(0), keys)), exact(name))).max()


def test_the_nets_are_contractions():
    """|J|_2 < 1 for every example, and near 0.8 for "saturated": there the high orders of the series count."""
    for name in NETS:
        params = net_named(name)[1]
        norms = np.linalg.norm(dense_jacobians(name), 2, axis=(1, 2))
        assert norms.max() <= params["out"][1] < 1
        assert name != "saturated" or norms.max() > 0.79


# Exact


@pytest.mark.parametrize("chunk_size", [3, 64])
@pytest.mark.parametrize("name", ["saturated", "near one", "conv", "conv near one"])
def test_exact_is_slogdet(name, chunk_size):
    """Exact = numpy's slogdet of the dense Jacobian to 1e-10, in chunks of any size; y = x + g(x)."""
    g, params, x = net_named(name)
    y, log_det = quick_jit(lambda p, x: residual(g, p, x, estimator=Exact(chunk_size)))(params, x)
    sign, expected = np.linalg.slogdet(np.eye(x[0].size) + dense_jacobians(name))
    assert np.all(sign == 1)
    np.testing.assert_allclose(log_det, expected, rtol=1e-10)
    np.testing.assert_allclose(y, x + g(params, x), rtol=1e-14)


@pytest.mark.parametrize("name", ["saturated", "near one", "conv near one"])
def test_exact_gradient(name):
    """Its gradient = autodiff through the dense slogdet to 1e-9 = finite differences to 1e-7."""
    g, params, x = net_named(name)
    result = quick_jit(lambda: estimate(net_named(name), Exact(), None))()
    np.testing.assert_allclose(result, exact(name), rtol=1e-9, atol=1e-9)

    flat, unravel = ravel_pytree((params, x))
    direction = np.random.default_rng(1).normal(size=flat.shape)

    @quick_jit
    def loss(flat):
        params, x = unravel(flat)
        y, log_det = residual(g, params, x, estimator=Exact())
        return loss_of(g, params, x, log_det, y)

    near, far = (loss(flat + h * direction) - loss(flat - h * direction) for h in (1e-5, 2e-5))
    slope = (8 * near - far) / 12e-5  # fourth order: near saturation the third derivative is large
    np.testing.assert_allclose(jnp.vdot(result[len(x) :], direction), slope, rtol=1e-7)


# Expectations without sampling


def enumerate_draws(monkeypatch, net, estimator, lengths=(0,)):
    """The estimate for every length and for D orthogonal +-1 probes, whose mean of v v^T is I: [lengths, D, ...]."""
    x = net[2]
    probes = scipy.linalg.hadamard(x[0].size).reshape(-1, *x.shape[1:]).astype(float)

    def one(length, v):
        monkeypatch.setattr(logdet, "_draw_probe", lambda *_: jnp.broadcast_to(v, x.shape))
        for law in (Geometric, Poisson):
            monkeypatch.setattr(law, "sample", lambda self, key, shape: jnp.broadcast_to(length, shape))
        return estimate(net, estimator, jax.random.key(0))

    over_probes = jax.vmap(one, (None, 0))
    return quick_jit(jax.vmap(over_probes, (0, None)))(jnp.asarray(lengths), jnp.asarray(probes))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("terms", [1, 4])
def test_truncated_is_the_truncated_series(monkeypatch, terms, gradient):
    """Averaged over orthogonal probes, value and gradient are those of sum_{k <= n} (-1)^(k+1) tr(J^k) / k."""
    draws = enumerate_draws(monkeypatch, net_named("saturated"), Truncated(terms, gradient=gradient))[0]
    expected = reference(net_named("saturated"), lambda *net: dense_series(*net, terms))
    np.testing.assert_allclose(draws.mean(axis=0), expected, rtol=1e-10, atol=1e-10)


def test_truncated_conv(monkeypatch):
    """The same for convolutions, D = 32."""
    draws = enumerate_draws(monkeypatch, net_named("conv"), Truncated(4))[0]
    expected = reference(net_named("conv"), lambda *net: dense_series(*net, 4))
    np.testing.assert_allclose(draws.mean(axis=0), expected, rtol=1e-10, atol=1e-10)


def test_truncation_bias_shrinks():
    """|bias of the value| <= D L^(n+1) / ((n+1) (1-L)); from 3 to 27 terms that of the gradient falls 90 times."""

    def bias(terms):
        return reference(net_named("saturated"), lambda *net: dense_series(*net, terms)) - exact("saturated")

    worst = []
    for terms in (3, 9, 27):
        error = jnp.abs(bias(terms))
        assert jnp.max(error[:3]) <= 4 * 0.8 ** (terms + 1) / ((terms + 1) * 0.2)
        worst.append(jnp.max(error))
    assert worst[0] > 3 * worst[1] > 90 * worst[2]


@pytest.mark.parametrize(
    ("name", "estimator", "tolerance"),
    [
        ("moderate", Roulette(Geometric(0.5), 0), 1e-10),
        ("moderate", Roulette(Geometric(0.4), 2), 1e-10),
        ("small", Roulette(Poisson(2.0), 3), 1e-10),
        ("moderate", Roulette(Geometric(0.5), 2, gradient="autodiff"), 1e-7),  # leaves out P(N > n) <= 2^-24
        ("small", Roulette(Poisson(2.0), 0, gradient="autodiff"), 1e-6),
    ],
    ids=str,
)
def test_roulette_summed_over_its_law(monkeypatch, name, estimator, tolerance):
    """sum_n P(N = n) * (mean over probes) is the exact value and gradient, to rounding: no sampling."""
    law, lengths = estimator.length, np.arange(60)
    probability = np.asarray(law.survival(lengths) - law.survival(lengths + 1))
    draws = enumerate_draws(monkeypatch, net_named(name), estimator, lengths)
    expectation = np.tensordot(probability, np.asarray(draws).mean(axis=1), 1)
    np.testing.assert_allclose(expectation, exact(name), rtol=tolerance, atol=tolerance)


# Expectations over keys


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("exact_terms", [0, 2, 5])
@pytest.mark.parametrize(("name", "law"), [("saturated", SLOW), ("small", Poisson(2.0))])
def test_roulette_is_unbiased(name, law, exact_terms, samples):
    """Value and Neumann gradient have the exact expectation: |z| < 4 over all components, 4000 keys."""
    probe = "gaussian" if (exact_terms, samples) in {(0, 1), (2, 3)} else "rademacher"
    estimator = Roulette(law, exact_terms, samples, probe)
    assert worst_z(name, estimator) < 4


@pytest.mark.parametrize(
    ("name", "law", "exact_terms", "samples", "probe"),
    [
        ("saturated", SLOW, 0, 3, "rademacher"),
        ("saturated", SLOW, 5, 1, "gaussian"),
        ("small", Poisson(2.0), 2, 3, "gaussian"),
    ],
)
def test_roulette_autodiff_is_unbiased(name, law, exact_terms, samples, probe):
    """The same for the gradient of the estimate itself."""
    estimator = Roulette(law, exact_terms, samples, probe, gradient="autodiff")
    assert worst_z(name, estimator) < 4


@pytest.mark.parametrize("options", [{}, {"exact_terms": 0, "samples": 3, "probe": "gaussian"}], ids=str)
def test_roulette_is_unbiased_for_convolutions(options):
    """The same on [B, 4, 4, 2]: 127 components."""
    assert worst_z("conv", Roulette(Geometric(0.3), **options), keys=1000) < 4


# Power: what the tests above must not let through


def _first_cotangent(original):
    def backward(g, estimator, kept, cotangents):
        y_bar, log_det_bar = cotangents
        return original(g, estimator, kept, (y_bar, jnp.full_like(log_det_bar, log_det_bar[0])))

    return backward


def _no_log_weight(original):
    def draw(estimator, key):
        series = original(estimator, key)
        return series._replace(value_weight=lambda k: k * series.value_weight(k))

    return draw


def _no_roulette_in_gradient(original):
    return lambda estimator, key: original(estimator, key)._replace(neumann_weight=lambda k: jnp.ones(()))


MUTATIONS = {
    "sign": (logdet, "_sign", lambda original: lambda k: -original(k)),
    "no_sign": (logdet, "_sign", lambda original: lambda k: jnp.ones_like(k)),
    "no 1/k": (logdet, "_draw_series", _no_log_weight),
    "survival(k + 1)": (Geometric, "survival", lambda original: lambda self, k: original(self, k + 1)),
    "survival(k - 1)": (Geometric, "survival", lambda original: lambda self, k: original(self, k - 1)),
    "unweighted gradient": (logdet, "_draw_series", _no_roulette_in_gradient),
    "first cotangent for all": (logdet._neumann, "bwd", _first_cotangent),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(monkeypatch, mutation):
    """With one thing wrong the same test of the mean over keys fails, and clearly: |z| > 6."""
    owner, name, mutate = MUTATIONS[mutation]
    monkeypatch.setattr(owner, name, mutate(getattr(owner, name)))
    assert worst_z("saturated", Roulette(SLOW, 0)) > 6


# The two gradients, transformations, pytrees


@pytest.mark.parametrize(
    "options",
    [{"length": SLOW}, {"length": Poisson(2.0), "exact_terms": 0, "samples": 3, "probe": "gaussian"}, {"terms": 7}],
    ids=str,
)
def test_both_gradients_share_their_value(options):
    """For one key "neumann" and "autodiff" draw the same and give the same y and log_det, to 1e-12."""
    kind = Truncated if "terms" in options else Roulette
    g, params, x = net_named("saturated")

    @quick_jit
    @jax.vmap
    def values(key):
        return [residual(g, params, x, key=key, estimator=kind(**options, gradient=gradient)) for gradient in GRADIENTS]

    neumann, autodiff = values(jax.random.split(jax.random.key(0), 50))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), neumann, autodiff)
    assert neumann[1].std() > 0.01


@pytest.mark.parametrize("estimator", [Exact(), Roulette(gradient="autodiff")], ids=str)
def test_two_orders(estimator):
    """Exact, and the "autodiff" estimate for one key, have the derivatives of their own value, to second order."""
    g, params, x = net_named("moderate")

    def loss(params, x):
        y, log_det = residual(g, params, x, key=jax.random.key(3), estimator=estimator)
        return loss_of(g, params, x, log_det, y)

    check_two_orders(loss, params, x)


@pytest.mark.parametrize("estimator", [Exact(), Roulette()], ids=str)
def test_jit_and_vmap(estimator):
    """jit = eager; vmap over batches with a key each = a loop over them; gradient included."""
    g, params, x = net_named("saturated")
    xs, keys = jnp.stack([x, 0.5 * x - 0.1]), jax.random.split(jax.random.key(0), 2)

    def run(x, key):
        return estimate((g, params, x), estimator, key)

    batched, one = quick_jit(jax.vmap(run))(xs, keys), quick_jit(run)
    for n in range(2):
        np.testing.assert_allclose(batched[n], one(xs[n], keys[n]), rtol=1e-12, atol=1e-12)
    eager = residual(g, params, x, key=keys[0], estimator=estimator)
    np.testing.assert_allclose(one(x, keys[0])[: len(x)], eager[1], rtol=1e-12)


@pytest.mark.parametrize("estimator", [Exact(), Roulette()], ids=str)
def test_scan_over_blocks(estimator):
    """A scan over stacked parameters = the chain of blocks in Python, gradient included."""
    g, params, x = dense_net(0.6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.7 * leaf, -0.9 * leaf]), params)
    keys = jax.random.split(jax.random.key(0), 3)

    def scanned(stacked, x):
        def block(x, inputs):
            return residual(g, inputs[0], x, key=inputs[1], estimator=estimator)

        y, log_dets = jax.lax.scan(block, x, (stacked, keys))
        return y, jnp.sum(log_dets, axis=0)

    def chained(stacked, x):
        total = 0.0
        for n in range(3):
            x, log_det = residual(
                g, jax.tree.map(lambda leaf, n=n: leaf[n], stacked), x, key=keys[n], estimator=estimator
            )
            total += log_det
        return x, total

    results = [quick_jit(lambda p, x, f=f: flat_value_and_gradient(g, p, x, f))(stacked, x) for f in (scanned, chained)]
    np.testing.assert_allclose(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("estimator", [Exact(), Roulette(), Truncated(3, gradient="autodiff")], ids=str)
def test_float32(estimator):
    """Dtypes are kept in value and gradient, and the float32 result is the float64 one to 1e-4 for the same draws."""
    wide, narrow = dense_net(0.6), dense_net(0.6, dtype=jnp.float32)
    narrow_result = quick_jit(lambda key: estimate(narrow, estimator, key))(jax.random.key(0))
    assert narrow_result.dtype == jnp.float32
    y, log_det = jax.eval_shape(lambda key: residual(*narrow, key=key, estimator=estimator), jax.random.key(0))
    assert y.dtype == log_det.dtype == jnp.float32
    wide_result = quick_jit(lambda key: estimate(wide, estimator, key))(jax.random.key(0))
    np.testing.assert_allclose(narrow_result, wide_result, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", [Exact(), Roulette()], ids=str)
def test_integer_leaf_in_params(estimator):
    """A pytree may hold integers: the other gradients are unchanged, and the integer's is JAX's float0."""
    g, params, x = net_named("saturated")
    key = jax.random.key(0)

    def with_count(params, x):
        return g(params["net"], x) / params["count"]

    def loss(params, x):
        y, log_det = residual(with_count, params, x, key=key, estimator=estimator)
        return loss_of(g, params, x, log_det, y)

    gradient = quick_jit(jax.grad(loss, allow_int=True))({"net": params, "count": jnp.asarray(1)}, x)
    assert gradient["count"].dtype == jax.dtypes.float0
    expected = quick_jit(lambda: estimate(net_named("saturated"), estimator, key))()[len(x) : -x.size]
    np.testing.assert_allclose(ravel_pytree(gradient["net"])[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("estimator", [Exact(), Roulette()], ids=str)
def test_closed_over_arrays(estimator):
    """The gradient in arrays that g closes over, floats and integers among them, is that in the same params."""
    g, params, x = net_named("saturated")
    key = jax.random.key(0)

    @quick_jit
    def gradient(params, x, count):
        def value(params, x):
            return residual(lambda _, x: g(params, x) / count, None, x, key=key, estimator=estimator)

        return flat_value_and_gradient(g, params, x, value)

    expected = quick_jit(lambda: estimate(net_named("saturated"), estimator, key))()
    np.testing.assert_allclose(gradient(params, x, jnp.asarray(1)), expected, rtol=1e-10, atol=1e-10)


def test_default_estimator_and_rank_one_input():
    """Without an estimator it is Roulette(); x may be [B], one number an example, where Truncated has no noise."""
    g, params, x = net_named("saturated")
    key = jax.random.key(0)
    default, explicit = residual(g, params, x, key=key), residual(g, params, x, key=key, estimator=Roulette())
    np.testing.assert_array_equal(default[1], explicit[1])
    x = jnp.linspace(-1, 1, 5)
    _, log_det = residual(lambda p, x: p * jnp.sin(x), jnp.asarray(0.5), x, key=key, estimator=Truncated(60))
    np.testing.assert_allclose(log_det, jnp.log1p(0.5 * jnp.cos(x)), rtol=1e-12)


# Memory


def gradient_memory(estimator, blocks, batch=64, dim=8, hidden=512):
    """Bytes of temporaries of the gradient of a scan over blocks: parameters and their gradient are not among them."""
    params = jnp.zeros((blocks, dim, hidden)), jnp.zeros((blocks, hidden, dim))

    def g(params, x):
        return jnp.tanh(x @ params[0]) @ params[1]

    def block(x, inputs):
        params, key = inputs
        return (x + g(params, x), 0.0) if estimator is None else residual(g, params, x, key=key, estimator=estimator)

    def loss(params, x, key):
        y, log_dets = jax.lax.scan(block, x, (params, jax.random.split(key, blocks)))
        return jnp.sum(y**2) + jnp.sum(log_dets)

    compiled = quick_jit(jax.grad(loss)).lower(params, jnp.zeros((batch, dim)), jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_neither_with_the_series_nor_with_width():
    """Truncated(40) takes what Truncated(4) takes (5 per cent), 16 blocks of Roulette() what 2 take (10 per cent).

    A block keeps x and w, 2 B D numbers, and none of its B * 512 hidden activations, which are 32 times as many.
    """
    short, long = (gradient_memory(Truncated(terms), 2) for terms in (4, 40))
    shallow, deep = (gradient_memory(Roulette(), blocks) for blocks in (2, 16))
    assert 0 < long <= 1.05 * short
    assert deep <= 1.1 * shallow
    assert deep - shallow <= 14 * 64 * 8 * 8 * 2.5


def test_the_memory_test_has_power():
    """A scan over x + g(x) without a custom gradient keeps hidden activations, and the same measure sees them."""
    shallow, deep = (gradient_memory(None, blocks) for blocks in (2, 16))
    assert deep - shallow >= 14 * 64 * 512 * 8


# Bad input


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("terms", lambda: Truncated(0)),
        ("terms", lambda: Truncated(2.5)),
        ("exact_terms", lambda: Roulette(exact_terms=-1)),
        ("samples", lambda: Roulette(samples=0)),
        ("chunk_size", lambda: Exact(0)),
        ("probe", lambda: Roulette(probe="x")),
        ("probe", lambda: Truncated(probe="x")),
        ("gradient", lambda: Roulette(gradient="x")),
        ("gradient", lambda: Truncated(gradient="x")),
        ("length", lambda: Roulette(length=3)),
        ("length", lambda: Roulette(3)),
    ],
)
def test_bad_estimators(name, make):
    """An estimator refuses a bad setting when it is made, by its name."""
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        make()


def _double(params, x):
    return 0.5 * x


@pytest.mark.parametrize(
    ("name", "g", "x", "options"),
    [
        ("key", _double, jnp.ones, {"estimator": Roulette()}),
        ("key", _double, jnp.ones, {"estimator": Truncated(2)}),
        ("key", _double, jnp.ones, {}),
        ("estimator", _double, jnp.ones, {"estimator": "exact"}),
        ("g", lambda p, x: x[:, :1], jnp.ones, {"estimator": Exact()}),
        ("g", lambda p, x: x.astype(jnp.float32), jnp.ones, {"estimator": Exact()}),
        ("x", _double, lambda shape: jnp.ones(shape, int), {"estimator": Exact()}),
        ("x", _double, lambda shape: jnp.ones(()), {"estimator": Exact()}),
        ("x", _double, lambda shape: [[0.0, 1.0]], {"estimator": Exact()}),
    ],
)
def test_bad_arguments(name, g, x, options):
    """`residual` names the argument that is missing or wrong."""
    with pytest.raises(ValueError, match=f"^{name}: .*expected"):
        residual(g, None, x((2, 3)), **options)
