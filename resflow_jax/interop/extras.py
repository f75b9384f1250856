"""The error for a library that is not installed."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Surrounds imports of an optional library. An ImportError then says which extra of this package installs it."""
    try:
        yield
    except ImportError as error:
        message = f"resflow_jax.interop.{extra} needs the extra {extra}: pip install 'resflow_jax[{extra}]' ({error})"
        raise ImportError(message) from error
