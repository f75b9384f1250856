"""Passes without log-dets: dropout, and layers that have no log-det, whose flows refuse densities and samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import resflow_jax as rf
from resflow_jax.layers.without_log_det import WithoutLogDet
from resflow_jax.training import make_mesh
from tests.functional.contractions import z_scores

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 2, 2, 2))


class Half(rf.Contraction):
    """g(x) = x / 2 + 1 / 4."""

    lipschitz = 0.5

    def __call__(self, x, condition=None):
        return 0.5 * x + 0.25


def padded():
    """A flow of images [2, 2, 1] that appends a channel of zeros inside of a chain of a chain."""
    return rf.Flow(rf.Chain([rf.Chain([rf.ZeroPadding(1), rf.ActNorm((2,))])]), event_shape=(2, 2, 1))


def test_zeros_are_appended_and_dropped():
    """y = [x, 0] in the last axis of vectors and images, and the inverse drops the zeros."""
    layer = rf.ZeroPadding(3)
    for x in (X, X[:, 0, 0]):
        y = layer(x)
        np.testing.assert_array_equal(y[..., :2], x)
        np.testing.assert_array_equal(y[..., 2:], np.zeros((*x.shape[:-1], 3)))
        np.testing.assert_array_equal(layer.inverse(y + 1), x + 1)
        assert layer.output_shape(x.shape[1:]) == y.shape[1:] and layer.input_shape(y.shape[1:]) == x.shape[1:]
    assert layer.lipschitz_bounds() == (1.0, 1.0)


@pytest.mark.parametrize(
    "density",
    [
        lambda flow, x: flow.forward(x, key=KEY),
        lambda flow, x: flow.log_prob(x, estimator=rf.Exact()),
        lambda flow, x: flow.forward_and_log_prob(x, key=KEY),
        lambda flow, x: flow.inverse_and_log_prob(flow(x), key=KEY),
        lambda flow, x: flow.sample(KEY, 3),
        lambda flow, x: flow.sample_and_log_prob(KEY, 3),
        lambda flow, x: rf.evaluate_bits_per_dim(flow, np.ones((3, 2, 2, 1), np.uint8), KEY),
        lambda flow, x: flow.bijector.bijectors[0].bijectors[0].transform(x),
        lambda flow, x: flow.bijector.solve_and_estimate(flow(x), KEY, rf.Exact(), rf.Anderson(), None),
    ],
)
def test_what_needs_a_log_det_is_refused(density):
    """Densities and samples raise; the error says which layer has no log-det, and why."""
    flow = padded()
    with pytest.raises(ValueError, match=r"ZeroPadding.*appended zeros make it an injective map"):
        density(flow, X[..., :1])
    np.testing.assert_array_equal(flow.inverse(flow(X[..., :1])), X[..., :1])


def test_compositions_pass_the_reason_on():
    """Chains, stacks and multi-scale maps have the reason of their first layer without a log-det, others none."""
    block = rf.UnconstrainedBlock((2, 2, 2), 1, rngs=nnx.Rngs(0))
    for layer in (
        block,
        rf.Chain([rf.ActNorm((2,)), block, rf.ZeroPadding(1)]),
        rf.MultiScale([rf.ActNorm((2,)), rf.Reshape((2, 2, 1), (2, 2, 1))], (2, 2, 2)),
        rf.MultiScale([block, rf.ActNorm((1,))], (2, 2, 2)),
        nnx.eval_shape(
            lambda: rf.ResidualStack(lambda rngs: rf.UnconstrainedBlock((2, 2, 2), 1, rngs=rngs), 2, rngs=nnx.Rngs(0))
        ),
    ):
        has_block = any(isinstance(module, rf.UnconstrainedBlock) for _, module in nnx.iter_modules(layer))
        expected = "UnconstrainedBlock: the block has no bound that makes it a bijection" if has_block else None
        assert layer.no_density == expected
    assert padded().no_density.startswith("ZeroPadding: appended zeros")
    assert rf.Flow(rf.ActNorm((2,)), event_shape=(2,)).no_density is None


def test_dropout_of_g():
    """Each element of g(x) is zero or divided by 1 - p; the mean over keys is g(x), and examples draw their own."""
    without, p = WithoutLogDet(0.3), 0.3
    x = jnp.broadcast_to(X[:1], (2, 2, 2, 2))
    block = rf.ResidualBlock(Half())

    def dropped(key):
        y, log_det, _ = block.estimate(x, key, without, None)
        return y - x, log_det

    found, log_det = jax.jit(jax.vmap(dropped))(jax.random.split(KEY, 2000))
    g = np.asarray(0.5 * x + 0.25)
    is_zero = np.abs(found) < 1e-12
    np.testing.assert_allclose(found, np.where(is_zero, 0, g / (1 - p)), rtol=1e-9, atol=1e-12)
    assert np.abs(z_scores(found, g)).max() < 4 and np.abs(z_scores(is_zero.astype(float), p)).max() < 4
    both = (is_zero[:, 0] & is_zero[:, 1]).mean(axis=0)
    np.testing.assert_allclose(both, p**2, atol=4 * (p**2 / 2000) ** 0.5)
    assert not log_det.any()
    np.testing.assert_array_equal(block.estimate(x, None, WithoutLogDet(), None)[0], block(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: rf.ResidualBlock(Half()),
        lambda rngs: rf.UnconstrainedBlock((2, 2, 2), 1, rngs=rngs),
        lambda rngs: rf.StridedBlock((2, 2, 2), 3, 1, rngs=rngs),
    ],
)
def test_dropout_does_not_depend_on_the_division_of_a_batch(make):
    """Two devices with half of the batch each draw what one device draws."""
    layer = make(nnx.Rngs(0))

    def dropped(x):
        return layer.estimate(x, KEY, WithoutLogDet(0.5), None)[0]

    halves = PartitionSpec("data")
    mesh = make_mesh(devices=jax.devices()[:2])
    divided = jax.jit(jax.shard_map(dropped, mesh=mesh, in_specs=halves, out_specs=halves))
    found = divided(X)
    np.testing.assert_allclose(found, dropped(X), rtol=1e-12, atol=1e-14)
    assert not np.allclose(found, layer(X)), "some elements were dropped"


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (rf.MonotoneBlock(Half()), "MonotoneBlock"),
        (rf.Invert(rf.ResidualBlock(Half())), "Invert"),
        (rf.ImplicitBlock(Half(), Half()), "Invert"),
    ],
)
def test_dropout_of_a_solve_is_refused(layer, name):
    """The logits of a classifier with such a block; without dropout, and without a g to solve for, there are some."""
    head = rf.PooledHead((2,), 2, rngs=nnx.Rngs(0))
    flow, x = rf.Classifier(layer, head, event_shape=(2,)), X[:, 0, 0]
    assert np.isfinite(flow.logits(x)).all()
    with pytest.raises(ValueError, match=rf"^dropout: expected 0 with {name} inside, .* got 0.5"):
        flow.logits(x, key=KEY, dropout=0.5)
    explicit = rf.Invert(rf.ActNorm((2,)))
    y, *_ = explicit.estimate(x, KEY, WithoutLogDet(0.5), None)
    np.testing.assert_array_equal(y, explicit(x))


@pytest.mark.parametrize("dropout", [1.0, -0.1, float("nan"), "a"])
def test_bad_dropout(dropout):
    """A probability below one is expected."""
    with pytest.raises(ValueError, match=r"dropout: expected a probability in \[0, 1\), got"):
        WithoutLogDet(dropout)
