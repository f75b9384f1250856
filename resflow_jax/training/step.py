"""The training step of a flow: one pure function of state and batch.

The gradient of a loss(flow, batch, key) updates the parameters through optax; then the power
iteration of every linear layer advances; then the moving average of the parameters. `training.parallel` runs
the same function on many devices.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from resflow_jax.functional.batch_axes import axes_of_batch, vary_over, varying_axes
from resflow_jax.functional.checks import check_callable, check_count, check_open_interval, check_type
from resflow_jax.functional.diagnostics import DIAGNOSED_TERMS, Diagnostics
from resflow_jax.functional.estimators import Estimator, Roulette, check_estimator
from resflow_jax.functional.length_laws import Defensive, Fitted, fit_lengths
from resflow_jax.models.flow import Flow

Array = jax.Array

# From flow, batch, key, estimator and steps done to a scalar and `Diagnostics`.
Loss = Callable[[Flow, Any, Array, Estimator, Array], tuple[Array, Diagnostics]]

# Optax raises numbers to the power of a count: jax_numpy_dtype_promotion="strict" would forbid it.
optax_promotion = partial(jax.numpy_dtype_promotion, "standard")

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


class Gradient(NamedTuple):
    """What batches tell: mean loss, the estimates' diagnostics, gradient; the flow's other variables behind them."""

    loss: Array
    diagnostics: Diagnostics
    gradient: nnx.State
    rest: nnx.State

    def metrics(self) -> dict[str, Any]:
        """What a step reports."""
        norm = optax.tree.norm(self.gradient)
        return {"loss": self.loss, "gradient_norm": norm, "diagnostics": self.diagnostics}


class Trainer(NamedTuple):
    """The static side of training: what the pure functions below close over.

    Attributes:
      graphdef: structure of the flow.
      loss: (flow, batch, key, estimator, steps done) -> (scalar, `Diagnostics`); see
        `training.losses.dequantized_bits_per_dim`. What it changes in the flow beside the
        parameters, such as running statistics, is kept.
      optimizer: an optax transformation.
      ema_decay: decay of the parameters' moving average, which is bias-corrected.
      accumulate: batches whose mean gradient makes an update.
    """

    graphdef: Any
    loss: Loss
    optimizer: optax.GradientTransformation
    ema_decay: float
    accumulate: int = 1

    def create_state(self, flow: Flow, estimator: Estimator) -> TrainState:
        """The state before the first step, with copies of the flow's arrays: compiled steps take those of a state over.

        Raises:
          ValueError: for a flow or an estimator that is none, a decay outside of [0, 1) or a count below one.
        """
        check_estimator(estimator)
        check_callable("loss", self.loss)
        check_type("optimizer", self.optimizer, optax.GradientTransformation)
        if self.ema_decay != 0:
            check_open_interval("ema_decay", self.ema_decay, 0, 1)
        check_count("accumulate", self.accumulate, 1)
        if isinstance(flow, type) or not hasattr(flow, "blocks"):
            raise ValueError(f"flow: expected a Flow, got {flow!r}")
        _, *parts = nnx.split(flow, nnx.Param, ...)
        params, rest = jax.tree.map(jnp.copy, parts)
        ema = optax.ema(self.ema_decay).init(params)
        term_norms = _TERM_NORMS.init(jnp.zeros((flow.blocks, DIAGNOSED_TERMS)))
        return TrainState(jnp.asarray(0), params, rest, self.optimizer.init(params), ema, estimator, term_norms)

    def step(self, state: TrainState, batch: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
        """One update, from one batch or, with `accumulate`, from so many, each of which counts as a step.

        It may run on each device's share of the batches, as `training.parallel` does: means are then taken over
        devices, once an update, and the new state is the same on all.

        Args:
          state: from `create_state` or an earlier step.
          batch: what the loss takes: an array, or a tree of arrays, as a pair (x, condition); with `accumulate` above
            1, so many on a leading axis.
          key: the run's PRNG key, the same on all devices; each step folds its own number into it.

        Returns:
          The new state, and metrics, means over the batches: "loss"; "gradient_norm" of the mean gradient, before
          clipping; "diagnostics" of the log-det's estimates, by block.
        """
        found = self.gradient(state, batch, key)
        state = self.advance_norms(self.update(state, found))
        return state, found.metrics()

    def gradient(self, state: TrainState, batch: Any, key: Array) -> Gradient:
        """The first part of a step: means over the batches of an update, and over devices."""
        loss, diagnostics, gradient, rest = self._own_gradient(state, batch, key)
        if axes := axes_of_batch(batch):
            # One sum over devices for everything, a leaf at a time: each can start as soon as its gradient is known.
            loss, diagnostics, gradient, statistics = jax.lax.pmean(
                (loss, diagnostics, gradient, nnx.filter_state(rest, nnx.BatchStat)), axes
            )
            rest = nnx.merge_state(state.rest, statistics)
        return Gradient(loss, diagnostics, gradient, rest)

    def update(self, state: TrainState, found: Gradient) -> TrainState:
        """The second part: the optimiser and the averages, element by element but for the gradient's norm."""
        with optax_promotion():
            updates, opt_state = self.optimizer.update(found.gradient, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            _, ema = optax.ema(self.ema_decay).update(params, state.ema)
            _, term_norms = _TERM_NORMS.update(found.diagnostics.term_norms, state.term_norms)
        steps = state.step + self.accumulate
        return TrainState(steps, params, found.rest, opt_state, ema, state.estimator, term_norms)

    def advance_norms(self, state: TrainState) -> TrainState:
        """The last part: the power iterations of the new parameters."""
        flow = nnx.merge(self.graphdef, state.params, state.rest, copy=True)
        flow.update_norms()
        return state._replace(rest=nnx.split(flow, nnx.Param, ...)[2])

    def compiled_step(self) -> Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]:
        """`step` compiled for one device; the state passed in is donated."""
        return jax.jit(self.step, donate_argnums=0)

    def _own_gradient(self, state: TrainState, batch: Any, key: Array) -> Gradient:
        """Means over the batches of an update, on a device's share of them."""
        # Typed as this device's own, parameters get this device's gradient.
        params, rest = vary_over((state.params, state.rest), varying_axes(batch))

        def of_batch(rest, batch, step):
            def objective(params):
                flow = nnx.merge(self.graphdef, params, rest, copy=True)
                loss, diagnostics = self.loss(flow, batch, jax.random.fold_in(key, step), state.estimator, step)
                return loss, (diagnostics, nnx.split(flow, nnx.Param, ...)[2])

            (loss, (diagnostics, after)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
            return (loss, diagnostics, gradient), after

        if self.accumulate == 1:
            found, rest = of_batch(rest, batch, state.step)
            return Gradient(*found, rest)

        def add(carry, inputs):
            total, rest = carry
            found, rest = of_batch(rest, *inputs)
            return (jax.tree.map(jnp.add, total, found), rest), None

        # The last batch is not part of the loop, so that sums over devices may begin within its backward pass.
        steps = state.step + jnp.arange(self.accumulate)
        batches, last = jax.tree.map(lambda leaf: leaf[:-1], batch), jax.tree.map(lambda leaf: leaf[-1], batch)
        types = jax.eval_shape(of_batch, rest, last, steps[-1])[0]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), types)
        (total, rest), _ = jax.lax.scan(add, (vary_over(zeros, varying_axes(batch)), rest), (batches, steps[:-1]))
        found, rest = of_batch(rest, last, steps[-1])
        return Gradient(*jax.tree.map(lambda a, b: (a + b) / self.accumulate, total, found), rest)

    def current_flow(self, state: TrainState) -> Flow:
        """The flow with the parameters of the last step, its norms iterated to convergence."""
        flow = nnx.merge(self.graphdef, state.params, state.rest, copy=True)  # the state keeps its own vectors
        flow.converge_norms()
        return flow

    def averaged_flow(self, state: TrainState) -> Flow:
        """The flow with the averaged parameters, its norms iterated to convergence."""
        with optax_promotion():
            params = optax.tree.bias_correction(state.ema.ema, self.ema_decay, state.ema.count)
        return self.current_flow(state._replace(params=params))


def fit_estimator(state: TrainState, batch_size: int) -> TrainState:
    """The state with the law of each block's lengths fitted to the term norms of the last hundred updates or so.

    To be called between epochs; the gradient of the next steps stays unbiased. Before the first step
    there is nothing to fit, and the table is that of `Defensive`. `batch_size` examples share a length.

    Raises:
      ValueError: unless the estimator is a `Roulette` of less than 16 exact terms.
    """
    estimator, (count, norms) = state.estimator, state.term_norms
    if not isinstance(estimator, Roulette) or estimator.exact_terms >= DIAGNOSED_TERMS:
        raise ValueError(f"estimator: expected Roulette, less than {DIAGNOSED_TERMS} exact_terms, got {estimator}")
    with optax_promotion():
        seen = optax.tree.bias_correction(norms, _DECAY, jnp.maximum(count, 1))
    law = fit_lengths(seen[:, estimator.exact_terms :], batch_size=batch_size)
    start = Defensive().survival(jnp.arange(1, law.table.shape[-1] + 1))
    return state._replace(estimator=replace(estimator, length=Fitted(jnp.where(count > 0, law.table, start))))
