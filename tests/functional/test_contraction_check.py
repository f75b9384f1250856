"""`check_contraction`: lower bounds that are true and sharp, and every kind of bad map found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resflow_jax as rf
from tests.functional.conditional import g as conditional_g
from tests.functional.conditional import jacobians as conditional_jacobians
from tests.functional.conditional import net as conditional_net
from tests.functional.contractions import conv_net, dense_net, jacobians, nonsymmetric_net

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))


@pytest.mark.parametrize("make", [dense_net, nonsymmetric_net, conv_net])
def test_the_bound(make):
    """At most the Lipschitz constant, and nearly the largest singular value at the data, or more."""
    g, params, x = make(0.9)
    found = rf.check_contraction(g, params, x, KEY)
    at_data = np.linalg.norm(jacobians(g, params, x), 2, axis=(1, 2)).max()
    assert at_data * (1 - 1e-3) < found.jacobian_norm <= 0.9 * (1 + 1e-12)
    assert found.lipschitz_lower_bound == max(found.jacobian_norm, found.difference_quotient)
    assert 0 < found.difference_quotient <= 0.9 * (1 + 1e-12)
    assert not found.is_refuted and found.mixing < 1e-12


def test_with_a_condition():
    """Differences are taken with the condition in common: it may change g as much as it likes."""
    params, x, condition = conditional_net(0.8)
    found = rf.check_contraction(conditional_g, {**params, "table": 100 * params["table"]}, x, KEY, condition=condition)
    assert found.lipschitz_lower_bound <= 0.8
    found = rf.check_contraction(conditional_g, params, x, KEY, condition=condition, samples=1)
    at_data = np.linalg.norm(conditional_jacobians(params, x, condition), 2, axis=(1, 2)).max()
    np.testing.assert_allclose(found.jacobian_norm, at_data, rtol=1e-4)


def test_a_tree():
    """An event of several arrays, and its whole Jacobian."""
    w = 0.4 * jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0])

    def g(w, x):
        out = jnp.concatenate([x["a"], x["b"][:, None]], axis=1) @ w
        return {"a": out[:, :3], "b": out[:, 3]}

    found = rf.check_contraction(g, w, {"a": X, "b": X[:, 0]}, KEY)
    np.testing.assert_allclose([found.jacobian_norm, found.difference_quotient], 0.4, rtol=1e-9)


@pytest.mark.parametrize(
    ("g", "bound"),
    [
        (lambda p, x: 1.2 * x[:, ::-1], 1.2),
        (lambda p, x: jnp.asarray(np.diag([0.1, 0.2, 1.5])) @ x[..., None], None),
        (lambda p, x: jnp.sin(3 * x), None),
    ],
    ids=["linear", "one direction", "sine"],
)
def test_refuted(g, bound):
    """A bound of one or more is reported, with a warning."""
    of_vectors = lambda p, x: g(p, x).reshape(x.shape)  # noqa: E731
    with pytest.warns(RuntimeWarning, match=r"^g: expected a contraction, got a map whose Lipschitz constant is at"):
        found = rf.check_contraction(of_vectors, None, X, KEY)
    assert found.is_refuted and 1 < found.lipschitz_lower_bound <= 3
    assert bound is None or abs(found.lipschitz_lower_bound - bound) < 1e-9


def test_a_jump_is_seen_between_examples():
    """Its Jacobian is zero everywhere; difference quotients show that it is no contraction."""
    x = jnp.linspace(-0.1, 0.1, 6)[:, None]
    with pytest.warns(RuntimeWarning, match="at least"):
        found = rf.check_contraction(lambda p, x: jnp.sign(x), None, x, KEY)
    assert found.jacobian_norm == 0 and found.difference_quotient >= 10


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_floats(dtype):
    """Rounding is no mixing, and equal examples are no quotient."""
    w = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0], dtype)
    x = jnp.concatenate([X, X[:2]]).astype(dtype)
    found = rf.check_contraction(lambda w, x: (x @ w) * 0.5, w, x, KEY)
    np.testing.assert_allclose(found.lipschitz_lower_bound, 0.5, rtol=float(4 * jnp.finfo(dtype).eps))


STATE = [0.0]


def counting(p, x):
    STATE[0] += 1.0
    return 0.1 * x + STATE[0]


@jax.custom_vjp
def reverse(x):
    return 0.5 * x


reverse.defvjp(lambda x: (0.5 * x, None), lambda _, u: (0.5 * u,))

ALONE = "an output for each example that does not depend on the other examples"
BAD = {
    "shape": (lambda p, x: x[:, :2], "g: expected an output float64 (6, 3) like x, got float64 (6, 2)"),
    "dtype": (lambda p, x: x.astype(jnp.float32), "g: expected an output float64 (6, 3) like x, got float32 (6, 3)"),
    "not finite": (lambda p, x: 0.1 * jnp.log(x), "g: expected finite outputs, got others for "),
    "state": (counting, "g: expected the same output when it is called again"),
    "batch statistics": (lambda p, x: 0.5 * (x - jnp.mean(x, axis=0, keepdims=True)), f"g: expected {ALONE},"),
    "a neighbour": (lambda p, x: 0.1 * jnp.roll(x, 1, axis=0), f"g: expected {ALONE},"),
    "a weak neighbour": (lambda p, x: 0.1 * x + 1e-6 * jnp.roll(x, 1, axis=0), f"g: expected {ALONE},"),
    "the place": (
        lambda p, x: 0.1 * x + jnp.arange(len(x))[:, None].astype(x.dtype),
        f"g: expected {ALONE} or its place",
    ),
    "rows": (lambda p, x: 0.1 * x * jnp.ones((6, 1)), "g: expected a map of batches of any size, which fails for"),
    "the number": (lambda p, x: 0.5 * x / len(x), f"g: expected {ALONE} or their number"),
    "one derivative": (lambda p, x: reverse(x), "g: expected a map with derivatives in forward and in reverse mode"),
    "two arguments": (lambda x: x, "g: expected a function of (params, x)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_maps(name):
    """The error names the wrong argument."""
    g, message = BAD[name]
    with pytest.raises(ValueError) as error:
        rf.check_contraction(g, None, X, KEY)
    assert str(error.value).startswith(message), error.value


def test_bad_arguments():
    """Outside of jit, with a key and a number of samples."""
    g = lambda p, x: 0.5 * x  # noqa: E731
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda x: rf.check_contraction(g, None, x, KEY).mixing)(X)
    with pytest.raises(ValueError, match=r"^key: expected a PRNG key"):
        rf.check_contraction(g, None, X, 0)
    with pytest.raises(ValueError, match=r"^samples: expected an integer of at least 1"):
        rf.check_contraction(g, None, X, KEY, samples=0)
    mixing = lambda p, x, c: 0.5 * x + jnp.mean(c)  # noqa: E731
    with pytest.raises(ValueError, match=f"^g: expected {ALONE},"):
        rf.check_contraction(mixing, None, X, KEY, condition=X[:, 0])
    with pytest.raises(ValueError, match=r"^condition: expected 6 rows"):
        rf.check_contraction(lambda p, x, c: 0.5 * x, None, X, KEY, condition=np.ones(2))
    assert rf.check_contraction(g, None, X[:1], KEY).lipschitz_lower_bound == 0.5
