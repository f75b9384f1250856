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


@cache
def compiled(name):
    return jax.tree.leaves(CALLS[name]())


@pytest.mark.parametrize("name", CALLS)
def test_checks_of_jax(name):
    """No tracer leaks, nothing is NaN, neither ranks nor dtypes are promoted."""
    assert jax.config.jax_numpy_rank_promotion == "raise" and jax.config.jax_numpy_dtype_promotion == "strict"
    with jax.checking_leaks(), jax.debug_nans(True):
        leaves = jax.tree.leaves(CALLS[name]())
    assert leaves and not any(np.isnan(np.asarray(leaf)).any() for leaf in leaves)


@pytest.mark.parametrize("name", CALLS)
def test_disable_jit(name):
    """Where JAX compiles nothing the results are those of compiled programs, but to rounding."""
    with jax.disable_jit():
        leaves = jax.tree.leaves(CALLS[name]())
    for leaf, expected in zip(leaves, compiled(name), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-7, atol=1e-7)
