"""A run that is asked to stop finishes its step and saves."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Within it a first SIGINT or SIGTERM does nothing but make the function that it gives return True.

    A second one does what it always does. In a thread that is not the main one, signals are left alone.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame) -> None:
        asked.set()
        signal.signal(number, before[number])
        tqdm.write("stopping behind this step, with a checkpoint; once more to stop at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
