"""Shared fixtures of the tests of bridges."""

import jax
import pytest


@pytest.fixture(scope="module")
def promotion():
    """Ranks and dtypes are promoted, as distrax, TFP, NumPyro, flowjax and optax do by themselves."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
