"""Samples with their log-density, and the gradient of both in the parameters: what variational inference needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import resflow_jax as rf
from tests.functional.contractions import z_scores
from tests.moving import change_parameters

SOLVER = rf.FixedPoint(tolerance=1e-13)
CONFIGS = {
    "vectors": rf.VectorFlowConfig(dim=2, blocks=2, hidden=(3,), preactivation="none", coefficient=0.8),
    "images": rf.ImageFlowConfig(
        (4, 4, 1),
        blocks=(1,),
        hidden_channels=2,
        kernels=(3, 3),
        coefficient=0.8,
        data=rf.ImageTransform(logit_alpha=1e-3),
        tail=rf.DenseTail(0),
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def flow(request):
    """A flow whose blocks are far from the identity."""
    flow = rf.ResidualFlow(CONFIGS[request.param], rngs=nnx.Rngs(1))
    change_parameters(flow, lambda p: 3 * p + 0.1)
    flow.converge_norms()
    return flow


def reverse_kl(flow):
    """(parameters, objective(parameters, key, estimator)): E[log p(x) - log q(x)] for a made-up q."""
    graphdef, params, rest = nnx.split(flow, nnx.Param, ...)
    flat, unravel = ravel_pytree(params)

    def objective(flat, key, estimator):
        flow = nnx.merge(graphdef, unravel(flat), rest)
        x, log_prob = flow.sample_and_log_prob(key, 2, estimator=estimator, solver=SOLVER)
        return jnp.mean(log_prob + jnp.sum(jnp.sin(2 * x) + x**2, axis=tuple(range(1, x.ndim))))

    return flat, objective


def test_log_prob_is_that_of_the_samples(flow):
    """The samples are those of the inverse, and their log-density is `log_prob` of them."""
    x, log_prob, diagnostics = flow.sample_and_log_prob(
        jax.random.key(0), 4, estimator=rf.Exact(), solver=SOLVER, return_diagnostics=True
    )
    assert x.shape == (4, *flow.event_shape) and diagnostics.mean.shape == (flow.blocks,)
    np.testing.assert_allclose(log_prob, flow.log_prob(x, estimator=rf.Exact()), rtol=1e-8)
    assert not np.allclose(x[0], x[1])
    with pytest.raises(ValueError, match="shape: expected an integer of at least 1, got 0"):
        flow.sample_and_log_prob(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="estimator: expected Exact, Truncated or Roulette"):
        flow.sample_and_log_prob(jax.random.key(0), 1, estimator="exact")


def test_gradient_with_the_exact_log_det(flow):
    """The path's derivative in the parameters, by central differences of the objective at fixed z."""
    flat, objective = reverse_kl(flow)
    key = jax.random.key(0)
    value_and_grad = jax.jit(jax.value_and_grad(lambda flat: objective(flat, key, rf.Exact())))
    gradient = value_and_grad(flat)[1]
    for direction in np.random.default_rng(0).normal(size=(3, flat.size)):
        above, below = (value_and_grad(flat + h * direction)[0] for h in (1e-5, -1e-5))
        np.testing.assert_allclose(gradient @ direction, (above - below) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("flow", ["vectors"], indirect=True)
def test_gradient_with_roulette_is_unbiased(flow):
    """For the same z, value and gradient are those of the exact log-det on average: within 4.5 standard errors."""
    flat, objective = reverse_kl(flow)

    def error(key):
        estimates = [jax.value_and_grad(objective)(flat, key, e) for e in (rf.Roulette(), rf.Exact())]
        first, second = (jnp.append(gradient, value) for value, gradient in estimates)
        return first - second

    keys = jax.random.split(jax.random.key(1), 400)
    errors = np.asarray(jax.jit(lambda keys: jax.lax.map(error, keys, batch_size=100))(keys))
    varies = errors.std(axis=0) > 1e-12
    assert varies.sum() > 10
    assert np.abs(z_scores(errors[:, varies], 0)).max() < 4.5
    np.testing.assert_allclose(errors[:, ~varies], 0, atol=1e-9)
