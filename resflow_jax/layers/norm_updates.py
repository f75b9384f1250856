"""The power iterations of all layers of a model at once.

XLA needs up to half a second to compile a loop. Layers with the same map and the same orders share one loop, wherever
they are in the model. It ends when the slowest of them has converged.
"""

import math
from collections import defaultdict

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.norms import needs_power_iteration
from resflow_jax.functional.power_iteration import PowerIteration, PowerIterationStatus
from resflow_jax.layers.lipschitz import LipschitzLinear, NormSettings, advance, linears_inside, split_orders


def update_norms(module: nnx.Module, settings: NormSettings, restart: bool) -> PowerIterationStatus:
    """`LipschitzLinear.update_norm` of every layer inside a module, in place.

    Returns the status of the slowest: most iterations, largest residual, whether all converged.
    """
    groups = defaultdict(list)
    for layer in linears_inside(module):
        fixed, _ = split_orders(layer.traced_orders())
        if needs_power_iteration(*(2.0 if order is None else order for order in fixed)):
            groups[layer.linear_map, fixed].append(layer)
    statuses = [_update_alike(*alike, layers, settings, restart) for alike, layers in groups.items()]
    if not statuses:  # every norm has a closed form
        return PowerIterationStatus(jnp.asarray(0), jnp.asarray(0.0), jnp.asarray(True))
    iterations, residuals, converged = (jnp.concatenate(leaves) for leaves in zip(*statuses, strict=True))
    return PowerIterationStatus(jnp.max(iterations), jnp.max(residuals), jnp.all(converged))


def _update_alike(linear_map, fixed, layers: list[LipschitzLinear], settings, restart: bool) -> PowerIterationStatus:
    """The statuses [rows] of layers with one map and one pair of orders; the rows are all layers of all stacks."""
    inputs = [(split_orders(layer.traced_orders())[1], layer.kernel[...], layer.v[...]) for layer in layers]
    axes = [len(layer.stack_shape) for layer in layers]
    rows = [
        jax.tree.map(lambda part, n=n: _with_one_axis(part, n), parts) for parts, n in zip(inputs, axes, strict=True)
    ]
    inputs = jax.tree.map(lambda *parts: jnp.concatenate(parts) if len(parts) > 1 else parts[0], *rows)

    def of_one(inputs) -> PowerIteration:
        learned, kernel, v = inputs
        return advance(linear_map, fixed, learned, restart, kernel, v, settings)

    result = jax.vmap(of_one)(inputs)
    start = 0
    for layer, n in zip(layers, axes, strict=True):
        row = slice(start, start + math.prod(layer.stack_shape)) if n else start
        layer.u[...], layer.v[...] = result.u[row].reshape(layer.u.shape), result.v[row].reshape(layer.v.shape)
        start = row.stop if n else row + 1
    return result.status


def _with_one_axis(part: jax.Array, axes: int) -> jax.Array:
    """An array with its first `axes` axes, those of stacks, joined to one axis of rows."""
    if axes == 1:
        return part
    return part.reshape(-1, *part.shape[axes:]) if axes else part[None]
