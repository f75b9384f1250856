"""Maps from the reals to the positive numbers, which stay positive and finite in any dtype, and their inverses.

    Exp         y = exp(x)            x = log(y)                    log dy/dx = x
    Softplus    y = log(1 + exp(x))   x = y + log(1 - exp(-y))      log dy/dx = log(1 - exp(-y))

`Invert(Exp())` is the logarithm. `Invert(Softplus())` is close to the logarithm near zero and to the identity far
from it. Either maps positive data to the reals.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from resflow_jax.functional.values import Domain
from resflow_jax.layers.elementwise import Elementwise, largest, smallest

Array = jax.Array


class _ToPositive(Elementwise):
    def codomain(self, dtype: Any) -> Domain:
        return Domain(smallest(dtype), largest(dtype), "(0, inf)")

    @property
    def image(self) -> tuple[float, float]:
        return 0.0, math.inf


class Exp(_ToPositive):
    """Exponential of each element, to positive numbers; `Invert(Exp())` is the logarithm of positive data.

        y = exp(x),   x = log(y),   log_det = sum x

    If exp(x) is outside the range of the dtype, y is near its largest or at its smallest normal number, with a
    derivative of zero; in float32 for |x| > 87. The inverse is NaN for y <= 0.

    Randomness: none. Cost: one pass over x in each direction. Shapes: x, y [B, ...], log_det [B] in nats.

    Raises:
      ValueError: as `Bijector.forward`.

    Example:
      >>> y, log_det = rf.Exp().forward(jnp.array([[0.0, 1.0]]))
      >>> np.allclose(y, [[1, np.e]]), log_det.tolist(), np.allclose(rf.Exp().inverse(y), [[0, 1]], atol=1e-6)
      (True, [1.0], True)
    """

    def values(self, x: Array) -> tuple[Array, Array]:
        return safe_exp(x), x

    def inverse_values(self, y: Array) -> tuple[Array, Array]:
        x = safe_log(y)
        return x, x


class Softplus(_ToPositive):
    """Softplus of each element, to positive numbers; its inverse maps positive data to the reals, and keeps large
    values.

        y = log(1 + exp(x)),   x = y + log(1 - exp(-y)),   log_det = sum log(1 - exp(-y))

    If y is below the dtype's smallest normal number, it is that number, with a derivative of zero; in float32 for
    x < -87. The inverse is NaN for y <= 0.

    Randomness: none. Cost: one pass over x in each direction. Shapes: x, y [B, ...], log_det [B] in nats.

    Raises:
      ValueError: as `Bijector.forward`.

    Example:
      >>> y, log_det = rf.Softplus().forward(jnp.array([[0.0, 30.0]]))
      >>> np.allclose(y, [[np.log(2), 30]]), np.allclose(log_det, -np.log(2))
      (True, True)
      >>> np.allclose(rf.Softplus().inverse(y), [[0, 30]], atol=1e-6)
      True
    """

    def values(self, x: Array) -> tuple[Array, Array]:
        return safe_softplus(x), -jax.nn.softplus(-x)

    def inverse_values(self, y: Array) -> tuple[Array, Array]:
        return softplus_inverse(y)

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, math.inf


def safe_exp(x: Array) -> Array:
    """exp(x), a positive normal number for every x."""
    low, high = smallest(x.dtype), largest(x.dtype)
    # Rounding must not take exp(x) out of the dtype's range: its derivative would be infinite, that of x 0 * inf = NaN.
    highest = math.log(high) * (1 - 4 * float(jnp.finfo(x.dtype).eps))
    return jnp.maximum(jnp.exp(jnp.clip(x, math.log(low), highest)), low)


def safe_log(y: Array) -> Array:
    """log(y), NaN unless y is positive."""
    return jnp.log(jnp.where(y > 0, y, jnp.nan))


def safe_softplus(x: Array) -> Array:
    """log(1 + exp(x)), a positive normal number for every x."""
    low = smallest(x.dtype)
    return jnp.maximum(jax.nn.softplus(jnp.maximum(x, math.log(low))), low)


def softplus_inverse(y: Array) -> tuple[Array, Array]:
    """x with log(1 + exp(x)) = y, and log dy/dx = log(1 - exp(-y)); NaN unless y is positive."""
    y = jnp.where(y > 0, y, jnp.nan)
    # Each form is accurate on its side: 1 - exp(-y) is y near zero, and rounds to 1 far from it.
    near = jnp.log(-jnp.expm1(-jnp.minimum(y, 1)))
    far = jnp.log1p(-jnp.exp(-jnp.maximum(y, 0.5)))
    log_slope = jnp.where(y < math.log(2), near, far)
    return y + log_slope, log_slope
