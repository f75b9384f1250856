"""The README's example runs as it stands."""

import re
from pathlib import Path

import jax
import numpy as np


def test_the_example_runs():
    """The Python block trains a step and draws sixteen finite samples."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(example, names)
    assert np.isfinite(names["loss"])
    assert names["samples"].shape == (16, 8, 8, 1) and jax.numpy.isfinite(names["samples"]).all()
