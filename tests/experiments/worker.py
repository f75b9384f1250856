"""A process of `experiments.density` to which something happens while it trains.

    python -m tests.experiments.worker EVENT PROCESS BATCH [arguments of experiments.density]

As it reads its batch of number BATCH, counted from where it starts, the process PROCESS stalls for ever ("stall"), or
is sent SIGTERM and reads slowly from there on ("terminate").
"""

import os
import signal
import sys
import time

import jax

from experiments import density
from resflow_jax.data.batches import Batches


def main() -> None:
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
    density.main(arguments)


if __name__ == "__main__":
    main()
