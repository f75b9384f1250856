"""Affine layers of bounded Lipschitz constant: a dense or convolution kernel, softly normalised.

    h(x) = W x * min(1, c / sigma) + b,   sigma = u^T W v

u and v are the power-iteration vectors, explicit state besides the parameters (`NormState`). For norms in closed form
sigma is instead computed for each row or each column. The vectors are iterated to convergence when a layer is made.
`update_norm` advances them, and must be called whenever the kernel has changed. Applying the layer never changes them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import check_open_interval, check_type
from resflow_jax.functional.linear_maps import LinearMap
from resflow_jax.functional.norms import channel_norms, induced_norm, needs_power_iteration, order_loss, soft_normalize
from resflow_jax.functional.orders import learnable_order
from resflow_jax.functional.power_iteration import (
    PowerIteration,
    PowerIterationStatus,
    best_start,
    check_settings,
    power_iteration,
)
from resflow_jax.functional.vector_norms import is_order, vector_norm
from resflow_jax.layers.conditioning import Gate, gated
from resflow_jax.layers.module import Module

Array = jax.Array
Result = TypeVar("Result")
Order = float | nnx.Param  # of a norm: fixed, or learnable


class NormSettings(NamedTuple):
    """When a power iteration stops; see `power_iteration`."""

    tolerance: float | Array
    residual_tolerance: float | Array
    max_iterations: int | Array

    @classmethod
    def of(
        cls, tolerance: float | Array, residual_tolerance: float | Array | None, max_iterations: int | Array
    ) -> "NormSettings":
        """A user's settings, checked by `check_settings`, as Python numbers unless traced: one type for `jax.jit`."""
        check_settings(tolerance, residual_tolerance, max_iterations)
        if residual_tolerance is None:
            residual_tolerance = tolerance**0.5
        numbers = zip((float, float, int), (tolerance, residual_tolerance, max_iterations), strict=True)
        return cls(*(value if isinstance(value, jax.core.Tracer) else number(value) for number, value in numbers))


# This distinguishes singular values that differ by 0.2 %. From a random start, 1000 iterations leave an expected
# relative error of sigma below 0.44 log(n) / 999 for any spectrum, n the size of v (Kuczynski and Wozniakowski 1992,
# SIAM J. Matrix Anal. Appl. 13, theorem 3.1).
TIGHT = NormSettings(tolerance=1e-6, residual_tolerance=1e-5, max_iterations=1000)


class NormState(nnx.Variable):
    """A power-iteration vector u or v of a linear layer: state that training carries along but does not differentiate.

    `flow.update_norms` and `LipschitzLinear.update_norm` advance it. It is saved with the flow.

    Args:
      value: floats, of the shape of the map's output (u) or input (v).

    Example:
      >>> layer = rf.LipschitzDense(3, 2, rngs=nnx.Rngs(0))
      >>> isinstance(layer.v, rf.NormState), layer.u.shape, layer.v.shape
      (True, (2,), (3,))
    """


_deferred = ContextVar("_deferred", default=False)


def norms_are_deferred() -> bool:
    """Whether layers are being made inside `deferred_norms`."""
    return _deferred.get()


@contextmanager
def deferred_norms() -> Iterator[None]:
    """Layers made inside keep random vectors; the caller must then run `update_norms` once on the whole model."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


class LipschitzLinear(Module):
    """Affine map of bounded norm: x -> linear_map(kernel * min(1, coefficient / sigma), x) + bias.

    Kernel and bias start from the uniform distribution U(-1/sqrt(fan_in), 1/sqrt(fan_in)), and the norm is iterated to
    convergence from random vectors. After any change of the kernel, the caller must run `update_norm()`.

    Example:
      >>> layer = rf.LipschitzDense(3, 2, 0.9, rngs=nnx.Rngs(0))
      >>> layer.kernel[...] = 5 * layer.kernel[...]
      >>> bool(layer.update_norm().converged)
      True
      >>> layer(jnp.ones((4, 3))).shape
      (4, 2)
    """

    def __init__(
        self,
        linear_map: LinearMap,
        coefficient: float,
        *,
        domain: Order = 2.0,
        codomain: Order = 2.0,
        slopes: tuple[tuple[float, ...], ...] = ((1.0,),),
        rngs: nnx.Rngs,
    ):
        """coefficient: bound on the norm from the order `domain` to the order `codomain`, in (0, 1).

        slopes: slopes of the activation before or after the layer (see `Activation.steepest`). If it expands in the
          norm of
        order `domain`, the bound on this layer's norm is lower by that factor.
        """
        check_open_interval("coefficient", coefficient, 0, 1)
        check_type("rngs", rngs, nnx.Rngs)
        shapes = linear_map.kernel_shape, linear_map.kernel_shape[-1:], linear_map.input_shape
        kernel, bias, v = _uniforms(rngs.params(), shapes)
        bound = (bias.size / kernel.size) ** 0.5
        self.linear_map = linear_map
        self.coefficient = coefficient
        self.domain = domain
        self.codomain = codomain
        self.slopes = slopes
        self.kernel = nnx.Param(bound * kernel)
        self.bias = nnx.Param(bound * bias)
        self.u = NormState(jnp.zeros(linear_map.output_shape, kernel.dtype))
        self.v = NormState(v)
        if not _deferred.get():
            self.search_norm()
            self.update_norm(restart=False)  # v is random, so it has a component along every singular vector

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading axes of a stack of such layers, as in `ResidualStack`; () for one layer.

        The map knows the kernel shape of one layer; all axes before it are axes of stacks.
        """
        return self.kernel.shape[: self.kernel.ndim - len(self.linear_map.kernel_shape)]

    def norm(self) -> Array:
        """sigma of the unnormalised kernel, a scalar; without a closed form, from the stored vectors, a lower bound."""
        return induced_norm(self.linear_map, self.kernel[...], self.u[...], self.v[...], *self.traced_orders())

    def orders(self) -> tuple[float, float]:
        """The orders of the norms on input and output, on the host."""
        return tuple(float(order) for order in self.traced_orders())

    def limit(self) -> Array:
        """Bound on the norm of the normalised kernel: the coefficient over the expansion of its activation."""
        slopes, order = jnp.asarray(self.slopes, self.kernel.dtype), self.traced_orders()[0]
        expansion = jnp.max(jnp.stack([vector_norm(vector, order) for vector in slopes]))
        return self.coefficient / jnp.maximum(1, expansion)

    def traced_orders(self) -> tuple[float | Array, float | Array]:
        """The orders of the norms on input and output; learnable ones as arrays."""
        orders = self.domain, self.codomain
        return tuple(learnable_order(order[...]) if isinstance(order, nnx.Param) else order for order in orders)

    def order_loss(self) -> Array:
        """The norm of the fixed kernel at the fixed v, a scalar; differentiable only in learnable orders."""
        return order_loss(self.linear_map, self.kernel[...], self.v[...], *self.traced_orders())

    def weights(self) -> tuple[Array, Array]:
        """The softly normalised kernel and the bias, as `apply` takes them."""
        norms = channel_norms(self.linear_map, self.kernel[...], self.u[...], self.v[...], *self.traced_orders())
        return soft_normalize(self.kernel[...], norms, self.limit()), self.bias[...]

    def apply(self, weights: tuple[Array, Array], x: Array, gate: Gate | None = None) -> Array:
        """The affine map with given weights; it reads no parameter of the layer itself.

        gate: factor and shift from a condition, applied to the product before the bias is added.
        """
        kernel, bias = weights
        y = self.linear_map(kernel, x)
        y = y if gate is None else gated(gate, y)
        return y + trailing(bias, y)

    def __call__(self, x: Array) -> Array:
        return self.apply(self.weights(), x)

    def update_norm(
        self,
        tolerance: float | Array = TIGHT.tolerance,
        residual_tolerance: float | Array | None = TIGHT.residual_tolerance,
        max_iterations: int | Array = TIGHT.max_iterations,
        *,
        restart: bool = True,
    ) -> PowerIterationStatus:
        """Advances u and v from their present values, in place, by default until sigma of any kernel is within 1 %.

        For orders other than 2 -> 2 the iteration finds a local maximum: call `search_norm` first if the kernel has
        changed much. See `power_iteration` for the settings, cost and errors, and for when the status says `converged`.
        """
        kernel, orders = self.kernel[...], self.traced_orders()
        if not needs_power_iteration(*orders):
            return PowerIterationStatus(jnp.asarray(0, jnp.int32), jnp.zeros((), kernel.dtype), jnp.asarray(True))
        settings = NormSettings.of(tolerance, residual_tolerance, max_iterations)
        result = advance(self.linear_map, *split_orders(orders), restart, kernel, self.v[...], settings)
        self.u[...], self.v[...] = result.u, result.v
        return result.status

    def search_norm(self, starts: int = 32) -> None:
        """Sets u and v to the best of several power iterations, from v and from random starts, in place.

        For norms other than 2 -> 2, where power iteration may end in a local maximum; for 2 -> 2 it does nothing.
        """
        orders = self.traced_orders()
        is_euclidean = all(is_order(order, 2) for order in orders)
        if needs_power_iteration(*orders) and not is_euclidean:
            result = _search(self.linear_map, *split_orders(orders), starts, self.kernel[...], self.v[...])
            self.u[...], self.v[...] = result.u, result.v


# Compiled once for all layers of one shape, for any settings, also in eager use.
@partial(jax.jit, static_argnums=(0, 1, 3))
def advance(
    linear_map: LinearMap,
    fixed: tuple[float | None, ...],
    learned: tuple[Array | None, ...],
    restart: bool,
    kernel: Array,
    v: Array,
    settings: NormSettings,
) -> PowerIteration:
    """The `power_iteration` of one kernel from v, with the orders that `split_orders` gave."""
    matvec, options = _operator(linear_map, fixed, learned, kernel)
    scale = jnp.max(jnp.abs(kernel))
    return power_iteration(matvec, v, **options, **settings._asdict(), restart=restart, scale=scale)


@partial(jax.jit, static_argnums=(0, 1, 3))
def _search(linear_map, fixed, learned, starts, kernel, v) -> PowerIteration:
    matvec, options = _operator(linear_map, fixed, learned, kernel)
    others = jax.random.normal(jax.random.key(0), (starts - 1, *v.shape), kernel.dtype)
    return best_start(matvec, jnp.concatenate([v[None], others]), **options, max_iterations=200)


def _operator(linear_map, fixed, learned, kernel) -> tuple[Callable[[Array], Array], dict[str, Any]]:
    """x -> W x, and the other arguments of its power iteration: x -> W^T x, and the orders of its norm."""
    domain, codomain = _join_orders(fixed, learned)
    options = {"rmatvec": partial(linear_map.rmatvec, kernel), "domain": domain, "codomain": codomain}
    return partial(linear_map.matvec, kernel), options


def split_orders(orders: tuple[float | Array, ...]) -> tuple[tuple[float | None, ...], tuple[Array | None, ...]]:
    """The fixed orders, with None for learned ones, and the learned orders, with None for fixed ones."""
    is_array = [isinstance(order, Array) for order in orders]
    fixed = tuple(None if learned else order for order, learned in zip(orders, is_array, strict=True))
    return fixed, tuple(order if learned else None for order, learned in zip(orders, is_array, strict=True))


def _join_orders(fixed: tuple[float | None, ...], learned: tuple[Array | None, ...]) -> list[float | Array]:
    return [array if number is None else number for number, array in zip(fixed, learned, strict=True)]


def learned_order() -> nnx.Param:
    """A learnable order of a norm, from 2; shared by the linear layers before and after it."""
    return nnx.Param(jnp.zeros(()))


def linears_inside(module: nnx.Module) -> list[LipschitzLinear]:
    """Every `LipschitzLinear` inside a module; the layers of a stack count as one, see `stack_shape`."""
    return [layer for _, layer in nnx.iter_modules(module) if isinstance(layer, LipschitzLinear)]


def map_linears(module: nnx.Module, function: Callable[[LipschitzLinear], Result]) -> list[Result]:
    """[function(layer)] for every `LipschitzLinear` inside a module; changes in place are kept.

    The layers of a stack are mapped together by `jax.vmap`: their results have the leading axes of `stack_shape`.
    """
    results = []
    for layer in linears_inside(module):
        result, state = _mapped(function, layer)
        nnx.update(layer, state)
        results.append(result)
    return results


def read_linears(module: nnx.Module, function: Callable[[LipschitzLinear], Result]) -> list[Result]:
    """As `map_linears`, but changes are not kept: also for a module that a traced program closes over."""
    return [_mapped(function, layer)[0] for layer in linears_inside(module)]


def _mapped(function: Callable[[LipschitzLinear], Result], layers: LipschitzLinear) -> tuple[Result, nnx.State]:
    """The results of one layer, or of every layer of a stack, and the state after them."""
    graphdef, state = nnx.split(layers)

    def apply(state):
        layer = nnx.merge(graphdef, state)
        return function(layer), nnx.state(layer)

    for _ in layers.stack_shape:
        apply = jax.vmap(apply)
    return apply(state)


def _uniforms(key: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Arrays of U(-1, 1) from a single draw, since XLA needs a tenth of a second to compile each draw."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = jnp.split(jax.random.uniform(key, (sum(sizes),), minval=-1, maxval=1), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
