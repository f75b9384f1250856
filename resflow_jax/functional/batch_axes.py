"""The named axes along which a batch is divided among devices, and the numbers of a device's examples in the batch.

Inside `jax.shard_map` (with check_vma, its default) the types of arrays show which mesh axes they vary over, and a
batch is divided along all axes that it varies over. Inside `jax.pmap`, `jax.vmap` with an axis_name, and
`jax.shard_map` without check_vma, types do not show this. There the context `batch_axes` names the axes. Without it the
lanes are independent, and gradients are those of one lane until they are summed. If `batch_axes` is used inside of a
checked shard_map, a batch is divided only along the named axes; it may vary over others, as in an ensemble.
"""

import math
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.primitives.precision import wide_dtype

Array = jax.Array

_named_axes = jax.make_user_context(default_value=())  # jit's caches depend on its value


def batch_axes(*names: str) -> AbstractContextManager[None]:
    """A context in which a batch is divided among the lanes of the named axes.

    Enter it inside of the function that `jax.pmap`, `jax.vmap` or `jax.shard_map` without check_vma maps over the parts
    of a batch. `jax.shard_map` with check_vma needs no context. In it, the noise of each example depends on the
    example's number in the whole batch, and statistics are those of the whole batch: results are the same as without
    the division. It costs nothing in the compiled program except the collectives of statistics.

    Args:
      *names: names of mapped axes, the outermost first.

    Returns:
      A context manager.

    Raises:
      ValueError: if a name is not a string. When the context is used: if no axis of the name is bound there, or if it
        is an axis of a `jax.shard_map` with check_vma that the batch does not vary over.

    Example:
      >>> def log_det(x):
      ...     options = {"key": jax.random.key(0), "estimator": rf.Truncated(1)}
      ...     return rf.residual(lambda w, x: jnp.sin(x @ w), jnp.array([[0.1, 0.4], [0.4, 0.1]]), x, **options)[1]
      >>> def log_det_of_half(x):
      ...     with rf.batch_axes("devices"):
      ...         return log_det(x)
      >>> x = jnp.arange(8.0).reshape(4, 2)
      >>> halves = jax.vmap(log_det_of_half, axis_name="devices")(x.reshape(2, 2, 2))
      >>> bool(jnp.allclose(halves.reshape(4), log_det(x), atol=1e-5))
      True
    """
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"names: expected strings, the names of mapped axes, got {name!r}")
    return _named_axes(names)


def varying_axes(tree: Any) -> tuple[str, ...]:
    """The mesh axes that any array of a tree varies over, as tracked inside a `jax.shard_map`. Leaves may be types."""
    types = (leaf if isinstance(leaf, jax.core.ShapedArray) else jax.typeof(leaf) for leaf in jax.tree.leaves(tree))
    varying = (type_.manual_axis_type.varying for type_ in types)
    return tuple(sorted(frozenset().union(*varying)))


def axes_of_batch(tree: Any) -> tuple[str, ...]:
    """The axes along which a batch is divided: those named by `batch_axes`, or else those that it varies over."""
    varying, named = varying_axes(tree), _named_axes.value
    if not named:
        return varying
    for axis in named:
        if _is_tracked(axis) and axis not in varying:
            raise ValueError(f"batch_axes: expected an axis that the batch varies over, of {varying}, got {axis!r}")
    return named


def _is_tracked(axis: str) -> bool:
    """Whether the types of arrays show if they vary over an axis."""
    try:
        return bool(varying_axes(lax.axis_index(axis)))
    except NameError as error:
        raise ValueError(
            f"batch_axes: expected the name of an axis that pmap, vmap or shard_map binds here, got {axis!r}"
        ) from error


def vary_over(tree: Any, axes: tuple[str, ...]) -> Any:
    """The same arrays with types that vary over `axes`, so that their gradients are not summed over devices."""

    def vary(x):
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree) if axes else tree


def vary_alike(*trees: Any) -> tuple[Any, ...]:
    """The same trees with types that vary over all axes that any of their arrays varies over."""
    axes = varying_axes(trees)
    return tuple(vary_over(tree, axes) for tree in trees)


def mean_over_devices(tree: Any) -> Any:
    """The means, over the devices that share a batch, of statistics of equal parts of it."""
    axes = axes_of_batch(tree)
    return lax.pmean(tree, axes) if axes else tree


def check_automatic(name: str, x: Array) -> None:
    """Raises ValueError for an array that is divided along an explicit axis of a mesh, by its type.

    Loops over parts of a batch, and kernels, would need a sharding for each of their arrays.
    """
    sharding = jax.typeof(x).sharding
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    divided = [axis for entry in sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,))]
    explicit = [axis for axis in divided if kinds.get(axis) == AxisType.Explicit]
    if explicit:
        raise ValueError(
            f"{name}: expected an array whose mesh has automatic axes, got the explicit axis {explicit[0]!r}; make the "
            "mesh by rf.training.make_mesh, or by jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,))"
        )


def moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and variance of x over axes that include the batch axis; those of the whole batch if x is a part of it."""
    mean = mean_over_devices(jnp.mean(x, axes))
    return mean, mean_over_devices(jnp.mean(jnp.square(x - trailing(mean, x)), axes))


def standardization(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and standard deviation of x over leading axes, with which (x - center) / std is standardised.

    They are those of the whole batch if x is a part of it. Intermediate results neither overflow nor underflow: a
    result is infinite only if it, or a difference of two numbers in x, exceeds the range of the dtype. A standard
    deviation that is within the rounding of x is replaced by the mean of |x|, or by 1 where x is zero. Neither has a
    derivative.
    """
    dtype, x = x.dtype, lax.stop_gradient(x).astype(wide_dtype(x.dtype))
    number = math.prod(x.shape[axis] for axis in axes)

    def mean(values: Array) -> Array:
        return mean_over_devices(jnp.sum(values / number, axes, keepdims=True))

    center, size = mean(x), mean(jnp.abs(x))
    center += mean(x - center)  # corrects the rounding errors of a sum of very many numbers
    distance = x - center
    unit = mean(jnp.abs(distance))
    ratio = distance / jnp.where(unit > 0, unit, 1)
    std = unit * jnp.sqrt(mean(jnp.square(ratio)))
    is_constant = std <= 2 * float(jnp.finfo(dtype).eps) * size
    std = jnp.where(is_constant, jnp.where(size > 0, size, 1), std)
    return jnp.squeeze(center, axes).astype(dtype), jnp.squeeze(std, axes).astype(dtype)


def sum_alike(cotangents: Any, primals: Any) -> Any:
    """Cotangents summed over the mesh axes that their primals do not vary over."""

    def sum_leaf(cotangent, primal):
        missing = tuple(axis for axis in varying_axes(cotangent) if axis not in varying_axes(primal))
        return lax.psum(cotangent, missing) if missing else cotangent

    return jax.tree.map(sum_leaf, cotangents, primals) if jax.tree.leaves(cotangents) else cotangents


def example_keys(key: Array, x: Array) -> Array:
    """PRNG keys [B], one for each example of x [B, ...].

    A key depends on the example's number in the whole batch, of which x may be a device's part (see the module's head).
    So draws do not depend on the division of the batch along one axis. The keys have JAX's implementation
    "threefry2x32", whatever that of `key`, because under vmap a draw with an "rbg" key depends on the other keys.
    """
    return _fold_in(_as_threefry(key), example_numbers(x))


def shared_and_example_keys(key: Array, x: Array) -> tuple[Array, Array]:
    """A PRNG key for draws that all examples share, and keys [B] for each example, all independent of each other."""
    key = _as_threefry(key)
    if axes_of_batch(x):
        return jax.random.fold_in(key, 0), _fold_in(key, 1 + example_numbers(x))
    keys = _fold_in(key, jnp.arange(1 + x.shape[0], dtype=jnp.int32))  # a single call compiles faster than two
    return keys[0], keys[1:]


def whole_batch_size(x: Array) -> int | None:
    """The number of examples in the whole batch that x is a part of; None if it is symbolic."""
    number = x.shape[0] * math.prod(lax.axis_size(axis) for axis in axes_of_batch(x))
    return number if isinstance(number, int) else None


def example_numbers(x: Array) -> Array:
    """The number of each example of x in the whole batch, int32 [B]."""
    first = jnp.int32(0)
    for axis in axes_of_batch(x):
        first = first * lax.axis_size(axis) + lax.axis_index(axis)
    return first * x.shape[0] + jnp.arange(x.shape[0], dtype=jnp.int32)


def _fold_in(key: Array, numbers: Array) -> Array:
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers)


def _as_threefry(key: Array) -> Array:
    """Converts a key of any implementation to "threefry2x32" by hashes of its words; such keys stay the same."""
    words = jax.random.key_data(key)
    if words.shape[-1] == 2:
        return key
    first = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
    for word in words[2:]:
        first = jax.random.fold_in(first, word)
    return first
