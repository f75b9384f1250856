"""`jax.shard_map` over the slices of a batch, and the flows that cannot run in it.

A shard_map tracks which mesh axes an array varies over. Loops of other libraries, such as those of diffrax in
`ContinuousBlock`, start from arrays without such types, and fail. A layer that sets `runs_in_shard_map` to False is
left to the compiler, which divides the whole batch.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh


def over_slices(function: Callable[..., Any], graphdef: Any, mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
    """The function on each device's slices of its arguments; on the whole arguments if a layer cannot run in slices.

    Args:
      function: function of arrays, or of slices of them, that takes means over the axes that its batch varies over.
      graphdef: the structure of the flow that the function uses, `nnx.graphdef(flow)`.
      mesh: devices.
      in_specs: specs of the arguments, as in `jax.shard_map`.
      out_specs: specs of the results.
    """
    if whole_layers(graphdef):
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def check_runs_in_slices(strategy: str, graphdef: Any) -> None:
    """Raises ValueError for a flow that a strategy cannot train."""
    if names := whole_layers(graphdef):
        raise ValueError(f'parallel: expected "jit" for a flow with {", ".join(names)}, got "{strategy}"')


def whole_layers(graphdef: Any) -> list[str]:
    """The names of the classes of layers that cannot run in a shard_map."""
    types = {getattr(node, "type", None) for node in graphdef.nodes}
    return sorted(type_.__name__ for type_ in types if not getattr(type_, "runs_in_shard_map", True))
