"""The density is finite at everything that a bridge samples, also where a logit has rounded a sample to 0 or 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflow_jax as rf
from tests.interop.flows import make_saturated_flow

KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def flow():
    return make_saturated_flow()


def of_distrax(flow):
    distrax = pytest.importorskip("distrax", reason="needs the extra distrax")
    base = distrax.MultivariateNormalDiag(jnp.zeros(flow.dim), jnp.ones(flow.dim))
    distribution = distrax.Transformed(base, rf.interop.distrax.bijector(flow, estimator=rf.Exact()))
    return distribution, distribution.sample(seed=KEY, sample_shape=(64,))


def of_numpyro(flow):
    pytest.importorskip("numpyro", reason="needs the extra numpyro")
    distribution = rf.interop.numpyro.FlowDistribution(flow, estimator=rf.Exact())
    return distribution, distribution.sample(KEY, (64,))


def of_flowjax(flow):
    pytest.importorskip("flowjax", reason="needs the extra flowjax")
    from flowjax.distributions import StandardNormal, Transformed

    distribution = Transformed(StandardNormal(flow.event_shape), rf.interop.flowjax.FlowBijection(flow))
    return distribution, distribution.sample(KEY, (64,))


@pytest.mark.parametrize("sample", [of_distrax, of_numpyro, of_flowjax])
def test_log_prob_is_finite_at_own_samples(flow, sample):
    """Eager and compiled, and so are its derivatives; a part of the samples is white as no other can be."""
    distribution, x = sample(flow)
    assert np.mean(x == x.max()) > 0.05
    density = jax.jit(jax.value_and_grad(lambda x: distribution.log_prob(x).sum()))
    for log_prob in (distribution.log_prob(x), jax.jit(lambda x: distribution.log_prob(x))(x), *density(x)):
        assert np.isfinite(log_prob).all()
