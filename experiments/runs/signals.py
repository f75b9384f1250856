"""Stops a run on a signal, after it has finished its step and saved."""

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
    """A context that yields a function, which returns True after the first SIGINT or SIGTERM.

    That signal has no other effect; the next one has its usual effect. Signals are handled in the main thread only.

    Call the function after every update with the number of steps done. With several processes, a signal to any of them
    since they met makes the function return True in all of them at the same step. There a second SIGINT has its usual
    effect, a second SIGTERM has none, and all processes must train in their main threads.
    """
    with _agreed_stop() if jax.process_count() > 1 else _own_stop() as stops_at:
        yield stops_at


@contextmanager
def _agreed_stop() -> Iterator[Callable[[int], bool]]:
    """`stop_on_signal` for several processes: JAX handles SIGTERM since they met, and lets them agree on a step."""
    asked_for = 0  # JAX counts from 0, also in a run that resumes at a later step

    def stops_at(step: int) -> bool:
        # The agreed step may be in the middle of an update of several steps. Orbax counts the same steps.
        nonlocal asked_for
        asked_for = asked_for if step > asked_for else 0  # the run has gone back
        steps, asked_for = range(asked_for + 1, step + 1), step
        return any([multihost_utils.reached_preemption_sync_point(n) for n in steps])

    def ask(number: int, frame) -> None:
        signal.signal(signal.SIGINT, before)
        tqdm.write("stopping after a step that all processes agree on; repeat the signal to stop at once")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stops_at
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _own_stop() -> Iterator[Callable[[int], bool]]:
    with deferred_signals(_ASK, "stopping after this step, with a checkpoint; repeat to stop at once") as is_asked:
        yield lambda step: is_asked()
