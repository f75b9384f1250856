"""`Bijector`: the interface of an invertible layer.

A bijector maps x [B, ...] to y = f(x), or to f(x; c) with a condition c, and computes log|det dy/dx| [B] in nats. Its
public methods are the same for every layer. `forward` and `inverse` check their arguments, the call does not:

    y = bijector(x)                                    y = bijector(x, c)
    y, log_det = bijector.forward(x)                   y, log_det = block.forward(x, key=key, estimator=rf.Roulette())
    x = bijector.inverse(y)                            x, status = block.inverse(y, return_status=True)

A layer in closed form defines `transform` and `invert`. A layer with residual blocks inside defines `__call__`,
`estimate`, `solve` and `solve_and_estimate` instead, which also take what the blocks need: key, estimator and solver.
It also defines `certified_bounds` and `tighten`, which pass on the calls to the blocks.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.checks import as_float_batch, check_flag, check_key
from resflow_jax.functional.diagnostics import DIAGNOSED_TERMS, Diagnostics
from resflow_jax.functional.estimators import Estimator, Roulette, check_estimator, with_rows
from resflow_jax.functional.inverse import check_solver, reported
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.functional.values import ANYWHERE, Domain
from resflow_jax.layers.conditions import ConditionShape, as_condition
from resflow_jax.layers.event_shapes import check_events, check_outputs
from resflow_jax.layers.module import Module

Array = jax.Array
Shape = tuple[int, ...]
Forward = tuple[Array, Array, list[Diagnostics]]
Inverse = tuple[Array, list[InverseStatus]]
InverseAndLogDet = tuple[Array, Array, list[Diagnostics], list[InverseStatus]]
Blocks = TypeVar("Blocks", Diagnostics, InverseStatus)


class Constant(nnx.Variable):
    """An array that is set when its layer is made or initialised, and that training does not change.

    Optimisers of `nnx.Param` leave it alone. It is saved with the flow.

    Args:
      value: the array, of any shape and dtype.

    Example:
      >>> layer = rf.Normalization([1.0, 2.0], [1.0, 1.0])
      >>> isinstance(layer.mean, rf.Constant), isinstance(layer.mean, nnx.Param)
      (True, False)
    """


class Bijector(Module):
    """Interface of an invertible layer y = f(x) on x [B, ...], with log|det dy/dx| [B] in nats.

    To write a layer, define `transform` and `invert`. Set `event_shape` if the layer takes events of one shape only,
    and `condition_shape` if it takes a condition. Define `output_shape` and `input_shape` if it changes the shape. The
    author of a layer guarantees that `invert` is the inverse of `transform` and that the log-det is right: nothing here
    checks them. Each example must be mapped independently of the others in the batch.

    Randomness: none, except in log-dets of residual blocks and in padding (see `forward`). Cost: that of the layer.

    Attributes:
      event_shape: shape of one x; None if several shapes fit.
      condition_shape: shape of one condition; None for no condition, `...` for any.
      blocks: number of residual blocks inside.
      takes_noise: whether the log-det may need a PRNG key.
      pads: whether f appends noise to x, and so is not a bijection (see `layers.padding`).
      no_density: the reason why f has no log-det, as "LAYER: reason"; None if it has one (see
        `layers.without_log_det`).
      no_bound: the reason why f has no Lipschitz bound for any parameters, which `certify` prints; otherwise None.

    Example:
      >>> class Shift(rf.Bijector):
      ...     def __init__(self, dim):
      ...         self.event_shape = (dim,)
      ...         self.shift = nnx.Param(jnp.ones((1, dim)))
      ...
      ...     def transform(self, x, condition=None):
      ...         return x + self.shift[...], jnp.zeros(x.shape[0], x.dtype)
      ...
      ...     def invert(self, y, condition=None):
      ...         return y - self.shift[...]
      >>> layer = Shift(2)
      >>> y, log_det = layer.forward(jnp.zeros((3, 2)))
      >>> y[0].tolist(), log_det.tolist(), layer.inverse(y)[0].tolist()
      ([1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0])
    """

    event_shape: Shape | None = None
    condition_shape: ConditionShape = None
    blocks: int = 0
    takes_noise: bool = False
    pads: bool = False
    no_density: str | None = None
    no_bound: str | None = None

    # Methods that a layer defines

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """y = f(x) and its log-det, for a layer in closed form.

        Args:
          x: floats [B, *event_shape], not checked.
          condition: floats [B, *condition_shape], or None.

        Returns:
          (y, log_det): y [B, ...], and log|det dy/dx| [B] in nats.
        """
        expected = "a method transform(x, condition), or __call__ and estimate"
        raise NotImplementedError(f"{type(self).__name__}: expected {expected}")

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        """x [B, ...] with f(x) = y, for y [B, ...] and a condition [B, *condition_shape] or None; not checked."""
        expected = "a method invert(y, condition), or solve and solve_and_estimate"
        raise NotImplementedError(f"{type(self).__name__}: expected {expected}")

    def invert_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        """(x, log_det): x [B, ...] with f(x) = y, and log|det dy/dx| [B] in nats at x.

        By default `invert`, then `transform`. A layer that computes the log-det more accurately from y overrides this.
        """
        x = self.invert(y, condition)
        return x, self.transform(x, condition)[1]

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of one y for events x of the given shape; no computation.

        Raises:
          ValueError: for events that the layer does not take.
        """
        if self.event_shape is not None and tuple(shape) != tuple(self.event_shape):
            raise ValueError(f"expected events of shape {tuple(self.event_shape)}, got {tuple(shape)}")
        return tuple(shape)

    def input_shape(self, shape: Shape) -> Shape:
        """The shape of one x for events y of the given shape: the inverse of `output_shape`."""
        return tuple(shape)

    def part_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes of the parts that y consists of, each flattened, in order, for events x of the given shape.

        Most layers return one part, of the shape of y. `MultiScale` returns one part for each scale, `Flatten` one part
        of the shape that it flattens. In a `Chain` later layers keep the parts as long as they keep the shape.
        """
        return (self.output_shape(shape),)

    def initialize(self, x: Array, condition: Array | None = None) -> Array:
        """Sets data-dependent state from a batch, in place, and returns y = f(x) [B, ...] with the new state.

        Args:
          x: floats [B, ...], at least two examples; not checked. Under `shard_map` the statistics are of the whole
            batch.
          condition: floats [B, *condition_shape], or None.

        Cost: one evaluation of f, without log-det.
        """
        return self(x, condition)

    def update_statistics(self, x: Array, condition: Array | None = None) -> Array:
        """Moves running statistics (`nnx.BatchStat`) towards those of a batch, in place, and returns y = f(x) [B, ...].

        Arguments and cost as in `initialize`.
        """
        return self(x, condition)

    def lipschitz_bounds(self) -> tuple[float, float]:
        """Upper bounds on (Lip(f), Lip(f^-1)) in the 2-norm of one example, for every condition; infinite if unknown.

        Computed on the host in float64, so not under jit.
        """
        return math.inf, math.inf

    def domain(self, dtype: Any) -> Domain:
        """The intervals of values of x that f takes."""
        return ANYWHERE

    @property
    def support(self) -> tuple[Any, Any] | None:
        """Lower and upper end of the interval that samples of x are clipped to, or None."""
        return None

    def codomain(self, dtype: Any) -> Domain:
        """The intervals of values of y: the domain of the inverse."""
        return ANYWHERE

    @property
    def image(self) -> tuple[Any, Any] | None:
        """Lower and upper end of the values of y, or None: the support of the inverse."""
        return None

    # Methods that a layer with residual blocks inside defines, besides `__call__`

    def estimate(self, x: Array, key: Array | None, estimator: Estimator, condition: Array | None) -> Forward:
        """As `transform`, with the log-det of residual blocks exact or estimated with `key`.

        An estimator may hold arrays with one row for each residual block (the length distribution `Fitted`); every
        layer gets its own rows.

        Returns:
          (y, log_det, diagnostics): as in `transform`, and the diagnostics of all residual blocks in order, in one or
          more parts with a leading axis of blocks.
        """
        return *self.transform(x, condition), []

    def solve(self, y: Array, solver: Solver, condition: Array | None) -> Inverse:
        """x with f(x) = y, with the iteration `solver` for residual blocks.

        Returns:
          (x, statuses): of all residual blocks and other layers that iterate, in the order of `estimate`, in parts.
        """
        return self.invert(y, condition), []

    def solve_and_estimate(
        self, y: Array, key: Array | None, estimator: Estimator, solver: Solver, condition: Array | None
    ) -> InverseAndLogDet:
        """x with f(x) = y, and the log-det of f at x.

        Returns:
          (x, log_det, diagnostics, statuses): log_det and diagnostics are those that `estimate` returns at x for this
          key.
        """
        return *self.invert_and_log_det(y, condition), [], []

    def certified_bounds(self, blocks: list) -> tuple[float, float]:
        """`lipschitz_bounds`; appends the certificate of every residual block inside to `blocks`, in order."""
        return self.lipschitz_bounds()

    def tighten(self) -> None:
        """Rescales kernels, in place, until every residual block inside is certified within its target bound.

        On the host in float64. Blocks with a bound that the user states stay as they are.

        Raises:
          RuntimeError: if a block stays above its target bound after ten rounds.
        """

    # Methods for callers

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """y = f(x) [B, ...], without the log-det and without checks; one evaluation of every g inside.

        By default that of `transform`; a layer with residual blocks inside defines its own.
        """
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
        """Maps x to y, with the log-det of the map.

        Args:
          x: floats [B, *event_shape].
          condition: floats [*condition_shape], one for all examples, or [B, *condition_shape]; they are converted to
            the dtype of x.
          key: PRNG key of the estimate; not needed by `Exact`, nor by layers in closed form.
          estimator: estimator of the log-det of residual blocks, `Roulette()` by default.
          return_diagnostics: whether to return the `Diagnostics` of the residual blocks, [blocks, ...], as well.

        Returns:
          (y, log_det) or (y, log_det, diagnostics): y [B, ...], and log|det dy/dx| [B] in nats. For residual blocks
          log_det is unbiased with `Roulette`, exact with `Exact`, biased with `Truncated`; y is never random, except
          for padding.

        Cost: for each residual block one evaluation of g, and the vector-Jacobian products of the estimator.

        Raises:
          ValueError: for a wrong shape or dtype, a condition that is missing or not expected, a missing key.
        """
        check_flag("return_diagnostics", return_diagnostics)
        x = as_float_batch("x", x, self.event_shape)
        check_key("key", key, optional=True)
        check_events(self, x)
        condition = as_condition(condition, self.condition_shape, x.shape[:1], x.dtype)
        y, log_det, diagnostics = self.estimate(x, key, checked_estimator(estimator, self.blocks), condition)
        return (y, log_det, join_diagnostics(diagnostics, x)) if return_diagnostics else (y, log_det)

    def inverse(
        self, y: Array, *, condition: Array | None = None, solver: Solver = Anderson(), return_status: bool = False
    ) -> Array | tuple[Array, InverseStatus]:
        """Maps y [B, ...] to x [B, ...] with f(x) = y.

        Args:
          y: floats [B, ...].
          condition: as in `forward`.
          solver: solver for the residual blocks, and for other layers that iterate.
          return_status: whether to return the `InverseStatus` of these layers, [layers, B], as well. Without it, a
            solve that does not converge is reported as by `residual_inverse`.

        Returns:
          x, or (x, status).

        Cost: for each residual block a solve, about log(tolerance) / log(Lip(g)) evaluations of g or fewer. Layers in
        closed form cost one pass. No randomness.

        Raises:
          ValueError: for a wrong shape or dtype, a condition that is missing or not expected, and an invalid solver.
          InverseError: from an eager call without status, if a solve fails and `solver.on_failure` is "raise".
        """
        check_flag("return_status", return_status)
        y = as_float_batch("y", y, None if self.event_shape is None else self.output_shape(self.event_shape))
        check_outputs(self, y)
        check_solver(solver)
        x, statuses = self.solve(y, solver, as_condition(condition, self.condition_shape, y.shape[:1], y.dtype))
        status = join_statuses(statuses, y)
        return (x, status) if return_status else reported(x, status, type(self).__name__, solver.on_failure)


def checked_estimator(estimator: Estimator | None, blocks: int) -> Estimator:
    """The estimator, or the default, with one row for each residual block where it has arrays."""
    estimator = Roulette() if estimator is None else estimator
    check_estimator(estimator)
    return with_rows(estimator, blocks)


def scaling_log_det(log_scale: Array, x: Array) -> Array:
    """[B] log-dets of x [B, ..., *shape] * exp(log_scale [*shape]): each scale counts once for each position."""
    log_scale = log_scale.astype(jnp.result_type(log_scale, x))
    log_det = (math.prod(x.shape[1:]) // log_scale.size) * jnp.sum(log_scale)
    return jnp.broadcast_to(log_det, x.shape[:1])


def no_log_det(x: Array) -> Array:
    """[B] zeros: the log-dets of a map that preserves volume."""
    return jnp.zeros(x.shape[0], x.dtype)


def scaling_bounds(log_scale: Array | np.ndarray) -> tuple[float, float]:
    """Lipschitz constants of x * exp(log_scale) and of its inverse; infinite if they overflow float64."""
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
    """One estimator for each layer, with the rows of its residual blocks if the estimator has rows."""
    ends = list(accumulate((bijector.blocks for bijector in bijectors), initial=0))
    return [jax.tree.map(lambda leaf: leaf[a:b], estimator) for a, b in pairwise(ends)]  # noqa: B023


def own_condition(bijector: Bijector, condition: Array | None) -> Array | None:
    """The condition for a layer that takes one, else None."""
    return None if bijector.condition_shape is None else condition


def as_row(tree: Any) -> Any:
    """The diagnostics, or the status, of one block with a leading axis of blocks."""
    return jax.tree.map(lambda leaf: leaf[None], tree)


def join_blocks(parts: list[Blocks]) -> Blocks:
    """The diagnostics, or the statuses, of consecutive residual blocks as one, with a leading axis of blocks."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def join_diagnostics(parts: list[Diagnostics], x: Array) -> Diagnostics:
    """`join_blocks` of diagnostics for a batch x; `parts` may be empty."""
    nothing = jnp.zeros((0,), x.dtype)
    empty = Diagnostics(nothing, jnp.zeros((0, DIAGNOSED_TERMS), x.dtype), nothing, nothing)
    return join_blocks(parts) if parts else empty


def join_statuses(parts: list[InverseStatus], y: Array) -> InverseStatus:
    """`join_blocks` of statuses for a batch y; `parts` may be empty."""
    shape = (0, y.shape[0])
    nothing = jnp.zeros(shape, y.dtype)
    return join_blocks(parts) if parts else InverseStatus(jnp.zeros(shape, jnp.int32), nothing, nothing, nothing == 0)


Apply = Callable[[Bijector, Array, Array | None], Array]  # of a layer to x and its condition


def fold(bijectors: Sequence[Bijector], apply: Apply, x: Array, condition: Array | None) -> Array:
    """Runs x through apply(bijector, x, condition) for every bijector in order."""
    for bijector in bijectors:
        x = apply(bijector, x, own_condition(bijector, condition))
    return x
