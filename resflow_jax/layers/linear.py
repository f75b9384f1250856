"""An invertible linear layer on the last axis: on images [B, H, W, C] the invertible 1x1 convolution.

    y = x W,   W = P L U,   L = I + strictly lower,   U = diag(sign * exp(log_scale)) + strictly upper
    log_det = positions * sum(log_scale)

Kingma & Dhariwal (2018, arXiv 1807.03039), section 3.2, equations 10 and 11: P and sign are fixed, the rest is
learned. W starts as a random orthogonal matrix.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.checks import check_count, check_type
from resflow_jax.layers.bijector import Bijector, Constant, Shape, scaling_log_det
from resflow_jax.layers.event_shapes import ends_in

Array = jax.Array


class InvertibleLinear(Bijector):
    """Learnable invertible matrix on the last axis; on images [B, H, W, C] the invertible 1x1 convolution.

        y = x W,   x = y W^-1,   log_det = positions * sum(log_scale),   W = P L U

    P, L and U are a permutation, a unit lower and an upper triangular matrix (see `layers.linear`). W starts as a
    random orthogonal matrix. `positions` is the number of elements of an event divided by `dim`.

    Args:
      dim: size of the last axis of x [B, ..., dim].
      rngs: `rngs.params` draws W.

    Randomness: `rngs` only; log_det is exact. Cost: one product of dim x dim matrices and one with x; for the inverse
    two exact triangular solves.

    Raises:
      ValueError: for a dim below one; from `output_shape`, for events whose last axis is not `dim`.

    Source: Kingma & Dhariwal (2018, arXiv 1807.03039), section 3.2, equations 10 and 11.

    Example:
      >>> layer = rf.InvertibleLinear(3, rngs=nnx.Rngs(0))
      >>> x = jnp.arange(24.0).reshape(2, 2, 2, 3)
      >>> y, log_det = layer.forward(x)
      >>> y.shape, np.allclose(log_det, 0, atol=1e-4), np.allclose(layer.inverse(y), x, atol=1e-4)
      ((2, 2, 2, 3), True, True)
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        check_count("dim", dim, 1)
        check_type("rngs", rngs, nnx.Rngs)
        self.dim = dim
        rotation = jax.random.orthogonal(rngs.params(), dim)
        factors, _, rows = jax.lax.linalg.lu(rotation)  # rotation[rows] = L U
        diagonal = jnp.diagonal(factors)
        self.lower = nnx.Param(jnp.tril(factors, -1))
        self.upper = nnx.Param(jnp.triu(factors, 1))
        self.log_scale = nnx.Param(jnp.log(jnp.abs(diagonal)))
        self.sign = Constant(jnp.sign(diagonal))
        self.rows = Constant(rows)

    def _factors(self, xp=jnp, dtype=None):
        """L and U, by the array library `xp`."""
        lower, upper, log_scale, sign = (
            xp.asarray(variable[...], dtype) for variable in (self.lower, self.upper, self.log_scale, self.sign)
        )
        unit = xp.eye(*lower.shape, dtype=lower.dtype)
        return xp.tril(lower, -1) + unit, xp.triu(upper, 1) + xp.diag(sign * xp.exp(log_scale))

    def weight(self) -> Array:
        """W, [dim, dim]."""
        return self._weight(self.lower.dtype)

    def _weight(self, dtype: Any) -> Array:
        lower, upper = self._factors(dtype=dtype)
        # Full precision also on accelerators that multiply float32 coarsely, since the solves of the inverse are exact.
        product = jnp.matmul(lower, upper, precision="highest")
        return jnp.zeros_like(product).at[self.rows[...]].set(product, unique_indices=True)

    def output_shape(self, shape: Shape) -> Shape:
        return ends_in(shape, (self.dim,))

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        weight = self._weight(jnp.result_type(x, self.lower[...]))
        return jnp.matmul(x.astype(weight.dtype), weight, precision="highest"), scaling_log_det(self.log_scale[...], x)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        lower, upper = self._factors(dtype=jnp.result_type(y, self.lower[...]))
        x = y.astype(lower.dtype).reshape(-1, y.shape[-1])
        x = jax.lax.linalg.triangular_solve(upper, x)
        x = jax.lax.linalg.triangular_solve(lower, x, lower=True, unit_diagonal=True)
        # The solution is x[:, rows], since y = x W = x[:, rows] W[rows] and W[rows] = L U.
        return jnp.zeros_like(x).at[:, self.rows[...]].set(x, unique_indices=True).reshape(y.shape)

    def lipschitz_bounds(self) -> tuple[float, float]:
        with np.errstate(over="ignore", invalid="ignore"):
            lower, upper = self._factors(np, np.float64)
            product = lower @ upper
            size = np.linalg.norm(np.abs(lower) @ np.abs(upper))
        if not np.isfinite(size):
            return math.inf, math.inf
        singular_values = np.linalg.svd(product, compute_uv=False)
        # A bound on the rounding errors of the product and of its singular values (Higham 2002, sections 3.5 and 20.1).
        rounding = 8 * len(product) * np.finfo(np.float64).eps * size
        smallest = singular_values[-1] - rounding
        return float(singular_values[0] + rounding), float(1 / smallest) if smallest > 0 else math.inf
