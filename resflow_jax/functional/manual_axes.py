"""Where a batch is divided among devices: along which named axes, and whose examples these are.

Inside `jax.shard_map` (with check_vma, its default) the types of arrays tell over which axes of the mesh they differ.
Inside `jax.pmap`, `jax.vmap` with an axis_name, and `jax.shard_map` without check_vma, they do not: there an axis named
"data" is one along which a batch is divided, and gradients are a device's own until they are summed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.broadcasting import trailing

Array = jax.Array

DATA_AXIS = "data"


def varying_axes(tree: Any) -> tuple[str, ...]:
    """The mesh axes over whose devices any array differs, inside a `jax.shard_map` that tracks them; none elsewhere."""
    varying = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree))
    return tuple(sorted(frozenset().union(*varying)))


def batch_axes(tree: Any) -> tuple[str, ...]:
    """The axes along which a batch is divided: those over which it varies, or "data" where JAX does not track that."""
    varying = varying_axes(tree)
    if varying or not _is_bound(DATA_AXIS) or varying_axes(lax.axis_index(DATA_AXIS)):
        return varying
    return (DATA_AXIS,)


def _is_bound(axis: str) -> bool:
    """Whether there is an axis of this name here."""
    try:
        lax.axis_size(axis)
    except NameError:
        return False
    return True


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


def mean_over_devices(tree: Any) -> Any:
    """The means over the devices that share a batch, of what is computed from equal shares of it."""
    axes = batch_axes(tree)
    return lax.pmean(tree, axes) if axes else tree


def moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and variance of x over axes, that of its batch among them: of the whole batch where x is a share of it."""
    mean = mean_over_devices(jnp.mean(x, axes))
    return mean, mean_over_devices(jnp.mean(jnp.square(x - trailing(mean, x)), axes))


def sum_alike(cotangents: Any, primals: Any) -> Any:
    """Cotangents summed over the devices over which the primals do not differ."""

    def sum_leaf(cotangent, primal):
        missing = tuple(axis for axis in varying_axes(cotangent) if axis not in varying_axes(primal))
        return lax.psum(cotangent, missing) if missing else cotangent

    return jax.tree.map(sum_leaf, cotangents, primals) if jax.tree.leaves(cotangents) else cotangents


def example_keys(key: Array, x: Array) -> Array:
    """A PRNG key for each example of x [B, ...], [B].

    A key goes by the example's number in the whole batch, of which x may be a device's share (see the module's head):
    what is drawn with it does not depend on how the batch is divided along one axis.
    """
    batch = x.shape[0]
    first = 0
    for axis in batch_axes(x):
        first = first * lax.axis_size(axis) + lax.axis_index(axis)
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(first * batch + jnp.arange(batch))
