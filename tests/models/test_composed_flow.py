"""`rf.Flow`: any bijector on any base, with a condition and without; its methods agree with a dense computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.activations import get_activation
from resflow_jax.functional.linear_maps import DenseMap
from resflow_jax.layers.contraction import Layered
from tests.moving import change_parameters

SOLVER = rf.FixedPoint(tolerance=1e-13)
EXACT = rf.Exact()
DIM = 3


def contraction(rngs, condition_shape=None):
    maps = [DenseMap(DIM, 4), DenseMap(4, DIM)]
    options = {"preactivation": False, "condition_shape": condition_shape}
    return Layered(maps, get_activation("lipswish"), 0.8, **options, rngs=rngs)


def make_flow(condition_shape=None, depth=2):
    def step(rngs):
        return rf.Chain([rf.ResidualBlock(contraction(rngs, condition_shape)), rf.ActNorm((DIM,))])

    rngs = nnx.Rngs(0)
    inverse = rf.Invert(rf.ResidualBlock(contraction(rngs)), SOLVER)
    return rf.Flow(rf.Chain([rf.ActNorm((DIM,)), rf.ResidualStack(step, depth, rngs=rngs), inverse]))


@pytest.fixture(scope="module", params=[None, (2,)], ids=["p(x)", "p(x | c)"])
def case(request):
    """A flow away from its start, x [4, 3] and c [4, 2] or None."""
    flow = make_flow(request.param)
    x = 3 + 2 * jax.random.normal(jax.random.key(1), (4, DIM))
    condition = None if request.param is None else jax.random.normal(jax.random.key(2), (4, *request.param))
    flow.initialize(x, condition)
    change_parameters(flow, lambda p: 2 * p + 0.1)
    flow.converge_norms()
    return flow, x, condition


def test_density(case):
    """log_prob is log N(z; 0, I) and the log-det of the dense Jacobian; forward, call and inverse agree."""
    flow, x, c = case
    z, log_det, diagnostics = flow.forward(x, condition=c, estimator=EXACT, return_diagnostics=True)
    graphdef, state = nnx.split(flow)

    def of_one(state, x, c):
        z = nnx.merge(graphdef, state)(x[None], None if c is None else c[None])[0]
        return z, z

    jacobians, again = jax.jit(jax.vmap(jax.jacfwd(of_one, argnums=1, has_aux=True), (None, 0, 0)))(state, x, c)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], rtol=1e-9)
    np.testing.assert_allclose(again, z, rtol=1e-10)
    expected = -0.5 * (z**2).sum(-1) - 1.5 * np.log(2 * np.pi) + log_det
    np.testing.assert_allclose(flow.log_prob(x, condition=c, estimator=EXACT), expected, rtol=1e-10)
    assert diagnostics.mean.shape == (flow.blocks,) == (3,)
    back, status = flow.inverse(z, condition=c, solver=SOLVER, return_status=True)
    np.testing.assert_allclose(back, x, atol=1e-9)
    assert status.converged.shape == (3, 4) and status.converged.all()
    found, log_prob = flow.inverse_and_log_prob(z, condition=c, estimator=EXACT, solver=SOLVER)
    np.testing.assert_allclose(found, x, atol=1e-9)
    np.testing.assert_allclose(log_prob, expected, atol=1e-7)


def test_samples(case):
    """sample(key, n) and sample(key, shape) draw the same z; one condition for all, or one each; temperatures."""
    flow, _, c = case
    key = jax.random.key(3)
    x = flow.sample(key, 4, condition=None if c is None else c[0], solver=SOLVER)
    same = flow.sample(key, (2, 2), condition=None if c is None else c[0], solver=SOLVER)
    np.testing.assert_allclose(same.reshape(4, DIM), x, rtol=1e-12)
    z = jax.random.normal(key, (4, DIM))
    of_all = None if c is None else jnp.broadcast_to(c[0], (4, 2))
    np.testing.assert_allclose(flow.inverse(z, condition=of_all, solver=SOLVER), x, rtol=1e-12)
    if c is not None:
        each = flow.sample(key, 4, condition=c, solver=SOLVER)
        np.testing.assert_allclose(each, flow.inverse(jax.random.normal(key, (4, DIM)), condition=c, solver=SOLVER))
        assert np.abs(each - x)[1:].max() > 1e-3
    cold = flow.sample(key, 4, condition=c, temperature=0.0, solver=SOLVER)
    np.testing.assert_allclose(cold, flow.inverse(jnp.zeros((4, DIM)), condition=c, solver=SOLVER), rtol=1e-12)
    x, log_prob = flow.sample_and_log_prob(
        key, (2, 2), condition=None if c is None else c[0], solver=SOLVER, estimator=EXACT
    )
    assert x.shape == (2, 2, DIM) and log_prob.shape == (2, 2)
    again = flow.log_prob(x.reshape(4, DIM), condition=of_all, estimator=EXACT)
    np.testing.assert_allclose(log_prob.ravel(), again, atol=1e-8)


def test_transformations(case):
    """Under jit, vmap over examples and their conditions, scan, and with a gradient in all: what a loop gives."""
    flow, x, c = case
    graphdef, state = nnx.split(flow)

    def log_prob(state, x, c):
        return nnx.merge(graphdef, state).log_prob(x, condition=c, estimator=EXACT)

    expected = flow.log_prob(x, condition=c, estimator=EXACT)
    lift = lambda a: None if a is None else a[:, None]  # noqa: E731
    mapped = jax.jit(jax.vmap(log_prob, in_axes=(None, 0, 0)))(state, lift(x), lift(c))
    np.testing.assert_allclose(mapped[:, 0], expected, rtol=1e-10)
    scanned = jax.lax.scan(lambda _, xc: (None, log_prob(state, *xc)), None, (lift(x), lift(c)))[1]
    np.testing.assert_allclose(scanned[:, 0], expected, rtol=1e-10)
    gradient = jax.jit(jax.grad(lambda c, x: log_prob(state, x, c).sum(), argnums=1))(c, x)
    step = 1e-6 * jax.random.normal(jax.random.key(0), x.shape)
    change = log_prob(state, x + step, c) - log_prob(state, x - step, c)
    np.testing.assert_allclose(2 * (gradient * step).sum(-1), change, rtol=1e-5)


def test_norms_and_certificate(case):
    """All layers are within their coefficients; tighten brings all blocks within their promise, inverted ones too."""
    flow, x, c = case
    before = flow.log_prob(x, condition=c, estimator=EXACT)
    assert flow.update_norms().converged
    report = rf.certify(flow)
    assert report.bounds.shape == (3,) and report.norms.max() < 0.81 and not report.unproved
    flow.tighten()
    after = rf.certify(flow)
    assert after.is_certified and all(block.bound <= block.target_bound for block in after.blocks)
    np.testing.assert_allclose(flow.log_prob(x, condition=c, estimator=EXACT), before, rtol=0.01)


def test_depth_costs_no_program():
    """The lowered log_prob of a stack is as long for 4 layers as for 7."""
    sizes = []
    for depth in (4, 7):
        graphdef, state = nnx.split(nnx.eval_shape(lambda depth=depth: make_flow((2,), depth)))

        def log_prob(state, x, c, key, graphdef=graphdef):
            return nnx.merge(graphdef, state).log_prob(x, condition=c, key=key)

        shapes = [jax.ShapeDtypeStruct((4, n), float) for n in (DIM, 2)]
        lowered = jax.jit(log_prob).lower(state, *shapes, jax.random.key(0))
        sizes.append(len(lowered.as_text().splitlines()))
    assert sizes[0] == sizes[1]


def test_batch_shared_by_devices(case):
    """Divided over two devices by shard_map, with one key: the numbers of the whole batch."""
    flow, x, c = case
    graphdef, state = nnx.split(flow)
    key, mesh = jax.random.key(4), jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def log_prob(state, x, c):
        return nnx.merge(graphdef, state).log_prob(x, condition=c, key=key, estimator=rf.Roulette())

    expected = log_prob(state, x, c)
    share = spec("data")
    shared = jax.shard_map(log_prob, mesh=mesh, in_specs=(spec(), share, share), out_specs=share)
    np.testing.assert_allclose(jax.jit(shared)(state, x, c), expected, rtol=1e-9)


def test_shapes_that_do_not_fit():
    """Errors name both sides."""
    chain = rf.Chain([rf.ActNorm((DIM,)), rf.ResidualBlock(contraction(nnx.Rngs(0)))])
    with pytest.raises(
        ValueError,
        match=r"base: expected a distribution of events \(3,\), .* bijector returns for \(3,\), got events \(2,\)",
    ):
        rf.Flow(chain, rf.StandardNormal((2,)))
    with pytest.raises(ValueError, match=r"bijector: bijectors\[0\] \(ActNorm\): expected events .* ends in \(3,\)"):
        rf.Flow(rf.Chain([rf.ActNorm((3,))]), event_shape=(2,))
    with pytest.raises(ValueError, match="event_shape: expected the shape of one x, since neither"):
        rf.Flow(rf.Logit(0.1))
    assert rf.Flow(rf.Logit(0.1), rf.StandardNormal((2, 2))).event_shape == (2, 2)
    flow = rf.Flow(chain)
    for call in (flow.forward, flow.log_prob, flow.initialize, flow):
        with pytest.raises(ValueError, match=r"x: expected a float array \[B, 3\], got shape \(2, 4\)"):
            call(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"z: expected a float array \[B, 3\], got shape \(2, 4\)"):
        flow.inverse(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="bijector: expected Bijector, got Layered"):
        rf.Flow(contraction(nnx.Rngs(0)))
    conditional, bad = make_flow((2,)), jnp.asarray([1.0, jnp.nan])
    x = jnp.ones((4, DIM))
    for call in (
        lambda: conditional.log_prob(x, condition=bad, estimator=EXACT),
        lambda: conditional(x, np.asarray(bad)),
        lambda: conditional.inverse(x, condition=bad),
        lambda: conditional.sample(jax.random.key(0), 4, condition=bad),
        lambda: conditional.inverse_and_log_prob(x, condition=bad, estimator=EXACT),
    ):
        with pytest.raises(ValueError, match="condition: expected finite values, got 1"):
            call()
    several = conditional.sample(jax.random.key(0), (3, 2), condition=jnp.ones((3, 1, 2)), solver=SOLVER)
    np.testing.assert_array_equal(
        several, conditional.sample(jax.random.key(0), (3, 2), condition=jnp.ones(2), solver=SOLVER)
    )
    with pytest.raises(ValueError, match=r"condition: expected floats \[3, 2, 2\].*, got shape \(2, 1, 2\)"):
        conditional.sample(jax.random.key(0), (3, 2), condition=jnp.ones((2, 1, 2)))
    with pytest.raises(ValueError, match="condition: expected None, since no part takes a condition"):
        flow.sample(jax.random.key(0), 2, condition=jnp.ones(2))
    with pytest.raises(
        ValueError,
        match=r"condition: expected floats \[2, 5, 2\], .*, or \[2\], one for all, got None",
    ):
        make_flow((2,)).sample(jax.random.key(0), (2, 5))


def test_flow_in_closed_form():
    """Without residual blocks no key is asked for; samples are clipped to the support; statuses have no rows."""
    flow = rf.Flow(rf.Chain([rf.Logit(0.1), rf.ActNorm((2,))]), rf.StandardNormal((2,)))
    x = jax.random.uniform(jax.random.key(0), (100, 2))
    flow.initialize(x)
    log_prob = flow.log_prob(x)
    y = np.asarray(flow(x))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-10)
    assert np.isfinite(log_prob).all() and flow.update_norms().converged and rf.certify(flow).bounds.size == 0
    samples, status = flow.sample(jax.random.key(1), 500, return_status=True)
    assert samples.min() == 0 and samples.max() == 1 and status.converged.shape == (0, 500)
    with pytest.raises(ValueError, match=r"x: expected values in \[0, 1\]"):
        flow.log_prob(x + 1)
