"""log|det(I + J)|: exact against dense linear algebra; transformations, laws, memory and errors of all estimators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from resflow_jax.functional.estimators import Exact, Roulette, Truncated
from resflow_jax.functional.length_laws import Defensive, Fitted, Geometric, Poisson
from resflow_jax.functional.logdet import residual
from tests.functional.contractions import (
    check_two_orders,
    dense_net,
)
from tests.functional.estimates import (
    GRADIENTS,
    NETS,
    PAPERS,
    SAFE,
    SLOW,
    dense_jacobians,
    estimate,
    exact,
    flat_value_and_gradient,
    loss_of,
    net_named,
)


def test_the_nets_are_contractions():
    """|J|_2 < 1 for every example, and near 0.8 for "saturated": there the high orders of the series count."""
    for name in NETS:
        params = net_named(name)[1]
        norms = np.linalg.norm(dense_jacobians(name), 2, axis=(1, 2))
        assert norms.max() <= params["out"][-1] < 1
        assert name != "saturated" or norms.max() > 0.79


def test_the_nonsymmetric_net_is_not_easy():
    """|J - J^T| > |J| / 2, and all eigenvalues differ: eight products for polynomials of J, and |J| is about 0.7."""
    for j in dense_jacobians("nonsymmetric"):
        norm, eigenvalues = np.linalg.norm(j, 2), np.linalg.eigvals(j)
        assert 0.6 < norm < 0.75
        assert np.linalg.norm(j - j.T, 2) > norm / 2
        distances = np.abs(eigenvalues[:, None] - eigenvalues) + np.eye(8)
        assert distances.min() > 1e-2


# Exact


@pytest.mark.parametrize("chunk_size", [3, 64])
@pytest.mark.parametrize("name", ["saturated", "near one", "conv", "conv near one"])
def test_exact_is_slogdet(name, chunk_size):
    """Exact = numpy's slogdet of the dense Jacobian to 1e-10, in chunks of any size; y = x + g(x)."""
    g, params, x = net_named(name)
    y, log_det = jax.jit(lambda p, x: residual(g, p, x, estimator=Exact(chunk_size)))(params, x)
    sign, expected = np.linalg.slogdet(np.eye(x[0].size) + dense_jacobians(name))
    assert np.all(sign == 1)
    np.testing.assert_allclose(log_det, expected, rtol=1e-10)
    np.testing.assert_allclose(y, x + g(params, x), rtol=1e-14)


@pytest.mark.parametrize("name", ["saturated", "near one", "conv near one"])
def test_exact_gradient(name):
    """Its gradient = autodiff through the dense slogdet to 1e-9 = finite differences to 1e-7."""
    g, params, x = net_named(name)
    result = jax.jit(lambda: estimate(net_named(name), Exact(), None))()
    np.testing.assert_allclose(result, exact(name), rtol=1e-9, atol=1e-9)

    flat, unravel = ravel_pytree((params, x))
    direction = np.random.default_rng(1).normal(size=flat.shape)

    @jax.jit
    def loss(flat):
        params, x = unravel(flat)
        y, log_det = residual(g, params, x, estimator=Exact())
        return loss_of(g, params, x, log_det, y)

    near, far = (loss(flat + h * direction) - loss(flat - h * direction) for h in (1e-5, 2e-5))
    slope = (8 * near - far) / 12e-5  # fourth order: near saturation the third derivative is large
    np.testing.assert_allclose(jnp.vdot(result[len(x) :], direction), slope, rtol=1e-7)


# The two gradients, transformations, pytrees


@pytest.mark.parametrize(
    "options",
    [
        {"length": SLOW, "exact_terms": 2, "minres_steps": 0},
        {"length": Poisson(2.0), "minres_steps": 0, "samples": 3, "probe": "gaussian"},
        {"length": SAFE, "minres_steps": 2, "probe": "orthogonal", "probes": 3},
        {"terms": 7, "probes": 2},
    ],
    ids=str,
)
def test_both_gradients_share_their_value(options):
    """For one key "neumann" and "autodiff" draw the same and give the same y and log_det, to 1e-12."""
    kind = Truncated if "terms" in options else Roulette
    g, params, x = net_named("saturated")

    @jax.jit
    @jax.vmap
    def values(key):
        return [residual(g, params, x, key=key, estimator=kind(**options, gradient=gradient)) for gradient in GRADIENTS]

    neumann, autodiff = values(jax.random.split(jax.random.key(0), 50))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), neumann, autodiff)
    assert neumann[1].std() > 0.01


@pytest.mark.parametrize(
    "estimator",
    [
        Exact(),
        Roulette(Geometric(0.5), 2, minres_steps=0, gradient="autodiff"),
        Roulette(SAFE, minres_steps=2, gradient="autodiff"),
    ],
    ids=str,
)
def test_two_orders(estimator):
    """Exact, and the "autodiff" estimate for one key, have the derivatives of their own value, to second order."""
    g, params, x = net_named("moderate")

    def loss(params, x):
        y, log_det = residual(g, params, x, key=jax.random.key(3), estimator=estimator)
        return loss_of(g, params, x, log_det, y)

    check_two_orders(loss, params, x)


@pytest.mark.parametrize("estimator", [Exact(), PAPERS, Roulette(probes=2)], ids=str)
def test_jit_and_vmap(estimator):
    """jit = eager; vmap over batches with a key each = a loop over them; gradient included."""
    g, params, x = net_named("saturated")
    xs, keys = jnp.stack([x, 0.5 * x - 0.1]), jax.random.split(jax.random.key(0), 2)

    def run(x, key):
        return estimate((g, params, x), estimator, key)

    batched, one = jax.jit(jax.vmap(run))(xs, keys), jax.jit(run)
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

    results = [jax.jit(lambda p, x, f=f: flat_value_and_gradient(g, p, x, f))(stacked, x) for f in (scanned, chained)]
    np.testing.assert_allclose(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("estimator", [Exact(), PAPERS, Roulette(), Truncated(3, gradient="autodiff")], ids=str)
def test_float32(estimator):
    """Dtypes are kept in value and gradient, and the float32 result is the float64 one to 1e-4 for the same draws."""
    wide, narrow = dense_net(0.6), dense_net(0.6, dtype=jnp.float32)
    narrow_result = jax.jit(lambda key: estimate(narrow, estimator, key))(jax.random.key(0))
    assert narrow_result.dtype == jnp.float32
    y, log_det = jax.eval_shape(lambda key: residual(*narrow, key=key, estimator=estimator), jax.random.key(0))
    assert y.dtype == log_det.dtype == jnp.float32
    wide_result = jax.jit(lambda key: estimate(wide, estimator, key))(jax.random.key(0))
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

    gradient = jax.jit(jax.grad(loss, allow_int=True))({"net": params, "count": jnp.asarray(1)}, x)
    assert gradient["count"].dtype == jax.dtypes.float0
    expected = jax.jit(lambda: estimate(net_named("saturated"), estimator, key))()[len(x) : -x.size]
    np.testing.assert_allclose(ravel_pytree(gradient["net"])[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("estimator", [Exact(), Roulette(probes=2)], ids=str)
def test_closed_over_arrays(estimator):
    """The gradient in arrays that g closes over, floats and integers among them, is that in the same params."""
    g, params, x = net_named("saturated")
    key = jax.random.key(0)

    @jax.jit
    def gradient(params, x, count):
        def value(params, x):
            return residual(lambda _, x: g(params, x) / count, None, x, key=key, estimator=estimator)

        return flat_value_and_gradient(g, params, x, value)

    expected = jax.jit(lambda: estimate(net_named("saturated"), estimator, key))()
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


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=lambda dtype: dtype.__name__)
def test_a_series_that_has_ended_goes_on(dtype, gradient):
    """Long after the last of four eigenvalues the estimate is v^T log(I + J) v, and its gradient is finite.

    With four orthogonal probes value and gradient are the exact ones: 1e-9, 1e-3 in float32.
    """
    estimator = Roulette(exact_terms=60, probe="orthogonal", probes=4, gradient=gradient)
    net = dense_net(0.8, dtype=dtype)
    result = jax.jit(lambda key: estimate(net, estimator, key))(jax.random.key(1))
    tolerance = 1e-9 if dtype == jnp.float64 else 1e-3
    np.testing.assert_allclose(result, exact("saturated"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_zero_residual(gradient):
    """g = 0 has log_det = 0 without noise, and the gradient of log_det = D log(1 + p) in p is exactly D."""

    def log_det(p):
        x, key, estimator = jnp.ones((3, 5)), jax.random.key(0), Roulette(exact_terms=30, gradient=gradient)
        return residual(lambda p, x: p * x, p, x, key=key, estimator=estimator)[1]

    value, gradient = jax.jit(lambda p: (log_det(p), jax.grad(lambda p: log_det(p).sum())(p)))(jnp.asarray(0.0))
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_allclose(gradient, 15, rtol=1e-12)


# As many orthogonal probes as dimensions


@pytest.mark.parametrize(
    ("name", "estimator"),
    [
        ("moderate", Truncated(50, "orthogonal", probes=4)),
        ("moderate", Roulette(exact_terms=50, minres_steps=0, probe="orthogonal", probes=4)),
        ("nonsymmetric", Roulette(exact_terms=50, probe="orthogonal", probes=8)),
        ("nonsymmetric", Roulette(exact_terms=80, minres_steps=3, probe="orthogonal", probes=8)),
    ],
    ids=str,
)
def test_the_exact_trace(name, estimator):
    """With enough terms D orthogonal probes give the dense value and gradient for every key, to 1e-9."""
    keys = jax.random.split(jax.random.key(0), 3)
    results = jax.jit(jax.vmap(lambda key: estimate(net_named(name), estimator, key)))(keys)
    np.testing.assert_allclose(results, np.tile(exact(name), (3, 1)), rtol=1e-9, atol=1e-9)


# Laws: Lipschitz constants, tables that are traced


@pytest.mark.parametrize("estimator", [PAPERS, Roulette(Geometric(0.5))], ids=str)
def test_infinite_variance_is_warned_of(estimator):
    """Only if the Lipschitz constant is known, which the message names."""
    net, key = net_named("small"), jax.random.key(0)
    with pytest.warns(RuntimeWarning, match=r"^length: .* infinite variance .* up to 0\.9"):
        residual(*net, key=key, estimator=estimator, lipschitz=0.9)
    residual(*net, key=key, estimator=estimator)


def test_the_law_adapts_to_the_lipschitz_constant():
    """residual(..., lipschitz=L) uses law.within(L): by default that is Defensive(lipschitz=L)."""
    net, keys = net_named("saturated"), jax.random.split(jax.random.key(0), 200)

    @jax.jit
    @jax.vmap
    def values(key):
        given = residual(*net, key=key, estimator=Roulette(minres_steps=0), lipschitz=0.9)[1]
        explicit = residual(*net, key=key, estimator=Roulette(Defensive(lipschitz=0.9), minres_steps=0))[1]
        return given, explicit, residual(*net, key=key, estimator=Roulette(minres_steps=0))[1]

    given, explicit, unknown = values(keys)
    np.testing.assert_array_equal(given, explicit)
    assert np.any(given != unknown)


def test_a_traced_table_needs_no_recompilation():
    """`Fitted` is a pytree: another table of the same size is the same program, and gives its own estimate."""
    traces = []

    @jax.jit
    def run(estimator, key):
        traces.append(None)
        return estimate(net_named("nonsymmetric"), estimator, key)

    key, results = jax.random.key(0), []
    for table in ([1.0, 0.6, 0.6, 0.2], [0.9, 0.8, 0.1, 0.05]):
        estimator = Roulette(Fitted(jnp.array(table), 0.75), samples=3)
        results.append(run(estimator, key))
        closed_over = jax.jit(lambda key, e=estimator: estimate(net_named("nonsymmetric"), e, key))(key)
        np.testing.assert_allclose(results[-1], closed_over, rtol=1e-12, atol=1e-12)
    assert len(traces) == 1
    assert np.abs(results[0] - results[1]).max() > 1e-3


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

    compiled = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((batch, dim)), jax.random.key(0)).compile()
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
        ("minres_steps", lambda: Roulette(minres_steps=-1)),
        ("minres_steps", lambda: Roulette(minres_steps=1.5)),
        ("probes", lambda: Roulette(probes=0)),
        ("probes", lambda: Truncated(probes=0)),
        ("samples", lambda: Roulette(samples=0)),
        ("chunk_size", lambda: Exact(0)),
        ("probe", lambda: Roulette(probe="x")),
        ("probe", lambda: Truncated(probe="x")),
        ("gradient", lambda: Roulette(gradient="x")),
        ("gradient", lambda: Truncated(gradient="x")),
        ("length", lambda: Roulette(length=3)),
        ("length", lambda: Roulette(3)),
        ("length", lambda: Roulette(None)),
        ("length", lambda: Roulette("geometric")),
    ],
)
def test_bad_estimators(name, make):
    """An estimator refuses a bad setting when it is made, by its name."""
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minres_steps": -1}, "minres_steps: expected an integer of at least 0, got -1"),
        ({"exact_terms": -1}, "exact_terms: expected an integer of at least 0, got -1"),
        ({"probes": 0}, "probes: expected an integer of at least 1, got 0"),
        ({"probe": "hadamard"}, "probe: expected one of rademacher, gaussian, orthogonal; got 'hadamard'"),
        (
            {"length": 3},
            "length: expected Defensive, Geometric, .* got 3 without sample, survival, tail_ratio",
        ),
    ],
)
def test_messages(options, message):
    """The whole text of the most likely mistakes."""
    with pytest.raises(ValueError, match=f"^{message}$"):
        Roulette(**options)


@pytest.mark.parametrize("estimator", [Roulette, Truncated])
def test_too_many_orthogonal_probes(estimator):
    """No more orthogonal probes than dimensions."""
    with pytest.raises(ValueError, match=r"^probes: expected at most 4 orthogonal probes in 4 dimensions, got 5\b"):
        residual(*net_named("small"), key=jax.random.key(0), estimator=estimator(probe="orthogonal", probes=5))


@pytest.mark.parametrize(
    "table", [[1.0, 0.0], [0.5, 0.7], [1.5, 0.5], [0.5, float("nan")], [[1.0, 0.5], [1.0, 0.5]]], ids=str
)
def test_bad_table(table):
    """The table of a `Fitted` law is checked where it is used: for one block it is [K]."""
    with pytest.raises(ValueError, match=r"^table: expected"):
        residual(*net_named("small"), key=jax.random.key(0), estimator=Roulette(Fitted(jnp.array(table))))


def _double(params, x):
    return 0.5 * x


@pytest.mark.parametrize(
    ("name", "g", "x", "options"),
    [
        ("key", _double, jnp.ones, {"estimator": Roulette()}),
        ("key", _double, jnp.ones, {"estimator": Truncated(2)}),
        ("key", _double, jnp.ones, {}),
        ("estimator", _double, jnp.ones, {"estimator": "exact"}),
        ("lipschitz", _double, jnp.ones, {"estimator": Exact(), "lipschitz": 1.0}),
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


def test_old_style_keys():
    """Keys that are arrays of words draw what typed keys of these words draw."""
    g, params, x = dense_net(0.6)
    old, typed = (residual(g, params, x, key=make(3), chunk_size=2)[1] for make in (jax.random.PRNGKey, jax.random.key))
    np.testing.assert_array_equal(old, typed)
