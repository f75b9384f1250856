"""The monotone block, y = sqrt(2) w - x with w + g(w) = sqrt(2) x; `functional.monotone` has the mathematics."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from resflow_jax.functional.estimators import Estimator, reverse_orders
from resflow_jax.functional.inverse import check_solver, reported
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.monotone import ROOT, half_way, log_det_at, scaled
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.functional.texts import constructor
from resflow_jax.layers.bijector import Forward, Inverse, InverseAndLogDet, Shape, as_row
from resflow_jax.layers.block_certificate import monotone_bounds
from resflow_jax.layers.conditions import ConditionShape
from resflow_jax.layers.contraction_block import ContractionBlock
from resflow_jax.layers.without_log_det import refuse_dropout

Array = jax.Array


class MonotoneBlock(ContractionBlock):
    """Monotone block with a contraction g in x: the Cayley transform of g.

        y = sqrt(2) w - x,   w + g(w; c) = sqrt(2) x,       x = sqrt(2) w - y,   w - g(w; c) = sqrt(2) y
        log_det = log det(I - dg/dw) - log det(I + dg/dw) = -2 sum_{k odd} tr((dg/dw)^k) / k at w

    Both Lip(f) and Lip(f^-1) reach (1 + L) / (1 - L) for Lip(g) = L, against 1 + L and 1 / (1 - L) of a
    `ResidualBlock`: a block stretches far more, and its inverse is of the same kind, with -g. In return the map is a
    solve too. If the solve of an example does not converge, an eager call raises an `InverseError`, and a compiled one
    returns NaN for this example. With the solver's `on_failure="warn"` y is the best guess.

    Args:
      contraction: g, as in `ResidualBlock`: a `Contraction`, or any module with `lipschitz`.
      lipschitz: as in `ResidualBlock`.
      event_shape: shape of one x, if g is a module and the shape is known.
      condition_shape: shape of one condition, if g is a module that takes one.
      solver: solver for w when the map is applied; `Anderson(on_failure="raise")` by default. `inverse` takes its own.

    Randomness: `forward` draws the estimate of the log-det [B], in nats, with its key; it is unbiased with `Roulette`,
    exact with `Exact`. y and the inverse are deterministic.

    Cost: a solve for the map and for the inverse, about log(tolerance) / log(Lip(g)) evaluations of g with
    `FixedPoint`, usually fewer with `Anderson`. The log-det adds the vector-Jacobian products of the estimator, at w. A
    gradient adds one solve, with vjps of g. Memory with the Neumann gradient is that of a `ResidualBlock` and one w.

    Raises:
      ValueError: as `ResidualBlock`, and if `solver` is not a `Solver`.
      InverseError: from an eager call of f, if a solve does not converge and `solver.on_failure` is "raise".

    Source: Ahn et al. (2022, arXiv 2210.08176).

    Example:
      >>> class Half(nnx.Module):
      ...     def __call__(self, x):
      ...         return -0.5 * x
      >>> block = rf.MonotoneBlock(Half(), lipschitz=0.5)
      >>> x = jnp.ones((3, 2))
      >>> y, log_det = block.forward(x, estimator=rf.Exact())   # dy/dx = 1.5 / 0.5 I
      >>> np.allclose(y, 3, atol=1e-4), np.allclose(log_det, 2 * np.log(3)), np.allclose(block.inverse(y), x, atol=1e-4)
      (True, True, True)
    """

    def _bounds_of_map(self, bound: float) -> tuple[float, float]:
        return monotone_bounds(bound)

    def __init__(
        self,
        contraction: nnx.Module,
        *,
        lipschitz: float | None = None,
        event_shape: Shape | None = None,
        condition_shape: ConditionShape = None,
        solver: Solver | None = None,
    ):
        super().__init__(contraction, lipschitz=lipschitz, event_shape=event_shape, condition_shape=condition_shape)
        self.solver = Anderson(on_failure="raise") if solver is None else solver
        check_solver(self.solver)

    def _repr_text(self, text: Callable[[Any], str]) -> str:
        is_default = self.solver == Anderson(on_failure="raise")
        return constructor(self, text, solver=None if is_default else text(self.solver))

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        w, status = self._half_way(x, condition, self.solver)
        return self._reported(ROOT * w - x, status)

    def estimate(self, x: Array, key: Array | None, estimator: Estimator, condition: Array | None) -> Forward:
        refuse_dropout(self, estimator)
        w, status = self._half_way(x, condition, self.solver, orders=reverse_orders(estimator))
        log_det, diagnostics = self._log_det_at(w, key, estimator, condition)
        y, log_det = self._reported((ROOT * w - x, log_det), status)
        return y, log_det, diagnostics

    def _point_of_g(self, x: Array, condition: Array | None) -> Array:
        has_statistics = jax.tree.leaves(nnx.state(self.contraction, nnx.BatchStat))
        return self._half_way(x, condition, self.solver)[0] if has_statistics else x

    def solve(self, y: Array, solver: Solver, condition: Array | None) -> Inverse:
        w, status = self._half_way(y, condition, solver, inverts=True)
        return ROOT * w - y, [as_row(scaled(status))]

    def solve_and_estimate(
        self, y: Array, key: Array | None, estimator: Estimator, solver: Solver, condition: Array | None
    ) -> InverseAndLogDet:
        w, status = self._half_way(y, condition, solver, inverts=True, orders=reverse_orders(estimator))
        log_det, diagnostics = self._log_det_at(w, key, estimator, condition)
        return ROOT * w - y, log_det, diagnostics, [as_row(scaled(status))]

    def _half_way(
        self, x: Array, condition: Array | None, solver: Solver, **options: int
    ) -> tuple[Array, InverseStatus]:
        features = self.contraction.condition_features(condition)
        return half_way(self.contraction.apply, self.contraction.weights(), x, features, solver, **options)

    def _log_det_at(
        self, w: Array, key: Array | None, estimator: Estimator, condition: Array | None
    ) -> tuple[Array, list]:
        log_det, diagnostics = self._estimated(log_det_at, w, key, estimator, condition)
        return log_det, [as_row(diagnostics)]

    def _reported(self, y: Any, status: InverseStatus) -> Any:
        return reported(y, status, type(self).__name__, self.solver.on_failure)
