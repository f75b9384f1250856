"""Small flows of configs, for images and vectors."""

from dataclasses import replace

import jax
from flax import nnx

import resflow_jax as rf
from resflow_jax.interop.torch.flow import TorchImageConfig
from resflow_jax.models.residual_flow import flow_from_config

SMALL = {"hidden_channels": 4, "kernels": (3, 3), "data": rf.ImageTransform(logit_alpha=0.05)}
TAIL = rf.DenseTail(1, hidden=4, layers=2)
CLASSES = {"classes": 3, "classifier_channels": 2}
CONFIGS = {
    "images": rf.ImageFlowConfig(
        (4, 4, 1), **SMALL, blocks=(2, 1), preactivation="all", activation="elu", tail=replace(TAIL, norms="2f2")
    ),
    "images, factored out": TorchImageConfig(
        (4, 4, 2),
        **CLASSES,
        **SMALL,
        blocks=(1, 1, 1),
        between=rf.BetweenBlocks(feature_actnorm=True, centering="layers"),
        tail=rf.DenseTail(0),
        scales=rf.Scales(factor_out=True),
    ),
    "images, one dense layer a block": TorchImageConfig(
        (2, 2, 1),
        **CLASSES,
        blocks=(1, 1),
        kernels=(3,),
        fully_connected=True,
        data=rf.ImageTransform(logit_alpha=None),
        tail=rf.DenseTail(blocks=1, layers=1),
    ),
    "images, DenseNets, squeezed first": rf.ImageFlowConfig(
        (4, 4, 1),
        blocks=(1, 2),
        activation="clipswish",
        data=rf.ImageTransform(logit_alpha=None, mean=(0.4,), std=(0.3,)),
        between=rf.BetweenBlocks(batchnorm=True, centering="blocks", invertible_linear=True),
        tail=rf.DenseTail(blocks=1, densenet_first=3, densenet_growth=2),
        densenet=rf.DenseNetBlocks(depth=1, growth=2),
        scales=rf.Scales(squeeze_first=True),
    ),
    "vectors": rf.VectorFlowConfig(
        dim=3, blocks=3, hidden=(5,), preactivation="none", between=rf.BetweenBlocks(actnorm=False)
    ),
}


def make(name):
    flow = flow_from_config(CONFIGS[name], rngs=nnx.Rngs(1))
    x = jax.random.uniform(jax.random.key(2), (3, *flow.event_shape))
    flow.initialize(x)
    return flow, x
