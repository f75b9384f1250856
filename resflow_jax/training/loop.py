"""The loop around a training step: mean metrics, timing, a progress bar, and a stop where training diverges.

A step skips an update that is not finite. At its pauses the loop reads the metrics and counts the skipped updates; it
ends if there are too many in a row.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from tqdm.auto import tqdm

from resflow_jax.training.parallel import Step
from resflow_jax.training.skips import LIMIT, Skipped, check_row, window


class Pause(NamedTuple):
    """What the loop reports at a pause.

    Attributes:
      step: number of steps done.
      state: the state after that step. The next step donates these arrays: copy what you keep.
      metrics: means over the updates since the last pause that were not skipped, on the host, with the structure of a
        step's metrics; NaN if all were skipped.
      seconds: mean time per step since the last pause.
      waiting: the part of `seconds` that was spent waiting for batches.
      stopped: whether the loop ends here because `stops_at` returned True.
      bar: the progress bar, for additional text.
      skipped: the skipped updates since the last pause.
      row: number of skipped updates in a row directly before the pause.
    """

    step: int
    state: Any
    metrics: dict[str, Any]
    seconds: float
    waiting: float
    stopped: bool
    bar: tqdm
    skipped: tuple[Skipped, ...] = ()
    row: int = 0


def run_steps(
    step: Step,
    state: Any,
    batches: Iterator[Any],
    key: jax.Array,
    *,
    first: int = 0,
    last: int,
    together: int = 1,
    pauses_at: Callable[[int], bool],
    stops_at: Callable[[int], bool] = lambda step: False,
    at_pause: Callable[[int, Any], Any] = lambda step, state: state,
    show_progress: bool = True,
    skips: int = LIMIT,
) -> Iterator[Pause]:
    """Runs the steps first + 1 ... last; yields at every pause and at the end. Between pauses it waits for no result.

    Args:
      step: (state, batch, key) -> (state, metrics), as `Trainer.compiled_step` or `Placement.step`.
      state: state before the first step, in the layout of the step.
      batches: the batches of the steps, in the layout of the step.
      key: PRNG key of the run, the same for all steps.
      first: number of steps done before.
      last: number of steps done at the end; `last - first` is a multiple of `together`.
      together: number of steps that one call of `step` takes: their batches make one update.
      pauses_at: (steps done) -> whether to pause.
      stops_at: (steps done) -> whether the loop ends; called once per update.
      at_pause: (steps done, state) -> the state that training continues with; called before each yield.
      show_progress: whether to draw a progress bar, on stderr or in the notebook.
      skips: number of skipped updates in a row at which the loop ends.

    Raises:
      ValueError: before the first step, if the number of steps is not a multiple of `together`.
      TooManySkipsError: a FloatingPointError; at a pause, if `skips` updates in a row were skipped, or at the end, if
        all updates since the last pause were skipped. No later state is yielded.
    """
    if (last - first) % together:
        raise ValueError(f"last: expected {first} and a multiple of {together}, the steps of an update, got {last}")
    pending, waiting, row = [], 0.0, ()
    with tqdm(
        total=last, initial=first, unit="step", mininterval=_seconds_between_draws(), disable=not show_progress
    ) as bar:
        began = time.perf_counter()
        for done in range(first + together, last + 1, together):
            asked = time.perf_counter()
            batch = next(batches)
            waiting += time.perf_counter() - asked
            state, values = step(state, batch, key)
            pending.append(values)
            bar.update(together)
            stopped = stops_at(done)
            if not (done == last or stopped or pauses_at(done)):
                continue
            taken = together * len(pending)
            seen = window(jax.device_get(pending), range(done - taken + together, done + 1, together), row)
            row = seen.row
            check_row(seen, skips, together, is_last=done == last)
            state = at_pause(done, state)
            seconds = (time.perf_counter() - began) / taken
            yield Pause(done, state, seen.means, seconds, waiting / taken, stopped, bar, seen.skipped, len(row))
            if stopped:
                return
            pending, waiting, began = [], 0.0, time.perf_counter()


def _seconds_between_draws() -> int:
    """Seconds between updates of the progress bar: few in a terminal or notebook, many where it fills a log file."""
    return 1 if sys.stderr.isatty() or "ipykernel" in sys.modules else 20


def has_stopped_improving(losses: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` of the validation losses have not improved on those before; never for None."""
    return patience is not None and len(losses) > patience and min(losses[:-patience]) <= min(losses[-patience:])
