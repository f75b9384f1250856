"""The power iterations of all layers of a model at once.

XLA needs up to half a second to compile a loop. Layers with the same map and the same orders share one loop, wherever
they are in the model. A dense map and a convolution with a single tap are the same map of one matrix. Small matrices of
different shapes share one loop too: rows and columns of zeros make them of one shape, and change no norm. The loop ends
when the slowest of its layers has converged.

The vectors of a loop take memory. If there are many large ones, the loop runs for one part of the layers after the
other. Its memory is then that of one part.
"""

import math
from collections import defaultdict
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim

from resflow_jax.functional.batch_axes import vary_over, varying_axes
from resflow_jax.functional.linear_maps import DenseMap, LinearMap
from resflow_jax.functional.norms import needs_power_iteration
from resflow_jax.functional.power_iteration import PowerIteration, PowerIterationStatus
from resflow_jax.layers.lipschitz import LipschitzLinear, NormSettings, advance, linears_inside, split_orders

_SMALL = 128  # rows and columns of a matrix whose products take hardly any time
_AT_ONCE = 16  # layers that iterate at once, whatever the size of their vectors
_ELEMENTS_AT_ONCE = 1 << 18  # more layers iterate at once if their vectors u and v have no more elements than this


def update_norms(module: nnx.Module, settings: NormSettings, restart: bool) -> PowerIterationStatus:
    """`LipschitzLinear.update_norm` of every layer inside a module, in place.

    Returns the status of the slowest: most iterations, largest residual, whether all converged.
    """
    statuses = [_update_alike(*alike, layers, settings, restart) for alike, layers in _groups(module).items()]
    if not statuses:  # every norm has a closed form
        return PowerIterationStatus(jnp.asarray(0, jnp.int32), jnp.asarray(0.0), jnp.asarray(True))
    iterations, residuals, converged = (jnp.concatenate(leaves) for leaves in zip(*statuses, strict=True))
    return PowerIterationStatus(jnp.max(iterations), jnp.max(residuals), jnp.all(converged))


def _groups(module: nnx.Module) -> dict[tuple[LinearMap, tuple[float | None, ...]], list[LipschitzLinear]]:
    """The layers that share a loop, by the map that the loop iterates and the fixed orders of its norm."""
    groups = defaultdict(list)
    for layer in linears_inside(module):
        fixed, _ = split_orders(layer.traced_orders())
        if needs_power_iteration(*(2.0 if order is None else order for order in fixed)):
            groups[_own_map(layer), fixed].append(layer)
    small = defaultdict(list)
    for linear_map, fixed in groups:
        if isinstance(linear_map, DenseMap) and max(linear_map.kernel_shape) <= _SMALL:
            small[fixed].append(linear_map)
    for fixed, maps in small.items():
        joint = DenseMap(max(m.features_in for m in maps), max(m.features_out for m in maps))
        groups[joint, fixed] = [layer for linear_map in maps for layer in groups.pop((linear_map, fixed))]
    return groups


def _own_map(layer: LipschitzLinear) -> LinearMap:
    """The map whose norm a layer has: a `DenseMap` if it is one matrix, for all pixels the same."""
    linear_map = layer.linear_map
    is_matrix = len(linear_map.input_shape) == 1
    return DenseMap(*linear_map.input_shape, *linear_map.output_shape) if is_matrix else linear_map


def _update_alike(linear_map, fixed, layers: list[LipschitzLinear], settings, restart: bool) -> PowerIterationStatus:
    """The statuses [rows] of layers with one pair of orders, whose maps are `linear_map` or, without zeros, part of it.

    The rows are all layers of all stacks.
    """
    rows = [_rows(linear_map, layer) for layer in layers]
    inputs = jax.tree.map(lambda *parts: jnp.concatenate(parts) if len(parts) > 1 else parts[0], *rows)

    result = _advance_all(linear_map, fixed, restart, inputs, settings)
    start = 0
    for layer in layers:
        row = slice(start, start + math.prod(layer.stack_shape))
        for vector, found in ((layer.u, result.u), (layer.v, result.v)):
            size = vector.shape[len(layer.stack_shape) :]
            vector[...] = found[row, *map(slice, size)].reshape(vector.shape)
        start = row.stop
    return result.status


@partial(jax.jit, static_argnums=(0, 1, 2))
def _advance_all(linear_map, fixed, restart: bool, inputs, settings: NormSettings) -> PowerIteration:
    """`advance` of every row of (learned orders, kernels, v, u), for all rows at once or for parts of them in turn."""
    learned, kernels, v, u = inputs

    @jax.vmap
    def of_rows(learned, kernel, v) -> PowerIteration:
        return advance(linear_map, fixed, learned, restart, kernel, v, settings)

    elements = math.prod(linear_map.input_shape) + math.prod(linear_map.output_shape)
    at_once, number = max(_AT_ONCE, _ELEMENTS_AT_ONCE // elements), len(v)
    if number <= at_once:
        return of_rows(learned, kernels, v)
    size = next((n for n in range(at_once, at_once // 2, -1) if number % n == 0), at_once)

    def with_part(start, size, results):
        rows = jax.tree.map(lambda array: dynamic_slice_in_dim(array, start, size), (learned, kernels, results.v))
        found = of_rows(*rows)
        return jax.tree.map(lambda array, new: dynamic_update_slice_in_dim(array, new, start, 0), results, found)

    types = jax.eval_shape(of_rows, learned, kernels, v)
    results = jax.tree.map(lambda type_: jnp.zeros(type_.shape, type_.dtype), types)
    # XLA writes the new vectors over the old ones.
    results = results._replace(u=u.astype(types.u.dtype), v=v.astype(types.v.dtype))
    results = vary_over(results, varying_axes(inputs))
    results = jax.lax.fori_loop(0, number // size, lambda n, results: with_part(n * size, size, results), results)
    rest = number % size
    return with_part(number - rest, rest, results) if rest else results


def _rows(linear_map: LinearMap, layer: LipschitzLinear) -> tuple[tuple[jax.Array | None, ...], *tuple[jax.Array, ...]]:
    """The learned orders, kernels, v and u of all layers of a stack, a layer a row, with zeros to fit `linear_map`."""
    learned = split_orders(layer.traced_orders())[1]
    own, number, axes = _own_map(layer), math.prod(layer.stack_shape), len(layer.stack_shape)
    kernel = layer.kernel[...].reshape(number, *own.kernel_shape)
    v, u = layer.v[...].reshape(number, *own.input_shape), layer.u[...].reshape(number, *own.output_shape)
    learned = jax.tree.map(lambda order: order.reshape(number, *order.shape[axes:]), learned)
    arrays = (kernel, linear_map.kernel_shape), (v, linear_map.input_shape), (u, linear_map.output_shape)
    return learned, *(_padded(array, shape) for array, shape in arrays)


def _padded(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Rows [n, *smaller] with zeros up to [n, *shape]."""
    widths = [(0, 0), *((0, size - own) for size, own in zip(shape, rows.shape[1:], strict=True))]
    return jnp.pad(rows, widths) if rows.shape[1:] != shape else rows
