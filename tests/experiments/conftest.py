"""What all tests of experiments need."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from experiments.runs import train


@pytest.fixture(scope="module", autouse=True)
def no_compilation_cache(tmp_path_factory):
    """Programs that a run compiles stay out of the user's cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("cache")))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def compiles_alike(monkeypatch):
    """Processes that a test starts compile as this one does, see `tests/conftest.py`."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")


@pytest.fixture(scope="module")
def shared_steps():
    """Runs of the same model, data, optimiser and devices trace and compile their training step once.

    It is half of the time of a tiny run. What a run does between its steps is its own.
    """
    place, placements = train.place_on_devices, {}

    def placed(trainer, config):
        placement = place(trainer, config)
        plain = replace(config, workdir=Path(), evaluation=None, log_every=1, save_every=None, seed=0)
        return placements.setdefault((plain, placement.mesh), placement)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "place_on_devices", placed)
        yield
