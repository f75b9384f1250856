"""The loop around a training step: progress bar, averaged metrics, timing, and a stop where it diverges."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from resflow_jax.training.step import Trainer, TrainState


class Progress(NamedTuple):
    """What the loop reports at a pause.

    Attributes:
      step: steps done.
      state: the training state after that step.
      metrics: means over the steps since the last pause, with the structure of a step's.
      seconds: per step since the last pause.
      waiting: of these, spent waiting for data.
      bar: the progress bar, to write on.
    """

    step: int
    state: TrainState
    metrics: dict[str, Any]
    seconds: float
    waiting: float
    bar: tqdm


def training_loop(
    trainer: Trainer,
    state: TrainState,
    key: jax.Array,
    batches_from: Callable[[int], Iterator[Any]],
    *,
    steps: int,
    pauses_at: Callable[[int], bool],
    unit: str,
    at_pause: Callable[[int, TrainState], TrainState] = lambda step, state: state,
    stops: Callable[[], bool] = lambda: False,
    mesh: Mesh | None = None,
) -> Iterator[Progress]:
    """Steps from state.step to `steps`; yields at every pause and at the end, which is where `stops` says so first.

    batches_from(n) iterates over the batches of step n and the following, the first step being number 0. With a mesh
    each batch is shared by its devices (see `Trainer.parallel_step`); what is yielded is on one of them.
    What changes the state between steps is `at_pause`, called with the number of steps done before each yield.

    Raises:
      FloatingPointError: at a pause, if a metric is not finite; no later state is yielded.
    """
    step_function = trainer.compiled_step() if mesh is None else trainer.parallel_step(mesh)
    one = jax.devices()[0]
    everywhere = one if mesh is None else NamedSharding(mesh, PartitionSpec())
    first, pending, waiting = int(state.step), [], 0.0
    batches = batches_from(first)
    state = jax.device_put(state, everywhere)
    with tqdm(total=steps, initial=first, unit="step", mininterval=1 if sys.stderr.isatty() else 20) as bar:
        began = time.perf_counter()
        for step in range(first + 1, steps + 1):
            asked = time.perf_counter()
            batch = next(batches)
            waiting += time.perf_counter() - asked
            state, values = step_function(state, batch, key)
            pending.append(values)
            bar.update()
            is_last = step == steps or stops()
            if not pauses_at(step) and not is_last:
                continue
            metrics = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *jax.device_get(pending))
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics)):
                raise FloatingPointError(
                    f"training diverged between steps {step - len(pending) + 1} and {step}: loss {metrics['loss']}, "
                    f"gradient norm {metrics['gradient_norm']}. What was saved before is intact; a smaller learning "
                    "rate may help."
                )
            bar.set_postfix_str(f"{metrics['loss']:.3f} {unit}")
            state = at_pause(step, jax.device_put(state, one))
            seconds = (time.perf_counter() - began) / len(pending)
            yield Progress(step, state, metrics, seconds, waiting / len(pending), bar)
            if is_last:
                return
            state = jax.device_put(state, everywhere)
            pending, waiting, began = [], 0.0, time.perf_counter()
