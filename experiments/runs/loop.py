"""The loop of a run: the library's `training.loop` with a placement's step and batches."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import jax
import numpy as np

from experiments.runs.processes import is_first
from resflow_jax.training.loop import Pause, run_steps
from resflow_jax.training.placement import Placement
from resflow_jax.training.skips import LIMIT
from resflow_jax.training.step import TrainState


def falls_due(step: int, every: int, together: int) -> bool:
    """Whether a multiple of `every` is among the last `together` steps up to `step`."""
    return step // every > (step - together) // every


def by_update(batches: Iterator[Any], number: int) -> Iterator[Any]:
    """The batches of each update: one batch, or `number` of them along a leading axis of each array."""
    while True:
        yield next(batches) if number == 1 else jax.tree.map(lambda *rows: np.stack(rows), *islice(batches, number))


def training_loop(
    placement: Placement,
    state: TrainState,
    key: jax.Array,
    batches_from: Callable[[int], Iterator[Any]],
    *,
    steps: int,
    pauses_at: Callable[[int], bool],
    unit: str,
    at_pause: Callable[[int, TrainState], TrainState] = lambda step, state: state,
    stops_at: Callable[[int], bool] = lambda step: False,
    skips: int = LIMIT,
) -> Iterator[Pause]:
    """Runs the steps from state.step to `steps`; yields at every pause and at the end.

    The state has the host or the checkpoint form. batches_from(n) iterates over this process's part of the batches of
    steps n, n + 1, ..., counted from 0. If an update takes several batches, their steps are taken together. Before each
    yield `at_pause` is called with the number of steps done and the state in the checkpoint form; it returns this state
    or a changed one, in the same form. `stops_at` is called once per update; the loop ends early when it returns True.

    Raises:
      FloatingPointError: at a pause, if as many updates in a row as `skips` were not finite, as `run_steps`.
    """
    accumulate, first, placed = placement.trainer.accumulate, int(state.step), placement.place(state)
    del state

    def step(state: TrainState, rows: Any, key: jax.Array) -> Any:
        return placement.step(state, placement.place_batch(rows), key)

    def next_state(step: int, placed: TrainState) -> TrainState:
        before = placement.to_checkpoint(placed)
        after = at_pause(step, before)
        return placed if after is before else placement.place(after)

    for at in run_steps(
        step,
        placed,
        by_update(batches_from(first), accumulate),
        key,
        first=first,
        last=steps,
        together=accumulate,
        pauses_at=pauses_at,
        stops_at=stops_at,
        at_pause=next_state,
        show_progress=is_first(),
        skips=skips,
    ):
        at.bar.set_postfix_str(f"{at.metrics['loss']:.3f} {unit}")
        yield at._replace(state=placement.to_checkpoint(at.state))
