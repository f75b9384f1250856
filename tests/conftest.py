"""Every test runs in float64, so that a wrong formula cannot hide behind rounding.

The programs are tiny, compiled often and run once: most of XLA's optimisations cost more than they bring.
"""

from pathlib import Path

import jax
import pytest

MAPS = Path("/proc/self/maps")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every compiled program holds memory maps, of which Linux allows 65530 a process: XLA crashes at the last."""
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > 20_000:
        jax.effects_barrier()
        jax.clear_caches()
