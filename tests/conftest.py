"""Every test runs in float64, so that a wrong formula cannot hide behind rounding."""

import jax
import pytest

jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="module")
def quick_compilation():
    """For tiny programs that are compiled often and run once, XLA's optimisations cost more than they bring."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
