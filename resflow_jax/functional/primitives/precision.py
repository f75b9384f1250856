"""The precision of products and sums that must be as accurate as their dtype.

By default, accelerators round the factors of float32 products: to 11 bits on recent GPUs (TF32), to 8 bits on TPUs. An
iteration that solves an equation then stalls at this error, far above its tolerance, and a norm has it too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np


@contextmanager
def full_precision() -> Iterator[None]:
    """A context in which products are traced with the full precision of their dtype.

    It changes nothing where the user has chosen a precision by `jax.default_matmul_precision` or the flag
    `jax_default_matmul_precision`, and nothing on a CPU, whose products always have it.
    """
    if jax.config.jax_default_matmul_precision is not None:
        yield
        return
    with jax.default_matmul_precision("highest"):
        yield


def wide_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype itself, or float32 for 16-bit floats."""
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else np.dtype(dtype)
