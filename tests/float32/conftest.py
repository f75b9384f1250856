"""What users run: float32, XLA as it comes, two CPU devices; in a process that `tests/test_float32.py` starts.

Collected with the tests in float64 there is nothing here.
"""

import jax

from tests import contexts

contexts.share()
jax.config.update("jax_traceback_in_locations_limit", 0)  # as in `tests/conftest.py`; it changes no instruction
collect_ignore_glob = ["*"] if jax.config.jax_enable_x64 else []
if not jax.config.jax_enable_x64:
    jax.config.update("jax_num_cpu_devices", 2)
