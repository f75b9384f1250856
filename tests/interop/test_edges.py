"""The log-density in every library is finite at its own samples, in float32, where logits round to their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.solvers import Anderson
from resflow_jax.interop.sampling import SamplingMap

pytestmark = pytest.mark.usefixtures("promotion")

CONFIG = rf.ImageFlowConfig((2, 2, 1), blocks=(1,), hidden_channels=2, kernels=(1, 1), tail=rf.DenseTail(0))


@pytest.fixture(autouse=True)
def float32():
    with jax.enable_x64(False):
        yield


def black_and_white():
    """A flow of images of black and white pixels alone, whose samples are mostly at the ends of the logit's domain."""
    flow = rf.ResidualFlow(CONFIG, rngs=nnx.Rngs(0))
    flow.initialize(jax.random.bernoulli(jax.random.key(0), 0.5, (64, 2, 2, 1)).astype(jnp.float32))
    return flow


def check(log_prob, x, at_once=None, ends=True):
    """Finite, eager and compiled, with finite derivatives; near what sampling has found where a float tells x."""
    assert x.dtype == jnp.float32 and (not ends or ((x < 0) | (x > 1)).any())
    for found in (log_prob(x), jax.jit(log_prob)(x)):
        assert found.shape == x.shape[:1] and np.isfinite(found).all()
    assert np.isfinite(jax.jit(jax.grad(lambda x: log_prob(x).sum()))(x)).all()
    assert at_once is None or np.isfinite(at_once).all()


def test_sampling_map():
    """z -> x -> z, log-dets both ways."""
    sampling = SamplingMap.of(black_and_white(), None, rf.Exact(), Anderson())
    x, log_det = sampling.generate_and_log_det(3 * jax.random.normal(jax.random.key(1), (64, 4)))
    assert np.isfinite(sampling.encode(x)).all()
    check(lambda x: sampling.encode_and_log_det(x)[1], x, log_det)


def test_distrax():
    distrax = pytest.importorskip("distrax", reason="needs the extra distrax")
    bijector = rf.interop.distrax.bijector(black_and_white(), estimator=rf.Exact())
    distribution = distrax.Transformed(distrax.MultivariateNormalDiag(jnp.zeros(4), 3 * jnp.ones(4)), bijector)
    x, at_once = distribution.sample_and_log_prob(seed=jax.random.key(1), sample_shape=(64,))
    check(distribution.log_prob, x, at_once)


def test_numpyro():
    """Its samples are clipped to [0, 1]."""
    pytest.importorskip("numpyro", reason="needs the extra numpyro")
    distribution = rf.interop.numpyro.FlowDistribution(black_and_white(), estimator=rf.Exact())
    x, intermediates = distribution.sample_with_intermediates(jax.random.key(1), (64,))
    check(distribution.log_prob, x, distribution.log_prob(x, intermediates), ends=False)


def test_flowjax():
    pytest.importorskip("flowjax", reason="needs the extra flowjax")
    from flowjax.distributions import StandardNormal, Transformed

    flow = black_and_white()
    distribution = Transformed(StandardNormal(flow.event_shape), rf.interop.flowjax.FlowBijection(flow))
    x = distribution.sample(jax.random.key(1), (64,))
    check(lambda x: distribution.log_prob(x), x)
