"""Divides the batch of a flow's call among the cores of a CPU, after `rf.use_cpu_cores` has made each core a device.

XLA divides the work of one device among cores operation by operation, which leaves them idle around small ones. Here
each core runs the whole call on its share of the batch. Each example draws its noise by its number in the batch, so
that results are those of one device. The cores are the axis "cores" of the mesh that `jax.set_mesh` has set.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from resflow_jax.functional.primitives.jax_internals import has_named_axes

CORES = "cores"
WHOLE = PartitionSpec()  # the same on all cores
BATCH = PartitionSpec(CORES)  # [B, ...]
BLOCKS = PartitionSpec(None, CORES)  # [blocks, B, ...]
MEAN = "mean"  # an output that is a mean over the batch


def shared(inputs: tuple[Any, ...], outputs: Any) -> Callable[[Callable], Callable]:
    """Makes function(graphdef, *arrays) run on shares of a batch, where there are cores that can share it.

    It runs on the whole batch inside of another division, for layers that run on whole batches alone, and unless the
    shares are of equal and even sizes: an estimate may take half of the examples.

    Args:
      inputs: WHOLE or BATCH for each pytree of arrays. The batch that decides is the first that is BATCH.
      outputs: BATCH, BLOCKS or MEAN for each part of the result.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def call(graphdef: Any, *arrays: Any) -> Any:
            cores, number = _cores(), arrays[inputs.index(BATCH)].shape[0]
            if cores == 1 or number % (2 * cores) or whole_layers(graphdef):
                return function(graphdef, *arrays)

            def of_share(*arrays: Any) -> Any:
                return jax.tree.map(_row, outputs, function(graphdef, *arrays), is_leaf=_is_spec)

            specs = jax.tree.map(lambda spec: BATCH if spec == MEAN else spec, outputs, is_leaf=_is_spec)
            found = jax.shard_map(of_share, in_specs=inputs, out_specs=specs)(*arrays)
            return jax.tree.map(_mean, outputs, found, is_leaf=_is_spec)

        return call

    return decorate


def _is_spec(part: Any) -> bool:
    return isinstance(part, PartitionSpec) or part == MEAN


def _row(spec: Any, part: Any) -> Any:
    """The mean over a share as a row, for a mean over all rows outside: no core waits for another."""
    return jax.tree.map(lambda leaf: leaf[None], part) if spec == MEAN else part


def _mean(spec: Any, part: Any) -> Any:
    return jax.tree.map(lambda rows: jnp.mean(rows, 0), part) if spec == MEAN else part


def _cores() -> int:
    """The number of cores that can share a batch here: 1 inside of another division, or without `use_cpu_cores`."""
    mesh = jax.sharding.get_abstract_mesh()
    is_free = mesh.axis_names == (CORES,) and mesh.axis_types == (AxisType.Auto,)
    return mesh.shape[CORES] if is_free and not has_named_axes() else 1


def is_on_cores(array: jax.Array) -> bool:
    """Whether an array, not traced, lies on the cores that share batches."""
    mesh = getattr(array.sharding, "mesh", None)
    return mesh is not None and mesh.axis_names == (CORES,)


def whole_layers(graphdef: Any) -> list[str]:
    """The names of the classes of layers that cannot run in a shard_map."""
    types = {getattr(node, "type", None) for node in graphdef.nodes}
    return sorted(type_.__name__ for type_ in types if not getattr(type_, "runs_in_shard_map", True))
