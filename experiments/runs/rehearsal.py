"""Compiles the programs of a run side by side, before its first step.

The training step and the programs of a validation take about as long to compile, each of them on one core. So a thread
compiles the step while the main thread judges the first state, on one batch. Only the main thread runs programs of
several devices: two threads that ran such programs could wait for each other forever.
"""

import contextlib
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from experiments.runs.judging import judge
from experiments.runs.loop import by_update
from experiments.runs.tasks.task import Task
from resflow_jax.functional.primitives.platforms import number_of_cores
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import TrainState

# Warnings about the values of weights, which the first validation gives again. Those of a trace come only once.
_OF_WEIGHTS = (".*did not converge", "power iteration: ")


def compile_programs(task: Task, placement: Placement, state: TrainState, key: jax.Array) -> None:
    """Compiles the training step and what a validation needs, where several cores can do so at a time.

    It does nothing on a GPU: compiling measures kernels there, and other work would disturb that. It does nothing with
    several processes: they would have to agree. What fails here is left to the training that follows, to fail there
    again. JAX's contexts, as `jax.default_matmul_precision`, do not reach the thread: in such a context the step is
    compiled again.

    Args:
      task: task of the run.
      placement: its placement.
      state: the state before the first step to take, in the checkpoint form, or in the host form; it stays valid.
      key: key of the run.
    """
    if number_of_cores() == 1 or jax.process_count() > 1 or jax.default_backend() == "gpu":
        return
    with warnings.catch_warnings(), ThreadPoolExecutor(1) as pool, contextlib.suppress(Exception):
        for message in _OF_WEIGHTS:
            warnings.filterwarnings("ignore", message)
        compiled_step = pool.submit(_compile_step, task, placement, state, key)
        _judge_once(task, placement, state)
        compiled_step.result()


def _compile_step(task: Task, placement: Placement, state: TrainState, key: jax.Array) -> None:
    # No name for the iterator: what reads ahead ends with it.
    rows = next(by_update(task.batches(int(state.step), placement.part, placement.parts), placement.trainer.accumulate))
    placement.step.lower(placement.place(state), placement.place_batch(rows), key).compile()


def _judge_once(task: Task, placement: Placement, state: TrainState) -> None:
    """A validation on as many examples as one batch has; nothing is kept.

    It takes the weights themselves: before the first step there is no average of them.
    """
    found = judge(placement.current_flow(state))
    settings = task.config.evaluation
    few = task.splits.validation[: settings.examples][: task.batch_size]
    task.scores(found.flow, few, jax.random.key(0), settings.estimator, 1, task.batch_size)
    with tempfile.TemporaryDirectory() as directory:
        task.sketch(found.drawn, Path(directory) / "0")
