"""Solves and norms take products in full precision, which accelerators reduce by default; the rest takes the user's."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.primitives.convolution import convolve
from resflow_jax.functional.primitives.precision import full_precision

X, KERNEL, W = jnp.ones((1, 4, 4, 2)), 0.01 * jnp.ones((3, 3, 2, 2)), 0.1 * jnp.eye(3)


def precisions(function, *args):
    """The precisions of the products of a program, on a CPU and on a TPU."""
    found = []
    for platform in ("cpu", "tpu"):
        text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
        products = [line for line in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", line)]
        assert products
        found.append({word for line in products for word in re.findall(r"\b(HIGHEST|HIGH|DEFAULT)\b", line)})
    return found


def test_the_user_chooses_the_precision_of_convolutions():
    """That of the context in which a convolution and its derivatives are traced, on every platform."""
    loss = lambda x, k: jnp.sum(jnp.sin(convolve(x, k)))  # noqa: E731
    gradient = lambda x, k: jax.grad(loss, (0, 1))(x, k)  # noqa: E731
    assert precisions(gradient, X, KERNEL) == [{"DEFAULT"}] * 2

    def within(x, k):
        with jax.default_matmul_precision("highest"):
            return gradient(x, k)

    assert precisions(within, X, KERNEL) == [{"HIGHEST"}] * 2
    with jax.default_matmul_precision("high"):
        assert precisions(within, X, KERNEL) == [{"HIGHEST"}] * 2
        assert precisions(gradient, X, KERNEL) == [{"HIGH"}] * 2


def test_full_precision():
    """The context sets it, unless the user has chosen another one, and ends."""
    assert jax.config.jax_default_matmul_precision is None
    with full_precision():
        assert jax.config.jax_default_matmul_precision == "highest"
    with jax.default_matmul_precision("high"), full_precision():
        assert jax.config.jax_default_matmul_precision == "high"
    assert jax.config.jax_default_matmul_precision is None


def dense_g(w, x):
    return jnp.tanh(x @ w)


def conv_g(kernel, x):
    return convolve(jnp.tanh(x), kernel)


CALLS = {
    "residual_inverse, dense": (lambda w, x: rf.residual_inverse(dense_g, w, x), W, jnp.ones((2, 3))),
    "residual_inverse, convolution": (lambda k, x: rf.residual_inverse(conv_g, k, x), KERNEL, X),
    "its gradient": (jax.grad(lambda k, x: rf.residual_inverse(conv_g, k, x).sum(), (0, 1)), KERNEL, X),
    "power_iteration": (lambda w, v: rf.power_iteration(lambda v: v @ w, v).sigma, W, jnp.ones(3)),
}


@pytest.mark.parametrize("name", CALLS)
def test_solves_have_full_precision(name):
    """Every product of the program; where the user has chosen a precision, it is that one."""
    function, *args = CALLS[name]
    assert set().union(*precisions(function, *args)) == {"HIGHEST"}
    with jax.default_matmul_precision("high"):
        assert "HIGH" in set().union(*precisions(function, *args))


def test_a_flow():
    """Its inverse has full precision; its density has that of JAX."""
    flow = rf.ResidualFlow(rf.VectorFlowConfig(dim=3, blocks=2, hidden=(4,)), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(flow)
    z = jnp.zeros((2, 3))
    inverse = lambda state, z: nnx.merge(graphdef, state).inverse(z)  # noqa: E731
    density = lambda state, z: nnx.merge(graphdef, state).log_prob(z, key=jax.random.key(0))  # noqa: E731
    assert set().union(*precisions(inverse, state, z)) == {"HIGHEST"}
    assert "DEFAULT" in set().union(*precisions(density, state, z))
