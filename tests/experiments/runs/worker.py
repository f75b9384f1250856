"""A process of `experiments.density` that is stalled or terminated while it trains.

    python -m tests.experiments.runs.worker EVENT PROCESS BATCH [arguments of experiments.density]

When the process PROCESS reads batch number BATCH, counted from its start, it stalls forever ("stall"), or receives
SIGTERM and reads slowly from then on ("terminate"). Only Python writes to its standard output; the output of libraries,
such as the mixed lines of Gloo's threads, goes to standard error.
"""

import os
import signal
import sys
import time

import jax

from experiments import density
from experiments.runs.tasks.images import ImageTask
from experiments.runs.tasks.task import Drawing
from resflow_jax.data.batches import Batches
from tests import contexts


def without_pictures(set_attribute) -> None:
    """Omits what other tests check and what needs further compiled programs; records which process would draw."""

    def sketch(task, flow, prefix):
        prefix.with_name(f"process {jax.process_index()}").touch()
        return {}

    set_attribute(ImageTask, "sketch", sketch)
    set_attribute(ImageTask, "draw", lambda *_: Drawing({}, {}))


def separate_python_output() -> None:
    """Reserves standard output for Python."""
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def main() -> None:
    separate_python_output()
    contexts.share()
    event, process, number, *arguments = sys.argv[1:]
    starting_at = Batches.starting_at

    def eventful(self, step, **options):
        for n, batch in enumerate(starting_at(self, step, **options)):
            if jax.process_index() == int(process) and n >= int(number):
                if event == "terminate" and n == int(number):
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(3600 if event == "stall" else 1.5)
            yield batch

    Batches.starting_at = eventful
    without_pictures(setattr)
    density.main(arguments)


if __name__ == "__main__":
    main()
