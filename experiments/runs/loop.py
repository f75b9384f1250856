"""The loop of a run: that of the library, `training.loop`, with a placement's step and batches read on the way."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import jax
import numpy as np

from experiments.runs.processes import is_first
from resflow_jax.training.loop import Pause, run_steps
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import TrainState


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
) -> Iterator[Pause]:
    """Steps from state.step to `steps`; yields at every pause and at the end, which is where `stops_at` first says so.

    The state has the host or the checkpoint form. batches_from(n) iterates over what this process reads
    of the batches of step n and the following, the first step being number 0. Where several batches make an update
    their steps are taken at once. What changes the state between steps is `at_pause`, called with the number of steps
    done and the state before each yield; it returns that state or another, in the checkpoint form too. `stops_at`
    is called once an update.

    Raises:
      FloatingPointError: at a pause, if a metric is not finite; no later state is yielded.
    """
    together, first, placed = placement.trainer.accumulate, int(state.step), placement.place(state)
    del state

    def batches() -> Iterator[Any]:
        rows = batches_from(first)
        while True:
            yield placement.place_batch(next(rows) if together == 1 else np.stack(list(islice(rows, together))))

    def next_state(step: int, placed: TrainState) -> TrainState:
        before = placement.to_checkpoint(placed)
        after = at_pause(step, before)
        return placed if after is before else placement.place(after)

    for at in run_steps(
        placement.step,
        placed,
        batches(),
        key,
        first=first,
        last=steps,
        together=together,
        pauses_at=pauses_at,
        stops_at=stops_at,
        at_pause=next_state,
        show_progress=is_first(),
    ):
        at.bar.set_postfix_str(f"{at.metrics['loss']:.3f} {unit}")
        yield at._replace(state=placement.to_checkpoint(at.state))
