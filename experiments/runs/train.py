"""One run, whatever it learns: set-up, training with validation and checkpoints, and the closing report.

What is learned, and how it is judged and drawn, is a `Task`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments.configs.base import RunConfig
from experiments.runs import pictures
from experiments.runs.devices import use_compilation_cache
from experiments.runs.loop import falls_due, training_loop
from experiments.runs.metrics import Followed, Metrics
from experiments.runs.processes import by_first, from_first, is_first, wait_for_all
from experiments.runs.report import write_report
from experiments.runs.signals import stop_on_signal
from experiments.runs.tables import certificate_rows, error_by_cause, print_table
from experiments.runs.tasks.task import Task
from experiments.runs.workdir import claim_workdir, write_atomically
from resflow_jax import Certificate, Estimate, ResidualFlow, certify
from resflow_jax.io.config_json import as_json
from resflow_jax.models.residual_flow import flow_from_config
from resflow_jax.training.checkpoints import Checkpoints
from resflow_jax.training.parallel import make_mesh
from resflow_jax.training.placement import Placement, mesh_of, on_host, tightened
from resflow_jax.training.step import Trainer, TrainState, fit_estimator

Array = jax.Array


class Judged(NamedTuple):
    """The flow that a run is judged by: with the averaged weights, tightened.

    Attributes:
      flow: to evaluate, by all processes together; its arrays lie as of `Placement.averaged_flow`.
      drawn: the same, to draw by the first process alone.
      certificate: of it.
    """

    flow: ResidualFlow
    drawn: ResidualFlow
    certificate: Certificate


class StepTime(NamedTuple):
    """Median seconds of a training step, and those of them that it waits for data."""

    seconds: float
    waiting: float


def run(config: RunConfig, task: Task) -> Estimate:
    """Trains (or goes on training), evaluates, draws. Returns the metric of the test split.

    A first SIGINT or SIGTERM ends it behind the step that is running, with a checkpoint and exit status 0.

    Raises:
      FloatingPointError: if the loss, the gradient or the validation stops being finite.
      OSError: if the work directory cannot be written; what was saved before is whole.
      ValueError, FileExistsError: as `claim_workdir`.
    """
    began = time.perf_counter()
    use_compilation_cache()
    if len(task.splits.test) < 2 or not len(task.splits.validation):
        raise ValueError(f"data: expected two or more examples to test on, got {len(task.splits.test)} in {task.name}")
    directory = config.workdir / "checkpoints"
    taken = max((int(path.name) for path in directory.glob("*") if path.name.isdigit()), default=0)
    if taken > config.steps:
        raise ValueError(f"steps: expected at least {taken}, as many as taken, got {config.steps}")
    trainer, start = set_up(task)  # before anything is written
    start = from_first(start)
    placement = place_on_devices(trainer, config)
    by_first(lambda: claim_workdir(config.workdir, config))
    shapes, lies = jax.eval_shape(lambda state: state, start), placement.shardings(start)
    with Checkpoints(directory) as checkpoints:
        state = start if placement.strategy == "pmap" else placement.place(start)  # that of the first step is donated
        del start  # one device had it whole
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(checkpoints.latest_step, shapes, lies, ema_decay=trainer.ema_decay)
            say(f"resuming {config.workdir} at step {int(state.step)}")
        with (Metrics if is_first() else Followed)(config.workdir, keep_until=int(state.step)) as metrics:
            step, step_time = train(task, placement, state, checkpoints, metrics)
            checkpoints.wait()
            if step < config.steps and not is_patience_spent(task, metrics.lines):
                say(f"stopped at step {step} of {config.steps}; the same command goes on from there")
                sys.exit(0)
            if step == config.steps and f"validation_{task.metric}" not in metrics.lines[-1]:
                raise ValueError(f"steps: expected more than {step}, where the run was stopped unvalidated, got {step}")
            best = checkpoints.restore(checkpoints.best_step, shapes, lies, ema_decay=trainer.ema_decay)
            result = report(task, judged(placement, best), int(best.step), metrics, step_time, began)
    wait_for_all("report")
    return result


def say(line: str) -> None:
    """Prints a line, of several processes once."""
    if is_first():
        print(line, flush=True)


def place_on_devices(trainer: Trainer, config: RunConfig) -> Placement:
    """The step on the devices of all processes.

    Raises:
      ValueError: if the sizes of the mesh do not fit the devices, or these cannot share a batch.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.model)
    placement = Placement(trainer, mesh, config.parallel, config.mesh.parameters)
    placement.check_batch_size(config.batch_size)
    return placement


def set_up(task: Task) -> tuple[Trainer, TrainState]:
    """The flow, initialised on training examples, with its optimiser."""
    config = task.config
    flow = flow_from_config(config.model, rngs=nnx.Rngs(config.seed))
    flow.initialize(task.initial())
    optimizer = config.optimizer.build(config.steps)
    trainer = Trainer(nnx.split(flow)[0], task.loss, optimizer, config.optimizer.ema_decay, config.optimizer.accumulate)
    state = trainer.create_state(flow, config.estimator)
    return trainer, fit_estimator(state, config.batch_size) if config.fit_lengths else state


def train(
    task: Task, placement: Placement, state: TrainState, checkpoints: Checkpoints, metrics: Metrics | Followed
) -> tuple[int, StepTime | None]:
    """Runs the remaining steps; validates, saves and draws along the way.

    Returns:
      The number of steps done, less than those of the config if the run was asked to stop or its patience is spent;
      and what a step took, if any was taken.
    """
    config, steps = task.config, int(state.step)
    step_times, waiting = [], []
    learning_rates = config.optimizer.learning_rates(config.steps)
    if is_patience_spent(task, metrics.lines):
        return steps, None

    def is_due(step: int, every: int | None) -> bool:
        return every is not None and falls_due(step, every, config.optimizer.accumulate)

    def validates_at(step: int) -> bool:
        return is_due(step, config.evaluation.every) or step == config.steps

    def at_pause(step: int, state: TrainState) -> TrainState:
        if not config.fit_lengths or not validates_at(step):
            return state
        estimator, term_norms = placement.local((state.estimator, state.term_norms))  # all that is fitted to
        fitted = fit_estimator(state._replace(estimator=estimator, term_norms=term_norms), config.batch_size)
        return state._replace(estimator=placement.on_mesh(placement.place(fitted.estimator)))

    with stop_on_signal() as stops_at:
        for at in training_loop(
            placement,
            state,
            jax.random.key(config.seed),
            lambda step: task.batches(step, placement.part, placement.parts),
            steps=config.steps,
            pauses_at=lambda step: (
                is_due(step, config.log_every) or validates_at(step) or is_due(step, config.save_every)
            ),
            unit=task.unit if task.sign == 1 else f"{task.unit} (-{task.metric})",
            at_pause=at_pause,
            stops_at=stops_at,
        ):
            steps = at.step
            step_times.append(at.seconds)
            waiting.append(at.waiting)
            line = {
                task.metric: task.sign * float(at.metrics["loss"]),
                "gradient_norm": float(at.metrics["gradient_norm"]),
                "learning_rate": float(learning_rates((steps - 1) // config.optimizer.accumulate)),
                "diagnostics": {name: value.tolist() for name, value in at.metrics["diagnostics"]._asdict().items()},
            }
            # The line first: where the rest is cut off it is dropped, and without it patience would miss a validation.
            if validates_at(steps):
                found = judged(placement, at.state)
                loss = validate(task, found.flow, steps)
                line |= {f"validation_{task.metric}": task.sign * loss, "lipschitz": found.certificate.bounds.tolist()}
                if config.model.norms.learned:
                    line["orders"] = found.flow.norm_orders().tolist()
                metrics.write(step=steps, split="train", **line)
                checkpoints.save(at.state, loss, found.certificate)
                if is_first():
                    sketch(task, found.drawn, steps, metrics)
                at.bar.set_description(f"validation {task.sign * loss:.3f} {task.unit}")
            else:
                metrics.write(step=steps, split="train", **line)
                if is_due(steps, config.save_every) or at.stopped:
                    checkpoints.save(at.state)
            if is_patience_spent(task, metrics.lines):
                break
    return steps, StepTime(float(np.median(step_times)), float(np.median(waiting))) if step_times else None


def validate(task: Task, flow: ResidualFlow, step: int) -> float:
    """The loss of the validation split."""
    estimate = task.estimate(flow, "validation")
    if not np.isfinite(estimate.mean):
        raise FloatingPointError(f"{task.label} of the validation split is {estimate.mean} at step {step}")
    return task.sign * estimate.mean


def sketch(task: Task, flow: ResidualFlow, step: int, metrics: Metrics) -> None:
    """Draws a flow along training."""
    directory = task.config.workdir / "training"
    directory.mkdir(exist_ok=True)
    for name, path in task.sketch(flow, directory / f"{step:07}").items():
        metrics.picture(step, name, path)


def is_patience_spent(task: Task, lines: list[dict[str, Any]]) -> bool:
    """Whether the last validations, as many as the config has patience for, have not improved on those before."""
    patience = task.config.evaluation.patience
    found = [task.sign * line[name] for line in lines if (name := f"validation_{task.metric}") in line]
    return patience is not None and len(found) > patience and min(found[:-patience]) <= min(found[-patience:])


def tightened_flow(trainer: Trainer, state: TrainState) -> ResidualFlow:
    """The flow that a run is judged by, of a state that one device has whole."""
    flow = trainer.averaged_flow(state)
    flow.tighten()
    return flow


def judged(placement: Placement, state: TrainState) -> Judged:
    """The flow that a run is judged by, of a state as of `Placement.on_mesh`; by all processes together.

    Where its arrays are divided among devices they stay so; the host has a copy, of which the certificate is. Only if
    the devices are those of several processes the first draws from the copy, on its CPU.
    """
    flow = tightened(placement.averaged_flow(state))
    if mesh_of(flow) is None:
        return Judged(flow, flow, certify(flow))
    whole = on_host(flow)
    return Judged(flow, flow if jax.process_count() == 1 else whole, certify(whole))


def report(
    task: Task, chosen: Judged, step: int, metrics: Metrics | Followed, step_time: StepTime | None, began: float
) -> Estimate:
    """Evaluates the chosen flow on the test split, draws the pictures, prints the closing table.

    Of several processes all evaluate, the first does the rest.
    """
    config, workdir = task.config, task.config.workdir
    result, certificate = task.estimate(chosen.flow, "test"), chosen.certificate
    if not is_first():
        return result
    write_atomically(workdir / "certificate.json", json.dumps(as_json(certificate.as_dict()), indent=2) + "\n")
    line = {task.metric: result.mean, f"{task.metric}_stderr": result.stderr}
    metrics.write(step=step, split="test", **line, data_stderr=result.data_stderr, noise_stderr=result.noise_stderr)

    drawing = task.draw(chosen.drawn, result)
    curves = workdir / "curves.png"
    pictures.save_curves(curves, metrics.lines, task.metric, task.label, f"{task.name}: {task.label}")
    number = len(task.splits.test[: config.evaluation.examples])
    measured = f"{result.mean:.4f} +- {result.stderr:.4f}"
    rows = {
        f"test {task.label}": f"{measured} ({number} examples, weights of step {step})",
        "of which": error_by_cause(result.data_stderr, result.noise_stderr),
        **drawing.rows,
        **certificate_rows(certificate),
        "time per step": "no step taken: the run was finished before"
        if step_time is None
        else f"{step_time.seconds * 1e3:.0f} ms, batches of {config.batch_size}; "
        f"{step_time.waiting / step_time.seconds:.1%} of it waiting for data",
        "time in all": f"{time.perf_counter() - began:.0f} s, set-up and compilation included",
        "written to": str(workdir),
    }
    figures = {f"{task.label} of training, validation and test": curves, **drawing.pictures}
    title = f"{workdir.name}: test {task.label} {measured}"
    write_report(workdir / "report.html", title, rows, figures, along_training(workdir), certificate, as_json(config))
    print_table(rows)
    print(f"test {task.label} {measured}")
    return result


def along_training(workdir: Path, at_most: int = 6) -> dict[str, Path]:
    """Some of the pictures that were drawn along training, evenly among them, by caption."""
    chosen = {}
    kinds = {path.stem.partition("_")[2] for path in (workdir / "training").glob("*.png")}
    for kind in sorted(kinds, reverse=True):
        paths = sorted((workdir / "training").glob(f"*_{kind}.png"))
        numbers = np.unique(np.linspace(0, len(paths) - 1, at_most).round().astype(int))
        chosen |= {f"{kind} at step {int(paths[n].stem.partition('_')[0])}": paths[n] for n in numbers}
    return chosen
