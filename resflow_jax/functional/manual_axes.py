"""Where a batch is spread over devices by `jax.shard_map`: which mesh axes, and whose examples these are."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def varying_axes(tree: Any) -> tuple[str, ...]:
    """The mesh axes over whose devices any array differs, inside a `jax.shard_map` that tracks them; none elsewhere."""
    varying = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree))
    return tuple(sorted(frozenset().union(*varying)))


def vary_over(tree: Any, axes: tuple[str, ...]) -> Any:
    """The same arrays, typed as differing over `axes` too, so that their gradients stay those of one device."""

    def vary(x):
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree) if axes else tree


def vary_alike(*trees: Any) -> tuple[Any, ...]:
    """The same arrays, typed as differing over the axes over which any of them does."""
    axes = varying_axes(trees)
    return tuple(vary_over(tree, axes) for tree in trees)


def mean_over_devices(x: Array) -> Array:
    """The mean of x over the devices over which it differs."""
    axes = varying_axes(x)
    return lax.pmean(x, axes) if axes else x


def sum_alike(cotangents: Any, primals: Any) -> Any:
    """Cotangents summed over the devices over which the primals do not differ."""

    def sum_leaf(cotangent, primal):
        missing = tuple(axis for axis in varying_axes(cotangent) if axis not in varying_axes(primal))
        return lax.psum(cotangent, missing) if missing else cotangent

    return jax.tree.map(sum_leaf, cotangents, primals) if jax.tree.leaves(cotangents) else cotangents


def example_keys(key: Array, x: Array) -> Array:
    """A PRNG key for each example of x [B, ...], [B].

    A key goes by the example's number in the whole batch, of which x is a device's share inside
    `jax.shard_map` with check_vma: what is drawn with it does not depend on how the batch is divided along
    one axis. Without check_vma JAX does not tell, and the devices draw the same.
    """
    batch = x.shape[0]
    first = 0
    for axis in varying_axes(x):
        first = first * lax.axis_size(axis) + lax.axis_index(axis)
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(first * batch + jnp.arange(batch))
