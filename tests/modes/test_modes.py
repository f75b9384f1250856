"""The library under the modes of JAX that look for mistakes: every public call works, and returns what it returns
without them.

Ranks, dtypes and leaked tracers are checked in every test (see `tests.conftest` and `tests.leaks`). With
`jax.checking_leaks` itself, which also switches JAX's caches off, a few calls run here.
"""

import jax
import numpy as np
import pytest

from tests.modes.calls import CALLS, vectors

pytestmark = pytest.mark.filterwarnings("ignore:length. .*infinite variance")

TRACED = [
    "residual, Exact",
    "residual, Roulette",
    "residual, condition",
    "residual_inverse, Anderson",
    "monotone, Roulette",
    "inverse, plain",
    "new flow, plain",
    "sample_and_log_prob",
    "train",
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
    "monotone, Roulette",
    "residual_inverse, Broyden",
    "inverse, Anderson",
    "new flow, plain",
    "update_norms, plain",
    "train",
]


@pytest.fixture(scope="module")
def nothing_compiled():
    """A program that is compiled already is not traced again, and tells nothing of leaks; so all are forgotten once.

    What the first of these tests compile was checked for leaks there.
    """
    vectors()  # which is made before
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
