"""Flows with the weights of the PyTorch implementation reproduce what it computes, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import resflow_jax as rf
from tests.reference import FINAL_SHAPES, channels_last, load_arrays, load_flow

# variant: (checkpoint, weights, whether to iterate the norms to convergence, suffix of the expected arrays)
VARIANTS = {
    "mnist raw stored": ("mnist_tiny", "raw", False, "train_weights", "train"),
    "mnist raw converged": ("mnist_tiny", "raw", True, "train_weights_converged", "train_converged"),
    "mnist ema stored": ("mnist_tiny", "ema", False, "ema_stored_uv", "ema_stored_uv"),
    "mnist ema converged": ("mnist_tiny", "ema", True, "ema_converged", "ema_converged"),
    "toy raw stored": ("toy2d", "raw", False, "train_weights", "train"),
    "toy raw converged": ("toy2d", "raw", True, "train_weights_converged", "train_converged"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_reproduces_z_log_det_and_inverse(variant):
    """z and log-det to 1e-9 with the stored u, v and to 1e-8 with converged ones, then the inverse to 1e-8 too."""
    name, weights, converge, z_name, suffix = VARIANTS[variant]
    arrays = load_arrays(name)
    expected = {k.removeprefix("expected/"): v for k, v in arrays.items() if k.startswith("expected/")}
    flow = load_flow(name, weights)
    if converge:
        status = flow.update_norms(tolerance=1e-15, max_iterations=20000)
        assert status.residual < 1e-4
    x = expected["x"].transpose(0, 2, 3, 1) if expected["x"].ndim == 4 else expected["x"]
    z, log_det = flow.forward(jnp.asarray(x), estimator=rf.Exact())
    order = channels_last(FINAL_SHAPES[name])
    tolerance = 1e-8 if converge else 1e-9
    np.testing.assert_allclose(z, expected[f"z_{z_name}"][:, order], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(log_det, expected[f"logdet_exact_{suffix}"], rtol=tolerance, atol=tolerance)
    if f"log_px_{suffix}" in expected:
        log_prob = flow.log_prob(jnp.asarray(x), estimator=rf.Exact())
        np.testing.assert_allclose(log_prob, expected[f"log_px_{suffix}"], rtol=tolerance, atol=tolerance)
    if f"x_from_z_{suffix}" in expected and converge:
        want = expected[f"x_from_z_{suffix}"]
        want = want.transpose(0, 2, 3, 1) if want.ndim == 4 else want
        got, status = flow.inverse(jnp.asarray(expected["z_probe"][:, order]), return_status=True)
        assert status.converged.all()
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8)
