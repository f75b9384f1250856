"""Samples of a flow, with their log-densities: z from the base distribution, then the inverse of the bijector.

z ~ p_base(z | c),   x = f^-1(z; c),   log p(x | c) = log p_base(z | c) + log|det df/dx|
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import as_float_batch, check_count, check_flag, check_key, check_scalar
from resflow_jax.functional.diagnostics import Diagnostics
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.inverse import check_solver, reported
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.functional.values import checked
from resflow_jax.layers.bijector import checked_estimator, join_diagnostics, join_statuses, own_condition
from resflow_jax.layers.module import Module

Array = jax.Array
Shape = tuple[int, ...]


class FlowSampling(Module):
    """The methods of `Flow` that map noise z to samples x."""

    @property
    def no_density(self) -> str | None:
        """The reason why the flow has neither densities nor samples, as "LAYER: reason"; None if it has both."""
        return self.bijector.no_density

    def _require_density(self) -> None:
        if self.no_density is not None:
            raise ValueError(f"flow: expected a flow with a density; {self.no_density}")

    def sample(
        self,
        key: Array,
        shape: int | Shape,
        *,
        condition: Array | None = None,
        temperature: float | Array = 1.0,
        solver: Solver = Anderson(),
        return_status: bool = False,
    ) -> Array | tuple[Array, InverseStatus]:
        """Draws x [*shape, *event_shape]: z from the base, then `inverse`.

        Values with a bounded support, such as images with a logit, are clipped to it. This moves the small part of the
        density that the logit's alpha leaves outside [0, 1] to its ends.

        Args:
          key: PRNG key of z.
          shape: a number n of samples, or leading axes.
          condition: floats [*condition_shape], one for all samples, or [*shape, *condition_shape], one for each.
          temperature: factor on the standard deviation of the base; see `Base.sample`.
          solver: solver for the inverse.
          return_status: whether to return the status of `inverse` as well. Without it, a solve that does not converge
            is reported as by `inverse`.

        Returns:
          x, or (x, `InverseStatus`) with fields [blocks, number of samples].

        Cost: one sample of the base, and a solve of every block.

        Raises:
          ValueError: for an invalid key, a number below 1, a condition that is missing or not expected, an invalid
            solver, and for a flow with layers that have no log-det.
          InverseError: as `inverse`.

        Example:
          >>> flow = rf.Flow(rf.ActNorm((2,)), rf.StandardNormal((2,)))
          >>> flow.sample(jax.random.key(0), (3, 4)).shape
          (3, 4, 2)
        """
        check_flag("return_status", return_status)
        self._require_density()
        check_key("key", key)
        check_scalar("temperature", temperature)
        check_solver(solver)
        shape, num_samples = _sample_shape(shape)
        own = self._condition(condition, shape, num_samples)
        with self._finite(condition):
            x, status = self._invert(self._draw(key, num_samples, own, temperature), own, solver, True, "")
        support = self.support
        x = x if support is None else jnp.clip(x, *(trailing(jnp.asarray(end, x.dtype), x) for end in support))
        if not return_status:
            x = reported(x, status, f"{type(self).__name__}.sample", solver.on_failure)
        x = x.reshape(*shape, *self.event_shape)
        return (x, status) if return_status else x

    def _draw(self, key: Array, num_samples: int, condition: Array | None, temperature: float | Array) -> Array:
        """z [num_samples, *latent_shape] from the base."""
        return self.base.sample(key, num_samples, self._base_condition(condition), temperature).astype(self.dtype)

    def sample_and_log_prob(
        self,
        key: Array,
        shape: int | Shape,
        *,
        condition: Array | None = None,
        estimator: Estimator | None = None,
        solver: Solver = Anderson(),
        return_diagnostics: bool = False,
    ) -> tuple[Array, Array] | tuple[Array, Array, Diagnostics]:
        """Draws x [*shape, *event_shape] with log p(x | c) [*shape] in nats, differentiable in the parameters.

        With E[log p(x) - log q(x)] as the loss, the flow learns an unnormalised density q only from its own samples.
        The derivative is taken along the path z -> x with z fixed. Samples are not clipped. log p is unbiased with
        `Roulette`.

        Args:
          key: PRNG key of z and of the estimate.
          shape: a number n of samples, or leading axes.
          condition: as in `sample`.
          estimator: estimator of the log-dets, as in `forward`.
          solver: solver for the inverse.
          return_diagnostics: whether to return the estimates' `Diagnostics` as the third value.

        Returns:
          (x, log_prob) or (x, log_prob, diagnostics).

        Cost: that of `sample`, and of the estimator at x.

        Raises:
          ValueError: for a number below 1, a bad estimator, for a flow that pads x, since its log p needs noise, and
            for a flow with layers that have no log-det.
          InverseError: as `inverse`.

        Example:
          >>> flow = rf.Flow(rf.ActNorm((2,)), rf.StandardNormal((2,)))
          >>> x, log_prob = flow.sample_and_log_prob(jax.random.key(0), 3)
          >>> np.allclose(log_prob, flow.log_prob(x))
          True
        """
        check_flag("return_diagnostics", return_diagnostics)
        self._require_density()
        check_key("key", key)
        shape, num_samples = _sample_shape(shape)
        condition = self._condition(condition, shape, num_samples)
        z_key, estimator_key = jax.random.split(key)
        z = self._draw(z_key, num_samples, condition, 1.0)
        found = self._solution(z, condition, estimator_key, estimator, solver)
        what = f"{type(self).__name__}.sample_and_log_prob"
        x, log_prob = reported((found.x, found.log_prob), found.status, what, solver.on_failure)
        x, log_prob = x.reshape(*shape, *self.event_shape), log_prob.reshape(shape)
        return (x, log_prob, found.diagnostics) if return_diagnostics else (x, log_prob)

    def inverse_and_log_prob(
        self,
        z: Array,
        *,
        condition: Array | None = None,
        key: Array | None = None,
        estimator: Estimator | None = None,
        solver: Solver = Anderson(),
        return_diagnostics: bool = False,
        return_status: bool = False,
    ) -> tuple[Array, ...]:
        """Maps z [B, *latent_shape] to x [B, *event_shape] with log p(x | c) [B] in nats, differentiable in z and
        parameters.

        As `sample_and_log_prob`, but for a given z. The noise of each example depends on the key and on its index in z.

        Args:
          z: floats [B, *latent_shape].
          condition: as in `forward`.
          key: PRNG key of the estimate; not needed by `Exact`.
          estimator: estimator of the log-dets, as in `forward`.
          solver: solver for the inverse.
          return_diagnostics: whether to return the estimates' `Diagnostics` as well.
          return_status: whether to return the `InverseStatus` of the solves, [blocks, B], as last. Without it, a solve
            that does not converge is reported as by `inverse`.

        Returns:
          (x, log_prob), followed by diagnostics and status if asked for.

        Cost: a solve of every block, and the estimator at x.

        Raises:
          ValueError: for a wrong rank, size or dtype, concrete values that are not finite, a bad estimator, for a flow
            that pads x, since its log p needs noise, and for a flow with layers that have no log-det.
          InverseError: as `inverse`.
        """
        check_flag("return_diagnostics", return_diagnostics)
        check_flag("return_status", return_status)
        found = self._solution(z, condition, key, estimator, solver)
        result = found.x, found.log_prob
        if not return_status:
            what = f"{type(self).__name__}.inverse_and_log_prob"
            result = reported(result, found.status, what, solver.on_failure)
        if return_diagnostics:
            result = *result, found.diagnostics
        return (*result, found.status) if return_status else result

    def _solution(self, z: Any, condition: Any, key: Any, estimator: Any, solver: Any) -> "_Solution":
        """x, log p(x | c) and the log-det for z, after checks of a caller's arguments."""
        z = as_float_batch("z", z, self.latent_shape)
        check_key("key", key, optional=True)
        check_solver(solver)
        self._require_density()
        if self.pads:
            raise ValueError(
                "flow: expected a flow without padding, because padding leaves only a bound on log p(x); got one that "
                "pads x"
            )
        own = self._condition(condition, z.shape[:1])
        estimator = checked_estimator(estimator, self.blocks)
        rule, limits = solver.split(self.dtype)
        with checked("z", z, self.dtype), self._finite(condition):
            return _inverse_and_log_prob(*nnx.split(self), z, key, estimator, rule, limits, own)


class _Solution(NamedTuple):
    """x, log p(x | c) and log|det dz/dx| for z, with the reports of the residual blocks."""

    x: Array
    log_prob: Array
    log_det: Array
    diagnostics: Diagnostics
    status: InverseStatus


def _sample_shape(shape: int | Shape) -> tuple[Shape, int]:
    """Leading axes of samples, and their number."""
    shape = (shape,) if not isinstance(shape, tuple | list) else tuple(shape)
    for size in shape:
        check_count("shape", size, 1)
    return shape, math.prod(shape)


@partial(jax.jit, static_argnames=("graphdef", "rule"))
def _inverse_and_log_prob(graphdef, state, z, key, estimator, rule, limits, condition):
    flow, solver = nnx.merge(graphdef, state), rule.with_limits(limits)
    z = z.astype(flow.dtype)
    inputs = z, key, estimator, solver, own_condition(flow.bijector, condition)
    x, log_det, diagnostics, statuses = flow.bijector.solve_and_estimate(*inputs)
    log_prob = flow.base.log_prob(z, flow._base_condition(condition)) + log_det
    return _Solution(x, log_prob, log_det, join_diagnostics(diagnostics, z), join_statuses(statuses, z))
