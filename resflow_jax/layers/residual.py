"""The residual block y = x + g(x), and a stack of equal layers run as one scan.

`functional.logdet` computes the log-det and `functional.inverse` the inverse.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.batch_axes import vary_over, varying_axes
from resflow_jax.functional.broadcasting import per_example
from resflow_jax.functional.checks import check_callable, check_count, check_type
from resflow_jax.functional.estimators import Estimator, reverse_orders
from resflow_jax.functional.inverse import solution
from resflow_jax.functional.logdet import residual
from resflow_jax.functional.reversible import reversible_scan
from resflow_jax.functional.solvers import Solver
from resflow_jax.functional.values import Domain
from resflow_jax.layers.bijector import (
    Bijector,
    Forward,
    Inverse,
    InverseAndLogDet,
    Shape,
    as_row,
    join_blocks,
)
from resflow_jax.layers.block_certificate import residual_bounds
from resflow_jax.layers.contraction_block import ContractionBlock
from resflow_jax.layers.lipschitz import TIGHT, deferred_norms, map_linears, norms_are_deferred
from resflow_jax.layers.module_texts import Part, Parts
from resflow_jax.layers.norm_updates import update_norms
from resflow_jax.layers.without_log_det import has_dropout

Array = jax.Array


class ResidualBlock(ContractionBlock):
    """Residual block with a contraction g in x.

        y = x + g(x)  or  y = x + g(x; c),   x: the fixed point of x -> y - g(x)
        log_det = log|det(I + dg/dx)| = sum_k (-1)^(k+1) tr((dg/dx)^k) / k

    Args:
      contraction: g. Either a `Contraction`, such as `LipschitzMLP`, which bounds its Lipschitz constant itself; or,
        with `lipschitz`, any module of Flax NNX that is called as module(x) or module(x, condition), keeps the shape of
        x [B, ...] and treats each example independently.
      lipschitz: L < 1 with |g(a; c) - g(b; c)| <= L |a - b| for every condition. The caller must guarantee it:
        `check_contraction` can refute it on data, nothing here proves it.
      event_shape: shape of one x, if g is a module and the shape is known.
      condition_shape: shape of one condition, if g is a module that takes one.

    Randomness: `forward` draws the estimate of the log-det [B], in nats, with its key; it is unbiased with `Roulette`,
    exact with `Exact`. y and the inverse are deterministic.

    Cost: one evaluation of g for the map. The log-det adds the vector-Jacobian products of the estimator. The inverse
    takes about log(tolerance) / log(Lip(g)) evaluations of g with `FixedPoint`, usually fewer with `Anderson`.

    Raises:
      ValueError: for a module without `lipschitz`, a `lipschitz` outside (0, 1), and for `lipschitz`, `event_shape` or
        `condition_shape` together with a `Contraction`.

    Source: Behrmann et al. (2019, arXiv 1811.00995); the unbiased log-det is by Chen et al. (2019, arXiv 1906.02735).

    Example:
      >>> class Half(nnx.Module):
      ...     def __call__(self, x):
      ...         return 0.5 * x
      >>> block = rf.ResidualBlock(Half(), lipschitz=0.5)
      >>> x = jnp.ones((3, 2))
      >>> y, log_det = block.forward(x, estimator=rf.Exact())
      >>> np.allclose(y, 1.5), np.allclose(log_det, 2 * np.log(1.5)), np.allclose(block.inverse(y), x, atol=1e-4)
      (True, True, True)
    """

    def _bounds_of_map(self, bound: float) -> tuple[float, float]:
        return residual_bounds(bound)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        return x + self.g(x, condition)

    def estimate(self, x: Array, key: Array | None, estimator: Estimator, condition: Array | None) -> Forward:
        y, log_det, diagnostics = self._estimated(residual, x, key, estimator, condition)
        return y, log_det, [as_row(diagnostics)]

    def solve(self, y: Array, solver: Solver, condition: Array | None) -> Inverse:
        return self._solved(y, solver, condition, orders=0)

    def solve_and_estimate(
        self, y: Array, key: Array | None, estimator: Estimator, solver: Solver, condition: Array | None
    ) -> InverseAndLogDet:
        x, statuses = self._solved(y, solver, condition, orders=reverse_orders(estimator))
        _, log_det, diagnostics = self.estimate(x, key, estimator, condition)
        return x, log_det, diagnostics, statuses

    def _solved(self, y: Array, solver: Solver, condition: Array | None, orders: int) -> Inverse:
        g, weights = self.contraction.apply, self.contraction.weights()
        x, status = solution(g, weights, y, self.contraction.condition_features(condition), solver, orders=orders)
        return x, [as_row(status)]


class ResidualStack(Bijector):
    """Layers of one structure, such as a residual block and the layers after it, composed and run as one scan.

    f = f_depth o ... o f_1, with log-dets and inverse as in `Chain`. The parameters are stacked on a leading axis, so
    program size and compile time do not grow with the depth.

    Args:
      make_step: makes one layer, a bijector that keeps the shape of its events, from `nnx.Rngs`. It is traced, and must
        create all modules of the layer itself. A layer may be a stack.
      depth: number of layers.
      rngs: gives every layer parameters of its own.

    Attributes:
      reversible: None, or a solver, which `rf.make_reversible` sets. Then gradients keep no layer's input.

    Randomness: a key is split among the layers. Cost: the sum over the layers.

    Raises:
      ValueError: for a depth below one, a `make_step` that returns no bijector, and layers that change the shape of
        events.

    Example:
      >>> stack = rf.ResidualStack(lambda rngs: rf.Affine((2,)), 3, rngs=nnx.Rngs(0))
      >>> y, log_det = stack.forward(jnp.ones((4, 2)))
      >>> stack.depth, y.shape, log_det.shape
      (3, (4, 2), (4,))
    """

    def __init__(self, make_step: Callable[[nnx.Rngs], Bijector], depth: int, *, rngs: nnx.Rngs):
        check_callable("make_step", make_step)
        check_count("depth", depth, 1)
        depth = int(depth)  # NNX takes no integer of NumPy
        check_type("rngs", rngs, nnx.Rngs)
        self.depth = depth
        self.reversible: Solver | None = None
        with deferred_norms():
            self.steps = nnx.vmap(make_step)(rngs.split(depth))
        check_type("make_step", self.steps, Bijector)
        if not norms_are_deferred():
            map_linears(self.steps, lambda layer: layer.search_norm())
            update_norms(self.steps, TIGHT, restart=False)  # random vectors need no restart
        self.blocks = depth * self.steps.blocks
        self.takes_noise = self.steps.takes_noise
        self.pads = self.steps.pads
        self.no_density = self.steps.no_density
        self.condition_shape = self.steps.condition_shape
        self.event_shape = self.steps.event_shape
        if self.event_shape is not None:
            self.output_shape(self.event_shape)

    def output_shape(self, shape: Shape) -> Shape:
        found = self.steps.output_shape(shape)
        if found != tuple(shape):
            raise ValueError(f"expected layers that keep the shape of events {tuple(shape)}, got {found}")
        return found

    def _repr_text(self, text: Callable[[Any], str]) -> str:
        step = text(self.steps)
        step = step[len("Chain(") : -1] if step.startswith("Chain([") else step
        return f"{type(self).__name__}({self.depth} x {step})"

    def _repr_parts(self, shape: Shape | None) -> Parts:
        inside = self.steps._repr_parts(shape) or Parts("", [Part(self.steps, shape)])
        return inside._replace(heading=f"{type(self).__name__}: {self.depth} x")

    def domain(self, dtype: Any) -> Domain:
        return self.steps.domain(dtype)

    @property
    def support(self):
        return self.steps.support

    def codomain(self, dtype: Any) -> Domain:
        return self.steps.codomain(dtype)

    @property
    def image(self):
        return self.steps.image

    def unstacked(self) -> list[Bijector]:
        """Copies of the layers, as a list of `depth` bijectors."""
        graphdef, stacked = nnx.split(self.steps)
        leaves, structure = jax.tree.flatten(stacked)
        rows = [_rows_of(leaf) for leaf in leaves]
        return [nnx.merge(graphdef, structure.unflatten([row[n] for row in rows])) for n in range(self.depth)]

    def _scan(self, body, carry, xs=None, *, condition: Array | None, reverse: bool = False):
        """Scans body(step, carry, x) -> (carry, out) over the steps. The body may close over the condition."""
        graphdef, stacked = nnx.split(self.steps)

        def apply(carry, inputs):
            state, x = inputs
            return body(nnx.merge(graphdef, state), carry, x)

        carry = vary_over(carry, varying_axes((carry, stacked, condition)))
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(stacked) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        if dtypes - {carry.dtype}:  # a step may promote x; a scan takes x in the dtype that it returns
            first = jax.tree.map(lambda leaf: leaf[0], (stacked, xs))
            carry = carry.astype(jax.eval_shape(apply, carry, first)[0].dtype)
        return jax.lax.scan(apply, carry, (stacked, xs), length=self.depth, reverse=reverse)

    def _inputs(self, key: Array | None, estimator: Estimator) -> tuple[Array | None, Estimator]:
        """Key and estimator of every layer, with a leading axis of layers."""
        keys = None if key is None or not self.takes_noise else jax.random.split(key, self.depth)
        return keys, jax.tree.map(lambda rows: rows.reshape(self.depth, self.steps.blocks, *rows.shape[1:]), estimator)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        if self.reversible is not None:
            return self._reversibly(lambda step, x, _, condition: (step(x, condition), [], []), x, None, condition)[0]
        return self._scan(lambda step, x, _: (step(x, condition), None), x, condition=condition)[0]

    def estimate(self, x: Array, key: Array | None, estimator: Estimator, condition: Array | None) -> Forward:
        def apply(step, x, inputs, condition):
            x, log_det, diagnostics = step.estimate(x, *inputs, condition)
            return x, log_det, _joined(diagnostics)

        def body(step, x, inputs):
            x, *rest = apply(step, x, inputs, condition)
            return x, rest

        inputs = self._inputs(key, estimator)
        if self.reversible is not None and not has_dropout(estimator):  # the inverse does not know what was dropped
            x, log_dets, diagnostics = self._reversibly(apply, x, inputs, condition)
        else:
            x, (log_dets, diagnostics) = self._scan(body, x, inputs, condition=condition)
        return x, jnp.sum(log_dets, axis=0), _merged(diagnostics)

    def _reversibly(self, apply, x: Array, inputs: Any, condition: Array | None) -> tuple[Array, Any, Any]:
        """Scans apply(step, x, inputs, condition) -> (x, log_det, more); gradients recompute the input of each step."""
        (graphdef, stacked), solver = nnx.split(self.steps), self.reversible

        def apply_state(state, x, inputs, condition):
            return apply(nnx.merge(graphdef, state), x, inputs, condition)

        def invert(state, y, condition):
            x, statuses = nnx.merge(graphdef, state).solve(y, solver, condition)
            for status in statuses:
                x = jnp.where(per_example(jnp.all(status.converged, axis=0), x), x, jnp.nan)
            return x

        return reversible_scan(apply_state, invert, stacked, x, inputs, condition, self.depth)

    def solve(self, y: Array, solver: Solver, condition: Array | None) -> Inverse:
        def body(step, y, _):
            x, statuses = step.solve(y, solver, condition)
            return x, _joined(statuses)

        x, statuses = self._scan(body, y, condition=condition, reverse=True)
        return x, _merged(statuses)

    def solve_and_estimate(
        self, y: Array, key: Array | None, estimator: Estimator, solver: Solver, condition: Array | None
    ) -> InverseAndLogDet:
        def body(step, y, inputs):
            x, log_det, diagnostics, statuses = step.solve_and_estimate(y, *inputs, solver, condition)
            return x, (log_det, _joined(diagnostics), _joined(statuses))

        inputs = self._inputs(key, estimator)
        x, (log_dets, diagnostics, statuses) = self._scan(body, y, inputs, condition=condition, reverse=True)
        return x, jnp.sum(log_dets, axis=0), _merged(diagnostics), _merged(statuses)

    def initialize(self, x: Array, condition: Array | None = None) -> Array:
        return self._changing(lambda step, x: step.initialize(x, condition), x, condition)

    def update_statistics(self, x: Array, condition: Array | None = None) -> Array:
        return self._changing(lambda step, x: step.update_statistics(x, condition), x, condition)

    def _changing(self, apply: Callable[[Bijector, Array], Array], x: Array, condition: Array | None) -> Array:
        """Runs x through apply(step, x) of every step, and stores the changed state of the steps."""

        def body(step, x, _):
            x = apply(step, x)
            return x, nnx.state(step)

        x, stacked = self._scan(body, x, condition=condition)
        nnx.update(self.steps, stacked)
        return x

    def certified_bounds(self, blocks: list) -> tuple[float, float]:
        lipschitz = inverse = 1.0
        for layer in self.unstacked():
            forward, backward = layer.certified_bounds(blocks)
            lipschitz, inverse = lipschitz * forward, inverse * backward
        return lipschitz, inverse

    def lipschitz_bounds(self) -> tuple[float, float]:
        return self.certified_bounds([])

    def tighten(self) -> None:
        layers = self.unstacked()
        for layer in layers:
            layer.tighten()

        def restacked(old, *rows):
            return _beside(old, np.stack(rows)) if _lies_on_one_device(old) else jnp.stack(rows)

        nnx.update(self.steps, jax.tree.map(restacked, nnx.state(self.steps), *map(nnx.state, layers)))


def _rows_of(stacked: Array) -> list[Array]:
    """The rows of an array. JAX would compile a program for each of its slices, so the host cuts it where it can."""
    if not _lies_on_one_device(stacked):
        return list(stacked)
    return [_beside(stacked, row) for row in np.asarray(stacked)]


def _lies_on_one_device(x: Array) -> bool:
    """Whether the host can copy x and put a part of it back: it is neither traced, nor divided, nor made of keys."""
    if not isinstance(x, Array) or isinstance(x, jax.core.Tracer) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return False
    return len(x.sharding.device_set) == 1 and x.is_fully_addressable


def _beside(x: Array, array: np.ndarray) -> Array:
    """An array of the host on the device of x, and tied to it as x is."""
    if x.committed:
        return jax.device_put(array, next(iter(x.devices())))
    with jax.default_device(next(iter(x.devices()))):
        return jax.device_put(array)


def _joined(parts: list) -> Any:
    """The parts of one layer as one, for a scan to stack; None for a layer without residual blocks."""
    return join_blocks(parts) if parts else None


def _merged(stacked: Any) -> list:
    """[leaves of shape [blocks, ...]] from leaves [layers, blocks of a layer, ...]; an empty list for None."""
    return [] if stacked is None else [jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stacked)]
