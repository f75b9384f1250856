"""The training step of a flow: one pure function of state and batch.

The gradient of a loss(flow, batch, key) updates the parameters through optax; then the power
iteration of every linear layer advances; then the moving average of the parameters.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from resflow_jax.functional.estimators import Estimator, Roulette
from resflow_jax.functional.fitting import fit_lengths
from resflow_jax.functional.laws import Defensive, Fitted
from resflow_jax.functional.logdet import DIAGNOSED_TERMS, Diagnostics
from resflow_jax.functional.manual_axes import vary_over, varying_axes
from resflow_jax.models.flow import ResidualFlow

Array = jax.Array

# From flow, batch, key, estimator and steps done to a scalar and `Diagnostics`.
Loss = Callable[[ResidualFlow, Any, Array, Estimator, Array], tuple[Array, Diagnostics]]

_DECAY = 0.99
_TERM_NORMS = optax.ema(_DECAY)


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: steps done.
      params: `nnx.Param` of the flow.
      rest: its other variables: power-iteration vectors, running statistics, constants.
      opt_state: of the optimiser.
      ema: `optax.ema` state of the parameters.
      estimator: of the log-det; its arrays, if any, are the fitted laws of the lengths.
      term_norms: `optax.ema` state of the `Diagnostics.term_norms`, [blocks, 16].
    """

    step: Array
    params: nnx.State
    rest: nnx.State
    opt_state: Any
    ema: optax.EmaState
    estimator: Estimator
    term_norms: optax.EmaState


class Trainer(NamedTuple):
    """The static side of training: what the pure functions below close over.

    Attributes:
      graphdef: structure of the flow.
      loss: (flow, batch, key, estimator, steps done) -> (scalar, `Diagnostics`); see
        `training.likelihood.dequantized_bits_per_dim`. What it changes in the flow beside the
        parameters, such as running statistics, is kept.
      optimizer: an optax transformation.
      ema_decay: decay of the parameters' moving average, which is bias-corrected.
    """

    graphdef: Any
    loss: Loss
    optimizer: optax.GradientTransformation
    ema_decay: float

    def create_state(self, flow: ResidualFlow, estimator: Estimator) -> TrainState:
        """The state before the first step."""
        _, params, rest = nnx.split(flow, nnx.Param, ...)
        ema = optax.ema(self.ema_decay).init(params)
        term_norms = _TERM_NORMS.init(jnp.zeros((flow.blocks, DIAGNOSED_TERMS)))
        return TrainState(jnp.asarray(0), params, rest, self.optimizer.init(params), ema, estimator, term_norms)

    def step(self, state: TrainState, batch: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
        """One optimiser step.

        Args:
          state: from `create_state` or an earlier step.
          batch: what the loss takes; inside `jax.shard_map` a device's share, for the mean over devices.
          key: the run's PRNG key; the step folds its own number into it.

        Returns:
          The new state, and metrics: "loss"; "gradient_norm", before clipping; "diagnostics" of the
          log-det's estimates, by block.
        """
        axes = varying_axes(batch)
        # Typed as this device's own, parameters get this device's gradient: one sum over devices at the end.
        own_params, own_rest = vary_over((state.params, state.rest), axes)

        def objective(params):
            flow = nnx.merge(self.graphdef, params, own_rest, copy=True)
            step_key = jax.random.fold_in(key, state.step)
            value, diagnostics = self.loss(flow, batch, step_key, state.estimator, state.step)
            return value, (diagnostics, nnx.split(flow, nnx.Param, ...)[2])

        (value, (diagnostics, rest)), gradient = jax.value_and_grad(objective, has_aux=True)(own_params)
        if axes:
            value, diagnostics, statistics, gradient = jax.lax.pmean(
                (value, diagnostics, nnx.filter_state(rest, nnx.BatchStat), gradient), axes
            )
            rest = nnx.merge_state(state.rest, statistics)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        flow = nnx.merge(self.graphdef, params, rest)
        flow.update_norms()
        rest = nnx.split(flow, nnx.Param, ...)[2]
        _, ema = optax.ema(self.ema_decay).update(params, state.ema)
        _, term_norms = _TERM_NORMS.update(diagnostics.term_norms, state.term_norms)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradient), "diagnostics": diagnostics}
        return TrainState(state.step + 1, params, rest, opt_state, ema, state.estimator, term_norms), metrics

    def compiled_step(self) -> Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]:
        """`step` compiled; the state passed in is donated."""
        return jax.jit(self.step, donate_argnums=0)

    def parallel_step(
        self, mesh: jax.sharding.Mesh
    ) -> Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]:
        """`step` compiled for the devices of a mesh with the one axis "data": each takes an equal share of the batch.

        The state is the same on all, and donated. The same numbers as on one device, to rounding. Of what the loss
        changes in the flow beside the parameters, only `nnx.BatchStat` is kept.
        """
        whole, shares = PartitionSpec(), PartitionSpec("data")
        step = jax.shard_map(self.step, mesh=mesh, in_specs=(whole, shares, whole), out_specs=whole)
        return jax.jit(step, donate_argnums=0)

    def current_flow(self, state: TrainState) -> ResidualFlow:
        """The flow with the parameters of the last step, its norms iterated to convergence."""
        flow = nnx.merge(self.graphdef, state.params, state.rest, copy=True)  # the state keeps its own vectors
        flow.converge_norms()
        return flow

    def averaged_flow(self, state: TrainState) -> ResidualFlow:
        """The flow with the averaged parameters, its norms iterated to convergence."""
        params = optax.tree.bias_correction(state.ema.ema, self.ema_decay, state.ema.count)
        return self.current_flow(state._replace(params=params))


def fit_estimator(state: TrainState, batch_size: int) -> TrainState:
    """The state with the law of each block's lengths fitted to the term norms of the last hundred steps or so.

    To be called between epochs; the gradient of the next steps stays unbiased. Before the first step
    there is nothing to fit, and the table is that of `Defensive`. `batch_size` examples share a length.

    Raises:
      ValueError: unless the estimator is a `Roulette` of less than 16 exact terms.
    """
    estimator, (count, norms) = state.estimator, state.term_norms
    if not isinstance(estimator, Roulette) or estimator.exact_terms >= DIAGNOSED_TERMS:
        raise ValueError(f"estimator: expected Roulette, less than {DIAGNOSED_TERMS} exact_terms, got {estimator}")
    seen = optax.tree.bias_correction(norms, _DECAY, jnp.maximum(count, 1))
    law = fit_lengths(seen[:, estimator.exact_terms :], batch_size=batch_size)
    start = Defensive().survival(jnp.arange(1, law.table.shape[-1] + 1))
    return state._replace(estimator=replace(estimator, length=Fitted(jnp.where(count > 0, law.table, start))))
