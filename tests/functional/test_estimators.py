"""The settings of estimators: what they refuse and what they say; laws that adapt to a constant or are traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resflow_jax.functional.estimators import Exact, Roulette, Truncated
from resflow_jax.functional.length_laws import Defensive, Fitted, Geometric
from resflow_jax.functional.logdet import residual
from tests.functional.estimates import (
    PAPERS,
    estimate,
    net_named,
)

# Laws: Lipschitz constants, tables that are traced


@pytest.mark.parametrize("estimator", [PAPERS, Roulette(Geometric(0.5))], ids=str)
def test_infinite_variance_is_warned_of(estimator):
    """Only if the Lipschitz constant is known, which the message names."""
    net, key = net_named("small"), jax.random.key(0)
    with pytest.warns(RuntimeWarning, match=r"^length: .* infinite variance .* up to 0\.9"):
        residual(*net, key=key, estimator=estimator, lipschitz=0.9)
    residual(*net, key=key, estimator=estimator)


def test_the_law_adapts_to_the_lipschitz_constant():
    """residual(..., lipschitz=L) uses law.within(L): by default that is Defensive(0.4, lipschitz=L)."""
    net, keys = net_named("saturated"), jax.random.split(jax.random.key(0), 200)

    @jax.jit
    @jax.vmap
    def values(key):
        given = residual(*net, key=key, estimator=Roulette(exact_terms=0), lipschitz=0.9)[1]
        explicit = residual(*net, key=key, estimator=Roulette(Defensive(0.4, lipschitz=0.9), 0))[1]
        return given, explicit, residual(*net, key=key, estimator=Roulette(exact_terms=0))[1]

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
        ({"probe": "normal"}, "probe: expected one of rademacher, gaussian, orthogonal, hadamard; got 'normal'"),
        ({"subsample": 0}, "subsample: expected an integer of at least 1, got 0"),
        ({"subsample": 2, "gradient": "autodiff"}, 'subsample: expected 1 with gradient="autodiff", got 2'),
        ({"trace_probes": -1}, "trace_probes: expected an integer of at least 0, got -1"),
        ({"trace_probes": 2, "exact_terms": 0}, "trace_probes: expected 0 without exact terms, got 2"),
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
    with pytest.raises(
        ValueError, match=r"^trace_probes: expected at most 4 orthogonal probes in 4 dimensions, got 3 for each of 2"
    ):
        own_trace = Roulette(probe="orthogonal", probes=2, trace_probes=3)
        residual(*net_named("small"), key=jax.random.key(0), estimator=own_trace)


@pytest.mark.parametrize(
    "table", [[1.0, 0.0], [0.5, 0.7], [1.5, 0.5], [0.5, float("nan")], [[1.0, 0.5], [1.0, 0.5]]], ids=str
)
def test_bad_table(table):
    """The table of a `Fitted` law is checked where it is used: for one block it is [K]."""
    with pytest.raises(ValueError, match=r"^table: expected"):
        residual(*net_named("small"), key=jax.random.key(0), estimator=Roulette(Fitted(jnp.array(table))))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_exact_log_dets_of_small_jacobians_in_16_bits(dtype):
    """I + J is not rounded to 16 bits, where a J of 0.0002 would be lost; the result is rounded once."""
    slope, x = jnp.asarray(0.0002, dtype), jnp.ones((2, 3), dtype)
    log_det = residual(lambda slope, x: slope * x, slope, x, estimator=Exact())[1]
    assert log_det.dtype == dtype
    np.testing.assert_allclose(log_det.astype(float), 3 * np.log1p(float(slope)), rtol=0.01)


@pytest.mark.parametrize(
    "estimator", [Roulette(), Roulette(minres_steps=0, trace_probes=2)], ids=["default", "power series"]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_estimates_of_small_jacobians_in_16_bits(dtype, estimator):
    """The series subtracts numbers that are nearly equal: in 16 bits it would be off by nats, with any key."""
    slope, x = jnp.full(784, 0.0002, dtype), jnp.ones((16, 784), dtype)

    def mean(slope):
        g = lambda slope, x: slope[None] * x  # noqa: E731
        log_det = residual(g, slope, x, key=jax.random.key(0), estimator=estimator)[1]
        return jnp.mean(log_det.astype(jnp.float32))

    value, gradient = jax.jit(jax.value_and_grad(mean))(slope)
    np.testing.assert_allclose(value, np.log1p(slope.astype(float)).sum(), rtol=0.02)
    np.testing.assert_allclose(gradient.astype(float), 1 / (1 + slope.astype(float)), rtol=0.02)
