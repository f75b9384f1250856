"""A flow in NumPyro: transform, prior of a model sampled by NUTS, and guide of SVI, against grids in the plane."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from tests.interop.flows import SOLVER, change, make_flow, make_image_flow

numpyro = pytest.importorskip("numpyro", reason="needs the extra numpyro")

from numpyro import distributions as dist  # noqa: E402
from numpyro.diagnostics import effective_sample_size  # noqa: E402
from numpyro.infer import MCMC, NUTS, SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO  # noqa: E402
from numpyro.infer.reparam import TransformReparam  # noqa: E402

from resflow_jax.interop import numpyro as interop  # noqa: E402

pytestmark = pytest.mark.usefixtures("promotion")

Z = jax.random.normal(jax.random.key(0), (3, 2))
SPACING = 0.1
GRID = jnp.stack(jnp.meshgrid(*[jnp.arange(-8, 8, SPACING)] * 2), axis=-1).reshape(-1, 2)
NOISE = 0.6
DATA = jnp.array([0.8, 0.4])
STANDARD = dist.Normal(0.0, 1.0).expand((2,)).to_event(1)


def log_likelihood(x):
    """The log-density of the model whose bent posterior the flow is trained on."""
    return dist.Normal(x[..., 0] + x[..., 1] ** 2, 0.5).log_prob(1.0)


def bent_model():
    x = numpyro.sample("x", STANDARD)
    numpyro.factor("likelihood", log_likelihood(x))


@pytest.fixture(scope="module")
def result():
    """(initial flow, result of SVI): the flow as the guide of a model."""
    flow = make_flow(rf.VectorFlowConfig(dim=2, blocks=1, hidden=(16,)), seed=2)

    def guide():
        trained = interop.flow_module("flow", flow)
        numpyro.sample("x", interop.FlowDistribution(trained, estimator=rf.Exact(), solver=SOLVER))

    svi = SVI(bent_model, guide, numpyro.optim.Adam(0.02), Trace_ELBO())
    return flow, svi.run(jax.random.key(0), 600, progress_bar=False)


@pytest.fixture(scope="module")
def flow(result):
    """The trained flow, as `flow_module` finds it."""
    initial, (params, _, _) = result
    with numpyro.handlers.substitute(data=params):
        return interop.flow_module("flow", initial)


@pytest.fixture(scope="module")
def prior(flow):
    return interop.FlowDistribution(flow, estimator=rf.Exact(), solver=SOLVER)


@pytest.fixture(scope="module")
def posterior(flow):
    """Mean and mean square of the posterior given DATA, by a grid."""
    log_density = flow.log_prob(GRID, estimator=rf.Exact()) - 0.5 * jnp.sum((DATA[None] - GRID) ** 2, axis=1) / NOISE**2
    weights = jax.nn.softmax(log_density)
    return jnp.concatenate([weights @ GRID, weights @ GRID**2])


def test_transform_is_a_bijection_with_the_flows_log_det(flow):
    transform = interop.FlowTransform(flow, estimator=rf.Exact(), solver=SOLVER)
    x, intermediates = transform.call_with_intermediates(Z)
    z, log_det = flow.forward(x, estimator=rf.Exact())
    np.testing.assert_allclose(z, Z, atol=1e-12)
    np.testing.assert_allclose(transform.inv(x), Z, atol=1e-12)
    np.testing.assert_allclose(transform.log_abs_det_jacobian(Z, x), -log_det, atol=1e-12)
    np.testing.assert_allclose(transform.log_abs_det_jacobian(Z, x, intermediates), -log_det, atol=1e-12)
    assert transform.forward_shape((5, 2)) == transform.inverse_shape((5, 2)) == (5, 2)
    with pytest.raises(ValueError, match=r"shape: expected a shape that ends in \(2,\), got \(5, 3\)"):
        transform.forward_shape((5, 3))
    assert jax.tree.unflatten(*reversed(jax.tree.flatten(transform))) == transform
    assert transform != interop.FlowTransform(flow, jax.random.key(1))


def test_columns_have_finite_gradients_far_out():
    """Columns with both ends, none, and one; none is affected by the exponential of another kind."""
    columns = rf.Bounded([0.0, -np.inf, -np.inf, 1.0], [1.0, np.inf, 2.0, np.inf])
    support = interop.FlowDistribution(rf.Flow(columns, rf.StandardNormal((4,))), estimator=rf.Exact()).support
    transform = dist.biject_to(support)
    x = jnp.asarray([2.0, 3e4, 1.5, 0.5])
    found = jax.vmap(jax.grad(lambda x, n: transform(x)[n]), (None, 0))(x, jnp.arange(4))
    sigmoid = jax.nn.sigmoid(2.0)
    np.testing.assert_allclose(found, np.diag([sigmoid * (1 - sigmoid), 1, np.exp(-1.5), np.exp(0.5)]), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: transform(-x)[1])(x), [0, -1, 0, 0])


def test_takes_the_flow_as_it_is(flow):
    changing = nnx.clone(flow)
    transform = interop.FlowTransform(changing, estimator=rf.Exact())
    change(changing)
    np.testing.assert_array_equal(transform.inv(Z), flow(Z))


def test_distribution_is_the_flows(flow, prior):
    """log_prob, also of own samples by what sampling has found; any sample shape; passed through a pytree."""
    x, intermediates = prior.sample_with_intermediates(jax.random.key(0), (3,))
    expected = flow.log_prob(x, estimator=rf.Exact())
    rebuilt = jax.tree.unflatten(*reversed(jax.tree.flatten(prior)))
    np.testing.assert_allclose(rebuilt.log_prob(x), expected, atol=1e-12)
    np.testing.assert_allclose(prior.log_prob(x, intermediates), expected, atol=1e-10)
    several, _ = prior.sample_with_intermediates(jax.random.key(0), (3, 1))
    np.testing.assert_allclose(several[:, 0], x, atol=1e-12)
    np.testing.assert_allclose(prior.log_prob(several)[:, 0], expected, atol=1e-12)
    assert prior.event_shape == (2,) and prior.batch_shape == () and prior.support == dist.constraints.real_vector


def test_images_have_the_unit_interval_as_support():
    """Also of a z that the logit's alpha lets out of it."""
    images = interop.FlowDistribution(make_image_flow(), estimator=rf.Exact(), solver=SOLVER)
    assert images.event_shape == (2, 2, 1) and images.support.event_dim == 3
    x = images.transforms[0](6 * jax.random.normal(jax.random.key(0), (8, 4)))
    assert images.support(x).all() and x.min() == 0


@pytest.mark.parametrize("parametrization", ["x", "z"])
def test_nuts_finds_the_posterior_of_a_model_whose_prior_is_a_flow(prior, posterior, parametrization):
    """Mean and mean square within 4.5 standard errors of the grid's, with NUTS on x and on z."""

    def model():
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=DATA)

    if parametrization == "z":
        model = numpyro.handlers.reparam(model, config={"x": TransformReparam()})
    mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0))
    assert ("x_base" in mcmc.get_samples()) == (parametrization == "z")
    x = np.asarray(mcmc.get_samples()["x"])
    draws = np.concatenate([x, x**2], axis=1)
    sizes = effective_sample_size(draws[None])
    assert sizes.min() > 100
    scores = (draws.mean(axis=0) - posterior) / (draws.std(axis=0) / np.sqrt(sizes))
    assert np.abs(scores).max() < 4.5


def test_svi_with_a_flow_as_guide_approaches_the_evidence(result, flow):
    """The ELBO rises to less than a nat below the log evidence of the grid; the flow's norms follow its parameters."""
    evidence = jax.nn.logsumexp(STANDARD.log_prob(GRID) + log_likelihood(GRID)) + 2 * np.log(SPACING)
    elbo = -np.asarray(result[1].losses)
    error = elbo[-200:].std() / np.sqrt(200)
    assert elbo[-200:].mean() > elbo[:20].mean() + 1
    assert evidence - 1 < elbo[-200:].mean() < evidence + 4.5 * error
    assert flow.update_norms().iterations <= 3
    with pytest.raises(ValueError, match="max_iterations: expected an integer of at least 1, got 0"):
        interop.flow_module("flow", flow, max_iterations=0)


def guide_of(flow, **options):
    def guide():
        trained = interop.flow_module("flow", flow, **options)
        numpyro.sample("x", interop.FlowDistribution(trained, jax.random.key(3), solver=SOLVER))

    return guide


def test_gradient_of_several_particles_is_the_mean_of_one_each():
    """With an estimated log-det; parameters three times those that the flow's own vectors were made for."""
    flow = make_flow()
    params = {"flow$params": jax.tree.map(lambda leaf: 3 * leaf, nnx.state(flow, nnx.Param))}

    def value_and_gradient(elbo):
        return jax.jit(jax.value_and_grad(lambda params, key: elbo.loss(key, params, bent_model, guide_of(flow))))

    key, one = jax.random.key(5), value_and_gradient(Trace_ELBO())
    for particles, vectorize in ((2, False), (16, True)):
        several = value_and_gradient(Trace_ELBO(num_particles=particles, vectorize_particles=vectorize))(params, key)
        singles = [one(params, key) for key in jax.random.split(key, particles)]
        expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *singles)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8), several, expected)
        assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(several))


@pytest.mark.parametrize("loss", [Trace_ELBO(num_particles=16), RenyiELBO(num_particles=2)])
def test_blocks_stay_contractions_in_svi_of_several_particles(loss):
    """By `run` and by a loop of updates, which agree; the vectors that the flow had at the start would not do."""
    flow = make_flow()
    svi = SVI(bent_model, guide_of(flow), numpyro.optim.Adam(0.1), loss)
    params, _, losses = svi.run(jax.random.key(0), 60, progress_bar=False)
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.1
    state, update = svi.init(jax.random.key(0)), jax.jit(svi.update)
    for expected in losses[:5]:
        state, found = update(state)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    with numpyro.handlers.substitute(data=params):
        trained = interop.flow_module("flow", flow)
    certified = rf.certify(trained).blocks[0]
    assert certified.bound < 1.001 * certified.target_bound
    nnx.update(flow, nnx.state(trained, nnx.Param))
    assert rf.certify(flow).blocks[0].bound > 1.1 * certified.target_bound


def test_warm_start_goes_on_from_the_last_vectors():
    """They are the mutable site, in ELBOs that keep it; others are refused by name."""
    flow = make_flow()
    guide = guide_of(flow, warm_start=True, max_iterations=1)
    svi = SVI(bent_model, guide, numpyro.optim.Adam(0.01), Trace_ELBO())
    states, update = [svi.init(jax.random.key(0))], jax.jit(svi.update)
    for _ in range(3):
        states.append(update(states[-1])[0])
    assert list(states[-1].mutable_state) == ["flow$state"]
    vectors = [jax.tree.leaves(state.mutable_state) for state in states]
    for old, new in pairwise(vectors):
        assert any(np.abs(a - b).max() > 0 for a, b in zip(old, new, strict=True))
    for loss, got in (
        (Trace_ELBO(num_particles=16), "True in Trace_ELBO with num_particles=16"),
        (TraceGraph_ELBO(), "True in TraceGraph_ELBO with num_particles=1"),
    ):
        with pytest.raises(ValueError, match=f"warm_start: expected False, .*; got {got}"):
            SVI(bent_model, guide, numpyro.optim.Adam(0.01), loss).init(jax.random.key(0))
        with pytest.raises(ValueError, match=f"warm_start: expected False, .*; got {got}"):
            loss.loss(jax.random.key(0), svi.get_params(states[0]), bent_model, guide)
