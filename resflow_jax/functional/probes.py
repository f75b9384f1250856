"""Random probes v with E[v v^T] = I, for the trace estimate tr(A) = E[v^T A v] (Hutchinson 1990)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.iteration import wide_dtype

Array = jax.Array

PROBES = ("rademacher", "gaussian", "orthogonal")


def draw_seeds(probe: str, probes: int, keys: Array, x: Array) -> Array:
    """The seeds [B, ...] from which `make_probes` makes the probes of each example of x [B, ...].

    For Rademacher probes they are random bits, so that the backward pass need not draw them again. Up to 64 bits are
    the words of the key itself, which are random and which nothing else uses: that compiles faster than a draw. For
    other probes the seeds are the keys.

    Args:
      probe: "rademacher", "gaussian" or "orthogonal".
      probes: number of probes for each example.
      keys: PRNG keys [B], one for each example.
      x: floats [B, ...], for their shape.
    """
    if probe != "rademacher":
        return keys
    words = -(-probes * math.prod(x.shape[1:]) // 32)
    own = jax.random.key_data(keys)
    if words <= own.shape[-1]:
        return own[:, :words]
    return jax.vmap(lambda key: jax.random.bits(key, (words,), jnp.uint32))(keys)


def make_probes(probe: str, probes: int, seeds: Array, x: Array) -> Array:
    """Makes `probes` probes v for each example of x [B, ...]: [probes * B, ...] in x's dtype, batch after batch.

    Orthogonal probes are columns of a random rotation, times sqrt(D): the mean of v v^T over D of them is exactly the
    identity, so D of them give the exact trace.

    Args:
      probe: "rademacher", "gaussian" or "orthogonal".
      probes: number of probes for each example.
      seeds: [B, ...], of `draw_seeds`.
      x: floats [B, ...], for their shape and dtype.

    Raises:
      ValueError: for more orthogonal probes than dimensions D.
    """
    event = x.shape[1:]
    dim = math.prod(event)
    if probe == "orthogonal" and probes > dim:
        raise ValueError(f"probes: expected at most {dim} orthogonal probes in {dim} dimensions, got {probes}")

    def make(seed):
        if probe == "rademacher":
            return _signs(seed, probes * dim, x.dtype).reshape(probes, *event)
        if probe == "gaussian":
            return jax.random.normal(seed, (probes, *event), x.dtype)
        # LAPACK has no 16-bit floats
        columns = jnp.linalg.qr(jax.random.normal(seed, (dim, probes), wide_dtype(x.dtype)))[0]
        return (math.sqrt(dim) * columns.T.reshape(probes, *event)).astype(x.dtype)

    return jax.vmap(make, out_axes=1)(seeds).reshape(probes * x.shape[0], *event)


def _signs(words: Array, count: int, dtype: np.dtype) -> Array:
    """Signs +-1 [count], one for each random bit. Each 32-bit word gives 32 signs."""
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (2 * bits.reshape(-1)[:count].astype(jnp.int32) - 1).astype(dtype)
