"""The training step of a density model on images: one pure function of state and batch.

loss = mean bits/dim of a dequantised batch, its log-det estimated;
parameters by optax, then the power iteration advances, then the moving average of the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from resflow_jax.data.images import dequantize
from resflow_jax.functional.logdet import Estimator
from resflow_jax.models.flow import ResidualFlow
from resflow_jax.training.likelihood import bits_per_dim

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
      optimizer: an optax transformation.
      ema_decay: decay of the parameters' moving average, bias-corrected.
      estimator: of the log-det in the loss.
      levels: grey levels of the data.
    """

    graphdef: Any
    optimizer: optax.GradientTransformation
    ema_decay: float
    estimator: Estimator
    levels: int

    def create_state(self, flow: ResidualFlow) -> TrainState:
        """The state before the first step."""
        _, params, rest = nnx.split(flow, nnx.Param, ...)
        ema = optax.ema(self.ema_decay).init(params)
        return TrainState(jnp.asarray(0), params, rest, self.optimizer.init(params), ema)

    def step(self, state: TrainState, images: Array, key: Array) -> tuple[TrainState, dict[str, Array]]:
        """One optimiser step on integer images [B, H, W, C].

        Args:
          state: from `create_state` or an earlier step.
          images: integers in {0..levels-1}.
          key: the run's PRNG key; the step folds its own number into it.

        Returns:
          The new state and scalars: "bits_per_dim" of the batch (unbiased with `Roulette`) and
          "gradient_norm" before clipping.
        """
        noise_key, flow_key = jax.random.split(jax.random.fold_in(key, state.step))
        x = dequantize(images, noise_key, self.levels)

        def loss(params):
            flow = nnx.merge(self.graphdef, params, state.rest)
            log_prob = flow.log_prob(x, key=flow_key, estimator=self.estimator)
            return jnp.mean(bits_per_dim(log_prob, flow.dim, self.levels))

        value, gradient = jax.value_and_grad(loss)(state.params)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        flow = nnx.merge(self.graphdef, params, state.rest)
        flow.update_norms()
        rest = nnx.split(flow, nnx.Param, ...)[2]
        _, ema = optax.ema(self.ema_decay).update(params, state.ema)
        metrics = {"bits_per_dim": value, "gradient_norm": optax.global_norm(gradient)}
        return TrainState(state.step + 1, params, rest, opt_state, ema), metrics

    def compiled_step(self) -> Callable[[TrainState, Array, Array], tuple[TrainState, dict[str, Array]]]:
        """`step` compiled; the state passed in is donated."""
        return jax.jit(self.step, donate_argnums=0)

    def averaged_flow(self, state: TrainState) -> ResidualFlow:
        """The flow with the averaged parameters, its norms iterated to convergence anew."""
        params = optax.tree.bias_correction(state.ema.ema, self.ema_decay, state.ema.count)
        flow = nnx.merge(self.graphdef, params, state.rest)
        flow.update_norms(tolerance=1e-6, max_iterations=2000)
        return flow
