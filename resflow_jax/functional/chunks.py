"""A batch in chunks: one after the other on a CPU, whose cache holds a chunk's activations; at once elsewhere."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def split_chunks(x: Array, chunk_size: int | None) -> Array:
    """[B, ...] -> [chunks, B / chunks, ...]: the fewest equal chunks of at most so many examples; one for None.

    Where those have less than a quarter of that, as for a prime B, the smallest larger ones.
    """
    batch = x.shape[0]
    if chunk_size is None:
        return x[None]
    sizes = [n for n in range(1, batch + 1) if batch % n == 0]
    size = max(n for n in sizes if n <= chunk_size)
    if 4 * size < min(chunk_size, batch):
        size = min(n for n in sizes if n > chunk_size)
    return x.reshape(-1, size, *x.shape[1:])


def join_chunks(x: Array) -> Array:
    """[chunks, B / chunks, ...] -> [B, ...]."""
    return x.reshape(-1, *x.shape[2:])


def map_chunks(function: Callable[[Any], Any], chunks: Any) -> Any:
    """function(chunk) of every chunk, along the leading axis of all leaves."""
    if len(jax.tree.leaves(chunks)[0]) == 1:
        return jax.tree.map(lambda leaf: leaf[None], function(_first(chunks)))
    return lax.platform_dependent(
        chunks, cpu=lambda chunks: lax.map(function, chunks), default=lambda chunks: jax.vmap(function)(chunks)
    )


def pullback_chunks(
    function: Callable[[Any, Array, Any], Any], args: Any, x: Array, others: Any, cotangents: Any
) -> tuple[Any, Array]:
    """Cotangents of args and x, where function(args, chunk of x, chunk of others) has the `cotangents`.

    Those of args are summed over all chunks: a single sum where the chunks are taken at once.
    """

    def pullback(x, others, cotangents):
        return jax.vjp(lambda args, x: function(args, x, others), args, x)[1](cotangents)

    def one_by_one(*chunks):
        def add(total, chunk):
            args_bar, x_bar = pullback(*chunk)
            return jax.tree.map(jnp.add, total, args_bar), x_bar

        return lax.scan(add, jax.tree.map(jnp.zeros_like, args), chunks)

    def at_once(x, others, cotangents):
        whole = jax.vmap(function, (None, 0, 0))
        return jax.vjp(lambda args, x: whole(args, x, others), args, x)[1](cotangents)

    chunks = x, others, cotangents
    if len(x) == 1:
        args_bar, x_bar = pullback(*_first(chunks))
        return args_bar, x_bar[None]
    return lax.platform_dependent(*chunks, cpu=one_by_one, default=at_once)


def _first(chunks: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], chunks)
