"""Whole flows, for images and vectors: exact log-dets, round trips, sampling, norms, transforms, logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.interop.torch.flow import TorchFlow
from resflow_jax.models.bases import standard_normal_log_prob
from tests.functional.brute_force import enumerated_norm
from tests.models.flows import CONFIGS, make


@pytest.fixture(scope="module", params=CONFIGS)
def flow_and_x(request):
    return make(request.param)


def test_log_det_is_that_of_the_whole_jacobian(flow_and_x):
    """log_prob is the base density and slogdet of dz/dx."""
    flow, x = flow_and_x
    graphdef, state = nnx.split(flow)

    def of_one(state, e):
        z = nnx.merge(graphdef, state)(e[None])[0]
        return z, z

    jacobians, z = jax.jit(jax.vmap(jax.jacfwd(of_one, argnums=1, has_aux=True), (None, 0)))(state, x)
    log_det = np.linalg.slogdet(jacobians.reshape(len(x), flow.dim, flow.dim))[1]
    np.testing.assert_allclose(flow(x), z, rtol=1e-12)
    expected = jax.scipy.stats.norm.logpdf(z).sum(-1) + log_det
    np.testing.assert_allclose(flow.log_prob(x, estimator=rf.Exact()), expected, rtol=1e-11)


def test_round_trips(flow_and_x):
    """f^-1(f(x)) = x and f(f^-1(z)) = z, with the status of every example; float64."""
    flow, x = flow_and_x
    back, status = flow.inverse(flow(x), return_status=True)
    np.testing.assert_allclose(back, x, atol=1e-10)
    assert status.converged.all() and (status.iterations > 0).all() and status.residual.shape == (flow.blocks, 3)
    z = 0.4 * jax.random.normal(jax.random.key(0), (3, flow.dim))  # of images in [0, 1] in every flow
    np.testing.assert_allclose(flow(jnp.clip(flow.inverse(z), 0, 1) if x.ndim == 4 else flow.inverse(z)), z, atol=1e-7)


def test_roulette_is_unbiased_through_the_flow(vector_flow):
    """Mean of log_prob and of its parameter gradient over keys: within 4 standard errors of the exact ones."""
    flow, x = vector_flow
    weights = jnp.asarray([1.0, -2.0, 0.5])
    graphdef, params, rest = nnx.split(flow, nnx.Param, ...)

    def objective(params, key, estimator):
        log_prob = nnx.merge(graphdef, params, rest).log_prob(x, key=key, estimator=estimator)
        return jnp.sum(weights * log_prob), log_prob

    def draw(key):
        gradient, log_prob = jax.grad(objective, has_aux=True)(params, key, rf.Roulette())
        return jnp.concatenate([log_prob, *[g.ravel() for g in jax.tree.leaves(gradient)]])

    keys = jax.random.split(jax.random.key(5), 4000)
    draws = np.asarray(jax.jit(lambda keys: jax.lax.map(draw, keys, batch_size=500))(keys))
    gradient, log_prob = jax.jit(lambda params: jax.grad(objective, has_aux=True)(params, None, rf.Exact()))(params)
    exact = np.concatenate([log_prob, *[g.ravel() for g in jax.tree.leaves(gradient)]])
    error = draws.std(axis=0, ddof=1) / len(keys) ** 0.5
    varies = error > 1e-12
    assert varies.sum() > 50
    assert np.abs((draws.mean(axis=0) - exact)[varies] / error[varies]).max() < 4
    np.testing.assert_allclose(draws.mean(axis=0)[~varies], exact[~varies], atol=1e-9)


@pytest.mark.parametrize(
    "flow_and_x", ["images, factored out", "images, DenseNets, squeezed first"], indirect=True, scope="module"
)
def test_unbiased_for_images(flow_and_x):
    """The mean of roulette estimates comes near the exact value; the key is needed."""
    flow, x = flow_and_x
    exact = flow.log_prob(x, estimator=rf.Exact())
    keys = jax.random.split(jax.random.key(1), 200)
    graphdef, state = nnx.split(flow)
    draws = jax.jit(lambda keys: jax.lax.map(lambda key: nnx.merge(graphdef, state).log_prob(x, key=key), keys))(keys)
    z_score = (draws.mean(0) - exact) / (draws.std(0) / len(keys) ** 0.5)
    assert np.abs(z_score).max() < 4
    with pytest.raises(ValueError, match="key: Roulette expected a PRNG key"):
        flow.log_prob(x)


def plain_logits(classifier, features):
    """By JAX's own convolution, padded with zeros; and the outputs of every head's ActNorm."""
    parts, outputs = [], []
    for head, h in zip(classifier.heads, features, strict=True):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(h, head.kernel[...], (1, 1), "SAME", dimension_numbers=numbers)
        variables = (head.bias, head.norm.center, head.norm.std, head.norm.log_scale, head.norm.shift)
        bias, center, std, log_scale, shift = (np.asarray(variable[...]) for variable in variables)
        y = (np.asarray(y) + bias - center) / std
        outputs.append(y * np.exp(log_scale) + shift)
        parts.append(np.maximum(outputs[-1], 0).mean(axis=(1, 2)))
    kernel, bias = np.asarray(classifier.kernel[...]), np.asarray(classifier.bias[...])
    return np.concatenate(parts, axis=1) @ kernel + bias, outputs


def test_logits(flow_and_x):
    """Logits equal plain convolutions on the parts of z; initialisation normalises the input of each relu.

    A head takes the half that leaves after its scale, the last head the half of the scale before; without factoring
    out it takes the whole output of its scale.
    """
    flow, x = flow_and_x
    if not isinstance(flow, TorchFlow):
        assert not hasattr(flow, "logits")
        return
    z = flow(x)
    if isinstance(flow.bijector, rf.MultiScale):
        first, second = z[:, :16].reshape(3, 2, 2, 4), z[:, 16:24].reshape(3, 1, 1, 8)
        features = [first, second, second]
    else:
        features = [flow.scales[0](x), z.reshape(3, 1, 1, 4)]
    expected, outputs = plain_logits(flow.classifier, features)
    assert expected.shape == (3, 3) and np.ptp(expected, axis=0).min() > 1e-3
    np.testing.assert_allclose(flow.logits(x), expected, rtol=1e-10, atol=1e-12)
    for output in outputs:
        np.testing.assert_allclose(jnp.mean(output, (0, 1, 2)), 0, atol=1e-10)
        np.testing.assert_allclose(jnp.std(output, (0, 1, 2)), 1, rtol=1e-10)
    with pytest.raises(ValueError, match=r"x: expected values in \[0, 1\]"):
        flow.logits(x + 1)


@pytest.mark.parametrize("flow_and_x", ["images", "images, factored out", "vectors"], indirect=True, scope="module")
def test_diagnostics_by_block(flow_and_x):
    """One entry a residual block, in order: each block's own law is the one that its estimate used."""
    flow, x = flow_and_x
    lengths = np.arange(1, flow.blocks + 1) % 4
    table = jnp.where(np.arange(1, 7) <= lengths[:, None], 1.0, 1e-30)  # exactly this number of terms
    options = {"key": jax.random.key(0), "estimator": rf.Roulette(rf.Fitted(table), 0), "return_diagnostics": True}
    graphdef, state = nnx.split(flow)

    @jax.jit
    def run(state, x):
        flow = nnx.merge(graphdef, state)
        return flow.forward(x, **options), flow.forward(x, estimator=rf.Exact(), return_diagnostics=True)

    (z, log_det, diagnostics), (z_exact, _, exact) = run(state, x)
    np.testing.assert_array_equal(diagnostics.length, lengths)
    np.testing.assert_allclose(z, z_exact, rtol=1e-12)
    norms = np.asarray(diagnostics.term_norms)
    assert norms.shape == (flow.blocks, 16)
    assert ((norms[:, :4] > 0) == (np.arange(1, 5) <= lengths[:, None])).all()
    assert exact.mean.shape == (flow.blocks,) and (exact.second_moment >= exact.mean**2).all()
    if x.ndim == 2:  # the way from both to log p is one for all flows
        again, found = flow.log_prob(x, **options)
        np.testing.assert_allclose(again, standard_normal_log_prob(z) + log_det, rtol=1e-12)
        np.testing.assert_array_equal(found.mean, diagnostics.mean)


def test_one_table_for_all_blocks_or_one_row_each(vector_flow):
    """A table [K] serves every block; a wrong number of rows is named."""
    flow, x = vector_flow
    single = rf.Roulette(rf.Fitted(jnp.asarray([1.0, 1.0, 1e-30])), 0)
    length = flow.forward(x, key=jax.random.key(0), estimator=single, return_diagnostics=True)[2].length
    np.testing.assert_array_equal(length, [2, 2, 2])
    with pytest.raises(ValueError, match=r"estimator: expected a table with 3 rows, one a block, got shape \(2, 5\)"):
        flow.log_prob(x, key=jax.random.key(0), estimator=rf.Roulette(rf.Fitted(jnp.ones((2, 5)))))
    for table in (jnp.asarray([0.2, 0.5]), jnp.asarray([1, 1]), jnp.zeros((0,)), [1.0, 0.5]):
        with pytest.raises(ValueError, match="table: expected probabilities"):
            flow.log_prob(x, key=jax.random.key(0), estimator=rf.Roulette(rf.Fitted(table)))
    for estimator in ("exact", rf.Roulette):
        with pytest.raises(ValueError, match="estimator: expected Exact, Truncated or Roulette"):
            flow.log_prob(x, key=jax.random.key(0), estimator=estimator)
    of_numpy = rf.Roulette(rf.Fitted(np.asarray([1.0, 1.0, 1e-30])), 0)
    length = flow.forward(x, key=jax.random.key(0), estimator=of_numpy, return_diagnostics=True)[2].length
    np.testing.assert_array_equal(length, [2, 2, 2])


def test_a_law_that_is_unsafe_for_the_blocks_warns(vector_flow):
    """The papers' law under the blocks' Lipschitz bound: a warning that names law and bound; the default is silent."""
    flow, x = vector_flow
    with pytest.warns(RuntimeWarning, match=r"Poisson\(rate=2.0\) .*infinite variance.* up to 0.96"):
        flow.log_prob(x, key=jax.random.key(0), estimator=rf.Roulette(rf.Poisson(2.0), exact_terms=2, minres_steps=0))
    assert jnp.isfinite(flow.log_prob(x, key=jax.random.key(0))).all()


def test_norms_are_right_without_any_update(flow_and_x):
    """A fresh flow is normalised: no layer's norm, measured anew, exceeds the coefficient."""
    flow, _ = flow_and_x
    assert rf.certify(flow).norms.max() <= flow.config.coefficient * (1 + 1e-4)
    if (
        isinstance(flow.config, rf.ImageFlowConfig) and flow.config.tail.norms
    ):  # from order inf to 2, which needs several starts
        (dense,) = flow.scales[-1].bijectors[-1].unstacked()
        first, last = dense.bijectors[0].contraction.linears
        np.testing.assert_allclose(enumerated_norm(last.weights()[0].T, 2, domain=np.inf), 0.98, rtol=1e-6)
        assert (first.orders(), last.orders()) == ((2, np.inf), (np.inf, 2))


def test_sampling(flow_and_x):
    """Samples have the event's shape, are deterministic in the key, and are f^-1 of the base draw."""
    flow, _ = flow_and_x
    samples = flow.sample(jax.random.key(3), 3)
    assert samples.shape == (3, *flow.event_shape)
    z = jax.random.normal(jax.random.key(3), (3, flow.dim))
    x = flow.inverse(z)
    np.testing.assert_allclose(samples, jnp.clip(x, 0, 1) if x.ndim == 4 else x, rtol=1e-12)
    assert jnp.isfinite(flow.log_prob(samples, estimator=rf.Exact())).all()
    with pytest.raises(ValueError, match="shape: expected an integer of at least 1"):
        flow.sample(jax.random.key(3), 0)


def test_inverse_reports_what_did_not_converge(vector_flow):
    """Too few iterations: the status says so; without it an eager call warns, a compiled one gives its best guess."""
    flow, x = vector_flow
    solver = rf.FixedPoint(max_iterations=2)
    guess, status = flow.inverse(flow(x), solver=solver, return_status=True)
    assert not status.converged.any()
    with pytest.warns(RuntimeWarning, match=r"^ResidualFlow.inverse: 3 of 3 examples did not converge"):
        flow.inverse(flow(x), solver=solver)
    with pytest.warns(RuntimeWarning, match=r"^ResidualFlow.sample: 3 of 3 examples did not converge"):
        flow.sample(jax.random.key(0), 3, solver=solver)
    compiled = nnx.jit(lambda flow, z, solver: flow.inverse(z, solver=solver), static_argnames="solver")
    np.testing.assert_allclose(compiled(flow, flow(x), solver=solver), guess, rtol=1e-12)
    raising = rf.FixedPoint(max_iterations=2, on_failure="raise")
    assert np.isnan(compiled(flow, flow(x), solver=raising)).all()
    with pytest.raises(rf.InverseError, match=r"^ResidualFlow.inverse_and_log_prob: 3 of 3"):
        flow.inverse_and_log_prob(flow(x), estimator=rf.Exact(), solver=raising)


def test_under_transforms(vector_flow):
    """jit, vmap, pmap, scan and grad of log_prob agree with plain calls; the inverse is differentiable."""
    flow, x = vector_flow
    exact = flow.log_prob(x, estimator=rf.Exact())
    graphdef, state = nnx.split(flow)

    def log_prob(state, x, key=None, estimator=None):
        return nnx.merge(graphdef, state).log_prob(x, key=key, estimator=estimator or rf.Exact())

    np.testing.assert_allclose(jax.jit(log_prob)(state, x), exact, rtol=1e-12)
    np.testing.assert_allclose(jax.pmap(lambda x: log_prob(state, x))(x[None])[0], exact, rtol=1e-12)

    @jax.jit
    def mapped_and_scanned(state, x, z):
        def both(function, xs):
            return jax.vmap(function)(xs), jax.lax.scan(lambda c, e: (c, function(e)), 0, xs)[1]

        inverses = both(lambda z: nnx.merge(graphdef, state).inverse(z[None])[0], z)
        return both(lambda e: log_prob(state, e[None])[0], x), inverses

    densities, inverses = mapped_and_scanned(state, x, flow(x))
    for found, inverse in zip(densities, inverses, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-12)
        np.testing.assert_allclose(inverse, x, atol=1e-10)
    keys = jax.random.split(jax.random.key(0), 3)
    looped = [log_prob(state, x, key, rf.Roulette()) for key in keys]
    mapped = jax.jit(jax.vmap(lambda state, key: log_prob(state, x, key, rf.Roulette()), (None, 0)))(state, keys)
    np.testing.assert_allclose(mapped, looped, rtol=1e-10)
    sample = jax.jit(lambda state, key: nnx.merge(graphdef, state).sample(key, 2))
    np.testing.assert_allclose(sample(state, keys[0]), flow.sample(keys[0], 2), rtol=1e-10)
    # d/dx log p at x through the inverse: x = f^-1(z), so d(log p(f^-1(z)))/dz = (dx/dz)^T grad log p.
    z = flow(x)

    @jax.jit
    def derivatives(state, x, z):
        flow = nnx.merge(graphdef, state)
        through = jax.grad(lambda z: log_prob(state, flow.inverse(z)).sum())(z)
        gradient = jax.grad(lambda x: log_prob(state, x).sum())(x)
        return through, gradient, jax.vmap(jax.jacfwd(lambda e: flow(e[None])[0]))(x)

    through, gradient, jacobian = derivatives(state, x, z)
    np.testing.assert_allclose(through, jnp.linalg.solve(jacobian.mT, gradient[..., None])[..., 0], rtol=1e-8)


def test_float32():
    """A flow cast to float32 stays in float32 and agrees with float64 to its precision."""
    flow, x = make("images, one dense layer a block")
    exact = flow.log_prob(x, estimator=rf.Exact())
    nnx.update(flow, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(flow)))
    log_prob = flow.log_prob(x.astype(jnp.float32), estimator=rf.Exact())
    assert log_prob.dtype == jnp.float32 and flow.dtype == jnp.float32
    np.testing.assert_allclose(log_prob, exact, rtol=1e-4)
    x32 = x.astype(jnp.float32)
    np.testing.assert_allclose(flow.inverse(flow(x32)), x32, atol=1e-5)


def test_standard_normal_log_prob():
    """Against scipy's, summed over the last axis."""
    z = jax.random.normal(jax.random.key(0), (3, 5))
    np.testing.assert_allclose(standard_normal_log_prob(z), jax.scipy.stats.norm.logpdf(z).sum(-1), rtol=1e-12)
