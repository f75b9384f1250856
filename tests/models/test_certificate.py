"""The certificate of whole flows, the tightening that restores it, and the error bounds that follow from it."""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import resflow_jax as rf
from resflow_jax.functional.orders import learnable_order
from resflow_jax.layers.lipschitz import NormState

CONFIGS = {
    "images": rf.ImageFlowConfig(
        (4, 4, 1),
        blocks=(2, 1),
        hidden_channels=4,
        kernels=(3, 3),
        preactivation="all",
        data=rf.ImageTransform(logit_alpha=0.05),
        between=rf.BetweenBlocks(batchnorm=True, invertible_linear=True),
        tail=rf.DenseTail(blocks=1, layers=2, hidden=4),
        scales=rf.Scales(factor_out=True),
    ),
    "DenseNets, padded": rf.VectorFlowConfig(
        dim=2,
        blocks=2,
        activation="clipswish",
        preactivation="all",
        data=rf.VectorTransform(padding=rf.Padding(channels=1)),
        densenet=rf.DenseNetBlocks(depth=2, growth=4),
    ),
    "222f": rf.VectorFlowConfig(
        dim=3, blocks=2, hidden=(4, 4), between=rf.BetweenBlocks(actnorm=False), norms=rf.Norms("222f")
    ),
    "learned orders": rf.VectorFlowConfig(
        dim=3, blocks=3, hidden=(4,), preactivation="none", norms=rf.Norms(learned=True)
    ),
}


def spoilt_flow(name, dtype=jnp.float64):
    """A flow whose kernels have grown since the last update of its power-iteration vectors."""
    flow = rf.ResidualFlow(CONFIGS[name], rngs=nnx.Rngs(1))

    def scramble(path, leaf):
        names = jax.tree_util.keystr(path)
        rng = np.random.default_rng(leaf.size)
        if "kernel" in names:
            leaf = leaf + 5 * rng.normal(size=leaf.shape)
        elif "domain" in names:  # learnable orders
            leaf = leaf + rng.normal(size=leaf.shape)
        elif leaf.dtype == jnp.float64 and "variance" not in names:
            leaf = leaf + 0.1 * rng.normal(size=leaf.shape)
        return leaf.astype(dtype) if leaf.dtype == jnp.float64 else leaf

    _, vectors, rest = nnx.split(flow, NormState, ...)
    nnx.update(flow, jax.tree_util.tree_map_with_path(scramble, rest))
    nnx.update(flow, jax.tree.map(lambda leaf: leaf.astype(dtype), vectors))
    return flow


@pytest.fixture(scope="module", params=CONFIGS)
def flows(request):
    """(name, the certificate before, the flow after tightening)."""
    flow = spoilt_flow(request.param)
    before = rf.certify(flow)
    flow.tighten()
    return request.param, before, flow


def target_bounds(certificate):
    return np.array([block.target_bound for block in certificate.blocks])


def test_tighten_restores_every_promise(flows):
    """Every block exceeds its target before and is within it after; a second call changes no bit."""
    _, before, flow = flows
    assert (before.bounds > target_bounds(before)).all() and not before.is_certified
    assert before.inverse_lipschitz == np.inf
    after = rf.certify(flow)
    assert len(after.blocks) == flow.blocks
    assert (after.bounds <= target_bounds(after)).all() and (after.bounds > 0.5 * target_bounds(after)).all()
    assert after.is_certified and np.isfinite(after.inverse_lipschitz)
    after.require()
    state = jax.tree.map(jnp.copy, nnx.state(flow))
    flow.tighten()
    chex.assert_trees_all_equal(nnx.state(flow), state)


def test_require_names_the_worst_block(flows):
    """The error names the block, its bound, the norms of its layers, and a remedy."""
    _, before, _ = flows
    worst = int(np.argmax(before.bounds))
    norms = ", ".join(f"{layer.norm:.6f}" for layer in before.blocks[worst].layers)
    message = f"got {before.bounds[worst]:.6f} for block {worst} (norms of its layers: {norms}); `flow.tighten()`"
    with pytest.raises(ValueError, match="flow: expected every block certified.*" + re.escape(message)):
        before.require()


def test_as_plain_values(flows):
    """JSON takes all of it, infinities included, and gives it back; `norms` are those of all layers in order."""
    _, before, _ = flows
    found = json.loads(json.dumps(before.as_dict()))
    assert found["is_certified"] is False and found["inverse_lipschitz"] == np.inf
    assert [block["bound"] for block in found["blocks"]] == before.bounds.tolist()
    assert [layer["norm"] for block in found["blocks"] for layer in block["layers"]] == before.norms.tolist()


def test_no_jacobian_of_the_flow_exceeds_its_bounds(flows):
    """|df/dx|_2 <= Lip(f), and |df^-1/dz|_2 <= Lip(f^-1); padded flows for the noise's mean. It still inverts."""
    _, _, flow = flows
    certificate = rf.certify(flow)
    x = jax.random.uniform(jax.random.key(2), (5, *flow.event_shape))
    graphdef, state = nnx.split(flow)

    def of_one(state, e):
        z = nnx.merge(graphdef, state)(e[None])[0]
        return z, z

    jacobians, z = jax.jit(jax.vmap(jax.jacfwd(of_one, argnums=1, has_aux=True), (None, 0)))(state, x)
    singular_values = np.linalg.svd(jacobians.reshape(5, flow.dim, -1), compute_uv=False)
    assert singular_values.max() <= certificate.lipschitz
    assert 1 / singular_values.min() <= certificate.inverse_lipschitz
    back, status = flow.inverse(jnp.concatenate([z, z + 0.1 * jnp.roll(z, 1)]), return_status=True)
    assert status.converged.all()
    np.testing.assert_allclose(back[:5], x, atol=1e-8)
    distances = np.linalg.norm((back[5:] - back[:5]).reshape(5, -1), axis=1)
    assert (distances <= certificate.inverse_lipschitz * np.linalg.norm(0.1 * jnp.roll(z, 1), axis=1)).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_in_float32(name):
    """The kernels are rounded to float32, and the bounds of what they are then keep the promise strictly."""
    flow = spoilt_flow(name, jnp.float32)
    assert flow.dtype == jnp.float32
    flow.tighten()
    certificate = rf.certify(flow)
    assert (certificate.bounds <= target_bounds(certificate)).all() and flow.dtype == jnp.float32


def test_blocks_within_their_promise_keep_their_bits():
    """A fresh flow whose kernels are small is left alone, and so are the other blocks of a stack."""
    flow = rf.ResidualFlow(CONFIGS["DenseNets, padded"], rngs=nnx.Rngs(0))
    assert rf.certify(flow).is_certified
    fresh = jax.tree.map(jnp.copy, nnx.state(flow))
    flow.tighten()
    chex.assert_trees_all_equal(nnx.state(flow), fresh)
    (stack,) = [bijector for bijector in flow.scales[0].bijectors if bijector.blocks]
    for linear in stack.steps.bijectors[0].contraction.linears:
        noise = np.random.default_rng(0).normal(size=linear.kernel.shape[1:])
        linear.kernel[...] = linear.kernel[...].at[1].add(20 * noise)
    assert (rf.certify(flow).bounds > target_bounds(rf.certify(flow))).tolist() == [False, True]
    flow.tighten()
    after = nnx.state(flow)
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(fresh), strict=True):
        if "kernel" in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(new[0], old[0])
            assert not np.array_equal(new[1], old[1])
        else:
            np.testing.assert_array_equal(new, old)
    assert (rf.certify(flow).bounds <= target_bounds(rf.certify(flow))).all()


def test_learned_orders_are_in_the_certificate():
    """Each block in its own orders, which close, or in the 2-norm."""
    flow = spoilt_flow("learned orders")
    (stack,) = [bijector for bijector in flow.scales[0].bijectors if bijector.blocks]
    first, second = stack.steps.bijectors[0].contraction.linears
    assert first.domain is second.codomain and first.codomain is second.domain
    flow.tighten()
    orders = np.asarray(learnable_order(first.domain[...]))
    assert np.ptp(orders) > 0.1 and len(orders) == 3
    for block, order in zip(rf.certify(flow).blocks, orders, strict=True):
        assert block.order in (2.0, float(order))
        assert block.layers[0].domain == block.order == block.layers[-1].codomain


ERRORS = {
    "2-norm": rf.VectorFlowConfig(
        dim=3, blocks=2, hidden=(4,), preactivation="all", between=rf.BetweenBlocks(actnorm=False)
    ),
    "orders 121": rf.VectorFlowConfig(
        dim=3,
        blocks=2,
        hidden=(4,),
        preactivation="all",
        between=rf.BetweenBlocks(actnorm=False),
        norms=rf.Norms("121"),
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_bounds(name):
    """Each block's true error, after a loose solve of the later blocks, is within its bound, and not tiny."""
    flow = rf.ResidualFlow(ERRORS[name], rngs=nnx.Rngs(1))
    kernels = nnx.state(flow, nnx.Param)
    nnx.update(flow, jax.tree.map(lambda leaf: leaf + 2 if leaf.ndim > 2 else leaf, kernels))
    flow.converge_norms()
    flow.tighten()
    certificate = rf.certify(flow)
    y = jax.random.normal(jax.random.key(0), (4, 3))
    solver = rf.FixedPoint(tolerance=0.05)
    x, status = flow.inverse(y, solver=solver, return_status=True)
    bounds = certificate.error_bounds(status)
    assert bounds.shape == (2, 4)
    (stack,) = flow.bijector.bijectors
    for n, block in reversed(list(enumerate(stack.unstacked()))):
        exact, found = (
            block.inverse(y, solver=s, return_status=True)[0] for s in (rf.FixedPoint(tolerance=1e-13), solver)
        )
        errors = np.linalg.norm(found - exact, axis=1)
        assert (errors <= bounds[n]).all() and errors.max() > 1e-4
        y = found
    np.testing.assert_allclose(y, x, rtol=1e-9)


def test_error_bounds_without_a_certificate():
    """Infinite, also where the residual is zero."""
    layer = rf.LayerCertificate(1.0, 0.9, 2.0, 2.0)
    blocks = tuple(
        rf.BlockCertificate(bound, 0.9, 2.0, 1 + bound, inverse, (layer,))
        for bound, inverse in ((0.5, 2.0), (1.0, np.inf))
    )
    certificate = rf.Certificate(blocks, 2.0, np.inf)
    norm = jnp.asarray([[0.0, 2.0], [0.0, 2.0]])
    status = rf.InverseStatus(norm.astype(int), norm, norm, norm > 0)
    np.testing.assert_array_equal(certificate.error_bounds(status), [[0.0, 4.0], [np.inf, np.inf]])


def mlp(rngs):
    return rf.LipschitzMLP(2, (4,), rngs=rngs)


def monotone(rngs):
    return rf.MonotoneBlock(mlp(rngs), solver=rf.FixedPoint(tolerance=0.05, on_failure="warn"))


INVERTED = {
    "residual": (lambda rngs: rf.ResidualBlock(mlp(rngs)), 0),
    "residual, after an inverse in closed form": (
        lambda rngs: rf.Chain([rf.Invert(rf.ActNorm((2,))), rf.ResidualBlock(mlp(rngs))]),
        0,
    ),
    "monotone": (monotone, np.inf),
    "stack of monotone": (lambda rngs: rf.ResidualStack(monotone, 2, rngs=rngs), np.inf),
    "implicit": (lambda rngs: rf.ImplicitBlock(mlp(rngs), mlp(rngs)), np.inf),
    "inverse of residual": (lambda rngs: rf.Invert(rf.ResidualBlock(mlp(rngs))), np.inf),
}


@pytest.mark.parametrize("name", INVERTED)
def test_error_bounds_of_an_inverse_of_an_inverse(name):
    """Zero where it is explicit, infinite where it is a solve that the status does not know; also beside a log-det."""
    make, expected = INVERTED[name]
    flow = rf.Flow(rf.Invert(make(nnx.Rngs(0))), event_shape=(2,))
    flow.tighten()
    z = jnp.asarray([[0.5, -1.0], [2.0, 0.3]])
    options = {"return_status": True, "estimator": rf.Exact()}
    for status in (flow.inverse(z, return_status=True)[1], flow.inverse_and_log_prob(z, **options)[-1]):
        assert status.converged.all()
        np.testing.assert_array_equal(rf.certify(flow).error_bounds(status), np.full((flow.blocks, 2), expected))


class Wrapped(rf.Bijector):
    """A layer of a user that passes everything on to the block inside, but for its certificate."""

    takes_noise = True

    def __init__(self, block, blocks):
        self.block, self.blocks, self.event_shape = block, blocks, block.event_shape

    def __call__(self, x, condition=None):
        return self.block(x, condition)

    def estimate(self, *arguments):
        return self.block.estimate(*arguments)

    def solve(self, *arguments):
        return self.block.solve(*arguments)

    def solve_and_estimate(self, *arguments):
        return self.block.solve_and_estimate(*arguments)


class Reported(Wrapped):
    def certified_bounds(self, blocks):
        return self.block.certified_bounds(blocks)

    def tighten(self):
        self.block.tighten()


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_layer_that_hides_its_blocks_is_not_certified(blocks):
    block = rf.ResidualBlock(mlp(nnx.Rngs(0)))
    for layer in (Wrapped(block, blocks), rf.Chain([Wrapped(block, blocks)])):
        with pytest.raises(ValueError, match=r"^flow: expected layers that report .*, got Wrapped without .*certified"):
            rf.certify(rf.Flow(layer))
    flow = rf.Flow(Reported(block, 1))
    flow.tighten()
    assert rf.certify(flow).is_certified and len(rf.certify(flow).blocks) == 1


def test_only_flows_are_certified():
    """The error names the argument and the type."""
    with pytest.raises(ValueError, match="flow: expected a Flow, got dict"):
        rf.certify({})
