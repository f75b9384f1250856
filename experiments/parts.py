"""A batch in parts: some at a time on each device, so that all cores work and a part's activations stay in cache."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from resflow_jax import ResidualFlow

Array = jax.Array


def number_of_parts(batch_size: int, largest: int) -> int:
    """The fewest equal parts of at most `largest` examples that occupy all devices, or as many as can be."""
    devices = _devices_for(batch_size)
    return next(
        n for n in range(devices, batch_size + 1, devices) if batch_size % n == 0 and batch_size // n <= largest
    )


def over_parts(function: Callable[[ResidualFlow, Array], Any], flow: ResidualFlow) -> Callable[[Array], Any]:
    """Compiles function(flow, part) for all parts, an array [parts, ...].

    Every device takes an equal share of the parts, one after the other. What `function` returns for each, arrays
    [B, ...], comes back put together, [parts * B, ...].
    """
    graphdef, state = nnx.split(flow)

    def of_device(state, parts):
        outputs = jax.lax.map(lambda part: function(nnx.merge(graphdef, state), part), parts)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)

    @jax.jit
    def apply(state, parts):
        mesh = _mesh(len(parts))
        specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec("data")}
        return jax.shard_map(of_device, mesh=mesh, check_vma=False, **specs)(state, parts)

    def over(parts):
        place = partial(NamedSharding, _mesh(len(parts)))
        return apply(jax.device_put(state, place(PartitionSpec())), jax.device_put(parts, place(PartitionSpec("data"))))

    return over


def _devices_for(number: int) -> int:
    return math.gcd(number, jax.device_count())


def _mesh(parts: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: _devices_for(parts)]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
