"""The autoregressive layer: no output depends on a later element; inverse, log-det and condition are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.layers.autoregressive import autoregressive_masks
from tests.layers.couplings.layers import dense_jacobians, made


def stack(rngs):
    def step(rngs):
        return rf.Chain([rf.MaskedAutoregressive(4, (5,), rngs=rngs), rf.Permutation([3, 2, 1, 0])])

    return rf.ResidualStack(step, 2, rngs=rngs)


LAYERS = {
    "plain": (lambda rngs: rf.MaskedAutoregressive(4, (7, 6), activation="lipswish", rngs=rngs), (4,)),
    "conditional": (lambda rngs: rf.MaskedAutoregressive(4, (6,), condition_dim=2, rngs=rngs), (4,)),
    "linear": (lambda rngs: rf.MaskedAutoregressive(3, (), condition_dim=2, rngs=rngs), (3,)),
    "one element": (lambda rngs: rf.MaskedAutoregressive(1, (4,), condition_dim=2, rngs=rngs), (1,)),
    "stack": (stack, (4,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_log_det_and_order(name):
    """The Jacobian is lower triangular, with every entry below its diagonal in use; its log-det and inverse fit."""
    layer, x, condition = made(name, LAYERS)
    jacobians = dense_jacobians(layer, x, condition)

    @nnx.jit
    def run(layer, x, condition):
        y, log_det = layer.forward(x, condition=condition)
        return y, log_det, layer.inverse(y, condition=condition)

    y, log_det, back = run(layer, x, condition)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobians)[1], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-9)
    if name != "stack":
        np.testing.assert_array_equal(jacobians, np.tril(jacobians))
        below = np.tril_indices(x.shape[1], -1)
        assert (np.abs(jacobians).max(0)[below] > 0).all()
    if condition is not None:
        assert not np.allclose(y, layer(x, condition + 1), atol=1e-3)


def test_masks_leave_no_other_path():
    """The product of the masks, which counts the paths, is strictly lower triangular, and not zero below."""
    paths = np.linalg.multi_dot([mask.astype(int) for mask in autoregressive_masks(5, (9, 4, 7))])
    expected = np.arange(5)[:, None] < np.tile(np.arange(5), 2)[None]
    np.testing.assert_array_equal(paths > 0, expected)


@pytest.mark.parametrize("widths", [(4, 4), (3, 9)])
def test_narrow_networks(widths):
    """With fewer units than elements, the last output depends on all elements before it, and none on later ones."""
    paths = np.linalg.multi_dot([mask.astype(int) for mask in autoregressive_masks(12, widths)])
    assert not np.triu(paths[:, :12].T > 0).any() and (paths[:11, [11, 23]] > 0).all()


def test_start_and_dtypes():
    """The start is the identity; float32 stays, is finite for large inputs, and takes bfloat16 in both directions."""
    layer = rf.MaskedAutoregressive(3, (8,), rngs=nnx.Rngs(0))
    x = jnp.asarray([[1.0, -2.0, 3e4]], jnp.float32)
    layer = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), layer)
    y, log_det = layer.forward(x)
    assert y.dtype == log_det.dtype == layer.inverse(y).dtype == jnp.float32
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(layer.inverse(y), x)
    low = jnp.ones((1, 3), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        assert layer.inverse(low).dtype == layer.forward(low)[0].dtype == jnp.float32
        conditional = rf.MaskedAutoregressive(3, (8,), condition_dim=2, rngs=nnx.Rngs(0))
        conditional = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), conditional)
        wide = jnp.ones((1, 2), jnp.float32)
        assert conditional.invert(low, wide).dtype == jnp.float32
        assert conditional.inverse(low, condition=wide).dtype == jnp.bfloat16
    assert rf.certify(rf.Flow(layer)).unbounded[0][0] == "MaskedAutoregressive"


@pytest.mark.parametrize("hidden", [(8,), ()])
def test_the_start_is_the_identity_for_every_condition(hidden):
    """Also without a hidden layer, where the gate acts on the output; the condition has a gradient from the start."""
    layer = rf.MaskedAutoregressive(3, hidden, condition_dim=2, rngs=nnx.Rngs(0))
    x, c = jnp.asarray([[1.0, -2.0, 0.5]]), jnp.asarray([[2.0, -1.0]])
    np.testing.assert_array_equal(layer.forward(x, condition=c)[0], x)
    graphdef, params = nnx.split(layer, nnx.Param)
    if not hidden:
        gradient = jax.grad(lambda params: nnx.merge(graphdef, params)(x, c).sum())(params)
        assert jnp.any(gradient["conditioning"]["out"]["kernel"][...] != 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rf.MaskedAutoregressive(0, rngs=nnx.Rngs(0)), "dim: expected an integer of at least 1"),
        (lambda: rf.MaskedAutoregressive(2, (0,), rngs=nnx.Rngs(0)), "hidden: expected an integer"),
        (lambda: rf.MaskedAutoregressive(2, condition_dim=0, rngs=nnx.Rngs(0)), "condition_dim: expected"),
        (lambda: rf.MaskedAutoregressive(2, activation="gelu", rngs=nnx.Rngs(0)), "activation: expected one of"),
        (
            lambda: rf.MaskedAutoregressive(2, activation="maxmin", rngs=nnx.Rngs(0)),
            "activation: expected an activation that",
        ),
        (lambda: rf.MaskedAutoregressive(2, activation="fullsort", rngs=nnx.Rngs(0)), "activation: expected an act"),
        (lambda: rf.MaskedAutoregressive(2, rngs=0), "rngs: expected"),
        (lambda: rf.MaskedAutoregressive(2, rngs=nnx.Rngs(0)).forward(jnp.ones((1, 3))), "x: expected a float array"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
