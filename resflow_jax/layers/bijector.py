"""`Bijector`: the interface of an invertible layer.

A bijector maps x [B, ...] to y = f(x), or f(x; c) with a condition c, and knows log|det dy/dx| [B] in nats. Its public
methods are the same for every layer; `forward` and `inverse` check their arguments, the call does not:

    y = bijector(x)                                    y = bijector(x, c)
    y, log_det = bijector.forward(x)                   y, log_det = block.forward(x, key=key, estimator=rf.Roulette())
    x = bijector.inverse(y)                            x, status = block.inverse(y, return_status=True)

A layer in closed form defines `transform` and `invert`. A layer with residual blocks inside defines `estimate`, `solve`
and `solve_and_estimate` instead, which also take what the blocks need: key, estimator and solver.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.checks import as_float_batch, check_key
from resflow_jax.functional.diagnostics import DIAGNOSED_TERMS, Diagnostics
from resflow_jax.functional.estimators import Estimator, Roulette, check_estimator, with_rows
from resflow_jax.functional.inverse import check_solver, reported
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.functional.values import ANYWHERE, Domain
from resflow_jax.layers.conditions import ConditionShape, as_condition
from resflow_jax.layers.module import Module

Array = jax.Array
Shape = tuple[int, ...]
Forward = tuple[Array, Array, list[Diagnostics]]
Inverse = tuple[Array, list[InverseStatus]]
InverseAndLogDet = tuple[Array, Array, list[Diagnostics], list[InverseStatus]]
Blocks = TypeVar("Blocks", Diagnostics, InverseStatus)


class Constant(nnx.Variable):
    """An array that is fixed when its layer is made or initialised: state that no training changes."""


class Bijector(Module):
    """Interface of an invertible layer on [B, ...]; see the module's head.

    To write a layer, define `transform` and `invert`; set `event_shape` where the layer takes events of one shape
    alone, `condition_shape` where it takes a condition; define `output_shape` and `input_shape` where it changes the
    shape.

    Example:
      class Shift(rf.Bijector):
          def __init__(self, dim):
              self.event_shape = (dim,)
              self.shift = nnx.Param(jnp.zeros(dim))

          def transform(self, x, condition=None):
              return x + self.shift[...], jnp.zeros(x.shape[0], x.dtype)

          def invert(self, y, condition=None):
              return y - self.shift[...]

    Attributes:
      event_shape: shape of one x, None where several fit.
      condition_shape: shape of one condition; None for no condition, `...` for whatever is given.
      blocks: number of residual blocks inside.
      takes_noise: whether the log-det is drawn with a key.
      pads: whether f appends noise to x, and so is no bijection (see `layers.padding`).
    """

    event_shape: Shape | None = None
    condition_shape: ConditionShape = None
    blocks: int = 0
    takes_noise: bool = False
    pads: bool = False

    # What a layer defines

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """(y, log_det): y = f(x), and log|det dy/dx| [B] in nats."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method transform(x, condition), or estimate")

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        """x with f(x) = y."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method invert(y, condition), or solve")

    def invert_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """(x, log_det): x with f(x) = y, and log|det dy/dx| there, which a layer may know better from y than from x."""
        x = self.invert(y, condition)
        return x, self.transform(x, condition)[1]

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of one y for events x of this shape. Raises ValueError for events that the layer does not take."""
        if self.event_shape is not None and tuple(shape) != tuple(self.event_shape):
            raise ValueError(f"expected events of shape {tuple(self.event_shape)}, got {tuple(shape)}")
        return tuple(shape)

    def input_shape(self, shape: Shape) -> Shape:
        """The shape of one x for events y of this shape: what `output_shape` takes to it."""
        return tuple(shape)

    def part_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of the parts that y is made of, each flattened, in order, for events x of this shape.

        Most layers put out one part, of the shape of y. `MultiScale` puts out one part a scale, and `Flatten` one part
        of the shape that it flattens; in a `Chain` the layers that follow keep these as long as they keep the shape.
        """
        return (self.output_shape(shape),)

    def initialize(self, x: Array, condition: Array | None = None) -> Array:
        """Sets data-dependent state from a batch, in place, and returns y = f(x)."""
        return self(x, condition)

    def update_statistics(self, x: Array, condition: Array | None = None) -> Array:
        """Moves running statistics, `nnx.BatchStat`, towards those of a batch, in place, and returns y = f(x)."""
        return self(x, condition)

    def lipschitz_bounds(self) -> tuple[float, float]:
        """Upper bounds of the Lipschitz constants of f and of f^-1 in the 2-norm of one example; infinite if unknown.

        Taken on the host in float64, so not under jit. They hold for every condition.
        """
        return math.inf, math.inf

    def domain(self, dtype: Any) -> Domain:
        """Where the values of x may be."""
        return ANYWHERE

    @property
    def support(self) -> tuple[Any, Any] | None:
        """Lower and upper ends of what samples of x are clipped to, or None."""
        return None

    def codomain(self, dtype: Any) -> Domain:
        """Where the values of y are: the domain of the inverse."""
        return ANYWHERE

    @property
    def image(self) -> tuple[Any, Any] | None:
        """Lower and upper ends of the values of y, or None: the support of the inverse."""
        return None

    # What a layer with residual blocks inside defines

    def estimate(self, x: Array, key: Array | None, estimator: Estimator, condition: Array | None) -> Forward:
        """(y, log_det, diagnostics): as `transform`, the log-det exact or estimated with `key`.

        The diagnostics of all residual blocks in order, in one or more parts with leading axes. An estimator may hold
        arrays with one row a residual block (the law `Fitted`); every layer is given its own rows.
        """
        return *self.transform(x, condition), []

    def solve(self, y: Array, solver: Solver, condition: Array | None) -> Inverse:
        """(x, statuses) with f(x) = y; the statuses of all residual blocks in the order of `estimate`, in parts."""
        return self.invert(y, condition), []

    def solve_and_estimate(
        self, y: Array, key: Array | None, estimator: Estimator, solver: Solver, condition: Array | None
    ) -> InverseAndLogDet:
        """(x, log_det, diagnostics, statuses) with f(x) = y, and log|det dy/dx| at x as of `estimate` with this key."""
        return *self.invert_and_log_det(y, condition), [], []

    def certified_bounds(self, blocks: list) -> tuple[float, float]:
        """`lipschitz_bounds`; appends the certificates of all residual blocks inside, in order."""
        return self.lipschitz_bounds()

    def tighten(self) -> None:
        """Rescales kernels, in place, until every residual block inside is certified within its target bound."""

    # What a layer is used by

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """y = f(x), without the log-det."""
        return self.transform(x, condition)[0]

    def forward(
        self,
        x: Array,
        *,
        condition: Array | None = None,
        key: Array | None = None,
        estimator: Estimator | None = None,
        return_diagnostics: bool = False,
    ) -> tuple[Array, Array] | tuple[Array, Array, Diagnostics]:
        """Maps x to y with the log-det of the map.

        Args:
          x: floats [B, *event_shape].
          condition: floats [*condition_shape], one for all examples, or [B, *condition_shape].
          key: PRNG key of the estimate; not needed by `Exact`, nor by layers in closed form.
          estimator: of the log-det of residual blocks, `Roulette()` by default.
          return_diagnostics: whether to return the `Diagnostics` of the residual blocks, [blocks, ...], as well.

        Returns:
          (y, log_det) or (y, log_det, diagnostics): y [B, ...], and log|det dy/dx| [B] in nats.

        Raises:
          ValueError: for a wrong shape or dtype, a condition that is missing or not expected, a missing key.
        """
        x = as_float_batch("x", x, self.event_shape)
        check_key("key", key, optional=True)
        check_events(self, x)
        estimator = checked_estimator(estimator, self.blocks)
        condition = as_condition(condition, self.condition_shape, x.shape[:1])
        y, log_det, diagnostics = self.estimate(x, key, estimator, condition)
        return (y, log_det, join_diagnostics(diagnostics, x)) if return_diagnostics else (y, log_det)

    def inverse(
        self, y: Array, *, condition: Array | None = None, solver: Solver = Anderson(), return_status: bool = False
    ) -> Array | tuple[Array, InverseStatus]:
        """Maps y [B, ...] to x with f(x) = y.

        Args:
          y: floats [B, ...].
          condition: as of `forward`.
          solver: of the residual blocks.
          return_status: whether to return the `InverseStatus` of the residual blocks, [blocks, B], as well. Without it,
            what does not converge is reported as by `residual_inverse`.
        """
        y = as_float_batch("y", y)
        check_solver(solver)
        condition = as_condition(condition, self.condition_shape, y.shape[:1])
        x, statuses = self.solve(y, solver, condition)
        status = join_statuses(statuses, y)
        return (x, status) if return_status else reported(x, status, type(self).__name__, solver.on_failure)


def checked_estimator(estimator: Estimator | None, blocks: int) -> Estimator:
    """The estimator, or the default, with one row a residual block where it has arrays."""
    estimator = Roulette() if estimator is None else estimator
    check_estimator(estimator)
    return with_rows(estimator, blocks)


def check_events(bijector: Bijector, x: Array) -> None:
    """Raises ValueError for a batch of events that the layer does not take: they could broadcast, to wrong log-dets."""
    try:
        bijector.output_shape(x.shape[1:])
    except ValueError as error:
        raise ValueError(f"x: {error}") from error


def scaling_log_det(log_scale: Array, x: Array) -> Array:
    """[B] log-dets of x [B, ..., *shape] * exp(log_scale [*shape]): each scale counts once a position."""
    log_det = (math.prod(x.shape[1:]) // log_scale.size) * jnp.sum(log_scale)
    return jnp.broadcast_to(log_det, x.shape[:1])


def ends_in(shape: Shape, last: Shape) -> Shape:
    """`shape`, the events of a layer that has one number for each element of `last`: it must end in that."""
    shape = tuple(shape)
    if shape[len(shape) - len(last) :] != last:
        raise ValueError(f"expected events whose shape ends in {last}, got {shape}")
    return shape


def no_log_det(x: Array) -> Array:
    """[B] zeros: the log-dets of a map that keeps volumes."""
    return jnp.zeros(x.shape[0], x.dtype)


def scaling_bounds(log_scale: Array | np.ndarray) -> tuple[float, float]:
    """Lipschitz constants of x * exp(log_scale) and of its inverse; infinite where float64 ends."""
    log_scale = np.asarray(log_scale, np.float64)
    with np.errstate(over="ignore"):
        return float(np.exp(log_scale.max())), float(np.exp(-log_scale.min()))


def split_key(key: Array | None, bijectors: Sequence[Bijector]) -> list[Array | None]:
    """A key for each layer that takes noise, the key itself for a single one; none for the others.

    Few splits make a small program: XLA compiles a dozen kernels for each.
    """
    count = sum(bijector.takes_noise for bijector in bijectors)
    keys = iter([key] * count if key is None or count <= 1 else jax.random.split(key, count))
    return [next(keys) if bijector.takes_noise else None for bijector in bijectors]


def split_estimator(estimator: Estimator, bijectors: Sequence[Bijector]) -> list[Estimator]:
    """One estimator a layer: with the rows of its residual blocks, where the estimator has rows."""
    ends = list(accumulate((bijector.blocks for bijector in bijectors), initial=0))
    return [jax.tree.map(lambda leaf: leaf[a:b], estimator) for a, b in pairwise(ends)]  # noqa: B023


def own_condition(bijector: Bijector, condition: Array | None) -> Array | None:
    """The condition for a layer that takes one, else None."""
    return None if bijector.condition_shape is None else condition


def join_blocks(parts: list[Blocks]) -> Blocks:
    """The diagnostics, or the statuses, of consecutive residual blocks as one, with a leading axis of blocks."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def join_diagnostics(parts: list[Diagnostics], x: Array) -> Diagnostics:
    """`join_blocks`, also of no block at all; of a batch x."""
    nothing = jnp.zeros((0,), x.dtype)
    empty = Diagnostics(nothing, jnp.zeros((0, DIAGNOSED_TERMS), x.dtype), nothing, nothing)
    return join_blocks(parts) if parts else empty


def join_statuses(parts: list[InverseStatus], y: Array) -> InverseStatus:
    """`join_blocks`, also of no block at all; of a batch y."""
    shape = (0, y.shape[0])
    nothing = jnp.zeros(shape, y.dtype)
    return join_blocks(parts) if parts else InverseStatus(jnp.zeros(shape, jnp.int32), nothing, nothing, nothing == 0)


Apply = Callable[[Bijector, Array, Array | None], Array]  # of a layer to x and its condition


def fold(bijectors: Sequence[Bijector], apply: Apply, x: Array, condition: Array | None) -> Array:
    """Runs x through apply(bijector, x, condition) of every bijector."""
    for bijector in bijectors:
        x = apply(bijector, x, own_condition(bijector, condition))
    return x
