"""Signals that ask a training to stop: it finishes its step, and returns or saves what it has."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def deferred_signals(numbers: Sequence[int], message: str) -> Iterator[Callable[[], bool]]:
    """Within it the first of these signals prints a message and makes the function that is yielded return True.

    The next signal does what it did before. In a thread that is not the main one signals are left alone.

    Args:
      numbers: of the signals, as (signal.SIGINT,).
      message: what is printed when the first one comes.
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
