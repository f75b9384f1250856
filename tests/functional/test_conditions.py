"""A condition: value, gradient and inverse against dense linear algebra, unbiased, in chunks, transformed, checked."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, PartitionSpec

from resflow_jax.functional import chunks
from resflow_jax.functional.estimators import Exact, Roulette, Truncated
from resflow_jax.functional.inverse import residual_inverse
from resflow_jax.functional.length_laws import Defensive, Geometric, Poisson
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.monotone import monotone
from resflow_jax.functional.solvers import Anderson, Broyden, FixedPoint
from tests.functional.conditional import BATCH, DIM, dense_log_det, dense_series, g, jacobians, net, with_label
from tests.functional.contractions import check_two_orders, z_scores

WEIGHTS = jnp.array([1.5, -0.7, 0.3, 1.1])
# As many orthogonal probes as dimensions give exact traces, and many exact terms give the whole series, without noise.
WHOLE = {"probe": "orthogonal", "probes": DIM}
ESTIMATORS = {
    "exact": Exact(),
    "truncated": Truncated(3, **WHOLE),
    "truncated autodiff": Truncated(3, gradient="autodiff", **WHOLE),
    "roulette": Roulette(exact_terms=60, **WHOLE),
    "papers": Roulette(Poisson(2.0), exact_terms=60, minres_steps=0, **WHOLE),
    "autodiff": Roulette(Poisson(1.0), exact_terms=60, minres_steps=0, gradient="autodiff", **WHOLE),
}


def value_and_gradient(value, params, x, condition):
    """[y, log_det, d loss / d (params, x, floats of the condition)] as one vector, of value(params, x, condition)."""
    condition = dict(condition)
    label = condition.pop("label")

    def loss(params, x, floats):
        y, log_det = value(params, x, with_label(floats, label))
        return jnp.vdot(WEIGHTS[: len(x)], log_det) + jnp.sum(jnp.sin(3 * y)), (y, log_det)

    gradient, outputs = jax.grad(loss, (0, 1, 2), has_aux=True)(params, x, condition)
    return jnp.concatenate([ravel_pytree(outputs)[0], ravel_pytree(gradient)[0]])


def estimate(estimator, chunk_size=None, key=None):
    key = jax.random.key(0) if key is None else key
    return lambda p, x, c: residual(g, p, x, condition=c, key=key, estimator=estimator, chunk_size=chunk_size)


@cache
def dense(terms=None):
    """The dense reference, of a truncated series too."""
    log_det = dense_log_det if terms is None else partial(dense_series, terms)
    value = lambda p, x, c: (x + g(p, x, c), log_det(p, x, c))  # noqa: E731
    return jax.jit(partial(value_and_gradient, value))(*net())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_value_and_gradient(name):
    """Value, and gradients in params, x and the condition, are those of dense linear algebra."""
    args = net()
    found = jax.jit(partial(value_and_gradient, estimate(ESTIMATORS[name])))(*args)
    np.testing.assert_allclose(found, dense(3 if name.startswith("truncated") else None), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("size", "platform"), [(1, "cpu"), (2, "default")])
def test_chunks(monkeypatch, size, platform):
    """The condition is divided along with x, in the branch of a platform, whatever the tests run on."""
    monkeypatch.setattr(chunks, "by_platform", lambda *args, out, **branches: branches[platform](*args))
    args = net()
    found = jax.jit(partial(value_and_gradient, estimate(ESTIMATORS["roulette"], size)))(*args)
    np.testing.assert_allclose(found, dense(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "estimator",
    [Roulette(Defensive(lipschitz=0.7), 0), Roulette(Geometric(0.3), 1, minres_steps=0, probes=2)],
    ids=str,
)
def test_unbiased(estimator):
    """The mean over 4000 keys is the dense value and gradient, in every component."""
    args = net()
    run = lambda key: value_and_gradient(estimate(estimator, key=key), *args)  # noqa: E731
    samples = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(1), 4000))
    assert np.std(samples[:, BATCH * DIM :], axis=0).max() > 1e-3
    assert np.abs(z_scores(samples, dense())).max() < 4.5


@pytest.mark.parametrize(
    "estimator", [Exact(), Roulette(Geometric(0.5), 2, minres_steps=0, gradient="autodiff")], ids=str
)
def test_two_orders(estimator):
    """First and second derivatives in params, x and the condition are those of the estimate itself."""
    params, x, condition = net(batch=2)
    label = condition.pop("label")

    def loss(params, x, floats):
        y, log_det = estimate(estimator)(params, x, with_label(floats, label))
        return jnp.vdot(WEIGHTS[:2], log_det) + jnp.sum(jnp.sin(3 * y))

    check_two_orders(loss, params, x, condition)


def test_forward_mode_of_a_condition_raises():
    """A rule of reverse mode alone says so, for the condition as for x."""
    params, x, condition = net(batch=2)

    def log_det(shift):
        return estimate(Roulette())(params, x, {**condition, "shift": shift})[1]

    with pytest.raises(TypeError, match="forward-mode derivatives"):
        jax.jvp(log_det, (condition["shift"],), (condition["shift"],))


# The inverse


@cache
def iterated():
    params, y, condition = net()
    return jax.jit(lambda: jax.lax.fori_loop(0, 100, lambda _, x: y - g(params, x, condition), y))()


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), FixedPoint()], ids=str)
def test_inverse(solver):
    """It is the fixed point of x = y - g(x), example by example, and undoes the map."""
    params, y, condition = net()
    found = residual_inverse(g, params, y, condition=condition, solver=solver)
    np.testing.assert_allclose(found, iterated(), atol=1e-10)


def test_derivatives_of_the_inverse():
    """Implicit derivatives: to second order by differences; forward mode against (I + J)^-1 (dy - dg)."""
    params, y, condition = net(batch=2)
    floats = dict(condition)
    label = floats.pop("label")
    solver = FixedPoint(tolerance=1e-14)
    inverse = lambda p, y, f: residual_inverse(g, p, y, condition=with_label(f, label), solver=solver)  # noqa: E731
    check_two_orders(lambda *args: jnp.sum(jnp.sin(inverse(*args) * jnp.arange(1.0, 4.0)[None])), params, y, floats)

    tangents = jax.tree.map(lambda leaf: 0.3 * jnp.cos(leaf), (params, y, floats))
    x, tangent = jax.jit(lambda a, t: jax.jvp(inverse, a, t))((params, y, floats), tangents)
    dg = jax.jvp(lambda p, f: g(p, x, with_label(f, label)), (params, floats), (tangents[0], tangents[2]))[1]
    matrices = np.eye(DIM) + np.asarray(jacobians(params, x, condition))
    expected = np.linalg.solve(matrices, np.asarray(tangents[1] - dg)[..., None])[..., 0]
    np.testing.assert_allclose(tangent, expected, rtol=1e-9, atol=1e-11)


# Transformations

LANES = 3
ARGUMENTS = ("params", "x", "shift", "key")
# For the two rules of derivatives, of the Neumann gradient and of the inverse: the key and the condition alone too.
MAPPED = {"roulette": [("shift",), ("key",), ("params", "x")], "inverse": [("shift",), ("params", "x")]}
OTHERS = [("shift", "x", "key")]


def log_det_loss(estimator, chunk_size, params, x, shift, key):
    """A loss in which y and log_det meet."""
    h = lambda p, x, c: 0.5 * jnp.tanh(x @ p + c[0])  # noqa: E731
    y, log_det = residual(h, params, x, condition=(shift,), key=key, estimator=estimator, chunk_size=chunk_size)
    return jnp.vdot(WEIGHTS[:2], log_det) * jnp.sum(jnp.sin(y))


def inverse_loss(params, x, shift, key):
    """The key is not used."""
    x = residual_inverse(lambda p, x, c: 0.5 * jnp.tanh(x @ p + c), params, x, condition=shift)
    return jnp.sum(jnp.sin(x)) + 0.0 * jax.random.uniform(key)


LOSSES = {
    "exact": partial(log_det_loss, Exact(), None),
    "roulette": partial(log_det_loss, Roulette(), None),
    "in chunks": partial(log_det_loss, Roulette(exact_terms=0, probes=2), 1),
    "autodiff": partial(log_det_loss, Roulette(Geometric(0.8), 0, gradient="autodiff"), None),
    "inverse": inverse_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_vmap(name):
    """grad of a weighted sum over vmap, for several choices of mapped arguments, is that of a loop."""
    loss, weights = LOSSES[name], jnp.arange(1.0, 1 + LANES)
    one = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    for names in MAPPED.get(name, OTHERS):
        rng = np.random.default_rng(0)
        args = []
        for argument, shape in zip(ARGUMENTS[:3], [(DIM, DIM), (2, DIM), (2, DIM)], strict=True):
            args.append(jnp.asarray(rng.uniform(0.1, 0.5, size=(*(LANES,) * (argument in names), *shape))))
        args.append(jax.random.split(jax.random.key(1), LANES) if "key" in names else jax.random.key(1))
        axes = [0 if argument in names else None for argument in ARGUMENTS]
        lanes = [one(*(a if axis is None else a[n] for a, axis in zip(args, axes, strict=True))) for n in range(LANES)]

        def total(params, x, shift, key, axes=axes):
            return jnp.vdot(weights, jax.vmap(loss, axes)(params, x, shift, key))

        value, gradient = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*args)
        np.testing.assert_allclose(value, sum(w * v for w, (v, _) in zip(weights, lanes, strict=True)), rtol=1e-10)
        for n in range(3):
            parts = jnp.stack([w * lane[1][n] for w, lane in zip(weights, lanes, strict=True)])
            expected = parts if axes[n] == 0 else jnp.sum(parts, axis=0)
            np.testing.assert_allclose(gradient[n], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs the eight CPU devices of conftest.py")
@pytest.mark.parametrize(
    ("name", "is_shared"),
    [
        ("exact", True),
        ("roulette", True),
        ("in chunks", False),
        ("autodiff", False),
        ("inverse", True),
    ],
)
def test_shard_map(name, is_shared):
    """A condition divided over the devices like x, and one that all devices share, whose gradients are summed."""
    kinds = {"exact": Exact(), "autodiff": Roulette(Geometric(0.8), 0, gradient="autodiff")}
    params, x, condition = net()
    if is_shared:
        condition = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:2], leaf[:2]]), condition)
    label = condition.pop("label")

    def loss(params, x, floats, label, weights):
        condition = with_label(floats, label)
        if name == "inverse":
            return jnp.sum(weights[:, None] * jnp.sin(residual_inverse(g, params, x, condition=condition)))
        chunk_size = 1 if name == "in chunks" else None
        y, log_det = estimate(kinds.get(name, Roulette()), chunk_size)(params, x, condition)
        return jnp.sum(weights[:, None] * jnp.sin(y)) + jnp.vdot(weights, log_det)

    expected = jax.jit(jax.grad(loss, (0, 1, 2)))(params, x, condition, label, WEIGHTS)
    if is_shared:
        expected = *expected[:2], jax.tree.map(lambda leaf: leaf[:2] + leaf[2:], expected[2])
        condition, label = jax.tree.map(lambda leaf: leaf[:2], (condition, label))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    whole, shares = PartitionSpec(), PartitionSpec("data")
    of_condition = whole if is_shared else shares
    total = lambda *args: jax.lax.psum(loss(*args), "data")  # noqa: E731
    specs = whole, shares, of_condition, of_condition, shares
    spread = jax.shard_map(
        jax.grad(total, (0, 1, 2)), mesh=mesh, in_specs=specs, out_specs=(whole, shares, of_condition)
    )
    found = jax.jit(spread)(params, x, condition, label, WEIGHTS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11), found, expected)


# Types of conditions


def test_any_tree():
    """NumPy's arrays, keys and None in a tuple; an eager call and jit agree."""
    x = np.full((2, 3), 0.3)
    condition = (np.array([1, 2]), None, {"key": jax.random.split(jax.random.key(0), 2)})

    def g(params, x, condition):
        noise = jax.vmap(lambda key: jax.random.uniform(key, (3,)))(condition[2]["key"])
        return 0.2 * jnp.sin(x * condition[0][:, None].astype(x.dtype) + noise)

    run = lambda x: residual(g, None, x, condition=condition, key=jax.random.key(1), estimator=Roulette(probes=2))  # noqa: E731
    y, log_det = run(x)

    def total(x):
        found = run(x)
        return jnp.sum(found[1]), found

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), (y, log_det), found)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(residual_inverse(g, None, y, condition=condition), x, atol=1e-10)


def test_none_is_no_condition():
    """g takes two arguments then, also where it has a default for a third one."""
    x = jnp.full((2, 3), 0.3)
    y, _ = residual(lambda params, x, scale=0.5: scale * x, None, x, estimator=Exact())
    np.testing.assert_allclose(y, 1.5 * x)
    np.testing.assert_allclose(residual_inverse(lambda params, x, scale=0.5: scale * x, None, y), x, rtol=1e-10)


TWO, THREE = (lambda params, x: 0.5 * x), (lambda params, x, condition: 0.5 * x)
BAD = {
    "another batch": (
        THREE,
        np.ones((3, 1)),
        r"condition: expected 2 rows, one for each example of .* \(3, 1\)",
    ),
    "in a tree": (THREE, {"a": [np.ones(2), np.ones(5)]}, r"condition\['a'\]\[1\]: expected 2 rows.* \(5,\)"),
    "no batch axis": (THREE, np.float64(1), r"condition: expected 2 rows.*got shape \(\)"),
    "a number": (THREE, 1.0, "condition: expected an array .*got float"),
    "strings": (THREE, np.array(["a", "b"]), "condition: expected an array .*got dtype <U1"),
    "not taken": (
        TWO,
        np.ones(2),
        r"g: expected a function of \(params, x, condition\), got the signature \(params, x\)",
    ),
    "missing": (
        THREE,
        None,
        r"condition: expected a condition, since g takes \(params, x, condition\), got None",
    ),
    "neither": (lambda x: x, None, r"g: expected a function of \(params, x\), got the signature \(x\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    """Each error names the argument, what was expected and what came."""
    bad, condition, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        residual(bad, None, np.ones((2, 3)), condition=condition, estimator=Exact())
    with pytest.raises(ValueError, match=message):
        residual_inverse(bad, None, np.ones((2, 3)), condition=condition)
    for x in (np.ones((2, 3)), {"events": np.ones((2, 3))}):
        with pytest.raises(ValueError, match=message):
            monotone(bad, None, x, condition=condition, estimator=Exact())
