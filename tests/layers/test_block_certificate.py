"""The certificate of a block: no pair of points and no Jacobian exceeds it; `tighten` keeps what it promises."""

import math
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from resflow_jax.functional.norm_bounds import induced_norm_bound
from resflow_jax.layers import block_certificate
from resflow_jax.layers.block_certificate import certify_contraction, tighten_contraction
from tests.functional.contractions import dense_matrix
from tests.layers.blocks import CONTRACTIONS, INF, make, spoil


def flat(x):
    return np.asarray(x).reshape(len(x), -1)


def evaluated(contraction):
    """A compiled function of x: dg/dx at every example, [B, D, D], and g."""
    graphdef, state = nnx.split(contraction)

    @jax.jit
    def run(state, x):
        contraction = nnx.merge(graphdef, state)
        weights = contraction.weights()

        def at(e):
            y = contraction.apply(weights, e[None])[0].ravel()
            return y, y

        jacobians, y = jax.vmap(jax.jacfwd(at, has_aux=True))(x)
        return jacobians.reshape(len(x), x[0].size, x[0].size), y

    return lambda x: tuple(map(np.asarray, run(state, x)))


def attained(matrix, p, rng):
    """max |J v|_p / |v|_p: exact for p in 1, 2, inf; over random v for others, so never above it."""
    if p in (1, 2, INF):
        return np.linalg.norm(matrix, p)
    v = rng.normal(size=(1000, matrix.shape[1]))
    return np.max(np.linalg.norm(v @ matrix.T, p, axis=1) / np.linalg.norm(v, p, axis=1))


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_no_pair_and_no_jacobian_exceeds_the_bound(name):
    """|g(a) - g(b)|_p <= L |a - b|_p near and far, |J|_p <= L; L is the least that the layers' norms give."""
    contraction, x = make(name)
    block = certify_contraction(contraction)
    rng = np.random.default_rng(0)
    p, linears = block.order, contraction.linears
    assert block.target_bound == contraction.lipschitz
    run = evaluated(contraction)
    matrices, y = run(x)
    for scale in (1e-3, 1.0, 30.0):
        b = x + scale * rng.normal(size=x.shape)
        change = np.linalg.norm(y - run(b)[1], p, axis=1)
        assert (change <= block.bound * np.linalg.norm(flat(x - b), p, axis=1) * (1 + 1e-12)).all()
    matrices = matrices[:10]
    found = [attained(j, p, rng) for j in matrices]
    assert max(found) <= block.bound * (1 + 1e-12)
    assert max(found) > 0.01 * block.bound, "the bound is no more than two orders of magnitude too large"

    # The same for the bound in the block's own orders, which is reported only where it is the smaller one.
    own = (linears[0].orders()[0], *(linear.orders()[1] for linear in linears))
    bounds = []
    for orders in (own, (2.0,) * len(own)):
        norms = [
            induced_norm_bound(linear.linear_map, linear.weights()[0], *pair)
            for linear, pair in zip(linears, pairwise(orders), strict=True)
        ]
        closing = x[0].size ** max(0.0, 1 / orders[0] - 1 / orders[-1])
        bounds.append(closing * contraction.bound(norms, orders))
        assert max(attained(j, orders[0], rng) for j in matrices) <= bounds[-1] * (1 + 1e-12)
    np.testing.assert_allclose(block.bound, min(bounds), rtol=1e-12)
    # Both are conversions of one constant: |.|_2 of f and of its inverse.
    singular_values = np.linalg.svd(np.eye(x[0].size) + matrices, compute_uv=False)
    assert singular_values.max() <= block.lipschitz * (1 + 1e-12)
    if block.bound < 1:
        assert 1 / singular_values.min() <= block.inverse_lipschitz * (1 + 1e-12)
    else:
        assert block.inverse_lipschitz == math.inf


@pytest.mark.parametrize("name", ["elementwise", "clipswish, preactivation", "identity", "convolutions", "maxmin"])
def test_layers_are_certified_by_their_exact_norms(name):
    """Every layer's norm is that of its dense matrix, at its coefficient; the block's is their product."""
    contraction, _ = make(name)
    block = certify_contraction(contraction)
    for layer, linear in zip(block.layers, contraction.linears, strict=True):
        linear_map = linear.linear_map
        exact = np.linalg.norm(dense_matrix(linear_map, linear.weights()[0]), 2)
        np.testing.assert_allclose(layer.norm, exact, rtol=1e-6)
        np.testing.assert_allclose(layer.norm, 0.9, rtol=1e-6)
        assert (layer.coefficient, layer.domain, layer.codomain) == (0.9, 2, 2)
    constants = contraction.activation.lipschitz ** len(contraction.activation_params)
    np.testing.assert_allclose(block.bound, constants * math.prod(layer.norm for layer in block.layers), rtol=1e-12)


def test_a_linear_block_attains_its_bound():
    """g(x) = W x + b with the kernel at its coefficient: nothing is given away."""
    contraction, x = make("identity")
    block = certify_contraction(contraction)
    np.testing.assert_allclose(np.linalg.norm(evaluated(contraction)(x)[0][0], 2), block.bound, rtol=1e-6)


# The first has closed forms and no vectors; the second stays within its promise in the 2-norm.
SPOILABLE = [name for name in CONTRACTIONS if name not in ("orders 121, clipswish", "orders 32")]


@pytest.mark.parametrize("dtype", [jnp.float32])  # float64 in models/test_certificate.py
@pytest.mark.parametrize("name", SPOILABLE)
def test_tighten_restores_the_promise(name, dtype):
    """With spoilt vectors the bound exceeds the target before and is below it after; a second call changes nothing."""
    contraction, _ = make(name)
    nnx.update(contraction, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(contraction)))
    for linear in contraction.linears:
        spoil(linear)
    before = certify_contraction(contraction)
    assert before.bound > before.target_bound
    tighten_contraction(contraction)
    block = certify_contraction(contraction)
    assert block.bound <= block.target_bound == before.target_bound
    assert block.bound > 0.5 * block.target_bound, "no more is given away than the layers' slack"
    assert all(linear.kernel.dtype == dtype for linear in contraction.linears)
    state = jax.tree.map(jnp.copy, nnx.state(contraction))
    tighten_contraction(contraction)
    chex.assert_trees_all_equal(nnx.state(contraction), state)


def test_tighten_changes_kernels_only_and_only_those_that_exceed():
    """A layer within its coefficient keeps its bits, as do all biases, orders and vectors."""
    contraction, _ = make("convolutions")
    spoil(contraction.linears[1])
    contraction.linears[2].kernel[...] *= 1e-2
    contraction.linears[0].kernel[...] *= 1e-2
    contraction.lipschitz = 1e-6  # so that there is something to do
    before = jax.tree.map(jnp.copy, nnx.state(contraction))
    tighten_contraction(contraction)
    changed = [
        jax.tree_util.keystr(path)
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(nnx.state(contraction)), jax.tree.leaves(before), strict=True
        )
        if not np.array_equal(new, old)
    ]
    assert len(changed) == 2 and all("kernel" in path for path in changed)
    assert not any("[0]['kernel']" in path for path in changed)
    assert certify_contraction(contraction).bound <= 1e-6


def test_a_layer_of_zeros_is_tightened_too():
    """A pruned dense layer of a DenseNet has norm zero, while the rest exceeds the promise."""
    contraction, _ = make("DenseNet")
    spoil(contraction.linears[-1])
    contraction.linears[0].kernel[...] *= 0
    contraction.linears[-1].kernel[...] *= 1e3
    contraction.concatenation[...] = jnp.asarray([[9.0, -9.0], [9.0, -9.0]])
    contraction.lipschitz = 0.5
    assert certify_contraction(contraction).bound > 0.5
    tighten_contraction(contraction)
    assert 0.4 < certify_contraction(contraction).bound <= 0.5


def test_tighten_ends(monkeypatch):
    """Where no rescaling brings a block within its promise, an error says so, with the bound and the norms."""
    contraction, _ = make("elementwise")
    for linear in contraction.linears:
        spoil(linear)
    monkeypatch.setattr(block_certificate, "_rescale", lambda *_: None)
    bound = certify_contraction(contraction).bound
    with pytest.raises(RuntimeError, match=rf"^tighten: expected a bound of at most 0\.8.* 10 rounds, got {bound}"):
        tighten_contraction(contraction)


@pytest.mark.parametrize(("name", "orders"), [("orders 121, cpila", (1, 2)), ("learned orders", ())])
def test_the_promise_counts_activations_in_the_norm_at_their_place(name, orders):
    """cpila is steeper than one in the 1-norm, which the layer after it makes up for; a learned order can be any."""
    contraction, _ = make(name)
    constants = [min(1, contraction.activation.lipschitz_in(order)) for order in orders]
    assert contraction.lipschitz == pytest.approx(0.81 * math.prod(constants), rel=1e-12)
    assert contraction.activation.lipschitz < 1 == max(constants, default=1)
