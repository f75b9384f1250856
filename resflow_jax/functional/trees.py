"""Trees of floats and other arrays, of which only the floats have derivatives: what custom derivatives need."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array


def partition(tree: Any) -> tuple[Any, Any]:
    """Two trees: the float leaves with None elsewhere, and the other leaves with None elsewhere."""
    floats = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), tree)
    differentiable = jax.tree.map(lambda leaf, is_float: leaf if is_float else None, tree, floats)
    return differentiable, jax.tree.map(lambda leaf, is_float: None if is_float else leaf, tree, floats)


def combine(first: Any, second: Any) -> Any:
    """The tree whose two parts are the results of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def float0(tree: Any) -> Any:
    """Cotangents for arrays that are not floats."""
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), tree)


def zero_cotangents(tree: Any) -> Any:
    """Cotangents of a tree on which nothing depends."""
    differentiable, static = partition(jax.tree.map(jnp.asarray, tree))
    return combine(jax.tree.map(jnp.zeros_like, differentiable), float0(static))


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of PRNG keys, which may be abstract."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def mapped_with(x: Array, tree: Any) -> Array:
    """x, mapped by every `jax.vmap` that maps an array of the tree. The compiled program does no work for it."""
    for leaf in jax.tree.leaves(tree):
        leaf = leaf if isinstance(leaf, Array) else jnp.asarray(leaf)
        if not leaf.size:
            continue
        number = (jax.random.key_data(leaf) if is_key(leaf) else leaf).reshape(-1)[0]
        always = (number == number) | True
        x = lax.select_n(always, lax.stop_gradient(x), x)  # XLA removes this operation
    return x


def kept(tree: Any) -> Any:
    """Passes the residuals of a custom_vjp rule through an optimization barrier.

    Without it, JAX mixes up residuals that are also arguments, in second-order derivatives inside a scan.
    """
    data = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)
    data = jax.tree.map(lax.optimization_barrier, data)  # one by one: each keeps the axes that it varies over
    return jax.tree.map(
        lambda leaf, kept: jax.random.wrap_key_data(kept, impl=jax.random.key_impl(leaf)) if is_key(leaf) else kept,
        tree,
        data,
    )
