"""One run of any task: set-up, training with validation and checkpoints, and the closing report.

A `Task` defines what is learned, and how it is judged and drawn.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax

from experiments.configs.base import RunConfig
from experiments.runs.closing import StepTime, report
from experiments.runs.devices import use_compilation_cache
from experiments.runs.fingerprint import fingerprint
from experiments.runs.judging import judged, sketch, validation_loss
from experiments.runs.lock import locked
from experiments.runs.loop import training_loop
from experiments.runs.metrics import Metrics, NullMetrics
from experiments.runs.processes import by_first, from_first, is_first, wait_for_all
from experiments.runs.recovery import Recovery, check_certificate, check_state
from experiments.runs.rehearsal import compile_programs
from experiments.runs.schedule import Schedule, is_patience_spent
from experiments.runs.setup import place_on_devices, set_up
from experiments.runs.signals import stop_on_signal
from experiments.runs.tasks.task import Task
from experiments.runs.workdir import check_still_there, claim_workdir
from resflow_jax import Estimate
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.loop import Pause
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import TrainState, fit_estimator


def run(config: RunConfig, task: Task) -> Estimate:
    """Trains or resumes, evaluates and draws. Returns the metric of the test split.

    A first SIGINT or SIGTERM ends the run after the current step, with a checkpoint and exit status 0.

    Raises:
      FloatingPointError: if the run gives up, since too much was not finite; see `runs.recovery`. If there is a
        validated checkpoint, the report on it is written first.
      BlockingIOError: if another run holds the work directory.
      OSError: if the work directory cannot be written; earlier files stay intact.
      ValueError, FileExistsError: as `claim_workdir`.
    """
    began = time.perf_counter()
    use_compilation_cache()
    _check_splits_and_steps(config, task)
    trainer, start = set_up(task)  # before anything is written
    start = from_first(start)
    placement = place_on_devices(trainer, config)
    with ExitStack() as stack:
        by_first(lambda: stack.enter_context(locked(config.workdir)))
        by_first(lambda: claim_workdir(config.workdir, config, fingerprint(task)))
        shapes, shardings = jax.eval_shape(lambda state: state, start), placement.shardings(start)
        checkpoints = stack.enter_context(Checkpoints(config.workdir / "checkpoints"))
        restored = partial(checkpoints.restore_intact, like=shapes, shardings=shardings, ema_decay=trainer.ema_decay)
        state = _first_state(placement, start)
        del start  # it occupied the memory of one device
        if checkpoints.latest_step is not None:
            state = restored()
            checkpoints.set_aside_after(int(state.step))
            say(f"resuming {config.workdir} at step {int(state.step)}")
        metrics = stack.enter_context(
            (Metrics if is_first() else NullMetrics)(config.workdir, keep_until=int(state.step))
        )
        recovery = Recovery(
            task, checkpoints, metrics, restored, lambda: _first_state(placement, from_first(set_up(task)[1]))
        )
        try:
            step, step_time = train(task, placement, state, checkpoints, metrics, recovery)
        except FloatingPointError as error:
            if checkpoints.best_step is not None:
                best = restored(weights="best")
                report(task, judged(placement, best), int(best.step), metrics, None, began, ended=str(error))
            raise
        checkpoints.wait()
        if step < config.steps and not is_patience_spent(task, metrics.lines):
            say(f"stopped at step {step} of {config.steps}; the same command goes on from there")
            sys.exit(0)
        if step == config.steps and checkpoints.validation_loss(step) is None:
            raise ValueError(f"steps: expected more than {step}, where the run was stopped unvalidated, got {step}")
        best = restored(weights="best")
        result = report(task, judged(placement, best), int(best.step), metrics, step_time, began)
    wait_for_all("report")
    return result


def _first_state(placement: Placement, start: TrainState) -> TrainState:
    """The state before the first step, which is donated it: for pmap in the host form, else on the devices."""
    return start if placement.strategy == "pmap" else placement.place(start)


def _check_splits_and_steps(config: RunConfig, task: Task) -> None:
    """Raises ValueError for splits that are too small, and for fewer steps than the run has taken."""
    if len(task.splits.test) < 2 or not len(task.splits.validation):
        raise ValueError(f"data: expected two or more examples to test on, got {len(task.splits.test)} in {task.name}")
    saved = (config.workdir / "checkpoints").glob("*")
    taken = max((int(path.name) for path in saved if path.name.isdigit()), default=0)
    if taken > config.steps:
        raise ValueError(f"steps: expected at least {taken}, as many as taken, got {config.steps}")


def say(line: str) -> None:
    """Prints a line in the first process only."""
    if is_first():
        print(line, flush=True)


def train(
    task: Task,
    placement: Placement,
    state: TrainState,
    checkpoints: Checkpoints,
    metrics: Metrics | NullMetrics,
    recovery: Recovery,
) -> tuple[int, StepTime | None]:
    """Runs the remaining steps; validates, saves and draws at the scheduled steps; rolls back where it must.

    Returns:
      The number of steps done, which is below that of the config if the run was stopped by a signal or its patience;
      and the time per step, None if no step was taken.
    """
    times: list[tuple[float, float]] = []
    if is_patience_spent(task, metrics.lines):
        return int(state.step), None
    with stop_on_signal() as stops_at:
        if int(state.step) < task.config.steps:
            compile_programs(task, placement, state, recovery.key)
        while True:
            try:
                step = _train_from(task, placement, state, checkpoints, metrics, recovery, times, stops_at)
            except FloatingPointError as error:
                del state
                state = recovery.roll_back(error)
                say(f"{error} Going back to step {int(state.step)} with a new key, for the {recovery.number}. time")
                continue
            return step, StepTime.of(times)


def _train_from(
    task: Task,
    placement: Placement,
    state: TrainState,
    checkpoints: Checkpoints,
    metrics: Metrics | NullMetrics,
    recovery: Recovery,
    times: list[tuple[float, float]],
    stops_at: Callable[[int], bool],
) -> int:
    """`train` without rollbacks. Returns the number of steps done; adds the time per step at each pause to `times`."""
    config, step = task.config, int(state.step)
    schedule = Schedule(config)
    for pause in training_loop(
        placement,
        state,
        recovery.key,
        lambda step: task.batches(step, placement.part, placement.parts),
        steps=config.steps,
        pauses_at=schedule.pauses_at,
        unit=task.unit if task.sign == 1 else f"{task.unit} (-{task.trained})",
        at_pause=lambda step, state: (
            _with_fitted_lengths(placement, config, state) if schedule.validates_at(step) else state
        ),
        stops_at=stops_at,
        skips=config.safety.skips,
    ):
        step = pause.step
        times.append((pause.seconds, pause.waiting))
        recovery.log(pause.skipped)
        if schedule.validates_at(step):
            _validate_and_save(task, placement, pause, checkpoints, metrics)
        else:
            metrics.write(step=step, split="train", **_line(task, pause))
            if (schedule.saves_at(step) and not pause.row) or pause.stopped:
                check_state(pause.state, step)
                checkpoints.save(pause.state)
        if is_patience_spent(task, metrics.lines):
            break
    return step


def _with_fitted_lengths(placement: Placement, config: RunConfig, state: TrainState) -> TrainState:
    """The state with length distributions fitted to the measured term norms, if the config asks for it."""
    if not config.fit_lengths:
        return state
    estimator, term_norms = placement.to_host((state.estimator, state.term_norms))  # the fit reads only these
    fitted = fit_estimator(state._replace(estimator=estimator, term_norms=term_norms), config.batch_size)
    return state._replace(estimator=placement.to_checkpoint(placement.place(fitted.estimator)))


def _validate_and_save(
    task: Task, placement: Placement, pause: Pause, checkpoints: Checkpoints, metrics: Metrics | NullMetrics
) -> None:
    """Validates the averaged weights, writes the metrics, draws and saves the state.

    The checkpoint comes last. If the run is interrupted before, resuming drops the line and does everything again; in
    another order, early stopping would never count the validation of the checkpoint, or a picture would be missing.
    """
    by_first(lambda: check_still_there(task.config.workdir))
    check_state(pause.state, pause.step)
    found = judged(placement, pause.state)
    check_certificate(found.certificate, pause.step)
    loss = validation_loss(task, found.flow, pause.step)
    line = {f"validation_{task.metric}": task.sign * loss, "lipschitz": found.certificate.bounds.tolist()}
    if found.flow.learns_orders:
        line["orders"] = found.flow.norm_orders().tolist()
    metrics.write(step=pause.step, split="train", **_line(task, pause), **line)
    if is_first():
        sketch(task, found.drawn, pause.step, metrics)
    checkpoints.save(pause.state, loss, found.certificate)
    pause.bar.set_description(f"validation {loss:.3f}")


def _line(task: Task, pause: Pause) -> dict[str, Any]:
    """The line of metrics.jsonl for the steps since the last pause."""
    optimizer = task.config.optimizer
    updates = (pause.step - 1) // optimizer.accumulate
    return {
        task.trained: task.sign * float(pause.metrics["loss"]),
        "gradient_norm": float(pause.metrics["gradient_norm"]),
        "learning_rate": float(optimizer.learning_rates(task.config.steps)(updates)),
        "diagnostics": {name: value.tolist() for name, value in pause.metrics["diagnostics"]._asdict().items()},
    }
