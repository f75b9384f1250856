"""The sizes that the configurations of experiments promise."""

import math

import jax
import pytest
from flax import nnx

import resflow_jax as rf
from experiments.configs import cifar10_densenet, digits, digits_densenet

# config: number of parameters
SIZES = {
    "cifar10_densenet": (cifar10_densenet.CONFIG.model, 24_894_586),
    "residual flow of default sizes": (rf.ImageFlowConfig((32, 32, 3)), 25_174_129),
    "digits_densenet": (digits_densenet.CONFIG.model, 107_398),
    "digits": (digits.CONFIG.model, 107_361),
}


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters(name):
    """Counted without making any."""
    config, expected = SIZES[name]
    flow = nnx.eval_shape(lambda: rf.ResidualFlow(config, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(flow, nnx.Param))) == expected
