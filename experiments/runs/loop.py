"""The loop around a training step: progress bar, averaged metrics, timing, and a stop where it diverges."""

import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.runs.processes import is_first
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import TrainState


class Progress(NamedTuple):
    """What the loop reports at a pause.

    Attributes:
      step: steps done.
      state: the training state after that step, as of `Placement.on_mesh`.
      metrics: means over the steps since the last pause, with the structure of a step's.
      seconds: per step since the last pause.
      waiting: of these, spent waiting for data.
      stopped: whether the loop ends here because it was asked to.
      bar: the progress bar, to write on.
    """

    step: int
    state: TrainState
    metrics: dict[str, Any]
    seconds: float
    waiting: float
    stopped: bool
    bar: tqdm


def falls_due(step: int, every: int, together: int) -> bool:
    """Whether one of the last `together` of so many steps is a multiple of `every`."""
    return step // every > (step - together) // every


def training_loop(
    placement: Placement,
    state: TrainState,
    key: jax.Array,
    batches_from: Callable[[int], Iterator[np.ndarray]],
    *,
    steps: int,
    pauses_at: Callable[[int], bool],
    unit: str,
    at_pause: Callable[[int, TrainState], TrainState] = lambda step, state: state,
    stops_at: Callable[[int], bool] = lambda step: False,
) -> Iterator[Progress]:
    """Steps from state.step to `steps`; yields at every pause and at the end, which is where `stops_at` first says so.

    The state is a whole one, or lies as of `Placement.on_mesh`. batches_from(n) iterates over what this process reads
    of the batches of step n and the following, the first step being number 0. Where several batches make an update
    their steps are taken at once. What changes the state between steps is `at_pause`, called with the number of steps
    done and the state before each yield; it returns that state or another, as of `Placement.on_mesh` too. `stops_at`
    is called once an update.

    Raises:
      FloatingPointError: at a pause, if a metric is not finite; no later state is yielded.
    """
    together = placement.trainer.accumulate
    first, pending, waiting = int(state.step), [], 0.0
    batches = batches_from(first)
    placed = placement.place(state)
    with tqdm(
        total=steps,
        initial=first,
        unit="step",
        mininterval=1 if sys.stderr.isatty() else 20,
        disable=not is_first(),
    ) as bar:
        began = time.perf_counter()
        for step in range(first + together, steps + 1, together):
            asked = time.perf_counter()
            batch = next(batches) if together == 1 else np.stack(list(islice(batches, together)))
            waiting += time.perf_counter() - asked
            placed, values = placement.step(placed, placement.place_batch(batch), key)
            pending.append(values)
            bar.update(together)
            stopped = stops_at(step)
            if not (step == steps or stopped or pauses_at(step)):
                continue
            metrics = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *jax.device_get(pending))
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(metrics)):
                raise FloatingPointError(
                    f"training diverged between steps {step - together * len(pending) + 1} and {step}: loss "
                    f"{metrics['loss']}, gradient norm {metrics['gradient_norm']}. What was saved before is intact; a "
                    "smaller learning rate may help."
                )
            bar.set_postfix_str(f"{metrics['loss']:.3f} {unit}")
            before = placement.on_mesh(placed)
            state = at_pause(step, before)
            taken = together * len(pending)
            seconds = (time.perf_counter() - began) / taken
            yield Progress(step, state, metrics, seconds, waiting / taken, stopped, bar)
            if step == steps or stopped:
                return
            if state is not before:
                placed = placement.place(state)
            pending, waiting, began = [], 0.0, time.perf_counter()
