"""`Spline`: a learned increasing curve for each channel or element."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import as_shape, check_finite, check_positive
from resflow_jax.functional.primitives.precision import wide_dtype
from resflow_jax.functional.splines import check_bins, inverse_spline, knots, slope_bounds, spline
from resflow_jax.layers.bijector import Bijector, Shape
from resflow_jax.layers.event_shapes import ends_in

Array = jax.Array


class Spline(Bijector):
    """A monotone rational-quadratic spline of each element, with one curve for each channel or element of an event.

    See `functional.splines` for the map. It starts as the identity, and is the identity outside [-bound, bound].
    Nothing limits its slopes. Before a residual flow it replaces many contractions: pixels that are often exactly black
    have a density with sharp edges, which a curve of their channel makes smooth.

    Args:
      shape: (C,) for one curve for each channel of x [B, ..., C]; an event shape for one for each element.
      bins: number of pieces of a curve.
      bound: half of the side of the square that the knots cover, in the unit of x.

    Randomness: none. Cost: one pass over x in each direction, with bins - 1 comparisons and seven lookups an element.
    In bfloat16 and float16 the curve is computed in float32.

    Raises:
      ValueError: for fewer than 2 or more than 500 bins, a bound that is not positive and finite, and from
        `output_shape` for events whose shape does not end in `shape`.

    Source: Durkan et al. (2019, arXiv 1906.04032), section 3.1 and appendix A.1 to A.3.

    Example:
      >>> layer, x = rf.Spline((2,), bins=4), jnp.linspace(-4.0, 4.0, 8).reshape(4, 2)
      >>> np.allclose(layer(x), x, atol=1e-5)
      True
      >>> layer.theta[...] += jnp.linspace(-1.0, 1.0, 22).reshape(11, 2)   # widths, heights, slopes of inner knots
      >>> y, log_det = layer.forward(x)
      >>> log_det.shape, np.allclose(layer.inverse(y), x, atol=1e-5)
      ((4,), True)
    """

    def __init__(self, shape: Shape, bins: int = 8, bound: float = 3.0):
        self.shape = as_shape("shape", shape)
        check_bins(bins)
        check_positive("bound", bound)
        check_finite("bound", bound)
        self.bins, self.bound = bins, bound
        self.theta = nnx.Param(jnp.zeros((3 * bins - 1, math.prod(self.shape))))

    def output_shape(self, shape: Shape) -> Shape:
        return ends_in(shape, self.shape)

    def _apply(self, curve: Callable[..., tuple[Array, Array]], x: Array) -> tuple[Array, Array]:
        """The values of a curve at x [B, ...], in its shape, and the sum of the log-slopes of each example."""
        dtype = wide_dtype(x.dtype)  # for narrow bins
        at = self._knots(dtype)
        values, log_slopes = curve(x.astype(dtype).reshape(-1, math.prod(self.shape)), at, self.bound)
        log_det = jnp.sum(log_slopes.reshape(x.shape[0], -1), axis=1)
        return values.reshape(x.shape).astype(x.dtype), log_det.astype(x.dtype)

    def _knots(self, dtype: Any) -> Any:
        """The knots of the curves, computed in float32 or wider."""
        return knots(self.theta[...].astype(wide_dtype(dtype)), self.bins, self.bound)

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return self._apply(spline, x)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        return self._apply(inverse_spline, y)[0]

    def invert_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return self._apply(inverse_spline, y)

    def lipschitz_bounds(self) -> tuple[float, float]:
        least, greatest = slope_bounds(self._knots(self.theta[...].dtype))
        return greatest, 1 / least
