"""What all tests of experiments need."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.runs import rehearsal, train


@pytest.fixture(scope="module", autouse=True)
def own_compilation_cache(tmp_path_factory):
    """Programs that a run compiles stay out of the user's cache; the tests of a worker share another one."""
    directory = tmp_path_factory.getbasetemp() / "programs"
    values = {"enable_compilation_cache": True, "compilation_cache_dir": str(directory)}
    values |= {"persistent_cache_min_compile_time_secs": 0.3}
    before = {name: getattr(jax.config, f"jax_{name}") for name in values}
    _configure(values)
    yield
    _configure(before)


def _configure(values):
    """Sets options of JAX, and makes it look at them."""
    for name, value in values.items():
        jax.config.update(f"jax_{name}", value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def no_rehearsals():
    """Runs do not compile programs before their first step, as on one core: most of these are compiled anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "number_of_cores", lambda: 1)
        yield


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
