"""Functions as traced programs: closures are arguments, equal programs are compiled once, changed ones anew."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.estimators import Exact, Roulette
from resflow_jax.functional.inverse import residual_inverse
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.primitives import tracing
from tests.compilations import compilations

X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)


def make(scale, shift=1, offset=None):
    """A new function each time; scale is a Python number, offset an array that it closes over."""
    offset = jnp.zeros(3) if offset is None else offset
    return lambda p, x: scale * jax.nn.softplus(p * jnp.roll(x, shift, axis=-1) + offset[None])


def test_equal_programs():
    """Two traces are equal, with one hash, if and only if the programs are; what is closed over is no part of them."""
    one, closed = tracing.trace(make(0.3), 1.0, X)
    same, others = tracing.trace(make(0.3, offset=jnp.ones(3)), 1.0, X)
    assert one == same and hash(one) == hash(same)
    assert any(np.all(leaf == 1) for leaf in others) and len(closed) == len(others)
    for other in (make(0.4), make(0.3, 2), lambda p, x: p * x, lambda p, x: jnp.tanh(make(0.3)(p, x))):
        assert one != tracing.trace(other, 1.0, X)[0]
    assert one != tracing.trace(make(0.3), 1.0, X[:1])[0]
    assert one != "a program"


def test_arrays_inside_of_inner_programs():
    """An array inside of a jitted function that g calls is a constant of it: another array is another program."""

    def outer(offset):
        inner = jax.jit(lambda x: x + offset)
        return lambda p, x: p * inner(x)

    a, b = jnp.zeros(3), jnp.ones(3)
    assert tracing.trace(outer(a), 1.0, X[0])[0] != tracing.trace(outer(b), 1.0, X[0])[0]


CALLS = {
    "roulette": lambda g: residual(g, 1.0, X, key=jax.random.key(0), estimator=Roulette())[1],
    "exact": lambda g: residual(g, 1.0, X, estimator=Exact())[1],
    "inverse": lambda g: residual_inverse(g, 1.0, X),
    "gradient": lambda g: jax.grad(lambda p: jnp.sum(residual(g, p, X, key=jax.random.key(0))[1]))(1.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_eager_call_compiles_once(name):
    """A new lambda with other arrays uses the same program, with the present values of its closure."""
    call = CALLS[name]
    first = call(make(0.3))
    offset = jnp.array([0.7, 0.7, 0.7])
    call(make(0.3))
    with compilations() as found:
        again = call(make(0.3))
        other = call(make(0.3, offset=offset))
    assert not found
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(other, jax.jit(lambda: call(make(0.3, offset=jnp.array([0.7, 0.7, 0.7]))))(), rtol=1e-12)
    assert np.abs(other - first).max() > 1e-3
    np.testing.assert_allclose(call(make(0.2)), jax.jit(lambda: call(make(0.2)))(), rtol=1e-12)


def test_changes_of_a_mutable_closure_are_seen():
    """g is one function object that reads a list: each call sees what is in it."""
    state = [jnp.asarray(0.2)]

    def g(p, x):
        return state[0] * jnp.tanh(x)

    first = residual(g, None, X, estimator=Exact())[1]
    state[0] = jnp.asarray(0.4)
    second = residual(g, None, X, estimator=Exact())[1]
    np.testing.assert_allclose(second, jnp.sum(jnp.log1p(0.4 / jnp.cosh(X) ** 2), axis=1), rtol=1e-10)
    assert np.abs(first - second).min() > 1e-3


def test_the_cache_is_bounded_and_keeps_no_arrays(monkeypatch):
    """At most 128 programs are kept; what g closes over is not kept at all."""
    offset = jnp.ones(3)
    kept = weakref.ref(offset)
    residual_inverse(make(0.3, offset=offset), 1.0, X)
    del offset
    gc.collect()
    assert kept() is None
    assert tracing._compiled.cache_info().maxsize == tracing.COMPILED == 128


@pytest.mark.parametrize("transform", ["grad(jit)", "jit(grad)", "scan", "vmap"])
def test_closures_over_integers_and_keys(transform):
    """Integers and keys that are traced where g closes over them: value and gradient are those of constants."""

    def log_det(scale, shift, key):
        def g(p, x):
            return 0.3 * p * jnp.tanh(jnp.roll(x, shift, axis=-1) + jax.random.normal(key, (3,))[None])

        return jnp.sum(residual(g, scale, X, key=jax.random.key(1))[1])

    one, keys = jnp.asarray(1.0), jax.random.split(jax.random.key(2), 2)
    expected = [jax.grad(lambda s, n=n: log_det(s, n, keys[n]))(one) for n in range(2)]
    if transform == "scan":

        def total(scale):
            def body(total, n):
                return total + (n + 1).astype(float) * log_det(scale, n, keys[n]), None

            return jax.lax.scan(body, jnp.zeros(()), jnp.arange(2))[0]

        found, expected = jax.grad(total)(one), expected[0] + 2 * expected[1]
    elif transform == "vmap":
        found = jax.vmap(jax.grad(log_det), (None, 0, 0))(one, jnp.arange(2), keys)
    else:
        make_gradient = (lambda f: jax.grad(jax.jit(f))) if transform == "grad(jit)" else lambda f: jax.jit(jax.grad(f))
        found, expected = make_gradient(log_det)(one, 1, keys[1]), expected[1]
    np.testing.assert_allclose(found, jnp.asarray(expected), rtol=1e-10)


@pytest.mark.parametrize("options", [{"chunk_size": 1}, {"estimator": Roulette(probes=2)}], ids=["chunks", "probes"])
def test_arrays_of_the_batch_are_refused(options):
    """g takes parts of a batch, or the batch twice, but not what it closes over: the error names the arguments."""
    condition = jnp.ones((4, 3))
    g = lambda p, x: 0.3 * jnp.tanh(x + condition)  # noqa: E731
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"^chunk_size, probes, subsample: expected a g that takes"):
        residual(g, None, x, key=jax.random.key(0), **options)
    residual(g, None, x, key=jax.random.key(0), chunk_size=4)


def test_as_many_rows_as_the_batch_by_chance():
    """Two chunks of two examples, each repeated for two probes, have four rows; they are refused too."""
    condition = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"^chunk_size, probes, subsample: expected a g that takes"):
        residual(
            lambda p, x: 0.3 * jnp.tanh(x + condition),
            None,
            jnp.ones((4, 3)),
            key=jax.random.key(0),
            chunk_size=2,
            estimator=Roulette(probes=2),
        )


def test_numbers_in_programs():
    """Zeros of different signs make different programs; NaN makes the same one."""
    traces = [tracing.trace(lambda p, x, c=c: x + c * jnp.ones_like(x), 1.0, X)[0] for c in (0.0, -0.0, 0.0)]
    assert traces[0] != traces[1] and traces[0] == traces[2]
    with_nan = [tracing.trace(lambda p, x: jnp.where(x > 0, x, jnp.nan), 1.0, X)[0] for _ in range(2)]
    assert with_nan[0] == with_nan[1]
