"""The initial values of ordinary linear layers and convolutions."""

import math
from collections.abc import Sequence

import jax
from flax import nnx

from resflow_jax.functional.checks import check_type

Array = jax.Array


def fan_in_uniform(rngs: nnx.Rngs, shape: Sequence[int], fan_in: int | None = None) -> Array:
    """An array of U(-1/sqrt(fan_in), 1/sqrt(fan_in)), by default with the fan-in of a kernel [..., outputs]."""
    check_type("rngs", rngs, nnx.Rngs)
    bound = (math.prod(shape[:-1]) if fan_in is None else fan_in) ** -0.5
    return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
