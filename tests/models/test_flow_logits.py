"""Classifiers of flows of PyTorch: differentiable under jit; only a flow with classes has logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import resflow_jax as rf
from resflow_jax.interop.torch.flow import TorchFlow, TorchImageConfig
from tests.models.flows import make


def test_logits_without_classes():
    """Only a flow with a classifier has them."""
    flow = TorchFlow(TorchImageConfig((2, 2, 1), blocks=(1,), kernels=(1,), tail=rf.DenseTail(0)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="classes: expected a flow whose config has classes, got none"):
        flow.logits(jnp.zeros((1, 2, 2, 1)))


def test_classifier_is_differentiable():
    """Under jit: the gradient of a cross-entropy in the parameters of flow and heads, by central differences."""
    flow, x = make("images, one dense layer a block")
    graphdef, params, rest = nnx.split(flow, nnx.Param, ...)

    def loss(params):
        return -jnp.mean(jax.nn.log_softmax(nnx.merge(graphdef, params, rest).logits(x))[:, 0])

    loss_and_gradient = jax.jit(jax.value_and_grad(loss))
    value, gradient = loss_and_gradient(params)
    np.testing.assert_allclose(value, -jnp.mean(jax.nn.log_softmax(flow.logits(x))[:, 0]), rtol=1e-12)
    flat, unravel = ravel_pytree(params)
    for part in ("classifier", "bijector"):  # along a direction in the parameters of each
        mask = jax.tree_util.tree_map_with_path(lambda path, p, k=part: jnp.full_like(p, is_of(path, k)), params)
        mask, _ = ravel_pytree(mask)
        step = 1e-6 * mask * np.random.default_rng(0).normal(size=flat.shape)
        change = loss_and_gradient(unravel(flat + step))[0] - loss_and_gradient(unravel(flat - step))[0]
        assert abs(change) > 1e-8
        np.testing.assert_allclose(2 * ravel_pytree(gradient)[0] @ step, change, rtol=1e-6)


def is_of(path, part):
    return f"['{part}']" in jax.tree_util.keystr(path)
