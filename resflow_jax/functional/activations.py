"""Activation functions with Lipschitz constant at most one.

A residual block is a contraction only if its activations are known not to
expand, so each activation here comes with its constant, sup_x |phi'(x)|.
LipSwish is Chen et al. (2019, arXiv 1906.02735), section 3.2:

    LipSwish(x) = x * sigmoid(softplus(beta) * x) / 1.1

All functions act elementwise on arrays of any shape and cost one pass over
them. `Activation.function(params, x)` takes the learnable parameters (a dict,
empty for most) first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from resflow_jax.functional.checks import check_choice

Array = jax.Array

# max_t d/dt [t * sigmoid(t)], reached at t = 2.39935728052...; it does not depend on beta,
# because d/dx [x * sigmoid(b x)] is a function of b * x alone.
_SWISH_LIPSCHITZ = 1.0998393201288670


@dataclass(frozen=True)
class Activation:
    """An elementwise function, its Lipschitz constant and its initial parameters.

    Attributes:
      name: the key in `ACTIVATIONS`.
      function: `(params, x) -> y`, with y of x's shape and dtype.
      lipschitz: sup |d function / dx| over all x and all params.
      initial: initial value of each learnable scalar parameter, by name.
    """

    name: str
    function: Callable[[dict[str, Array], Array], Array]
    lipschitz: float
    initial: tuple[tuple[str, float], ...] = ()

    def __call__(self, params: dict[str, Array], x: Array) -> Array:
        return self.function(params, x)


def lipswish(x: Array, beta: Array | float = 0.5) -> Array:
    """x * sigmoid(softplus(beta) * x) / 1.1; Lipschitz constant 0.99985... for every beta."""
    return x * jax.nn.sigmoid(jax.nn.softplus(beta) * x) / 1.1


def lipschitz_cube(x: Array) -> Array:
    """x^3 / 3 on [-1, 1], continued with slope one: x - sign(x) * 2/3 outside."""
    inner = jnp.clip(x, -1, 1)
    return inner**3 / 3 + (x - inner)


def _plain(name: str, function: Callable[[Array], Array]) -> Activation:
    return Activation(name, lambda params, x: function(x), lipschitz=1.0)


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation(
            "lipswish",
            lambda params, x: lipswish(x, params["beta"]),
            lipschitz=_SWISH_LIPSCHITZ / 1.1,
            initial=(("beta", 0.5),),
        ),
        _plain("elu", jax.nn.elu),
        _plain("softplus", jax.nn.softplus),
        _plain("relu", jax.nn.relu),
        _plain("tanh", jnp.tanh),
        _plain("identity", lambda x: x),
        _plain("lipschitz_cube", lipschitz_cube),
    )
}


def get_activation(name: str) -> Activation:
    """Looks an activation up by name; a ValueError lists the known ones."""
    check_choice("activation", name, tuple(ACTIVATIONS))
    return ACTIVATIONS[name]
