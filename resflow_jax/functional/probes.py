"""Random probes v with E[v v^T] = I, for the trace estimate tr(A) = E[v^T A v] (Hutchinson 1990)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.iteration import wide_dtype

Array = jax.Array

PROBES = ("rademacher", "gaussian", "orthogonal")


def draw_probes(probe: str, probes: int, keys: Array, x: Array) -> Array:
    """[probes * B, ...]: so many probes for each example of x [B, ...], of x's dtype, one batch after the other.

    Each example's are drawn with its own key, keys [B]. Orthogonal probes are columns of a random rotation
    times sqrt(D): their mean of v v^T over D probes is exactly the identity.

    Raises:
      ValueError: if more orthogonal probes are asked for than there are dimensions D.
    """
    event = x.shape[1:]
    dim = math.prod(event)
    if probe == "orthogonal" and probes > dim:
        raise ValueError(f"probes: expected at most {dim} orthogonal probes in {dim} dimensions, got {probes}")

    def draw(key):
        if probe == "rademacher":
            return _signs(key, probes * dim, x.dtype).reshape(probes, *event)
        if probe == "gaussian":
            return jax.random.normal(key, (probes, *event), x.dtype)
        # LAPACK has no 16-bit floats
        columns = jnp.linalg.qr(jax.random.normal(key, (dim, probes), wide_dtype(x.dtype)))[0]
        return (math.sqrt(dim) * columns.T.reshape(probes, *event)).astype(x.dtype)

    return jax.vmap(draw, out_axes=1)(keys).reshape(probes * x.shape[0], *event)


def _signs(key: Array, number: int, dtype: np.dtype) -> Array:
    """Independent signs +-1 [number], one for each random bit: 32 times less to draw than with a word for each."""
    words = jax.random.bits(key, (-(-number // 32), 1), jnp.uint32)
    bits = (words >> jnp.arange(32, dtype=jnp.uint32)[None]) & 1
    return (2 * bits.reshape(-1)[:number].astype(jnp.int32) - 1).astype(dtype)
