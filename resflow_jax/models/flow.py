"""`ResidualFlow`: a normalizing flow of residual blocks, for images and for vectors.

    z = f(x),   log p(x) = log N(z; 0, I) + log|det df/dx|

The scales run in order; with factor-out, half of the channels leave for z behind each of them.
z is ordered scale by scale, the part factored out first in front, each part flattened in
H, W, C order. Every public method but `tighten` is compiled once per configuration and shape, and may be
called inside jit, grad, vmap and scan.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.checks import as_float_batch, check_count, check_key, check_type
from resflow_jax.functional.estimators import Estimator, Roulette, check_estimator
from resflow_jax.functional.inverse import check_solver, reported
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.logdet import Diagnostics
from resflow_jax.functional.norms import PowerIterationStatus
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.functional.tracing import run
from resflow_jax.layers.bijector import Chain, Constant, join_blocks, split_estimator, split_key
from resflow_jax.layers.certificate import tighten
from resflow_jax.layers.elementwise import Logit
from resflow_jax.layers.lipschitz import TIGHT, NormSettings, deferred_norms, map_linears
from resflow_jax.layers.module import List, Module
from resflow_jax.layers.norm_updates import update_norms
from resflow_jax.models.build import build_classifier, build_scales, feature_shapes
from resflow_jax.models.config import ImageFlowConfig, VectorFlowConfig, has_mixed_norms
from resflow_jax.models.values import ANYWHERE, UNIT_INTERVAL, behind_logit, checked

Array = jax.Array


class ResidualFlow(Module):
    """A residual flow; see the module's head for the map, `forward` for the estimators.

    The flow is a pytree (Flax NNX): its parameters are `nnx.Param`, its power-iteration vectors
    `NormState`, its running statistics `nnx.BatchStat`. Nothing random is stored. Parameters have
    JAX's default float dtype.

    Example:
      flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=2), rngs=nnx.Rngs(0))
      flow.initialize(x)                                  # ActNorm from a batch of data
      log_p = flow.log_prob(x, estimator=rf.Exact())      # [B]
    """

    def __init__(self, config: ImageFlowConfig | VectorFlowConfig, *, rngs: nnx.Rngs):
        """Makes a flow with random parameters, each linear layer's norm iterated to convergence."""
        if not isinstance(config, ImageFlowConfig | VectorFlowConfig):
            raise ValueError(f"config: expected ImageFlowConfig or VectorFlowConfig, got {type(config).__name__}")
        check_type("rngs", rngs, nnx.Rngs)
        if not hasattr(rngs, "params"):
            raise ValueError("rngs: expected a stream for params, as of nnx.Rngs(0) or nnx.Rngs(params=0), got none")
        create, static = _creator(config)
        state = create(rngs.params())
        self.config = config
        self.scales, self.classifier = nnx.merge(static["graphdef"], state)
        self._emitted = static["emitted"]
        if has_mixed_norms(config):  # learned ones start at 2, where any start will do
            map_linears(self, lambda layer: layer.search_norm())
            self.converge_norms()

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one x: (H, W, C) or (D,)."""
        return self.config.shape if isinstance(self.config, ImageFlowConfig) else (self.config.dim,)

    @property
    def dim(self) -> int:
        """D, the number of elements of one z; more than those of one x if the flow pads x."""
        return sum(math.prod(shape) for shape in self._emitted)

    @property
    def factors_out(self) -> bool:
        """Whether part of the channels leaves for z behind each scale."""
        return len(self._emitted) > 1

    @property
    def blocks(self) -> int:
        """Number of residual blocks."""
        return sum(scale.blocks for scale in self.scales)

    def forward(
        self,
        x: Array,
        *,
        key: Array | None = None,
        estimator: Estimator | None = None,
        return_diagnostics: bool = False,
    ) -> tuple[Array, Array] | tuple[Array, Array, Diagnostics]:
        """Maps x to z with the log-det of the map.

        Args:
          x: floats [B, *event_shape]; for images in [0, 1], which `inverse` may leave by a little.
          key: PRNG key of the estimate; not needed by `Exact`, but by a flow that pads x with noise.
          estimator: how each block's log-det is found: `Exact()`, `Truncated(...)`, or
            `Roulette(...)`, the default, which is unbiased. The law of its lengths may be a
            `Fitted` with one row a residual block.
          return_diagnostics: whether to return the estimates' `Diagnostics` as well.

        Returns:
          (z, log_det) or (z, log_det, diagnostics): z [B, D]; log_det [B] = log|det dz/dx| in nats, less the
          log-density of the noise where x is padded (see `layers.padding`);
          diagnostics with a leading axis of residual blocks, in the order of the flow.

        Raises:
          ValueError: for a wrong rank, size or dtype, a missing key, and, where x is concrete (not
            traced), for values that are not finite or, for images behind a logit, beyond what `inverse` can return.
            Traced values beyond that give NaN.
        """
        check_key("key", key, optional=True)
        with self._checked_input(x) as x:
            graphdef, state = nnx.split(self)
            z, log_det, diagnostics = run(_forward, (graphdef,), state, x, key, self._checked(estimator))
        return (z, log_det, diagnostics) if return_diagnostics else (z, log_det)

    def __call__(self, x: Array) -> Array:
        """Maps x [B, *event_shape] to z [B, D], without the log-det; padding is by the mean of its noise."""
        with self._checked_input(x) as x:
            return _transform(*nnx.split(self), x)

    def logits(self, x: Array) -> Array:
        """Logits [B, classes] of the classifier on the flow's features (see `models.classifier`), for images x.

        Padding is by the mean of its noise. Costs one evaluation of every g. Raises ValueError for a flow whose config
        has no `classes`, and as `forward` for x.
        """
        if self.classifier is None:
            raise ValueError("classes: expected a flow whose config has classes, got none")
        with self._checked_input(x, are_data=True) as x:
            return _logits(*nnx.split(self), x)

    def inverse(
        self, z: Array, *, solver: Solver = Anderson(), return_status: bool = False
    ) -> Array | tuple[Array, InverseStatus]:
        """Maps z [B, D] to x [B, *event_shape], block by block.

        Args:
          z: floats [B, D].
          solver: the iteration of every block, with its tolerance and cap: `Anderson`, `FixedPoint`, `Broyden`.
          return_status: whether to return the status as well.

        Returns:
          x, or (x, `InverseStatus`) with fields [blocks, B] in the order of the flow. Without the status, an eager
          call warns or raises where a solve did not converge, as the solver says; inside a compiled program x is then
          the best guess, or NaN with on_failure="raise" (see `functional.inverse`). Differentiable in any mode, by
          the implicit function theorem. Behind a logit x may leave [0, 1] by alpha / (1 - 2 alpha).

        Raises:
          ValueError: for a wrong rank, size or dtype, for concrete values that are not finite, if solver is none.
          InverseError: from an eager call, if a solve did not converge and solver.on_failure is "raise".
        """
        z = as_float_batch("z", z, (self.dim,))
        check_solver(solver)
        with checked("z", z, self.dtype):
            return self._invert(z, solver, return_status, "ResidualFlow.inverse")

    def _invert(self, z: Array, solver: Solver, return_status: bool, what: str) -> Array | tuple[Array, InverseStatus]:
        """`inverse` of a z that has been checked."""
        rule, limits = solver.split(self.dtype)
        x, status = _inverse(*nnx.split(self), z, rule, limits)
        return (x, status) if return_status else reported(x, status, what, solver.on_failure)

    def log_prob(
        self,
        x: Array,
        *,
        key: Array | None = None,
        estimator: Estimator | None = None,
        return_diagnostics: bool = False,
    ) -> Array | tuple[Array, Diagnostics]:
        """log p(x) [B] in nats, of the continuous density of x. Arguments and errors as in `forward`.

        Unbiased with `Roulette` (also its gradients), exact with `Exact`, biased with `Truncated`. Of a flow that
        pads x with noise it is a lower bound in expectation (see `layers.padding`).
        """
        z, log_det, diagnostics = self.forward(x, key=key, estimator=estimator, return_diagnostics=True)
        log_prob = standard_normal_log_prob(z) + log_det
        return (log_prob, diagnostics) if return_diagnostics else log_prob

    def sample(
        self, key: Array, number: int, *, solver: Solver = Anderson(), return_status: bool = False
    ) -> Array | tuple[Array, InverseStatus]:
        """Draws x [number, *event_shape]: z from N(0, I), then `inverse`; images are clipped to [0, 1].

        Clipping moves the part of the density that the logit's alpha leaves outside of [0, 1]. With return_status,
        (x, status) as of `inverse`; without, what does not converge is reported as there.
        """
        check_key("key", key)
        check_count("number", number, 1)
        check_solver(solver)
        z = jax.random.normal(key, (number, self.dim), self.dtype)
        x, status = self._invert(z, solver, True, "")
        if isinstance(self.config, ImageFlowConfig):
            x = jnp.clip(x, 0, 1)
        return (x, status) if return_status else reported(x, status, "ResidualFlow.sample", solver.on_failure)

    def sample_and_log_prob(
        self,
        key: Array,
        number: int,
        *,
        estimator: Estimator | None = None,
        solver: Solver = Anderson(),
        return_diagnostics: bool = False,
    ) -> tuple[Array, Array] | tuple[Array, Array, Diagnostics]:
        """Draws x [number, *event_shape] with log p(x) [number] in nats, differentiable in the parameters.

        With E[log p(x) - log q(x)] as the loss, the flow learns an unnormalised density q from its own
        samples alone. The derivative is that of the path z -> x: z is fixed. Images are not clipped.

        Args:
          key: PRNG key of z and of the estimate.
          number: of samples.
          estimator: of the log-dets, as in `forward`.
          solver: of the inverse.
          return_diagnostics: whether to return the estimates' `Diagnostics` as well, as third.

        Raises:
          ValueError: for a number below 1, a bad estimator, and for a flow that pads x: its log p needs noise.
        """
        check_key("key", key)
        check_count("number", number, 1)
        z_key, estimator_key = jax.random.split(key)
        z = jax.random.normal(z_key, (number, self.dim), self.dtype)
        options = {"solver": solver, "return_diagnostics": return_diagnostics}
        return self.inverse_and_log_prob(z, key=estimator_key, estimator=estimator, **options)

    def inverse_and_log_prob(
        self,
        z: Array,
        *,
        key: Array | None = None,
        estimator: Estimator | None = None,
        solver: Solver = Anderson(),
        return_diagnostics: bool = False,
        return_status: bool = False,
    ) -> tuple[Array, ...]:
        """Maps z [B, D] to x [B, *event_shape] with log p(x) [B] in nats, differentiable in z and the parameters.

        As `sample_and_log_prob`, which draws z from N(0, I); each example's noise goes by its number in z.

        Args:
          z: floats [B, D].
          key: PRNG key of the estimate; not needed by `Exact`.
          estimator: of the log-dets, as in `forward`.
          solver: of the inverse.
          return_diagnostics: whether to return the estimates' `Diagnostics` as well.
          return_status: whether to return the `InverseStatus` of the solves, [blocks, B], as last; without it, what
            does not converge is reported as by `inverse`: inside a compiled program it can only be NaN, or nothing.

        Raises:
          ValueError: for a wrong rank, size or dtype, a bad estimator, and for a flow that pads x: its log p needs
            noise.
        """
        z = as_float_batch("z", z, (self.dim,))
        check_key("key", key, optional=True)
        check_solver(solver)
        if self.config.padding:
            raise ValueError(f"padding: expected a flow without padding, got {self.config.padding}")
        graphdef, state = nnx.split(self)
        rule, limits = solver.split(self.dtype)
        x, log_det, diagnostics, status = _sample(graphdef, state, z, key, self._checked(estimator), rule, limits)
        log_prob = standard_normal_log_prob(z.astype(self.dtype)) + log_det
        if not return_status:
            x, log_prob = reported((x, log_prob), status, "ResidualFlow.inverse_and_log_prob", solver.on_failure)
        return x, log_prob, *[diagnostics] * return_diagnostics, *[status] * return_status

    @property
    def dtype(self) -> np.dtype:
        """The float dtype of the parameters."""
        return next(node for _, node in nnx.iter_graph(self) if isinstance(node, nnx.Param)).dtype  # of the first

    def initialize(self, x: Array) -> None:
        """Sets every ActNorm and running statistic from a batch x, in place, so that outputs are normalised.

        At least two examples, better hundreds: each statistic is taken over the batch. With an ActNorm in front, as by
        default, x may be in any unit, from 1e-20 to 1e20 and more in float32: training is the same.

        Raises:
          ValueError: for fewer examples, as `forward` for x, without a logit for images outside [0, 1] too, and where
            statistics overflow the dtype; the flow is then left as it was.
        """
        with self._checked_input(x, are_data=True) as x:
            if x.shape[0] < 2:
                raise ValueError(f"x: expected at least 2 examples to take statistics over, got {x.shape[0]}")
            state, is_finite = _initialize(*nnx.split(self), x)
        if not isinstance(is_finite, jax.core.Tracer) and not is_finite:
            raise ValueError(
                f"x: expected values whose statistics are finite in {self.dtype}, got a batch where they overflow"
            )
        nnx.update(self, state)

    def update_norms(
        self,
        *,
        tolerance: float | Array = 1e-3,
        residual_tolerance: float | Array | None = None,
        max_iterations: int | Array = 20,
        restart: bool = False,
    ) -> PowerIterationStatus:
        """Advances the power iteration of every linear layer, in place, warm-started.

        To be called after a change of parameters, as after every optimiser step. Works under
        `nnx.jit`. Before evaluation call `converge_norms`, which goes much further.

        Args:
          tolerance: on the relative change of sigma; see `functional.norms.power_iteration`. New values of this and
            of the next two compile nothing new, and may be traced.
          residual_tolerance: on the residual; by default the square root of `tolerance`.
          max_iterations: cap on the iterations of each layer.
          restart: whether a second chain makes sure that no layer's vectors miss its norm. Without it, what they lack
            grows out from call to call.

        Returns:
          The status of the slowest layer: most iterations, largest residual, whether all converged.

        Raises:
          ValueError: for a tolerance that is not positive or a cap below one, unless it is traced.
        """
        settings = NormSettings.of(tolerance, residual_tolerance, max_iterations)
        state, status = _update_norms(*nnx.split(self), settings, restart)
        nnx.update(self, state)
        return status

    def converge_norms(self) -> PowerIterationStatus:
        """Runs the power iteration of every linear layer far, in place; see `update_norms`.

        To a residual of 1e-5 or for 1000 iterations, which tells singular values apart that differ by
        0.2 %; sigma is low by less than that. A second chain of each layer makes sure that its vectors miss
        nothing. An eager call waits for the result, and raises a RuntimeWarning if a layer's residual stays above
        1e-2. Inside a compiled program there is no warning: look at the status that it returns.
        """
        status = self.update_norms(**TIGHT._asdict(), restart=True)
        if not isinstance(status.residual, jax.core.Tracer):
            _warn_norms(status)
        return status

    def tighten(self) -> None:
        """Rescales kernels, in place, until every block is certified within what its coefficients promise.

        Power iteration knows norms from below: after training some kernels exceed their coefficient by
        parts of a percent. Each block that `certify` does not find within its promise has its kernels
        replaced by what is applied, each divided by its excess. On the host, at the cost of `certify`.
        """
        for scale in self.scales:
            tighten(scale)

    def order_loss(self) -> Array:
        """Mean norm of the linear layers, differentiable in the learnable orders of these norms alone; a scalar.

        Where it is small, kernels are shrunk least (Chen et al. 2019, section 3.3). To be added to the
        training loss with a small weight, as `training.likelihood.tend` does.
        """
        losses = map_linears(self, lambda layer: layer.order_loss())
        return jnp.mean(jnp.concatenate([jnp.atleast_1d(loss) for loss in losses]))

    def norm_orders(self) -> np.ndarray:
        """The orders of the norms before and behind every linear layer, given or learned, [layers, 2]; on the host."""
        orders = map_linears(self, lambda layer: jnp.stack([jnp.asarray(p, float) for p in layer.traced_orders()]))
        return np.concatenate([np.reshape(pair, (-1, 2)) for pair in orders])

    def update_statistics(self, x: Array) -> None:
        """Moves all running statistics (`MovingBatchNorm`, `MovingCentering`) towards those of a batch x, in place.

        To be called at every training step of a flow that has any; the log-density never does it.
        """
        with self._checked_input(x) as x:
            state = _update_statistics(*nnx.split(self), x)
        nnx.update(self, state)

    def _checked(self, estimator: Estimator | None) -> Estimator:
        """The estimator, or the default, with one row a residual block where it has arrays."""
        estimator = Roulette() if estimator is None else estimator
        check_estimator(estimator)
        return _with_rows(estimator, self.blocks)

    @contextmanager
    def _checked_input(self, x: Any, *, are_data: bool = False) -> Iterator[Array]:
        """x as an array of JAX, its values checked around a computation: they may be a flow's input, or are data."""
        batch = as_float_batch("x", x, self.event_shape)
        dtype, domain = self.dtype, ANYWHERE
        if isinstance(self.config, ImageFlowConfig):
            if self.config.logit_alpha is not None:
                domain = behind_logit(self.config.logit_alpha, dtype)
            elif are_data:  # without a logit samples may be anywhere
                domain = UNIT_INTERVAL
        with checked("x", x if isinstance(x, np.ndarray) else batch, dtype, domain):
            yield batch


def standard_normal_log_prob(z: Array) -> Array:
    """log N(z; 0, I), [B] in nats, for z [B, D]."""
    return -0.5 * jnp.sum(z**2, axis=-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


@lru_cache(maxsize=16)
def _creator(config):
    """One compiled program that makes all parameters; what is not an array leaves it by the side."""
    static = {}

    @jax.jit
    def create(key):
        rngs = nnx.Rngs(key)
        with deferred_norms():
            scales, emitted = build_scales(config, rngs)
        scales = List(scales)
        update_norms(scales, TIGHT, restart=False)  # their vectors are random: they lack nothing
        static["graphdef"], state = nnx.split((scales, build_classifier(config, rngs)))
        static["emitted"] = tuple(emitted)
        return state

    return create, static


def _warn_norms(status: PowerIterationStatus) -> None:
    if not status.residual <= 1e-2:  # also if it is NaN
        warnings.warn(
            f"power iteration: a layer is far from converged after {status.iterations} iterations; largest residual "
            f"{status.residual:.1e}",
            RuntimeWarning,
            stacklevel=3,
        )


def _join(parts: list[Array]) -> Array:
    return jnp.concatenate([part.reshape(part.shape[0], math.prod(part.shape[1:])) for part in parts], axis=-1)


def _through_scales(flow: ResidualFlow, scales: Sequence[Chain], x: Array, apply) -> Array:
    """Runs x through the scales by apply(index, scale, x); the parts of z, joined."""
    parts = []
    for n, scale in enumerate(scales):
        x = apply(n, scale, x)
        if n < len(flow._emitted) - 1:
            x, emitted = jnp.split(x, 2, axis=-1)
            parts.append(emitted)
    return _join([*parts, x])


def _with_rows(estimator: Estimator, blocks: int) -> Estimator:
    """An estimator whose arrays, if it has any, have one row a residual block."""

    def rows(table):
        if table.ndim == 1:
            return jnp.broadcast_to(table, (blocks, table.size))
        if table.shape[0] != blocks:
            raise ValueError(f"estimator: expected a table with {blocks} rows, one a block, got shape {table.shape}")
        return table

    return jax.tree.map(rows, estimator)


def _forward(graphdef, state, x, key, estimator):
    flow = nnx.merge(graphdef, state)
    return _forward_scales(flow, flow.scales, x.astype(flow.dtype), key, estimator)


def _forward_scales(flow, scales, x, key, estimator):
    keys, estimators = split_key(key, scales), split_estimator(estimator, scales)
    log_dets, diagnostics = [], []

    def apply(n, scale, x):
        x, log_det, found = scale.forward(x, keys[n], estimators[n])
        log_dets.append(log_det)
        diagnostics.extend(found)
        return x

    z = _through_scales(flow, scales, x, apply)
    return z, sum(log_dets), join_blocks(diagnostics)


@partial(jax.jit, static_argnames="graphdef")
def _transform(graphdef, state, x):
    flow = nnx.merge(graphdef, state)
    return _through_scales(flow, flow.scales, x.astype(flow.dtype), lambda _, scale, x: scale(x))


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef, state, x):
    flow = nnx.merge(graphdef, state)
    return flow.classifier(_features(flow, x.astype(flow.dtype), lambda scale, x: scale(x)))


def _features(flow, x, apply):
    """The features [B, H, W, C] of every scale by apply(scale, x); see `models.classifier`."""
    outputs = []

    def keep(_, scale, x):
        outputs.append(apply(scale, x))
        return outputs[-1]

    _through_scales(flow, flow.scales, x, keep)
    if flow.factors_out:
        emitted = [jnp.split(output, 2, axis=-1)[1] for output in outputs[:-1]]
        return [*emitted, emitted[-1]]
    shapes = feature_shapes(flow.config)
    return [output.reshape(-1, *shape) for output, shape in zip(outputs, shapes, strict=True)]


@partial(jax.jit, static_argnames="graphdef")
def _initialize(graphdef, state, x):
    flow = nnx.merge(graphdef, state)
    x = x.astype(flow.dtype)
    if flow.classifier is None:
        _through_scales(flow, flow.scales, x, lambda _, scale, x: scale.initialize(x))
    else:
        flow.classifier.initialize(_features(flow, x, lambda scale, x: scale.initialize(x)))
    statistics = jax.tree.leaves(nnx.state(flow, (nnx.BatchStat, Constant)))
    is_finite = jnp.all(jnp.asarray([jnp.isfinite(leaf).all() for leaf in statistics], bool))
    return nnx.state(flow), is_finite


@partial(jax.jit, static_argnames="graphdef")
def _update_statistics(graphdef, state, x):
    flow = nnx.merge(graphdef, state)
    _through_scales(flow, flow.scales, x.astype(flow.dtype), lambda _, scale, x: scale.update_statistics(x))
    return nnx.state(flow, nnx.BatchStat)


@partial(jax.jit, static_argnames=("graphdef", "rule"))
def _inverse(graphdef, state, z, rule, limits):
    flow = nnx.merge(graphdef, state)
    return _inverse_scales(flow, flow.scales, z.astype(flow.dtype), rule.with_limits(limits))


@partial(jax.jit, static_argnames=("graphdef", "rule"))
def _sample(graphdef, state, z, key, estimator, rule, limits):
    """x, log_det, diagnostics and status, without a way through x where a logit has rounded it to 0 or 1."""
    flow, solver = nnx.merge(graphdef, state), rule.with_limits(limits)
    z = z.astype(flow.dtype)
    logit, *rest = flow.scales[0].bijectors
    if not isinstance(logit, Logit):
        x, status = _inverse_scales(flow, flow.scales, z, solver)
        return x, *_forward_scales(flow, flow.scales, x, key, estimator)[1:], status
    scales = [Chain(rest), *flow.scales[1:]]
    y, status = _inverse_scales(flow, scales, z, solver)
    _, log_det, diagnostics = _forward_scales(flow, scales, y, key, estimator)
    return logit.inverse(y, solver)[0], log_det + logit.log_det_at(y), diagnostics, status


def _inverse_scales(flow, scales, z, solver):
    sizes = [math.prod(shape) for shape in flow._emitted]
    pieces = jnp.split(z, np.cumsum(sizes)[:-1], axis=-1)
    parts = [piece.reshape(z.shape[0], *shape) for piece, shape in zip(pieces, flow._emitted, strict=True)]
    x, statuses = parts.pop(), []
    for scale in reversed(scales):
        x, found = scale.inverse(x, solver)
        statuses = found + statuses
        if parts:
            x = jnp.concatenate([x, parts.pop()], axis=-1)
    return x, join_blocks(statuses)


@partial(jax.jit, static_argnames=("graphdef", "restart"))
def _update_norms(graphdef, state, settings, restart):
    flow = nnx.merge(graphdef, state)
    status = update_norms(flow, settings, restart)
    return nnx.state(flow), status
