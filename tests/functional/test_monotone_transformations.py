"""The monotone map under transformations of JAX, in memory, and in second derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from resflow_jax.functional import monotone as monotone_module
from resflow_jax.functional.estimators import Exact, Roulette, Truncated
from resflow_jax.functional.length_laws import Geometric
from resflow_jax.functional.monotone import monotone
from resflow_jax.functional.solvers import Anderson, FixedPoint
from tests.functional.estimates import net_named

EXACT = Exact(chunk_size=3)
TIGHT = FixedPoint(tolerance=1e-14)  # the solver that compiles fastest
ROULETTE = Roulette(Geometric(0.4), 0)


def test_second_derivatives():
    """Exact: Hessian-vector products in three ways agree. Neumann: forward over reverse works, the others raise."""
    g, params, x = net_named("moderate")

    def loss(estimator, x):
        y, log_det = monotone(g, params, x, key=jax.random.key(0), estimator=estimator, solver=TIGHT)
        return jnp.sum(log_det**2) + jnp.sum(jnp.sin(y))

    of_exact, of_neumann = partial(loss, EXACT), partial(loss, Roulette(exact_terms=0, probe="orthogonal", probes=4))
    direction = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    forward = lambda f: jax.jit(lambda x: jax.jvp(jax.grad(f), (x,), (direction,)))  # noqa: E731
    backward = jax.jit(lambda: jax.grad(lambda x: jnp.vdot(jax.grad(of_exact)(x), direction))(x))()
    h = 1e-5
    for f, tolerance in ((of_exact, 1e-6), (of_neumann, 1e-5)):
        derivatives = forward(f)  # the gradient, and its derivative along the direction
        found, *slopes = derivatives(x)[1], *(derivatives(x + sign * h * direction)[0] for sign in (1, -1))
        np.testing.assert_allclose(found, (slopes[0] - slopes[1]) / (2 * h), rtol=tolerance, atol=tolerance)
        if f is of_exact:
            np.testing.assert_allclose(found, backward, rtol=1e-8, atol=1e-8)
    with pytest.raises(TypeError, match=r"forward-mode derivatives \(jvp, jacfwd\) expected another estimator"):
        jax.jit(lambda x: jax.jvp(of_neumann, (x,), (direction,))).lower(x)
    with pytest.raises(ValueError, match=r"reverse-mode derivatives of second order"):
        jax.eval_shape(jax.grad(lambda x: jnp.vdot(jax.grad(of_neumann)(x), direction)), x)


def test_vmap_scan_and_chunks():
    """The same numbers under vmap over keys, under vmap over params in a scan, and in chunks.

    `tests.modes.test_modes` has the map without jit.
    """
    g, params, x = net_named("moderate")

    def total(params, x, key, solver=TIGHT, **options):
        y, log_det = monotone(g, params, x, key=key, estimator=ROULETTE, solver=solver, **options)
        return jnp.sum(y) + jnp.sum(log_det)

    grad, keys = jax.grad(total, (0, 1)), jax.random.split(jax.random.key(0), 2)
    one = jax.jit(grad)
    one_by_one = [one(params, x, key) for key in keys]
    close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    close(jax.jit(jax.vmap(grad, (None, None, 0)))(params, x, keys), stacked)

    @jax.jit
    def scanned(params, x, keys):
        return jax.lax.scan(lambda _, key: (None, jax.vmap(grad, (0, None, None))(params, x, key)), None, keys)[1]

    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    close(scanned(twice, x, keys), jax.tree.map(lambda leaf: jnp.stack([leaf, leaf], axis=1), stacked))
    in_chunks = partial(grad, chunk_size=1, solver=Anderson(on_failure="raise"))
    close(jax.jit(in_chunks)(params, x, keys[0]), one_by_one[0])


def test_shard_map():
    """Inside shard_map, values and gradients are those of the whole batch: lengths are agreed, probes differ."""
    g, params, x = net_named("moderate")
    x = jnp.concatenate([x, 2 * x[:1]])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def loss(params, x):
        y, log_det = monotone(g, params, x, key=jax.random.key(3), estimator=ROULETTE, solver=TIGHT)
        return jnp.sum(log_det) + jnp.sum(jnp.sin(y)), log_det

    def sharded(params, x):
        grads, log_det = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return grads, log_det

    spec = ((P(), P("data")), P("data"))
    divided = jax.jit(jax.shard_map(sharded, mesh=mesh, in_specs=(P(), P("data")), out_specs=spec))(params, x)
    whole = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), divided, whole)


def gradient_memory(estimator, blocks, batch=64, dim=8, hidden=512):
    """Bytes of temporaries of the gradient of a scan over blocks: parameters and their gradient are not among them."""
    shapes = (blocks, dim, hidden), (blocks, hidden, dim)
    params = tuple(jax.ShapeDtypeStruct(shape, jnp.float64) for shape in shapes)

    def g(params, x):
        return jnp.tanh(x @ params[0]) @ params[1]

    def block(x, inputs):
        params, key = inputs
        return monotone(g, params, x, key=key, estimator=estimator, solver=TIGHT)

    def loss(params, x, key):
        y, log_dets = jax.lax.scan(block, x, (params, jax.random.split(key, blocks)))
        return jnp.sum(y**2) + jnp.sum(log_dets)

    compiled = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((batch, dim)), jax.random.key(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_neither_with_the_series_nor_with_width():
    """Truncated(40) takes what Truncated(4) takes, and 14 blocks more keep none of their hidden activations."""
    short, long = (gradient_memory(Truncated(terms), 2) for terms in (4, 40))
    deep = gradient_memory(Truncated(4), 16)
    assert 0 < long <= 1.05 * short
    assert deep <= 1.15 * short
    assert deep - short <= 14 * 64 * 8 * 8 * 4


def test_the_memory_test_has_power(monkeypatch):
    """With the derivative of `solve`, which keeps activations, the same measure sees them."""
    monkeypatch.setattr(monotone_module, "reverse_orders", lambda estimator: 0)
    shallow, deep = (gradient_memory(Truncated(4), blocks) for blocks in (2, 16))
    assert deep - shallow >= 14 * 64 * 512 * 8
