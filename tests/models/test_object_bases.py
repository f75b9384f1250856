"""Any object with log_prob and sample as a base: plain ones, pytrees, modules, conditional ones, and wrong ones."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.models.bases import ObjectBase

Z = jax.random.normal(jax.random.key(0), (4, 2))


class Plain:
    """A class that is not registered with JAX."""

    def log_prob(self, z):
        return jax.scipy.stats.laplace.logpdf(z).sum(-1)

    def sample(self, key, num_samples):
        return jax.random.laplace(key, (num_samples, 2))


@jax.tree_util.register_dataclass
@dataclass
class Tree:
    """A pytree: a Laplace distribution with a location and scale."""

    location: jax.Array
    scale: float

    def log_prob(self, z):
        return jax.scipy.stats.laplace.logpdf((z - self.location[None]) / self.scale).sum(-1) - 2 * jnp.log(self.scale)

    def sample(self, key, num_samples):
        return self.location[None] + self.scale * jax.random.laplace(key, (num_samples, 2))


class Network(nnx.Module):
    """A module with a parameter, conditional."""

    condition_shape = (3,)

    def __init__(self):
        self.weight = nnx.Param(jnp.full((3, 2), 0.5))

    def log_prob(self, z, condition):
        return jax.scipy.stats.laplace.logpdf(z - condition @ self.weight[...]).sum(-1)

    def sample(self, key, num_samples, condition):
        return condition @ self.weight[...] + jax.random.laplace(key, (num_samples, 2))


class AnyCondition(Plain):
    def log_prob(self, z, condition=None):
        return super().log_prob(z - condition[:, :2])

    def sample(self, key, num_samples, condition=None):
        return super().sample(key, num_samples) + condition[:, :2]


def chain():
    return rf.Chain([rf.Affine((2,)), rf.Permutation([1, 0])])


@pytest.mark.parametrize(
    ("make", "condition"),
    [
        (Plain, None),
        (lambda: Tree(jnp.asarray([1.0, -2.0]), 0.5), None),
        (lambda: Tree(np.asarray([1.0, -2.0]), 0.5), None),
        (Network, jax.random.normal(jax.random.key(5), (4, 3))),
        (AnyCondition, jax.random.normal(jax.random.key(5), (4, 7))),
    ],
)
def test_as_a_base(make, condition):
    """log_prob and samples in a flow are those of the object, eagerly and under jit."""
    given = {} if condition is None else {"condition": condition}
    flow = rf.Flow(chain(), make(), event_shape=(2,))
    expected = make().log_prob(Z[:, ::-1], **given)
    for log_prob in (
        flow.log_prob(Z, condition=condition, estimator=rf.Exact()),
        nnx.jit(lambda flow, z, c: flow.log_prob(z, condition=c, estimator=rf.Exact()))(flow, Z, condition),
    ):
        np.testing.assert_allclose(log_prob, expected, rtol=1e-12)
    samples = flow.sample(jax.random.key(1), 4, condition=condition)
    np.testing.assert_allclose(samples, make().sample(jax.random.key(1), 4, **given)[:, ::-1], rtol=1e-12)
    x, log_prob = flow.sample_and_log_prob(jax.random.key(1), 4, condition=condition, estimator=rf.Exact())
    np.testing.assert_allclose(log_prob, make().log_prob(x[:, ::-1], **given), rtol=1e-12)


def test_what_is_trained():
    """Arrays of a pytree are constants; a module's parameters are the flow's own, with their gradient."""
    flow = rf.Flow(chain(), Tree(jnp.asarray([1.0, -2.0]), 0.5))
    assert set(nnx.state(flow, nnx.Param)) == {"bijector"}
    constants = jax.tree.leaves(nnx.state(flow.base, rf.Constant))
    np.testing.assert_array_equal(constants[0], [1, -2])
    assert flow.base.distribution.scale == 0.5

    flow = rf.Flow(chain(), Network())
    c = jax.random.normal(jax.random.key(5), (4, 3))
    gradient = nnx.grad(lambda flow: flow.log_prob(Z, condition=c, estimator=rf.Exact()).sum())(flow)
    expected = jax.grad(lambda w: jax.scipy.stats.laplace.logpdf(Z[:, ::-1] - c @ w).sum())(jnp.full((3, 2), 0.5))
    np.testing.assert_allclose(gradient["base"]["module"]["weight"][...], expected, rtol=1e-12)


def test_a_split_flow():
    """Replaced arrays are what the methods use; equal objects give one structure, and others another."""
    base = ObjectBase(Tree(jnp.asarray([1.0, -2.0]), 0.5), (2,))
    graphdef, state = nnx.split(base)
    moved = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf + 1, state))
    np.testing.assert_allclose(moved.log_prob(Z), Tree(jnp.asarray([2.0, -1.0]), 0.5).log_prob(Z), rtol=1e-12)
    same, other = (nnx.split(ObjectBase(Tree(jnp.zeros(2), scale), (2,)))[0] for scale in (0.5, 0.6))
    assert graphdef == same and hash(graphdef) == hash(same) and graphdef != other


def test_float32():
    """An object that computes in another dtype gives log-densities in that of z."""

    class Wide(Plain):
        def log_prob(self, z):
            return super().log_prob(z.astype(jnp.float64))

    assert ObjectBase(Wide(), (2,)).log_prob(Z.astype(jnp.float32)).dtype == jnp.float32


class NoSample:
    def log_prob(self, z): ...


class NoDensity:
    def sample(self, key, n): ...


class OneCondition(Plain):
    def log_prob(self, z, condition): ...


class ElementWise(Plain):
    def log_prob(self, z):
        return z


class OnHost(Plain):
    def log_prob(self, z):
        return np.asarray(z).sum(-1)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (NoSample(), r"base: expected an object with the method sample\(key, n\).*, got NoSample, which has none"),
        (NoDensity(), r"base: expected an object with the method log_prob\(z\).*, got NoDensity, which has none"),
        (3, "base: expected an object with the method .*, got int"),
        (Plain, "base: expected an object, got the class Plain"),
        (OneCondition(), "take a condition or neither, got log_prob with one and sample without"),
        (ElementWise(), r"log_prob\(z\) of ElementWise to return an array of shape \(2,\), got shape \(2, 2\)"),
        (OnHost(), "OnHost: TracerArrayConversionError"),
    ],
)
def test_errors(base, message):
    with pytest.raises(ValueError, match=message):
        rf.Flow(chain(), base)


def test_a_base_of_another_size():
    with pytest.raises(ValueError, match=r"sample\(key, 2\) of Plain to return .* \(2, 3\), got shape \(2, 2\)"):
        rf.Flow(rf.Affine((3,)), Plain())


@pytest.mark.parametrize("temperature", [0.5, jnp.asarray(2.0)])
def test_temperature(temperature):
    flow = rf.Flow(chain(), Plain())
    flow.sample(jax.random.key(0), 2, temperature=1.0)
    with pytest.raises(ValueError, match="temperature: expected 1 for a base of Plain, which has none, got"):
        flow.sample(jax.random.key(0), 2, temperature=temperature)
    with pytest.raises(ValueError, match="got a traced value"):
        jax.jit(lambda t: flow.sample(jax.random.key(0), 2, temperature=t))(0.5)
