"""Every public call of the library, with tiny flows; each has to work in every mode of JAX.

A call takes nothing and returns arrays; those that change a flow work on a copy.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.estimators import Exact, Roulette, Truncated
from resflow_jax.interop.torch.flow import TorchFlow, TorchImageConfig
from resflow_jax.training.evaluation import vector_log_prob
from resflow_jax.training.losses import dequantized_bits_per_dim, negative_log_likelihood

KEY = jax.random.key(3)
X = np.random.default_rng(0).normal(size=(4, 3))
IMAGES = np.random.default_rng(1).integers(0, 4, (4, 2, 2, 1)).astype(np.uint8)
PIXELS = (IMAGES + 0.5) / 4

VECTORS = {
    "plain": {"hidden": (3,)},  # one width throughout: the fewest shapes of eager operations
    "all layers": {
        "between": rf.BetweenBlocks(batchnorm=True, centering="layers", invertible_linear=True),
        "activation": "leakylipswish",
        "data": rf.VectorTransform((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), rf.Padding(1, "gaussian")),
    },
    "mixed norms": {
        "norms": rf.Norms("f1f"),
        "activation": "maxmin",
        "preactivation": "none",
        "between": rf.BetweenBlocks(centering="blocks"),
    },
    "learned norms": {"norms": rf.Norms(learned=True), "activation": "fullsort", "preactivation": "none"},
    "bfloat16": {"matmul_dtype": "bfloat16"},
    "DenseNet": {"densenet": rf.DenseNetBlocks(2, 4), "activation": "clipswish"},
}
ESTIMATORS = {
    "Exact": Exact(),
    "Truncated": Truncated(3, probes=2),
    "Truncated, autodiff": Truncated(3, gradient="autodiff"),
    "Roulette": Roulette(),
    "Roulette of the papers": Roulette(rf.Geometric(0.1), exact_terms=2, minres_steps=0, probe="gaussian"),
    "Roulette, autodiff": Roulette(rf.Geometric(0.5), gradient="autodiff", minres_steps=2),
    "Roulette, orthogonal": Roulette(rf.Defensive(), samples=2, probe="orthogonal", probes=2),
    "Roulette, Poisson": Roulette(rf.Poisson(2.0), exact_terms=1, subsample=2, probe="hadamard", trace_probes=2),
    "Roulette, fitted": Roulette(rf.Fitted(np.array([1.0, 0.5, 0.25]))),
}
SOLVERS = {"Anderson": rf.Anderson(), "FixedPoint": rf.FixedPoint(), "Broyden": rf.Broyden()}


@cache
def vectors(name="plain"):
    """(graphdef, state) of a flow on vectors."""
    config = rf.VectorFlowConfig(**{"dim": 3, "blocks": 2, "hidden": (4,), "coefficient": 0.5, **VECTORS[name]})
    return nnx.split(rf.ResidualFlow(config, rngs=nnx.Rngs(0)))


@cache
def images():
    """(graphdef, state) of a flow on images, with all that those of vectors have not."""
    config = TorchImageConfig(
        (2, 2, 1),
        blocks=(1, 1),
        hidden_channels=2,
        coefficient=0.5,
        between=rf.BetweenBlocks(feature_actnorm=True),
        tail=rf.DenseTail(1, hidden=2),
        scales=rf.Scales(factor_out=True),
        classes=2,
        classifier_channels=2,
    )
    return nnx.split(TorchFlow(config, rngs=nnx.Rngs(0)))


@cache
def single_block():
    """(graphdef, state) of a flow on images with a block alone."""
    config = rf.ImageFlowConfig((2, 2, 1), blocks=(1,), hidden_channels=2, coefficient=0.5, tail=rf.DenseTail(0))
    return nnx.split(rf.ResidualFlow(config, rngs=nnx.Rngs(0)))


# Flows are given as functions that make them: this module is imported where none of its calls runs, too.
def of_flow(make, method, *args, **kwargs):
    """A call of a method of a copy of a flow, and the variables of that copy after the call."""

    def call():
        flow = nnx.merge(*make(), copy=True)
        return getattr(flow, method)(*args, **kwargs), nnx.state(flow)

    return call


def gradient(make, method, *args, **kwargs):
    """The gradient of the sum of a method's first output in the parameters of a flow."""

    def call():
        graphdef, params, rest = nnx.split(nnx.merge(*make(), copy=True), nnx.Param, ...)

        def total(params):
            out = getattr(nnx.merge(graphdef, params, rest, copy=True), method)(*args, **kwargs)
            return jnp.sum(jax.tree.leaves(out)[0])

        return jax.grad(total)(params)

    return call


def training(make, loss, batch, accumulate, optimizer=optax.sgd):
    """A step of training, and what follows it."""

    def call():
        flow = nnx.merge(*make(), copy=True)
        steps = optax.chain(optax.clip_by_global_norm(1.0), optimizer(optax.linear_schedule(0.0, 1e-3, 5)))
        trainer = rf.training.Trainer(nnx.graphdef(flow), loss, steps, 0.9, accumulate)
        state = trainer.create_state(flow, Roulette(exact_terms=1))  # few terms: some modes run without compilation
        state, metrics = trainer.step(state, batch if accumulate == 1 else np.stack([batch] * accumulate), KEY)
        state = rf.training.fit_estimator(state, len(X))
        return metrics, nnx.state(trainer.averaged_flow(state))

    return call


class PowerLaw:
    """A law of lengths as a user writes it: P(N >= k) = 1 / k^2."""

    def sample(self, key, shape):
        return jnp.floor(jax.random.uniform(key, shape, minval=1e-6) ** -0.5).astype(jnp.int32)

    def survival(self, k):
        return k.astype(float) ** -2.0

    def tail_ratio(self):
        return 1.0


class FirstTerm:
    """An estimator as a user writes it: tr(J)."""

    def estimate(self, g, x, key):
        v = jax.random.rademacher(key, x.shape, x.dtype)
        g_x, product = jax.jvp(g, (x,), (v,))
        return x + g_x, jnp.sum(v * product, axis=1)


def of_functions():
    """Calls of functions that take no flow."""
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3)) / 5)
    dense, conv = rf.DenseMap(3, 3), rf.ConvMap((2, 2), 1, 2)
    taps = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3, 1, 2)))

    def g(kernel, x):
        return jnp.tanh(x @ kernel)

    def total(estimator, kernel, x):
        y, log_det = rf.residual(g, kernel, x, key=KEY, estimator=estimator, chunk_size=2)
        return jnp.sum(y) + jnp.sum(log_det)

    def inverted(solver, kernel, y):
        return jnp.sum(rf.residual_inverse(g, kernel, y, solver=solver))

    def both_ways(estimator, kernel, x):
        solver = SOLVERS["FixedPoint"]
        y, log_det = rf.monotone(g, kernel, x, key=KEY, estimator=estimator, solver=solver)
        return jnp.sum(rf.monotone_inverse(g, kernel, 2 * y, solver=solver)) + jnp.sum(log_det)

    found = {}
    for name in ("Exact", "Roulette", "Roulette, autodiff"):
        found[f"monotone, {name}"] = lambda e=ESTIMATORS[name]: jax.grad(both_ways, (1, 2))(e, kernel, jnp.asarray(X))
    for name, estimator in ESTIMATORS.items():
        found[f"residual, {name}"] = lambda e=estimator: jax.grad(total, (1, 2))(e, kernel, jnp.asarray(X))
    for name, solver in SOLVERS.items():
        found[f"residual_inverse, {name}"] = lambda s=solver: jax.grad(inverted, (1, 2))(s, kernel, jnp.asarray(X))
    condition = {"shift": jnp.asarray(X), "scale": jnp.linspace(0.5, 1.0, len(X))}
    pair = jnp.asarray(X[:, :2]), jnp.asarray(X[:, 2])

    def conditional(kernel, x, condition):
        return condition["scale"][:, None] * jnp.tanh(x @ kernel + condition["shift"])

    def of_pair(kernel, x):
        out = jnp.tanh(jnp.concatenate([x[0], x[1][:, None]], axis=1) @ kernel)
        return out[:, :2], out[:, 2]

    def with_condition(kernel, x, condition):
        y, log_det = rf.residual(conditional, kernel, x, condition=condition, key=KEY, chunk_size=2)
        return jnp.sum(rf.residual_inverse(conditional, kernel, 2 * y, condition=condition)) + jnp.sum(log_det)

    def with_pair(kernel, x):
        y, log_det = rf.residual(of_pair, kernel, x, key=KEY, estimator=Roulette(PowerLaw()))
        return jnp.sum(rf.residual_inverse(of_pair, kernel, y)[0]) + jnp.sum(log_det)

    found["residual, condition"] = lambda: jax.grad(with_condition, (0, 1, 2))(kernel, jnp.asarray(X), condition)
    found["residual, pair and own law"] = lambda: jax.grad(with_pair, (0, 1))(kernel, pair)
    found["residual, own estimator"] = lambda: jax.grad(total, (1, 2))(FirstTerm(), kernel, jnp.asarray(X))
    found["check_contraction"] = lambda: rf.check_contraction(g, kernel, jnp.asarray(X), KEY)
    for name, activation in rf.ACTIVATIONS.items():
        params = {parameter: jnp.asarray(value) for parameter, value in activation.initial}
        second = jax.hessian(lambda x, a=activation, p=params: jnp.sum(jnp.square(a(p, x))))
        found[f"activation {name}"] = lambda f=second: f(jnp.asarray([[0.3, -0.7]]))
    for domain, codomain in ((2.0, 2.0), (1.0, 2.0), (2.0, np.inf), (1.5, 3.0), (np.inf, 1.0)):
        orders = {"domain": domain, "codomain": codomain}
        matvec, rmatvec = (lambda v: dense.matvec(kernel, v)), (lambda u: dense.rmatvec(kernel, u))
        found[f"best_start {domain} {codomain}"] = lambda o=orders, m=matvec, r=rmatvec: rf.best_start(
            m, jnp.asarray(X), rmatvec=r, **o
        )
        found[f"induced_norm_bound {domain} {codomain}"] = lambda o=orders: rf.induced_norm_bound(conv, taps, **o)
    found["power_iteration"] = lambda: rf.power_iteration(lambda v: conv.matvec(taps, v), jnp.ones((2, 2, 1)))
    found["power_iteration, rmatvec"] = lambda: rf.power_iteration(
        lambda v: conv.matvec(taps, v), jnp.ones((2, 2, 1)), rmatvec=lambda u: conv.rmatvec(taps, u)
    )
    found["gram_iteration_bound"] = lambda: jax.grad(lambda taps: rf.gram_iteration_bound(conv, taps))(taps)
    found["fit_lengths"] = lambda: rf.fit_lengths(jnp.asarray([[0.5, 0.2, 0.3]]), batch_size=8).table
    return found


def of_flows():
    """Calls of the methods of flows."""
    found = {}
    z = np.random.default_rng(4).normal(size=(4, 3))
    for name in ("Exact", "Truncated, autodiff", "Roulette, fitted"):  # all of them are among the calls of functions
        options = {"key": KEY, "estimator": ESTIMATORS[name], "return_diagnostics": True}
        found[f"log_prob, {name}"] = gradient(vectors, "log_prob", X, **options)
    for name, solver in SOLVERS.items():
        found[f"inverse, {name}"] = of_flow(vectors, "inverse", z, solver=solver, return_status=True)
    for name, settings in VECTORS.items():
        flow, padding = partial(vectors, name), settings.get("data", rf.VectorTransform()).padding
        wide = np.pad(z, ((0, 0), (0, padding.channels)))
        found[f"new flow, {name}"] = lambda name=name: vectors.__wrapped__(name)[1]
        # The gradient of a roulette takes long to compile, so that only two flows have it here.
        options = {} if name in ("plain", "all layers") else {"estimator": ESTIMATORS["Truncated"]}
        found[f"log_prob, {name}"] = gradient(flow, "log_prob", X, key=KEY, **options)
        found[f"inverse, {name}"] = of_flow(flow, "inverse", wide, return_status=True)
        if name != "bfloat16":  # the rest multiplies no matrices in 16 bits
            found[f"initialize, {name}"] = of_flow(flow, "initialize", X)
            found[f"update_norms, {name}"] = of_flow(flow, "update_norms")
        if name not in ("bfloat16", "DenseNet"):
            found[f"tighten, {name}"] = of_flow(flow, "tighten")
        if name in ("plain", "learned norms"):  # fixed orders have no loss
            found[f"order_loss, {name}"] = gradient(flow, "order_loss")
    for method in ("converge_norms", "norm_orders"):
        found[method] = of_flow(vectors, method)
    found["__call__"] = of_flow(vectors, "__call__", X)
    found["certify"] = lambda: rf.certify(nnx.merge(*vectors())).bounds
    found["update_statistics"] = of_flow(partial(vectors, "all layers"), "update_statistics", X)
    found["inverse, gradient"] = gradient(vectors, "inverse", z)
    loss = negative_log_likelihood(optax.linear_schedule(0.0, 1.0, 9))
    found["train"] = training(vectors, loss, X, 2)
    found["train, learned norms"] = training(partial(vectors, "learned norms"), loss, X, 1, optax.adamw)
    found["sample"] = of_flow(vectors, "sample", KEY, 2)
    found["sample_and_log_prob"] = gradient(vectors, "sample_and_log_prob", KEY, 2)
    found["inverse_and_log_prob"] = of_flow(vectors, "inverse_and_log_prob", z, key=KEY, return_status=True)
    found["features"] = of_flow(vectors, "features", X)
    found["forward_and_log_prob"] = gradient(vectors, "forward_and_log_prob", X, key=KEY)
    found["anomaly_score"] = lambda: _anomaly(nnx.merge(*vectors()))
    found["vector_log_prob"] = lambda: vector_log_prob(nnx.merge(*vectors()), X, KEY, batch_size=3)

    found["images, log_prob"] = gradient(images, "log_prob", PIXELS, key=KEY)
    found["images, sample"] = of_flow(images, "sample", KEY, 2)
    found["images, initialize"] = of_flow(images, "initialize", PIXELS)
    found["images, logits"] = gradient(images, "logits", PIXELS)
    found["images, features"] = of_flow(images, "features", PIXELS)
    options = {"key": KEY, "return_logits": True}
    found["images, forward_and_log_prob"] = of_flow(images, "forward_and_log_prob", PIXELS, **options)
    found["images, train"] = training(single_block, dequantized_bits_per_dim(4), IMAGES, 1)
    found["evaluate_bits_per_dim"] = lambda: rf.evaluate_bits_per_dim(
        nnx.merge(*images()), IMAGES, KEY, levels=4, draws=2, batch_size=3
    )
    found["stateless"] = _stateless
    return found


def _stateless():
    stateless = rf.interop.stateless.stateless(nnx.merge(*vectors()).config)
    return stateless.apply(stateless.init(KEY, X), "log_prob", X, key=KEY)


def _anomaly(flow):
    """All calls that judge examples by those that a flow knows."""
    typicality = rf.Typicality.fit(flow, X, X[:3], key=KEY, batch_size=2)
    found = rf.anomaly_score(flow, X, typicality, key=KEY)
    return typicality, found, typicality.group_p_value(found.log_prob, KEY, resamples=5)


CALLS = {**of_functions(), **of_flows()}
