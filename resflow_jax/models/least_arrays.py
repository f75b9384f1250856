"""Checks, before a flow is built, that the file is large enough for the flow that its config describes.

Blocks of one kind are stacked: their number costs nothing before arrays are made. Every layer in a block is made
separately and has its own kernel. So a config with more layers than the file has arrays is not the config of the file.
"""

import math

import jax
from flax import nnx

from resflow_jax.layers.couplings.conditioners import ResNetConditioner
from resflow_jax.layers.lipschitz import deferred_norms
from resflow_jax.models.autoregressive_flow import AutoregressiveFlowConfig
from resflow_jax.models.classifier_config import ClassifierConfig
from resflow_jax.models.config import FlowConfig, ImageFlowConfig
from resflow_jax.models.continuous_flow import ContinuousFlowConfig
from resflow_jax.models.coupling_config import CouplingFlowConfig
from resflow_jax.models.flow import Flow
from resflow_jax.models.residual_flow import flow_from_config

AnyConfig = FlowConfig | ClassifierConfig | AutoregressiveFlowConfig | CouplingFlowConfig | ContinuousFlowConfig

_EXTRA = 2**26  # numbers that a flow may have beyond 16 for each number of its file


def least_arrays(config: AnyConfig) -> int:
    """A lower bound on the number of arrays of the flow of a config. It is computed only from the settings."""
    if isinstance(config, ClassifierConfig):
        return len(config.blocks)
    if isinstance(config, AutoregressiveFlowConfig):
        return len(config.hidden) + 1
    if isinstance(config, CouplingFlowConfig | ContinuousFlowConfig):
        network = config.conditioner
        return network.depth if isinstance(network, ResNetConditioner) else len(network.hidden)
    depth = config.densenet.depth
    if not isinstance(config, ImageFlowConfig):
        return (depth or len(config.hidden)) + 1
    tail = (depth or config.tail.layers) if config.tail.blocks else 0
    return len(config.blocks) * (depth or len(config.kernels)) + tail


def check_arrays(config: AnyConfig, arrays: int) -> None:
    """Raises ValueError if the flow of a config has more layers than there are arrays for."""
    if least_arrays(config) > arrays:
        raise ValueError(
            f"config: expected a flow of the {arrays} arrays in the file, got a flow of at least {least_arrays(config)}"
        )


def abstract_flow(config: AnyConfig, arrays: int) -> Flow:
    """The flow of a config with abstract arrays, as in `nnx.eval_shape`. It allocates nothing of the flow's size.

    Raises:
      ValueError: as `check_arrays`, and for sizes beyond 64 bits.
    """
    check_arrays(config, arrays)
    with deferred_norms():
        return nnx.eval_shape(lambda: flow_from_config(config, rngs=nnx.Rngs(0)))


def check_numbers(flow: Flow, given: int) -> None:
    """Raises ValueError if an abstract flow has far more numbers than its file.

    It may have more: the vectors of norms with a closed form, one number for each pixel and channel, are not in the
    files of PyTorch.
    """
    needed = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(flow)))
    if needed > 16 * given + _EXTRA:
        raise ValueError(f"config: expected a flow of about the {given} numbers in the file, got a flow of {needed}")
