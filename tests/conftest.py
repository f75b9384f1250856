"""Every test runs in float64, so that rounding cannot mask a wrong formula, and fails if a tracer leaks.

The programs are tiny and usually run once. Most of XLA's optimisations would cost more time than they save, its older
emitters of fusions compile in half of the time, and it should not divide the compilation of a program among threads,
since every core runs tests. Python's garbage collector traverses all traced programs, so it runs rarely.
"""

import gc
import os
from pathlib import Path

import jaxlib.version
import pytest

if jaxlib.version.__version__.startswith("0.10."):  # XLA ends a process for a flag that it does not know
    FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
gc.set_threshold(200_000, 20, 100)

import jax  # noqa: E402

from tests import contexts, leaks  # noqa: E402

MAPS = Path("/proc/self/maps")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_enable_compilation_cache", False)  # JAX would hash every program, also without a directory
jax.config.update("jax_traceback_in_locations_limit", 0)  # the lines of the source in programs, which cost 8 %
# what users switch on to find mistakes in their own code: nothing here may depend on an implicit promotion
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# JAX 0.12 itself keeps tracers alive in the programs of rules of derivatives, so that nothing is checked there.
CHECKS_LEAKS = leaks.watch() if jax.__version_info__ < (0, 12) else None
contexts.share()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every compiled program holds memory maps. Linux allows 65530 per process, and XLA crashes beyond that.

    JAX also remembers at most 8192 calls of jitted functions; when it is full, `_cache_size()` of a new one is 0. Both
    limits are far away if programs are forgotten at 30000 maps.

    What is alive when a file begins is left out of collections of garbage until programs are forgotten: each of them,
    those of the check for leaks too, would traverse it again.
    """
    gc.freeze()
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > 30_000:
        gc.unfreeze()
        jax.effects_barrier()
        jax.clear_caches()


SLOW = (
    "test_float32.py",
    "test_processes.py",
    "test_readme.py",
    "test_guides.py",
    "test_stress_files.py",
    "test_conditional.py",
    "studies/test_estimators.py",
    "test_modes.py",
)


def pytest_collection_modifyitems(items):
    """Puts files with tests of tens of seconds first: a worker that got one of them last would end alone."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(SLOW))
