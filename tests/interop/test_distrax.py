"""A flow as a bijector of distrax and TFP: against the flow itself, dense Jacobians, and in use."""

import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from tests.compilations import compilations
from tests.interop.flows import SOLVER, bent, change, make_flow, make_image_flow, train

distrax = pytest.importorskip("distrax", reason="needs the extra distrax")

from resflow_jax.interop import distrax as bijectors  # noqa: E402

pytestmark = pytest.mark.usefixtures("promotion")

Z = jax.random.normal(jax.random.key(0), (3, 2))


@pytest.fixture(scope="module")
def flow():
    return make_flow()


@pytest.fixture(scope="module")
def bijector(flow):
    return bijectors.bijector(flow, estimator=rf.Exact(), solver=SOLVER)


@pytest.fixture(scope="module")
def base():
    return distrax.MultivariateNormalDiag(jnp.zeros(2), jnp.ones(2))


def test_maps_z_to_x_with_the_log_det_of_the_dense_jacobian(flow, bijector):
    """Forward is the flow's inverse, inverse the flow, both log-dets those of the Jacobian of the flow."""
    x, log_det = bijector.forward_and_log_det(Z)
    z, inverse_log_det = bijector.inverse_and_log_det(x)
    np.testing.assert_allclose(z, Z, atol=1e-12)
    np.testing.assert_allclose(z, flow(x), atol=1e-12)
    jacobians = jax.jit(jax.vmap(jax.jacfwd(lambda x: flow(x[None])[0])))(x)
    expected = np.linalg.slogdet(jacobians)[1]
    np.testing.assert_allclose(inverse_log_det, expected, atol=1e-10)
    np.testing.assert_allclose(log_det, -expected, atol=1e-10)
    np.testing.assert_allclose(bijector.forward(Z), x, atol=1e-12)
    np.testing.assert_allclose(bijector.inverse(x), z, atol=1e-12)


def test_log_det_far_from_the_origin(bijector):
    """It is no difference of two log-densities, whose rounding would grow with |z|^2."""
    x, log_det = bijector.forward_and_log_det(1e6 * Z)
    np.testing.assert_allclose(log_det, -bijector.inverse_and_log_det(x)[1], atol=1e-9)


def test_any_batch_axes(bijector):
    """None or two give the numbers of one."""
    x, log_det = bijector.inverse_and_log_det(Z)
    for leading in ((), (3, 1)):
        several = bijector.inverse_and_log_det(Z[0] if leading == () else Z.reshape(*leading, 2))
        assert several[0].shape == (*leading, 2) and several[1].shape == leading
        np.testing.assert_allclose(several[0].ravel(), x.ravel()[: several[0].size], atol=1e-12)
        np.testing.assert_allclose(several[1].ravel(), log_det.ravel()[: several[1].size], atol=1e-12)


def test_transformed_distribution_trained_by_its_log_prob(base):
    """Maximum likelihood raises the log_prob, which is the flow's; samples come with theirs."""
    flow, x = make_flow(seed=1), bent(128)

    def loss(flow, x, key):
        return -distrax.Transformed(base, bijectors.bijector(flow, estimator=rf.Exact())).log_prob(x).mean()

    before = flow.log_prob(x, estimator=rf.Exact()).mean()
    train(loss, flow, x, steps=40)
    trained = distrax.Transformed(base, bijectors.bijector(flow, estimator=rf.Exact(), solver=SOLVER))
    after = trained.log_prob(x)
    assert after.mean() > before + 0.5
    np.testing.assert_allclose(after, flow.log_prob(x, estimator=rf.Exact()), atol=1e-12)
    samples, log_prob = trained.sample_and_log_prob(seed=jax.random.key(1), sample_shape=(128,))  # by vmap
    np.testing.assert_allclose(log_prob, flow.log_prob(samples, estimator=rf.Exact()), atol=1e-10)


def test_composes(flow, bijector, base):
    """Chain, Inverse and Block, as an argument of jit: scaling by 2 in front of the flow costs 2 log 2 nats."""
    scaling = distrax.Block(distrax.ScalarAffine(0.0, 2.0), 1)
    chain = distrax.Chain([scaling, bijector])
    x = jnp.asarray(Z)
    log_prob = jax.jit(lambda chain, x: distrax.Transformed(base, chain).log_prob(x))(chain, 2 * x)
    np.testing.assert_allclose(log_prob, flow.log_prob(x, estimator=rf.Exact()) - 2 * np.log(2), atol=1e-12)
    z, log_det = bijector.inverse_and_log_det(x)
    inverse = distrax.Inverse(bijector)
    for other, expected in ((inverse, log_det), (distrax.Block(inverse, 1), log_det.sum())):
        image, total = other.forward_and_log_det(x)
        np.testing.assert_allclose(image, z, atol=1e-12)
        np.testing.assert_allclose(total, expected, atol=1e-12)


def test_in_tfp(flow, bijector, base):
    """A TFP distribution made of the bijector, and the bijector on a TFP base, have the flow's log_prob."""
    tfp = pytest.importorskip("tensorflow_probability.substrates.jax")
    expected = flow.log_prob(Z, estimator=rf.Exact())
    normal = tfp.distributions.MultivariateNormalDiag(jnp.zeros(2), jnp.ones(2))
    theirs = tfp.distributions.TransformedDistribution(normal, distrax.to_tfp(bijector))
    assert theirs.event_shape == (2,)
    np.testing.assert_allclose(theirs.log_prob(Z), expected, atol=1e-12)
    np.testing.assert_allclose(distrax.Transformed(normal, bijector).log_prob(Z), expected, atol=1e-12)
    samples = theirs.sample(3, seed=jax.random.key(0))
    z = normal.sample(3, seed=jax.random.key(0))
    np.testing.assert_allclose(flow(samples), z, atol=1e-12)


def test_images():
    """z [D] to x [H, W, C]; back also from beyond [0, 1], where the logit's alpha lets samples be."""
    flow = make_image_flow()
    bijector = bijectors.bijector(flow, estimator=rf.Exact(), solver=SOLVER)
    assert (bijector.event_ndims_in, bijector.event_ndims_out) == (1, 3)
    base = distrax.MultivariateNormalDiag(jnp.zeros(4), jnp.ones(4))
    assert distrax.Transformed(base, bijector).event_shape == (2, 2, 1)
    z = 6 * jax.random.normal(jax.random.key(0), (8, 4))
    x, log_det = bijector.forward_and_log_det(z)
    assert x.shape == (8, 2, 2, 1) and x.min() < 0 and x.max() > 1
    same, inverse_log_det = bijector.inverse_and_log_det(x)
    np.testing.assert_allclose(same, z, atol=1e-8)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-8)


def test_is_the_same_only_with_the_same_arrays_and_settings(flow, bijector):
    rebuilt = jax.tree.unflatten(*reversed(jax.tree.flatten(bijector)))
    assert bijector.same_as(rebuilt) and bijector.same_as(bijectors.bijector(flow, estimator=rf.Exact(), solver=SOLVER))
    assert not bijector.same_as(bijectors.bijector(flow, estimator=rf.Exact()))
    assert not bijector.same_as(jax.tree.map(lambda leaf: leaf + 0, bijector))
    assert not bijector.same_as(distrax.Tanh())
    assert bijector.name == "FlowBijector"
    np.testing.assert_array_equal(bijector.flow(Z), flow(Z))


def test_takes_the_flow_as_it_is(flow):
    """No later change of the flow reaches the bijector, nor one of the flow that it gives back."""
    changing = nnx.clone(flow)
    bijector = bijectors.bijector(changing, estimator=rf.Exact())
    change(changing)
    change(bijector.flow)
    np.testing.assert_array_equal(bijector.inverse(Z), flow(Z))
    assert np.abs(changing(Z) - flow(Z)).max() > 0.01


def test_errors_name_the_argument(flow, bijector):
    padded = rf.ResidualFlow(replace(flow.config, data=rf.VectorTransform(padding=rf.Padding(1))), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"flow: expected a flow without padding.*got one that pads x"):
        bijectors.bijector(padded)
    with pytest.raises(ValueError, match="flow: expected Flow, got str"):
        bijectors.bijector("flow")
    with pytest.raises(ValueError, match="key: Roulette expected a PRNG key, got None"):
        bijectors.bijector(flow)
    with pytest.raises(ValueError, match="estimator: expected Exact"):
        bijectors.bijector(flow, estimator="exact")
    with pytest.raises(ValueError, match=r"z: expected a float array \[B, 2\], got shape"):
        bijector.forward(jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="event_ndims_in"):
        bijector.forward(jnp.zeros(()))


def test_noise_of_samples(flow, base):
    """distrax vmaps when it samples: one draw for all, which log_prob has under vmap; each is unbiased."""
    x = flow.inverse(Z, solver=SOLVER)
    expected = flow.log_prob(x, estimator=rf.Exact())

    @jax.jit
    def estimates(key):
        distribution = distrax.Transformed(base, bijectors.bijector(flow, key, solver=SOLVER))
        samples, at_once = distribution.sample_and_log_prob(seed=jax.random.key(0), sample_shape=(3,))
        return samples, at_once, jax.vmap(distribution.log_prob)(samples), distribution.log_prob(samples)

    samples, at_once, mapped, of_batch = jax.jit(lambda keys: jax.lax.map(estimates, keys))(
        jax.random.split(jax.random.key(1), 1000)
    )
    np.testing.assert_allclose(at_once, mapped, atol=1e-10)
    np.testing.assert_allclose(at_once[:, 0], of_batch[:, 0], atol=1e-10)  # number 0 of the batch
    assert np.abs(at_once[:, 1:] - of_batch[:, 1:]).max() > 0.01
    expected = flow.log_prob(samples[0], estimator=rf.Exact())
    for estimate in (at_once, of_batch):
        assert np.std(estimate, axis=0).min() > 0.01
        scores = (estimate.mean(axis=0) - expected) / (estimate.std(axis=0) / np.sqrt(len(estimate)))
        assert np.abs(scores).max() < 4.5


def test_what_does_not_converge(flow, base):
    """Said by eager calls; inside of jit and vmap the best guess, or NaN where the solver is to raise."""

    def stopped(on_failure):
        solver = rf.FixedPoint(max_iterations=1, on_failure=on_failure)
        return bijectors.bijector(flow, estimator=rf.Exact(), solver=solver)

    guess = flow.inverse(Z, solver=rf.FixedPoint(max_iterations=1), return_status=True)[0]
    for method in ("forward", "forward_and_log_det"):
        with pytest.warns(RuntimeWarning, match="the inverse of the flow: 3 of 3 examples did not converge"):
            eager = getattr(stopped("warn"), method)(Z)
        with pytest.raises(rf.InverseError, match="the inverse of the flow: 3 of 3 examples did not converge"):
            getattr(stopped("raise"), method)(Z)
        for transform in (jax.jit, jax.vmap):
            with warnings.catch_warnings(action="error"):
                silent, failed = (transform(getattr(stopped(say), method))(Z) for say in ("warn", "raise"))
            jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), silent, eager)
            assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(failed))
    np.testing.assert_allclose(eager[0], guess, atol=1e-12)
    gradient = jax.jit(jax.grad(lambda z: stopped("warn").forward(z).sum()))(Z)
    assert np.isnan(gradient).all()


def test_another_tolerance_compiles_nothing(flow):
    """Tolerance and cap are arguments of the compiled programs, and are obeyed."""

    def error(**options):
        bijector = bijectors.bijector(flow, estimator=rf.Exact(), solver=rf.FixedPoint(**options))
        return np.abs(bijector.inverse(bijector.forward(Z)) - Z).max()

    assert error(tolerance=1e-2) > 1e-4
    with compilations() as found:
        assert error(tolerance=1e-13, max_iterations=999) < 1e-11
    assert not found
