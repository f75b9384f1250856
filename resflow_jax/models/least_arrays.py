"""How many arrays a flow has at least, to hold a config from a file against its arrays before the flow is built.

Blocks of one kind are stacked: their number costs nothing before arrays are made. Every layer in a block is made by
itself and has its own kernel, so a config of more layers than the file has arrays is not that of the file.
"""

from resflow_jax.models.config import FlowConfig, ImageFlowConfig


def least_arrays(config: FlowConfig) -> int:
    """A lower bound on the number of arrays of the flow of a config. It is computed from the numbers alone."""
    depth = config.densenet.depth
    if not isinstance(config, ImageFlowConfig):
        return (depth or len(config.hidden)) + 1
    tail = (depth or config.tail.layers) if config.tail.blocks else 0
    return len(config.blocks) * (depth or len(config.kernels)) + tail


def check_arrays(config: FlowConfig, arrays: int) -> None:
    """Raises ValueError if the flow of a config has more layers than there are arrays for."""
    if least_arrays(config) > arrays:
        raise ValueError(
            f"config: expected a flow of the {arrays} arrays in the file, got one of at least {least_arrays(config)}"
        )
