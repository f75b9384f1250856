"""Unnormalised densities in the plane, as targets for variational inference.

    ring     log p = -((|x| - 2) / 0.4)^2 / 2 + log(exp(-((x1 - 2) / 0.6)^2 / 2) + exp(-((x1 + 2) / 0.6)^2 / 2)) + c
    wave     log p = -((x2 - sin(pi x1 / 2)) / 0.4)^2 / 2 - (x1 / 2)^2 / 2 + c
    banana   log p = -((x2 - x1^2 / 4 + 2) / 0.5)^2 / 2 - (x1 / 1.5)^2 / 2 + c

"ring" is U1 of Rezende & Mohamed (2015, arXiv 1505.05770), table 1. "wave" is their U2 with an additional Gaussian
factor in x1, which makes it normalisable. `log_density` omits the constant c. Almost all of the mass lies in
`POTENTIAL_BOX`.
"""

import jax
import jax.numpy as jnp

from resflow_jax.functional.checks import check_batch, check_choice

Array = jax.Array

POTENTIAL_BOX = (-8.0, 8.0)  # range of both coordinates


def log_density(name: str, x: Array) -> Array:
    """The log of an unnormalised density at x [B, 2]: floats [B], in nats.

    Raises:
      ValueError: if the name is not in `POTENTIALS`, or x is not a float array [B, 2].

    Example:
      >>> from resflow_jax.data.potentials import log_density
      >>> log_density("wave", jnp.array([[2.0, 0.0], [0.0, 0.4]])).tolist()
      [-0.5, -0.5]
    """
    check_choice("name", name, POTENTIALS)
    check_batch("x", x, (2,))
    return _LOG_DENSITIES[name](x[:, 0], x[:, 1])


def _ring(x1: Array, x2: Array) -> Array:
    modes = jnp.logaddexp(_gaussian(x1, 2.0, 0.6), _gaussian(x1, -2.0, 0.6))
    return _gaussian(jnp.sqrt(x1**2 + x2**2 + 1e-12), 2.0, 0.4) + modes


def _wave(x1: Array, x2: Array) -> Array:
    return _gaussian(x2, jnp.sin(jnp.pi * x1 / 2), 0.4) + _gaussian(x1, 0.0, 2.0)


def _banana(x1: Array, x2: Array) -> Array:
    return _gaussian(x2, x1**2 / 4 - 2, 0.5) + _gaussian(x1, 0.0, 1.5)


def _gaussian(x: Array, mean: Array | float, deviation: float) -> Array:
    return -0.5 * ((x - mean) / deviation) ** 2


_LOG_DENSITIES = {"ring": _ring, "wave": _wave, "banana": _banana}
POTENTIALS = tuple(_LOG_DENSITIES)
