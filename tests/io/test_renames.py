"""Files whose arrays have former names."""

import chex
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from tests.io.flows import CONDITION
from tests.io.rewriting import X, rewrite


@pytest.mark.parametrize("with_like", [False, True])
def test_files_of_version_1(composed, composed_path, with_like):
    """Standard deviations, of ActNorms in stacks too and among a layer's arguments, were called `deviation`."""

    def former(arrays, metadata):
        for name in [name for name in arrays if name.endswith(".std")]:
            arrays[name.removesuffix("std") + "deviation"] = arrays.pop(name)
        metadata["structure"] = metadata["structure"].replace('"std"', '"deviation"')
        metadata["format_version"] = "1"
        assert sum(name.endswith(".deviation") for name in arrays) == 3 and '"deviation"' in metadata["structure"]

    rewrite(composed_path, former)
    again = rf.load(composed_path, like=composed if with_like else None)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(composed))
    np.testing.assert_array_equal(again(X, CONDITION), composed(X, CONDITION))
