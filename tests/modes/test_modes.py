"""The library under the modes of JAX that look for mistakes: every public call works, and returns what it returns
without them.

The suite itself runs where JAX promotes neither ranks nor dtypes (see `tests.conftest`). It does not look for tracers
that leak: JAX then traces everything anew at every call, and files of tests took from 1.2 to more than 8 times as long.
"""

import jax
import numpy as np
import pytest

from tests.modes.calls import CALLS, ESTIMATORS, SOLVERS

pytestmark = pytest.mark.filterwarnings("ignore:length. .*infinite variance")

# Leaks are looked for where layers and estimators differ, not in every pair.
TRACED = [
    *(f"residual, {name}" for name in ESTIMATORS),
    *(f"residual_inverse, {name}" for name in SOLVERS),
    *("residual, condition", "residual, pair and own law", "residual, own estimator"),
    *(f"{method}, plain" for method in ("log_prob", "inverse", "new flow", "initialize", "update_norms", "order_loss")),
    *("sample", "sample_and_log_prob", "inverse, gradient", "__call__", "train", "log_prob, all layers"),
    *(name for name in CALLS if name.startswith(("activation", "best_start", "power_iteration", "gram_iteration"))),
]
# Eager loops of Python, in which each operation is compiled by itself: a few calls that meet every primitive and loop.
WITHOUT_JIT = [
    "residual, Exact",
    "residual, Roulette",
    "residual, Roulette, autodiff",
    "residual, condition",
    "residual, pair and own law",
    "residual, own estimator",
    "residual_inverse, Anderson",
    "residual_inverse, Broyden",
    "log_prob, Exact",
    "log_prob, Roulette",
    "inverse, Anderson",
    "images, log_prob",
    "new flow, plain",
    "update_norms, plain",
    "train",
]


@pytest.fixture
def nothing_compiled():
    """A program that is compiled already is not traced again, and tells nothing of leaks."""
    jax.clear_caches()


@pytest.mark.parametrize("name", TRACED)
def test_no_tracer_leaks(name, nothing_compiled):
    with jax.checking_leaks():
        CALLS[name]()


@pytest.mark.parametrize("name", CALLS)
def test_values(name):
    """Nothing is NaN, in what is returned or on the way; where JAX compiles nothing the numbers agree to rounding."""
    with jax.debug_nans(True):
        compiled = jax.tree.leaves(CALLS[name]())
    assert compiled and not any(np.isnan(np.asarray(leaf)).any() for leaf in compiled)
    if name in WITHOUT_JIT:
        with jax.disable_jit():
            leaves = jax.tree.leaves(CALLS[name]())
        for leaf, expected in zip(leaves, compiled, strict=True):
            np.testing.assert_allclose(leaf, expected, rtol=1e-7, atol=1e-7)


def test_names():
    assert set(TRACED + WITHOUT_JIT) <= set(CALLS)
