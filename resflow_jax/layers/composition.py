"""Bijectors made of bijectors: `Chain` and `Invert`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.checks import as_sequence, check_type
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.inverse import check_solver, reported
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.functional.texts import constructor
from resflow_jax.functional.values import ANYWHERE, Domain
from resflow_jax.layers.bijector import (
    Bijector,
    Forward,
    Inverse,
    InverseAndLogDet,
    Shape,
    fold,
    join_blocks,
    no_log_det,
    own_condition,
    split_estimator,
    split_key,
)
from resflow_jax.layers.conditions import common_condition_shape
from resflow_jax.layers.event_shapes import check_output_shape
from resflow_jax.layers.module import List
from resflow_jax.layers.module_texts import Part, Parts, attempt
from resflow_jax.layers.shapes import Rearrangement
from resflow_jax.layers.without_log_det import refuse_dropout

Array = jax.Array


class Composition(Bijector):
    """The attributes that a chain or a multi-scale map takes from its parts."""

    def _take(self, name: str, parts: Sequence[Bijector]) -> None:
        for n, part in enumerate(parts):
            check_type(f"{name}[{n}]", part, Bijector)
        self.blocks = sum(part.blocks for part in parts)
        self.takes_noise = any(part.takes_noise for part in parts)
        self.pads = any(part.pads for part in parts)
        self.no_density = next((part.no_density for part in parts if part.no_density is not None), None)
        named = ((f"{name}[{n}] ({type(part).__name__})", part.condition_shape) for n, part in enumerate(parts))
        self.condition_shape = common_condition_shape(named)


class Chain(Composition):
    """Composition f = f_n o ... o f_1 of bijectors.

        y = f_n(... f_1(x)),   x = f_1^-1(... f_n^-1(y)),   log_det = sum of the log-dets of the f_i

    An empty chain is the identity. Every layer must take the shape of events that the layer before it returns.

    Args:
      bijectors: f_1 to f_n.

    Randomness: a key is split among the layers that need one. Cost: the sum over the layers.

    Raises:
      ValueError: for parts that are not bijectors, if a layer does not take the events of the layer before it, and
        where two layers take conditions of different shapes; the message names both.

    Example:
      >>> chain = rf.Chain([rf.ActNorm((6,)), rf.Permutation([5, 4, 3, 2, 1, 0]), rf.Reshape((6,), (2, 3))])
      >>> y, log_det = chain.forward(jnp.ones((4, 6)))
      >>> y.shape, log_det.shape, chain.inverse(y).shape
      ((4, 2, 3), (4,), (4, 6))
    """

    def __init__(self, bijectors: Sequence[Bijector]):
        bijectors = as_sequence("bijectors", bijectors, "a list of bijectors")
        self._take("bijectors", bijectors)
        self.bijectors = List(bijectors)
        self.event_shape = _entrance(bijectors)
        if self.event_shape is not None:
            self.output_shape(self.event_shape)

    def output_shape(self, shape: Shape) -> Shape:
        before = ""
        for n, bijector in enumerate(self.bijectors):
            try:
                shape = bijector.output_shape(shape)
            except ValueError as error:
                raise ValueError(f"bijectors[{n}] ({type(bijector).__name__}): {error}{before}") from error
            before = f", which bijectors[{n}] ({type(bijector).__name__}) puts out"
        return tuple(shape)

    def _repr_parts(self, shape: Shape | None) -> Parts:
        parts = []
        for bijector in self.bijectors:
            parts.append(Part(bijector, shape))
            shape = attempt(bijector.output_shape, shape)
        return Parts(type(self).__name__, parts)

    def part_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        parts = (tuple(shape),)
        for bijector in self.bijectors:
            after, own = bijector.output_shape(shape), bijector.part_shapes(shape)
            parts = parts if after == tuple(shape) and own == (after,) else own
            shape = after
        return parts

    def input_shape(self, shape: Shape) -> Shape:
        for bijector in reversed(self.bijectors):
            shape = bijector.input_shape(shape)
        return tuple(shape)

    def domain(self, dtype) -> Domain:
        return _end(self.bijectors, lambda layer: layer.domain(dtype)) or ANYWHERE

    @property
    def support(self):
        return _end(self.bijectors, lambda layer: layer.support)

    def codomain(self, dtype) -> Domain:
        return _end(self.bijectors[::-1], lambda layer: layer.codomain(dtype)) or ANYWHERE

    @property
    def image(self):
        return _end(self.bijectors[::-1], lambda layer: layer.image)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        return fold(self.bijectors, lambda bijector, x, c: bijector(x, c), x, condition)

    def estimate(self, x: Array, key: Array | None, estimator: Estimator, condition: Array | None) -> Forward:
        log_det, diagnostics = no_log_det(x), []
        keys, estimators = split_key(key, self.bijectors), split_estimator(estimator, self.bijectors)
        for bijector, subkey, part in zip(self.bijectors, keys, estimators, strict=True):
            x, term, found = bijector.estimate(x, subkey, part, own_condition(bijector, condition))
            log_det, diagnostics = log_det + term, diagnostics + found
        return x, log_det, diagnostics

    def solve(self, y: Array, solver: Solver, condition: Array | None) -> Inverse:
        statuses = []
        for bijector in reversed(self.bijectors):
            y, found = bijector.solve(y, solver, own_condition(bijector, condition))
            statuses = found + statuses
        return y, statuses

    def solve_and_estimate(
        self, y: Array, key: Array | None, estimator: Estimator, solver: Solver, condition: Array | None
    ) -> InverseAndLogDet:
        log_det, diagnostics, statuses = no_log_det(y), [], []
        keys, estimators = split_key(key, self.bijectors), split_estimator(estimator, self.bijectors)
        for bijector, subkey, part in zip(*map(reversed, (self.bijectors, keys, estimators)), strict=True):
            inputs = y, subkey, part, solver, own_condition(bijector, condition)
            y, term, of_estimate, of_solve = bijector.solve_and_estimate(*inputs)
            log_det, diagnostics, statuses = log_det + term, of_estimate + diagnostics, of_solve + statuses
        return y, log_det, diagnostics, statuses

    def initialize(self, x: Array, condition: Array | None = None) -> Array:
        return fold(self.bijectors, lambda bijector, x, c: bijector.initialize(x, c), x, condition)

    def update_statistics(self, x: Array, condition: Array | None = None) -> Array:
        return fold(self.bijectors, lambda bijector, x, c: bijector.update_statistics(x, c), x, condition)

    def certified_bounds(self, blocks: list) -> tuple[float, float]:
        bounds = [bijector.certified_bounds(blocks) for bijector in self.bijectors]
        return math.prod(forward for forward, _ in bounds), math.prod(inverse for _, inverse in bounds)

    def lipschitz_bounds(self) -> tuple[float, float]:
        return self.certified_bounds([])

    def tighten(self) -> None:
        for bijector in self.bijectors:
            bijector.tighten()


def _end(bijectors: Sequence[Bijector], interval: Callable[[Bijector], Any]) -> Any:
    """The interval of values at the first layer, given as (low, high, ...); None if it is not known.

    Layers that only move elements are passed over if the ends after them are those of all elements.
    """
    for n, layer in enumerate(bijectors):
        if not isinstance(layer, Rearrangement):
            found = interval(layer)
            is_common = found is not None and all(np.ndim(end) == 0 for end in found[:2])
            return found if n == 0 or is_common else None
    return None


class Invert(Bijector):
    """The inverse f = g^-1 of a bijector g.

        y = g^-1(x),   x = g(y),   log|det dy/dx| = -log|det dg/dy| at y

    For a residual block, x -> y is then a solve and y -> x is explicit. If the solve of an example does not converge,
    an eager call raises an `InverseError`, and a compiled one returns NaN for this example. With the solver's
    `on_failure="warn"` y is the best guess. `initialize` and `update_statistics` leave g as it is.

    If applying g needs a solve, because g contains a `MonotoneBlock` or an `Invert`, then f^-1 runs this solve with the
    solver of that layer, and fails as that layer does. The `solver` argument of `inverse` is ignored there, and the
    status has 0 iterations and an infinite residual; its `converged` only says whether x is finite.

    Args:
      bijector: g, a bijection: it must not pad, and must have a log-det.
      solver: solver for the residual blocks inside g when f is applied; `Anderson(on_failure="raise")` by default.

    Randomness: as in g; the log-det estimate of `Roulette` is unbiased. Cost of f: a solve of every residual block of
    g, and its log-det if asked for. Cost of f^-1: one evaluation of g.

    Raises:
      ValueError: for anything but a `Bijector`, one that pads or has no log-det, and for anything but a `Solver`.
      InverseError: from an eager call of f, if a solve does not converge and `solver.on_failure` is "raise".

    Example:
      >>> log = rf.Invert(rf.Exp())
      >>> y, log_det = log.forward(jnp.ones((2, 3)))
      >>> y.shape, log_det.shape, log.inverse(y).tolist()[0]
      ((2, 3), (2,), [1.0, 1.0, 1.0])
    """

    def __init__(self, bijector: Bijector, solver: Solver | None = None):
        check_type("bijector", bijector, Bijector)
        self.bijector = bijector
        self.solver = Anderson(on_failure="raise") if solver is None else solver
        check_solver(self.solver)
        self.blocks, self.takes_noise = bijector.blocks, bijector.takes_noise
        if bijector.pads:
            raise ValueError("bijector: expected one without padding, which the inverse would drop; got one that pads")
        if bijector.no_density is not None:
            raise ValueError(f"bijector: expected a bijection; {bijector.no_density}")
        self.condition_shape = bijector.condition_shape
        self.event_shape = None if bijector.event_shape is None else bijector.output_shape(bijector.event_shape)

    def output_shape(self, shape: Shape) -> Shape:
        shape = super().output_shape(shape)
        check_output_shape(self.bijector, shape)
        return self.bijector.input_shape(shape)

    def _repr_parts(self, shape: Shape | None) -> Parts | None:
        inside = self.bijector._repr_parts(attempt(self.bijector.input_shape, shape))
        return None if inside is None else inside._replace(heading=f"{type(self).__name__} of {inside.heading}")

    def _repr_text(self, text: Callable[[Any], str]) -> str:
        is_default = self.solver == Anderson(on_failure="raise")
        return constructor(self, text, solver=None if is_default else text(self.solver))

    def input_shape(self, shape: Shape) -> Shape:
        return self.bijector.output_shape(shape)

    def domain(self, dtype) -> Domain:
        return self.bijector.codomain(dtype)

    @property
    def support(self):
        return self.bijector.image

    def codomain(self, dtype) -> Domain:
        return self.bijector.domain(dtype)

    @property
    def image(self):
        return self.bijector.support

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        y, statuses = self.bijector.solve(x, self.solver, condition)
        return self._reported(y, statuses)

    def estimate(self, x: Array, key: Array | None, estimator: Estimator, condition: Array | None) -> Forward:
        if self.blocks:
            refuse_dropout(self, estimator)
        y, log_det, diagnostics, statuses = self.bijector.solve_and_estimate(x, key, estimator, self.solver, condition)
        y, log_det = self._reported((y, log_det), statuses)
        return y, -log_det, diagnostics

    def solve(self, y: Array, solver: Solver, condition: Array | None) -> Inverse:
        x = self.bijector(y, condition)
        return x, [_status_of_map(self.bijector, x)]

    def solve_and_estimate(
        self, y: Array, key: Array | None, estimator: Estimator, solver: Solver, condition: Array | None
    ) -> InverseAndLogDet:
        x, log_det, diagnostics = self.bijector.estimate(y, key, estimator, condition)
        return x, -log_det, diagnostics, [_status_of_map(self.bijector, x)]

    def _reported(self, y, statuses):
        return reported(y, join_blocks(statuses), "Invert", self.solver.on_failure) if statuses else y

    def certified_bounds(self, blocks: list) -> tuple[float, float]:
        return self.bijector.certified_bounds(blocks)[::-1]

    def lipschitz_bounds(self) -> tuple[float, float]:
        return self.bijector.lipschitz_bounds()[::-1]

    def tighten(self) -> None:
        self.bijector.tighten()


def _status_of_map(bijector: Bijector, x: Array) -> InverseStatus:
    """The status [blocks, B] of an inverse x that is the map of a bijector; it fails where x is not finite.

    The residual of an explicit map is zero. That of a solve is not known, so that no finite bound holds for its error.
    """
    is_finite = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    is_finite = jnp.broadcast_to(is_finite, (bijector.blocks, x.shape[0]))
    residual = jnp.where(is_finite, math.inf if _solves_for_its_map(bijector) else 0, math.inf).astype(x.dtype)
    return InverseStatus(jnp.zeros(is_finite.shape, jnp.int32), residual, residual, is_finite)


def _solves_for_its_map(bijector: Bijector) -> bool:
    """Whether a layer inside has blocks and a solver of its own, such as `MonotoneBlock` and `Invert`."""
    layers = (layer for _, layer in nnx.iter_modules(bijector) if isinstance(layer, Bijector) and layer.blocks)
    return any(isinstance(getattr(layer, "solver", None), Solver) for layer in layers)


def _entrance(bijectors: Sequence[Bijector]) -> Shape | None:
    """The event shape of a chain, from the first layer that knows its own; None if none does."""
    for n, bijector in enumerate(bijectors):
        if bijector.event_shape is not None:
            shape = bijector.event_shape
            for before in reversed(bijectors[:n]):
                shape = before.input_shape(shape)
            return tuple(shape)
    return None
