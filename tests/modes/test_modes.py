"""The library under the modes of JAX that look for mistakes: every public call works and gives the numbers it gives
without them.

The suite itself runs where JAX promotes neither ranks nor dtypes (see `tests.conftest`).
"""

import jax
import numpy as np
import pytest

from tests.modes.calls import CALLS


@pytest.mark.filterwarnings("ignore:length: .*infinite variance")
@pytest.mark.parametrize("name", CALLS)
def test_no_promotion(name):
    """Neither ranks nor dtypes are promoted, nor does a tracer leak, in any public call; all numbers are finite."""
    assert jax.config.jax_numpy_rank_promotion == "raise" and jax.config.jax_numpy_dtype_promotion == "strict"
    for leaf in jax.tree.leaves(CALLS[name]()):
        assert not np.isnan(np.asarray(leaf)).any()
