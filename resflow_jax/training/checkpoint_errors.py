"""Errors of checkpoints: which are those of files, and what is said about a damaged checkpoint."""

import re

# Orbax writes arrays by tensorstore, which raises errors of files as a ValueError. Its message starts with a status, or
# has the error number of the operating system.
_OF_FILES = re.compile(
    r"(RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|NOT_FOUND|ABORTED|DEADLINE_EXCEEDED|DATA_LOSS"
    r"|FAILED_PRECONDITION|UNKNOWN): |.*os_error_code=",
    re.DOTALL,
)


class DamagedCheckpointError(ValueError):
    """A checkpoint is not as it was written.

    Args:
      message: the directory, the step, and what is wrong.
      problem: only what is wrong, such as "its file state/_METADATA is missing".

    Example:
      >>> from resflow_jax.training.checkpoint_errors import DamagedCheckpointError
      >>> DamagedCheckpointError("could not read checkpoint 3: a file is missing", "a file is missing").problem
      'a file is missing'
    """

    def __init__(self, message: str, problem: str = ""):
        super().__init__(message)
        self.problem = problem or message


def is_of_files(error: Exception) -> bool:
    """Whether an error that orbax raised is that of a file."""
    return isinstance(error, OSError) or (isinstance(error, ValueError) and bool(_OF_FILES.match(str(error))))


def told(error: Exception) -> str:
    """What an error says about a checkpoint, in a line that continues "checkpoint 3 is"."""
    if isinstance(error, DamagedCheckpointError):
        return f"damaged, {error.problem}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"unreadable, {lines[0][:200]}"


def listed(problems: dict[int, str]) -> str:
    """A line about checkpoints by their steps."""
    return "; ".join(f"checkpoint {step} is {problem}" for step, problem in problems.items())
