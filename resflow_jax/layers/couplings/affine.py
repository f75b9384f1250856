"""Additive and affine coupling layers: a shift, and a scale, of every moved element."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import check_choice
from resflow_jax.layers.conditioned_params import bounded
from resflow_jax.layers.couplings.conditioners import Conditioner
from resflow_jax.layers.couplings.coupling import Coupling

Array = jax.Array
Shape = tuple[int, ...]

Scale = Literal["exp", "sigmoid"]
SCALES = get_args(Scale)


class AdditiveCoupling(Coupling):
    """Coupling layer that shifts: y_moved = x_moved + t(x_kept; c). It preserves volume: log_det = 0 [B].

    Args:
      shape, conditioner, mask, flipped, condition_dim, rngs: as in `Coupling`; the network returns t.

    Randomness and cost: as in `Coupling`.

    Raises:
      ValueError: as `Coupling`.

    Source: Dinh et al. (2015, arXiv 1410.8516), section 3.2 (NICE).

    Example:
      >>> layer = rf.AdditiveCoupling((3,), nnx.Linear(1, 2, rngs=nnx.Rngs(0)))
      >>> x = jnp.arange(6.0).reshape(2, 3)
      >>> y, log_det = layer.forward(x)
      >>> log_det.tolist(), np.allclose(layer.inverse(y), x, atol=1e-6)
      ([0.0, 0.0], True)
    """

    parameters = 1

    def values(self, x: Array, theta: Array) -> tuple[Array, Array]:
        return x + theta[..., 0, :], jnp.zeros_like(x)

    def inverse_values(self, y: Array, theta: Array) -> tuple[Array, Array]:
        return y - theta[..., 0, :], jnp.zeros_like(y)


class AffineCoupling(Coupling):
    """Coupling layer that scales and shifts.

        y_moved = x_moved * exp(s) + t,   (a, t) = network(x_kept; c),   log_det = sum s
        s = 4 tanh(a / 4)  ("exp"),   or   exp(s) = sigmoid(a + 2)  ("sigmoid")

    Args:
      shape, conditioner, mask, flipped, condition_dim, rngs: as in `Coupling`; the network returns a, then t.
      scale: "exp" for a scale between exp(-4) and exp(4), which is 1 where the network returns 0; "sigmoid" for a scale
        below 1, which starts at 0.88.

    Randomness and cost: as in `Coupling`.

    Raises:
      ValueError: as `Coupling`, and for an unknown scale.

    Source: Dinh et al. (2017, arXiv 1605.08803), section 3.2 (Real NVP); the sigmoid is that of the code of Kingma &
    Dhariwal (2018, arXiv 1807.03039).

    Example:
      >>> layer = rf.AffineCoupling((4,), rf.MLPConditioner((8,)), scale="sigmoid", rngs=nnx.Rngs(0))
      >>> y, log_det = layer.forward(jnp.ones((2, 4)))
      >>> round(float(log_det[0]), 4), np.allclose(layer.inverse(y), 1, atol=1e-6)       # 2 log sigmoid(2)
      (-0.2539, True)
    """

    parameters = 2

    def __init__(
        self,
        shape: Shape,
        conditioner: Conditioner | nnx.Module | None = None,
        mask: str | Any = "halves",
        flipped: bool = False,
        condition_dim: int | Shape | None = None,
        *,
        scale: Scale = "exp",
        rngs: nnx.Rngs | None = None,
    ):
        check_choice("scale", scale, SCALES)
        self.scale = scale
        super().__init__(shape, conditioner, mask, flipped, condition_dim, rngs=rngs)

    def _log_scale(self, a: Array) -> Array:
        return bounded(a) if self.scale == "exp" else jax.nn.log_sigmoid(a + 2)

    def values(self, x: Array, theta: Array) -> tuple[Array, Array]:
        log_scale = self._log_scale(theta[..., 0, :])
        return x * jnp.exp(log_scale) + theta[..., 1, :], log_scale

    def inverse_values(self, y: Array, theta: Array) -> tuple[Array, Array]:
        log_scale = self._log_scale(theta[..., 0, :])
        return (y - theta[..., 1, :]) * jnp.exp(-log_scale), log_scale
