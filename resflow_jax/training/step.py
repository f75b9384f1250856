"""The training step of a flow: one pure function of state and batch.

The gradient of a loss(flow, batch, key) updates the parameters through optax; then the power
iteration of every linear layer advances; then the moving average of the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from resflow_jax.models.flow import ResidualFlow

Array = jax.Array


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
      step: steps done.
      params: `nnx.Param` of the flow.
      rest: its other variables, the power-iteration vectors.
      opt_state: of the optimiser.
      ema: `optax.ema` state of the parameters.
    """

    step: Array
    params: nnx.State
    rest: nnx.State
    opt_state: Any
    ema: optax.EmaState


class Trainer(NamedTuple):
    """The static side of training: what the pure functions below close over.

    Attributes:
      graphdef: structure of the flow.
      loss: (flow, batch, key) -> scalar; see `training.likelihood.dequantized_bits_per_dim`.
      optimizer: an optax transformation.
      ema_decay: decay of the parameters' moving average, which is bias-corrected.
    """

    graphdef: Any
    loss: Callable[[ResidualFlow, Any, Array], Array]
    optimizer: optax.GradientTransformation
    ema_decay: float

    def create_state(self, flow: ResidualFlow) -> TrainState:
        """The state before the first step."""
        _, params, rest = nnx.split(flow, nnx.Param, ...)
        ema = optax.ema(self.ema_decay).init(params)
        return TrainState(jnp.asarray(0), params, rest, self.optimizer.init(params), ema)

    def step(self, state: TrainState, batch: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
        """One optimiser step.

        Args:
          state: from `create_state` or an earlier step.
          batch: what the loss takes.
          key: the run's PRNG key; the step folds its own number into it.

        Returns:
          The new state, and scalars: "loss" and "gradient_norm", before clipping.
        """

        def objective(params):
            flow = nnx.merge(self.graphdef, params, state.rest)
            return self.loss(flow, batch, jax.random.fold_in(key, state.step))

        value, gradient = jax.value_and_grad(objective)(state.params)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        flow = nnx.merge(self.graphdef, params, state.rest)
        flow.update_norms()
        rest = nnx.split(flow, nnx.Param, ...)[2]
        _, ema = optax.ema(self.ema_decay).update(params, state.ema)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, params, rest, opt_state, ema), metrics

    def compiled_step(self) -> Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]:
        """`step` compiled; the state passed in is donated."""
        return jax.jit(self.step, donate_argnums=0)

    def averaged_flow(self, state: TrainState) -> ResidualFlow:
        """The flow with the averaged parameters, its norms iterated to convergence anew."""
        params = optax.tree.bias_correction(state.ema.ema, self.ema_decay, state.ema.count)
        flow = nnx.merge(self.graphdef, params, state.rest)
        flow.converge_norms()
        return flow
