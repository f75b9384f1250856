"""`SplineCoupling`: a coupling layer whose elements move along rational-quadratic splines."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import check_finite, check_positive
from resflow_jax.functional.primitives.precision import wide_dtype
from resflow_jax.functional.splines import check_bins, inverse_spline, knots, spline
from resflow_jax.layers.couplings.conditioners import Conditioner
from resflow_jax.layers.couplings.coupling import Coupling

Array = jax.Array
Shape = tuple[int, ...]


class SplineCoupling(Coupling):
    """Coupling layer whose moved elements go through monotone rational-quadratic splines; see `functional.splines`.

    Knots and slopes come from network(x_kept; c). Outside [-bound, bound] the map is the identity. It is the identity
    where the network returns zeros. The inverse is in closed form.

    Args:
      shape, conditioner, mask, flipped, condition_dim, rngs: as in `Coupling`; the network returns 3 * bins - 1 numbers
        for each moved element: widths, heights, and slopes at the inner knots.
      bins: number of pieces of a spline.
      bound: half of the side of the square that the knots cover, in the unit of x.

    Randomness and cost: as in `Coupling`.

    Raises:
      ValueError: as `Coupling`, for fewer than 2 or more than 500 bins, and for a bound that is not positive and
        finite.

    Source: Durkan et al. (2019, arXiv 1906.04032), section 3.

    Example:
      >>> layer = rf.SplineCoupling((4,), rf.MLPConditioner((8,), zero=False), bins=4, rngs=nnx.Rngs(0))
      >>> x = jnp.linspace(-4.0, 4.0, 8).reshape(2, 4)
      >>> y, log_det = layer.forward(x)
      >>> log_det.shape, np.allclose(layer.inverse(y), x, atol=1e-5)
      ((2,), True)
    """

    def __init__(
        self,
        shape: Shape,
        conditioner: Conditioner | nnx.Module | None = None,
        mask: str | Any = "halves",
        flipped: bool = False,
        condition_dim: int | Shape | None = None,
        *,
        bins: int = 8,
        bound: float = 3.0,
        rngs: nnx.Rngs | None = None,
    ):
        check_bins(bins)
        check_positive("bound", bound)
        check_finite("bound", bound)
        self.bins, self.bound, self.parameters = bins, bound, 3 * bins - 1
        super().__init__(shape, conditioner, mask, flipped, condition_dim, rngs=rngs)

    def values(self, x: Array, theta: Array) -> tuple[Array, Array]:
        return self._apply(spline, x, theta)

    def inverse_values(self, y: Array, theta: Array) -> tuple[Array, Array]:
        return self._apply(inverse_spline, y, theta)

    def _apply(self, curve: Callable[..., tuple[Array, Array]], x: Array, theta: Array) -> tuple[Array, Array]:
        dtype = jnp.result_type(x, theta)
        wide = wide_dtype(dtype)  # for narrow bins
        values, log_slopes = curve(x.astype(wide), knots(theta.astype(wide), self.bins, self.bound), self.bound)
        return values.astype(dtype), log_slopes.astype(dtype)
