"""Every test runs in float64, so that a wrong formula cannot hide behind rounding."""

import jax

jax.config.update("jax_enable_x64", True)
