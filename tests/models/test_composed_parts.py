"""Conditional and bounded parts in one flow, in every mode of JAX; each keeps the arguments that it was made of."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf

LOW, HIGH = [0.0, -1.0, -np.inf], [np.inf, 2.0, np.inf]
X = jnp.asarray([[0.5, 1.0, -3.0], [2.0, -1.0, 0.2], [1e-3, 2.0, 0.0]])
C = jnp.asarray([[0.0, 1.0], [1.0, 0.0], [0.3, 0.7]])


def make(base="mixture"):
    rngs = nnx.Rngs(0)

    def step(rngs):
        g = rf.LipschitzMLP(3, (4,), condition_dim=2, rngs=rngs)
        return rf.Chain([rf.ResidualBlock(g), rf.Permutation([1, 2, 0]), rf.Affine((3,), condition_dim=2, rngs=rngs)])

    bases = {
        "mixture": lambda: rf.MixtureOfNormals(2, (3,), class_conditional=True, rngs=rngs),
        "normal": lambda: rf.DiagonalNormal((3,), condition_dim=2, rngs=rngs),
    }
    table = rf.Bounded(LOW, HIGH, alpha=0.01)
    flow = rf.Flow(rf.Chain([table, rf.ActNorm((3,)), rf.ResidualStack(step, 2, rngs=rngs)]), bases[base]())
    params = nnx.state(flow, nnx.Param)
    flow.initialize(X, C)
    change = lambda p: jnp.asarray(p + 0.1 * np.sin(np.arange(1.0, p.size + 1.0)).reshape(p.shape))  # noqa: E731
    nnx.update(flow, jax.tree.map(lambda p: change(np.asarray(p)), params))
    flow.converge_norms()
    return flow


@pytest.fixture(scope="module", params=["mixture", "normal"])
def flow(request):
    return make(request.param)


def test_density_and_inverse(flow):
    """By the dense Jacobian and the base; x comes back."""
    z = flow(X, C)
    jacobians = jax.jit(jax.vmap(jax.jacfwd(lambda x, c: flow(x[None], c[None])[0])))(X, C)
    expected = flow.base_log_prob(z, C) + np.linalg.slogdet(jacobians)[1]
    np.testing.assert_allclose(flow.log_prob(X, condition=C, estimator=rf.Exact()), expected, rtol=1e-9)
    np.testing.assert_allclose(flow.inverse(z, condition=C), X, atol=1e-7)


@pytest.mark.parametrize("flow", ["mixture"], indirect=True, scope="module")
def test_modes(flow):
    """Leaks and NaNs are checked; without jit, under vmap and scan, and for one condition, the values are the same."""
    graphdef, state = nnx.split(flow)

    def log_prob(x, c):
        return nnx.merge(graphdef, state).log_prob(x, condition=c, estimator=rf.Exact())

    expected = log_prob(X, C)
    with jax.checking_leaks(), jax.debug_nans(True):
        value, gradient = jax.value_and_grad(lambda x, c: log_prob(x, c).sum(), argnums=(0, 1))(X, C)
        np.testing.assert_allclose(value, expected.sum(), rtol=1e-12)
        assert all(jnp.isfinite(part).all() for part in gradient)
        samples = flow.sample(jax.random.key(0), 3, condition=C)
        assert (np.asarray(samples)[:, 0] > 0).all() and (np.abs(np.asarray(samples)[:, 1] - 0.5) <= 1.5).all()
    with jax.disable_jit():
        np.testing.assert_allclose(log_prob(X[:1], C[:1]), expected[:1], rtol=1e-10)
    mapped = jax.jit(jax.vmap(lambda x, c: log_prob(x[None], c)[0]))(X, C)
    np.testing.assert_allclose(mapped, expected, rtol=1e-10)
    scanned = jax.lax.scan(lambda _, xc: (None, log_prob(xc[0][None], xc[1])[0]), None, (X, C))[1]
    np.testing.assert_allclose(scanned, expected, rtol=1e-10)


def test_certificate(flow):
    """Blocks are certified for every condition; the logarithm of a column has no Lipschitz constant."""
    flow.tighten()
    certificate = rf.certify(flow)
    assert len(certificate.blocks) == 2 and all(block.bound < 1 for block in certificate.blocks)
    assert flow.bijector.lipschitz_bounds() == (np.inf, np.inf)
    assert np.isfinite(flow.bijector.bijectors[2].lipschitz_bounds()).all()


def parts():
    rngs = nnx.Rngs(0)
    return [
        rf.StandardNormal((2,)),
        rf.DiagonalNormal((2, 1), condition_dim=3, rngs=rngs),
        rf.MixtureOfNormals(2, (2,), class_conditional=True, rngs=rngs),
        rf.Affine([2], condition_dim=3, rngs=rngs),
        rf.Permutation(np.asarray([1, 0]), axis=0),
        rf.Bounded(np.asarray(LOW), HIGH, one_sided="softplus"),
        rf.Logit(0.1, [0, 1], 3),
        rf.Exp(),
        rf.Softplus(),
        rf.Reshape([2, 3], [6]),
        rf.Flatten((2, 3)),
        rf.Squeeze([2, 2, 1]),
    ]


@pytest.mark.parametrize("part", parts(), ids=lambda part: type(part).__name__)
def test_arguments_are_kept(part):
    """Hashable, under their names; a copy made of them has the same structure and shapes."""
    parameters = inspect.signature(type(part).__init__).parameters
    names = [name for name in parameters if name not in ("self", "rngs", "args", "kwargs")]
    arguments = {name: getattr(part, name) for name in names}
    hash(tuple(arguments.values()))
    rngs = {"rngs": nnx.Rngs(1)} if "rngs" in parameters else {}
    copy = type(part)(**arguments, **rngs)
    (graphdef, state), (copied, other) = nnx.split(part), nnx.split(copy)
    assert graphdef == copied and jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, other)
