"""Base distributions: log-densities against SciPy's, gradients, samples by their moments, conditions, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

import resflow_jax as rf
from tests.moving import add_noise

K = 3
SHAPE = (2, 2)

# name: (constructor from rngs, shape of a condition)
BASES = {
    "standard": (lambda rngs: rf.StandardNormal(SHAPE), None),
    "diagonal": (lambda rngs: rf.DiagonalNormal(SHAPE), None),
    "diagonal, conditional": (lambda rngs: rf.DiagonalNormal(SHAPE, condition_dim=3, rngs=rngs), (3,)),
    "mixture": (lambda rngs: rf.MixtureOfNormals(K, SHAPE, rngs=rngs), None),
    "mixture, conditional": (lambda rngs: rf.MixtureOfNormals(K, SHAPE, condition_dim=3, rngs=rngs), (3,)),
    "mixture of classes": (lambda rngs: rf.MixtureOfNormals(K, SHAPE, class_conditional=True, rngs=rngs), (K,)),
}


def make(name):
    """A base whose parameters are away from their start."""
    base = BASES[name][0](nnx.Rngs(1))
    add_noise(base, 0.4)
    return base


def conditions(name, number):
    shape = BASES[name][1]
    return None if shape is None else jax.random.uniform(jax.random.key(4), (number, *shape))


def components(base, c):
    """Weights [k], means and deviations [k, *event] for one condition, in NumPy from the parameters."""
    if isinstance(base, rf.StandardNormal):
        return np.ones(1), np.zeros((1, *SHAPE)), np.ones((1, *SHAPE))
    is_mixture = isinstance(base, rf.MixtureOfNormals)
    names = ("means", "log_stds", "logits") if is_mixture else ("mean", "log_std")
    parts = [None if getattr(base, name) is None else np.asarray(getattr(base, name)[...]) for name in names]
    if base.network is not None:
        h = np.asarray(c) @ np.asarray(base.network.hidden.kernel[...]) + np.asarray(base.network.hidden.bias[...])
        out = (h / (1 + np.exp(-h))) @ np.asarray(base.network.out[...])
        pieces = np.split(out, np.cumsum([part.size for part in parts])[:-1])
        added = [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        added[1] = 4 * np.tanh(added[1] / 4)
        parts = [p + a for p, a in zip(parts, added, strict=True)]
    mean, std = (part.reshape(-1, *SHAPE) for part in (parts[0], np.exp(parts[1])))
    if not is_mixture:
        return np.ones(1), mean, std
    weights = np.asarray(c) if base.class_conditional else np.exp(parts[2])
    return weights / weights.sum(), mean, std


@pytest.mark.parametrize("name", BASES)
def test_log_prob(name):
    """Equal to a mixture of SciPy's normals, for each example and its condition, also under jit."""
    base, z, c = make(name), 2 * jax.random.normal(jax.random.key(0), (5, *SHAPE)), conditions(name, 5)
    expected = []
    for n in range(5):
        weights, means, stds = components(base, None if c is None else c[n])
        densities = scipy.stats.norm.pdf(np.asarray(z[n])[None], means, stds).prod(axis=(1, 2))
        expected.append(np.log(weights @ densities))
    found = nnx.jit(lambda base, z, c: base.log_prob(z, c))(base, z, c)
    assert found.shape == (5,) and base.condition_shape == BASES[name][1] and base.event_shape == SHAPE
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(base.log_prob(z, c), expected, rtol=1e-12)


@pytest.mark.parametrize("name", BASES)
def test_gradients(name):
    """With respect to parameters, z and c: those of finite differences, along a random direction each."""
    base, z, c = make(name), jax.random.normal(jax.random.key(0), (4, *SHAPE)), conditions(name, 4)
    graphdef, params, rest = nnx.split(base, nnx.Param, ...)
    inputs = params, z, c

    @jax.jit
    def total(inputs):
        params, z, c = inputs
        return jnp.sum(nnx.merge(graphdef, params, rest).log_prob(z, c))

    gradients = jax.jit(jax.grad(total))(inputs)
    leaves, structure = jax.tree.flatten(inputs)
    for n, gradient in enumerate(jax.tree.leaves(gradients)):
        direction = jax.random.normal(jax.random.key(n), leaves[n].shape)
        ends = [
            total(jax.tree.unflatten(structure, [*leaves[:n], leaves[n] + step * direction, *leaves[n + 1 :]]))
            for step in (1e-5, -1e-5)
        ]
        np.testing.assert_allclose(jnp.sum(gradient * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-8)
        assert jnp.any(gradient != 0)


@pytest.mark.parametrize("name", BASES)
def test_samples(name):
    """Mean and second moment of 40000 draws within 5 standard errors of those of the components, at temperatures."""
    base, number = make(name), 40_000
    c = conditions(name, 1)
    weights, means, stds = components(base, None if c is None else c[0])
    c = None if c is None else jnp.broadcast_to(c, (number, *c.shape[1:]))
    sample = nnx.jit(lambda base, c, t: base.sample(jax.random.key(7), number, c, t))
    for temperature in (1.0, 0.3):
        z = np.asarray(sample(base, c, temperature))
        assert z.shape == (number, *SHAPE)
        mean = np.einsum("k,k...->...", weights, means)
        square = np.einsum("k,k...->...", weights, means**2 + (temperature * stds) ** 2)
        for values, expected in ((z, mean), (z**2, square), (z[:, :1] * z[:, 1:], _products(weights, means))):
            error = values.std(axis=0) / number**0.5
            assert (np.abs(values.mean(axis=0) - expected) < 5 * error).all()


def _products(weights, means):
    """E[z_0j z_1j]: components have no correlation inside."""
    return np.einsum("k,k...->...", weights, means[:, :1] * means[:, 1:])


@pytest.mark.parametrize("name", BASES)
def test_float32(name):
    """In float32 both methods keep the dtype, under strict promotion; each condition has samples of its own."""
    base, c = make(name), conditions(name, 6)
    nnx.update(base, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(base)))
    c = None if c is None else c.astype(jnp.float32)
    z = jax.random.normal(jax.random.key(0), (6, *SHAPE), jnp.float32)
    assert base.log_prob(z, c).dtype == jnp.float32
    if name != "standard":
        assert base.sample(jax.random.key(0), 6, c, 0.5).dtype == jnp.float32


def test_starts():
    """A learnable normal starts as N(0, I) for every condition; components start apart."""
    z = jax.random.normal(jax.random.key(0), (4, 3))
    c = jax.random.normal(jax.random.key(1), (4, 2))
    expected = rf.StandardNormal((3,)).log_prob(z)
    np.testing.assert_allclose(rf.DiagonalNormal((3,)).log_prob(z), expected, rtol=1e-12)
    conditional = rf.DiagonalNormal((3,), condition_dim=2, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(conditional.log_prob(z, c), expected, rtol=1e-12)
    means = rf.MixtureOfNormals(4, (3,), rngs=nnx.Rngs(0)).means[...]
    assert np.unique(np.asarray(means)).size == 12


def test_classes():
    """One-hot: that component alone. Frequencies: the marginal, whatever their sum. The derivative in c is finite."""
    base = make("mixture of classes")
    z = jax.random.normal(jax.random.key(0), (K, *SHAPE))
    alone = base.log_prob(z, jnp.eye(K))
    means, stds = (np.asarray(base.means[...]), np.exp(np.asarray(base.log_stds[...])))
    np.testing.assert_allclose(alone, scipy.stats.norm.logpdf(z, means, stds).sum(axis=(1, 2)), rtol=1e-12)
    weights = jnp.broadcast_to(jnp.asarray([0.5, 0.2, 0.3]), (K, K))
    np.testing.assert_allclose(base.log_prob(z, 7 * weights), base.log_prob(z, weights), rtol=1e-12)

    def unnormalized(c):
        return base.log_prob(z[:1], c[None])[0] + jnp.log(jnp.sum(c))

    densities = scipy.stats.norm.pdf(np.asarray(z[:1]), means, stds).prod(axis=(1, 2))
    c = jnp.asarray([0.0, 0.6, 0.4])
    expected = densities / (densities @ np.asarray(c))
    np.testing.assert_allclose(jax.grad(unnormalized)(c), expected, rtol=1e-10)
    samples = base.sample(jax.random.key(0), 500, jnp.broadcast_to(jnp.eye(K)[1], (500, K)), temperature=1e-6)
    np.testing.assert_allclose(samples, np.broadcast_to(means[1], samples.shape), atol=1e-4)


def test_weights_that_are_none_give_nan():
    """Density and samples are NaN for these weights; other examples of the batch are not affected."""
    base = make("mixture of classes")
    weights = jnp.asarray([[0.0, 0.0, 0.0], [-1.0, 2.0, 0.0], [0.0, 1.0, 0.0]])
    z = base.sample(jax.random.key(0), 3, weights, temperature=0.0)
    assert jnp.isnan(z[:2]).all()
    np.testing.assert_array_equal(z[2], base.means[1])
    np.testing.assert_array_equal(jnp.isnan(base.log_prob(jnp.zeros((3, *SHAPE)), weights)), [True, True, False])


def test_classes_far_from_the_components():
    """A component of weight zero that fits infinitely better changes neither value nor finiteness of derivatives."""
    base = rf.MixtureOfNormals(2, (1,), class_conditional=True, rngs=nnx.Rngs(0))
    base.means[...] = jnp.asarray([[0.0], [1e3]])
    z, c = jnp.asarray([[0.0]]), jnp.asarray([[0.0, 1.0]])
    np.testing.assert_allclose(base.log_prob(z, c), scipy.stats.norm.logpdf(1e3), rtol=1e-12)
    for gradient in jax.grad(lambda z, c: base.log_prob(z, c)[0], argnums=(0, 1))(z, c):
        assert jnp.isfinite(gradient).all()
    for c in ([[-1.0, 2.0]], [[0.0, 0.0]]):
        assert jnp.isnan(base.log_prob(z, jnp.asarray(c))).all()
    base.means[...] = jnp.asarray([[0.0], [10.0]])
    half = nnx.merge(nnx.graphdef(base), jax.tree.map(lambda leaf: leaf.astype(jnp.float16), nnx.state(base)))
    found = half.log_prob(jnp.full((1, 1), 10, jnp.float16), jnp.asarray([[1, 0]], jnp.float16))
    np.testing.assert_allclose(found.astype(float), scipy.stats.norm.logpdf(10), rtol=1e-2)


@pytest.mark.parametrize("name", BASES)
def test_in_a_flow(name):
    """The flow's log-density and samples are those of the base, moved by its bijector."""
    base = make(name)
    shift = rf.Normalization(jnp.full(SHAPE, 2.0), jnp.ones(SHAPE))
    flow = rf.Flow(shift, base)
    c = conditions(name, 4)
    x = 2 + jax.random.normal(jax.random.key(0), (4, *SHAPE))
    found = flow.log_prob(x, condition=c, estimator=rf.Exact())
    np.testing.assert_allclose(found, base.log_prob(x - 2, c), rtol=1e-12)
    samples = flow.sample(jax.random.key(1), 4, condition=c, temperature=0.5)
    np.testing.assert_allclose(samples, base.sample(jax.random.key(1), 4, c, 0.5) + 2, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rf.StandardNormal(3), r"event_shape: expected a tuple of sizes, such as \(3,\), got 3"),
        (lambda: rf.DiagonalNormal((0,)), "event_shape: expected an integer of at least 1, got 0"),
        (
            lambda: rf.DiagonalNormal((2,), condition_dim=2),
            "rngs: expected nnx.Rngs with condition_dim, got NoneType",
        ),
        (
            lambda: rf.DiagonalNormal((2,), condition_dim=0, rngs=nnx.Rngs(0)),
            "condition_dim: expected an integer of at least 1, got 0",
        ),
        (lambda: rf.MixtureOfNormals(0, (2,), rngs=nnx.Rngs(0)), "components: expected an integer of at least 1"),
        (lambda: rf.MixtureOfNormals(2, (2,), rngs=None), "rngs: expected Rngs, got NoneType"),
        (
            lambda: rf.MixtureOfNormals(2, (2,), class_conditional=True, condition_dim=3, rngs=nnx.Rngs(0)),
            "condition_dim: expected None together with class_conditional, .*, got 3",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_interface_says_what_is_missing():
    with pytest.raises(NotImplementedError, match=r"Base: expected a method log_prob"):
        rf.Base().log_prob(jnp.ones((1, 2)))
    with pytest.raises(NotImplementedError, match=r"Base: expected a method sample"):
        rf.Base().sample(jax.random.key(0), 1)
