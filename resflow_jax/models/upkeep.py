"""Changes of a flow outside of the optimiser: data-dependent state, norms of linear layers, running statistics.

Each method changes the flow in place. All except `tighten` are compiled once per structure and shape.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.power_iteration import PowerIterationStatus
from resflow_jax.layers.bijector import Constant, own_condition
from resflow_jax.layers.lipschitz import TIGHT, NormSettings, linears_inside, read_linears
from resflow_jax.layers.module import Module
from resflow_jax.layers.norm_updates import update_norms

Array = jax.Array


class FlowUpkeep(Module):
    """The methods of `Flow` that change its state from data or from its parameters."""

    def initialize(self, x: Array, condition: Array | None = None) -> None:
        """Sets every ActNorm and running statistic from a batch x, in place, so that outputs are normalised.

        Args:
          x: floats [B, *event_shape], B >= 2, better hundreds, since statistics are taken over the batch. With an
            ActNorm before the first block, the default, x may have any unit: from 1e-20 to 1e20 and more in float32,
            training is the same.
          condition: as in `forward`.

        Cost: one evaluation of every g; a flow that pads uses a fixed draw of noise.

        Raises:
          ValueError: for fewer examples, as `forward` for x and condition, for values outside the support, and if
            statistics overflow the dtype; the flow is then left as it was.
        """
        with self._checked_input(x, condition, are_data=True) as (x, condition):
            if x.shape[0] < 2:
                raise ValueError(f"x: expected at least 2 examples to take statistics over, got {x.shape[0]}")
            state, is_finite = _initialize(*nnx.split(self), x, condition)
        if not isinstance(is_finite, jax.core.Tracer) and not is_finite:
            raise ValueError(
                f"x: expected values whose statistics are finite in {self.dtype}, got a batch where they overflow"
            )
        nnx.update(self, state)

    def update_norms(
        self,
        *,
        tolerance: float | Array = 1e-3,
        residual_tolerance: float | Array | None = None,
        max_iterations: int | Array = 20,
        restart: bool = False,
    ) -> PowerIterationStatus:
        """Advances the power iteration of every linear layer, in place, warm-started.

        Call it after every change of parameters, for example after each optimiser step. It works under `nnx.jit`.
        Before evaluation call `converge_norms`, which runs far more iterations.

        Args:
          tolerance: tolerance on the relative change of sigma; see `rf.power_iteration`. A new value of this argument
            or of the next two does not recompile; they may be traced.
          residual_tolerance: tolerance on the residual; by default the square root of `tolerance`.
          max_iterations: cap on the iterations of each layer.
          restart: whether a second power iteration runs from a fixed pseudo-random vector, in case the first one is
            stuck in an invariant subspace. Without it, a small fixed vector that is added at each call corrects this
            over several calls.

        Returns:
          The status of the slowest layer: most iterations, largest residual, whether all converged.

        Cost: two products with a kernel for each iteration and layer, for one example; no evaluation of g.

        Raises:
          ValueError: for a tolerance that is not positive or a cap below one, unless it is traced.
        """
        settings = NormSettings.of(tolerance, residual_tolerance, max_iterations)
        state, status = _update_norms(*nnx.split(self), settings, restart)
        nnx.update(self, state)
        return status

    def converge_norms(self) -> PowerIterationStatus:
        """Runs the power iteration of every linear layer to convergence, in place; see `update_norms`.

        It stops at a residual of 1e-5 or after 1000 iterations, which distinguishes singular values that differ by
        0.2 %; sigma is then at most 0.2 % too small. A second power iteration for each layer ensures that its vectors
        miss no component. An eager call blocks until the result is there, and emits a RuntimeWarning if a layer's
        residual stays above 1e-2. Inside a compiled program there is no warning: check the returned status.

        Returns:
          The status of the slowest layer, as `update_norms`.
        """
        status = self.update_norms(**TIGHT._asdict(), restart=True)
        if not isinstance(status.residual, jax.core.Tracer):
            _warn_norms(status)
        return status

    def tighten(self) -> None:
        """Rescales kernels, in place, until every block is certified within the bound that its coefficients set.

        Power iteration underestimates norms: after training some kernels exceed their coefficient by a fraction of a
        percent. In each block that `certify` finds above its `target_bound`, the kernels are replaced by the normalised
        kernels, each divided by its excess. Contractions with a `lipschitz` that the user states stay as they are.

        Cost: that of `certify`, on the host; not traceable.

        Raises:
          RuntimeError: if a block stays above its target bound after ten rounds.
        """
        self.bijector.tighten()

    def order_loss(self) -> Array:
        """Mean norm of the linear layers, a scalar that is differentiable only in the learnable orders of these norms.

        Kernels are shrunk least where it is small (Chen et al. 2019, arXiv 1906.02735, section 3.3). Add it to the
        training loss with a small weight, as `training.losses` does. Zero for a flow without linear layers. No
        evaluation of g.
        """
        losses = read_linears(self, lambda layer: layer.order_loss())
        return jnp.mean(jnp.concatenate([loss.ravel() for loss in losses])) if losses else jnp.zeros((), self.dtype)

    @property
    def learns_orders(self) -> bool:
        """Whether orders of norms are learned (see `order_loss`)."""
        orders = (order for layer in linears_inside(self) for order in (layer.domain, layer.codomain))
        return any(isinstance(order, nnx.Param) for order in orders)

    def norm_orders(self) -> np.ndarray:
        """The orders of the norms on input and output of every linear layer, float64 [layers, 2]; on the host."""
        orders = read_linears(self, lambda layer: jnp.stack([jnp.asarray(p, float) for p in layer.traced_orders()]))
        return np.concatenate([np.reshape(pair, (-1, 2)) for pair in [np.zeros((0, 2)), *orders]])

    def update_statistics(self, x: Array, condition: Array | None = None) -> None:
        """Moves all running statistics (`MovingBatchNorm`, `MovingCentering`) towards those of a batch x, in place.

        Call it at every training step of a flow that has any; computing log-densities does not change them.

        Args:
          x: floats [B, *event_shape].
          condition: as in `forward`.

        Cost: one evaluation of every g.

        Raises:
          ValueError: as `forward` for x and condition.
        """
        with self._checked_input(x, condition) as (x, condition):
            state = _update_statistics(*nnx.split(self), x, condition)
        nnx.update(self, state)

    def _run_initialize(self, x: Array, condition: Array | None) -> None:
        """`initialize`, traced: in place."""
        self.bijector.initialize(x, condition)


def _warn_norms(status: PowerIterationStatus) -> None:
    if not status.residual <= 1e-2:  # also if it is NaN
        warnings.warn(
            f"power iteration: a layer is far from converged after {status.iterations} iterations; largest residual "
            f"{status.residual:.1e}",
            RuntimeWarning,
            stacklevel=3,
        )


@partial(jax.jit, static_argnames="graphdef")
def _initialize(graphdef, state, x, condition):
    flow = nnx.merge(graphdef, state)
    before = jax.tree.leaves(nnx.state(flow, (nnx.BatchStat, Constant)))
    flow._run_initialize(x.astype(flow.dtype), own_condition(flow.bijector, condition))
    after = jax.tree.leaves(nnx.state(flow, (nnx.BatchStat, Constant)))
    # A constant may be infinite, for example an end of a base's support.
    overflows = [~jnp.isfinite(b) & jnp.isfinite(a) for a, b in zip(before, after, strict=True)]
    is_finite = ~jnp.any(jnp.asarray([of.any() for of in overflows], bool))
    return nnx.state(flow), is_finite


@partial(jax.jit, static_argnames="graphdef")
def _update_statistics(graphdef, state, x, condition):
    flow = nnx.merge(graphdef, state)
    flow.bijector.update_statistics(x.astype(flow.dtype), own_condition(flow.bijector, condition))
    return nnx.state(flow, nnx.BatchStat)


@partial(jax.jit, static_argnames=("graphdef", "restart"))
def _update_norms(graphdef, state, settings, restart):
    flow = nnx.merge(graphdef, state)
    status = update_norms(flow, settings, restart)
    return nnx.state(flow), status
