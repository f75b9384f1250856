"""Training losses: the gradient of learned orders of norms, and running statistics."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.training.losses import negative_log_likelihood, update_running_statistics, with_order_gradient
from resflow_jax.training.step import Trainer

CONFIG = rf.VectorFlowConfig(
    dim=2,
    blocks=2,
    hidden=(3,),
    preactivation="all",
    between=rf.BetweenBlocks(batchnorm=True, centering="layers"),
    norms=rf.Norms(learned=True),
)
X = jax.random.normal(jax.random.key(0), (16, 2)) * jnp.asarray([[1.0, 3.0]]) + 2


def plain_loss(flow, x):
    return -jnp.mean(flow.log_prob(x, estimator=rf.Exact()))


def loss(flow, x, key, estimator, step):
    log_prob, diagnostics = flow.log_prob(x, estimator=estimator, return_diagnostics=True)
    update_running_statistics(flow, x)
    return with_order_gradient(-jnp.mean(log_prob), flow), diagnostics


@pytest.fixture(scope="module")
def flow():
    """Initialised, with kernels at their coefficients and orders away from 2."""
    flow = rf.ResidualFlow(CONFIG, rngs=nnx.Rngs(1))
    flow.initialize(X[:8])
    params = nnx.state(flow, nnx.Param)

    def move(path, leaf):
        names = jax.tree_util.keystr(path)
        return leaf + 0.3 if is_order(path) else 4 * leaf if "kernel" in names else leaf

    nnx.update(flow, jax.tree_util.tree_map_with_path(move, params))
    flow.converge_norms()
    return flow


def is_order(path):
    return "domain" in jax.tree_util.keystr(path)  # of the "codomain" too


def orders(params):
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if is_order(path)]


@pytest.fixture(scope="module")
def steps(flow):
    """Four steps of training: the trainer and the states around them."""
    trainer = Trainer(nnx.split(flow)[0], loss, optax.adam(0.02), ema_decay=0.5)
    step = jax.jit(trainer.step)
    states = [trainer.create_state(flow, rf.Exact())]
    for _ in range(4):
        states.append(step(states[-1], X, jax.random.key(0))[0])
    return trainer, states


def test_gradient_of_learned_orders(flow):
    """The likelihood gives orders no gradient; only the weighted order loss does. Value and other gradients stay."""
    graphdef, params, non_params = nnx.split(flow, nnx.Param, ...)

    def of(function):
        return lambda params: function(nnx.merge(graphdef, params, non_params, copy=True))

    weighted_loss = negative_log_likelihood(order_weight=0.5)

    @jax.jit
    def gradients(params):
        plain = jax.value_and_grad(of(lambda flow: plain_loss(flow, X)))(params)
        tended = jax.value_and_grad(of(lambda flow: with_order_gradient(plain_loss(flow, X), flow)))(params)
        weighted = jax.grad(of(lambda flow: weighted_loss(flow, X, jax.random.key(0), rf.Exact(), 0)[0]))(params)
        return plain, tended, weighted, jax.value_and_grad(of(lambda flow: flow.order_loss()))(params)

    (plain, plain_gradient), (tended, gradient), weighted, (order_loss, order_gradient) = gradients(params)
    np.testing.assert_allclose(tended, plain, rtol=1e-14)
    assert len(orders(params)) == 2, "one a gap between layers, the last that of the first"
    for a, b, c, d in zip(*map(orders, (plain_gradient, gradient, order_gradient, weighted)), strict=True):
        assert not a.any() and b.all()
        np.testing.assert_allclose(b, 0.01 * c, rtol=1e-10)
        np.testing.assert_allclose(d, 0.5 * c, rtol=1e-10)
    for (path, a), b, c in zip(
        jax.tree_util.tree_leaves_with_path(plain_gradient),
        jax.tree.leaves(gradient),
        jax.tree.leaves(order_gradient),
        strict=True,
    ):
        if not is_order(path):
            np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-14)
            assert not c.any()
    norms = [jax.vmap(lambda layer: layer.norm())(linear) for linear in linears(flow)]
    np.testing.assert_allclose(order_loss, np.mean(norms), rtol=1e-6)


def linears(flow):
    (stack,) = [bijector for bijector in flow.scales[0].bijectors if bijector.blocks]
    return stack.steps.bijectors[0].contraction.linears


def test_training_moves_orders_and_keeps_them_shared(steps):
    """Orders move, the last stays that of the first, and the certificate is of the orders as they are."""
    trainer, states = steps
    for before, after in zip(orders(states[0].params), orders(states[-1].params), strict=True):
        assert (np.abs(after - before) > 1e-3).all()
    flow = trainer.current_flow(states[-1])
    first, second = linears(flow)
    assert first.domain is second.codomain and first.codomain is second.domain
    flow.tighten()
    certificate = rf.certify(flow)
    for n, block in enumerate(certificate.blocks):
        assert block.bound <= block.target_bound
        found = flow.scales[0].bijectors[-1].unstacked()[n].bijectors[0].contraction.linears[0].orders()
        assert (block.layers[0].domain, block.layers[0].codomain) in (found, (2.0, 2.0))
        assert 2 not in found


def test_a_step_moves_running_statistics(flow, steps):
    """Statistics move by `decay` towards those of the batch, in the flow before the step; log_prob keeps them."""
    _, states = steps
    graphdef, state = nnx.split(flow)
    expected = nnx.merge(graphdef, state, copy=True)
    expected.log_prob(X, estimator=rf.Exact())
    chex.assert_trees_all_equal(nnx.state(expected), nnx.state(flow))
    expected.update_statistics(X)
    old, new = (nnx.state(f, nnx.BatchStat) for f in (flow, expected))
    found = nnx.filter_state(states[1].non_params, nnx.BatchStat)
    chex.assert_trees_all_close(found, new, rtol=1e-10)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert not np.allclose(a, b)
    # The first block's layer sees y = x + g(x) after the first ActNorm, with the moved means inside g.
    chain = flow.scales[0].bijectors
    y = chain[1].unstacked()[0].bijectors[0].update_statistics(chain[0](X))
    norm = chain[1].unstacked()[0].bijectors
    y = norm[1](y)
    np.testing.assert_allclose(
        expected.scales[0].bijectors[1].steps.bijectors[2].mean[...][0],
        0.9 * norm[2].mean[...] + 0.1 * jnp.mean(y, 0),
        rtol=1e-10,
    )
    center = chain[1].steps.bijectors[0].contraction.pre_center
    np.testing.assert_allclose(
        expected.scales[0].bijectors[1].steps.bijectors[0].contraction.pre_center.mean[...][0],
        0.9 * center.mean[...][0] + 0.1 * jnp.mean(chain[0](X), 0),
        rtol=1e-10,
    )


@pytest.mark.parametrize("running", [{"batchnorm": True}, {"centering": "blocks"}, {"centering": "layers"}])
def test_each_kind_of_running_statistics_is_moved(running, monkeypatch):
    """Statistics are moved by the batch and by its condition, as far as the flow has either."""
    seen = []
    config = rf.VectorFlowConfig(2, 1, (3,), condition_dim=1, between=rf.BetweenBlocks(**running))
    flow = nnx.eval_shape(lambda: rf.ResidualFlow(config, rngs=nnx.Rngs(0)))
    monkeypatch.setattr(rf.Flow, "update_statistics", lambda flow, x, condition: seen.append((x, condition)))
    condition = jnp.ones((len(X), 1))
    update_running_statistics(flow, X, condition)
    ((x, given),) = seen
    np.testing.assert_array_equal(x, X)
    assert given is condition


def test_flows_with_neither_are_left_alone():
    """Without statistics and learned orders the loss is not changed."""
    flow = nnx.eval_shape(lambda: rf.ResidualFlow(rf.VectorFlowConfig(2, 1, (3,)), rngs=nnx.Rngs(0)))
    value = jnp.asarray(3.0)
    before = nnx.state(flow)
    update_running_statistics(flow, X)
    assert with_order_gradient(value, flow) is value
    assert nnx.state(flow) == before


def test_a_weight_that_is_not_finite():
    """The error names the argument."""
    with pytest.raises(ValueError, match="order_weight: expected a finite number, got nan"):
        negative_log_likelihood(order_weight=float("nan"))
