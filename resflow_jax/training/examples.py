"""Examples to fit a flow to: checked, divided for training and validation, and in batches on the device."""

from collections.abc import Iterator
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from resflow_jax.data.units import warn_if_rounded
from resflow_jax.layers.conditions import as_condition
from resflow_jax.models.flow import Flow
from resflow_jax.training.forms import on_all_devices
from resflow_jax.training.parallel import DATA_AXIS
from resflow_jax.training.scores import quantized_images

Array = jax.Array


class Examples(NamedTuple):
    """Examples x [N, *event_shape], and the condition of each [N, *condition_shape] or None."""

    x: Array
    condition: Array | None = None

    @property
    def number(self) -> int:
        """N."""
        return self.x.shape[0]

    @classmethod
    def of(cls, flow: Flow, x: Any, condition: Any, levels: int | None) -> "Examples":
        """Examples as the flow takes them: floats, or integer images with values in {0..levels-1}.

        Raises:
          ValueError: that names x or condition, as `Flow.log_prob`; for integer images as `evaluate_bits_per_dim`.
        """
        if levels is None:
            if isinstance(x, np.ndarray) and x.dtype == np.float64 and x.ndim > 1 and jnp.result_type(float) != x.dtype:
                warn_if_rounded("x", x)
            with flow._checked_input(x, condition, are_data=True) as (x, condition):
                return cls(x, condition)
        x = quantized_images("x", flow, x, levels)
        own = as_condition(condition, flow.condition_shape, x.shape[:1])
        with flow._finite(condition):
            return cls(jnp.asarray(x), own)

    @property
    def batch(self) -> Any:
        """As losses take it: x, or (x, condition)."""
        return self.x if self.condition is None else tuple(self)

    def take(self, rows: np.ndarray) -> "Examples":
        """The examples of these rows."""
        return _rows(self, rows)


def split_validation(
    flow: Flow, examples: Examples, validation: Any, levels: int | None, rng: np.random.Generator
) -> tuple[Examples, Examples | None]:
    """Training and validation examples.

    Args:
      flow: the flow that takes the examples.
      examples: the examples to train on.
      validation: a share in (0, 1) of the examples, drawn at random and left out of training; other examples x, or a
        pair (x, condition); None or 0 for none.
      levels: as in `Examples.of`.
      rng: draws the share.

    Raises:
      ValueError: that names validation.
    """
    if validation is None or (isinstance(validation, Real) and not isinstance(validation, bool) and validation == 0):
        return examples, None
    if isinstance(validation, Real):
        number = examples.number
        taken = max(1, round(number * validation)) if 0 < validation < 1 else number
        if isinstance(validation, bool) or not 0 < validation < 1 or number - taken < 2:
            raise ValueError(
                f"validation: expected a share in (0, 1) of {number} examples that leaves two or more to train on, "
                f"examples x, a pair (x, condition) or None, got {validation!r}"
            )
        order = rng.permutation(number)
        return examples.take(order[taken:]), examples.take(order[:taken])
    is_pair = isinstance(validation, tuple | list)
    if is_pair and len(validation) != 2:
        raise ValueError(f"validation: expected examples x, or a pair (x, condition), got {len(validation)} parts")
    x, condition = validation if is_pair else (validation, None)
    try:
        return examples, Examples.of(flow, x, condition, levels)
    except ValueError as error:
        raise ValueError(f"validation: {error}") from error


def row_numbers(number: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of numbers 0 ... number - 1, without end, all of one size.

    Each epoch has a new order. A batch may span two epochs, so that all numbers come equally often.
    """
    left = np.empty(0, np.int32)
    while True:
        while len(left) < batch_size:
            left = np.concatenate([left, rng.permutation(number).astype(np.int32)])
        yield left[:batch_size]
        left = left[batch_size:]


def batches_on_device(
    examples: Examples, batch_size: int, rng: np.random.Generator, mesh: Mesh | None
) -> Iterator[Any]:
    """Batches of shuffled examples as losses take them, cut out on the device, or for a mesh divided among devices."""
    sharding = None
    if mesh is not None:
        examples = on_all_devices(examples, mesh)
        sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    for rows in row_numbers(examples.number, batch_size, rng):
        yield _rows(examples, rows, sharding).batch


@partial(jax.jit, static_argnames="sharding")
def _rows(examples: Examples, rows: Array, sharding: NamedSharding | None = None) -> Examples:
    taken = jax.tree.map(lambda leaf: leaf[rows], examples)
    return taken if sharding is None else jax.lax.with_sharding_constraint(taken, sharding)
