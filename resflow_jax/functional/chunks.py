"""Evaluates a batch in chunks, so that activations stay in fast memory.

On a CPU the chunks are computed one after the other. On a TPU groups of them are, whose largest array has 16 MiB in
float32: the compiler then keeps activations in VMEM, 128 MiB on v5e and v5p, and an example's activations do not
travel to HBM. A program that the compiler itself divides among TPUs computes all chunks at once, since a loop over a
divided axis would run whole on every chip; inside of `jax.shard_map` it loops. Other platforms compute all at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.primitives.platforms import by_platform
from resflow_jax.functional.primitives.tracing import Traced, trace

Array = jax.Array

_ELEMENTS_ON_A_TPU = 2**22  # of the largest array of a group of chunks


def split_chunks(batched: Any, chunk_size: int | None) -> Any:
    """Splits every array [B, ...] of a pytree into equal chunks: [chunks, B / chunks, ...].

    The size of a chunk is the largest divisor of B that is at most `chunk_size`. If that is less than a quarter of
    `chunk_size`, as for a prime B, it is the smallest divisor above `chunk_size`. There is one chunk if `chunk_size` is
    None, or if B is symbolic, as by `jax.export.symbolic_shape`.
    """
    batch = jax.tree.leaves(batched)[0].shape[0]
    if chunk_size is None or not isinstance(batch, int):
        return jax.tree.map(lambda leaf: leaf[None], batched)
    return _split(batched, _divisor(batch, chunk_size))


def _split(batched: Any, size: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), batched)


def _divisor(number: int, wanted: int) -> int:
    """The largest divisor that is at most `wanted`, or the smallest above if that is less than a quarter of it."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    size = max(n for n in divisors if n <= wanted)
    return min(n for n in divisors if n > wanted) if 4 * size < min(wanted, number) else size


def _groups(chunks: Any, function: Traced) -> Any:
    """Groups of the chunks, [groups, chunks of a group, ...], for a TPU."""
    number = len(jax.tree.leaves(chunks)[0])
    return _split(chunks, _divisor(number, max(1, _ELEMENTS_ON_A_TPU // max(1, function.largest))))


def join_chunks(x: Array) -> Array:
    """[chunks, B / chunks, ...] -> [B, ...]."""
    return x.reshape(-1, *x.shape[2:])


def map_chunks(function: Callable[[Any], Any], chunks: Any) -> Any:
    """Applies a function to every chunk; chunks and results are stacked along the leading axis of all leaves."""
    number = len(jax.tree.leaves(chunks)[0])
    if number == 1:
        return jax.tree.map(lambda leaf: leaf[None], function(_first(chunks)))
    function, closed_over = trace(function, _first(chunks))
    at_once = jax.vmap(function, (None, 0))

    def in_groups(closed_over, chunks):
        groups = _groups(chunks, function)
        return jax.tree.map(join_chunks, lax.map(lambda group: at_once(closed_over, group), groups))

    return by_platform(
        closed_over,
        chunks,
        cpu=lambda closed_over, chunks: lax.map(lambda chunk: function(closed_over, chunk), chunks),
        default=at_once,
        tpu=in_groups,
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
      cotangents: of the outputs, with the chunks along the leading axis.

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

    def in_groups(closed_over, args, *chunks):
        def add(total, group):
            args_bar, x_bar = at_once(closed_over, args, *group)
            return jax.tree.map(jnp.add, total, args_bar), x_bar

        args_bar, x_bar = lax.scan(add, jax.tree.map(jnp.zeros_like, args), _groups(chunks, function))
        return args_bar, jax.tree.map(join_chunks, x_bar)

    chunks = x, others, cotangents
    if len(jax.tree.leaves(x)[0]) == 1:
        args_bar, x_bar = pullback(closed_over, args, *_first(chunks))
        return args_bar, jax.tree.map(lambda leaf: leaf[None], x_bar)
    return by_platform(
        closed_over,
        args,
        *chunks,
        cpu=one_by_one,
        default=at_once,
        tpu=in_groups,
        out=jax.tree.map(jax.typeof, (args, x)),
    )


def _first(chunks: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], chunks)
