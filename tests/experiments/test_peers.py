"""A flow rebuilt in normflows: the same map, samples to its own tolerance, log-densities within its noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resflow_jax import Exact, ImageFlowConfig, ResidualFlow, VectorFlowConfig

pytest.importorskip("torch", reason="needs the extra bench: torch and normflows")
pytest.importorskip("normflows", reason="needs the extra bench: torch and normflows")

import torch

from experiments.peers import normflows_from

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = {"hidden_channels": 4, "fc_hidden": 4, "fc_layers": 2}
CONFIGS = {
    "dense blocks": ImageFlowConfig((4, 4, 1), blocks=(2, 1), fc_blocks=1, **SMALL),
    "convolutions alone": ImageFlowConfig((4, 2, 2), blocks=(2,), fc_blocks=0, **SMALL),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """A flow whose blocks are far from the identity, its peer, images and their z."""
    flow = ResidualFlow(CONFIGS[request.param], rngs=nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(1), (3, *flow.event_shape))
    flow.initialize(x)
    nnx.update(flow, jax.tree.map(lambda p: 3 * p if p.ndim > 2 else p, nnx.state(flow, nnx.Param)))
    flow.converge_norms()
    return flow, normflows_from(flow), x, flow(x)


def test_the_map_is_the_same(pair):
    """In float64, to rounding: kernels, order of channels and of z, ActNorm, logit."""
    flow, peer, x, z = pair
    found = peer.forward(x)
    assert found.dtype == z.dtype
    np.testing.assert_allclose(found, z, rtol=1e-10, atol=1e-10)


def test_kernels_are_left_as_they_are(pair):
    """Its normalisation finds nothing to do."""
    layers = [module for module in pair[1].model.modules() if hasattr(module, "compute_weight")]
    assert len(layers) == len(pair[1].model.flows)
