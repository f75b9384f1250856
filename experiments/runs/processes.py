"""Several processes of one run: how they meet, agree on what to do, and leave files to the first.

All processes run the same program in step. What only the first does (files, pictures, the progress bar) takes no part
in computations on all devices, which would wait for the others.
"""

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.configs.base import DistributedConfig
from experiments.runs.workdir import config_differences
from resflow_jax.io.config_json import as_json

# Settings of one process alone.
_OWN = ("distributed.process_id", "data.dir", "data.threads", "data.workers")


def join(config: DistributedConfig) -> None:
    """Waits for the other processes, if there are any; to be called before JAX does anything.

    If they are not there in time, it says so and ends the program with exit status 1.

    Raises:
      ValueError: if no cluster is detected.
    """
    if not config.auto and config.coordinator is None:
        return
    # JAX's own time-out ends the program without a word that helps, so it comes later.
    late = threading.Timer(config.timeout, _report_missing, (config,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            # What is given holds: JAX would ask the cluster which devices are whose all the same.
            cluster_detection_method=None if config.auto else "deactivate",
            initialization_timeout=config.timeout + 60,
        )
    except ValueError as error:
        if config.auto:
            raise ValueError(
                f"distributed.auto: expected a cluster that JAX detects, got: {error} Name --distributed.coordinator, "
                "--distributed.num-processes and --distributed.process-id in its place."
            ) from error
        raise
    finally:
        late.cancel()


def _report_missing(config: DistributedConfig) -> None:
    if config.auto:
        expected = "all processes of the cluster to start"
    else:
        expected = (
            f"{config.num_processes} processes to meet at {config.coordinator}, of which this is number "
            f"{config.process_id}; one or more never came, or cannot reach that address"
        )
    print(f"distributed.timeout: expected within {config.timeout} s {expected}", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread waits in JAX


def is_first() -> bool:
    """Whether this process writes the files."""
    return jax.process_index() == 0


def check_same(config: Any) -> None:
    """Compares the config of a run with that of the first process, but for what is each process's own.

    Raises:
      ValueError: in all processes, if any has another; those that have list the differences.
    """
    if jax.process_count() == 1:
        return
    own = as_json(config)
    text = np.frombuffer(json.dumps(own).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    first = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    expected = json.loads(np.asarray(first).astype(np.uint8).tobytes())
    differences = [d for d in config_differences(expected, own) if d.split(":")[0] not in _OWN]
    others = np.flatnonzero(multihost_utils.process_allgather(np.int32(len(differences))))
    if differences:
        raise ValueError(
            f"config: expected in process {jax.process_index()} that of process 0, got other settings:\n  "
            + "\n  ".join(differences)
        )
    if len(others):
        raise ValueError(
            f"config: expected the same in all processes, got other settings in {', '.join(map(str, others))} than in "
            "0; they say which"
        )


@contextmanager
def all_end_with_one() -> Iterator[None]:
    """Around what several processes do together: where one fails, it ends at once, and JAX ends the others.

    They miss its heartbeat after 100 s at most. Waiting for them to come to an end, as JAX does at exit, it would keep
    them waiting for itself.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def from_first(tree: Any) -> Any:
    """The arrays of the first process, in all: what each computes for itself may differ in the last bits."""
    return jax.device_put(multihost_utils.broadcast_one_to_all(tree)) if jax.process_count() > 1 else tree


def by_first(action: Callable[[], None]) -> None:
    """Does something in the first process, before any other goes on.

    Raises:
      Exception: what the action raises; in the other processes RuntimeError.
    """
    error = None
    if is_first():
        try:
            action()
        except Exception as caught:
            error = caught
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if failed and error is None:
            raise RuntimeError("process 0 could not go on; it says why")
    if error is not None:
        raise error


def wait_for_all(name: str) -> None:
    """Returns once every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
