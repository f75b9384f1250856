"""Settings and data that strain the numbers: what `rf.fit` returns is finite, or an error says that it diverged."""

import jax
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf

X = np.random.default_rng(0).normal(size=(12, 2))


@pytest.mark.parametrize(
    ("x", "model", "options"),
    [
        (X, {}, {"learning_rate": 100.0}),
        (X, {"coefficient": 0.999}, {}),
        (X.astype(np.float16), {"matmul_dtype": "bfloat16"}, {}),
        (np.repeat(X[:2], 6, axis=0), {}, {"batch_size": 1}),
    ],
    ids=["learning rate of 100", "coefficient of 0.999", "float16 and bfloat16", "duplicates in batches of one"],
)
def test_finite_or_told(x, model, options):
    flow = rf.ResidualFlow(rf.VectorFlowConfig(2, 2, (4,), **model), rngs=nnx.Rngs(0))
    try:
        fitted, history = rf.fit(flow, x, **{"steps": 12, "batch_size": 4, "progress": False, **options})
    except rf.FitDivergedError as error:
        assert "diverged" in str(error)
        return
    assert np.isfinite(history.train).all() and np.isfinite(history.validation).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(fitted, nnx.Param)))
    assert rf.certify(fitted).bounds.max() < 1.01
