"""The process of one search candidate or one run of the comparison, on one core.

    python -m experiments.studies.comparison.worker WORKDIR CORE [DATA_DIR] < JOB

reads a job as a line of JSON, and writes its result under the work directory. It keeps to one core (CORE "-" leaves
that open), with one JAX device, one thread in PyTorch, and no cache of compiled programs, since a first user has none.
It ends when the process that has started it ends. It prints STARTED when libraries, data and model are there: what
fails before that is no result of the model.
"""

import os
import sys
import threading
import time
from pathlib import Path

from experiments.studies.comparison.jobs import Job, save

STARTED = "started"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_NUM_CPU_DEVICES": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def main() -> None:
    """Does one job."""
    workdir, core, *data_dir = sys.argv[1:]
    end_with_parent()
    keep_to(core)
    job = Job.from_line(sys.stdin.readline())
    from experiments.studies.comparison.making import made  # starts JAX, on this core

    result = made(job, data_dir[0] if data_dir else None, lambda: print(STARTED, flush=True))
    save(job, Path(workdir), *result)


def keep_to(core: str) -> None:
    """Restricts this process to one core and one thread, before any library starts threads."""
    if core != "-":
        os.sched_setaffinity(0, {int(core)})
    os.environ.update(ENVIRONMENT)
    from experiments.runs.devices import use_all_cores, use_xla_flags

    use_xla_flags()
    use_all_cores(1)


def end_with_parent() -> None:
    """Ends this process when the one ends that has started it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
