"""Distributions of distrax and NumPyro as bases of a flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.interop.bases import distrax_base, numpyro_base

distrax = pytest.importorskip("distrax", reason="needs the extra distrax")
dist = pytest.importorskip("numpyro.distributions", reason="needs the extra numpyro")

pytestmark = pytest.mark.usefixtures("promotion")

MEAN, FACTOR = jnp.asarray([1.0, -2.0]), jnp.asarray([[1.0, 0.0], [0.5, 0.7]])
CASES = {
    "distrax, a normal": lambda: (
        distrax_base,
        distrax.MultivariateNormalTri(MEAN, FACTOR),
        lambda d, key, n: d.sample(seed=key, sample_shape=n),
    ),
    "distrax, a mixture": lambda: (
        distrax_base,
        distrax.MixtureSameFamily(
            distrax.Categorical(logits=jnp.asarray([0.0, 1.0])),
            distrax.MultivariateNormalDiag(jnp.stack([MEAN, -MEAN]), jnp.ones((2, 2))),
        ),
        lambda d, key, n: d.sample(seed=key, sample_shape=n),
    ),
    "distrax, independent": lambda: (
        distrax_base,
        distrax.Independent(distrax.Laplace(MEAN, jnp.ones(2)), reinterpreted_batch_ndims=1),
        lambda d, key, n: d.sample(seed=key, sample_shape=n),
    ),
    "NumPyro, a normal": lambda: (
        numpyro_base,
        dist.MultivariateNormal(MEAN, scale_tril=FACTOR),
        lambda d, key, n: d.sample(key, (n,)),
    ),
    "NumPyro, a mixture": lambda: (
        numpyro_base,
        dist.MixtureSameFamily(
            dist.Categorical(logits=jnp.asarray([0.0, 1.0])),
            dist.Normal(jnp.stack([MEAN, -MEAN]), 1.0).to_event(1),
        ),
        lambda d, key, n: d.sample(key, (n,)),
    ),
    "NumPyro, independent": lambda: (
        numpyro_base,
        dist.StudentT(4.0, MEAN, 1.0).to_event(1),
        lambda d, key, n: d.sample(key, (n,)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_base(name):
    """Its log-density and samples, in a flow under jit, with a gradient in the flow's parameters alone."""
    wrap, distribution, draw = CASES[name]()
    base = wrap(distribution)
    assert base.event_shape == (2,) and base.condition_shape is None
    flow = rf.Flow(rf.Affine((2,)), base)
    flow.bijector.shift[...] = jnp.asarray([0.5, 1.0])
    x = jax.random.normal(jax.random.key(0), (5, 2))

    def mean_log_prob(flow, x):
        return flow.log_prob(x, estimator=rf.Exact()).mean()

    expected = distribution.log_prob(x + flow.bijector.shift[...])
    np.testing.assert_allclose(flow.log_prob(x, estimator=rf.Exact()), expected, rtol=1e-12)
    value, gradient = nnx.jit(nnx.value_and_grad(mean_log_prob))(flow, x)
    np.testing.assert_allclose(value, expected.mean(), rtol=1e-12)
    shifts = jax.grad(lambda shift: distribution.log_prob(x + shift).mean())(flow.bijector.shift[...])
    np.testing.assert_allclose(gradient["bijector"]["shift"][...], shifts, rtol=1e-10)
    assert set(gradient) == {"bijector"}
    samples = flow.sample(jax.random.key(1), (3, 4))
    drawn = draw(distribution, jax.random.key(1), 12) - flow.bijector.shift[...]
    np.testing.assert_allclose(samples.reshape(12, 2), drawn, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: numpyro_base(dist.Normal(MEAN, 1.0)),
            r"of batch shape \(\), got batch shape \(2,\) with events \(\); distribution\.to_event\(1\) makes one",
        ),
        (
            lambda: distrax_base(distrax.Normal(MEAN, jnp.ones(2))),
            r"batch shape \(2,\) with events \(\); distrax\.Independent\(distribution, reinterpreted_batch_ndims=1\)",
        ),
        (lambda: numpyro_base(3), "distribution: expected Distribution, got int"),
        (lambda: distrax_base(dist.Normal(0.0, 1.0)), "distribution: expected Distribution, got Normal"),
        (
            lambda: rf.Flow(rf.Affine((2,)), dist.Normal(MEAN, 1.0).to_event(1)),
            r"; for a distribution of numpyro pass rf\.interop\.numpyro\.base\(distribution\)",
        ),
        (
            lambda: rf.Flow(rf.Affine((2,)), distrax.MultivariateNormalTri(MEAN, FACTOR)),
            r"; for a distribution of distrax pass rf\.interop\.distrax\.base\(distribution\)",
        ),
        (
            lambda: rf.Flow(rf.Affine((3,)), numpyro_base(dist.Normal(MEAN, 1.0).to_event(1))),
            r"base: expected a distribution of events \(3,\), .* got events \(2,\)",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_public_names():
    """Each library's submodule has it as `base`."""
    assert rf.interop.distrax.base is distrax_base and rf.interop.numpyro.base is numpyro_base


def test_an_object_of_distrax_has_the_arrays_of_a_file(tmp_path):
    """DiagLinear holds methods of a part of its own; in a copy they are methods of the part with the copied arrays."""
    distrax = pytest.importorskip("distrax")

    def flow(scale, mean):
        base = distrax.MultivariateNormalDiag(mean + jnp.zeros(2), scale * jnp.ones(2))
        return rf.Flow(rf.Affine((2,)), base=distrax_base(base))

    saved = flow(3.0, 1.0)
    rf.save(tmp_path / "flow.safetensors", saved)
    found = rf.load(tmp_path / "flow.safetensors", like=flow(5.0, 0.0))
    x = jax.random.normal(jax.random.key(0), (4, 2))
    expected = distrax.MultivariateNormalDiag(jnp.ones(2), 3 * jnp.ones(2)).log_prob(x)
    for each in (saved, found):
        np.testing.assert_allclose(each.log_prob(x), expected, rtol=1e-6)
    np.testing.assert_allclose(found.sample(jax.random.key(1), 3), saved.sample(jax.random.key(1), 3), rtol=1e-6)
