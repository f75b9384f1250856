"""Examples in docstrings run as a reader would run them: in an empty directory, with JAX's default types.

The names that the examples use without an import are those of the usual imports:

    import jax, jax.numpy as jnp, numpy as np, resflow_jax as rf
    from flax import nnx
"""

from importlib.util import find_spec

import pytest

# Bridges to libraries that are not installed cannot be imported.
collect_ignore_glob = [
    f"interop/{library}*.py" for library in ("distrax", "flowjax", "numpyro") if find_spec(library) is None
]


@pytest.fixture(autouse=True)
def as_a_reader(request):
    """The usual imports, JAX's default types and an empty directory, for doctests alone."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    import jax
    import numpy as np
    from flax import nnx

    import resflow_jax as rf

    names = {"jax": jax, "jnp": jax.numpy, "np": np, "nnx": nnx, "rf": rf}
    request.getfixturevalue("doctest_namespace").update(names)
    request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
