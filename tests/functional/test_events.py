"""Events that are trees of arrays: value, gradient and inverse of the same map on one array, and dense references."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.estimators import Exact, Roulette, Truncated
from resflow_jax.functional.inverse import residual_inverse
from resflow_jax.functional.length_laws import Geometric
from resflow_jax.functional.logdet import residual
from tests.functional.contractions import dense_log_det, dense_net, dense_series

WEIGHTS = jnp.array([1.5, -0.7, 0.3, 1.1])
WHOLE = {"probe": "orthogonal", "probes": 5}
ESTIMATORS = {
    "exact": Exact(),
    "truncated": Truncated(3, **WHOLE),
    "roulette": Roulette(exact_terms=60, **WHOLE),
    "autodiff": Roulette(Geometric(0.9), exact_terms=60, minres_steps=0, gradient="autodiff", **WHOLE),
}


class Graph(NamedTuple):
    """An event of two arrays and None."""

    nodes: Any
    edges: Any
    nothing: Any = None


def as_graph(rows):
    return Graph(rows[:, :4].reshape(-1, 2, 2), {"weight": rows[:, 4]})


def as_rows(graph):
    return jnp.concatenate([graph.nodes.reshape(-1, 4), graph.edges["weight"][:, None]], axis=1)


FLAT, PARAMS, ROWS = dense_net(0.6, batch=4, dim=5)


def g(params, graph):
    """`FLAT` as a map of graphs."""
    return as_graph(FLAT(params, as_rows(graph)))


def value_and_gradients(value, x):
    """(y, log_det), and gradients in params and x, of value(params, x)."""

    def loss(params, x):
        y, log_det = value(params, x)
        total = sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in jax.tree.leaves(y))
        return jnp.vdot(WEIGHTS, log_det) + total, (y, log_det)

    gradient, outputs = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(PARAMS, x)
    return outputs, gradient


@pytest.mark.parametrize(("name", "chunk_size"), [*((name, None) for name in ESTIMATORS), ("roulette", 2)])
def test_value_and_gradient(name, chunk_size):
    """Value and gradients are those of dense linear algebra on the rows."""
    log_det = partial(dense_series, terms=3) if name == "truncated" else dense_log_det
    options = {"key": jax.random.key(0), "estimator": ESTIMATORS[name], "chunk_size": chunk_size}
    (y, found), (params, x) = value_and_gradients(lambda p, x: residual(g, p, x, **options), as_graph(ROWS))
    expected = value_and_gradients(lambda p, x: (x + FLAT(p, x), log_det(FLAT, p, x)), ROWS)
    assert isinstance(y, Graph) and y.nodes.shape == (4, 2, 2) and y.edges["weight"].shape == (4,)
    found = (as_rows(y), found), (params, as_rows(x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), found, expected)


@pytest.mark.parametrize("return_status", [False, True])
def test_inverse(return_status):
    """It undoes the map, has its structure and its derivatives; the status is one of examples."""
    graph = as_graph(ROWS)
    y = residual(g, PARAMS, graph, estimator=Exact())[0]
    found = residual_inverse(g, PARAMS, y, return_status=return_status)
    x, status = found if return_status else (found, None)
    assert isinstance(x, Graph)
    np.testing.assert_allclose(as_rows(x), ROWS, atol=1e-10)
    assert status is None or status.converged.shape == (4,)
    gradient = jax.grad(lambda p: jnp.sum(residual_inverse(g, p, y).nodes))(PARAMS)
    expected = jax.grad(lambda p: jnp.sum(residual_inverse(FLAT, p, as_rows(y))[:, :4]))(PARAMS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-10), gradient, expected)


def test_with_a_condition_and_diagnostics():
    """A tuple of NumPy's arrays with a condition, eager, mapped over keys, with diagnostics."""
    x, c = (np.full((2, 3), 0.2), np.full(2, 0.1)), np.array([0.5, 0.3])

    def g(params, x, c):
        return params * jnp.sin(x[0] * c[:, None]), params * jnp.cos(x[1] + c)

    run = lambda key: residual(g, 0.5, x, condition=c, key=key, return_diagnostics=True)  # noqa: E731
    y, log_det, diagnostics = jax.vmap(run)(jax.random.split(jax.random.key(0), 5))
    assert isinstance(y, tuple) and log_det.shape == (5, 2) and diagnostics.mean.shape == (5,)
    expected = 3 * np.log1p(0.5 * c * np.cos(0.2 * c)) + np.log1p(-0.5 * np.sin(0.1 + c))
    exact = residual(g, 0.5, x, condition=c, estimator=Exact())[1]
    np.testing.assert_allclose(exact, expected, rtol=1e-12)


X = {"a": np.ones((2, 3)), "b": np.ones(2)}
BAD = {
    "batch sizes": ({**X, "b": np.ones(3)}, r"['b']: expected 2 examples as in NAME['a'], got shape (3,)"),
    "dtypes": ({**X, "b": np.ones(2, np.float32)}, "['b']: expected float64, the dtype of NAME['a'], got float32"),
    "integers": ({**X, "b": np.ones(2, int)}, "['b']: expected a float array [B, ...], got dtype int64"),
    "no batch": ({**X, "b": np.ones(())}, "['b']: expected a float array [B, ...], got shape ()"),
    "a number": ({**X, "b": 1.0}, "['b']: expected a float array [B, ...], got float"),
}
TREE = jax.tree.structure(X)
BAD_MAPS = {
    "another structure": (
        lambda p, x: (x["a"], x["b"]),
        f"g: expected an output {TREE} like NAME, got PyTreeDef((*, *))",
    ),
    "another shape": (
        lambda p, x: {**x, "a": x["a"][:, :2]},
        "g: expected an output float64 (2, 3) at ['a'] like NAME, got float64 (2, 2)",
    ),
    "another dtype": (
        lambda p, x: {**x, "b": x["b"].astype(jnp.float32)},
        "g: expected an output float64 (2,) at ['b'] like NAME, got float32 (2,)",
    ),
    "a number": (lambda p, x: {**x, "b": 1.0}, "g: expected an output float64 (2,) at ['b'] like NAME, got float ()"),
}


def raises(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(message), error.value


@pytest.mark.parametrize("name", BAD)
def test_bad_events(name):
    """Each names the leaf, what was expected and what came."""
    x, message = BAD[name]
    for argument, call in (("x", partial(residual, estimator=Exact())), ("y", residual_inverse)):
        raises(lambda call=call: call(lambda p, x: x, None, x), argument + message.replace("NAME", argument))


@pytest.mark.parametrize("name", BAD_MAPS)
def test_bad_maps(name):
    """A map that changes the tree, or an array of it."""
    bad, message = BAD_MAPS[name]
    for argument, call in (("x", partial(residual, estimator=Exact())), ("y", residual_inverse)):
        raises(lambda call=call: call(bad, None, X), message.replace("NAME", argument))
