"""The inverse of a network that classifies."""

import jax
import jax.numpy as jnp
from flax import nnx

import resflow_jax as rf

X = jax.random.uniform(jax.random.key(0), (8, 4, 4, 1))


def test_images_come_back():
    """To 1e-5, compiled, with kernels at their bounds and zeros appended."""
    sizes = {"blocks": (1,), "hidden_channels": (4,), "squeeze_first": True, "padding": 1}
    flow = rf.ResNetClassifier(rf.ClassifierConfig((4, 4, 1), 3, **sizes), rngs=nnx.Rngs(0))
    params = nnx.state(flow, nnx.Param)
    nnx.update(flow, jax.tree_util.tree_map_with_path(lambda p, v: 5 * v if "kernel" in str(p) else v, params))
    flow.converge_norms()

    @jax.jit
    def round_trip(x):
        back, status = flow.inverse(flow(x), solver=rf.FixedPoint(), return_status=True)
        return (
            jnp.max(jnp.abs(back - x)),
            jnp.max(jnp.abs(flow(x)[..., :4] - back.reshape(8, 2, 2, 4))),
            status.converged,
        )

    error, moved, converged = round_trip(X)
    assert error < 1e-5 and moved > 0.1 and converged.all()
