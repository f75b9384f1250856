"""Certified radii: the formula, attacks that fail within them, and a linear classifier, where they are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf

X = jax.random.normal(jax.random.key(0), (40, 3))


def head(dim=3, activation="elu"):
    made = rf.PooledHead((dim,), 4, activation=activation, rngs=nnx.Rngs(1))
    made.kernel[...] = 3 * made.kernel[...]
    made.bias[...] = jnp.linspace(-0.1, 0.1, 4)
    return made


@pytest.fixture(scope="module")
def network():
    """A classifier with two blocks of a small Lipschitz constant, so that radii are not tiny."""
    rngs = nnx.Rngs(0)
    blocks = [rf.ResidualBlock(rf.LipschitzMLP(3, (6,), coefficient=0.5, rngs=rngs)) for _ in range(2)]
    for block in blocks:
        for linear in block.contraction.linears:
            linear.kernel[...] = 5 * linear.kernel[...]
    flow = rf.Classifier(rf.Chain(blocks), head())
    flow.converge_norms()
    flow.tighten()
    return flow


def test_formula(network):
    """The least margin over Lip(f) times the constant of the difference of logits; no less than the coarser bound."""
    logits = np.asarray(network.logits(X))
    radii = rf.certified_radius(network, logits)
    lipschitz, constants = rf.certify(network).lipschitz, network.head.lipschitz_bounds()
    for row, radius in zip(logits, radii, strict=True):
        best = int(row.argmax())
        others = [k for k in range(4) if k != best]
        expected = min((row[best] - row[k]) / (lipschitz * constants[best, k]) for k in others)
        np.testing.assert_allclose(radius, expected, rtol=1e-12)
        of_logits = lipschitz * np.linalg.norm(np.asarray(network.head.kernel[...]), axis=0).max()
        assert radius >= (row[best] - row[others].max()) / (2 * of_logits) * (1 - 1e-12)
    assert radii.shape == (40,) and radii.dtype == np.float64 and (radii > 0).all()


def attacked(flow, radii, steps=40):
    """The logits at the ends of a projected gradient descent of the margin, and of random steps, within given radii."""
    graphdef, state = nnx.split(flow)
    best, reach = jnp.argmax(flow.logits(X), axis=1), jnp.asarray(radii)[:, None]

    def margin(x):
        logits = nnx.merge(graphdef, state).logits(x)
        own = jnp.take_along_axis(logits, best[:, None], axis=1)
        others = jnp.where(jax.nn.one_hot(best, 4, dtype=bool), -jnp.inf, logits)
        return jnp.sum(own - jnp.max(others, axis=1, keepdims=True))

    def direction(d):
        return d / jnp.linalg.norm(d, axis=1, keepdims=True)

    def descend(_, d):
        d = d - 0.2 * reach * direction(jax.grad(margin)(X + d))
        return d * jnp.minimum(1, reach / jnp.linalg.norm(d, axis=1, keepdims=True))

    @jax.jit
    def ends(key):
        random = reach * direction(jax.random.normal(key, X.shape))
        return jax.lax.fori_loop(0, steps, descend, 0.1 * random), random

    found = ends(jax.random.key(2))
    np.testing.assert_array_less(jnp.linalg.norm(found[0], axis=1), np.asarray(radii) * (1 + 1e-9))
    return [jnp.argmax(flow.logits(X + d), axis=1) != best for d in found]


def test_no_attack_succeeds_within_the_radius(network):
    """Neither gradients nor random directions change a class; with four times the radius gradients do."""
    radii = rf.certified_radius(network, network.logits(X))
    assert np.median(radii) > 0.02
    by_gradient, by_chance = attacked(network, radii * (1 - 1e-6))
    assert not by_gradient.any() and not by_chance.any()
    by_gradient, _ = attacked(network, 8 * radii)
    assert by_gradient.mean() > 0.2


def test_a_linear_classifier():
    """The class changes just outside of the radius, in the direction of the nearest border, and not just inside."""
    flow = rf.Classifier(rf.Chain([]), head(activation="identity"), event_shape=(3,))
    logits, kernel = np.asarray(flow.logits(X)), np.asarray(flow.head.kernel[...])
    radii, best = rf.certified_radius(flow, logits), logits.argmax(axis=1)
    differences = kernel.T[best][:, None] - kernel.T[None]
    with np.errstate(invalid="ignore"):
        distances = (logits.max(axis=1, keepdims=True) - logits) / np.linalg.norm(differences, axis=-1)
    nearest = np.nanargmin(distances, axis=1)
    steps = -differences[np.arange(40), nearest]
    steps = jnp.asarray(radii[:, None] * steps / np.linalg.norm(steps, axis=1, keepdims=True))
    np.testing.assert_array_equal(flow.logits(X + (1 - 1e-6) * steps).argmax(axis=1), best)
    np.testing.assert_array_equal(flow.logits(X + (1 + 1e-6) * steps).argmax(axis=1), nearest)


def test_ties_and_networks_without_a_bound(network):
    """Their radius is zero; that of a class whose logit differs by a constant from all others is infinite."""
    np.testing.assert_array_equal(rf.certified_radius(network, jnp.ones((2, 4))), 0)
    block = rf.UnconstrainedBlock((1, 1, 3), 2, rngs=nnx.Rngs(0))
    vanilla = rf.Classifier(block, rf.PooledHead((1, 1, 3), 4, rngs=nnx.Rngs(1)))
    np.testing.assert_array_equal(rf.certified_radius(vanilla, vanilla.logits(X[:, None, None])), 0)
    vanilla.head.kernel[...] = jnp.zeros((3, 4))
    np.testing.assert_array_equal(rf.certified_radius(vanilla, jnp.asarray([[0.0, 1, 2, 4]])), np.inf)
