"""Evaluates a batch in chunks, one after the other, so that activations stay in fast memory.

The fast memory is the cache of a CPU and the VMEM of a TPU; without chunks, activations on a TPU go through HBM. CPUs
and TPUs compute the chunks one after the other. Other platforms compute them all at once. So does a TPU program that
the compiler partitions over several chips (outside of `jax.shard_map`), because each chip would run the whole loop, and
a program that is lowered for TPUs on another platform outside of `platforms.compiling_for`. The size of the chunks
depends on the platform that JAX runs on.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.primitives.platforms import by_platform, target_platform
from resflow_jax.functional.primitives.tracing import trace

Array = jax.Array


def split_chunks(batched: Any, chunk_size: int | None) -> Any:
    """Splits every array [B, ...] of a pytree into equal chunks: [chunks, B / chunks, ...].

    The size of a chunk is the largest divisor of B that is at most `chunk_size`. If that is less than a quarter of
    `chunk_size`, for example for a prime B, it is the smallest divisor above `chunk_size`. There is one chunk if
    `chunk_size` is None, or if B is symbolic, as in `jax.export.symbolic_shape`.
    """
    batch = jax.tree.leaves(batched)[0].shape[0]
    if chunk_size is None or not isinstance(batch, int):
        return jax.tree.map(lambda leaf: leaf[None], batched)
    size = size_of_chunk(batch, chunk_size)
    return jax.tree.map(lambda leaf: leaf.reshape(batch // size, size, *leaf.shape[1:]), batched)


def size_of_chunk(batch: int, chunk_size: int) -> int:
    """The number of examples in each chunk of `split_chunks`."""
    small = [n for n in range(1, math.isqrt(batch) + 1) if batch % n == 0]
    sizes = {*small, *(batch // n for n in small)}
    size = max(n for n in sizes if n <= chunk_size)
    return min(n for n in sizes if n > chunk_size) if 4 * size < min(chunk_size, batch) else size


def join_chunks(x: Array) -> Array:
    """[chunks, B / chunks, ...] -> [B, ...]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def join_probes(x: Array, probes: int) -> Array:
    """[chunks, probes * B / chunks, ...], as `repeat` makes them in every chunk, -> [B, probes, ...]."""
    return join_chunks(x.reshape(len(x), probes, -1, *x.shape[2:]).swapaxes(1, 2))


def split_probes(x: Array, chunks: int) -> Array:
    """[B, probes, ...] -> [chunks, probes * B / chunks, ...]; inverts `join_probes`."""
    x = x.reshape(chunks, -1, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(chunks, -1, *x.shape[3:])


def map_chunks(function: Callable[[Any], Any], chunks: Any) -> Any:
    """Applies a function to every chunk; chunks and results are stacked along the leading axis of all leaves."""
    number = len(jax.tree.leaves(chunks)[0])
    if number == 1:
        return jax.tree.map(lambda leaf: leaf[None], function(_first(chunks)))
    function, closed_over = trace(function, _first(chunks))

    def one_by_one(closed_over, chunks):
        return lax.map(lambda chunk: function(closed_over, chunk), chunks)

    at_once = jax.vmap(function, (None, 0))
    branches = {"cpu": one_by_one, "default": at_once, "tpu": one_by_one if target_platform() == "tpu" else None}
    return by_platform(
        closed_over,
        chunks,
        **branches,
        out=jax.tree.map(lambda type_: type_.update(shape=(number, *type_.shape)), function.out),
    )


def pullback_chunks(
    function: Callable[[Any, Any, Any], Any], args: Any, x: Any, others: Any, cotangents: Any
) -> tuple[Any, Any]:
    """The vjp of function(args, x, others), applied to every chunk of x and others, for given cotangents.

    Args:
      function: it must not close over anything that is differentiated.
      args: pytree of floats that all chunks share.
      x: pytree of floats with the chunks along the leading axis.
      others: pytree of other arrays with the chunks along the leading axis; they have no cotangents.
      cotangents: cotangents of the outputs, with the chunks along the leading axis.

    Returns:
      The cotangents of args, summed over the chunks, and of x.
    """
    function, closed_over = trace(function, args, *_first((x, others)))

    def pullback(closed_over, args, x, others, cotangents):
        return jax.vjp(lambda args, x: function(closed_over, args, x, others), args, x)[1](cotangents)

    def one_by_one(closed_over, args, *chunks):
        def add(total, chunk):
            args_bar, x_bar = pullback(closed_over, args, *chunk)
            return jax.tree.map(jnp.add, total, args_bar), x_bar

        return lax.scan(add, jax.tree.map(jnp.zeros_like, args), chunks)

    def at_once(closed_over, args, x, others, cotangents):
        whole = jax.vmap(function, (None, None, 0, 0))
        return jax.vjp(lambda args, x: whole(closed_over, args, x, others), args, x)[1](cotangents)

    chunks = x, others, cotangents
    if len(jax.tree.leaves(x)[0]) == 1:
        args_bar, x_bar = pullback(closed_over, args, *_first(chunks))
        return args_bar, jax.tree.map(lambda leaf: leaf[None], x_bar)
    branches = {"cpu": one_by_one, "default": at_once, "tpu": one_by_one if target_platform() == "tpu" else None}
    return by_platform(closed_over, args, *chunks, **branches, out=jax.tree.map(jax.typeof, (args, x)))


def _first(chunks: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], chunks)
