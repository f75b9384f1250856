"""Laws of lengths and estimators of a user's own: plain classes, hashable or not, pytrees or not, in every mode."""

from dataclasses import dataclass, field
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import resflow_jax as rf
from resflow_jax.functional.estimators import Exact, Roulette, Truncated, check_estimator, needs_key
from resflow_jax.functional.length_laws import Geometric
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.opaque import Opaque, as_tree
from resflow_jax.functional.series import PowerSeries
from tests.compilations import compilations
from tests.functional.contractions import check_two_orders, dense_log_det, dense_series, z_scores
from tests.functional.estimates import estimate, exact, flat_value_and_gradient, loss_of, net_named


def power_law(exponent, key, shape):
    """Lengths with P(N >= k) = k^-exponent, by inversion: N = floor(u^(-1 / exponent))."""
    u = jax.random.uniform(key, shape, minval=1e-7)
    return jnp.floor(u ** (-1 / exponent)).astype(jnp.int32)


class Plain:
    """A plain class, equal to itself alone; its survival is right for k >= 1 only."""

    def __init__(self, exponent=2.0):
        self.exponent = exponent

    def sample(self, key, shape):
        return power_law(self.exponent, key, shape)

    def survival(self, k):
        return k.astype(float) ** -self.exponent

    def tail_ratio(self):
        return 1.0


@dataclass
class Unhashable(Plain):
    """Dataclasses that are not frozen have no hash."""

    exponent: float = 2.0
    notes: list = field(default_factory=list)


@dataclass(frozen=True)
class Hashable(Plain):
    """Equal laws are one."""

    exponent: float = 2.0


class Node(NamedTuple):
    """A pytree of an exponent, traced, and an integer."""

    exponent: float = 2.0
    shift: int = 0

    def sample(self, key, shape):
        return power_law(self.exponent, key, shape) + self.shift

    def survival(self, k):
        return jnp.maximum(k - self.shift, 1).astype(float) ** -self.exponent

    def tail_ratio(self):
        return 1.0


class Adaptive:
    """A law of lengths that follows the Lipschitz constant, and warns with it."""

    def __init__(self, made=None):
        self.made = [] if made is None else made

    def within(self, lipschitz):
        self.made.append(lipschitz)
        return Geometric(1 - lipschitz)

    sample = survival = tail_ratio = lambda *_: 1 / 0


LAWS = {"plain": Plain(), "unhashable": Unhashable(), "hashable": Hashable(), "pytree": Node(2.0, 1)}
POWER_SERIES = {"minres_steps": 0, "exact_terms": 1, "samples": 2}
TABLE = jnp.array([1.0, 0.75, 0.5, 0.25, 0.0])


def estimates(name, keys, **options):
    estimator = Roulette(LAWS[name], **options)
    return jax.jit(jax.vmap(lambda key: estimate(net_named("moderate"), estimator, key)))(keys)


@pytest.mark.parametrize(("name", "options"), [("plain", {}), ("pytree", POWER_SERIES)], ids=str)
def test_a_law_is_unbiased(name, options):
    """P(N >= k) = k^-2: value and gradient over 4000 keys against dense linear algebra."""
    keys = jax.random.split(jax.random.key(0), 4000)
    assert np.abs(z_scores(estimates(name, keys, **options), exact("moderate"))).max() < 4.5


def test_laws_that_differ_in_their_hash_alone():
    keys = jax.random.split(jax.random.key(0), 5)
    expected = estimates("plain", keys)
    np.testing.assert_allclose(estimates("unhashable", keys), expected, rtol=1e-12)
    np.testing.assert_allclose(estimates("hashable", keys), expected, rtol=1e-12)


class Bounded(Plain):
    """P(N >= k) = 1, 3/4, 1/2, 1/4 for k = 1..4: it can be unrolled."""

    def sample(self, key, shape):
        return jax.random.randint(key, shape, 1, 5)

    def survival(self, k):
        return jnp.maximum(5 - k, 0).astype(float) / 4


@pytest.mark.parametrize(("make", "gradient"), [(Bounded, "neumann"), (lambda: BoundedNode(TABLE), "autodiff")])
def test_bounded_laws(make, gradient):
    """Exact terms and minimal-residual steps leave no error here, in chunks, eager, jitted and mapped."""
    estimator = Roulette(make(), exact_terms=40, probe="orthogonal", probes=4, gradient=gradient, minres_steps=0)
    g, params, x = net_named("moderate")
    run = lambda key: flat_value_and_gradient(  # noqa: E731
        g, params, x, lambda p, x: residual(g, p, x, key=key, estimator=estimator, chunk_size=1)
    )
    keys = jax.random.split(jax.random.key(0), 2)
    found = jax.jit(jax.vmap(run))(keys)
    np.testing.assert_allclose(found, np.tile(exact("moderate"), (2, 1)), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(run(keys[0]), found[0], rtol=1e-10)


@jax.tree_util.register_dataclass
@dataclass
class BoundedNode(Bounded):
    """The same with a table that may be traced."""

    table: jax.Array

    def survival(self, k):
        return self.table[jnp.clip(k - 1, 0, 4)]


def test_a_traced_law():
    """Arrays of a pytree are arguments: no new program; autodiff says that it cannot know how long they are."""
    g, params, x = net_named("moderate")
    key, traces = jax.random.key(0), []

    @jax.jit
    def run(law):
        traces.append(None)
        return residual(g, params, x, key=key, estimator=Roulette(law, 0, samples=4))[1]

    results = [run(Node(exponent)) for exponent in (2.0, 0.5)]
    assert len(traces) == 1 and np.abs(results[0] - results[1]).max() > 1e-4
    eager = residual(g, params, x, key=key, estimator=Roulette(Node(0.5), 0, samples=4))[1]
    np.testing.assert_allclose(results[1], eager, rtol=1e-12)

    with pytest.raises(ValueError, match=r"length: gradient='autodiff' expected .* BoundedNode of traced arrays"):
        of_law = lambda law: residual(g, params, x, key=key, estimator=Roulette(law, 0, gradient="autodiff"))  # noqa: E731
        jax.jit(of_law)(BoundedNode(TABLE))
    with pytest.raises(ValueError, match=r"length: .* expected a distribution with P\(N > 4096\)"):
        residual(g, params, x, key=key, estimator=Roulette(Plain(1.0), 0, gradient="autodiff"))


@pytest.mark.parametrize("name", ["exponent", "key"])
def test_a_mapped_law(name):
    """vmap over the leaves of a law, and its gradient in params, are those of a loop."""
    g, params, x = net_named("moderate")
    exponents = jnp.array([2.0, 1.5, 1.0]) if name == "exponent" else jnp.array(2.0)
    keys = jax.random.split(jax.random.key(1), 3) if name == "key" else jax.random.key(1)
    axes = (0, None) if name == "exponent" else (None, 0)

    def loss(params, exponent, key):
        y, log_det = residual(g, params, x, key=key, estimator=Roulette(Node(exponent), 0))
        return loss_of(g, params, x, log_det, y)

    found = jax.jit(jax.grad(lambda p: jnp.sum(jax.vmap(partial(loss, p), axes)(exponents, keys))))(params)
    lanes = [(exponents[n], keys) if name == "exponent" else (exponents, keys[n]) for n in range(3)]
    one = jax.jit(jax.grad(loss))
    expected = jax.tree.map(lambda *g: sum(g), *(one(params, *lane) for lane in lanes))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), found, expected)


@pytest.mark.parametrize(("make", "again"), [(Hashable, 0), (lambda: LAWS["unhashable"], 0), (Unhashable, 1)])
def test_equal_laws_are_compiled_once(make, again):
    """A law that can be hashed is known by its value, another one by its identity."""
    g, params, x = net_named("small")
    run = lambda: residual(g, params, x, key=jax.random.key(0), estimator=Roulette(make(), 0, samples=3))  # noqa: E731
    run()
    with compilations() as found:
        run()
    assert (len(found) > 0) == again


def test_within():
    """It is asked for the law of a Lipschitz constant, if it is there."""
    g, params, x = net_named("moderate")
    law, key = Adaptive(), jax.random.key(0)
    found = residual(g, params, x, key=key, estimator=Roulette(law, 0), lipschitz=0.8)
    assert law.made == [0.8]
    expected = residual(g, params, x, key=key, estimator=Roulette(Geometric(1 - 0.8), 0))
    np.testing.assert_array_equal(found[1], expected[1])
    with pytest.warns(RuntimeWarning, match="^length: .*Short.* infinite variance"):
        residual(g, params, x, key=key, estimator=Roulette(Short(), 0), lipschitz=0.8)


class Short(Bounded):
    """A tail that is too short, as it says."""

    def tail_ratio(self):
        return np.float32(0.0)


class Wrong(Plain):
    """A law that returns what it must not."""

    def __init__(self, **methods):
        super().__init__()
        self.__dict__.update(methods)


BAD_LAWS = {
    "float lengths": (
        lambda: Wrong(sample=jax.random.uniform),
        r"length: expected sample\(key, \(1,\)\) to return int",
    ),
    "one length": (lambda: Wrong(sample=lambda key, shape: 3), r"length: expected sample.* got int64 \(\)"),
    "integer survival": (lambda: Wrong(survival=lambda k: k), r"length: expected survival\(k\) to return floats \(\)"),
    "no survival": (lambda: Wrong(survival=None), "length: expected .* without survival$"),
    "a class": (lambda: Plain, "length: expected an instance, got the class Plain"),
    "its own check": (lambda: Wrong(check=lambda: exec("raise ValueError('exponent: no')")), "exponent: no"),
}


@pytest.mark.parametrize("name", BAD_LAWS)
def test_bad_laws(name):
    """What is missing or wrong is named."""
    make, message = BAD_LAWS[name]
    g, params, x = net_named("small")
    with pytest.raises(ValueError, match=message):
        residual(g, params, x, key=jax.random.key(0), estimator=Roulette(make(), 0))


# Estimators


class TwoTerms:
    """tr(J) - tr(J^2) / 2 with exact traces, over all unit vectors: no key."""

    needs_key = False

    def estimate(self, g, x, key):
        assert key is None
        y, pullback = jax.vjp(g, x)

        def of_basis(e):
            v = jnp.broadcast_to(e[None], x.shape)
            (first,) = pullback(v)
            (second,) = pullback(first)
            return jnp.sum(v * (first - second / 2), axis=1)

        return x + y, jnp.sum(jax.vmap(of_basis)(jnp.eye(x.shape[1], dtype=x.dtype)), axis=0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weighted:
    """A pytree with an array: the first term of one random probe, times a weight."""

    weight: jax.Array

    def estimate(self, g, x, key):
        v = jax.random.rademacher(key, x.shape, x.dtype)
        y, product = jax.jvp(g, (x,), (v,))
        return x + y, self.weight * jnp.sum(v * product, axis=1)


def test_a_users_estimator():
    """Two terms of the power series: value, gradient and second derivatives; jitted, eager, in a scan."""
    g, params, x = net_named("moderate")
    value = lambda p, x: residual(g, p, x, estimator=TwoTerms())  # noqa: E731
    found = jax.jit(lambda: flat_value_and_gradient(g, params, x, value))()
    series = lambda p, x: (x + g(p, x), dense_series(g, p, x, 2))  # noqa: E731
    truncated, key = Truncated(2, probe="orthogonal", probes=4), jax.random.key(0)
    both = lambda: (flat_value_and_gradient(g, params, x, series), estimate((g, params, x), truncated, key))  # noqa: E731
    for expected in jax.jit(both)():
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)
    _, log_det, diagnostics = residual(g, params, x, estimator=TwoTerms(), return_diagnostics=True)
    np.testing.assert_allclose(diagnostics.mean, jnp.mean(log_det))
    np.testing.assert_allclose(log_det, found[: len(x)], rtol=1e-12)
    check_two_orders(lambda p, x: jnp.sum(jnp.sin(value(p, x)[1])), params, x)
    scanned = lax.scan(lambda x, p: value(p, x), x, jax.tree.map(lambda leaf: leaf[None], params))[1][0]
    np.testing.assert_allclose(scanned, log_det, rtol=1e-12)


def test_a_users_estimator_with_a_condition_and_a_key():
    """g has its condition bound; the estimator is traced, and mapped along with the key."""
    x, c = jnp.full((2, 3), 0.2), jnp.array([0.5, 0.3])
    g = lambda p, x, c: p * jnp.sin(x * c[:, None])  # noqa: E731
    run = lambda p, w, key: residual(g, p, x, condition=c, key=key, estimator=Weighted(w))[1]  # noqa: E731
    weights, keys = jnp.array([1.0, 2.0]), jax.random.split(jax.random.key(0), 2)
    found = jax.jit(jax.vmap(jax.value_and_grad(lambda *args: jnp.sum(run(*args)), 1), (None, 0, 0)))(
        0.5, weights, keys
    )
    trace = jnp.sum(3 * 0.5 * c * jnp.cos(0.2 * c))
    np.testing.assert_allclose(found[0], weights * trace)  # the Jacobian is diagonal: no noise
    np.testing.assert_allclose(found[1], [trace, trace])
    with pytest.raises(ValueError, match=r"^key: Weighted expected a PRNG key, got None"):
        run(0.5, 1.0, None)


def test_estimators_of_flows():
    """An estimator that is no pytree becomes one, which is an estimator too."""
    g, params, x = net_named("small")
    wrapped = as_tree(TwoTerms())
    assert isinstance(wrapped, Opaque) and as_tree(wrapped) is wrapped and as_tree(Exact()) == Exact()
    check_estimator(wrapped)
    assert not needs_key(wrapped) and not needs_key(Exact()) and needs_key(Roulette()) and needs_key(Weighted(1.0))
    found = jax.jit(lambda estimator: residual(g, params, x, estimator=estimator))(wrapped)
    np.testing.assert_allclose(found[1], residual(g, params, x, estimator=TwoTerms())[1], rtol=1e-12)


@cache
def small_flow():
    flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=3, blocks=2, hidden=(4,), coefficient=0.5), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    return flow, x, jnp.sum(flow.log_prob(x, estimator=Exact()))


IN_FLOWS = [Roulette(Plain(), 0), Roulette(Node(2.0, 1), 0), TwoTerms()]


@pytest.mark.parametrize("estimator", IN_FLOWS, ids=["plain law", "traced law", "constant"])
def test_in_a_flow(estimator):
    """A flow of a single block, and of several, takes them: log_prob, its gradient, and the map itself."""
    flow, x, exact = small_flow()
    key = jax.random.key(0) if needs_key(estimator) else None
    graphdef, state = nnx.split(flow)
    run = lambda state, x: nnx.merge(graphdef, state).log_prob(x, key=key, estimator=estimator)  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(lambda *args: jnp.sum(run(*args)), 1))(state, x)
    assert abs(value - exact) < 2 and np.any(gradient != 0)
    np.testing.assert_allclose(jnp.sum(flow.log_prob(x, key=key, estimator=estimator)), value, rtol=1e-10)


class Returns:
    """An estimator that returns what it is told to."""

    needs_key = False

    def __init__(self, estimate):
        self.estimate = estimate


BAD_ESTIMATORS = {
    "no method": (
        PowerSeries(),
        "estimator: expected Exact, Truncated or Roulette, or an object with the method estimate",
    ),
    "a class": (TwoTerms, "estimator: expected Exact"),
    "one value": (Returns(lambda g, x, key: x), "estimator: expected Returns.estimate to return y float64"),
    "a scalar": (Returns(lambda g, x, key: (x, 0.0)), "estimator: expected Returns.estimate to return y"),
    "more rows": (
        Returns(lambda g, x, key: (g(jnp.concatenate([x, x]))[: len(x)], x[:, 0])),
        r"estimator: expected Returns.estimate to call g with float64 \(3, 4\), got float64 \(6, 4\); jax.vmap",
    ),
}


@pytest.mark.parametrize("name", BAD_ESTIMATORS)
def test_bad_estimators(name):
    """What it must do is named."""
    estimator, message = BAD_ESTIMATORS[name]
    g, params, x = net_named("small")
    with pytest.raises(ValueError, match=message):
        residual(g, params, x, estimator=estimator)


def test_the_law_stays_in_the_tree():
    """Trees of a `Roulette`: leaves, paths, equality; what JAX puts in the place of leaves is not checked."""
    plain, node = Roulette(Plain(), 2), Roulette(Node(jnp.ones(()), 1), 0)
    assert jax.tree.leaves(plain) == [] and jax.tree.map(lambda leaf: leaf, plain) == plain
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(node)]
    assert paths == [".length.exponent", ".length.shift"]
    assert jax.tree.structure(Roulette(Plain(), 0)) != jax.tree.structure(plain)
    assert jax.tree.structure(Roulette(Hashable(2.0), 0)) == jax.tree.structure(Roulette(Hashable(2.0), 0))
    assert jax.tree.structure(node).unflatten([None, None]).length == Node(None, None)
    assert hash(Opaque([])) != hash(Opaque([])) and Opaque(1) != Opaque(1.0) and Opaque(1) != 1


def test_dense_reference():
    """The reference of the two terms is close to the log-det for a small map alone."""
    net = net_named("small")
    assert 1e-4 < np.abs(dense_series(*net, 2) - dense_log_det(*net)).max() < 4 * 0.3**3 / (3 * 0.7)
