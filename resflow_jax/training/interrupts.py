"""Signals that ask a training to stop: it finishes its step, and returns or saves what it has."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def deferred_signals(numbers: Sequence[int], message: str) -> Iterator[Callable[[], bool]]:
    """Within it the first of these signals prints a message and makes the function that is yielded return True.

    The next signal has its usual effect. Outside of the main thread, the handling of signals does not change.

    Args:
      numbers: numbers of the signals, such as (signal.SIGINT,).
      message: text that is printed at the first signal.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame) -> None:
        asked.set()
        restore()
        tqdm.write(message)

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        restore()
