"""Bounded values: samples are clipped to their support and inputs beyond it refused, also behind rearrangements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflow_jax as rf

KEY = jax.random.key(0)
CHAINS = {
    "flattened": lambda: [rf.Flatten((2, 2, 1)), rf.Logit(0.05), rf.ActNorm((4,))],
    "squeezed": lambda: [rf.Squeeze((2, 2, 1)), rf.Reshape((1, 1, 4), (4,)), rf.Logit(0.05), rf.ActNorm((4,))],
    "in another order": lambda: [rf.Permutation([1, 0]), rf.Bounded(0.0, 1.0), rf.ActNorm((2,))],
}


@pytest.mark.parametrize("name", CHAINS)
def test_behind_rearrangements(name):
    layers = CHAINS[name]()
    flow = rf.Flow(rf.Chain(layers), rf.StandardNormal(layers[-1].shape))
    assert [float(end) for end in flow.support] == [0, 1]
    x = flow.sample(KEY, 200, temperature=5.0)
    assert x.min() >= 0 and x.max() <= 1
    with pytest.raises(ValueError, match=r"^x: expected .*\[0, 1\]"):
        flow.log_prob(jnp.full((1, *flow.event_shape), 1.5))


def test_at_the_other_end():
    """The image of an inverted chain, and the support of its inverse."""
    chain = rf.Chain([rf.ActNorm((4,)), rf.Invert(rf.Logit(0.05)), rf.Reshape((4,), (2, 2))])
    assert chain.image == rf.Invert(rf.Logit(0.05)).image and chain.support is None
    assert np.isfinite([end for end in chain.codomain(jnp.float32)[:2]]).all()


def test_ends_of_single_elements_are_not_moved():
    """Behind a permutation they would belong to other elements: nothing is clipped there."""
    bounded = rf.Bounded(np.asarray([0.0, 1.0]), np.asarray([1.0, 3.0]))
    assert rf.Chain([bounded]).support is not None
    assert rf.Chain([rf.Permutation([1, 0]), bounded]).support is None
