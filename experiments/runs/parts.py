"""Splits a batch into parts, so that all devices work and the activations of a part stay in cache."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from experiments.runs.devices import data_mesh, devices_for
from resflow_jax import ResidualFlow

Array = jax.Array

PART = 8192  # array elements of z that a device inverts at a time, which fits the caches of a CPU core


def number_of_parts(batch_size: int, largest: int, multiple: int = 1) -> int:
    """The smallest number of equal parts of at most `largest` examples that occupies as many devices as possible.

    The size of a part is a multiple of `multiple`, if there is such a number.
    """
    devices = devices_for(batch_size)
    numbers = range(devices, batch_size + 1, devices)
    fitting = [n for n in numbers if batch_size % n == 0 and batch_size // n <= largest]
    return next((n for n in fitting if batch_size // n % multiple == 0), fitting[0])


def over_parts(function: Callable[[ResidualFlow, Array], Any], flow: ResidualFlow) -> Callable[[Array], Any]:
    """Compiles function(flow, part) for all parts, an array [parts, ...].

    Every device takes an equal share of the parts, one after the other. `function` returns arrays [B, ...] for a part;
    they are concatenated to [parts * B, ...].
    """
    graphdef, state = nnx.split(flow)

    def of_device(state, parts):
        outputs = jax.lax.map(lambda part: function(nnx.merge(graphdef, state), part), parts)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)

    @lru_cache
    def prepared(number):
        mesh, whole, shares = data_mesh(number), PartitionSpec(), PartitionSpec("data")
        apply = jax.shard_map(of_device, mesh=mesh, in_specs=(whole, shares), out_specs=shares, check_vma=False)
        return jax.jit(apply), jax.device_put(state, NamedSharding(mesh, whole)), NamedSharding(mesh, shares)

    def over(parts):
        apply, placed, shares = prepared(len(parts))
        return apply(placed, jax.device_put(parts, shares))

    return over


def over_devices(function: Callable[..., Array], flow: ResidualFlow) -> Callable[..., Array]:
    """Compiles function(flow, x, *others) for x [B, ...]: each device takes an equal share of x, and `others` whole.

    The returned arrays [B, ...] are concatenated. With the same key each example has the same draws as on one device.
    """
    graphdef, state = nnx.split(flow)
    whole, shares = PartitionSpec(), PartitionSpec("data")

    @lru_cache
    def compiled(batch_size, others):
        apply = jax.shard_map(
            lambda state, x, *others: function(nnx.merge(graphdef, state), x, *others),
            mesh=data_mesh(batch_size),
            in_specs=(whole, shares, *[whole] * others),
            out_specs=shares,
        )
        return jax.jit(apply)

    return lambda x, *others: compiled(len(x), len(others))(state, x, *others)
