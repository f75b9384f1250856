"""Every test runs in float64, so that a wrong formula cannot hide behind rounding, and fails if a tracer leaks.

The programs are tiny, compiled often and run once: most of XLA's optimisations cost more than they bring, and its
older emitters of fusions compile in half of the time. Python's garbage collector, which looks at every traced program
anew, runs rarely.
"""

import gc
import os
from pathlib import Path

import jaxlib.version
import pytest

if jaxlib.version.__version__.startswith("0.10."):  # XLA ends a process for a flag that it does not know
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
gc.set_threshold(200_000, 20, 100)

import jax  # noqa: E402

from tests import leaks  # noqa: E402

MAPS = Path("/proc/self/maps")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
# what users switch on to find mistakes in their own code: nothing here may depend on an implicit promotion
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
CHECKS_LEAKS = leaks.watch()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every compiled program holds memory maps, of which Linux allows 65530 a process: XLA crashes at the last."""
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > 20_000:
        jax.effects_barrier()
        jax.clear_caches()
