"""Random probes v with E[v v^T] = I, for the trace estimate tr(A) = E[v^T A v] (Hutchinson 1990)."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array

PROBES = ("rademacher", "gaussian", "orthogonal")


def draw_probes(probe: str, probes: int, key: Array, x: Array) -> Array:
    """[probes * B, ...]: so many probes for each example of x [B, ...], of x's dtype, one batch after the other.

    Orthogonal probes are columns of a random rotation times sqrt(D): their mean of v v^T over D
    probes is exactly the identity. Those of different examples are independent.

    Raises:
      ValueError: if more orthogonal probes are asked for than there are dimensions D.
    """
    shape = (probes * x.shape[0], *x.shape[1:])
    if probe == "rademacher":
        return jax.random.rademacher(key, shape, x.dtype)
    if probe == "gaussian":
        return jax.random.normal(key, shape, x.dtype)
    dim = math.prod(x.shape[1:])
    if probes > dim:
        raise ValueError(f"probes: expected at most {dim} orthogonal probes in {dim} dimensions, got {probes}")
    columns = jnp.linalg.qr(jax.random.normal(key, (x.shape[0], dim, probes), x.dtype))[0]
    return math.sqrt(dim) * jnp.moveaxis(columns, -1, 0).reshape(shape)
