"""The bridges are found by name, and a library that is not installed is named with the extra that brings it."""

import sys
from importlib import import_module

import pytest

import resflow_jax.interop


@pytest.mark.parametrize("library", ["distrax", "numpyro", "flowjax"])
def test_a_missing_library_is_named_with_its_extra(library, monkeypatch):
    module = f"resflow_jax.interop.{library}"
    monkeypatch.setitem(sys.modules, "equinox" if library == "flowjax" else library, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(
        ImportError, match=rf"{library} needs the extra {library}: pip install 'resflow_jax\[{library}\]'"
    ):
        import_module(module)


def test_bridges_are_found_by_name():
    assert resflow_jax.interop.stateless.__name__ == "resflow_jax.interop.stateless"
    assert {"distrax", "numpyro", "flowjax", "stateless"} <= set(dir(resflow_jax.interop))
    with pytest.raises(AttributeError, match=r"resflow_jax\.interop has no attribute 'keras'"):
        _ = resflow_jax.interop.keras
