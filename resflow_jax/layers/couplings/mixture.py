"""`MixtureCoupling`: a coupling layer whose elements go through the distribution function of a mixture of logistics."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import check_count
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.logistic_mixtures import (
    Mixture,
    inverse_mixture_logit,
    mixture_logit,
    mixture_of,
)
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.layers.bijector import Inverse, InverseAndLogDet, as_row
from resflow_jax.layers.conditioned_params import bounded
from resflow_jax.layers.couplings.conditioners import Conditioner
from resflow_jax.layers.couplings.coupling import Coupling

Array = jax.Array
Shape = tuple[int, ...]


class MixtureCoupling(Coupling):
    """Coupling layer whose moved elements go through the distribution function of a mixture of logistics.

        y_moved = logit(F(x_moved)) * exp(s) + t,   F(x) = sum_k pi_k sigmoid((x - mu_k) exp(-s_k)),   s = 4 tanh(a / 4)

    (a, t, pi, mu, s_k) come from network(x_kept; c). Where the network returns zeros the map is close to the
    identity. The inverse has no closed form: Newton's method runs within a bracket, with bisections (see
    `functional.logistic_mixtures`). `solver.tolerance` and `solver.max_iterations` of `inverse` apply to it, for any
    class of solver, and `return_status=True` returns its status, one row [B] for the layer. The derivative of the
    inverse is implicit.

    Args:
      shape, conditioner, mask, flipped, condition_dim, rngs: as in `Coupling`; the network returns 2 + 3 * components
        numbers for each moved element.
      components: K, the number of logistics.

    Randomness: as in `Coupling`. Cost: one evaluation of the network; for the inverse also about ten evaluations of F
    and of its density.

    Raises:
      ValueError: as `Coupling`, and for fewer than one component.

    Source: Ho et al. (2019, arXiv 1902.00275), section 3.2 and equations 9 and 10 (Flow++).

    Example:
      >>> conditioner = rf.MLPConditioner((8,), zero=False)
      >>> layer = rf.MixtureCoupling((4,), conditioner, components=3, rngs=nnx.Rngs(0))
      >>> x = jnp.linspace(-4.0, 4.0, 8).reshape(2, 4)
      >>> back, status = layer.inverse(layer(x), return_status=True)
      >>> np.allclose(back, x, atol=1e-4), status.converged.tolist()
      (True, [[True, True]])
    """

    def __init__(
        self,
        shape: Shape,
        conditioner: Conditioner | nnx.Module | None = None,
        mask: str | Any = "halves",
        flipped: bool = False,
        condition_dim: int | Shape | None = None,
        *,
        components: int = 8,
        rngs: nnx.Rngs | None = None,
    ):
        check_count("components", components, 1)
        self.components, self.parameters = components, 2 + 3 * components
        super().__init__(shape, conditioner, mask, flipped, condition_dim, rngs=rngs)

    def _of(self, theta: Array) -> tuple[Array, Array, Mixture]:
        """s, t and the mixture."""
        return bounded(theta[..., 0, :]), theta[..., 1, :], mixture_of(theta[..., 2:, :])

    def values(self, x: Array, theta: Array) -> tuple[Array, Array]:
        log_scale, shift, mixture = self._of(theta)
        h, log_slope = mixture_logit(x, mixture)
        return h * jnp.exp(log_scale) + shift, log_slope + log_scale

    def inverse_values(self, y: Array, theta: Array) -> tuple[Array, Array]:
        x, log_slope, _ = self._solved(y, theta, Anderson())
        return x, log_slope

    def _solved(self, y: Array, theta: Array, solver: Solver) -> tuple[Array, Array, InverseStatus]:
        """x, log dy/dx and the status of moved elements y."""
        log_scale, shift, mixture = self._of(theta)
        w = (y - shift) * jnp.exp(-log_scale)
        x, status = inverse_mixture_logit(w, mixture, solver.tolerance_for(y.dtype), solver.max_iterations)
        return x, mixture_logit(x, mixture)[1] + log_scale, status

    def solve(self, y: Array, solver: Solver, condition: Array | None) -> Inverse:
        x, _, _, statuses = self.solve_and_estimate(y, None, None, solver, condition)
        return x, statuses

    def solve_and_estimate(
        self, y: Array, key: Array | None, estimator: Estimator, solver: Solver, condition: Array | None
    ) -> InverseAndLogDet:
        parts = self._parts
        moved, log_slopes, status = self._solved(parts.moved(y), self.theta(y, condition), solver)
        log_det = jnp.sum(parts.only_moved(log_slopes), axis=tuple(range(1, y.ndim)))
        return parts.joined(y, moved), log_det, [], [as_row(status)]
