"""Parts of `interop.numpyro`: a flow's base as a distribution of NumPyro, and its support as a constraint."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.interop.extras import needs_extra
from resflow_jax.models.bases import Base, StandardNormal

with needs_extra("numpyro"):
    from numpyro.distributions import Distribution, Normal, constraints
    from numpyro.distributions.transforms import Transform, biject_to
    from numpyro.distributions.util import validate_sample

Array = jax.Array


def base_distribution(base: Base, dtype: Any, condition: Array | None, batch_shape: tuple[int, ...]) -> Distribution:
    """The base of a flow as a distribution of NumPyro, of z [*batch_shape, *event_shape].

    Args:
      base: the base.
      dtype: dtype of the flow.
      condition: [*condition_shape], or [*batch_shape, *condition_shape].
      batch_shape: leading axes of the condition.
    """
    ndims = len(base.event_shape)
    if type(base) is StandardNormal:
        normal = Normal(jnp.zeros((), dtype), jnp.ones((), dtype))
        return normal.expand((*batch_shape, *base.event_shape)).to_event(ndims)
    return BaseDistribution(base, condition if base.condition_shape is not None else None, batch_shape)


class BaseDistribution(Distribution):
    """A `Base` as it is now, with its condition; a pytree. Its samples are differentiable if those of the base are."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    reparametrized_params: list[str] = []  # noqa: RUF012
    pytree_data_fields = ("_state", "_condition")
    pytree_aux_fields = ("_graphdef",)

    def __init__(self, base: Base, condition: Array | None, batch_shape: tuple[int, ...]):
        self._graphdef, self._state = nnx.split(nnx.clone(base))
        self._condition = condition
        super().__init__(batch_shape, tuple(base.event_shape))

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = *sample_shape, *self.batch_shape
        num_samples = math.prod(shape)
        z = self._base().sample(key, num_samples, self._condition_of(shape))
        return z.reshape(*shape, *self.event_shape)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        value = jnp.asarray(value)
        shape = jnp.broadcast_shapes(value.shape[: value.ndim - len(self.event_shape)], self.batch_shape)
        z = jnp.broadcast_to(value, (*shape, *self.event_shape)).reshape(-1, *self.event_shape)
        return self._base().log_prob(z, self._condition_of(shape)).reshape(shape)

    def _base(self) -> Base:
        return nnx.merge(self._graphdef, self._state, copy=True)

    def _condition_of(self, shape: tuple[int, ...]) -> Array | None:
        """The condition [B, *condition_shape] of a batch with these leading axes."""
        if self._condition is None:
            return None
        one = self._condition.shape[len(self.batch_shape) :]
        return jnp.broadcast_to(self._condition, (*shape, *one)).reshape(-1, *one)


def support_constraint(support: tuple[Any, Any] | None, ndims: int) -> constraints.Constraint:
    """The constraint of events whose values are between the two ends of a support, or equal to them.

    Args:
      support: (low, high), numbers or arrays of the last axes, which may be infinite; None for all reals.
      ndims: number of axes of one event.
    """
    ends = (-np.inf, np.inf) if support is None else (np.asarray(end, float) for end in support)
    low, high = np.broadcast_arrays(*ends)
    is_bounded = np.isfinite([low, high])
    if not is_bounded.any():
        element = constraints.real
    elif low.ndim == 0 and (low, high) == (0, 1):
        element = constraints.unit_interval
    elif is_bounded.all():
        element = constraints.interval(low, high)
    else:
        element = Columns(low, high)
    return constraints.independent(element, ndims)


class Columns(type(constraints.interval(0, 1))):
    """Values between ends of which some are infinite, as in a table whose columns have different bounds."""

    def __repr__(self) -> str:
        return f"Columns(low={self.lower_bound}, high={self.upper_bound})"

    def feasible_like(self, prototype: Any) -> Array:
        return ToColumns(self)(jnp.zeros(jnp.shape(prototype)))


class ToColumns(Transform):
    """The map of the reals to `Columns`: low + exp(x), high - exp(-x), low + (high - low) sigmoid(x), or x itself."""

    domain = constraints.real

    def __init__(self, columns: Columns):
        self.columns = columns

    @property
    def codomain(self) -> constraints.Constraint:
        return self.columns

    def _parts(self) -> tuple[Array, Array, Array, Array]:
        """(low, high, has_low, has_high): the ends, zero where they are infinite, and whether they are finite."""
        low, high = jnp.asarray(self.columns.lower_bound), jnp.asarray(self.columns.upper_bound)
        has_low, has_high = jnp.isfinite(low), jnp.isfinite(high)
        return jnp.where(has_low, low, 0), jnp.where(has_high, high, 0), has_low, has_high

    def __call__(self, x: Array) -> Array:
        low, high, has_low, has_high = self._parts()
        inside = low + (high - low) * jax.nn.sigmoid(x)
        # Where a column has no end, or two, the exponential could overflow, and its derivative would be NaN.
        size = jnp.exp(jnp.where(has_low ^ has_high, jnp.where(has_low, x, -x), 0))
        one_sided = jnp.where(has_low, low + size, high - size)
        return jnp.where(has_low & has_high, inside, jnp.where(has_low | has_high, one_sided, x))

    def _inverse(self, y: Array) -> Array:
        low, high, has_low, has_high = self._parts()
        both = has_low & has_high
        from_low = jnp.where(has_low, y - low, 1)
        from_high = jnp.where(has_high, high - y, 1)
        logs = jnp.log(from_low) - jnp.log(from_high)  # one of the two is zero if one end alone is finite
        return jnp.where(both | has_low | has_high, logs, y)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        low, high, has_low, has_high = self._parts()
        both = has_low & has_high
        inside = jnp.log(jnp.where(both, high - low, 1)) - jax.nn.softplus(x) - jax.nn.softplus(-x)
        one_sided = jnp.where(has_low, x, -x)
        return jnp.where(both, inside, jnp.where(has_low | has_high, one_sided, 0))

    def tree_flatten(self):
        return (self.columns,), (("columns",), {})

    def eq(self, other: object, static: bool = False) -> Any:
        return isinstance(other, ToColumns) and self.columns.eq(other.columns, static=static)


biject_to.register(Columns, ToColumns)
