"""Losses of classifiers: cross-entropy and density against dense computations, labels, and training on many devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.scipy.stats import norm

import resflow_jax as rf
from resflow_jax.data.images import dequantize
from resflow_jax.training.class_losses import classification_loss, cross_entropy
from resflow_jax.training.placement import Placement
from resflow_jax.training.step import Trainer
from tests.functional.contractions import z_scores

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 4, (8, 2, 2, 1)).astype(np.uint8), np.array([0, -1, 2, 1, -1, -1, -1, 2], np.int8)


@pytest.fixture(scope="module")
def flow():
    """A classifier with a density of images [2, 2, 1], its convolutions at their bounds."""
    block = rf.ResidualBlock(rf.LipschitzCNN((2, 2, 1), (2,), (3, 1), rngs=nnx.Rngs(0)))
    for linear in block.contraction.linears:
        linear.kernel[...] = 4 * linear.kernel[...]
    flow = rf.Classifier(rf.Chain([rf.ActNorm((1,)), block]), rf.PooledHead((2, 2, 1), 3, rngs=nnx.Rngs(1)))
    flow.initialize((IMAGES + 0.5) / 4)
    flow.converge_norms()
    return flow


def test_cross_entropy():
    """The mean of -log softmax over the labelled examples; zero without any, with finite gradients."""
    logits = RNG.normal(size=(8, 3))
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -np.mean([log_p[n, k] for n, k in enumerate(LABELS) if k >= 0])
    for dtype in (np.int8, np.int32, np.int64):
        np.testing.assert_allclose(cross_entropy(logits, LABELS.astype(dtype)), expected, rtol=1e-12)
    np.testing.assert_allclose(cross_entropy(logits[:1], np.zeros(1, np.uint8)), -log_p[0, 0], rtol=1e-12)
    value, gradient = jax.value_and_grad(cross_entropy)(jnp.asarray(logits), -np.ones(8, int))
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 3]), "labels: expected -1 to 2, got 0 to 3"),
        (np.array([0, -2]), "labels: expected -1 to 2, got -2 to 0"),
        (np.array([0.0, 1.0]), r"labels: expected signed integers \(2,\), got float64 \(2,\)"),
        (np.array([0, 2**32 - 1], np.uint32), r"labels: expected signed integers \(2,\), got uint32"),
        (np.zeros((2, 3), int), r"labels: expected signed integers \(2,\), got int64 \(2, 3\)"),
        (np.zeros(3, int), r"labels: expected signed integers \(2,\), got int64 \(3,\)"),
        ([0, 1], "labels: expected integers .* got list"),
    ],
)
def test_bad_labels(labels, message):
    """No label counts as another class: the error names the range, and traced labels outside give NaN."""
    logits = jnp.asarray(RNG.normal(size=(2, 3)))
    with pytest.raises(ValueError, match=f"^{message}"):
        cross_entropy(logits, labels)
    if "-1 to" in message:
        value, gradient = jax.jit(jax.value_and_grad(cross_entropy))(logits, labels)
        assert np.isnan(value) and np.isnan(gradient).any()


def parts(flow):
    """(graphdef, params, others) of a flow."""
    return nnx.split(flow, nnx.Param, ...)


def test_hybrid_loss(flow):
    """Value and gradient of -log p(y | x) - weight log p(x), with log|det df/dx| of the dense Jacobian."""
    graphdef, params, rest = parts(flow)
    x = dequantize(jnp.asarray(IMAGES), jax.random.split(KEY)[0], 4)

    def dense(params, weight):
        flow = nnx.merge(graphdef, params, rest)
        z = flow.bijector(x)
        j = jax.vmap(jax.jacfwd(lambda x: flow.bijector(x.reshape(1, 2, 2, 1)).ravel()))(x.reshape(8, 4))
        log_prob = jnp.sum(norm.logpdf(z), axis=(1, 2, 3)) + jnp.linalg.slogdet(j)[1]
        log_p = jax.nn.log_softmax(flow.head(z))
        terms = [log_p[n, k] for n, k in enumerate(LABELS) if k >= 0]
        return -sum(terms) / len(terms) - weight * jnp.mean(log_prob)

    def loss(params, weight):
        flow = nnx.merge(graphdef, params, rest, copy=True)
        return classification_loss(4, density_weight=weight)(flow, (IMAGES, LABELS), KEY, rf.Exact(), 0)

    @jax.jit
    def both(params):
        found = jax.value_and_grad(loss, has_aux=True)(params, 1 / 4)
        return found, jax.value_and_grad(dense)(params, 1 / 4)

    ((value, diagnostics), gradient), (expected, expected_gradient) = both(params)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    chex.assert_trees_all_close(gradient, expected_gradient, rtol=1e-8, atol=1e-10)
    assert diagnostics.length.shape == (1,)


def test_hybrid_loss_with_a_variational_dequantisation(flow):
    """The noise is that of the flow's dequantizer, whose log q is subtracted, and which learns."""
    flow = nnx.clone(flow)
    flow.dequantizer = rf.VariationalDequantization((2, 2, 1), couplings=1, width=2, rngs=nnx.Rngs(0))
    loss = classification_loss(4, density_weight=0.5)

    def value(flow):
        return loss(nnx.clone(flow), (IMAGES, LABELS), KEY, rf.Exact(), 0)[0]

    noise, log_q = flow.dequantizer.sample((IMAGES.astype(float) + 0.5) / 4, jax.random.split(KEY)[0])
    x = (IMAGES.astype(float) + noise) / 4
    expected = cross_entropy(flow.logits(x), LABELS) - 0.5 * jnp.mean(flow.log_prob(x, estimator=rf.Exact()) - log_q)
    np.testing.assert_allclose(value(flow), expected, rtol=1e-10)
    gradient = nnx.grad(value)(flow)["dequantizer"]
    assert any(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradient))


def test_loss_without_a_density(flow):
    """The cross-entropy of the middles of the cells, with the dropout of the key; the diagnostics are zero."""
    for dropout in (0.0, 0.5):
        loss, diagnostics = classification_loss(4, dropout=dropout)(flow, (IMAGES, LABELS), KEY, rf.Roulette(), 0)
        expected = cross_entropy(flow.logits((IMAGES + 0.5) / 4, key=KEY, dropout=dropout), LABELS)
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        assert not any(leaf.any() for leaf in diagnostics) and diagnostics.term_norms.shape == (1, 16)


def test_the_gradient_is_unbiased(flow):
    """The mean over keys of the gradient with `Roulette` is that with `Exact`; there are so many levels that the noise
    of dequantisation is none."""
    graphdef, params, rest = parts(flow)
    levels = 2**30
    images, labels = ((IMAGES[:3] + 0.5) / 4 * levels).astype(np.int32), np.array([0, -1, 2])
    loss = classification_loss(levels, density_weight=0.5)

    def gradient(key, estimator):
        def of(params):
            return loss(nnx.merge(graphdef, params, rest, copy=True), (images, labels), key, estimator, 0)[0]

        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.grad(of)(params))])

    keys = jax.random.split(jax.random.key(1), 2000)
    found = np.asarray(jax.jit(jax.vmap(lambda key: gradient(key, rf.Roulette())))(keys))
    expected = np.asarray(jax.jit(lambda key: gradient(key, rf.Exact()))(KEY))
    is_random = found.std(axis=0) > 1e-6 * np.abs(expected).max()
    assert is_random.sum() >= 6
    assert np.abs(z_scores(found[:, is_random], expected[is_random])).max() < 4
    np.testing.assert_allclose(found.mean(axis=0)[~is_random], expected[~is_random], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("density_weight", [0.0, 0.5])
def test_two_devices_take_the_step_of_one(density_weight):
    """Loss and parameters, though one device has one label and the other three; with dropout where it is allowed."""
    if density_weight:
        block = rf.ResidualBlock(rf.LipschitzCNN((2, 2, 1), (2,), (3, 1), rngs=nnx.Rngs(0)))
        options = {"density_weight": density_weight}
    else:
        block, options = rf.StridedBlock((2, 2, 1), 2, 2, stride=1, rngs=nnx.Rngs(0)), {"dropout": 0.5}
    flow = rf.Classifier(block, rf.PooledHead(block.output_shape((2, 2, 1)), 3, rngs=nnx.Rngs(1)))
    trainer = Trainer(nnx.graphdef(flow), classification_loss(4, **options), optax.sgd(0.1), 0.9)
    start, labels = trainer.create_state(flow, rf.Roulette()), np.array([-1, -1, 0, -1, 1, 2, -1, 0])
    expected, metrics = jax.jit(trainer.step)(start, (IMAGES, labels), KEY)
    mesh = rf.training.make_mesh(devices=jax.devices()[:2])
    for strategy in ("shard_map",) if density_weight else ("jit", "shard_map"):
        placement = Placement(trainer, mesh, strategy)
        state, found = placement.step(placement.place(start), placement.place_batch((IMAGES, labels)), KEY)
        chex.assert_trees_all_close(found, metrics, rtol=1e-8, atol=1e-10)
        chex.assert_trees_all_close(placement.to_host(state.params), expected.params, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 0}, "levels: expected an integer of at least 1, got 0"),
        ({"density_weight": -1.0}, "density_weight: expected 0 or a positive number, got -1.0"),
        ({"density_weight": np.inf}, "density_weight: expected a finite number, got inf"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout": 0.5, "density_weight": 1.0}, "dropout: expected 0 with density_weight 1.0, got 0.5"),
    ],
)
def test_bad_settings(arguments, message):
    """The error names the argument."""
    with pytest.raises(ValueError, match=f"^{message}"):
        classification_loss(**{"levels": 4, **arguments})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (IMAGES, r"batch: expected a pair \(images, labels\), got images alone"),
        ((IMAGES, LABELS, LABELS), "batch: expected .* got 3 parts"),
        ((IMAGES, LABELS[:3]), r"labels: expected signed integers \(8,\), got int8 \(3,\)"),
        ((IMAGES, LABELS + 3), "labels: expected -1 to 2, got 2 to 5"),
        (((IMAGES + 0.5) / 4, LABELS), "images: expected integer pixels in 0..3, got dtype float64"),
        ((IMAGES + np.uint8(1), LABELS), "images: expected pixels in 0..3, got 1..4"),
    ],
)
def test_bad_batches(flow, batch, message):
    """The error says what a batch is."""
    with pytest.raises(ValueError, match=f"^{message}"):
        classification_loss(4)(flow, batch, KEY, rf.Exact(), 0)


def test_dropout_needs_a_classifier():
    """Another flow would silently have none."""
    with pytest.raises(ValueError, match=r"dropout: expected 0 for a Flow, which has none, got 0\.5"):
        loss = classification_loss(4, dropout=0.5)
        loss(rf.Flow(rf.ActNorm((1,)), event_shape=(2, 2, 1)), (IMAGES, LABELS), KEY, rf.Exact(), 0)


def test_a_network_without_a_density():
    """A weight of the density is refused by the layer, with its reason."""
    flow = rf.Classifier(rf.ZeroPadding(1), rf.PooledHead((2, 2, 2), 3, rngs=nnx.Rngs(1)), event_shape=(2, 2, 1))
    with pytest.raises(ValueError, match="ZeroPadding: expected a pass without log-det or density, since appended"):
        classification_loss(4, density_weight=1.0)(flow, (IMAGES, LABELS), KEY, rf.Exact(), 0)
