"""Values and gradients under vmap over any arguments, before and after grad, nested, in scan: those of loops."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.estimators import Exact, Roulette, Truncated
from resflow_jax.functional.inverse import residual_inverse
from resflow_jax.functional.length_laws import Fitted, Geometric, Poisson
from resflow_jax.functional.logdet import residual

LANES, BATCH, DIM = 3, 2, 3
ESTIMATORS = {
    "exact": Exact(),
    "truncated": Truncated(4),
    "roulette": Roulette(),
    "papers": Roulette(Poisson(2.0), exact_terms=2, minres_steps=0, probe="gaussian"),
    "autodiff": Roulette(Geometric(0.8), exact_terms=1, gradient="autodiff"),
    "two lengths, two probes": Roulette(Geometric(0.4), 0, samples=2, probes=2),
}
ARGUMENTS = ("params", "scale", "x", "key")
# Which arguments have a lane each. The key alone: y is not mapped. For the two rules of derivatives, of the Neumann
# gradient and of the inverse, each argument is mapped with others and without.
ALONE = [("key",), ("x",), ("params", "scale", "key")]
MAPPED = {"roulette": ALONE, "inverse": ALONE, "in chunks": [("x", "params"), ("scale", "key")]}
OTHERS = [("scale", "x", "key")]


def log_det_loss(estimator, chunk_size, params, scale, x, key):
    """A loss in which y and log_det meet; g closes over scale."""
    y, log_det = residual(
        lambda p, x: scale * jnp.tanh(x @ p), params, x, key=key, estimator=estimator, chunk_size=chunk_size
    )
    return jnp.sum(jnp.sin(y) * jnp.arange(1.0, 1 + DIM)[None]) + jnp.sum(log_det * jnp.arange(1.0, 1 + BATCH))


def inverse_loss(params, scale, x, key):
    """The key is not used: where it alone is mapped, nothing of the solve is."""
    y = residual_inverse(lambda p, x: scale * jnp.tanh(x @ p), params, x)
    return jnp.sum(jnp.sin(y) * jnp.arange(1.0, 1 + DIM)[None]) + 0.0 * jax.random.uniform(key)


LOSSES = {name: partial(log_det_loss, estimator, None) for name, estimator in ESTIMATORS.items()}
LOSSES["in chunks"] = partial(log_det_loss, Roulette(), 1)
LOSSES["inverse"] = inverse_loss


def arguments(names):
    """The arguments by name, with a leading axis of lanes for those named."""
    rng = np.random.default_rng(0)
    shapes = {"params": (DIM, DIM), "scale": (), "x": (BATCH, DIM)}
    args = {}
    for name, shape in shapes.items():
        lanes = (LANES,) if name in names else ()
        args[name] = jnp.asarray(rng.uniform(0.2, 0.5, size=(*lanes, *shape)))
    args["key"] = jax.random.split(jax.random.key(1), LANES) if "key" in names else jax.random.key(1)
    return args


def lane(args, names, n):
    return [args[name][n] if name in names else args[name] for name in ARGUMENTS]


def check(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_vmap(name):
    """grad of a weighted sum over vmap, and vmap of grad, for choices of mapped arguments, against a loop."""
    loss, weights = LOSSES[name], jnp.arange(1.0, 1 + LANES)
    one = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    for names in MAPPED.get(name, OTHERS):
        args = arguments(names)
        axes = [0 if name in names else None for name in ARGUMENTS]
        lanes = [one(*lane(args, names, n)) for n in range(LANES)]

        @jax.jit
        def mapped(*args, axes=axes):
            total = lambda p, s, x, key: jnp.vdot(weights, jax.vmap(loss, axes)(p, s, x, key))  # noqa: E731
            return jax.value_and_grad(total, (0, 1, 2))(*args), jax.vmap(jax.grad(loss, (0, 1, 2)), axes)(*args)

        (value, gradient), each = mapped(*args.values())
        np.testing.assert_allclose(value, sum(w * v for w, (v, _) in zip(weights, lanes, strict=True)), rtol=1e-10)
        for n, argument in enumerate(ARGUMENTS[:3]):
            parts = jnp.stack([w * g[n] for w, (_, g) in zip(weights, lanes, strict=True)])
            check(gradient[n], parts if argument in names else jnp.sum(parts, axis=0))
            check(each[n], jnp.stack([g[n] for _, g in lanes]))


@pytest.mark.parametrize("name", ["roulette", "papers", "inverse"])
def test_nested_and_in_scan(name):
    """vmap over keys inside of vmap over x inside of a scan over params, all in one gradient."""
    loss = LOSSES[name]
    args = arguments(("params", "x", "key"))

    def total(params, scale, x, keys):
        def step(carry, p):
            over_keys = jax.vmap(loss, (None, None, None, 0))
            values = jax.vmap(lambda x: over_keys(p, scale, x, keys))(x)
            return carry + jnp.sum(values * jnp.arange(1.0, 1 + LANES)[None]), None

        return jax.lax.scan(step, jnp.zeros(()), params)[0]

    found = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*args.values())
    one = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    value, gradient = 0.0, jax.tree.map(np.zeros_like, [args[name] for name in ARGUMENTS[:3]])
    for i, j, k in itertools.product(range(LANES), repeat=3):
        v, (params, scale, x) = one(args["params"][i], args["scale"], args["x"][j], args["key"][k])
        value += (k + 1) * v
        gradient[0][i] += (k + 1) * params
        gradient[1] += (k + 1) * scale
        gradient[2][j] += (k + 1) * x
    np.testing.assert_allclose(found[0], value, rtol=1e-10)
    check(list(found[1]), gradient)


def test_mapped_table():
    """The law's table is mapped, nothing else: y is one, log_det one a lane."""
    tables = jnp.array([[0.9, 0.5, 0.1], [0.8, 0.6, 0.3], [1.0, 0.4, 0.2]])
    args = arguments(())

    def loss(params, table):
        return log_det_loss(Roulette(Fitted(table, 0.5), 0), None, params, args["scale"], args["x"], args["key"])

    found = jax.jit(jax.grad(lambda p: jnp.sum(jax.vmap(loss, (None, 0))(p, tables))))(args["params"])
    one = jax.jit(jax.grad(loss))
    check(found, sum(one(args["params"], table) for table in tables))


@pytest.mark.parametrize("name", ["roulette", "exact"])
@pytest.mark.parametrize("mapped", ["shift", "x"])
def test_a_map_whose_jacobian_is_the_same_in_every_lane(name, mapped):
    """g is linear in x: y is mapped, log_det is one."""
    rng = np.random.default_rng(0)
    params, shift, x = (jnp.asarray(0.4 * rng.normal(size=shape)) for shape in ((DIM, DIM), (DIM,), (BATCH, DIM)))
    lanes = jnp.stack([shift, 2 * shift, -shift]) if mapped == "shift" else jnp.stack([x, 2 * x, -x])

    def loss(params, lane):
        b, inputs = (lane, x) if mapped == "shift" else (shift, lane)
        g = lambda p, x: x @ p + b[None]  # noqa: E731
        y, log_det = residual(g, params, inputs, key=jax.random.key(1), estimator=ESTIMATORS[name])
        return jnp.sum(jnp.sin(y)) * jnp.sum(log_det)

    found = jax.jit(jax.grad(lambda p: jnp.sum(jax.vmap(loss, (None, 0))(p, lanes))))(params)
    check(found, sum(jax.grad(loss)(params, lane) for lane in lanes))
