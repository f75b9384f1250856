"""Files of before compositions load, with the outputs that they had."""

from pathlib import Path

import jax
import numpy as np
import pytest

import resflow_jax as rf

OLD = Path(__file__).parents[1] / "data" / "before_compositions"


@pytest.mark.parametrize("name", ["image", "densenet", "vector"])
def test_old_files(name):
    """With factor-out and a classifier; padded by noise; with mixed norms."""
    expected = np.load(OLD / "expected.npz")
    flow = rf.load(OLD / f"{name}.safetensors")
    x, options = expected[f"{name}.x"], {"key": jax.random.key(2), "estimator": rf.Exact()}
    z, log_det = flow.forward(x, **options)
    np.testing.assert_allclose(z, expected[f"{name}.z"], atol=1e-9)
    np.testing.assert_allclose(log_det, expected[f"{name}.log_det"], atol=1e-9)
    np.testing.assert_allclose(flow.log_prob(x, **options), expected[f"{name}.log_prob"], atol=1e-9)
    if name == "image":
        np.testing.assert_allclose(flow.logits(x), expected["image.logits"], atol=1e-9)
