"""Flows and residual blocks as bijections of flowjax, against dense Jacobians and trained by flowjax's own loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflow_jax as rf
from tests.compilations import compilations
from tests.interop.flows import SOLVER, bent, change, make_flow, make_image_flow

flowjax = pytest.importorskip("flowjax", reason="needs the extra flowjax")

import equinox as eqx  # noqa: E402
import paramax  # noqa: E402
from flowjax.bijections import Chain, Invert  # noqa: E402
from flowjax.distributions import StandardNormal, Transformed  # noqa: E402
from flowjax.train import fit_to_data  # noqa: E402

from resflow_jax.interop import flowjax as interop  # noqa: E402

pytestmark = pytest.mark.usefixtures("promotion")

X = jnp.array([0.7, -0.4])


def fit(distribution, data):
    """The distribution trained for four epochs, and log_prob of the data before and after."""
    options = {"max_epochs": 4, "learning_rate": 0.02, "batch_size": 32, "show_progress": False}
    trained, _ = fit_to_data(jax.random.key(0), distribution, data, **options)
    log_prob = eqx.filter_jit(lambda distribution, x: distribution.log_prob(x))
    return trained, log_prob(distribution, data), log_prob(trained, data)


def check_bijection(explicit, solved, x):
    """Both ways, each to (image, log_det): a round trip, and the dense Jacobian of that which takes no solve."""
    y, log_det = explicit(x)
    same, solved_log_det = solved(y)
    np.testing.assert_allclose(same, x, atol=1e-8)
    jacobian = jax.jit(jax.jacfwd(lambda x: explicit(x)[0].ravel()))(x).reshape(x.size, x.size)
    expected = np.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose([log_det, solved_log_det], [expected, -expected], atol=1e-8)


def check_without_log_det(bijection, x):
    """The methods without a log-det give the same, and refuse other shapes by name."""
    np.testing.assert_allclose(bijection.transform(x), bijection.transform_and_log_det(x)[0], atol=1e-12)
    np.testing.assert_allclose(bijection.inverse(x), bijection.inverse_and_log_det(x)[0], atol=1e-12)
    for method in (bijection.transform, bijection.inverse):
        with pytest.raises(ValueError, match=r"x: expected shape .*, got \(7,\)"):
            method(jnp.zeros(7))


@pytest.mark.parametrize("make", [make_flow, make_image_flow])
def test_a_flow_is_a_bijection_from_z_to_x(make):
    flow = make()
    bijection = interop.FlowBijection(flow, solver=SOLVER)
    assert bijection.shape == flow.event_shape and bijection.cond_shape is None
    x = jnp.linspace(0.1, 0.9, flow.dim).reshape(flow.event_shape)
    check_bijection(bijection.inverse_and_log_det, bijection.transform_and_log_det, x)
    np.testing.assert_allclose(bijection.inverse(x).ravel(), flow(x[None])[0], atol=1e-6)
    flow.update_norms(tolerance=1e-4, max_iterations=200)  # as every evaluation does
    expected = flow(x[None])[0]
    change(flow)  # which does not reach the bijection
    np.testing.assert_allclose(bijection.inverse(x).ravel(), expected, atol=1e-10)
    check_without_log_det(bijection, x)


def test_flowjax_trains_a_flow():
    """The likelihood rises; vectors stay, are advanced in every evaluation, and are no leaves of the training."""
    flow, data = make_flow(seed=1), bent(160)
    start = Transformed(StandardNormal((2,)), interop.FlowBijection(flow, max_iterations=50))
    trained, before, after = fit(start, data)
    np.testing.assert_allclose(before, flow.log_prob(data, estimator=rf.Exact()), atol=1e-6)
    assert after.mean() > before.mean() + 0.3
    for old, new in zip(*(jax.tree.leaves(d.bijection.non_params) for d in (start, trained)), strict=True):
        np.testing.assert_array_equal(old, new)
    again = trained.bijection.to_flow()
    np.testing.assert_allclose(after, again.log_prob(data, estimator=rf.Exact()), atol=1e-3)


def test_a_block_around_a_network_of_equinox():
    """Its layers are bounded whatever their parameters; flowjax trains it, inverted so that data need no solve."""
    g = interop.contractive(eqx.nn.MLP(2, 2, 8, 1, activation=jnp.tanh, key=jax.random.key(0)), 0.9)
    large = jax.tree.map(lambda leaf: 4 * leaf if eqx.is_inexact_array(leaf) else leaf, g)
    for layer in paramax.unwrap(large).layers:
        assert np.linalg.norm(layer.weight, 2) <= 0.9 + 1e-12
    bijection = interop.ResidualBijection(large, (2,), solver=SOLVER)
    check_bijection(bijection.transform_and_log_det, bijection.inverse_and_log_det, X)
    check_without_log_det(bijection, X)
    data = bent(160)
    start = Transformed(StandardNormal((2,)), Invert(interop.ResidualBijection(g, (2,))))
    _, before, after = fit(start, data)
    assert after.mean() > before.mean() + 0.1
    with pytest.raises(ValueError, match=r"coefficient: expected a number in \(0, 1\), got 1"):
        interop.contractive(g, 1)


def test_estimates_need_a_key():
    flow = make_flow()
    with pytest.raises(ValueError, match="key: Roulette expected a PRNG key, got None"):
        interop.FlowBijection(flow, estimator=rf.Roulette())
    key = jax.random.key(0)
    estimate = interop.FlowBijection(flow, key, estimator=rf.Roulette()).inverse_and_log_det(X)[1]
    np.testing.assert_allclose(estimate, flow.forward(X[None], key=key)[1][0], atol=1e-6)


def test_eager_sampling_compiles_once():
    """flowjax maps its methods anew at every call; equal blocks share what is compiled."""

    def sample(coefficient, number):
        networks = [eqx.nn.MLP(2, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(number + n)) for n in range(2)]
        contractions = [interop.contractive(network, coefficient) for network in networks]
        blocks = [Invert(interop.ResidualBijection(g, (2,), solver=SOLVER)) for g in contractions]
        distribution = Transformed(StandardNormal((2,)), Chain(blocks))
        x, log_prob = distribution.sample_and_log_prob(jax.random.key(number), (5,))
        np.testing.assert_allclose(distribution.log_prob(x), log_prob, atol=1e-8)
        return distribution.sample(jax.random.key(number), (5,)), x

    np.testing.assert_allclose(*sample(0.9, 0), atol=1e-12)
    with compilations() as found:
        np.testing.assert_allclose(*sample(0.9, 10), atol=1e-12)
    assert not found


def test_what_does_not_converge():
    """A method called by itself says so; under flowjax's vmap it is the best guess, or NaN where it is to raise."""
    flow = make_flow()
    for on_failure, expected in (("warn", False), ("raise", True)):
        solver = rf.FixedPoint(max_iterations=1, on_failure=on_failure)
        bijection = interop.FlowBijection(flow, solver=solver)
        with pytest.raises(rf.InverseError) if expected else pytest.warns(RuntimeWarning, match="did not converge"):
            bijection.transform(X)
        samples = Transformed(StandardNormal((2,)), bijection).sample(jax.random.key(0), (4,))
        assert np.isnan(samples).all() == np.isnan(samples).any() == expected


def test_a_kernel_of_zeros_has_a_gradient():
    """A block that starts as the identity can learn; at any other kernel the value is min(1, c / |W|) W."""
    kernel = jax.random.normal(jax.random.key(0), (3, 3))
    found = jax.grad(lambda w: jnp.sum(interop._bounded(0.9, w)))(jnp.zeros((3, 3)))
    np.testing.assert_allclose(found, 1)
    for size in (0.01, 10.0):
        expected = size * kernel * min(1, 0.9 / float(np.linalg.norm(size * kernel, 2)))
        np.testing.assert_allclose(interop._bounded(0.9, size * kernel), expected, rtol=1e-12)
