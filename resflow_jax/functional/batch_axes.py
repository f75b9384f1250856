"""Where a batch is divided among devices: along which named axes, and whose examples these are.

Inside `jax.shard_map` (with check_vma, its default) the types of arrays tell over which axes of the mesh they differ.
Inside `jax.pmap`, `jax.vmap` with an axis_name, and `jax.shard_map` without check_vma, they do not. There `batch_axes`
names the axes along which a batch is divided, and gradients are a device's own until they are summed. Without it no
axis is one of the batch, whatever its name: the lanes are independent. Where axes are named, these are all: a batch
that differs over others of a checked shard_map, as an ensemble does, is not divided along them.
"""

import math
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.broadcasting import trailing

Array = jax.Array

_named_axes = jax.make_user_context(default_value=())  # part of the key of jit's caches


def batch_axes(*names: str) -> AbstractContextManager[None]:
    """In this context, a batch is divided among the lanes of the axes of these names, the first one outermost.

    Each example then draws its noise by its number in the whole batch, and statistics are those of the whole batch. To
    be entered inside of the function that `jax.pmap`, `jax.vmap` or `jax.shard_map` without check_vma maps over a
    batch; `jax.shard_map` with check_vma needs it not.

      @partial(jax.pmap, axis_name="devices", in_axes=(None, 0))
      def loss(flow, x):
          with rf.batch_axes("devices"):
              return jax.lax.pmean(-flow.log_prob(x, key=key).mean(), "devices")

    Raises:
      ValueError: if a name is not a string; where the context is used, if no axis of the name is bound there, or if it
        is one of a `jax.shard_map` with check_vma over which the batch does not differ.
    """
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"names: expected strings, the names of mapped axes, got {name!r}")
    return _named_axes(names)


def varying_axes(tree: Any) -> tuple[str, ...]:
    """The mesh axes over which any array, or type of one, differs, inside a `jax.shard_map` that tracks them."""
    types = (leaf if isinstance(leaf, jax.core.ShapedArray) else jax.typeof(leaf) for leaf in jax.tree.leaves(tree))
    varying = (type_.manual_axis_type.varying for type_ in types)
    return tuple(sorted(frozenset().union(*varying)))


def axes_of_batch(tree: Any) -> tuple[str, ...]:
    """The axes along which a batch is divided: those over which it varies, or those named by `batch_axes`."""
    varying, named = varying_axes(tree), _named_axes.value
    if not named:
        return varying
    for axis in named:
        if _is_tracked(axis) and axis not in varying:
            raise ValueError(f"batch_axes: expected axes over which the batch differs, of {varying}, got {axis!r}")
    return named


def _is_tracked(axis: str) -> bool:
    """Whether the types of arrays tell if they differ over an axis."""
    try:
        return bool(varying_axes(lax.axis_index(axis)))
    except NameError as error:
        raise ValueError(
            f"batch_axes: expected the name of an axis that pmap, vmap or shard_map binds here, got {axis!r}"
        ) from error


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
    axes = axes_of_batch(tree)
    return lax.pmean(tree, axes) if axes else tree


def moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and variance of x over axes, that of its batch among them: of the whole batch where x is a share of it."""
    mean = mean_over_devices(jnp.mean(x, axes))
    return mean, mean_over_devices(jnp.mean(jnp.square(x - trailing(mean, x)), axes))


def standardization(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Center and std of x over leading axes, of any unit, with which (x - center) / std is standardised.

    Mean and standard deviation of the whole batch, where x is a share of it. Nothing overflows or underflows on the
    way: either is infinite only where it, or a difference of two numbers in x, is beyond the dtype. A deviation that
    is within the rounding of x is replaced by the mean of |x|, or by 1 where x is zero. Neither has a derivative.
    """
    x = lax.stop_gradient(x)
    number = math.prod(x.shape[axis] for axis in axes)

    def mean(values: Array) -> Array:
        return mean_over_devices(jnp.sum(values / number, axes, keepdims=True))

    center, size = mean(x), mean(jnp.abs(x))
    center += mean(x - center)  # what a sum of very many numbers has lost
    distance = x - center
    unit = mean(jnp.abs(distance))
    ratio = distance / jnp.where(unit > 0, unit, 1)
    std = unit * jnp.sqrt(mean(jnp.square(ratio)))
    is_constant = std <= 2 * float(jnp.finfo(x.dtype).eps) * size
    std = jnp.where(is_constant, jnp.where(size > 0, size, 1), std)
    return jnp.squeeze(center, axes), jnp.squeeze(std, axes)


def sum_alike(cotangents: Any, primals: Any) -> Any:
    """Cotangents summed over the devices over which the primals do not differ."""

    def sum_leaf(cotangent, primal):
        missing = tuple(axis for axis in varying_axes(cotangent) if axis not in varying_axes(primal))
        return lax.psum(cotangent, missing) if missing else cotangent

    return jax.tree.map(sum_leaf, cotangents, primals) if jax.tree.leaves(cotangents) else cotangents


def example_keys(key: Array, x: Array) -> Array:
    """A PRNG key for each example of x [B, ...], [B].

    A key goes by the example's number in the whole batch, of which x may be a device's share (see the module's head):
    what is drawn with it does not depend on how the batch is divided along one axis. The keys are of JAX's kind
    "threefry2x32", whatever that of `key`: a draw mapped over keys of another, as "rbg", depends on all of them.
    """
    return _fold_in(_as_threefry(key), _numbers(x))


def shared_and_example_keys(key: Array, x: Array) -> tuple[Array, Array]:
    """A PRNG key for what all examples share, and one for each as by `example_keys`, [B], independent of each other."""
    key, numbers = _as_threefry(key), 1 + _numbers(x)
    if axes_of_batch(x):
        return jax.random.fold_in(key, 0), _fold_in(key, numbers)
    keys = _fold_in(key, jnp.concatenate([jnp.zeros(1, jnp.int32), numbers]))  # one program of random numbers, not two
    return keys[0], keys[1:]


def _numbers(x: Array) -> Array:
    """The number of each example in the whole batch, [B]."""
    first = jnp.int32(0)
    for axis in axes_of_batch(x):
        first = first * lax.axis_size(axis) + lax.axis_index(axis)
    return first * x.shape[0] + jnp.arange(x.shape[0], dtype=jnp.int32)


def _fold_in(key: Array, numbers: Array) -> Array:
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers)


def _as_threefry(key: Array) -> Array:
    """A key of JAX's default kind made of one of any kind, by hashes of its words alone; one of that kind as it is."""
    words = jax.random.key_data(key)
    if words.shape[-1] == 2:
        return key
    first = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
    for word in words[2:]:
        first = jax.random.fold_in(first, word)
    return first
