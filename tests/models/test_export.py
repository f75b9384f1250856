"""`jax.export` of log_prob, inverse and sample: written, read and called again; any batch size; other platforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import resflow_jax as rf

CONFIGS = {
    "vectors": rf.VectorFlowConfig(dim=2, blocks=2, hidden=(8,)),
    "images": rf.ImageFlowConfig(shape=(4, 4, 1), blocks=(1, 1), hidden_channels=4, tail=rf.DenseTail(0)),
}
KEY = jax.random.key(1)


def calls(flow):
    """Functions of a batch by name; the flow's arrays are constants of them."""
    return {
        "log_prob": lambda x: flow.log_prob(x, key=KEY),
        "exact log_prob": lambda x: flow.log_prob(x, estimator=rf.Exact()),
        "inverse": lambda x: flow.inverse(x.reshape(x.shape[0], flow.dim), return_status=True),
        "sample": lambda x: flow.sample(KEY, 3),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_written_and_read(name):
    """What is read from the bytes gives what the jitted function gives; it serves tpu and cuda as well."""
    flow = rf.ResidualFlow(CONFIGS[name], rngs=nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(0), (3, *flow.event_shape))
    for function in calls(flow).values():
        program = export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(x)
        assert "callback" not in program.mlir_module()
        found, expected = export.deserialize(program.serialize()).call(x), jax.jit(function)(x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


def test_any_batch_size_of_a_spline():
    """The layer alone, with log-det and inverse."""
    layer, x = rf.Spline((2,)), jnp.linspace(-2.0, 2.0, 6).reshape(3, 2)
    layer.theta[...] += jnp.linspace(-1.0, 1.0, layer.theta.size).reshape(layer.theta.shape)
    (batch,) = export.symbolic_shape("batch")

    def round_trip(x):
        y, log_det = layer.forward(x)
        return layer.inverse(y), log_det

    program = export.export(jax.jit(round_trip))(jax.ShapeDtypeStruct((batch, 2), jnp.float64))
    for found, expected in zip(program.call(x), (x, layer.forward(x)[1]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "estimator", [None, rf.Roulette(subsample=4, probe="hadamard", trace_probes=2)], ids=["default", "hadamard"]
)
def test_any_batch_size(estimator):
    """One program of variables and of a batch whose size is left open."""
    model = rf.interop.stateless.stateless(CONFIGS["vectors"])
    variables = model.init(jax.random.key(0))
    (batch,) = export.symbolic_shape("batch")

    def log_prob_of(variables, x):
        return model.apply(variables, "log_prob", x, key=KEY, estimator=estimator)

    def round_trip(variables, x):
        z = model.apply(variables, "__call__", x)
        return model.apply(variables, "inverse", z), log_prob_of(variables, x)

    like = jax.ShapeDtypeStruct((batch, 2), jnp.float64)
    program = export.deserialize(export.export(jax.jit(round_trip))(variables, like).serialize())
    for number in (1, 5):
        x = jax.random.normal(jax.random.key(2), (number, 2))
        again, log_prob = program.call(variables, x)
        np.testing.assert_allclose(again, x, atol=1e-9)
        np.testing.assert_allclose(log_prob, log_prob_of(variables, x), rtol=1e-10)
