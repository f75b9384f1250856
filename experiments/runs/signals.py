"""A run that is asked to stop finishes its step and saves."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

from resflow_jax.training.interrupts import deferred_signals

_ASK = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[int], bool]]:
    """Within it a first SIGINT or SIGTERM does nothing but make the function that it gives return True.

    The next of either does what it always does. In a thread that is not the main one, signals are left alone.

    The function is to be called with the number of steps done, behind every update. Of several processes a signal to
    any, also an earlier one since they met, makes it return True in all, at the same step; a second SIGINT does what it
    always does, a second SIGTERM nothing. They train in their main threads.
    """
    with _agreed_stop() if jax.process_count() > 1 else _own_stop() as stops_at:
        yield stops_at


@contextmanager
def _agreed_stop() -> Iterator[Callable[[int], bool]]:
    """Of several processes: JAX has taken over SIGTERM since they met, and lets them agree on a step."""
    asked_for = 0  # JAX counts from there, also in a run that goes on at a later step

    def stops_at(step: int) -> bool:
        # The step that they agree on may be one of several that make an update. Orbax asks by the same numbers.
        nonlocal asked_for
        steps, asked_for = range(asked_for + 1, step + 1), step
        return any([multihost_utils.reached_preemption_sync_point(n) for n in steps])

    def ask(number: int, frame) -> None:
        signal.signal(signal.SIGINT, before)
        tqdm.write("stopping behind a step that all processes agree on; once more to stop at once")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stops_at
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _own_stop() -> Iterator[Callable[[int], bool]]:
    with deferred_signals(_ASK, "stopping behind this step, with a checkpoint; once more to stop at once") as is_asked:
        yield lambda step: is_asked()
