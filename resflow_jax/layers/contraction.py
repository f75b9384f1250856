"""The contraction g inside a residual block: its interface, and the chain of layers of the papers.

    g = h_n o phi o ... o phi o h_1 (o phi with pre-activation),   Lip(g) <= prod_i |W_i| * prod_i Lip(phi_i)

(Chen et al. 2019, arXiv 1906.02735, section 3.2 and appendix E; pre-activation as in He et al. 2016). With mixed
norms (section 3.3) layer i maps the norm of order p_i to the norm of order p_(i+1), and each activation is bounded in
the norm at its place.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.activations import Activation
from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import as_shape, check_open_interval
from resflow_jax.functional.linear_maps import LinearMap
from resflow_jax.functional.primitives.platforms import target_platform, threads_per_cpu_device
from resflow_jax.functional.texts import constructor
from resflow_jax.layers.conditioning import Conditioning, Gate
from resflow_jax.layers.conditions import ANY, ConditionShape
from resflow_jax.layers.lipschitz import LipschitzLinear, Order
from resflow_jax.layers.module import Dict, List, Module
from resflow_jax.layers.module_texts import Promise
from resflow_jax.layers.normalization import MovingCentering
from resflow_jax.layers.unchanged_calls import call_unchanged

Array = jax.Array
Params = dict[str, Array]

# Numbers in a layer's output. On one thread they are 256 KiB in float32: the L2 cache of a core, 1 or 2 MiB, holds
# several. XLA divides among threads only what is larger, which then lies in the L3 cache.
_CACHED_BY_ONE, _CACHED_PER_THREAD, _CACHED_AT_MOST = 2**16, 2**18, 2**22
# 16 MiB in float32. VMEM, 128 MiB on v5e and v5p, holds the activations of a chunk, their slopes and those of the
# tangents. With twice as many numbers XLA moves part of them through HBM.
_IN_VMEM = 2**22


class Contraction(Module):
    """Interface of the contraction g of a residual block: |g(a; c) - g(b; c)| <= lipschitz * |a - b|, lipschitz < 1.

    g maps x [B, ...] to the same shape and dtype, and treats each example independently of the others.

    To write one, set `lipschitz`, set `event_shape` if it is known, and define `__call__(x)`, or `__call__(x,
    condition)` with `condition_shape`. The author then guarantees the constant: nothing here proves it, and
    `check_contraction` can only refute it on data. If the contraction also defines `linears` and `bound`, `certify`
    computes the constant from the kernels, given that the formula of `bound` is right. A class that defines `apply`,
    `weights` or `condition_features` does not inherit a `bound`.

    For speed define `weights` and `apply` instead of `__call__`. The weights, such as normalised kernels, are then
    computed once for all evaluations of g in a log-det or in a solve.

    Attributes:
      lipschitz: bound on Lip(g), in (0, 1), for every condition.
      is_contraction: whether g is a contraction in one p-norm. It is False if the norm order q of the output exceeds
        the order p of the input; `lipschitz` then means |g(a) - g(b)|_q <= lipschitz |a - b|_p. It is also False if the
        two orders are learned separately.
      event_shape: shape of one x; None if several fit.
      condition_shape: shape of one condition; None for no condition, `...` for any.
      linears: the Lipschitz layers inside, from the input to the output, for `bound` and `tighten`.

    Randomness: none; a random g breaks the inverse. Cost: one call is one evaluation of g.

    Raises:
      TypeError: when a subclass of a contraction with `apply` defines `__call__` without an `apply` of its own.

    Source: Behrmann et al. (2019, arXiv 1811.00995); Chen et al. (2019, arXiv 1906.02735).

    Example:
      >>> class Half(rf.Contraction):
      ...     lipschitz = 0.5
      ...
      ...     def __call__(self, x, condition=None):
      ...         return 0.5 * jnp.sin(x)
      >>> block = rf.ResidualBlock(Half())
      >>> y = block(jnp.ones((2, 3)))
      >>> y.shape, np.allclose(block.inverse(y), 1, atol=1e-4)
      ((2, 3), True)
    """

    lipschitz: float
    is_contraction: bool = True
    event_shape: tuple[int, ...] | None = None
    condition_shape: ConditionShape = None
    linears: Sequence[LipschitzLinear] = ()

    @property
    def chunk_size(self) -> int | None:
        """Number of examples to evaluate at a time on a CPU or a TPU, so that a layer's output fits its cache or VMEM.

        None for all. Other platforms evaluate all.
        """
        if not self.linears:
            return None
        if target_platform() == "tpu":
            return max(1, _IN_VMEM // self.widest)
        threads = threads_per_cpu_device()
        cached = _CACHED_BY_ONE if threads == 1 else min(threads * _CACHED_PER_THREAD, _CACHED_AT_MOST)
        return max(1, cached // self.widest)

    @property
    def widest(self) -> int:
        """Number of elements of the largest output of a layer for one example; 0 if there are no `linears`."""
        return max((math.prod(linear.linear_map.example_shape) for linear in self.linears), default=0)

    def condition_features(self, condition: Array | None) -> Any:
        """Arrays [B, ...] that `apply` takes for a condition [B, ...]; computed once for all evaluations of g."""
        return condition

    def weights(self) -> Any:
        """All parameters, in the form that `apply` takes. They must not depend on x."""
        return nnx.state(self)

    def apply(self, weights: Any, x: Array, features: Any = None) -> Array:
        """g(x) [B, ...] with given weights and condition features; it reads no parameters of the module itself."""
        return _called(nnx.merge(nnx.graphdef(self), weights), x, features)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls) and "apply" not in vars(cls) and cls.apply is not Contraction.apply:
            raise TypeError(
                f"{cls.__name__}: expected a method apply(weights, x, features) with __call__, since log-dets call "
                "apply, and the inherited one belongs to another map; got none"
            )
        if {"apply", "weights", "condition_features"} & vars(cls).keys() and "bound" not in vars(cls):
            cls.bound = Contraction.bound  # an inherited bound belongs to another map

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """g(x), or g(x; c), [B, ...] for x [B, ...] and c [B, *condition_shape]; one evaluation."""
        features = self.condition_features(condition)
        return self.apply(self.weights(), x) if features is None else self.apply(self.weights(), x, features)

    def move_statistics(self, x: Array, condition: Array | None = None, rate: float | None = None) -> None:
        """Moves running statistics inside towards those of a batch, in place, at the given rate or at their own."""

    def bound(self, norms: Sequence[float], orders: Sequence[float]) -> float | None:
        """Upper bound on Lip(g) from upper bounds on the norms of `linears`; on the host.

        Args:
          norms: one for each layer; layer i maps order i to order i + 1.
          orders: orders of the norms, one more than layers.

        Returns:
          The bound, or None if g has parts without a bound: the user then guarantees `lipschitz`.
        """
        return None

    def _repr_promise(self) -> Promise:
        is_word = type(self).bound is Contraction.bound or not self.linears
        return Promise(self.lipschitz if self.is_contraction else None, is_word)


class TrustedContraction(Contraction):
    """Any module of Flax NNX as g, with a Lipschitz constant that the user guarantees; see `ResidualBlock`."""

    def __init__(
        self,
        module: nnx.Module,
        lipschitz: float,
        event_shape: tuple[int, ...] | None = None,
        condition_shape: ConditionShape = None,
    ):
        if not isinstance(module, nnx.Module) or not callable(module):
            raise ValueError(
                f"contraction: expected a Contraction or a callable nnx.Module, got {type(module).__name__}"
            )
        if lipschitz is None:
            raise ValueError(
                f"lipschitz: expected a bound on the Lipschitz constant of {type(module).__name__}, which is not a "
                "Contraction with a bound of its own, got None"
            )
        check_open_interval("lipschitz", lipschitz, 0, 1)
        if condition_shape is None and _takes_condition(module):
            condition_shape = getattr(module, "condition_shape", None) or ANY
        self.module = module
        self.lipschitz = lipschitz
        self.event_shape = None if event_shape is None else as_shape("event_shape", event_shape)
        is_known = condition_shape is not None and condition_shape is not ANY
        self.condition_shape = as_shape("condition_shape", condition_shape) if is_known else condition_shape

    def weights(self) -> nnx.State:
        return nnx.state(self.module)

    def apply(self, weights: nnx.State, x: Array, features: Array | None = None) -> Array:
        return _called(nnx.merge(nnx.graphdef(self.module), weights), x, features)


def _called(module: nnx.Module, x: Array, condition: Any) -> Array:
    """module(x), or module(x, condition); ValueError if the call changes the state of the module."""
    return call_unchanged("g", module, *((x,) if condition is None else (x, condition)))


def _takes_condition(module: nnx.Module) -> bool:
    """Whether a module is called as module(x, condition): it names the argument, or requires a second one."""
    parameters = list(inspect.signature(module.__call__).parameters.values())
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in by_position if p.default is p.empty]
    return len(needed) > 1 or any(p.name == "condition" for p in parameters)


class Layered(Contraction):
    """Lipschitz layers with an activation between any two, and before the first with pre-activation.

    With centering a `MovingCentering` per channel follows every linear layer, and one precedes the first activation of
    a pre-activation.
    """

    def __init__(
        self,
        linear_maps: Sequence[LinearMap],
        activation: Activation,
        coefficient: float,
        *,
        preactivation: bool,
        norms: Sequence[Order] | None = None,
        centering: bool = False,
        condition_shape: tuple[int, ...] | None = None,
        rngs: nnx.Rngs,
    ):
        """coefficient: bound on each layer's norm; norms: the orders, one more than layers, all 2 by default.

        With a condition each layer is h(x; c) = gate(c) * W x + b + shift(c); see `layers.conditioning`.
        """
        self.coefficient = coefficient
        norms = [2.0] * (len(linear_maps) + 1) if norms is None else norms
        slopes = [activation.steepest if n or preactivation else ((1.0,),) for n in range(len(linear_maps))]
        self.linears = List(
            LipschitzLinear(linear_map, coefficient, domain=p, codomain=q, slopes=s, rngs=rngs)
            for linear_map, p, q, s in zip(linear_maps, norms[:-1], norms[1:], slopes, strict=True)
        )
        self.activation = activation
        self.preactivation = preactivation
        self.activation_params = learnable(activation, len(linear_maps) - (not preactivation))
        self.pre_center = MovingCentering(linear_maps[-1].kernel_shape[-1:]) if centering and preactivation else None
        self.centers = List(MovingCentering(m.kernel_shape[-1:]) for m in linear_maps if centering)
        # Whatever a learned order becomes, the layer after an activation makes up for a slope above one.
        at = [1.0 if isinstance(p, nnx.Param) else activation.lipschitz_in(p) for p in norms[not preactivation : -1]]
        self.lipschitz = coefficient ** len(self.linears) * math.prod(min(1.0, constant) for constant in at)
        fixed = not isinstance(norms[0], nnx.Param)
        self.is_contraction = norms[0] is norms[-1] or (fixed and norms[0] >= norms[-1])
        self.event_shape = linear_maps[-1].example_shape
        self.condition_shape = condition_shape
        channels = [linear_map.kernel_shape[-1] for linear_map in linear_maps]
        self.conditioning = Conditioning(condition_shape, channels, rngs=rngs) if condition_shape is not None else None

    @property
    def norms(self) -> tuple[Order, ...]:
        """The orders of the norms between the layers, one more than layers."""
        return self.linears[0].domain, *(linear.codomain for linear in self.linears)

    def condition_features(self, condition: Array | None) -> list[Gate] | None:
        return None if self.conditioning is None else self.conditioning(condition)

    def weights(self) -> tuple[Array | None, list[tuple[Array, Array]], list[Params]]:
        following = self.linears[not self.preactivation :]
        channels = [linear.linear_map.kernel_shape[-2] // self.activation.expansion for linear in following]
        activations = constrained(self.activation, self.activation_params, channels)
        linears = [linear.weights() for linear in self.linears]
        if self.centers:
            shifts = [center.shift() for center in self.centers]
            linears = [(kernel, bias + shift) for (kernel, bias), shift in zip(linears, shifts, strict=True)]
        return self.pre_center and self.pre_center.shift(), linears, activations

    def apply(self, weights: Any, x: Array, features: list[Gate] | None = None) -> Array:
        shift, linears, activations = weights
        gates = [None] * len(linears) if features is None else features
        if shift is not None:
            x = x + trailing(shift, x)
        if self.preactivation:
            x, activations = self.activation.function(activations[0], x), activations[1:]
        x = self.linears[0].apply(linears[0], x, gates[0])
        for layer, linear, params, gate in zip(self.linears[1:], linears[1:], activations, gates[1:], strict=True):
            x = layer.apply(linear, self.activation.function(params, x), gate)
        return x

    def move_statistics(self, x: Array, condition: Array | None = None, rate: float | None = None) -> None:
        if not self.centers:
            return
        activations = iter(self.weights()[2])
        gates = self.condition_features(condition) or [None] * len(self.linears)
        if self.preactivation:
            self.pre_center.move(x, rate)
            x = self.activation.function(next(activations), self.pre_center(x))
        for layer, center, gate in zip(self.linears, self.centers, gates, strict=True):
            x = layer.apply(layer.weights(), x, gate)
            center.move(x, rate)
            x = center(x)
            if layer is not self.linears[-1]:
                x = self.activation.function(next(activations), x)

    def _repr_text(self, text: Callable[[Any], str]) -> str:
        kernels = [linear.linear_map.kernel_shape for linear in self.linears]
        widths = [kernels[-1][-1], *(kernel[-2] for kernel in kernels[1:]), kernels[-1][-1]]
        sides = ", ".join("x".join(map(str, kernel[:-2])) for kernel in kernels)
        maps = " -> ".join(map(str, widths)) + (f" by {sides}" if kernels[0][:-2] else "")
        is_learned = any(isinstance(order, nnx.Param) for order in self.norms)
        norms = "learned" if is_learned else None if set(self.norms) == {2.0} else text(self.norms)
        flags = {"preactivation": self.preactivation, "centering": self.centers}
        flags = {name: "True" if given else None for name, given in flags.items()}
        return constructor(self, text, linear_maps=maps, norms=norms, **flags)

    def bound(self, norms: Sequence[float], orders: Sequence[float]) -> float:
        places = orders[not self.preactivation : -1]
        return math.prod(norms) * math.prod(self.activation.lipschitz_in(p) for p in places)


def learnable(activation: Activation, count: int) -> List:
    """The learnable parameters of `count` activations, at their initial values."""
    return List(
        Dict({name: nnx.Param(jnp.asarray(value, float)) for name, value in activation.initial}) for _ in range(count)
    )


def constrained(activation: Activation, params: List, channels: Sequence[int]) -> list[Params]:
    """The parameters from `learnable`, constrained and broadcast to each input's number of channels."""
    raw = [{name: by_name[name][...] for name, _ in activation.initial} for by_name in params]
    return [activation.constrain(*pair) for pair in zip(raw, channels, strict=True)]
