"""A batch spread over two devices by shard_map: the same numbers as on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from resflow_jax.functional.batch_axes import axes_of_batch, batch_axes, example_keys, vary_over, varying_axes
from resflow_jax.functional.estimators import Exact, Roulette
from resflow_jax.functional.inverse import residual_inverse
from resflow_jax.functional.length_laws import Geometric
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.primitives.convolution import conv2d
from resflow_jax.functional.solvers import Anderson
from tests import leaks
from tests.functional.contractions import conv_net

pytestmark = pytest.mark.skipif(
    jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py, not another platform"
)
WHOLE, SHARES = PartitionSpec(), PartitionSpec("data")


def spread(function, in_specs, out_specs=SHARES):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def test_keys_go_by_the_example():
    """The keys of a device's share are those of its examples in the whole batch; all differ."""
    x, key = jnp.zeros((6, 2)), jax.random.key(1)
    keys = jax.random.key_data(example_keys(key, x))
    found = spread(lambda x, key: jax.random.key_data(example_keys(key, x)), (SHARES, WHOLE))(x, key)
    np.testing.assert_array_equal(found, keys)
    assert len(np.unique(keys, axis=0)) == 6


def test_axes():
    """Axes along which a value varies between devices; outside of shard_map nothing varies."""
    assert varying_axes(jnp.zeros(2)) == ()

    def inside(x, shared):
        assert varying_axes(x) == ("data",) and varying_axes(shared) == ()
        assert varying_axes(vary_over(shared, ("data",))) == ("data",)
        assert varying_axes(vary_over(x, ("data",))) == ("data",)
        return x

    spread(inside, (SHARES, WHOLE))(jnp.zeros((2, 1)), jnp.zeros(3))


@pytest.mark.parametrize(
    ("estimator", "chunk_size"),
    [
        (Roulette(exact_terms=2), None),
        (Roulette(exact_terms=2, probes=2, trace_probes=2), 1),
        (Roulette(Geometric(0.5), exact_terms=2, minres_steps=0, gradient="autodiff", trace_probes=1), None),
        (Exact(), None),
    ],
    ids=str,
)
def test_residual(estimator, chunk_size):
    """Value and log-det by example; gradients of what all devices share, also of what g closes over, are sums."""
    g, params, x = conv_net(0.6, batch=4)
    key, weights = jax.random.key(5), jnp.arange(1.0, 5)

    def forward(params, scale, x, weights):
        y, log_det = residual(
            lambda params, x: scale * g(params, x),
            params,
            x,
            key=key,
            estimator=estimator,
            chunk_size=chunk_size,
        )
        return jnp.sum(weights[:, None, None, None] * jnp.sin(y)) + jnp.sum(weights * log_det), (y, log_det)

    def total(params, scale, x, weights):
        return jax.lax.psum(forward(params, scale, x, weights)[0], "data")

    scale = jnp.asarray(0.9)
    (_, expected), gradient = jax.value_and_grad(forward, (0, 1, 2), has_aux=True)(params, scale, x, weights)
    specs = WHOLE, WHOLE, SHARES, SHARES
    found = spread(lambda *args: forward(*args)[1], specs)(params, scale, x, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)
    found = spread(jax.grad(total, (0, 1, 2)), specs, (WHOLE, WHOLE, SHARES))(params, scale, x, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, gradient)


def test_inverse():
    """Each device solves for its examples; values and gradients are those of one device."""
    g, params, x = conv_net(0.6, batch=4)
    y = x + g(params, x)
    solver = Anderson(tolerance=1e-12)

    def loss(params, y):
        return jnp.sum(jnp.sin(residual_inverse(g, params, y, solver=solver, return_status=True)[0]))

    def total(params, y):
        return jax.lax.psum(loss(params, y), "data")

    expected = jax.value_and_grad(loss, (0, 1))(params, y)
    own = spread(lambda params, y: jax.grad(loss, 1)(params, y), (WHOLE, SHARES))(params, y)
    np.testing.assert_allclose(own, expected[1][1], rtol=1e-8, atol=1e-10)
    found = spread(jax.value_and_grad(total), (WHOLE, SHARES), WHOLE)(params, y)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), found, (expected[0], expected[1][0])
    )


def test_convolution():
    """A kernel that all devices share gets the gradient of the whole batch."""
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.normal(size=(4, 3, 3, 2))), jnp.asarray(rng.normal(size=(3, 3, 2, 3)))

    def loss(kernel, x):
        return jnp.sum(jnp.sin(conv2d(x, kernel)))

    found = spread(jax.grad(lambda k, x: jax.lax.psum(loss(k, x), "data")), (WHOLE, SHARES), WHOLE)(kernel, x)
    np.testing.assert_allclose(found, jax.grad(loss)(kernel, x), rtol=1e-10)


def test_exact_of_matrices_of_192_rows():
    """At that size LU decompositions of batches on two devices would wait for each other for ever."""
    rng = np.random.default_rng(0)
    weights, x = jnp.asarray(0.3 * rng.normal(size=(2, 1, 192))), jnp.asarray(rng.normal(size=(64, 192)))

    def log_det(weights, x):  # products with the Jacobian cost little
        return residual(lambda w, x: jnp.tanh(w[0] * x + w[1] * jnp.roll(x, 1, axis=1)), weights, x, estimator=Exact())[
            1
        ]

    found = spread(log_det, (WHOLE, SHARES))(weights, x)
    np.testing.assert_allclose(found, jax.jit(log_det)(weights, x), rtol=1e-12)


@pytest.mark.parametrize(
    "estimator",
    [Roulette(exact_terms=2), Roulette(Geometric(0.5), gradient="autodiff"), Exact()],
    ids=["roulette", "autodiff", "exact"],
)
def test_parameters_that_differ(estimator):
    """Each device has parameters of its own, all have the same x: as the whole batch with parameters an example."""
    rng = np.random.default_rng(0)
    x, params = jnp.asarray(rng.normal(size=(3, 2))), jnp.asarray(0.3 * rng.normal(size=(2, 2, 2)))
    key = jax.random.key(5)

    def loss(g, params, x):
        y, log_det = residual(g, params, x, key=key, estimator=estimator)
        return jnp.sum(jnp.sin(y)) + jnp.sum(log_det)

    def of_all(params, x):
        rows = jnp.repeat(params, 3, axis=0)
        return loss(lambda p, x: jnp.tanh(jnp.einsum("bi,bij->bj", x, p)), rows, jnp.tile(x, (2, 1)))

    def own(params, x):
        return jax.lax.psum(loss(lambda p, x: jnp.tanh(x @ p), params[0], x), "data")

    expected = jax.jit(jax.value_and_grad(of_all, (0, 1)))(params, x)
    total = lambda params, x: spread(own, (SHARES, WHOLE), WHOLE)(params, x)  # noqa: E731
    with leaks.unchecked():
        found = jax.value_and_grad(total, (0, 1))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11), found, expected)


def test_inverse_of_parameters_that_differ():
    """The same y, solved with each device's parameters."""
    rng = np.random.default_rng(0)
    y, params = jnp.asarray(rng.normal(size=(3, 2))), jnp.asarray(0.3 * rng.normal(size=(2, 2, 2)))
    solve = lambda p, y: residual_inverse(lambda p, x: jnp.tanh(x @ p), p, y)  # noqa: E731
    found = spread(lambda p, y: solve(p[0], y)[None], (SHARES, WHOLE))(params, y)
    np.testing.assert_allclose(found, jnp.stack([solve(p, y) for p in params]), rtol=1e-11)


def test_named_axes_alone_divide_a_batch():
    """On a mesh with axes for data and members, the batch is divided along the named axes only."""
    mesh = jax.make_mesh((2, 2), ("data", "member"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    x, key = jnp.zeros((4, 2)), jax.random.key(1)

    def keys(x, key):
        with batch_axes("data"):
            assert axes_of_batch(x) == ("data",)
            return jax.random.key_data(example_keys(key, x))

    specs = PartitionSpec(("data", "member")), WHOLE
    found = jax.jit(jax.shard_map(keys, mesh=mesh, in_specs=specs, out_specs=specs[0]))(x, key)
    expected = jax.random.key_data(example_keys(key, x[:2]))
    np.testing.assert_array_equal(found, expected[np.array([0, 0, 1, 1])])
    with pytest.raises(ValueError, match=r"^batch_axes: expected an axis that the batch varies over"):
        spread(lambda x: keys(x, key), (WHOLE,), WHOLE)(x)
