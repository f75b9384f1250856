"""`fit`: maximum likelihood for a flow and given examples, with validation and early stopping, in one call."""

import math
import signal
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from resflow_jax.data.images import dequantize
from resflow_jax.functional.checks import (
    as_key,
    check_callable,
    check_count,
    check_finite,
    check_open_interval,
    check_positive,
    check_type,
)
from resflow_jax.functional.estimators import Estimator, Roulette, check_estimator
from resflow_jax.layers.actnorm import ActNorm
from resflow_jax.models.flow import Flow
from resflow_jax.training.course import Course, FitDivergedError, FitProgress, FitResult, Scorer
from resflow_jax.training.examples import Examples, batches_on_device, split_validation
from resflow_jax.training.interrupts import deferred_signals
from resflow_jax.training.loop import Pause, has_stopped_improving, run_steps
from resflow_jax.training.losses import dequantized_bits_per_dim, negative_log_likelihood
from resflow_jax.training.parallel import DATA_AXIS, check_divisible, check_mesh
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import Trainer, TrainState

Array = jax.Array

_STEPS, _BATCH_SIZE, _LEARNING_RATE, _WARMUP = 3000, 256, 5e-3, 100
_INITIAL = 10000  # examples that set ActNorm


def fit(
    flow: Flow,
    x: Any,
    *,
    condition: Any = None,
    key: Array | int = 0,
    validation: Any = 0.1,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float | optax.Schedule | None = None,
    optimizer: optax.GradientTransformation | None = None,
    estimator: Estimator | None = None,
    evaluation_estimator: Estimator | None = None,
    ema: float | None = None,
    patience: int | None = 20,
    validate_every: int | None = None,
    initialize: bool | None = None,
    levels: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
    callback: Callable[[FitProgress], Any] | None = None,
) -> FitResult:
    """Fits a flow to examples x by maximum likelihood, E[-log p(x | c)] in nats, and returns the best weights found.

    The given flow does not change: training works on a copy. A step is that of `training.Trainer`: a gradient of the
    estimated log-likelihood, an update by the optimiser, an advance of every power iteration. The weights with the
    lowest validation loss are returned; every validation uses the same noise. Their norms have converged. At the end
    `Flow.tighten` rescales the kernels that exceed their certified bound, so that `certify(flow).is_certified` holds
    unless the flow contains contractions whose constant the user states. This changes kernels by less than about a
    percent.

    An update whose loss or gradient is not finite is skipped: weights, optimiser, averages and power iterations stay as
    they are. Ten skipped updates in a row end training.

    All examples lie on the device. Ctrl-C ends training after the current step, and `fit` returns what it has; a second
    Ctrl-C interrupts as usual.

    Cost of a step: `Flow.log_prob` and its gradient on a batch, by default with 4.3 to 4.5 vjps of g in each block
    on average. The first step compiles it; a validation costs `Flow.log_prob` of the validation examples.

    Args:
      flow: a `Flow`, such as a `ResidualFlow`.
      x: floats [N, *event_shape] of NumPy or JAX, images in [0, 1]; with `levels` integer images [N, H, W, C]. A
        warning names an element of float64 x whose differences float32 cannot represent, for example because it is far
        from zero.
      condition: for a conditional flow, floats [N, *condition_shape], one for each example.
      key: PRNG key, or an integer seed, for everything random: the validation split, the order of the batches, noise
        and estimates. The same key gives the same result.
      validation: what to validate on: the fraction, in (0, 1), of the examples, drawn at random; or examples like x;
        or, for a conditional flow, a pair (x, condition). With None there is no validation, and the last weights are
        returned.
      steps: maximum number of optimiser steps. By default 3000.
      epochs: maximum number of passes over the training examples, instead of `steps`.
      batch_size: examples per step; by default 256, or all if there are fewer.
      learning_rate: peak learning rate of Adam, after a linear warm-up of at most 100 steps and before a cosine decay
        to zero over all steps; by default 0.005. Or an optax schedule. The gradient is clipped to a global norm of 1.
      optimizer: an optax transformation, instead of Adam, its learning rate and the clipping.
      estimator: estimator of the log-det in training; by default `Roulette()`, which is unbiased.
      evaluation_estimator: estimator of the log-det in validation; by default `Exact()` for at most 32 dimensions,
        otherwise `Roulette()`.
      ema: decay in (0, 1) of a moving average of the weights, which is then validated and returned; None for no
        average.
      patience: number of successive validations without an improvement after which training stops; None for no limit.
      validate_every: steps between validation points; the history has one entry for each. By default the steps of an
        epoch, but at least a fiftieth and at most a tenth of all steps.
      initialize: whether to set ActNorm and running statistics from training examples first (`Flow.initialize`). By
        default only if none of them has been set yet: a trained flow continues from its weights.
      levels: number of values that a pixel can have, for integer images in {0..levels-1}: they are dequantised with new
        noise at every step, and the history also has bits/dim.
      mesh: devices of this process that share each batch (`training.make_mesh`); None for one device. The result is
        the same, up to rounding.
      progress: whether to draw a progress bar, on stderr or in the notebook.
      callback: called with a `FitProgress` every `validate_every` steps and at the end. Training stops if it returns
        the bool True; other return values are ignored.

    Returns:
      (flow, history).

    Raises:
      ValueError: for a bad argument; the message names it.
      FitDivergedError: after ten updates in a row whose loss or gradient is not finite; at the end, if this holds for
        all updates since the last validation; or if the validation loss is not finite. `error.result` has the best
        weights up to then.

    Example:
      >>> import jax, numpy as np, resflow_jax as rf
      >>> from flax import nnx
      >>> x = np.random.default_rng(0).normal(size=(500, 2)) * [1.0, 0.1]
      >>> flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(8,)), rngs=nnx.Rngs(0))
      >>> fitted, history = rf.fit(flow, x, steps=20, progress=False)
      >>> history.ended, len(history.step), bool(history.validation.min() < 1)
      ('steps', 20, True)
      >>> fitted.log_prob(x[:3], key=jax.random.key(1)).shape
      (3,)
    """
    check_type("flow", flow, Flow)
    if levels is not None:
        check_count("levels", levels, 1)
    split_key, init_key, train_key, validation_key = jax.random.split(as_key("key", key), 4)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(split_key)))
    examples = Examples.of(flow, x, condition, levels)
    training, held_out = split_validation(flow, examples, validation, levels, rng)
    if training.number < 2:
        raise ValueError(f"x: expected at least 2 examples to train on, got {training.number}")
    batch_size = _batch_size(batch_size, training.number, mesh)
    steps = _steps(steps, epochs, training.number / batch_size)
    every = _every(validate_every, steps, training.number / batch_size)
    optimizer = _optimizer(optimizer, learning_rate, steps)
    _check_others(ema, patience, initialize, progress, callback)

    estimator = Roulette() if estimator is None else estimator
    check_estimator(estimator)
    score = Scorer(flow, held_out, levels, validation_key, evaluation_estimator, batch_size, mesh)

    flow = nnx.clone(flow)  # the caller's does not change
    if initialize or (initialize is None and not _is_initialized(flow)):
        first = training.take(rng.permutation(training.number)[:_INITIAL])
        flow.initialize(first.x if levels is None else dequantize(first.x, init_key, levels), first.condition)
    loss = negative_log_likelihood() if levels is None else dequantized_bits_per_dim(levels)
    trainer = Trainer(nnx.graphdef(flow), loss, optimizer, 0.0 if ema is None else ema)
    state = trainer.create_state(flow, estimator)
    devices = trainer if mesh is None else Placement(trainer, mesh)
    course = Course(flow, score)

    with deferred_signals((signal.SIGINT,), "stopping after this step; once more to stop at once") as is_interrupted:
        for at, seen in _progress(
            run_steps(
                trainer.compiled_step() if mesh is None else devices.step,
                state if mesh is None else devices.place(state),
                batches_on_device(training, batch_size, rng, mesh),
                train_key,
                last=steps,
                pauses_at=lambda step: step % every == 0,
                stops_at=lambda step: is_interrupted(),
                show_progress=progress,
            ),
            devices.current_flow if ema is None else devices.averaged_flow,
            course,
            steps,
        ):
            at.bar.set_postfix_str(str(seen))
            if at.stopped:
                return course.result("interrupted")
            answer = None if callback is None else callback(seen)
            if isinstance(answer, bool | np.bool_) and answer:
                return course.result("callback")
            if at.step < steps and has_stopped_improving(course.losses, patience):
                return course.result("patience")
    return course.result("steps")


def _progress(
    pauses: Iterator[Pause], weights_of: Callable[[TrainState], Flow], course: Course, steps: int
) -> Iterator[tuple[Pause, FitProgress]]:
    """Yields each pause with its `FitProgress`, which is added to the course. Errors of the caller pass unchanged.

    Raises:
      FitDivergedError: if a loss is not finite, or too many updates were skipped.
    """
    try:
        for at in pauses:
            if at.row and not at.stopped and at.step < steps:
                continue  # the last update was skipped: the weights before it may be bad
            yield at, course.add(at.step, float(at.metrics["loss"]), weights_of(at.state))
    except FloatingPointError as error:
        kept = f"the weights of step {course.best_step}" if course.best_step else "the weights before training"
        raise FitDivergedError(f"{error} error.result has {kept}.", course.result("diverged")) from error


def _batch_size(batch_size: int | None, number: int, mesh: Mesh | None) -> int:
    """Examples per step, at most `number`; a multiple of the devices of a mesh that share them."""
    shares = 1
    if mesh is not None:
        check_mesh(mesh)
        if any(one.process_index != jax.process_index() for one in mesh.devices.flat):
            raise ValueError(f'mesh: expected devices of this process along "{DATA_AXIS}", got {mesh}')
        shares = mesh.shape[DATA_AXIS]
    if batch_size is None:
        batch_size = min(_BATCH_SIZE, number) // shares * shares
    check_count("batch_size", batch_size, 1)
    if batch_size > number:
        raise ValueError(f"batch_size: expected at most {number}, the number of training examples, got {batch_size}")
    if mesh is not None:
        check_divisible(batch_size, mesh)
    return batch_size


def _steps(steps: int | None, epochs: float | None, epoch: float) -> int:
    """The total number of steps; epoch: steps of one epoch."""
    if steps is not None and epochs is not None:
        raise ValueError(f"epochs: expected None together with steps={steps!r}, got {epochs!r}")
    if epochs is not None:
        check_finite("epochs", epochs)
        check_positive("epochs", epochs)
        return math.ceil(epochs * epoch)
    check_count("steps", steps := _STEPS if steps is None else steps, 1)
    return steps


def _every(validate_every: int | None, steps: int, epoch: float) -> int:
    """Steps between validation points; epoch: steps of one epoch."""
    if validate_every is None:
        return min(max(int(epoch), -(-steps // 50)), -(-steps // 10))
    check_count("validate_every", validate_every, 1)
    return validate_every


def _optimizer(optimizer: Any, learning_rate: Any, steps: int) -> optax.GradientTransformation:
    """The given one, or Adam with warm-up, cosine decay and clipping."""
    if optimizer is not None:
        if learning_rate is not None:
            raise ValueError(f"learning_rate: expected None together with an optimizer, got {learning_rate!r}")
        check_type("optimizer", optimizer, optax.GradientTransformation)
        return optimizer
    if learning_rate is None or isinstance(learning_rate, Real):
        peak = _LEARNING_RATE if learning_rate is None else learning_rate
        check_positive("learning_rate", peak)
        check_finite("learning_rate", peak)
        peak = float(peak)
        learning_rate = optax.warmup_cosine_decay_schedule(0.0, peak, min(_WARMUP, steps // 10), steps)
    elif not callable(learning_rate):
        raise ValueError(f"learning_rate: expected a number or an optax schedule, got {type(learning_rate).__name__}")
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))


def _check_others(ema: Any, patience: Any, initialize: Any, progress: Any, callback: Any) -> None:
    if ema is not None:
        check_open_interval("ema", ema, 0, 1)
    if patience is not None:
        check_count("patience", patience, 1)
    if initialize is not None:
        check_type("initialize", initialize, bool)
    check_type("progress", progress, bool)
    if callback is not None:
        check_callable("callback", callback)


def _is_initialized(flow: Flow) -> bool:
    """Whether an ActNorm or a running statistic differs from its first value."""
    for _, node in nnx.iter_modules(flow):
        if isinstance(node, ActNorm):
            zeros = node.center, node.log_scale, node.shift
            if any(np.any(part) for part in zeros) or np.any(np.asarray(node.std) != 1):
                return True
    statistics = map(np.asarray, jax.tree.leaves(nnx.state(flow, nnx.BatchStat)))
    return not all(((values == 0) | (values == 1)).all() for values in statistics)
