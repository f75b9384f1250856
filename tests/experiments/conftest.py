"""What all tests of experiments need."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def no_compilation_cache(tmp_path_factory):
    """Programs that a run compiles stay out of the user's cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    yield
    jax.config.update("jax_compilation_cache_dir", before)
