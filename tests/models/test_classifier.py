"""Classifiers: logits from a head and from a mixture, their transformations, and residual networks of every kind."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from scipy.stats import norm

import resflow_jax as rf

X = jax.random.normal(jax.random.key(0), (5, 3))
KEY = jax.random.key(1)


def moved(flow):
    """The flow with parameters away from their start, in place."""
    params, unravel = ravel_pytree(nnx.state(flow, nnx.Param))
    nnx.update(flow, unravel(params + 0.3 * jax.random.normal(jax.random.key(2), params.shape)))
    return flow


@pytest.fixture(scope="module")
def classifiers():
    """One network with a head and one with a mixture."""
    block = rf.ResidualBlock(rf.LipschitzMLP(3, (4,), rngs=nnx.Rngs(0)))
    bijector = rf.Chain([rf.ActNorm((3,)), block])
    head = rf.PooledHead((3,), 4, rngs=nnx.Rngs(1))
    base = rf.MixtureOfNormals(4, (3,), rngs=nnx.Rngs(2))
    return {"head": moved(rf.Classifier(bijector, head)), "mixture": moved(rf.Classifier(bijector, base=base))}


KINDS = "head", "mixture"


def test_logits_of_a_head(classifiers):
    """They are head(f(x)), of as many classes as the head has."""
    flow = classifiers["head"]
    assert flow.classes == 4 and flow.logits(X).shape == (5, 4)
    np.testing.assert_allclose(flow.logits(X), flow.head(flow(X)), rtol=1e-12)


def test_logits_of_a_mixture(classifiers):
    """They are log w_k + log N_k(f(x)), whose sum of exponentials is the density of f(x)."""
    flow = classifiers["mixture"]
    base, z = flow.base, np.asarray(flow(X))
    weights = np.exp(base.logits[...]) / np.exp(base.logits[...]).sum()
    normals = norm.logpdf(z[:, None], np.asarray(base.means[...])[None], np.exp(base.log_stds[...])[None]).sum(axis=2)
    expected = np.log(weights)[None] + normals
    assert flow.classes == 4
    np.testing.assert_allclose(flow.logits(X), expected, rtol=1e-10)
    np.testing.assert_allclose(base.log_joint(z), expected, rtol=1e-10)
    np.testing.assert_allclose(jax.nn.logsumexp(base.log_joint(z), axis=1), base.log_prob(z), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_gives_density_and_logits(classifiers, kind):
    """z, log p(x), diagnostics and logits are those of separate calls; the logits do not depend on the estimator."""
    flow, options = classifiers[kind], {"key": KEY, "return_diagnostics": True}
    z, log_prob, diagnostics, logits = flow.forward_and_log_prob(X, **options, return_logits=True)
    expected = flow.forward_and_log_prob(X, **options)
    assert len(expected) == 3 and len(flow.forward_and_log_prob(X, key=KEY, return_logits=True)) == 3
    jax.tree.map(np.testing.assert_array_equal, (z, log_prob, diagnostics), expected)
    np.testing.assert_allclose(log_prob, flow.log_prob(X, key=KEY), rtol=1e-12)
    np.testing.assert_allclose(logits, flow.logits(X), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_transformations(classifiers, kind):
    """jit, vmap over parameters, and the gradient of a cross-entropy along a direction."""
    graphdef, params, rest = nnx.split(classifiers[kind], nnx.Param, ...)
    flat, unravel = ravel_pytree(params)

    def logits(flat):
        return nnx.merge(graphdef, unravel(flat), rest).logits(X)

    def loss(flat):
        return -jnp.mean(jax.nn.log_softmax(logits(flat))[:, 0])

    step = 1e-6 * jnp.asarray(np.random.default_rng(0).normal(size=flat.shape))
    found = jax.jit(jax.vmap(logits))(jnp.stack([flat, flat + 1e5 * step]))
    np.testing.assert_allclose(found[0], classifiers[kind].logits(X), rtol=1e-12)
    assert not np.allclose(found[1], found[0])
    value_and_gradient = jax.jit(jax.value_and_grad(loss))
    change = value_and_gradient(flat + step)[0] - value_and_gradient(flat - step)[0]
    np.testing.assert_allclose(2 * value_and_gradient(flat)[1] @ step, change, rtol=1e-6)


def test_dropout(classifiers):
    """A key drops the same elements every time, another key others; f(x) is then x + dropout(g(x)) of every block."""
    flow = classifiers["head"]
    found, again, other = (flow.logits(X, key=key, dropout=0.5) for key in (KEY, KEY, jax.random.key(2)))
    np.testing.assert_array_equal(found, again)
    assert not np.allclose(found, other) and not np.allclose(found, flow.logits(X))
    np.testing.assert_array_equal(flow.logits(X, key=KEY), flow.logits(X))


def test_padding_with_noise():
    """Logits without dropout are those of the mean of the noise, as the features of other flows are."""
    flow = rf.Classifier(rf.ChannelPadding(1), rf.PooledHead((4,), 2, rngs=nnx.Rngs(0)), event_shape=(3,))
    padded = jnp.pad(X, [(0, 0), (0, 1)], constant_values=0.5)
    np.testing.assert_allclose(flow.logits(X), flow.head(padded), rtol=1e-12)
    np.testing.assert_array_equal(flow.logits(X, key=KEY), flow.logits(X))


NETWORKS = {
    "invertible": {"coefficient": 0.9, "padding": 1, "head_channels": 3},
    "vanilla": {"coefficient": None, "blocks": (2,), "hidden_channels": (2,), "squeeze_first": True},
    "standard": {"coefficient": None, "architecture": "standard", "padding": 2},
    "mixture": {"head": "mixture", "blocks": (1,), "hidden_channels": (2,), "logit_alpha": 0.05},
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks(kind, tmp_path):
    """A network has the shapes of its config, comes back from files and pickles, and is certified if it has a bound."""
    settings = {"shape": (2, 2, 1), "classes": 3, "blocks": (1, 1), "hidden_channels": (2, 2), "padding": 0}
    config = rf.ClassifierConfig(**{**settings, **NETWORKS[kind]})
    flow = moved(rf.ResNetClassifier(config, rngs=nnx.Rngs(0)))
    side = 2 ** (2 - len(config.blocks) - config.squeeze_first)
    assert flow.latent_shape == (side, side, config.channels[-1]) and flow.blocks == sum(config.blocks)
    assert (flow.no_density is None) == config.has_density
    images = jax.random.uniform(KEY, (3, 2, 2, 1))
    logits = flow.logits(images)
    assert logits.shape == (3, 3) and np.isfinite(logits).all()
    rf.save(tmp_path / "flow.safetensors", flow)
    for again in (rf.load(tmp_path / "flow.safetensors"), pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow)):
        assert type(again) is rf.ResNetClassifier and again.config == config
        np.testing.assert_array_equal(again.logits(images), logits)
    flow.tighten()
    certificate = rf.certify(flow)
    assert certificate.is_certified == (config.coefficient is not None) == np.isfinite(certificate.lipschitz)
    assert len(certificate.blocks) == flow.blocks
    with pytest.raises(ValueError, match=r"x: expected values in \[0, 1\]"):
        flow.initialize(images + 1)


@pytest.mark.parametrize("is_bounded", [True, False])
def test_round_trip(is_bounded):
    """Images come back from a network of large kernels with a bound; without one they do not, or the status says so."""
    sizes = {"blocks": (1,), "hidden_channels": (2,), "padding": 1, "coefficient": 0.9 if is_bounded else None}
    flow = rf.ResNetClassifier(rf.ClassifierConfig((2, 2, 1), 3, **sizes), rngs=nnx.Rngs(0))
    params = nnx.state(flow.bijector, nnx.Param)
    nnx.update(
        flow.bijector, jax.tree_util.tree_map_with_path(lambda p, v: 20 * v if "kernel" in str(p) else v, params)
    )
    flow.converge_norms()
    images = jax.random.uniform(KEY, (3, 2, 2, 1))
    back, status = jax.jit(lambda x: flow.inverse(flow(x), return_status=True))(images)
    is_right = np.asarray(status.converged.all(axis=0)) & (np.abs(back - images).max(axis=(1, 2, 3)) < 1e-5)
    assert is_right.all() if is_bounded else not is_right.any()
