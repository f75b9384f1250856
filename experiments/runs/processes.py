"""Several processes of one run: they meet, agree on the config, and leave files to the first process.

All processes run the same program in step. Only the first writes files, draws pictures and shows the progress bar; that
work must use no computation on all devices, since such a computation would wait for the other processes.
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
    """Waits for the other processes, if there are any. Call it before JAX starts.

    If they do not all connect in time, it prints an error and ends the program with exit status 1.

    Raises:
      ValueError: if no cluster is detected.
    """
    if not config.auto and config.coordinator is None:
        return
    # JAX's own time-out ends the program without a helpful message, so it is set to a later time.
    late = threading.Timer(config.timeout, _report_missing, (config,))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            # Given settings are used alone: JAX would still ask the cluster for the devices of each process.
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
            f"{config.num_processes} processes to meet at {config.coordinator}; this is number "
            f"{config.process_id}; one or more never came, or cannot reach that address"
        )
    print(f"distributed.timeout: expected within {config.timeout} s {expected}", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread waits in JAX


def is_first() -> bool:
    """Whether this process is the first, which writes the files."""
    return jax.process_index() == 0


def check_same(config: Any) -> None:
    """Compares the config of a run with that of the first process, except for settings that differ by process.

    Raises:
      ValueError: in all processes, if one has a different config; the message of that process lists the differences.
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
            f"config: expected the config of process 0 in process {jax.process_index()}, got other settings:\n  "
            + "\n  ".join(differences)
        )
    if len(others):
        raise ValueError(
            f"config: expected the same in all processes, got other settings in {', '.join(map(str, others))} than in "
            "0; those processes list them"
        )


@contextmanager
def all_end_with_one() -> Iterator[None]:
    """A context for the common work of several processes: a process that fails exits at once, and JAX ends the others.

    The others notice the missing heartbeat after at most 100 s. A normal exit of JAX would wait for the other
    processes, which in turn wait for this one.
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
    """Gives all processes the arrays of the first; those that each computes by itself may differ in the last bits."""
    return jax.device_put(multihost_utils.broadcast_one_to_all(tree)) if jax.process_count() > 1 else tree


def by_first(action: Callable[[], None]) -> None:
    """Runs an action in the first process; the others wait until it is done.

    Raises:
      Exception: in the first process, the exception of the action; in the others, RuntimeError.
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
            raise RuntimeError("process 0 failed; its error message says why")
    if error is not None:
        raise error


def wait_for_all(name: str) -> None:
    """Returns when every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
