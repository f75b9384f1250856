"""Calls that a public docstring says to fail, with the message.

They compile nothing, or next to nothing: flows are made without norms.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import resflow_jax as rf
from resflow_jax.interop import bases, distrax, flowjax, numpyro, sampling, stateless
from resflow_jax.training import make_mesh
from tests.modes.calls import IMAGES, KEY, PIXELS, X, images
from tests.modes.documented_layers import LAYERS, RNGS, C, conditional, norm, on_vectors, padded, unlikely

TABLE = np.array([[1.0, 0.5], [1.0, 0.4]])
DENSE, KERNEL = rf.DenseMap(3, 2), np.ones((3, 2))


def on_images():
    return nnx.merge(*images())


def half(params, x):
    return 0.5 * x


def typicality():
    return rf.Typicality.from_log_probs(jnp.arange(3.0), dim=3)


# name of what has the docstring: {the message: a call}
ROWS = {
    **LAYERS,
    "rf.ConvMap": {
        "channels_in: expected": lambda: rf.ConvMap((2, 2), 0, 1),
        "kernel_size: expected": lambda: rf.ConvMap((2, 2), 1, 1, 2),
        "padding: expected": lambda: rf.ConvMap((2, 2), 1, 1, padding="same"),
        "x: expected": lambda: rf.ConvMap((2, 2), 1, 1)(np.ones((3, 3, 1, 1)), np.ones((1, 2, 3, 1))),
    },
    "rf.DenseMap": {
        "features_in: expected": lambda: rf.DenseMap(0, 2),
        "matmul_dtype: expected": lambda: rf.DenseMap(3, 2, "float16"),
        "x: expected": lambda: DENSE(KERNEL, X[:, :2]),
    },
    "rf.Defensive": {"p: expected": lambda: rf.Defensive(p=1.0), "share: expected": lambda: rf.Defensive(share=0.0)},
    "rf.Estimate.from_scores": {"scores: expected": lambda: rf.Estimate.from_scores(np.zeros(3))},
    "rf.Exact": {"chunk_size: expected": lambda: rf.Exact(0)},
    "rf.Fitted": {"lipschitz: expected": lambda: rf.Fitted(TABLE[0], 1.0)},
    "rf.Fitted.within": {"table: expected": lambda: rf.Fitted(TABLE).within(0.5)},
    "rf.Flow": {
        "bijector: expected events": lambda: rf.Flow(norm(), rf.StandardNormal((2,))),
        "condition": lambda: rf.Flow(
            rf.Affine((3,), condition_dim=2, rngs=RNGS), rf.DiagonalNormal((3,), condition_dim=1, rngs=RNGS)
        ),
    },
    "rf.Flow.forward": {
        r"x: expected .*got shape \(4, 2\)": lambda: on_vectors().forward(X[:, :2], key=KEY),
        r"x: expected .*got shape \(3,\)": lambda: on_vectors().forward(X[0], key=KEY),
        "x: expected a float array .*int": lambda: on_vectors().forward(X.astype(int), key=KEY),
        "condition: expected None": lambda: on_vectors().forward(X, condition=C, key=KEY),
        "condition: expected floats": lambda: conditional().forward(X),
        "key: Roulette expected": lambda: on_vectors().forward(X),
        "x: expected finite values": lambda: on_vectors().forward(X * np.nan, key=KEY),
        r"x: expected values in \[0, 1\]": lambda: on_images().forward(PIXELS + 1, key=KEY),
    },
    "rf.Flow.features": {
        "x: expected": lambda: on_vectors().features(X[:, :2]),
        "condition: expected None": lambda: on_vectors().features(X, C),
    },
    "rf.Flow.split_latent": {
        "z: expected .*got shape": lambda: on_vectors().split_latent(X[:, :2]),
        "z: expected a float array": lambda: on_vectors().split_latent(X.astype(int)),
    },
    "rf.Flow.join_latent": {
        "parts: expected 1": lambda: on_vectors().join_latent([X, X]),
        r"parts\[0\]: expected .*got shape": lambda: on_vectors().join_latent([X[:, :2]]),
        r"parts\[0\]: expected a float array": lambda: on_vectors().join_latent([X.astype(int)]),
    },
    "rf.Flow.inverse": {
        "z: expected .*got shape": lambda: on_vectors().inverse(X[:, :2]),
        "z: expected a float array": lambda: on_vectors().inverse(X.astype(int)),
        "z: expected finite values": lambda: on_vectors().inverse(X * np.nan),
        "solver: expected": lambda: on_vectors().inverse(X, solver="anderson"),
    },
    "rf.Geometric": {"p: expected": lambda: rf.Geometric(1.0)},
    "rf.Poisson": {"rate: expected": lambda: rf.Poisson(np.inf)},
    "rf.Roulette": {
        "length: expected": lambda: rf.Roulette(3),
        "samples: expected": lambda: rf.Roulette(samples=0),
        "probe: expected": lambda: rf.Roulette(probe="x"),
        "gradient: expected": lambda: rf.Roulette(gradient="x"),
    },
    "rf.Truncated": {
        "terms: expected": lambda: rf.Truncated(0),
        "probe: expected": lambda: rf.Truncated(probe="x"),
        "gradient: expected": lambda: rf.Truncated(gradient="x"),
    },
    "rf.Solver": {
        "tolerance: expected": lambda: rf.FixedPoint(tolerance=0.0),
        "max_iterations: expected": lambda: rf.FixedPoint(max_iterations=0),
        "on_failure: expected": lambda: rf.FixedPoint(on_failure="x"),
    },
    "rf.Anderson": {
        "memory: expected": lambda: rf.Anderson(memory=0),
        "tolerance: expected": lambda: rf.Anderson(tolerance=0),
    },
    "rf.Broyden": {
        "memory: expected": lambda: rf.Broyden(memory=0),
        "tolerance: expected": lambda: rf.Broyden(tolerance=0),
    },
    "rf.ResidualFlow": {
        "config: expected": lambda: rf.ResidualFlow({}, rngs=RNGS),
        "rngs: expected": lambda: rf.ResidualFlow(rf.VectorFlowConfig(3), rngs=nnx.Rngs(dropout=0)),
    },
    "rf.Typicality.from_log_probs": {
        "log_prob: expected floats": lambda: rf.Typicality.from_log_probs(jnp.zeros(1), dim=2),
        "log_prob: expected finite": lambda: rf.Typicality.from_log_probs(jnp.asarray([0, jnp.nan]), dim=2),
    },
    "rf.Typicality.score": {
        "unit: expected": lambda: typicality().score(jnp.zeros(2), unit="x"),
        "log_prob: expected": lambda: typicality().score(jnp.arange(2)),
    },
    "rf.Typicality.group_p_value": {
        "log_prob: expected": lambda: typicality().group_p_value(jnp.zeros(()), KEY),
        "resamples: expected": lambda: typicality().group_p_value(jnp.zeros(2), KEY, resamples=0),
    },
    "rf.anomaly_score": {
        "x: expected": lambda: rf.anomaly_score(on_vectors(), X[:, :2], typicality(), key=KEY),
        "typicality: expected": lambda: rf.anomaly_score(on_vectors(), X, None, key=KEY),
    },
    "rf.best_start": {
        "starts: expected": lambda: rf.best_start(half, np.ones((0, 3))),
        "tolerance: expected": lambda: rf.best_start(lambda v: 2 * v, np.ones((2, 3)), tolerance=0.0),
    },
    "rf.power_iteration": {
        "tolerance: expected": lambda: rf.power_iteration(lambda v: 2 * v, np.ones(3), tolerance=0.0),
        "max_iterations: expected": lambda: rf.power_iteration(lambda v: 2 * v, np.ones(3), max_iterations=0),
        "domain: expected": lambda: rf.power_iteration(lambda v: 2 * v, np.ones(3), domain=0.5),
        "matvec: expected": lambda: rf.power_iteration(lambda v: v**2, np.ones(3)),
    },
    "rf.spectral_norm": {
        "u: expected the shape": lambda: rf.spectral_norm(lambda v: v[:2], np.ones(3), np.ones(3)),
        "v: expected": lambda: rf.spectral_norm(lambda v: v, np.ones(3), [1.0]),
    },
    "rf.evaluate_bits_per_dim": {
        "images: expected integer": lambda: rf.evaluate_bits_per_dim(on_images(), IMAGES / 4, KEY, levels=4),
        "images: expected pixels": lambda: rf.evaluate_bits_per_dim(on_images(), IMAGES, KEY, levels=2),
        "images: expected": lambda: rf.evaluate_bits_per_dim(on_images(), IMAGES[:0], KEY, levels=4),
        "draws: expected": lambda: rf.evaluate_bits_per_dim(on_images(), IMAGES, KEY, levels=4, draws=0),
    },
    "rf.fit": {
        "x: expected": lambda: rf.fit(on_vectors(), "x"),
        "steps: expected": lambda: rf.fit(on_vectors(), X, steps=0),
    },
    "rf.fit_lengths": {
        "term_norms: expected": lambda: rf.fit_lengths(np.ones((2, 2, 2))),
        "batch_size: expected": lambda: rf.fit_lengths(np.ones(3), batch_size=0),
        "fixed_cost: expected": lambda: rf.fit_lengths(np.ones(3), fixed_cost=0.0),
        "share: expected": lambda: rf.fit_lengths(np.ones(3), share=1.0),
    },
    "rf.gram_iteration_bound": {
        "kernel: expected .*3, 2": lambda: rf.gram_iteration_bound(DENSE, KERNEL.T),
        "kernel: expected .*int": lambda: rf.gram_iteration_bound(DENSE, KERNEL.astype(int)),
        "iterations: expected": lambda: rf.gram_iteration_bound(DENSE, KERNEL, iterations=-1),
    },
    "rf.induced_norm_bound": {
        "domain: expected": lambda: rf.induced_norm_bound(DENSE, KERNEL, 0.5, 2.0),
        "codomain: expected": lambda: rf.induced_norm_bound(DENSE, KERNEL, 2.0, np.nan),
        "kernel: expected": lambda: rf.induced_norm_bound(DENSE, KERNEL * np.inf, 2.0, 2.0),
    },
    "rf.spectral_norm_bound": {
        "kernel: expected .*3, 2": lambda: rf.spectral_norm_bound(DENSE, KERNEL.T),
        "kernel: expected .*int": lambda: rf.spectral_norm_bound(DENSE, KERNEL.astype(int)),
        "kernel: expected finite": lambda: rf.spectral_norm_bound(DENSE, KERNEL * np.nan),
    },
    "rf.residual": {
        "x: expected": lambda: rf.residual(half, None, X.astype(int), key=KEY),
        "g: expected": lambda: rf.residual(lambda p, x: x[:, :1], None, X, key=KEY),
        "key: Roulette expected": lambda: rf.residual(half, None, X),
        "estimator: expected": lambda: rf.residual(half, None, X, key=KEY, estimator="exact"),
        "probes: expected at most 3": lambda: rf.residual(
            half, None, X, key=KEY, estimator=rf.Roulette(probe="orthogonal", probes=4)
        ),
        "condition: expected": lambda: rf.residual(
            lambda p, x, c: 0.5 * x, None, X, key=KEY, condition=np.ones((3, 1))
        ),
        "g: expected a function": lambda: rf.residual(half, None, X, key=KEY, condition=X),
    },
    "rf.residual_inverse": {
        "y: expected": lambda: rf.residual_inverse(half, None, X.astype(int)),
        "g: expected": lambda: rf.residual_inverse(lambda p, x: x[:, :1], None, X),
        "solver: expected": lambda: rf.residual_inverse(half, None, X, solver="anderson"),
        "condition: expected": lambda: rf.residual_inverse(lambda p, x, c: 0.5 * x, None, X, condition=np.ones((3, 1))),
        "g: expected a function": lambda: rf.residual_inverse(half, None, X, condition=X),
    },
    "rf.monotone": {
        "x: expected": lambda: rf.monotone(half, None, X.astype(int), key=KEY),
        "g: expected": lambda: rf.monotone(lambda p, x: x[:, :1], None, X, key=KEY),
        "key: Roulette expected": lambda: rf.monotone(half, None, X),
        "solver: expected": lambda: rf.monotone(half, None, X, key=KEY, solver="anderson"),
        "estimator: expected": lambda: rf.monotone(half, None, X, key=KEY, estimator="exact"),
        "condition: expected": lambda: rf.monotone(
            lambda p, x, c: 0.5 * x, None, X, key=KEY, condition=np.ones((3, 1))
        ),
    },
    "rf.monotone_inverse": {
        "y: expected": lambda: rf.monotone_inverse(half, None, X.astype(int)),
        "g: expected": lambda: rf.monotone_inverse(lambda p, x: x[:, :1], None, X),
        "solver: expected": lambda: rf.monotone_inverse(half, None, X, solver="anderson"),
        "g: expected a function": lambda: rf.monotone_inverse(half, None, X, condition=X),
    },
    "rf.save": {"flow: expected Flow": lambda: rf.save("never-written", norm())},
    "training.make_mesh": {"mesh: expected sizes whose product is": lambda: make_mesh(data=jax.device_count() + 1)},
    "interop.bases.distrax_base": {"distribution: expected": lambda: bases.distrax_base(3)},
    "interop.bases.numpyro_base": {"distribution: expected": lambda: bases.numpyro_base(3)},
    "interop.distrax.bijector": {
        "flow: expected a flow without padding": lambda: distrax.bijector(padded(), KEY),
        "estimator: expected": lambda: distrax.bijector(on_vectors(), KEY, estimator="exact"),
        "key: Roulette expected": lambda: distrax.bijector(on_vectors()),
        "condition: expected floats": lambda: distrax.bijector(conditional(), KEY),
        "condition: expected None": lambda: distrax.bijector(on_vectors(), KEY, condition=C),
    },
    "interop.flowjax.FlowBijection": {
        "flow: expected a flow without padding": lambda: flowjax.FlowBijection(padded()),
        "estimator: expected": lambda: flowjax.FlowBijection(on_vectors(), estimator="exact"),
        "key: Roulette expected": lambda: flowjax.FlowBijection(on_vectors(), estimator=rf.Roulette()),
    },
    "interop.numpyro.FlowTransform": {
        "flow: expected a flow without padding": lambda: numpyro.FlowTransform(padded(), KEY),
        "estimator: expected": lambda: numpyro.FlowTransform(on_vectors(), KEY, estimator="exact"),
        "key: Roulette expected": lambda: numpyro.FlowTransform(on_vectors()),
        "condition: expected floats": lambda: numpyro.FlowTransform(conditional(), KEY),
        "condition: expected None": lambda: numpyro.FlowTransform(on_vectors(), KEY, condition=C),
    },
    "interop.numpyro.flow_module": {
        "max_iterations: expected": lambda: numpyro.flow_module("flow", on_vectors(), max_iterations=0)
    },
    "interop.sampling.SamplingMap.of": {
        "flow: expected Flow": lambda: sampling.SamplingMap.of(3, KEY, None, rf.Anderson()),
        "flow: expected a flow without padding": lambda: sampling.SamplingMap.of(padded(), KEY, None, rf.Anderson()),
        "flow: expected a flow with a density": lambda: sampling.SamplingMap.of(unlikely(), KEY, None, rf.Anderson()),
        "estimator: expected": lambda: sampling.SamplingMap.of(on_vectors(), KEY, "exact", rf.Anderson()),
        "key: Roulette expected": lambda: sampling.SamplingMap.of(on_vectors(), None, None, rf.Anderson()),
        "condition: expected None": lambda: sampling.SamplingMap.of(on_vectors(), KEY, None, rf.Anderson(), C),
        "condition: expected floats .*None": lambda: sampling.SamplingMap.of(conditional(), KEY, None, rf.Anderson()),
        r"condition: expected floats .*\(3,\)": lambda: sampling.SamplingMap.of(
            conditional(), KEY, None, rf.Anderson(), np.ones(3)
        ),
    },
    "interop.stateless.stateless": {"source: expected": lambda: stateless.stateless(3)},
    "interop.stateless.Stateless.apply": {
        "method: expected": lambda: stateless.stateless(rf.VectorFlowConfig(3)).apply({}, "fly", X),
        "variables: expected": lambda: stateless.stateless(rf.VectorFlowConfig(3)).apply({}, "forward", X),
    },
    "interop.stateless.Stateless.bind": {
        "variables: expected": lambda: stateless.stateless(rf.VectorFlowConfig(3)).bind({})
    },
    "interop.torch.flow.TorchFlow.forward_and_log_prob": {
        "x: expected": lambda: on_images().forward_and_log_prob(X, key=KEY)
    },
    "interop.flowjax.contractive": {
        r"coefficient: expected a number in \(0, 1\)": lambda: flowjax.contractive(None, coefficient=1.0)
    },
    "interop.stateless.Stateless.init": {
        "key: expected": lambda: stateless.stateless(rf.VectorFlowConfig(3)).init(0),
    },
    "interop.torch.flow.TorchFlow.logits": {"x: expected": lambda: on_images().logits(X)},
}
