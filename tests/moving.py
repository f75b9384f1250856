"""Parameters away from their start, so that no part of a map is the identity and no term of a log-det is zero."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def change_parameters(module, change):
    """Changes all parameters of a module by NumPy, as JAX would compile a program for each operation and shape."""
    params = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda p: jnp.asarray(change(np.asarray(p)), p.dtype), params))


def add_noise(module, size, seed=3):
    """Adds normal noise of a size to all parameters of a module."""
    rng = np.random.default_rng(seed)
    change_parameters(module, lambda p: p + size * rng.normal(size=p.shape))
