"""`Flow`: a normalizing flow, made of a bijector and a base distribution.

    z = f(x; c),   log p(x | c) = log p_base(z | c) + log|det df/dx|

Every public method except `tighten` is compiled once per structure and shape, and may be called inside jit, grad, vmap
and scan.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.checks import as_float_batch, as_shape, check_flag, check_key, check_type
from resflow_jax.functional.diagnostics import Diagnostics
from resflow_jax.functional.estimators import Estimator
from resflow_jax.functional.inverse import check_solver, reported
from resflow_jax.functional.iteration import InverseStatus
from resflow_jax.functional.primitives.tracing import run
from resflow_jax.functional.solvers import Anderson, Solver
from resflow_jax.functional.texts import count, setting
from resflow_jax.functional.values import Domain, checked, report_nan
from resflow_jax.layers.bijector import Bijector, checked_estimator, join_diagnostics, own_condition
from resflow_jax.layers.composition import Chain
from resflow_jax.layers.conditions import ConditionShape, as_condition, common_condition_shape
from resflow_jax.layers.module_texts import Part, Parts
from resflow_jax.models.bases import StandardNormal, as_base
from resflow_jax.models.dequantization import check_dequantizer
from resflow_jax.models.latent_parts import FlowParts
from resflow_jax.models.sampling import FlowSampling
from resflow_jax.models.solve_parts import solved
from resflow_jax.models.upkeep import FlowUpkeep

Array = jax.Array
Shape = tuple[int, ...]


class Flow(FlowParts, FlowSampling, FlowUpkeep):
    """Normalizing flow: the density of x = f^-1(z; c) for z from a base distribution.

        z = f(x; c),   log p(x | c) = log p_base(z | c) + log|det df/dx|,   in nats

    The flow is a pytree (Flax NNX). Its parameters are `nnx.Param`, its power-iteration vectors `NormState`, its
    running statistics `nnx.BatchStat`, its data-dependent constants `Constant`. It stores no random state: methods take
    keys.

    Before training call `initialize` with data. After every change of parameters call `update_norms`, and before
    evaluation `converge_norms`, since the bounds of `Lipschitz...` layers hold only for converged norms.

    Attributes:
      bijector: f.
      base: the distribution of z.
      event_shape: shape of one x.
      condition_shape: shape of one condition; None for p(x), `...` for any.
      dequantizer: the noise of integer images, which losses and evaluations add; None for uniform noise.

    Randomness: log-densities with `Roulette` are unbiased estimates drawn with a key; samples are drawn with a key.

    Cost: one evaluation of every contraction g for f, a solve of every block for the inverse. Estimates add the
    vector-Jacobian products of the estimator.

    Source: Chen et al. (2019, arXiv 1906.02735).

    Example:
      >>> class Half(rf.Contraction):
      ...     lipschitz = 0.5
      ...
      ...     def __call__(self, x, condition=None):
      ...         return 0.5 * x
      >>> flow = rf.Flow(rf.Chain([rf.ActNorm((2,)), rf.ResidualBlock(Half())]), rf.StandardNormal((2,)))
      >>> x = jnp.array([[1.0, 2.0], [3.0, 5.0], [4.0, 1.0]])
      >>> flow.initialize(x)
      >>> flow.log_prob(x, estimator=rf.Exact()).shape, flow.sample(jax.random.key(0), 4).shape
      ((3,), (4, 2))
    """

    dequantizer: Any = None

    def __init__(
        self, bijector: Bijector, base: Any = None, *, event_shape: Shape | None = None, dequantizer: Any = None
    ):
        """Composes a flow.

        Args:
          bijector: f, from x to z.
          base: distribution of z: a `Base`, such as `StandardNormal`, or any object with log_prob(z) [B] and
            sample(key, n) [n, ...]. By default `StandardNormal` of the shape that f returns.
          event_shape: shape of one x; only needed if neither f nor the base knows it.
          dequantizer: the noise of integer images, a `VariationalDequantization` of the shape of x; by default uniform.

        Raises:
          ValueError: if the shapes or the conditions do not fit; the message names both sides.
        """
        check_type("bijector", bijector, Bijector)
        if event_shape is None:
            event_shape = bijector.event_shape
        if event_shape is None and getattr(base, "event_shape", None) is not None:
            event_shape = bijector.input_shape(tuple(base.event_shape))
        if event_shape is None:
            raise ValueError(
                "event_shape: expected the shape of one x, since neither bijector nor base has one, got None; pass "
                "event_shape=..., or a base with a shape, such as StandardNormal((3,))"
            )
        event_shape = as_shape("event_shape", event_shape)
        try:
            latent_shape = bijector.output_shape(event_shape)
        except ValueError as error:
            raise ValueError(f"bijector: {error}") from error
        self.bijector = bijector
        self.base = StandardNormal(latent_shape) if base is None else as_base(base, latent_shape)
        if tuple(self.base.event_shape) != latent_shape:
            raise ValueError(
                f"base: expected a distribution of events {latent_shape}, as the bijector returns for {event_shape}, "
                f"got events {tuple(self.base.event_shape)}"
            )
        self.event_shape = event_shape
        if dequantizer is not None:
            check_dequantizer(dequantizer, event_shape)
            self.dequantizer = dequantizer
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
        """Whether the flow appends noise to x, and so is not a bijection (see `layers.padding`)."""
        return self.bijector.pads

    @property
    def dtype(self) -> np.dtype:
        """The float dtype of the first parameter; without parameters JAX's default."""
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
        """Maps x to z, with the log-det of the map.

        Args:
          x: floats [B, *event_shape]; for a flow of images with a logit in [0, 1], or slightly outside as `inverse`
            returns.
          condition: floats [*condition_shape], one for all examples, or [B, *condition_shape], one for each.
          key: PRNG key of the estimate; not needed by `Exact`, except by a flow that pads x with noise.
          estimator: estimator of each block's log-det: `Exact()`, `Truncated(...)`, or `Roulette(...)`, the default,
            which is unbiased. Its length distribution may be a `Fitted` with one row for each residual block.
          return_diagnostics: whether to return the estimates' `Diagnostics` as well.

        Returns:
          (z, log_det) or (z, log_det, diagnostics): z [B, *latent_shape]; log_det [B] = log|det dz/dx| in nats, minus
          the log-density of the noise if x is padded (see `layers.padding`); diagnostics with a leading axis of
          residual blocks, in the order of the flow.

        Cost: one evaluation of every g, and the vector-Jacobian products of the estimator.

        Raises:
          ValueError: for a wrong rank, size or dtype, a condition that is missing or not expected, a missing key. Also,
            if x is concrete (not traced), for values that are not finite or that lie outside the domain of f, as the
            interval of a logit. Traced values outside give NaN.
        """
        return self._estimated(_forward, x, condition, key, estimator, return_diagnostics)

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """Maps x [B, *event_shape] to z [B, *latent_shape], without the log-det; padding appends the mean of its noise.

        Deterministic. Cost: one evaluation of every g. Errors as in `forward`.
        """
        with self._checked_input(x, condition) as (x, condition):
            z = _transform(*nnx.split(self), x, condition)
        report_nan(type(self).__name__, z)
        return z

    def inverse(
        self, z: Array, *, condition: Array | None = None, solver: Solver = Anderson(), return_status: bool = False
    ) -> Array | tuple[Array, InverseStatus]:
        """Maps z [B, *latent_shape] to x [B, *event_shape], block by block.

        Args:
          z: floats [B, *latent_shape].
          condition: as in `forward`.
          solver: the iteration of every block, with its tolerance and cap: `Anderson`, `FixedPoint`, `Broyden`.
          return_status: whether to return the status as well.

        Returns:
          x, or (x, `InverseStatus`) with fields [blocks, B] in the order of the flow. Without the status, an eager call
          warns or raises if a solve did not converge, as the solver says; inside a compiled program x is then the best
          guess, or NaN with on_failure="raise" (see `functional.inverse`). x is deterministic, and differentiable in
          any mode by the implicit function theorem. With a logit x may leave [0, 1] by alpha / (1 - 2 alpha).

        Cost: for every block a solve, about log(tolerance) / log(Lip(g)) evaluations of g with `FixedPoint`, usually
        fewer with `Anderson`. A call outside of any program solves a large batch in parts, one after the other, so that
        its memory is bounded (see `models.solve_parts`).

        Raises:
          ValueError: for a wrong rank, size or dtype, for concrete values that are not finite, and for a solver that is
            none.
          InverseError: from an eager call, if a solve did not converge and solver.on_failure is "raise".
        """
        check_flag("return_status", return_status)
        z = as_float_batch("z", z, self.latent_shape)
        check_solver(solver)
        own = self._condition(condition, z.shape[:1])
        with checked("z", z, self.dtype), self._finite(condition):
            return self._invert(z, own, solver, return_status, f"{type(self).__name__}.inverse")

    def _invert(
        self, z: Array, condition: Array | None, solver: Solver, return_status: bool, what: str
    ) -> Array | tuple[Array, InverseStatus]:
        """`inverse` of a z that has been checked already."""
        x, status = solved(self, z, condition, solver)
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
        """log p(x | c) [B] in nats, of the continuous density of x.

        Unbiased with `Roulette`, as are its gradients; exact with `Exact`; biased with `Truncated`. For a flow that
        pads x with noise it is a lower bound in expectation (see `layers.padding`). Arguments, cost and errors as in
        `forward`.

        Returns:
          log_prob [B], or (log_prob, diagnostics).

        Example:
          >>> flow = rf.Flow(rf.ActNorm((2,)), rf.StandardNormal((2,)))
          >>> np.allclose(flow.log_prob(jnp.zeros((3, 2))), -np.log(2 * np.pi))
          True
        """
        found = self._estimated(_log_prob, x, condition, key, estimator, return_diagnostics)
        return found if return_diagnostics else found[0]

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
          `forward` and `log_prob` with the same key; `log_prob` describes when it is unbiased.

        Cost: that of `forward`, and one evaluation of the base.

        Example:
          >>> flow = rf.Flow(rf.ActNorm((2,)), rf.StandardNormal((2,)))
          >>> z, log_prob = flow.forward_and_log_prob(jnp.zeros((3, 2)))
          >>> z.shape, log_prob.shape
          ((3, 2), (3,))
        """
        return self._estimated(_forward_and_log_prob, x, condition, key, estimator, return_diagnostics)

    def _estimated(self, function: Callable, x: Any, condition: Any, key: Any, estimator: Any, diagnosed: bool) -> Any:
        """function(graphdef, state, x, key, estimator, condition), compiled; its last value only if `diagnosed`."""
        check_flag("return_diagnostics", diagnosed)
        check_key("key", key, optional=True)
        estimator = checked_estimator(estimator, self.blocks)
        with self._checked_input(x, condition) as (x, condition):
            graphdef, state = nnx.split(self)
            found = run(function, (graphdef,), state, x, key, estimator, condition)
        arrays = [part for part in found if isinstance(part, jax.Array)]  # all but the diagnostics
        report_nan(f"{type(self).__name__}.{function.__name__[1:]}", arrays)
        return found if diagnosed else found[:-1]

    def base_log_prob(self, z: Array, condition: Array | None = None) -> Array:
        """log p_base(z | c) [B] in nats of z [B, *latent_shape]; condition as in `forward`. No contraction is
        evaluated.

        Raises:
          ValueError: for a wrong shape or dtype, and a condition that is missing or not expected.
        """
        z = as_float_batch("z", z, self.latent_shape)
        return self.base.log_prob(z, self._base_condition(self._condition(condition, z.shape[:1])))

    @property
    def support(self) -> tuple[Any, Any] | None:
        """Lower and upper end of the interval that samples are clipped to, or None."""
        return self.bijector.support

    def _domain(self, are_data: bool) -> Domain:
        """The intervals of values of x, for an input of the flow or for data."""
        return self.bijector.domain(self.dtype)

    def _condition(self, condition: Any, batch: Shape, num_samples: int | None = None) -> Array | None:
        """A caller's condition as [B, *condition_shape]; of leading axes `batch` as [num_samples, *condition_shape]."""
        condition = as_condition(condition, self.condition_shape, batch, self.dtype)
        if condition is None or num_samples is None:
            return condition
        return condition.reshape(num_samples, *condition.shape[len(batch) :])

    def _base_condition(self, condition: Array | None) -> Array | None:
        return None if self.base.condition_shape is None else condition

    @contextmanager
    def _checked_input(
        self, x: Any, condition: Any = None, *, are_data: bool = False
    ) -> Iterator[tuple[Array, Array | None]]:
        """x and its condition as arrays of JAX, their values checked around a computation.

        are_data: whether x must lie in the support of the data, or only in the domain of f.
        """
        batch = as_float_batch("x", x, self.event_shape)
        own = self._condition(condition, batch.shape[:1])
        given = x if isinstance(x, np.ndarray) else batch
        with checked("x", given, self.dtype, self._domain(are_data)), self._finite(condition):
            yield batch, own

    def _finite(self, condition: Any) -> AbstractContextManager:
        """A context that checks that the values of a caller's condition, if any, are finite."""
        return nullcontext() if condition is None else checked("condition", condition, self.dtype)


def _forward(graphdef, state, x, key, estimator, condition):
    flow = nnx.merge(graphdef, state)
    x = x.astype(flow.dtype)
    z, log_det, diagnostics = flow.bijector.estimate(x, key, estimator, own_condition(flow.bijector, condition))
    return z, log_det, join_diagnostics(diagnostics, x)


def _forward_and_log_prob(graphdef, state, x, key, estimator, condition):
    flow = nnx.merge(graphdef, state)
    z, log_det, diagnostics = _forward(graphdef, state, x, key, estimator, condition)
    return z, flow.base.log_prob(z, flow._base_condition(condition)) + log_det, diagnostics


def _log_prob(graphdef, state, x, key, estimator, condition):
    return _forward_and_log_prob(graphdef, state, x, key, estimator, condition)[1:]


@partial(jax.jit, static_argnames="graphdef")
def _transform(graphdef, state, x, condition):
    flow = nnx.merge(graphdef, state)
    return flow.bijector(x.astype(flow.dtype), own_condition(flow.bijector, condition))
