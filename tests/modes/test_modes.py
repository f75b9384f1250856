"""The library under the modes of JAX that look for mistakes: every public call works, and returns what it returns
without them.

The suite itself runs where JAX promotes neither ranks nor dtypes (see `tests.conftest`).
"""

from functools import cache

import jax
import numpy as np
import pytest

from tests.modes.calls import CALLS

pytestmark = pytest.mark.filterwarnings("ignore:length. .*infinite variance")


# Eager loops of Python, in which each operation is compiled by itself: a few calls that meet every primitive and loop.
WITHOUT_JIT = [
    "residual, Exact",
    "residual, Roulette",
    "residual, Roulette, autodiff",
    "residual_inverse, Anderson",
    "residual_inverse, Broyden",
    "log_prob, Exact",
    "log_prob, Roulette",
    "inverse, Anderson",
    "images, log_prob",
    "update_norms, plain",
]
# Nothing is traced twice for the others: leaks are looked for where layers and estimators differ, not in every pair.
WITH_CHECKS = [
    *(
        name
        for name in CALLS
        if name.startswith(("residual", "log_prob", "inverse", "images")) and name != "images, train"
    ),
    *(f"{method}, {kind}" for method in ("initialize", "update_norms", "train") for kind in ("plain", "learned norms")),
    "new flow, plain",
    "converge_norms, plain",
    "tighten, plain",
    "order_loss, gradient",
    "sample",
    "sample_and_log_prob",
    "inverse_and_log_prob",
    "power_iteration",
    "stateless",
    "evaluate_bits_per_dim",
    "vector_log_prob",
]


@cache
def compiled(name):
    return jax.tree.leaves(CALLS[name]())


@pytest.mark.parametrize("name", CALLS)
def test_every_call_runs(name):
    """Where JAX promotes neither ranks nor dtypes."""
    assert jax.config.jax_numpy_rank_promotion == "raise" and jax.config.jax_numpy_dtype_promotion == "strict"
    assert compiled(name)


@pytest.mark.parametrize("name", WITH_CHECKS)
def test_checks_of_jax(name):
    """No tracer leaks, and nothing is NaN on the way."""
    with jax.checking_leaks(), jax.debug_nans(True):
        leaves = jax.tree.leaves(CALLS[name]())
    assert leaves and not any(np.isnan(np.asarray(leaf)).any() for leaf in leaves)


@pytest.mark.parametrize("name", WITHOUT_JIT)
def test_disable_jit(name):
    """Where JAX compiles nothing the results are those of compiled programs, but to rounding."""
    with jax.disable_jit():
        leaves = jax.tree.leaves(CALLS[name]())
    for leaf, expected in zip(leaves, compiled(name), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-7, atol=1e-7)
