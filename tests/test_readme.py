"""The README's examples run as they stand."""

import re
from pathlib import Path

import jax
import numpy as np


def test_the_examples_run():
    """One after the other: the flow trains a step, draws sixteen finite samples, and is certified."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    names = {}
    # the examples leave promotion to JAX, as most programs do, and optax always does
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for example in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(example, names)
    assert names["report"].is_certified
    assert np.isfinite(names["loss"])
    assert names["samples"].shape == (16, 2) and jax.numpy.isfinite(names["samples"]).all()
