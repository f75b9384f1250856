"""`Flow`: a normalizing flow, made of a bijector and a base distribution.

    z = f(x; c),   log p(x | c) = log p_base(z | c) + log|det df/dx|

Every public method but `tighten` is compiled once per structure and shape, and may be called inside jit, grad, vmap and
scan.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import as_float_batch, check_count, check_key, check_type
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.inverse import check_solver, reported
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.logdet import Diagnostics
from resflow_jax.functional.norms import PowerIterationStatus
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.functional.texts import count, setting
from resflow_jax.functional.tracing import run
from resflow_jax.functional.values import Domain, checked
from resflow_jax.layers.bijector import Bijector, Constant, checked_estimator, join_diagnostics, join_statuses
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.conditions import ConditionShape, as_condition, common_condition_shape
from resflow_jax.layers.lipschitz import TIGHT, LipschitzLinear, NormSettings, map_linears
from resflow_jax.layers.module import Module
from resflow_jax.layers.module_texts import Part, Parts
from resflow_jax.layers.norm_updates import update_norms
from resflow_jax.models.bases import StandardNormal, as_base

Array = jax.Array
Shape = tuple[int, ...]


class Flow(Module):
    """The density of x = f^-1(z), z from a base distribution; see the module's head.

    The flow is a pytree (Flax NNX): its parameters are `nnx.Param`, its power-iteration vectors `NormState`, its
    running statistics `nnx.BatchStat`, what a batch has set `Constant`. Nothing random is stored.

    Attributes:
      bijector: f.
      base: the distribution of z.
      event_shape: of one x.
      condition_shape: of one condition; None for p(x), `...` for whatever is given.

    Example:
      bijector = rf.Chain([rf.ActNorm((6,)), rf.ResidualBlock(rf.LipschitzMLP(6, (64, 64), rngs=rngs))])
      flow = rf.Flow(bijector, base=rf.StandardNormal((6,)))
      flow.initialize(x)                                  # ActNorm from a batch of data
      log_p = flow.log_prob(x, estimator=rf.Exact())      # [B]
    """

    def __init__(self, bijector: Bijector, base: Any = None, *, event_shape: Shape | None = None):
        """Composes a flow.

        Args:
          bijector: f, from x to z.
          base: of z: a `Base`, as `StandardNormal`, or any object with log_prob(z) [B] and sample(key, n) [n, ...]. By
            default `StandardNormal` of what f puts out.
          event_shape: of one x; only needed where neither f nor the base tells.

        Raises:
          ValueError: where the shapes do not fit, or the conditions; the message names both sides.
        """
        check_type("bijector", bijector, Bijector)
        if event_shape is None:
            event_shape = bijector.event_shape
        if event_shape is None and getattr(base, "event_shape", None) is not None:
            event_shape = bijector.input_shape(tuple(base.event_shape))
        if event_shape is None:
            raise ValueError(
                "event_shape: expected the shape of one x, which neither bijector nor base tells, got None; pass "
                "event_shape=..., or a base with a shape, as StandardNormal((3,))"
            )
        event_shape = tuple(event_shape)
        try:
            latent_shape = bijector.output_shape(event_shape)
        except ValueError as error:
            raise ValueError(f"bijector: {error}") from error
        self.bijector = bijector
        self.base = StandardNormal(latent_shape) if base is None else as_base(base, latent_shape)
        if tuple(self.base.event_shape) != latent_shape:
            raise ValueError(
                f"base: expected a distribution of events {latent_shape}, which the bijector makes of {event_shape}, "
                f"got one of {tuple(self.base.event_shape)}"
            )
        self.event_shape = event_shape
        parts = ("bijector", bijector.condition_shape), ("base", self.base.condition_shape)
        self.condition_shape: ConditionShape = common_condition_shape(parts)

    def _repr_text(self, text: Callable[[Any], str]) -> str:
        return f"{type(self).__name__}({self.event_shape} to {self.latent_shape}, blocks={self.blocks})"

    def _repr_parts(self, shape: Shape | None) -> Parts:
        others = {name: value for name, value in vars(self).items() if isinstance(value, nnx.Module)}
        bijector = others.pop("bijector")
        is_chain = isinstance(bijector, Chain) and len(bijector.bijectors) > 0
        parts = bijector._repr_parts(self.event_shape).parts if is_chain else [Part(bijector, self.event_shape)]
        shapes = {"base": self.latent_shape}
        parts = parts + [Part(value, shapes.get(name), f"{name}: ") for name, value in others.items()]
        facts = [f"x {self.event_shape}, z {self.latent_shape}", count(self.blocks, "residual block"), f"{self.dtype}"]
        if self.condition_shape is not None:
            facts.insert(1, f"condition {setting(self.condition_shape)}")
        return Parts(type(self).__name__, parts, tuple(facts))

    @property
    def latent_shape(self) -> Shape:
        """Shape of one z."""
        return tuple(self.base.event_shape)

    @property
    def dim(self) -> int:
        """D, the number of elements of one z; more than those of one x if the flow pads x."""
        return math.prod(self.latent_shape)

    @property
    def blocks(self) -> int:
        """Number of residual blocks."""
        return self.bijector.blocks

    @property
    def pads(self) -> bool:
        """Whether the flow appends noise to x, and so is no bijection (see `layers.padding`)."""
        return self.bijector.pads

    @property
    def dtype(self) -> np.dtype:
        """The float dtype of the parameters, that of the first; JAX's default where there are none."""
        for _, node in nnx.iter_graph(self):
            if isinstance(node, nnx.Param) and jnp.issubdtype(node.dtype, jnp.floating):
                return node.dtype
        return jnp.result_type(float)

    def forward(
        self,
        x: Array,
        *,
        condition: Array | None = None,
        key: Array | None = None,
        estimator: Estimator | None = None,
        return_diagnostics: bool = False,
    ) -> tuple[Array, Array] | tuple[Array, Array, Diagnostics]:
        """Maps x to z with the log-det of the map.

        Args:
          x: floats [B, *event_shape]; for images behind a logit in [0, 1], which `inverse` may leave by a little.
          condition: floats [*condition_shape], one for all examples, or [B, *condition_shape], one each.
          key: PRNG key of the estimate; not needed by `Exact`, but by a flow that pads x with noise.
          estimator: how each block's log-det is found: `Exact()`, `Truncated(...)`, or
            `Roulette(...)`, the default, which is unbiased. The law of its lengths may be a
            `Fitted` with one row a residual block.
          return_diagnostics: whether to return the estimates' `Diagnostics` as well.

        Returns:
          (z, log_det) or (z, log_det, diagnostics): z [B, *latent_shape]; log_det [B] = log|det dz/dx| in nats, less
          the log-density of the noise where x is padded (see `layers.padding`);
          diagnostics with a leading axis of residual blocks, in the order of the flow.

        Raises:
          ValueError: for a wrong rank, size or dtype, a condition that is missing or not expected, a missing key, and,
            where x is concrete (not traced), for values that are not finite or, behind a logit, beyond what `inverse`
            can return. Traced values beyond that give NaN.
        """
        z, log_det, diagnostics = self._estimated(_forward, x, condition, key, estimator)
        return (z, log_det, diagnostics) if return_diagnostics else (z, log_det)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """Maps x [B, *event_shape] to z [B, *latent_shape], without the log-det. Padding is by its noise's mean."""
        with self._checked_input(x, condition) as (x, condition):
            return _transform(*nnx.split(self), x, condition)

    def features(self, x: Array, condition: Array | None = None) -> tuple[Array, ...]:
        """The parts of z = f(x), each in the shape that it had in the flow: one part a scale, the finest first.

        Of a flow of images that factors channels out, these are what leaves after every scale and what the last scale
        puts out, each [B, H, W, C]; of other flows of images the one part that z is flattened from; else z itself.
        Dense blocks on a flattened part leave it in the shape that it was flattened from. The parts are
        `split_latent(flow(x))`: their elements in order are z.

        Args:
          x: floats [B, *event_shape], as in `forward`.
          condition: as in `forward`.

        Returns:
          A tuple of floats [B, *shape], one for each of `part_shapes`. Nothing in it is random: a flow that pads x
          takes the mean of its noise.

        Cost: one evaluation of every g, without log-dets. `split_latent` of the z that `forward_and_log_prob` returns
        costs nothing beside that pass.

        Raises:
          ValueError: as `forward` for x and condition.

        Example:
          >>> scales = rf.Scales(factor_out=True)
          >>> config = rf.ImageFlowConfig((4, 4, 1), blocks=(1, 1), hidden_channels=2, scales=scales)
          >>> flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
          >>> [part.shape for part in flow.features(jnp.full((3, 4, 4, 1), 0.5))]
          [(3, 2, 2, 2), (3, 2, 2, 2)]
        """
        return self.split_latent(self(x, condition))

    @property
    def part_shapes(self) -> tuple[Shape, ...]:
        """The shapes of the parts that one z is made of, in order (see `features`)."""
        return self.bijector.part_shapes(self.event_shape)

    def split_latent(self, z: Array) -> tuple[Array, ...]:
        """The parts [B, *shape] of z [B, *latent_shape], one for each of `part_shapes`, in the order of z.

        Raises:
          ValueError: for a z of another shape or dtype.
        """
        z = as_float_batch("z", z, self.latent_shape)
        sizes = [math.prod(shape) for shape in self.part_shapes]
        pieces = jnp.split(z.reshape(z.shape[0], self.dim), np.cumsum(sizes)[:-1], axis=1)
        return tuple(piece.reshape(-1, *shape) for piece, shape in zip(pieces, self.part_shapes, strict=True))

    def join_latent(self, parts: Sequence[Array]) -> Array:
        """z [B, *latent_shape] of its parts, in the order of `split_latent`, whose inverse it is.

        Raises:
          ValueError: for another number of parts than `part_shapes` has, and for a part of another shape or dtype.
        """
        shapes, parts = self.part_shapes, list(parts)
        if len(parts) != len(shapes):
            raise ValueError(f"parts: expected {len(shapes)}, of the shapes {shapes}, got {len(parts)}")
        arrays = [as_float_batch(f"parts[{n}]", *pair) for n, pair in enumerate(zip(parts, shapes, strict=True))]
        sizes = {array.shape[0] for array in arrays}
        if len(sizes) > 1:
            raise ValueError(f"parts: expected one number of examples in all, got {sorted(sizes)}")
        z = jnp.concatenate([array.reshape(array.shape[0], -1) for array in arrays], axis=1)
        return z.reshape(-1, *self.latent_shape)

    def inverse(
        self, z: Array, *, condition: Array | None = None, solver: Solver = Anderson(), return_status: bool = False
    ) -> Array | tuple[Array, InverseStatus]:
        """Maps z [B, *latent_shape] to x [B, *event_shape], block by block.

        Args:
          z: floats [B, *latent_shape].
          condition: as of `forward`.
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
        z = as_float_batch("z", z, self.latent_shape)
        check_solver(solver)
        own = self._condition(condition, z.shape[:1])
        with checked("z", z, self.dtype), self._finite(condition):
            return self._invert(z, own, solver, return_status, f"{type(self).__name__}.inverse")

    def _invert(
        self, z: Array, condition: Array | None, solver: Solver, return_status: bool, what: str
    ) -> Array | tuple[Array, InverseStatus]:
        """`inverse` of a z that has been checked."""
        rule, limits = solver.split(self.dtype)
        x, status = _inverse(*nnx.split(self), z, rule, limits, condition)
        return (x, status) if return_status else reported(x, status, what, solver.on_failure)

    def log_prob(
        self,
        x: Array,
        *,
        condition: Array | None = None,
        key: Array | None = None,
        estimator: Estimator | None = None,
        return_diagnostics: bool = False,
    ) -> Array | tuple[Array, Diagnostics]:
        """log p(x | c) [B] in nats, of the continuous density of x. Arguments and errors as in `forward`.

        Unbiased with `Roulette` (also its gradients), exact with `Exact`, biased with `Truncated`. Of a flow that
        pads x with noise it is a lower bound in expectation (see `layers.padding`).
        """
        log_prob, diagnostics = self._estimated(_log_prob, x, condition, key, estimator)
        return (log_prob, diagnostics) if return_diagnostics else log_prob

    def forward_and_log_prob(
        self,
        x: Array,
        *,
        condition: Array | None = None,
        key: Array | None = None,
        estimator: Estimator | None = None,
        return_diagnostics: bool = False,
    ) -> tuple[Array, Array] | tuple[Array, Array, Diagnostics]:
        """Maps x to z, with log p(x | c), in one pass through the flow. Arguments and errors as in `forward`.

        Returns:
          (z, log_prob) or (z, log_prob, diagnostics): z [B, *latent_shape] and log_prob [B] in nats are those of
          `forward` and `log_prob` with the same key; see there for what is unbiased.

        Cost: that of `forward`, and one evaluation of the base.

        Example:
          >>> flow = rf.Flow(rf.ActNorm((2,)), rf.StandardNormal((2,)))
          >>> z, log_prob = flow.forward_and_log_prob(jnp.zeros((3, 2)))
          >>> z.shape, log_prob.shape
          ((3, 2), (3,))
        """
        z, log_prob, diagnostics = self._estimated(_forward_and_log_prob, x, condition, key, estimator)
        return (z, log_prob, diagnostics) if return_diagnostics else (z, log_prob)

    def _estimated(self, function: Callable[..., Any], x: Any, condition: Any, key: Any, estimator: Any) -> Any:
        """function(graphdef, state, x, key, estimator, condition) of what a caller gave, checked, as one program."""
        check_key("key", key, optional=True)
        estimator = checked_estimator(estimator, self.blocks)
        with self._checked_input(x, condition) as (x, condition):
            graphdef, state = nnx.split(self)
            return run(function, (graphdef,), state, x, key, estimator, condition)

    def base_log_prob(self, z: Array, condition: Array | None = None) -> Array:
        """log p_base(z | c) [B] in nats of z [B, *latent_shape]."""
        z = as_float_batch("z", z, self.latent_shape)
        return self.base.log_prob(z, self._base_condition(self._condition(condition, z.shape[:1])))

    def sample(
        self,
        key: Array,
        shape: int | Shape,
        *,
        condition: Array | None = None,
        temperature: float | Array = 1.0,
        solver: Solver = Anderson(),
        return_status: bool = False,
    ) -> Array | tuple[Array, InverseStatus]:
        """Draws x [*shape, *event_shape]: z from the base, then `inverse`.

        Values with a bounded support, as images behind a logit, are clipped to it: that moves the part of the density
        that the logit's alpha leaves outside of [0, 1].

        Args:
          key: PRNG key of z.
          shape: a number n of samples, or leading axes.
          condition: floats [*condition_shape], one for all samples, or [*shape, *condition_shape], one each.
          temperature: factor on the deviation of the base; see `Base.sample`.
          solver: of the inverse.
          return_status: whether to return (x, status) as of `inverse`; without, what does not converge is reported as
            there.
        """
        check_key("key", key)
        check_solver(solver)
        shape, number = _sample_shape(shape)
        own = self._condition(condition, shape, number)
        with self._finite(condition):
            x, status = self._invert(self._draw(key, number, own, temperature), own, solver, True, "")
        support = self.support
        x = x if support is None else jnp.clip(x, *(trailing(jnp.asarray(end, x.dtype), x) for end in support))
        if not return_status:
            x = reported(x, status, f"{type(self).__name__}.sample", solver.on_failure)
        x = x.reshape(*shape, *self.event_shape)
        return (x, status) if return_status else x

    def _draw(self, key: Array, number: int, condition: Array | None, temperature: float | Array) -> Array:
        """z [number, *latent_shape] from the base."""
        return self.base.sample(key, number, self._base_condition(condition), temperature).astype(self.dtype)

    def sample_and_log_prob(
        self,
        key: Array,
        shape: int | Shape,
        *,
        condition: Array | None = None,
        estimator: Estimator | None = None,
        solver: Solver = Anderson(),
        return_diagnostics: bool = False,
    ) -> tuple[Array, Array] | tuple[Array, Array, Diagnostics]:
        """Draws x [*shape, *event_shape] with log p(x | c) [*shape] in nats, differentiable in the parameters.

        With E[log p(x) - log q(x)] as the loss, the flow learns an unnormalised density q from its own
        samples alone. The derivative is that of the path z -> x: z is fixed. Samples are not clipped.

        Args:
          key: PRNG key of z and of the estimate.
          shape: a number n of samples, or leading axes.
          condition: as of `sample`.
          estimator: of the log-dets, as in `forward`.
          solver: of the inverse.
          return_diagnostics: whether to return the estimates' `Diagnostics` as well, as third.

        Raises:
          ValueError: for a number below 1, a bad estimator, and for a flow that pads x: its log p needs noise.
        """
        check_key("key", key)
        shape, number = _sample_shape(shape)
        condition = self._condition(condition, shape, number)
        z_key, estimator_key = jax.random.split(key)
        z = self._draw(z_key, number, condition, 1.0)
        options = {"solver": solver, "return_diagnostics": return_diagnostics, "condition": condition}
        x, log_prob, *rest = self.inverse_and_log_prob(z, key=estimator_key, estimator=estimator, **options)
        return x.reshape(*shape, *self.event_shape), log_prob.reshape(shape), *rest

    def inverse_and_log_prob(
        self,
        z: Array,
        *,
        condition: Array | None = None,
        key: Array | None = None,
        estimator: Estimator | None = None,
        solver: Solver = Anderson(),
        return_diagnostics: bool = False,
        return_status: bool = False,
    ) -> tuple[Array, ...]:
        """Maps z [B, *latent_shape] to x [B, *event_shape] with log p(x | c) [B] in nats, differentiable in all of it.

        As `sample_and_log_prob`, which draws z from the base; each example's noise goes by its number in z.

        Args:
          z: floats [B, *latent_shape].
          condition: as of `forward`.
          key: PRNG key of the estimate; not needed by `Exact`.
          estimator: of the log-dets, as in `forward`.
          solver: of the inverse.
          return_diagnostics: whether to return the estimates' `Diagnostics` as well.
          return_status: whether to return the `InverseStatus` of the solves, [blocks, B], as last; without it, what
            does not converge is reported as by `inverse`: inside a compiled program it can only be NaN, or nothing.

        Raises:
          ValueError: for a wrong rank, size or dtype, concrete values that are not finite, a bad estimator, and for a
            flow that pads x: its log p needs noise.
        """
        z = as_float_batch("z", z, self.latent_shape)
        check_key("key", key, optional=True)
        check_solver(solver)
        if self.pads:
            raise ValueError(
                "flow: expected one without padding, which has no log p(x) of its own, got one that pads x"
            )
        own = self._condition(condition, z.shape[:1])
        estimator = checked_estimator(estimator, self.blocks)
        rule, limits = solver.split(self.dtype)
        with checked("z", z, self.dtype), self._finite(condition):
            inputs = z, key, estimator, rule, limits, own
            x, log_prob, diagnostics, status = _inverse_and_log_prob(*nnx.split(self), *inputs)
        if not return_status:
            what = f"{type(self).__name__}.inverse_and_log_prob"
            x, log_prob = reported((x, log_prob), status, what, solver.on_failure)
        result = (x, log_prob, diagnostics) if return_diagnostics else (x, log_prob)
        return (*result, status) if return_status else result

    def initialize(self, x: Array, condition: Array | None = None) -> None:
        """Sets every ActNorm and running statistic from a batch x, in place, so that outputs are normalised.

        At least two examples, better hundreds: each statistic is taken over the batch. With an ActNorm in front, as by
        default, x may be in any unit, from 1e-20 to 1e20 and more in float32: training is the same.

        Raises:
          ValueError: for fewer examples, as `forward` for x and condition, for values outside of the support, and where
            statistics overflow the dtype; the flow is then left as it was.
        """
        with self._checked_input(x, condition, are_data=True) as (x, condition):
            if x.shape[0] < 2:
                raise ValueError(f"x: expected at least 2 examples to take statistics over, got {x.shape[0]}")
            state, is_finite = _initialize(*nnx.split(self), x, condition)
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
        replaced by what is applied, each divided by its excess. On the host, at the cost of `certify`. Contractions on
        the user's word stay as they are.
        """
        self.bijector.tighten()

    def order_loss(self) -> Array:
        """Mean norm of the linear layers, differentiable in the learnable orders of these norms alone; a scalar.

        Where it is small, kernels are shrunk least (Chen et al. 2019, section 3.3). To be added to the
        training loss with a small weight, as `training.likelihood.tend` does. Zero where there are no such layers.
        """
        losses = map_linears(self, lambda layer: layer.order_loss())
        return jnp.mean(jnp.concatenate([loss.ravel() for loss in losses])) if losses else jnp.zeros((), self.dtype)

    @property
    def learns_orders(self) -> bool:
        """Whether orders of norms are learned (see `order_loss`)."""
        layers = (node for _, node in nnx.iter_modules(self) if isinstance(node, LipschitzLinear))
        return any(isinstance(order, nnx.Param) for layer in layers for order in (layer.domain, layer.codomain))

    def norm_orders(self) -> np.ndarray:
        """The orders of the norms before and behind every linear layer, given or learned, [layers, 2]; on the host."""
        orders = map_linears(self, lambda layer: jnp.stack([jnp.asarray(p, float) for p in layer.traced_orders()]))
        return np.concatenate([np.reshape(pair, (-1, 2)) for pair in [np.zeros((0, 2)), *orders]])

    def update_statistics(self, x: Array, condition: Array | None = None) -> None:
        """Moves all running statistics (`MovingBatchNorm`, `MovingCentering`) towards those of a batch x, in place.

        To be called at every training step of a flow that has any; the log-density never does it.
        """
        with self._checked_input(x, condition) as (x, condition):
            state = _update_statistics(*nnx.split(self), x, condition)
        nnx.update(self, state)

    @property
    def support(self) -> tuple[Any, Any] | None:
        """Lower and upper ends of what samples are clipped to, or None."""
        return self.bijector.support

    def _domain(self, are_data: bool) -> Domain:
        """Where the values of x may be, as a flow's input, or as data."""
        return self.bijector.domain(self.dtype)

    def _run_initialize(self, x: Array, condition: Array | None) -> None:
        """`initialize`, traced: in place."""
        self.bijector.initialize(x, condition)

    def _condition(self, condition: Any, batch: Shape, number: int | None = None) -> Array | None:
        """A caller's condition as [B, *condition_shape]; of leading axes `batch` as [number, *condition_shape]."""
        condition = as_condition(condition, self.condition_shape, batch)
        if condition is None:
            return None
        condition = condition if number is None else condition.reshape(number, *condition.shape[len(batch) :])
        return condition.astype(self.dtype)

    def _base_condition(self, condition: Array | None) -> Array | None:
        return None if self.base.condition_shape is None else condition

    @contextmanager
    def _checked_input(
        self, x: Any, condition: Any = None, *, are_data: bool = False
    ) -> Iterator[tuple[Array, Array | None]]:
        """x and its condition as arrays of JAX, their values checked around a computation.

        are_data: whether x must be what the flow models, or may be whatever it takes.
        """
        batch = as_float_batch("x", x, self.event_shape)
        own = self._condition(condition, batch.shape[:1])
        given = x if isinstance(x, np.ndarray) else batch
        with checked("x", given, self.dtype, self._domain(are_data)), self._finite(condition):
            yield batch, own

    def _finite(self, condition: Any) -> AbstractContextManager:
        """Checks around a computation that a caller's condition, if there is one, has finite values."""
        return nullcontext() if condition is None else checked("condition", condition, self.dtype)


def _sample_shape(shape: int | Shape) -> tuple[Shape, int]:
    """Leading axes of samples, and their number."""
    shape = (shape,) if not isinstance(shape, tuple | list) else tuple(shape)
    for size in shape:
        check_count("shape", size, 1)
    return shape, math.prod(shape)


def _warn_norms(status: PowerIterationStatus) -> None:
    if not status.residual <= 1e-2:  # also if it is NaN
        warnings.warn(
            f"power iteration: a layer is far from converged after {status.iterations} iterations; largest residual "
            f"{status.residual:.1e}",
            RuntimeWarning,
            stacklevel=3,
        )


def _forward(graphdef, state, x, key, estimator, condition):
    flow = nnx.merge(graphdef, state)
    x = x.astype(flow.dtype)
    z, log_det, diagnostics = flow.bijector.estimate(x, key, estimator, _of_bijector(flow, condition))
    return z, log_det, join_diagnostics(diagnostics, x)


def _forward_and_log_prob(graphdef, state, x, key, estimator, condition):
    flow = nnx.merge(graphdef, state)
    z, log_det, diagnostics = _forward(graphdef, state, x, key, estimator, condition)
    return z, flow.base.log_prob(z, flow._base_condition(condition)) + log_det, diagnostics


def _log_prob(graphdef, state, x, key, estimator, condition):
    return _forward_and_log_prob(graphdef, state, x, key, estimator, condition)[1:]


def _of_bijector(flow: Flow, condition: Array | None) -> Array | None:
    return None if flow.bijector.condition_shape is None else condition


@partial(jax.jit, static_argnames="graphdef")
def _transform(graphdef, state, x, condition):
    flow = nnx.merge(graphdef, state)
    return flow.bijector(x.astype(flow.dtype), _of_bijector(flow, condition))


@partial(jax.jit, static_argnames="graphdef")
def _initialize(graphdef, state, x, condition):
    flow = nnx.merge(graphdef, state)
    flow._run_initialize(x.astype(flow.dtype), _of_bijector(flow, condition))
    statistics = jax.tree.leaves(nnx.state(flow, (nnx.BatchStat, Constant)))
    is_finite = jnp.all(jnp.asarray([jnp.isfinite(leaf).all() for leaf in statistics], bool))
    return nnx.state(flow), is_finite


@partial(jax.jit, static_argnames="graphdef")
def _update_statistics(graphdef, state, x, condition):
    flow = nnx.merge(graphdef, state)
    flow.bijector.update_statistics(x.astype(flow.dtype), _of_bijector(flow, condition))
    return nnx.state(flow, nnx.BatchStat)


@partial(jax.jit, static_argnames=("graphdef", "rule"))
def _inverse(graphdef, state, z, rule, limits, condition):
    flow = nnx.merge(graphdef, state)
    z = z.astype(flow.dtype)
    x, statuses = flow.bijector.solve(z, rule.with_limits(limits), _of_bijector(flow, condition))
    return x, join_statuses(statuses, z)


@partial(jax.jit, static_argnames=("graphdef", "rule"))
def _inverse_and_log_prob(graphdef, state, z, key, estimator, rule, limits, condition):
    flow, solver = nnx.merge(graphdef, state), rule.with_limits(limits)
    z = z.astype(flow.dtype)
    inputs = z, key, estimator, solver, _of_bijector(flow, condition)
    x, log_det, diagnostics, statuses = flow.bijector.solve_and_estimate(*inputs)
    log_prob = flow.base.log_prob(z, flow._base_condition(condition)) + log_det
    return x, log_prob, join_diagnostics(diagnostics, z), join_statuses(statuses, z)


@partial(jax.jit, static_argnames=("graphdef", "restart"))
def _update_norms(graphdef, state, settings, restart):
    flow = nnx.merge(graphdef, state)
    status = update_norms(flow, settings, restart)
    return nnx.state(flow), status
