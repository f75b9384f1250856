"""The training step of a flow: one pure function of the state, a batch and a key.

The step has three parts. `Trainer.gradient` takes the mean gradient of a loss(flow, batch, key) over the batches of an
update. `Trainer.update` applies the optax transformation and advances the moving average of the parameters.
`Trainer.advance_norms` advances the power iteration of every linear layer to the new parameters. `training.parallel`
runs the same functions on many devices. An update whose loss or gradient is not finite is skipped: the state keeps all
but its number of steps (`Gradient.is_finite`, `unless_skipped`).
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
from resflow_jax.functional.estimators import Estimator, Roulette, check_estimator, fit_law
from resflow_jax.functional.length_laws import Fitted
from resflow_jax.functional.opaque import as_tree, original
from resflow_jax.functional.primitives.precision import wide_dtype
from resflow_jax.models.flow import Flow

Array = jax.Array

# loss(flow, batch, key, estimator, steps done) -> (scalar, `Diagnostics`)
Loss = Callable[[Flow, Any, Array, Estimator, Array], tuple[Array, Diagnostics]]

# Optax raises a float to the power of an integer count, which jax_numpy_dtype_promotion="strict" forbids.
optax_promotion = partial(jax.numpy_dtype_promotion, "standard")

_DECAY = 0.99
_TERM_NORMS = optax.ema(_DECAY)


class TrainState(NamedTuple):
    """Everything that a training step changes; a pytree of arrays.

    Attributes:
      step: number of steps done, an integer scalar.
      params: the `nnx.Param` variables of the flow, which the optimiser trains.
      non_params: its other variables: power-iteration vectors, running statistics, constants.
      opt_state: state of the optax transformation.
      ema: `optax.ema` state of the parameters, without bias correction.
      estimator: estimator of the log-det. Its arrays, if any, are the fitted distributions of the series lengths.
      term_norms: `optax.ema` state of `Diagnostics.term_norms`, [blocks, 16]; empty without residual blocks.

    Example:
      >>> import optax
      >>> from resflow_jax.training.losses import negative_log_likelihood
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> trainer = rf.training.Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.sgd(0.1), ema_decay=0.9)
      >>> state = trainer.create_state(flow, rf.Roulette())
      >>> int(state.step), state.term_norms.ema.shape
      (0, (1, 16))
    """

    step: Array
    params: nnx.State
    non_params: nnx.State
    opt_state: Any
    ema: optax.EmaState
    estimator: Estimator
    term_norms: optax.EmaState


class Gradient(NamedTuple):
    """Means over the batches of an update, and the state of the flow after them.

    Attributes:
      loss: mean loss, a scalar.
      diagnostics: means of the log-det estimates' diagnostics.
      gradient: mean gradient, with the structure of `TrainState.params`.
      non_params: the flow's other variables after the last batch.
    """

    loss: Array
    diagnostics: Diagnostics
    gradient: nnx.State
    non_params: nnx.State

    def metrics(self) -> dict[str, Any]:
        """The metrics that `Trainer.step` returns."""
        norm = optax.tree.norm(self.gradient)
        return {"loss": self.loss, "gradient_norm": norm, "diagnostics": self.diagnostics}

    def is_finite(self) -> Array:
        """Whether the metrics and the flow's other variables are finite; a Boolean scalar, the same on all devices.

        The norm of the gradient is finite only if every element is.
        """
        leaves = jax.tree.leaves((self.metrics(), nnx.filter_state(self.non_params, nnx.BatchStat)))
        return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


class Trainer(NamedTuple):
    """The static side of training: what the pure functions of this class close over.

    Attributes:
      graphdef: structure of the flow, `nnx.graphdef(flow)`.
      loss: (flow, batch, key, estimator, steps done) -> (scalar, `Diagnostics`), as `training.losses` makes it. Changes
        that it makes to the flow's other variables are kept; on a mesh only those to running statistics
        (`nnx.BatchStat`), as means over the devices.
      optimizer: an optax transformation. One with extra arguments is given the loss as `value`, and `grad`. One that
        calls the loss itself, as the line search of `optax.lbfgs`, fails.
      ema_decay: decay of the moving average of the parameters, in [0, 1). The average is bias-corrected where
        `averaged_flow` reads it.
      accumulate: number of batches whose mean gradient makes one update.

    Source: the training of Chen et al. (2019), arXiv 1906.02735, appendix E, with power iterations after every update.

    Example:
      >>> import optax
      >>> from resflow_jax.training.losses import negative_log_likelihood
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> trainer = rf.training.Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.adam(1e-2), ema_decay=0.9)
      >>> state, step = trainer.create_state(flow, rf.Exact()), trainer.compiled_step()
      >>> x = jax.random.normal(jax.random.key(0), (16, 2))
      >>> for _ in range(3):
      ...     state, metrics = step(state, x, jax.random.key(1))
      >>> int(state.step), metrics["loss"].shape
      (3, ())
      >>> trainer.averaged_flow(state).log_prob(x, estimator=rf.Exact()).shape
      (16,)
    """

    graphdef: Any
    loss: Loss
    optimizer: optax.GradientTransformation
    ema_decay: float
    accumulate: int = 1

    def create_state(self, flow: Flow, estimator: Estimator) -> TrainState:
        """Returns the state before the first step.

        The state copies all arrays of the flow and of the estimator, because a compiled step donates its input state:
        those arrays cannot be used again. No array occurs twice in the state.

        Args:
          flow: gives the initial values; its structure must be that of `graphdef`.
          estimator: estimator of the log-det in training.

        Raises:
          ValueError: if flow is not a `Flow` or estimator not an estimator, if the loss cannot be called, if the
            optimizer is not an optax transformation, if ema_decay is outside of [0, 1), or if accumulate is below 1.
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
        params, non_params, estimator = _copied((*parts, as_tree(estimator)))
        ema = optax.ema(self.ema_decay).init(_at_least_float32(params))
        # Without residual blocks there is no array, since a checkpoint holds none of size zero.
        term_norms = _TERM_NORMS.init(jnp.zeros((flow.blocks, DIAGNOSED_TERMS)) if flow.blocks else ())
        opt_state = _copied(self.optimizer.init(params))  # some optimisers keep the parameters themselves
        return TrainState(jnp.asarray(0), params, non_params, opt_state, ema, estimator, term_norms)

    def step(self, state: TrainState, batch: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
        """Makes one update from one batch, or from `accumulate` batches, each of which counts as a step.

        The function may also run on each device's slice of the batches, as in `training.parallel`. It then takes means
        over devices once per update, and the new state is the same on all devices.

        Args:
          state: from `create_state` or an earlier step.
          batch: argument of the loss: an array [B, ...], or a tree of arrays, such as a pair (x, condition). With
            `accumulate` above 1 every array has a leading axis of that length.
          key: PRNG key of the run, the same in all steps and on all devices. Each step folds its own number into it.

        Returns:
          The new state, and the metrics, which are means over the batches: "loss"; "gradient_norm", the norm of the
          mean gradient before any clipping; "diagnostics", those of the log-det estimates, by block. If one of them is
          not finite, the update is skipped: the new state is the old one, but with its number of steps increased. This
          is decided on the devices, without the host.

        Cost: the loss and its gradient for every batch, the optimiser, and `Flow.update_norms`: in every linear layer
        up to 20 power iterations, often 1 or 2.
        """
        found = self.gradient(state, batch, key)
        after = self.update(state, found)
        return unless_skipped(found.is_finite(), after, state, self.advance_norms), found.metrics()

    def gradient(self, state: TrainState, batch: Any, key: Array) -> Gradient:
        """The first part of a step: means over the batches of an update and over devices."""
        loss, diagnostics, gradient, non_params = self._gradient_on_device(state, batch, key)
        if axes := axes_of_batch(batch):
            # One sum over devices for each leaf: it can start as soon as the leaf's gradient is known.
            loss, diagnostics, gradient, statistics = jax.lax.pmean(
                (loss, diagnostics, gradient, nnx.filter_state(non_params, nnx.BatchStat)), axes
            )
            non_params = nnx.merge_state(state.non_params, statistics)
        return Gradient(loss, diagnostics, gradient, non_params)

    def update(self, state: TrainState, found: Gradient) -> TrainState:
        """The second part: the optimiser and the averages. All but the gradient's norm works element by element."""
        with optax_promotion():
            optimizer = optax.with_extra_args_support(self.optimizer)
            extra = {"value": found.loss, "grad": found.gradient}  # for those that look at the loss
            updates, opt_state = optimizer.update(found.gradient, state.opt_state, state.params, **extra)
            params = optax.apply_updates(state.params, updates)
            _, ema = optax.ema(self.ema_decay).update(_at_least_float32(params), state.ema)
            norms = found.diagnostics.term_norms if jax.tree.leaves(state.term_norms.ema) else ()
            _, term_norms = _TERM_NORMS.update(norms, state.term_norms)
        steps = state.step + self.accumulate
        return TrainState(steps, params, found.non_params, opt_state, ema, state.estimator, term_norms)

    def advance_norms(self, state: TrainState) -> TrainState:
        """The last part: `Flow.update_norms`, the power iterations of all linear layers with the new parameters."""
        flow = nnx.merge(self.graphdef, state.params, state.non_params, copy=True)
        flow.update_norms()
        return state._replace(non_params=nnx.split(flow, nnx.Param, ...)[2])

    def compiled_step(self) -> Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]:
        """Returns `step` compiled for one device. The state passed in is donated: its arrays cannot be used again."""
        return jax.jit(self.step, donate_argnums=0)

    def _gradient_on_device(self, state: TrainState, batch: Any, key: Array) -> Gradient:
        """Means over the batches of an update, on this device's slice of them."""
        # Typed as varying over the devices, the parameters get the gradient of this device alone.
        params, non_params = vary_over((state.params, state.non_params), varying_axes(batch))
        estimator = original(state.estimator)

        def of_batch(non_params, batch, step):
            def objective(params):
                flow = nnx.merge(self.graphdef, params, non_params, copy=True)
                loss, diagnostics = self.loss(flow, batch, jax.random.fold_in(key, step), estimator, step)
                return loss, (diagnostics, nnx.split(flow, nnx.Param, ...)[2])

            (loss, (diagnostics, after)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
            return (loss, diagnostics, gradient), after

        if self.accumulate == 1:
            means, non_params = of_batch(non_params, batch, state.step)
        else:
            steps = state.step + jnp.arange(self.accumulate)
            means, non_params = _mean_over_batches(of_batch, non_params, batch, steps)
        return Gradient(*means, non_params)

    def current_flow(self, state: TrainState) -> Flow:
        """Returns the flow with the parameters of the last step; its power iterations are run to convergence."""
        flow = nnx.merge(self.graphdef, state.params, state.non_params, copy=True)  # the state keeps its own vectors
        flow.converge_norms()
        return flow

    def averaged_flow(self, state: TrainState) -> Flow:
        """Returns the flow with the averaged parameters; its power iterations are run to convergence.

        Before the first update that is not skipped there is no average: the flow then has the parameters themselves.
        """
        averages = averaged_params(state.ema, self.ema_decay, state.params)
        is_begun = state.ema.count > 0
        params = jax.tree.map(lambda average, param: jnp.where(is_begun, average, param), averages, state.params)
        return self.current_flow(state._replace(params=params))


def averaged_params(ema: optax.EmaState, ema_decay: float, like: Any) -> Any:
    """The bias-corrected average of parameters, after one update or more, in the dtypes of the tree `like`."""
    with optax_promotion():
        averages = optax.tree.bias_correction(ema.ema, ema_decay, jnp.maximum(ema.count, 1))
    return jax.tree.map(lambda average, param: average.astype(param.dtype), averages, like)


def _copied(tree: Any) -> Any:
    """The tree with arrays of its own."""
    return jax.tree.map(lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def _at_least_float32(params: Any) -> Any:
    """Parameters of fewer bits as float32, for their average: 0.999 is 1 in bfloat16."""
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.astype(wide_dtype(leaf.dtype)) if is_float(leaf) else leaf, params)


def unless_skipped(
    is_finite: Array, after: TrainState, before: TrainState, then: Callable[[TrainState], TrainState]
) -> TrainState:
    """The state then(after), or `before` with the number of steps of `after` if the update is not finite.

    Args:
      is_finite: a Boolean scalar, from `Gradient.is_finite`.
      after: the state after the update.
      before: the state before it, with the same shapes.
      then: the rest of the step. It runs only if the update is finite, or under `jax.vmap`. XLA can then write the new
        vectors over the old ones.
    """
    structure = jax.tree.structure(after)

    def finished(new, old):
        return jax.tree.leaves(then(jax.tree.unflatten(structure, new)))

    # The compiler fuses no `cond` with the update, so that the update rounds as it would without the choice.
    chosen = jax.lax.cond(is_finite, finished, lambda new, old: old, jax.tree.leaves(after), jax.tree.leaves(before))
    return jax.tree.unflatten(structure, chosen)._replace(step=after.step)


def _mean_over_batches(
    function: Callable[[Any, Any, Array], tuple[Any, Any]], carry: Any, batches: Any, steps: Array
) -> tuple[Any, Any]:
    """Means of the values of function(carry, batch, step) -> (values, carry) over batches [N, ...]; the last carry.

    The last batch is not part of the scan. Sums over devices may so begin within its backward pass.
    """
    first = jax.tree.map(lambda leaf: leaf[:-1], batches)
    last = jax.tree.map(lambda leaf: leaf[-1], batches)

    def add(totals_and_carry, batch_and_step):
        totals, carry = totals_and_carry
        values, carry = function(carry, *batch_and_step)
        return (jax.tree.map(jnp.add, totals, values), carry), None

    types = jax.eval_shape(function, carry, last, steps[-1])[0]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), types)
    zeros = vary_over(zeros, varying_axes(batches))
    (totals, carry), _ = jax.lax.scan(add, (zeros, carry), (first, steps[:-1]))
    values, carry = function(carry, last, steps[-1])
    return jax.tree.map(lambda a, b: (a + b) / len(steps), totals, values), carry


def fit_estimator(state: TrainState, batch_size: int) -> TrainState:
    """Fits the distribution of each block's series length to the term norms of about the last hundred updates.

    Call it between epochs. The gradient of the next steps stays unbiased, since the distribution does not depend on
    them. Before the first step there are no term norms, and the distribution is that of `Roulette()`. The fit minimises
    the variance of the estimate times its expected cost; see `fit_lengths`.

    Args:
      state: a training state with a `Roulette` estimator.
      batch_size: number of examples that share one series length.

    Returns:
      The state with the `Fitted` distribution in its estimator; all other arrays are the same.

    Raises:
      ValueError: unless the estimator is a `Roulette` of less than 16 exact terms, and for a flow without residual
        blocks.

    Example:
      >>> import optax
      >>> from resflow_jax.training.losses import negative_log_likelihood
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(4,)), rngs=nnx.Rngs(0))
      >>> trainer = rf.training.Trainer(nnx.graphdef(flow), negative_log_likelihood(), optax.sgd(0.1), ema_decay=0.9)
      >>> state = rf.training.fit_estimator(trainer.create_state(flow, rf.Roulette()), batch_size=64)
      >>> type(state.estimator.length).__name__
      'Fitted'
    """
    check_type("state", state, TrainState)
    check_count("batch_size", batch_size, 1)
    estimator, (count, norms) = state.estimator, state.term_norms
    if not isinstance(estimator, Roulette) or estimator.exact_terms >= DIAGNOSED_TERMS:
        raise ValueError(f"estimator: expected Roulette, less than {DIAGNOSED_TERMS} exact_terms, got {estimator}")
    if not jax.tree.leaves(norms):
        raise ValueError("state: expected the state of a flow with residual blocks, got a flow without any")
    with optax_promotion():
        seen = optax.tree.bias_correction(norms, _DECAY, jnp.maximum(count, 1))
    law = fit_law(estimator, seen, batch_size)
    start = Roulette().length.survival(jnp.arange(1, law.table.shape[-1] + 1))
    return state._replace(estimator=replace(estimator, length=Fitted(jnp.where(count > 0, law.table, start))))
