"""The inverse of networks that classify: exact to rounding with a bound, and not to be relied on without."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import resflow_jax as rf

X = jax.random.uniform(jax.random.key(0), (8, 4, 4, 1))


def network(scale, **options):
    """A network of four blocks with large kernels, initialised."""
    sizes = {"shape": (4, 4, 1), "classes": 3, "blocks": (2, 2), "hidden_channels": (4, 4), "padding": 1}
    flow = rf.ResNetClassifier(rf.ClassifierConfig(**{**sizes, **options}), rngs=nnx.Rngs(0))
    params = nnx.state(flow, nnx.Param)
    of_blocks = lambda path: "kernel" in str(path) and "head" not in str(path)  # noqa: E731
    nnx.update(flow, jax.tree_util.tree_map_with_path(lambda p, v: scale * v if of_blocks(p) else v, params))
    flow.initialize(X)
    flow.converge_norms()
    return flow


def round_trip(flow):
    """The largest error of each image, and whether every block's solve converged."""

    @jax.jit
    def errors(x):
        back, status = flow.inverse(flow(x), return_status=True)
        return jnp.max(jnp.abs(back - x), axis=(1, 2, 3)), jnp.all(status.converged, axis=0)

    return map(np.asarray, errors(X))


def test_images_come_back():
    """With kernels at their bounds, and zeros appended; the logits are finite."""
    flow = network(5.0)
    errors, converged = round_trip(flow)
    assert errors.max() < 1e-5 and converged.all()
    logits = flow.logits(X)
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()


def test_a_network_without_a_bound_has_no_inverse():
    """No image comes back, or the status says so."""
    errors, converged = round_trip(network(5.0, coefficient=None))
    assert not (converged & (errors < 1e-3)).any()


def test_blocks_with_small_kernels():
    """An unconstrained block with a small g comes back to 1e-5."""
    block = rf.UnconstrainedBlock((4, 4, 1), 4, rngs=nnx.Rngs(0))
    for kernel in block.branch.kernels:
        kernel[...] = 0.3 * kernel[...]
    back, status = block.inverse(block(X), return_status=True)
    assert status.converged.all()
    np.testing.assert_allclose(back, X, atol=1e-5)
