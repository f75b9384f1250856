"""One run in a work directory at a time: a lock that the operating system releases when the process ends, however."""

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.runs.workdir import make_workdir

LOCK = ".lock"


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the work directory of a run, which it makes, until the block ends.

    The file .lock stays, with the number of the process that held it last; what counts is the lock on it. Commands that
    only read a run take none.

    Raises:
      BlockingIOError: if another process holds it; the message names the directory and the process.
      OSError: as `make_workdir`.
    """
    make_workdir(workdir)
    path = workdir / LOCK
    try:
        file = path.open("a+")
    except OSError as error:
        raise OSError(error.errno, f"workdir: could not write to {workdir}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip()
            raise BlockingIOError(
                error.errno,
                f"workdir: {workdir} is in use by process {holder or 'unknown'}; wait until it ends, stop it, or name "
                "another --workdir",
            ) from error
        except OSError as error:  # some network file systems have no locks
            warnings.warn(
                f"workdir: {workdir} could not be locked ({error.strerror}); start no second run", stacklevel=3
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
