"""A composed conditional flow in every library, against its own log_prob and samples; one condition for all or each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.interop.sampling import SamplingMap
from tests.interop.flows import SOLVER
from tests.io.flows import contraction, perturbed

pytestmark = pytest.mark.usefixtures("promotion")

EXACT = {"estimator": rf.Exact(), "solver": SOLVER}
ONE = jnp.asarray([0.5, -1.0, 2.0])
Z = jax.random.normal(jax.random.key(0), (4, 2))
EACH = jax.random.normal(jax.random.key(1), (4, 3))


class Shifted(rf.Base):
    """N(mean + sum of the condition, 1) with a learnable mean."""

    condition_shape = (3,)

    def __init__(self):
        self.event_shape = (2,)
        self.mean = nnx.Param(jnp.asarray([0.5, -0.5]))

    def _mean(self, condition):
        return self.mean[...][None] + 0.1 * condition.sum(axis=1, keepdims=True)

    def log_prob(self, z, condition=None):
        return -0.5 * jnp.sum((z - self._mean(condition)) ** 2, axis=1) - jnp.log(2 * jnp.pi)

    def sample(self, key, num_samples, condition=None, temperature=1.0):
        return self._mean(condition) + temperature * jax.random.normal(key, (num_samples, 2))


def make(base=None, seed=0):
    """ActNorm, a conditional block, the inverse of another."""
    rngs = nnx.Rngs(seed)

    def block(condition_dim):
        return rf.ResidualBlock(contraction(rngs, 2, condition_dim))

    chain = rf.Chain([rf.ActNorm((2,)), block(3), rf.Invert(block(None), SOLVER)])
    return perturbed(rf.Flow(chain, base), seed)


@pytest.fixture(scope="module")
def flow():
    return make()


@pytest.mark.parametrize("condition", [ONE, EACH], ids=["one", "each"])
def test_sampling_map(flow, condition):
    """Both ways with log-dets; leading axes are any that broadcast with those of the condition."""
    sampling = SamplingMap.of(flow, None, *EXACT.values(), condition)
    x, log_det = sampling.generate_and_log_det(Z)
    np.testing.assert_allclose(sampling.generate(Z), x, atol=1e-12)
    np.testing.assert_allclose(x, flow.inverse(Z, condition=condition, solver=SOLVER), atol=1e-12)
    z, expected = flow.forward(x, condition=condition, estimator=rf.Exact())
    np.testing.assert_allclose(z, Z, atol=1e-11)
    np.testing.assert_allclose(-log_det, expected, atol=1e-10)
    several = jnp.stack([x, x + 1])
    z, log_det = sampling.encode_and_log_det(several)
    assert z.shape == (2, 4, 2) and log_det.shape == (2, 4)
    np.testing.assert_allclose(z[0], Z, atol=1e-11)
    np.testing.assert_allclose(log_det[0], expected, atol=1e-10)
    assert sampling.encode(x[0]).shape == (2,) if condition is ONE else (4, 2)


def test_conditions_that_do_not_fit(flow):
    def of(condition, flow=flow):
        return SamplingMap.of(flow, None, *EXACT.values(), condition)

    with pytest.raises(ValueError, match=r"condition: expected floats \[3\], one for all, or with .*, got None"):
        of(None)
    with pytest.raises(ValueError, match=r"condition: expected floats .*got shape \(4, 2\)"):
        of(Z)
    with pytest.raises(ValueError, match=r"condition: expected leading axes .* \(3,\), those of x, got \(4,\)"):
        of(EACH).encode(Z[:3])
    with pytest.raises(ValueError, match="condition: expected None, since no part takes a condition"):
        of(ONE, rf.Flow(rf.ActNorm((2,)), rf.StandardNormal((2,))))


def test_distrax(flow):
    """By closure; a batch of conditions gives samples their shape; gradients reach the condition."""
    distrax = pytest.importorskip("distrax", reason="needs the extra distrax")
    base = distrax.MultivariateNormalDiag(jnp.zeros(2), jnp.ones(2))

    def log_prob(condition, x):
        return distrax.Transformed(base, rf.interop.distrax.bijector(flow, condition=condition, **EXACT)).log_prob(x)

    for condition in (ONE, EACH):
        expected = flow.log_prob(Z, condition=condition, estimator=rf.Exact())
        np.testing.assert_allclose(log_prob(condition, Z), expected, atol=1e-10)
    found = jax.jit(jax.grad(lambda c: log_prob(c, Z).sum()))(EACH)
    expected = jax.jit(jax.grad(lambda c: flow.log_prob(Z, condition=c, estimator=rf.Exact()).sum()))(EACH)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    bijector = rf.interop.distrax.bijector(flow, condition=ONE, **EXACT)
    x, log_det = distrax.Transformed(base, bijector).sample_and_log_prob(seed=jax.random.key(2), sample_shape=(3,))
    np.testing.assert_allclose(log_det, flow.log_prob(x, condition=ONE, estimator=rf.Exact()), atol=1e-9)


def test_numpyro():
    """The flow's own base; one condition, or a batch of them as the batch shape of the distribution."""
    numpyro = pytest.importorskip("numpyro", reason="needs the extra numpyro")
    flow = make(Shifted())
    for condition, batch in ((ONE, ()), (EACH, (4,))):
        distribution = rf.interop.numpyro.FlowDistribution(flow, condition=condition, **EXACT)
        assert distribution.batch_shape == batch and distribution.event_shape == (2,)
        x, intermediates = distribution.sample_with_intermediates(jax.random.key(0), (3,))
        assert x.shape == (3, *batch, 2)
        conditions = jnp.broadcast_to(condition, (*x.shape[:-1], 3)).reshape(-1, 3)
        expected = flow.log_prob(x.reshape(-1, 2), condition=conditions, estimator=rf.Exact()).reshape(x.shape[:-1])
        rebuilt = jax.tree.unflatten(*reversed(jax.tree.flatten(distribution)))
        np.testing.assert_allclose(rebuilt.log_prob(x), expected, atol=1e-10)
        np.testing.assert_allclose(distribution.log_prob(x, intermediates), expected, atol=1e-9)
    with numpyro.handlers.seed(rng_seed=0), numpyro.plate("data", 4):
        assert numpyro.sample("x", distribution).shape == (4, 2)
    samples = rf.interop.numpyro.FlowDistribution(flow, condition=ONE, **EXACT).sample(jax.random.key(3), (4000,))
    own = flow.sample(jax.random.key(4), 4000, condition=ONE, solver=SOLVER)
    error = np.sqrt(samples.var(axis=0) / 4000 + own.var(axis=0) / 4000)
    assert (np.abs(samples.mean(axis=0) - own.mean(axis=0)) < 5 * error).all()


def test_numpyro_trains_a_conditional_flow():
    """Amortised inference: a guide q(x | c) learns the posteriors of all c at once; the base is learned with it."""
    numpyro = pytest.importorskip("numpyro", reason="needs the extra numpyro")
    from numpyro.distributions import Normal
    from numpyro.infer import SVI, Trace_ELBO

    start = make(Shifted())

    def model():
        with numpyro.plate("conditions", 4):
            x = numpyro.sample("x", Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("y", Normal(x.sum(axis=1), 0.5), obs=EACH[:, 0])

    def guide():
        flow = rf.interop.numpyro.flow_module("flow", start)
        with numpyro.plate("conditions", 4):
            numpyro.sample("x", rf.interop.numpyro.FlowDistribution(flow, condition=EACH, **EXACT))

    result = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO(8)).run(jax.random.key(0), 100, progress_bar=False)
    assert result.losses[-10:].mean() < result.losses[:10].mean() - 1
    with numpyro.handlers.substitute(data=result.params):
        trained = rf.interop.numpyro.flow_module("flow", start)
    assert not np.allclose(trained.base.mean[...], start.base.mean[...])


class Table(rf.Bijector):
    """Columns (0, inf), (-inf, 1), (0, 2), (-inf, inf) to the reals."""

    event_shape = (4,)
    support = ((0.0, -np.inf, 0.0, -np.inf), (np.inf, 1.0, 2.0, np.inf))

    def _parts(self, x):
        return x[..., 0], 1 - x[..., 1], x[..., 2] / 2, x[..., 3]

    def transform(self, x, condition=None):
        a, b, c, d = self._parts(x)
        y = jnp.stack([jnp.log(a), jnp.log(b), jnp.log(c) - jnp.log(1 - c), d], axis=-1)
        return y, -jnp.log(a) - jnp.log(b) - jnp.log(c) - jnp.log(1 - c) - jnp.log(2)

    def invert(self, y, condition=None):
        a, b, c = jnp.exp(y[..., 0]), 1 - jnp.exp(y[..., 1]), 2 * jax.nn.sigmoid(y[..., 2])
        return jnp.stack([a, b, c, y[..., 3]], axis=-1)


def test_numpyro_knows_the_bounds_of_columns():
    """The support is that of the flow, and NUTS's map onto it is a bijection with its log-det."""
    pytest.importorskip("numpyro", reason="needs the extra numpyro")
    from numpyro.distributions import biject_to, constraints

    distribution = rf.interop.numpyro.FlowDistribution(rf.Flow(Table()), **EXACT)
    support = distribution.support
    x = distribution.sample(jax.random.key(0), (50,))
    assert support(x).all() and support.event_dim == 1
    for column, value in ((0, -0.1), (1, 1.1), (2, 2.1), (2, -0.1)):
        assert not support(x[0].at[column].set(value))
    transform = biject_to(support)
    u = jax.random.normal(jax.random.key(1), (4,))
    y = transform(u)
    assert support(y) and support(support.feasible_like(u))
    np.testing.assert_allclose(transform.inv(y), u, atol=1e-12)
    expected = np.linalg.slogdet(jax.jacfwd(transform)(u))[1]
    np.testing.assert_allclose(transform.log_abs_det_jacobian(u, y), expected, atol=1e-12)
    gradient = jax.jit(jax.grad(lambda u: transform.log_abs_det_jacobian(u, transform(u)) + transform.inv(y).sum()))(u)
    assert np.isfinite(gradient).all()
    again = jax.tree.unflatten(*reversed(jax.tree.flatten(transform)))
    assert again == transform

    class Interval(Table):
        support = (-1.0, (1.0, 2.0, 3.0, 4.0))

    interval = rf.interop.numpyro.FlowTransform(rf.Flow(Interval()), **EXACT).codomain
    assert isinstance(interval.base_constraint, type(constraints.interval(0, 1)))
    assert interval(jnp.asarray([1.0, 2.0, 3.0, 4.0])) and not interval(jnp.asarray([1.1, 2.0, 3.0, 4.0]))


def test_flowjax(flow):
    """Its `cond_shape` is the flow's; log_prob is the flow's, trained by flowjax's own loop on pairs."""
    pytest.importorskip("flowjax", reason="needs the extra flowjax")
    from flowjax.distributions import StandardNormal, Transformed
    from flowjax.train import fit_to_data

    bijection = rf.interop.flowjax.FlowBijection(flow, **EXACT)
    assert bijection.cond_shape == (3,) and rf.interop.flowjax.FlowBijection(bijection.to_flow()).cond_shape == (3,)
    distribution = Transformed(StandardNormal((2,)), bijection)
    for condition in (ONE, EACH):
        expected = flow.log_prob(Z, condition=condition, estimator=rf.Exact())
        np.testing.assert_allclose(distribution.log_prob(Z, condition), expected, atol=1e-7)
    np.testing.assert_allclose(bijection.inverse(bijection.transform(Z[0], ONE), ONE), Z[0], atol=1e-8)
    with pytest.raises(ValueError, match=r"condition: expected shape \(3,\), got None"):
        bijection.transform(Z[0])
    with pytest.raises(ValueError, match=r"condition: expected shape \(3,\), got \(2,\)"):
        bijection.inverse(Z[0], ONE[:2])
    conditions = jax.random.normal(jax.random.key(5), (96, 3))
    x = conditions[:, :2] + 0.3 * jax.random.normal(jax.random.key(6), (96, 2))
    options = {"max_epochs": 2, "learning_rate": 0.02, "batch_size": 32, "show_progress": False}
    trained, _ = fit_to_data(jax.random.key(0), distribution, (x, conditions), **options)
    assert trained.log_prob(x, conditions).mean() > distribution.log_prob(x, conditions).mean() + 0.1


def test_flowjax_block_of_a_conditional_g():
    """x + g(x, condition) against dense Jacobians; in a chain beside a part without a condition."""
    pytest.importorskip("flowjax", reason="needs the extra flowjax")
    from flowjax.bijections import Chain

    matrix = jnp.asarray([[0.3, -0.4], [0.2, 0.5]])
    block = rf.interop.flowjax.ResidualBijection(
        lambda x, c: jnp.tanh(matrix @ x + c[:2]), (2,), cond_shape=(3,), solver=SOLVER
    )
    plain = rf.interop.flowjax.ResidualBijection(lambda x: jnp.tanh(matrix @ x), (2,), solver=SOLVER)
    for bijection in (block, Chain([plain, block])):
        assert bijection.cond_shape == (3,)
        y, log_det = bijection.transform_and_log_det(Z[0], ONE)
        jacobian = jax.jacfwd(lambda x, bijection=bijection: bijection.transform(x, ONE))(Z[0])
        np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-10)
        x, inverse_log_det = bijection.inverse_and_log_det(y, ONE)
        np.testing.assert_allclose(x, Z[0], atol=1e-10)
        np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-10)
    assert not np.allclose(block.transform(Z[0], ONE), block.transform(Z[0], 2 * ONE))
    with pytest.raises(ValueError, match=r"condition: expected shape \(3,\), got None"):
        block.inverse(Z[0])
