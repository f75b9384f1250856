"""Inverts a large batch in parts of one size, one after the other.

Memory then does not grow with the batch, activations of a part stay in a CPU's cache, and a part ends when its own
slowest example has converged. A batch of few parts is divided equally. One of many has parts of the largest size: then
one compiled program serves all such batches.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.iteration import InverseStatus, Solver
from resflow_jax.functional.primitives.platforms import threads_per_cpu_device
from resflow_jax.layers.bijector import join_statuses, own_condition
from resflow_jax.layers.contraction import Contraction

Array = jax.Array

_CPU_THREAD, _ACCELERATOR = 2**20, 2**26  # numbers in the largest output of a layer
_MANY = 8  # parts, of which the last may be filled with copies at little cost


def solved(flow: Any, z: Array, condition: Array | None, solver: Solver) -> tuple[Array, InverseStatus]:
    """(x, status) of a `Flow` for z [B, *latent_shape] and conditions [B, ...], in parts where that is possible."""
    rule, limits = solver.split(flow.dtype)
    graphdef, state = nnx.split(flow)

    def solve(batch):
        return _solve(graphdef, state, *batch, rule, limits)

    size = part_size(flow, state, (z, condition))
    return solve((z, condition)) if size is None else solve_in_parts(solve, (z, condition), size)


@partial(jax.jit, static_argnames=("graphdef", "rule"))
def _solve(graphdef, state, z, condition, rule, limits):
    flow = nnx.merge(graphdef, state)
    z = z.astype(flow.dtype)
    x, statuses = flow.bijector.solve(z, rule.with_limits(limits), own_condition(flow.bijector, condition))
    return x, join_statuses(statuses, z)


def part_size(module: nnx.Module, state: Any, batch: Any) -> int | None:
    """The number of examples of a part, or None if the batch stays whole.

    It stays whole if an array is traced or divided among devices, and if the batch is not larger than a part.

    Args:
      module: contains the contractions, which determine how large the outputs of their layers are.
      state: pytree of the module's arrays.
      batch: pytree of arrays [B, ...].
    """
    arrays = [leaf for leaf in jax.tree.leaves((batch, state)) if isinstance(leaf, jax.Array)]
    if any(isinstance(array, jax.core.Tracer) or len(array.sharding.device_set) > 1 for array in arrays):
        return None
    contractions = (node for _, node in nnx.iter_modules(module) if isinstance(node, Contraction))
    widest = max([contraction.widest for contraction in contractions] + [math.prod(arrays[0].shape[1:])])
    (device,) = arrays[0].sharding.device_set
    numbers = threads_per_cpu_device() * _CPU_THREAD if device.platform == "cpu" else _ACCELERATOR
    number, size = len(arrays[0]), max(1, numbers // widest)
    if number <= size:
        return None
    return size if number > _MANY * size else math.ceil(number / math.ceil(number / size))


def solve_in_parts(
    solve: Callable[[Any], tuple[Array, InverseStatus]], batch: Any, size: int
) -> tuple[Array, InverseStatus]:
    """solve(batch) -> (x, status), for parts of `size` examples; copies of the last example fill the last part."""
    number = len(jax.tree.leaves(batch)[0])
    parts = [solve(_part(batch, start, size)) for start in range(0, number, size)]
    x, statuses = zip(*parts, strict=True)
    status = jax.tree.map(lambda *fields: jnp.concatenate(fields, axis=-1)[..., :number], *statuses)
    return jnp.concatenate(x)[:number], status


@partial(jax.jit, static_argnames="size")
def _part(batch: Any, start: int, size: int) -> Any:
    def of_leaf(leaf):
        return leaf[jnp.minimum(start + jnp.arange(size), leaf.shape[0] - 1)]

    return jax.tree.map(of_leaf, batch)
