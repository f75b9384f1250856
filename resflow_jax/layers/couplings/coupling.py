"""`Coupling`: the interface of coupling layers, and what they share.

    y_kept = x_kept,   y_moved = f(x_moved; theta),   theta = network(x_kept; c),   log_det = sum log f'(x_moved)

f acts on each moved element independently, with parameters of its own for each, and is strictly increasing. The inverse
computes the same theta from y_kept = x_kept and inverts f.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from resflow_jax.functional.checks import as_shape, check_type
from resflow_jax.functional.conditions import check_arguments
from resflow_jax.layers.bijector import Bijector, Constant
from resflow_jax.layers.couplings.conditioners import Conditioner, MLPConditioner
from resflow_jax.layers.couplings.masks import Elements, Halves, as_mask, checkerboard
from resflow_jax.layers.unchanged_calls import call_unchanged

Array = jax.Array
Shape = tuple[int, ...]


class Coupling(Bijector):
    """Interface of a coupling layer: some elements stay, and their network says how each of the others moves.

        y_kept = x_kept,   y_moved = f(x_moved; theta),   theta = network(x_kept; c),   log_det = sum log f'(x_moved)

    A subclass sets `parameters`, the number of parameters of f, and defines `values` and `inverse_values`, both for
    x [B, ..., C] with theta [B, ..., parameters, C]. `AdditiveCoupling`, `AffineCoupling`, `SplineCoupling` and
    `MixtureCoupling` are the library's.

    In exact arithmetic a coupling layer is invertible whatever its network computes, if that treats each example
    independently. Rounding is not bounded, since no Lipschitz bound is known (`certify` says so): where a slope f' is
    small, the inverse is less precise by its reciprocal.

    Args:
      shape: shape of one x: (D,) or (*size, C).
      conditioner: the network: `MLPConditioner`, `CNNConditioner` or `ResNetConditioner`, any object with their method
        `build`, or a module of Flax NNX. A module is called as module(x) or, with `condition_dim`, module(x, condition)
        for the kept elements x [B, *kept_shape], and returns [B, *size, parameters * C] for C moved elements on the
        last axis, all first parameters first.
      mask: which elements are kept: "halves" of the last axis, the first one; "checkerboard", those with an even sum of
        coordinates; or a bool array of the event's shape, True where an element is kept.
      flipped: whether kept and moved elements are exchanged, as in every other layer of a chain.
      condition_dim: number of elements of a condition [condition_dim], or the shape of one, such as (H, W, K) for
        convolutions; None for none.
      rngs: draws the network; not needed for a module.

    Randomness: `rngs` only. Cost: one evaluation of the network and one pass over x, in each direction. log_det [B] is
    exact, in nats.

    Raises:
      ValueError: for a mask that keeps or moves no element, such as halves of one channel; for an unknown mask; for a
        network that does not fit the events; and from a call, for one whose output has another shape or whose state
        the call changes, such as dropout in train mode.

    Source: Dinh et al. (2015, arXiv 1410.8516), section 3.2.

    Example:
      >>> class Cubic(rf.Coupling):
      ...     parameters = 1
      ...
      ...     def values(self, x, theta):
      ...         shift = theta[..., 0, :]
      ...         return x**3 + x + shift, jnp.log1p(3 * x**2)
      >>> layer = Cubic((4,), rf.MLPConditioner((8,)), rngs=nnx.Rngs(0))
      >>> y, log_det = layer.forward(jnp.ones((2, 4)))
      >>> y[0].tolist(), round(float(log_det[0]), 4)       # 2 log 4
      ([1.0, 1.0, 2.0, 2.0], 2.7726)
    """

    parameters: int
    no_bound = "the network of a coupling layer has no Lipschitz bound"

    def __init__(
        self,
        shape: Shape,
        conditioner: Conditioner | nnx.Module | None = None,
        mask: str | Any = "halves",
        flipped: bool = False,
        condition_dim: int | Shape | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ):
        self.shape = self.event_shape = as_shape("shape", shape)
        mask = as_mask(self.shape, mask)
        self.mask = mask if isinstance(mask, str) else Constant(jnp.asarray(mask))
        check_type("flipped", flipped, bool)
        self.flipped = flipped
        self.condition_dim = condition_dim
        if condition_dim is not None:
            sizes = condition_dim if isinstance(condition_dim, tuple | list) else (condition_dim,)
            self.condition_shape = as_shape("condition_dim", sizes)
        conditioner = MLPConditioner() if conditioner is None else conditioner
        if isinstance(conditioner, nnx.Module):
            check_arguments("conditioner", conditioner, ("x",) if condition_dim is None else ("x", "condition"))
            self.settings, self.network = None, conditioner
            return
        if isinstance(conditioner, type) or not hasattr(conditioner, "build"):
            raise ValueError(
                "conditioner: expected the settings of a network, such as rf.MLPConditioner(), or a module, got "
                f"{conditioner!r}"
            )
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(f"rngs: expected nnx.Rngs for the settings of a network, got {type(rngs).__name__}")
        parts = self._parts
        shapes = parts.kept_shape, self.network_shape, self.condition_shape
        self.settings, self.network = conditioner, conditioner.build(*shapes, rngs=rngs)

    @property
    def conditioner(self) -> Any:
        """The argument of this name."""
        return self.network if self.settings is None else self.settings

    @property
    def _parts(self) -> Halves | Elements:
        if isinstance(self.mask, str) and self.mask == "halves":
            return Halves(self.shape, self.flipped)
        keep = jnp.asarray(checkerboard(self.shape)) if isinstance(self.mask, str) else self.mask[...]
        return Elements(self.shape, ~keep if self.flipped else keep)

    @property
    def kept_shape(self) -> Shape:
        """Shape of what the network takes, for one x."""
        return self._parts.kept_shape

    @property
    def network_shape(self) -> Shape:
        """Shape of what the network returns, for one x: (*size, parameters * C)."""
        *size, channels = self._parts.moved_shape
        return (*size, self.parameters * channels)

    def values(self, x: Array, theta: Array) -> tuple[Array, Array]:
        """f(x) and log f'(x) of every element of x [B, ..., C], for theta [B, ..., parameters, C]."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method values(x, theta)")

    def inverse_values(self, y: Array, theta: Array) -> tuple[Array, Array]:
        """x with f(x) = y, and log f'(x), of every element."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method inverse_values(y, theta)")

    def theta(self, x: Array, condition: Array | None = None) -> Array:
        """The parameters [B, ..., parameters, C] that the network computes from the kept elements of x."""
        kept = self._parts.kept(x)
        arguments = (kept,) if self.condition_shape is None else (kept, condition)
        found = call_unchanged("conditioner", self.network, *arguments)
        *size, channels = self.network_shape
        expected = (x.shape[0], *size, channels)
        if getattr(found, "shape", None) != expected:
            got = found.shape if hasattr(found, "shape") else type(found).__name__
            raise ValueError(f"conditioner: expected an output of shape {expected} for x {x.shape}, got {got}")
        return found.reshape(*expected[:-1], self.parameters, channels // self.parameters)

    def transform(self, x: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return self._applied(self.values, x, condition)

    def invert(self, y: Array, condition: Array | None = None) -> Array:
        return self.invert_and_log_det(y, condition)[0]

    def invert_and_log_det(self, y: Array, condition: Array | None = None) -> tuple[Array, Array]:
        return self._applied(self.inverse_values, y, condition)

    def _applied(self, function: Callable[[Array, Array], tuple[Array, Array]], x: Array, condition: Array | None):
        """x with function(moved elements, theta) instead of the moved elements, and the sum of the log-slopes [B]."""
        parts = self._parts
        moved, log_slopes = function(parts.moved(x), self.theta(x, condition))
        log_det = jnp.sum(parts.only_moved(log_slopes), axis=tuple(range(1, x.ndim)))
        return parts.joined(x, moved), log_det
