"""Compiles the programs of a run side by side, before its first step.

The training step and the programs of a validation take about as long to compile, each of them on one core. So a thread
compiles the step while the main thread judges the first state, on one batch. Only the main thread runs programs: two
threads that ran programs of several devices could wait for each other forever.
"""

import contextlib
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from experiments.runs.loop import by_update
from experiments.runs.tasks.task import Task
from resflow_jax import certify
from resflow_jax.functional.primitives.platforms import number_of_cores
from resflow_jax.training.placement import Placement, tightened
from resflow_jax.training.step import TrainState


def compile_programs(task: Task, placement: Placement, state: TrainState, key: jax.Array) -> None:
    """Compiles the training step and what a validation needs, where several cores can do so at a time.

    It does nothing on a GPU, where compiling measures kernels, which other work would disturb, and with several
    processes, which would have to agree. What fails here is left to the training that follows, to fail there again.

    Args:
      task: task of the run.
      placement: its placement.
      state: the state before the first step to take, in the checkpoint form, or in the host form; it stays valid.
      key: key of the run.
    """
    if number_of_cores() == 1 or jax.process_count() > 1 or jax.default_backend() == "gpu":
        return
    with ThreadPoolExecutor(1) as pool, contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are not trained yet
        compiled_step = pool.submit(_compile_step, task, placement, state, key)
        _judge_once(task, placement, state)
        compiled_step.result()


def _compile_step(task: Task, placement: Placement, state: TrainState, key: jax.Array) -> None:
    batches = task.batches(int(state.step), placement.part, placement.parts)
    rows = next(by_update(batches, placement.trainer.accumulate))
    placement.step.lower(placement.place(state), placement.place_batch(rows), key).compile()


def _judge_once(task: Task, placement: Placement, state: TrainState) -> None:
    """A validation of the weights before they are averaged, on as many examples as one batch has; nothing is kept."""
    flow = tightened(placement.current_flow(state))
    certify(flow)
    settings = task.config.evaluation
    few = task.splits.validation[: settings.examples][: task.batch_size]
    task.scores(flow, few, jax.random.key(0), settings.estimator, 1, task.batch_size)
    with tempfile.TemporaryDirectory() as directory:
        task.sketch(flow, Path(directory) / "0")
