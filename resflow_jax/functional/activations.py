"""Activation functions with Lipschitz constant at most one.

The Lipschitz bound of a residual block needs those of its activations. So each activation has its Lipschitz constant as
a map of vectors of channels, in every p-norm.

    lipswish        x * sigmoid(softplus(beta) * x) / 1.1            Chen et al. (2019, arXiv 1906.02735), section 3.2
    clipswish       [lipswish(x), lipswish(-x)] / 1.004              Perugachi-Diaz et al. (2021, arXiv 2102.02694)
    leakylipswish   a * x + (1 - a) * lipswish(x), a = sigmoid(alpha)                                   the same
    cpila           [pila(x - 1/5), pila(-x - 1/5)] / 1.06           Ahn et al. (2022, arXiv 2210.08176)
    maxmin          neighbouring channels (2k, 2k + 1) in ascending order    Anil et al. (2019, arXiv 1811.05381)
    fullsort        all channels in ascending order                                                     the same

All functions take arrays [..., channels]; most act elementwise. They cost one pass over the input, and `fullsort`
n log n comparisons for n channels. The first argument of an `Activation` is the dict of its learnable parameters,
which is empty for most.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from resflow_jax.functional.broadcasting import trailing
from resflow_jax.functional.checks import (
    as_sequence,
    check_callable,
    check_choice,
    check_count,
    check_finite,
    check_order,
    check_type,
    shown,
)
from resflow_jax.functional.primitives.platforms import target_platform

Array = jax.Array

# max_t d/dt [t * sigmoid(t)], reached at t = 2.39935728052...; it does not depend on beta,
# because d/dx [x * sigmoid(b x)] is a function of b * x alone.
_SWISH_LIPSCHITZ = 1.0998393201288670

# swish'(t) + swish'(-t) = 1, so the slopes of [swish(x), swish(-x)] are (m, m - 1) up to sign, with
# m = swish'(t) in [1 - M, M]. |m|^p + |1 - m|^p is convex in m and symmetric about 1/2 for p >= 1: it
# is largest at m = M, for every p at the same x. Divided by 1.1 * 1.004, the 2-norm is 0.99996... < 1.
_CLIPSWISH_SLOPES = (_SWISH_LIPSCHITZ / 1.1 / 1.004, (_SWISH_LIPSCHITZ - 1) / 1.1 / 1.004)

# The slope of pila is 1 for x >= 0, and P(u) = exp(u) (u^3 / 2 + u^2 / 2 - u + 1) at u = 5 x < 0. P grows from its
# minimum P(-4) = -19 exp(-4) to P(0) = 1. The slopes of [pila(x - 1/5), pila(-x - 1/5)] are P(u - 1) and P(-u - 1) up
# to sign. For |u| >= 1 one of them is 1 and the other at most 19 exp(-4) in size, attained at |u| = 3. For |u| < 1
# their p-norm is largest at u = 0, where both are 2 / e, or at |u| = 1: `test_cpila_constants` has the grid in p and u.
# Which x is the steepest depends on p; for the 2-norm it is |u| = 3, and the norm, divided by 1.06, is 0.9988... < 1.
_CPILA_SLOPES = (1 / 1.06, 19 * math.exp(-4) / 1.06)
_CPILA_MIDDLE = (2 / math.e / 1.06, 2 / math.e / 1.06)


@dataclass(frozen=True)
class Activation:
    """An activation function with its Lipschitz constant and its initial parameters.

    `rf.ACTIVATIONS` has the library's activations by name. Call one with its parameters and x [..., channels]; the
    result is [..., expansion * channels] in x's dtype. The bound on the slopes must hold for all parameters.

    Attributes:
      name: name of the activation, its key in `ACTIVATIONS`.
      function: (constrained params, x) -> y.
      slopes: |dy_j / dx_i| for the outputs of one channel, at the x where their p-norm is largest. This x must be the
        same for every p >= 1, unless `other_slopes` has the slopes at the others. It is (1,) for functions that permute
        the channels.
      initial: pairs (name, initial value) of the learnable scalar parameters. The names are "alpha", for one that
        `function` takes as sigmoid(alpha), and "beta", for softplus(beta).
      group: the number of channels must be a multiple of this.
      other_slopes: the slopes at further x, so that for every p >= 1 the p-norm is largest at one of them.

    Example:
      >>> activation = rf.ACTIVATIONS["clipswish"]
      >>> activation({"beta": jnp.array(0.5)}, jnp.ones((2, 3))).shape, activation.expansion
      ((2, 6), 2)
      >>> activation.lipschitz < 1
      True
      >>> rf.Activation("cos", lambda params, x: jnp.cos(x)).lipschitz
      1.0
    """

    name: str
    function: Callable[[dict[str, Array], Array], Array]
    slopes: tuple[float, ...] = (1.0,)
    initial: tuple[tuple[str, float], ...] = ()
    group: int = 1
    other_slopes: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        check_type("name", self.name, str)
        check_callable("function", self.function)
        check_count("group", self.group, 1)
        slopes = tuple(as_sequence("slopes", self.slopes, "a tuple of numbers"))
        for slope in slopes:
            check_finite("slopes", slope)
        if not slopes:
            raise ValueError("slopes: expected at least one number, got none")
        other_slopes = as_sequence("other_slopes", self.other_slopes, "tuples of numbers")
        other_slopes = tuple(tuple(as_sequence("other_slopes", of, "tuples of numbers")) for of in other_slopes)
        for others in other_slopes:
            for slope in others:
                check_finite("other_slopes", slope)
            if len(others) != len(slopes):
                raise ValueError(f"other_slopes: expected {len(slopes)} numbers each, as in slopes, got {len(others)}")
        initial = tuple(as_sequence("initial", self.initial, "pairs (name, value)"))
        for pair in initial:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(f"initial: expected pairs (name, value), got {shown(pair)}")
            check_choice("initial", pair[0], tuple(_CONSTRAINTS))
        for name, value in (("slopes", slopes), ("other_slopes", other_slopes), ("initial", initial)):
            object.__setattr__(self, name, value)  # tuples, which have a hash

    def __call__(self, params: dict[str, Array], x: Array) -> Array:
        return self.function(self.constrain(params, x.shape[-1]), x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles and copies an activation of `ACTIVATIONS` by its name, so that it stays the same object."""
        if ACTIVATIONS.get(self.name) is self:
            return get_activation, (self.name,)
        return super().__reduce_ex__(protocol)

    def constrain(self, params: dict[str, Array], channels: int) -> dict[str, Array]:
        """The constrained parameters that `function` takes, [channels] each: softplus(beta) and sigmoid(alpha).

        They are repeated for each channel, so that their gradients are sums over pixels alone (see `_spread`).
        """
        return {name: jnp.broadcast_to(_CONSTRAINTS[name](value), channels) for name, value in params.items()}

    @property
    def steepest(self) -> tuple[tuple[float, ...], ...]:
        """The slopes at all x where a p-norm may be largest."""
        return self.slopes, *self.other_slopes

    @property
    def expansion(self) -> int:
        """Number of output channels for each input channel."""
        return len(self.slopes)

    @property
    def lipschitz(self) -> float:
        """The Lipschitz constant in the 2-norm, over all x and all params."""
        return self.lipschitz_in(2)

    def lipschitz_in(self, p: float) -> float:
        """The Lipschitz constant from R^n to R^(expansion * n) in the p-norm, 1 <= p <= inf: the largest |slopes|_p."""
        # If the outputs f(x_i) depend on one channel x_i alone, |f(a) - f(b)|_p <= int_b^a |f'(t)|_p dt
        # <= |slopes|_p |a - b| for this channel. The sum of p-th powers over channels (for inf the maximum) gives
        # the bound for vectors. A sort is continuous and piecewise a permutation, which is an isometry of every
        # p-norm. It keeps the length of each piece of the segment from a to b, so its constant is 1.
        check_order("p", p)
        return max(float(np.linalg.norm(slopes, p)) for slopes in self.steepest)


def lipswish(x: Array, beta: Array | float = 0.5) -> Array:
    """x * sigmoid(softplus(beta) * x) / 1.1; Lipschitz constant 0.99985... for every beta."""
    return _lipswish(x, jax.nn.softplus(beta))


# x * sigmoid(b x) and its slope for b of x's shape, with derivatives in closed form. The linearisation of either stores
# one array for each variable and recomputes nothing. For a fixed b its derivatives are not computed.
@jax.custom_jvp
def _swish(x: Array, b: Array) -> Array:
    return x * jax.nn.sigmoid(b * x)


@jax.custom_jvp
def _swish_slope(x: Array, b: Array) -> Array:
    s = jax.nn.sigmoid(b * x)
    return s + (b * x) * (s * (1 - s))


def _swish_jvp(primals, tangents):
    x, b = primals
    s = jax.nn.sigmoid(b * x)
    return _swish(x, b), _along(tangents, lambda: _swish_slope(x, b), lambda: x * x * (s * (1 - s)))


def _swish_slope_jvp(primals, tangents):
    x, b = primals
    s = jax.nn.sigmoid(b * x)
    curvature = s * (1 - s) * (2 + (b * x) * (1 - 2 * s))
    return _swish_slope(x, b), _along(tangents, lambda: b * curvature, lambda: x * curvature)


def _along(tangents, *derivatives):
    """The sum of derivative() * tangent over the variables whose tangent is not zero; there is at least one."""
    pairs = zip(tangents, derivatives, strict=True)
    return sum(derivative() * tangent for tangent, derivative in pairs if not isinstance(tangent, SymbolicZero))


_swish.defjvp(_swish_jvp, symbolic_zeros=True)
_swish_slope.defjvp(_swish_slope_jvp, symbolic_zeros=True)


def _spread(b: Array, x: Array) -> Array:
    """b, a scalar or [*last axes of x], broadcast to the shape of x.

    The derivative of b [channels] is a product with a column of ones. Its transpose, the sum over pixels of all that
    depends on b, is then a matrix product too: XLA's sum is several times slower on a CPU. On a GPU the product is less
    exact than the sum: in float64 it had an error of 1e-7.
    """
    shape = jnp.shape(x)
    if jnp.shape(b) == shape[-1:] and len(shape) > 1 and target_platform() != "gpu":
        return _repeat_rows(b, shape)
    return _broadcast(b, shape)


def _broadcast(b: Array, shape: tuple[int, ...]) -> Array:
    """b in the last axes of `shape`, by the same operation for every batch size."""
    return lax.broadcast_in_dim(b, shape, range(len(shape) - jnp.ndim(b), len(shape)))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _repeat_rows(row: Array, shape: tuple[int, ...]) -> Array:
    return _broadcast(row, shape)


@_repeat_rows.defjvp
def _repeat_rows_jvp(shape, primals, tangents):
    ones = jnp.ones((math.prod(shape[:-1]), 1), tangents[0].dtype)
    return _repeat_rows(*primals, shape), jnp.matmul(ones, tangents[0][None], precision="highest").reshape(shape)


def clipswish(x: Array, beta: Array | float = 0.5) -> Array:
    """[lipswish(x), lipswish(-x)] / 1.004: [..., C] -> [..., 2C]; Lipschitz constant 0.99996... for every beta."""
    return _clipswish(x, jax.nn.softplus(beta))


# Derivatives in closed form: the linearisation stores one array. The slope of max(u, 0) + f(min(u, 0)) at 0 is the mean
# of both sides, which are equal.
@jax.custom_jvp
def _pila(x: Array) -> Array:
    """x for x >= 0, and (25 / 2 x^3 - 5 x^2 + x) exp(5 x) for x < 0; three times continuously differentiable."""
    u = _negative(x)
    return jnp.maximum(x, 0) + (u * u / 2 - u + 1) * u * jnp.exp(u) / 5


@jax.custom_jvp
def _pila_slope(x: Array) -> Array:
    u = _negative(x)
    return (u * u * (u + 1) / 2 - u + 1) * jnp.exp(u)


def _negative(x: Array) -> Array:
    """5 x within [-100, 0], within [-30, 0] in 16-bit floats: beyond, exp(u) counts as zero, and no power overflows."""
    return jnp.clip(5 * x, -30 if jnp.finfo(x.dtype).bits == 16 else -100, 0)


@_pila.defjvp
def _pila_jvp(primals, tangents):
    return _pila(*primals), _pila_slope(*primals) * tangents[0]


@_pila_slope.defjvp
def _pila_slope_jvp(primals, tangents):
    u = _negative(*primals)
    return _pila_slope(*primals), 5 * u * u * (u / 2 + 2) * jnp.exp(u) * tangents[0]


def cpila(x: Array) -> Array:
    """[pila(x - 1/5), pila(-x - 1/5)] / 1.06: [..., C] -> [..., 2C]; Lipschitz constant 0.9988...

    pila(x) is x for x >= 0, and (25 / 2 x^3 - 5 x^2 + x) exp(5 x) for x < 0.
    """
    return _pila(jnp.concatenate([x, -x], axis=-1) - 0.2) / 1.06


# The same functions of constrained parameters a in (0, 1) and b > 0.
_CONSTRAINTS = {"alpha": jax.nn.sigmoid, "beta": jax.nn.softplus}


def _lipswish(x: Array, b: Array) -> Array:
    return _swish(x, _spread(b, x)) / 1.1


def _clipswish(x: Array, b: Array) -> Array:
    b = _spread(b, x)
    return jnp.concatenate([_swish(x, b), _swish(-x, b)], axis=-1) / 1.1 / 1.004


def _leaky_lipswish(x: Array, a: Array, b: Array) -> Array:
    """Slopes between those of lipswish and one."""
    a = trailing(a, x)
    return a * x + (1 - a) * _lipswish(x, b)


def maxmin(x: Array) -> Array:
    """Sorts neighbouring channels: (min, max) of the channels 2k and 2k + 1. The number of channels must be even."""
    if x.shape[-1] % 2:
        raise ValueError(f"maxmin: expected an even number of channels, got {x.shape[-1]}")
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([jnp.minimum(a, b), jnp.maximum(a, b)], axis=-1).reshape(x.shape)


def lipschitz_cube(x: Array) -> Array:
    """x^3 / 3 on [-1, 1], continued with slope one: x - sign(x) * 2/3 outside."""
    inner = jnp.clip(x, -1, 1)
    return inner**3 / 3 + (x - inner)


def _plain(name: str, function: Callable[[Array], Array], group: int = 1) -> Activation:
    return Activation(name, lambda params, x: function(x), group=group)


ActivationName = Literal[
    "lipswish",
    "clipswish",
    "leakylipswish",
    "cpila",
    "elu",
    "softplus",
    "relu",
    "tanh",
    "sin",
    "identity",
    "lipschitz_cube",
    "maxmin",
    "fullsort",
]  # the keys of the following, for command lines
ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation(
            "lipswish",
            lambda params, x: _lipswish(x, params["beta"]),
            slopes=(_SWISH_LIPSCHITZ / 1.1,),
            initial=(("beta", 0.5),),
        ),
        Activation(
            "clipswish",
            lambda params, x: _clipswish(x, params["beta"]),
            slopes=_CLIPSWISH_SLOPES,
            initial=(("beta", 0.5),),
        ),
        Activation(
            "leakylipswish",
            lambda params, x: _leaky_lipswish(x, params["alpha"], params["beta"]),
            initial=(("alpha", -3.0), ("beta", 0.5)),
        ),
        Activation("cpila", lambda params, x: cpila(x), slopes=_CPILA_SLOPES, other_slopes=(_CPILA_MIDDLE,)),
        _plain("elu", jax.nn.elu),
        _plain("softplus", jax.nn.softplus),
        _plain("relu", jax.nn.relu),
        _plain("tanh", jnp.tanh),
        _plain("sin", jnp.sin),
        _plain("identity", lambda x: x),
        _plain("lipschitz_cube", lipschitz_cube),
        _plain("maxmin", maxmin, group=2),
        _plain("fullsort", lambda x: jnp.sort(x, axis=-1)),
    )
}


# Names of the activations that mix channels; the others act on each channel on its own.
MIXING = frozenset({"maxmin", "fullsort"})


def get_plain_activation(name: str) -> Activation:
    """The activation of this name; ValueError unless it has no parameters and keeps the channels, of any number."""
    found = get_activation(name)
    if found.expansion != 1 or found.initial or found.group != 1:
        raise ValueError(
            f"activation: expected an activation without parameters that keeps the number of channels, got {name!r}"
        )
    return found


def check_single_channels(name: str) -> None:
    """Raises ValueError for the name of an activation that is unknown, or mixes or doubles channels."""
    if get_activation(name).expansion > 1 or name in MIXING:
        raise ValueError(f"activation: expected an activation that acts on single channels, got {name!r}")


def get_activation(name: str) -> Activation:
    """The activation of this name; ValueError, with a list of the names, if there is none."""
    check_choice("activation", name, tuple(ACTIVATIONS))
    return ACTIVATIONS[name]
