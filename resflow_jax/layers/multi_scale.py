"""`MultiScale`: scales that factor out a part of z each."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import as_sequence, as_shape
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.solvers import Solver
from resflow_jax.functional.values import Domain
from resflow_jax.layers.bijector import (
    Apply,
    Bijector,
    Forward,
    Inverse,
    InverseAndLogDet,
    Shape,
    no_log_det,
    own_condition,
    split_estimator,
    split_key,
)
from resflow_jax.layers.composition import Composition
from resflow_jax.layers.module import List
from resflow_jax.layers.module_texts import Part, Parts

Array = jax.Array


class MultiScale(Composition):
    """Multi-scale map: after each scale but the last, half of the channels go straight to y.

        x_1 = x,   [x_(s+1), part_s] = scales[s](x_s),   part_S = scales[S](x_S),   y = [part_1, ..., part_S]
        log_det = sum of the log-dets of the scales

    x is [B, *shape]. y is [B, D]: the parts in the order of the scales, each flattened in row-major order. The first
    half of the last axis continues to the next scale, the second half is the part. A scale commonly ends in `Squeeze`.
    The inverse runs the scales backwards.

    Args:
      scales: the bijector of every scale.
      shape: shape of one x.

    Randomness: a key is split among the scales. Cost: the sum over the scales.

    Raises:
      ValueError: without scales, for events that do not chain, and for an odd number of channels to be halved.

    Source: Dinh et al. (2017, arXiv 1605.08803), section 3.6.

    Example:
      >>> scales = [rf.Squeeze((4, 4, 1)), rf.Squeeze((2, 2, 2))]
      >>> bijector = rf.MultiScale(scales, (4, 4, 1))
      >>> y = bijector(jnp.arange(16.0).reshape(1, 4, 4, 1))
      >>> y.shape, bijector.parts, bijector.inverse(y).shape
      ((1, 16), ((2, 2, 2), (1, 1, 8)), (1, 4, 4, 1))
    """

    def __init__(self, scales: Sequence[Bijector], shape: Shape):
        scales = as_sequence("scales", scales, "a list of bijectors")
        if not scales:
            raise ValueError("scales: expected at least one bijector, got none")
        self._take("scales", scales)
        self.scales = List(scales)
        self.shape = self.event_shape = as_shape("shape", shape)
        self.parts = tuple(self._part_shapes())

    def _part_shapes(self) -> list[Shape]:
        """The shape of the part of y that each scale gives."""
        shape, parts = self.shape, []
        for n, scale in enumerate(self.scales):
            try:
                shape = scale.output_shape(shape)
            except ValueError as error:
                raise ValueError(f"scales[{n}] ({type(scale).__name__}): {error}") from error
            if n < len(self.scales) - 1:
                if shape[-1] % 2:
                    raise ValueError(f"scales[{n}]: expected an even number of channels to halve, got events {shape}")
                shape = (*shape[:-1], shape[-1] // 2)
            parts.append(shape)
        return parts

    def output_shape(self, shape: Shape) -> Shape:
        super().output_shape(shape)
        return (sum(map(math.prod, self.parts)),)

    def _repr_parts(self, shape: Shape | None) -> Parts:
        return Parts(type(self).__name__, [*map(Part, self.scales, [self.shape, *self.parts])])

    def part_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        self.output_shape(shape)
        entrance = self.shape if len(self.scales) == 1 else self.parts[-2]
        return *self.parts[:-1], *self.scales[-1].part_shapes(entrance)

    def input_shape(self, shape: Shape) -> Shape:
        return self.shape

    def domain(self, dtype) -> Domain:
        return self.scales[0].domain(dtype)

    @property
    def support(self):
        return self.scales[0].support

    def _leaving(self, n: int, x: Array) -> tuple[Array, Array]:
        """The half that continues after scale n, and the part of y; after the last scale both are the whole."""
        return jnp.split(x, 2, axis=-1) if n < len(self.scales) - 1 else (x, x)

    def _entering(self, n: int, parts: Sequence[Array], x: Array | None) -> Array:
        """The output of scale n, from its part of y and from the half that continued."""
        return parts[n] if x is None else jnp.concatenate([x, parts[n]], axis=-1)

    def _joined(self, parts: Sequence[Array]) -> Array:
        """y from its parts."""
        return jnp.concatenate([part.reshape(part.shape[0], -1) for part in parts], axis=-1)

    def _parted(self, y: Array) -> list[Array]:
        """The parts of y, each in its shape."""
        ends = np.cumsum([math.prod(shape) for shape in self.parts])[:-1]
        pieces = jnp.split(y, ends, axis=-1)
        return [piece.reshape(y.shape[0], *shape) for piece, shape in zip(pieces, self.parts, strict=True)]

    def _fold(self, apply: Apply, x: Array, condition: Array | None) -> Array:
        """Runs x through apply(scale, x, condition) of every scale; the parts of y, joined."""
        parts = []
        for n, scale in enumerate(self.scales):
            x, part = self._leaving(n, apply(scale, x, own_condition(scale, condition)))
            parts.append(part)
        return self._joined(parts)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        return self._fold(lambda scale, x, c: scale(x, c), x, condition)

    def estimate(self, x: Array, key: Array | None, estimator: Estimator, condition: Array | None) -> Forward:
        keys, estimators = split_key(key, self.scales), split_estimator(estimator, self.scales)
        parts, log_det, diagnostics = [], no_log_det(x), []
        for n, scale in enumerate(self.scales):
            x, term, found = scale.estimate(x, keys[n], estimators[n], own_condition(scale, condition))
            log_det, diagnostics = log_det + term, diagnostics + found
            x, part = self._leaving(n, x)
            parts.append(part)
        return self._joined(parts), log_det, diagnostics

    def solve(self, y: Array, solver: Solver, condition: Array | None) -> Inverse:
        parts, x, statuses = self._parted(y), None, []
        for n, scale in reversed(list(enumerate(self.scales))):
            x, found = scale.solve(self._entering(n, parts, x), solver, own_condition(scale, condition))
            statuses = found + statuses
        return x, statuses

    def solve_and_estimate(
        self, y: Array, key: Array | None, estimator: Estimator, solver: Solver, condition: Array | None
    ) -> InverseAndLogDet:
        keys, estimators = split_key(key, self.scales), split_estimator(estimator, self.scales)
        parts, x, log_det, diagnostics, statuses = self._parted(y), None, no_log_det(y), [], []
        for n, scale in reversed(list(enumerate(self.scales))):
            inputs = self._entering(n, parts, x), keys[n], estimators[n], solver, own_condition(scale, condition)
            x, term, of_estimate, of_solve = scale.solve_and_estimate(*inputs)
            log_det, diagnostics, statuses = log_det + term, of_estimate + diagnostics, of_solve + statuses
        return x, log_det, diagnostics, statuses

    def initialize(self, x: Array, condition: Array | None = None) -> Array:
        return self._fold(lambda scale, x, c: scale.initialize(x, c), x, condition)

    def update_statistics(self, x: Array, condition: Array | None = None) -> Array:
        return self._fold(lambda scale, x, c: scale.update_statistics(x, c), x, condition)

    def certified_bounds(self, blocks: list) -> tuple[float, float]:
        lipschitz = inverse = 1.0
        for n, scale in enumerate(self.scales):
            forward, backward = scale.certified_bounds(blocks)
            if n > 0:  # the parts that left before are unchanged
                forward, backward = max(1.0, forward), max(1.0, backward)
            lipschitz, inverse = lipschitz * forward, inverse * backward
        return lipschitz, inverse

    def lipschitz_bounds(self) -> tuple[float, float]:
        return self.certified_bounds([])

    def tighten(self) -> None:
        for scale in self.scales:
            scale.tighten()
