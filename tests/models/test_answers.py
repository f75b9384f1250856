"""Further outputs of a flow in one pass: z with log p, and logits; the parts of z by scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.interop.torch.flow import TorchFlow, TorchImageConfig
from tests.models.test_composed_flow import contraction, make_flow
from tests.moving import change_parameters

KEY = jax.random.key(3)
PIXELS = jax.random.uniform(jax.random.key(0), (3, 4, 4, 1))
ROULETTE = rf.Roulette(rf.Geometric(0.5))
TRUNCATED = rf.Truncated(2)  # has noise too, and a smaller gradient to compile


def image_config(cls=rf.ImageFlowConfig, *, factor_out=True, tail=0, **options):
    settings = {"blocks": (1, 1), "hidden_channels": 2, "coefficient": 0.5}
    sizes = {"tail": rf.DenseTail(tail, hidden=2), "scales": rf.Scales(factor_out=factor_out)}
    return cls((4, 4, 1), **settings, **sizes, **options)


def scrambled(flow, x, condition=None):
    """The flow away from its start."""
    flow.initialize(x, condition)
    change_parameters(flow, lambda p: 1.3 * p + 0.05)
    flow.converge_norms()
    return flow


def small_flow(condition_shape=None):
    block = rf.ResidualBlock(contraction(nnx.Rngs(0), condition_shape))
    return rf.Flow(rf.Chain([rf.ActNorm((3,)), block, rf.ResidualBlock(contraction(nnx.Rngs(1)))]))


@pytest.fixture(scope="module", params=[True, False], ids=["factored out", "in one part"])
def classifying(request):
    config = image_config(TorchImageConfig, factor_out=request.param, tail=1, classes=3, classifier_channels=2)
    return scrambled(TorchFlow(config, rngs=nnx.Rngs(0)), PIXELS)


@pytest.mark.parametrize(("shape", "estimator"), [(None, rf.Exact()), ((2,), ROULETTE)], ids=["p(x)", "p(x | c)"])
def test_one_pass(shape, estimator):
    """z of `forward`, log p of `log_prob`, by the same key, and the diagnostics of both."""
    x = jax.random.normal(jax.random.key(1), (4, 3))
    c = None if shape is None else jax.random.normal(jax.random.key(2), (4, *shape))
    flow = scrambled(small_flow(shape), x, c)
    options = {"condition": c, "key": KEY, "estimator": estimator, "return_diagnostics": True}
    z, log_prob, diagnostics = flow.forward_and_log_prob(x, **options)
    expected_z, log_det, expected_diagnostics = flow.forward(x, **options)
    np.testing.assert_allclose(z, expected_z, rtol=1e-12)
    np.testing.assert_allclose(log_prob, flow.log_prob(x, **options)[0], rtol=1e-12)
    dense = -0.5 * (z**2).sum(-1) - 1.5 * np.log(2 * np.pi) + log_det
    np.testing.assert_allclose(log_prob, dense, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), diagnostics, expected_diagnostics)
    del options["return_diagnostics"]
    assert len(flow.forward_and_log_prob(x, **options)) == 2


def test_one_pass_is_differentiated_and_mapped():
    """Under jit, vmap over keys and grad it is what `log_prob` is."""
    x = jax.random.normal(jax.random.key(1), (4, 3))
    graphdef, state = nnx.split(small_flow())
    keys = jax.random.split(KEY, 2)

    @jax.jit
    def totals(state, method):
        def total(state, key):
            flow = nnx.merge(graphdef, state)
            if method:
                return flow.forward_and_log_prob(x, key=key, estimator=TRUNCATED)[1].sum()
            return flow.log_prob(x, key=key, estimator=TRUNCATED).sum()

        params, rest = nnx.split_state(state, nnx.Param, ...)
        return jax.vmap(lambda key: jax.value_and_grad(lambda p: total(nnx.merge_state(p, rest), key))(params))(keys)

    totals = jax.jit(totals.__wrapped__, static_argnums=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), totals(state, True), totals(state, False))


def test_logits_of_the_same_pass(classifying):
    """They are `logits`, beside z and log p of `forward_and_log_prob` by the same key."""
    options = {"key": KEY, "estimator": TRUNCATED, "return_diagnostics": True}
    z, log_prob, diagnostics, logits = classifying.forward_and_log_prob(PIXELS, return_logits=True, **options)
    expected = classifying.forward_and_log_prob(PIXELS, **options)
    for found, other in zip((z, log_prob, *diagnostics), (*expected[:2], *expected[2]), strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(logits, classifying.logits(PIXELS), rtol=1e-10)
    assert logits.shape == (3, 3)
    del options["return_diagnostics"]
    z, log_prob, logits = classifying.forward_and_log_prob(PIXELS, return_logits=True, **options)
    np.testing.assert_allclose(log_prob, expected[1], rtol=1e-12)


def test_logits_cost_no_second_pass(classifying, monkeypatch):
    """Every residual block is estimated once and is applied at no other time."""
    calls = []
    estimate = rf.ResidualBlock.estimate

    def counted(self, *args):
        calls.append("estimate")
        return estimate(self, *args)

    monkeypatch.setattr(rf.ResidualBlock, "estimate", counted)
    monkeypatch.setattr(rf.ResidualBlock, "__call__", lambda *args: calls.append("call"))
    graphdef, state = nnx.split(classifying)
    options = {"key": KEY, "estimator": ROULETTE}
    traced = {}
    for name in (True, False):
        calls.clear()
        jax.make_jaxpr(
            lambda state, name=name: nnx.merge(graphdef, state).forward_and_log_prob(
                PIXELS, return_logits=name, **options
            )
        )(state)
        traced[name] = list(calls)
    assert traced[True] == traced[False] and "call" not in traced[True] and traced[True]


@pytest.mark.parametrize("classifying", [True], indirect=True, ids=["factored out"])
def test_logits_are_differentiated(classifying):
    """A loss of both, as of a hybrid model, has the gradient of the sum of its parts."""
    graphdef, params, rest = nnx.split(classifying, nnx.Param, ...)

    def both(params):
        flow = nnx.merge(graphdef, params, rest)
        _, log_prob, logits = flow.forward_and_log_prob(PIXELS, key=KEY, estimator=TRUNCATED, return_logits=True)
        return log_prob.sum() + jax.nn.log_softmax(logits)[:, 0].sum()

    def apart(params):
        flow = nnx.merge(graphdef, params, rest)
        log_prob = flow.log_prob(PIXELS, key=KEY, estimator=TRUNCATED)
        return log_prob.sum() + jax.nn.log_softmax(flow.logits(PIXELS))[:, 0].sum()

    found, expected = (jax.jit(jax.grad(loss))(params) for loss in (both, apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), found, expected)


def test_no_classifier():
    flow = nnx.eval_shape(lambda: TorchFlow(image_config(TorchImageConfig), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="classes: expected a flow whose config has classes"):
        flow.forward_and_log_prob(PIXELS, key=KEY, return_logits=True)


# One without a dense tail, factored out, is in `test_features_are_those_of_the_scales`.
SHAPES = {
    "factored out, dense tail": (image_config(tail=1), ((2, 2, 2), (2, 2, 2))),
    "in one part": (image_config(factor_out=False), ((2, 2, 4),)),
    "padded": (
        image_config(data=rf.ImageTransform(padding=rf.Padding(1))),
        ((2, 2, 4), (2, 2, 4)),
    ),
    "vectors": (rf.VectorFlowConfig(3, blocks=1, hidden=(2,)), ((3,),)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_features(name):
    """In their shapes, z in its order; the base's log-density is the sum of that of the parts."""
    config, shapes = SHAPES[name]
    x = PIXELS if name != "vectors" else jnp.ones((2, 3)) * jnp.arange(2.0)[:, None]
    flow = rf.ResidualFlow(config, rngs=nnx.Rngs(0))
    features, z = flow.features(x), flow(x)
    assert flow.part_shapes == shapes == tuple(part.shape[1:] for part in features)
    np.testing.assert_array_equal(np.concatenate([part.reshape(len(x), -1) for part in features], axis=1), z)
    np.testing.assert_array_equal(flow.join_latent(features), z)
    parts = [-0.5 * (p**2 + np.log(2 * np.pi)).sum(tuple(range(1, p.ndim))) for p in features]
    np.testing.assert_allclose(sum(parts), flow.base_log_prob(z), rtol=1e-12)


def test_features_are_those_of_the_scales():
    """Half of the channels after the first scale, all of the last scale's, by the layers themselves."""
    flow = scrambled(rf.ResidualFlow(image_config(), rngs=nnx.Rngs(0)), PIXELS)
    first, last = flow.scales
    h = first(PIXELS)
    features = flow.features(PIXELS)
    assert flow.part_shapes == ((2, 2, 2), (2, 2, 2)) == tuple(part.shape[1:] for part in features)
    np.testing.assert_allclose(features[0], h[..., 2:], rtol=1e-12)
    np.testing.assert_allclose(features[1], last(h[..., :2]), rtol=1e-12)


def test_parts_in_compositions():
    """Layers that keep the shape of z keep its parts, those that change it make it one part."""

    def flow(*layers):
        return rf.Flow(rf.Chain(layers))

    scales = rf.MultiScale([rf.Squeeze((4, 4, 1)), rf.Flatten((2, 2, 2))], (4, 4, 1))
    nested = rf.MultiScale([rf.ActNorm((2,)), scales], (4, 4, 2))
    assert flow(scales).part_shapes == ((2, 2, 2), (2, 2, 2))
    assert rf.Flow(nested).part_shapes == ((4, 4, 1), (2, 2, 2), (2, 2, 2))
    assert flow(scales, rf.ActNorm((16,))).part_shapes == ((2, 2, 2), (2, 2, 2))
    assert flow(scales, rf.Chain([rf.ActNorm((16,))])).part_shapes == ((2, 2, 2), (2, 2, 2))
    assert flow(scales, rf.Reshape((16,), (4, 4))).part_shapes == ((4, 4),)
    assert flow(rf.Flatten((2, 3)), rf.Permutation(range(6))).part_shapes == ((2, 3),)
    of_vectors = rf.MultiScale([rf.ActNorm((4,)), rf.ActNorm((2,))], (4,))
    assert rf.Flow(of_vectors).part_shapes == ((2,), (2,))
    assert flow(rf.ActNorm((4,)), of_vectors, rf.ActNorm((4,))).part_shapes == ((2,), (2,))
    assert rf.Flow(rf.Chain([]), rf.StandardNormal((2,))).part_shapes == ((2,),)
    assert rf.Flow(rf.Invert(rf.Flatten((2, 3)))).part_shapes == ((2, 3),)


def test_features_of_a_condition():
    flow = make_flow((2,))
    x, c = jnp.ones((4, 3)), jnp.arange(8.0).reshape(4, 2)
    (part,) = jax.jit(lambda x, c: flow.features(x, c))(x, c)
    np.testing.assert_allclose(part, flow(x, c), rtol=1e-12)
    with pytest.raises(ValueError, match="condition: expected"):
        flow.features(x)


def test_errors():
    flow = nnx.eval_shape(lambda: rf.ResidualFlow(image_config(), rngs=nnx.Rngs(0)))
    part = jnp.zeros((3, 2, 2, 2))
    with pytest.raises(ValueError, match=r"z: expected a float array \[B, 16\], got shape"):
        flow.split_latent(jnp.zeros((3, 15)))
    with pytest.raises(ValueError, match=r"parts: expected 2, of the shapes \(\(2, 2, 2\), \(2, 2, 2\)\), got 1"):
        flow.join_latent([part])
    with pytest.raises(ValueError, match=r"parts\[1\]: expected a float array \[B, 2, 2, 2\]"):
        flow.join_latent([part, part[0]])
    with pytest.raises(ValueError, match=r"parts: expected the same number of examples in all, got \[2, 3\]"):
        flow.join_latent([part, part[:2]])
