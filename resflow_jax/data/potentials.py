"""Unnormalised densities in the plane: targets for variational inference, known up to a constant.

    ring     log p = -((|x| - 2) / 0.4)^2 / 2 + log(exp(-((x1 - 2) / 0.6)^2 / 2) + exp(-((x1 + 2) / 0.6)^2 / 2)) + c
    wave     log p = -((x2 - sin(pi x1 / 2)) / 0.4)^2 / 2 - (x1 / 2)^2 / 2 + c
    banana   log p = -((x2 - x1^2 / 4 + 2) / 0.5)^2 / 2 - (x1 / 1.5)^2 / 2 + c

The first is U1 of Rezende & Mohamed (2015, arXiv 1505.05770), table 1; the second their U2, made proper
by a Gaussian on x1. `log_density(name, x)` takes x [B, 2] and returns [B] in nats, up to the constant c.
Almost all of the mass lies within `POTENTIAL_BOX`.
"""

import jax
import jax.numpy as jnp

from resflow_jax.functional.checks import check_batch, check_choice

Array = jax.Array

POTENTIAL_BOX = (-8.0, 8.0)  # of both coordinates


def log_density(name: str, x: Array) -> Array:
    """log of an unnormalised density at x [B, 2]: [B], in nats.

    Raises:
      ValueError: for a name not in `POTENTIALS` or a wrong shape.
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
