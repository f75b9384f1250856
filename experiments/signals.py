"""A run that is asked to stop finishes its step and saves."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_ASK = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Within it a first SIGINT or SIGTERM does nothing but make the function that it gives return True.

    The next of either does what it always does. In a thread that is not the main one, signals are left alone.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _ASK}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame) -> None:
        asked.set()
        restore()
        tqdm.write("stopping behind this step, with a checkpoint; once more to stop at once")

    for number in _ASK:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        restore()
