"""JAX's check for leaked tracers, in every test, while JAX's caches stay on.

`jax.checking_leaks` does two things: it checks for leaks at the end of every trace, and it switches caches off, so that
every call traces and compiles anew. The check alone is cheap. It finds the same leaks, because a program in a cache was
checked when it was traced. Two measures get it:

1. The module `jax._src.core`, which checks, reads that the flag is on. All other modules read the real flag.
2. A finished trace often stays alive although none of its tracers does, for example in an unused rule of a
   `jax.custom_jvp`. JAX then collects all garbage and looks through all objects of Python for references, which takes
   0.2 s. Here it does so only if a tracer of the trace survives a collection.

The error names the tracers that leaked and where they come from. JAX also searches for what holds them, which takes
minutes in a process with many compiled programs; `with jax.checking_leaks():` around the call shows that.

These are internal names of JAX. Where a new release has other ones nothing is checked, and `tests.test_leaks` fails.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident, local
from types import ModuleType, SimpleNamespace
from weakref import WeakValueDictionary

from jax._src import config, core

FLAG = SimpleNamespace(value=True)


def watch() -> bool:
    """Makes functions that leak a tracer raise an error. Returns False if JAX lacks the necessary internal names."""
    try:
        create, find = core.Tracer.__init__, core.maybe_find_leaked_tracers
        _ = core.config.check_tracer_leaks, core.leaked_tracer_error, core.Tracer._origin_msg
    except AttributeError:
        return False

    class Traces(local):
        def __init__(self):
            # by the identity of a trace: its tracers by theirs, as they have no hash
            self.alive: dict[int, WeakValueDictionary] = {}
            self.most = 1000  # entries beyond which those without tracers are removed

    traces = Traces()  # those of each thread

    def create_and_note(tracer, *args, **kwargs):
        create(tracer, *args, **kwargs)
        trace, alive = id(tracer._trace), traces.alive
        if trace not in alive:
            if len(alive) > traces.most:
                for ended in [key for key, tracers in alive.items() if not tracers]:
                    del alive[ended]
                traces.most = 1000 + 2 * len(alive)
            alive[trace] = WeakValueDictionary()
        alive[trace][id(tracer)] = tracer

    def has_tracers(trace) -> bool:
        return any(tracer._trace is trace for tracer in traces.alive.get(id(trace), {}).values())

    def find_if_any(trace) -> list:
        for generation in range(3):
            if not has_tracers(trace):
                return []
            collect(generation)
        return find(trace) if has_tracers(trace) else []

    def error(name: str, trace, tracers: list) -> Exception:
        listed = "\n".join(f"{tracer}{tracer._origin_msg()}" for tracer in tracers)
        return Exception(f"Leaked {name} {trace}. Leaked tracer(s):\n{listed}")

    core.Tracer.__init__, core.maybe_find_leaked_tracers, core.leaked_tracer_error = create_and_note, find_if_any, error
    core.config = ModuleType(config.__name__)
    vars(core.config).update(vars(config), check_tracer_leaks=FLAG)
    return True


def collect(generation: int) -> None:
    """As `gc.collect`, which collects nothing while another thread does; this one waits for the other."""
    thread, collected = get_ident(), []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and get_ident() == thread:
            collected.append(info["generation"])

    gc.callbacks.append(note)
    try:
        while gc.collect(generation) == 0 and max(collected, default=-1) < generation:
            time.sleep(0.001)
    finally:
        gc.callbacks.remove(note)


@contextmanager
def unchecked() -> Iterator[None]:
    """Does not look for leaks: for a call in which JAX itself leaks. `tests.test_leaks` shows that it does."""
    FLAG.value = False
    try:
        yield
    finally:
        FLAG.value = True
