"""The solvers, and a contraction to solve for."""

from functools import partial

import jax.numpy as jnp
import pytest

from resflow_jax.functional.inverse import residual_inverse
from resflow_jax.functional.solvers import Anderson, Broyden, FixedPoint

SOLVERS = {"fixed point": FixedPoint(), "anderson": Anderson(), "broyden": Broyden()}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
with_status = partial(residual_inverse, return_status=True)


def sine(params, x):
    """An elementwise contraction, also in the maximum norm, of Lipschitz constant 0.9."""
    return 0.9 * jnp.sin(params * x)
