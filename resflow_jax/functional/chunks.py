"""A batch in chunks: one after the other on a CPU, whose cache holds a chunk's activations; at once elsewhere."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from resflow_jax.functional.primitives.platforms import by_platform
from resflow_jax.functional.primitives.tracing import trace

Array = jax.Array


def split_chunks(batched: Any, chunk_size: int | None) -> Any:
    """[B, ...] -> [chunks, B / chunks, ...]: the fewest equal chunks of at most so many examples; one for None.

    Of every array of a pytree. Where those have less than a quarter of that, as for a prime B, the smallest larger
    ones. One for a B that is left open, as `jax.export.symbolic_shape` does.
    """
    batch = jax.tree.leaves(batched)[0].shape[0]
    if chunk_size is None or not isinstance(batch, int):
        return jax.tree.map(lambda leaf: leaf[None], batched)
    sizes = [n for n in range(1, batch + 1) if batch % n == 0]
    size = max(n for n in sizes if n <= chunk_size)
    if 4 * size < min(chunk_size, batch):
        size = min(n for n in sizes if n > chunk_size)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), batched)


def join_chunks(x: Array) -> Array:
    """[chunks, B / chunks, ...] -> [B, ...]."""
    return x.reshape(-1, *x.shape[2:])


def map_chunks(function: Callable[[Any], Any], chunks: Any) -> Any:
    """function(chunk) of every chunk, along the leading axis of all leaves."""
    number = len(jax.tree.leaves(chunks)[0])
    if number == 1:
        return jax.tree.map(lambda leaf: leaf[None], function(_first(chunks)))
    function, closed_over = trace(function, _first(chunks))
    return by_platform(
        closed_over,
        chunks,
        cpu=lambda closed_over, chunks: lax.map(lambda chunk: function(closed_over, chunk), chunks),
        default=lambda closed_over, chunks: jax.vmap(function, (None, 0))(closed_over, chunks),
        out=jax.tree.map(lambda type_: type_.update(shape=(number, *type_.shape)), function.out),
    )


def pullback_chunks(
    function: Callable[[Any, Any, Any], Any], args: Any, x: Any, others: Any, cotangents: Any
) -> tuple[Any, Any]:
    """Cotangents of args and x, where function(args, chunk of x, chunk of others) has the `cotangents`.

    x and others are pytrees of arrays with the chunks along their leading axis. The cotangents of args are summed over
    all chunks: a single sum where the chunks are taken at once. function must close over nothing that is
    differentiated.
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
    return by_platform(
        closed_over, args, *chunks, cpu=one_by_one, default=at_once, out=jax.tree.map(jax.typeof, (args, x))
    )


def _first(chunks: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], chunks)
