"""The power iterations of all layers of a model at once.

A loop costs XLA up to half a second to compile. Layers of one map and one pair of orders share one, wherever they are
in the model; it goes on until the slowest of them has converged.
"""

from collections import defaultdict

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.norms import PowerIteration, PowerIterationStatus, needs_power_iteration
from resflow_jax.layers.lipschitz import LipschitzLinear, NormSettings, advance, split_orders


def update_norms(module: nnx.Module, settings: NormSettings, restart: bool) -> PowerIterationStatus:
    """`LipschitzLinear.update_norm` of every layer inside a module, in place.

    Returns the status of the slowest: most iterations, largest residual, whether all converged.
    """
    groups = defaultdict(list)
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, LipschitzLinear):
            fixed, _ = split_orders(layer.traced_orders())
            if needs_power_iteration(*(2.0 if order is None else order for order in fixed)):
                groups[layer.linear_map, fixed].append(layer)
    statuses = [_update_alike(*alike, layers, settings, restart) for alike, layers in groups.items()]
    if not statuses:  # every norm has a closed form
        return PowerIterationStatus(jnp.asarray(0), jnp.asarray(0.0), jnp.asarray(True))
    iterations, residuals, converged = (jnp.concatenate(leaves) for leaves in zip(*statuses, strict=True))
    return PowerIterationStatus(jnp.max(iterations), jnp.max(residuals), jnp.all(converged))


def _update_alike(linear_map, fixed, layers: list[LipschitzLinear], settings, restart: bool) -> PowerIterationStatus:
    """The layers may be stacks; their statuses, of every row of them."""
    inputs = [(split_orders(layer.traced_orders())[1], layer.kernel[...], layer.v[...]) for layer in layers]
    stacked = [layer.v.ndim > len(linear_map.input_shape) for layer in layers]
    rows = [
        parts if is_stack else jax.tree.map(lambda part: part[None], parts)
        for parts, is_stack in zip(inputs, stacked, strict=True)
    ]
    inputs = jax.tree.map(lambda *parts: jnp.concatenate(parts) if len(parts) > 1 else parts[0], *rows)

    def of_one(inputs) -> PowerIteration:
        learned, kernel, v = inputs
        return advance(linear_map, fixed, learned, restart, kernel, v, settings)

    result = jax.vmap(of_one)(inputs)
    start = 0
    for layer, is_stack in zip(layers, stacked, strict=True):
        row = slice(start, start + len(layer.v)) if is_stack else start
        layer.u[...], layer.v[...] = result.u[row], result.v[row]
        start = row.stop if is_stack else row + 1
    return result.status
