"""The parts of z = f(x): what leaves a multi-scale flow at each scale.

f(x) is flat; `split_latent` gives its parts in the shapes that they had in the flow, and `join_latent` joins them.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import as_float_batch, as_sequence
from resflow_jax.layers.module import Module

Array = jax.Array
Shape = tuple[int, ...]


class FlowParts(Module):
    """The methods of `Flow` for the parts of z."""

    def features(self, x: Array, condition: Array | None = None) -> tuple[Array, ...]:
        """The parts of z = f(x), each in the shape that it had in the flow: one part for each scale, the finest first.

        For a flow of images that factors channels out, the parts are the channels that leave after every scale and the
        output of the last scale, each [B, H, W, C]. For other flows of images it is the one part that z is flattened
        from, and for flows of vectors z itself. Dense blocks on a flattened part keep the shape that it was flattened
        from. The parts are `split_latent(flow(x))`: their elements in order are z.

        Args:
          x: floats [B, *event_shape], as in `forward`.
          condition: as in `forward`.

        Returns:
          A tuple of floats [B, *shape], one for each of `part_shapes`. They are deterministic: a flow that pads x
          appends the mean of its noise.

        Cost: one evaluation of every g, without log-dets. To get features together with a log-density, call
        `split_latent` on the z of `forward_and_log_prob`.

        Raises:
          ValueError: as `forward` for x and condition.

        Example:
          >>> scales = [rf.Squeeze((4, 4, 1)), rf.Squeeze((2, 2, 2))]
          >>> flow = rf.Flow(rf.MultiScale(scales, (4, 4, 1)))
          >>> [part.shape for part in flow.features(jnp.full((3, 4, 4, 1), 0.5))]
          [(3, 2, 2, 2), (3, 1, 1, 8)]
        """
        return self.split_latent(self(x, condition))

    @property
    def part_shapes(self) -> tuple[Shape, ...]:
        """The shapes of the parts of one z, in order (see `features`)."""
        return self.bijector.part_shapes(self.event_shape)

    def split_latent(self, z: Array) -> tuple[Array, ...]:
        """Splits z [B, *latent_shape] into its parts [B, *shape], one for each of `part_shapes`, in the order of z.

        Raises:
          ValueError: for a z of another shape or dtype.
        """
        z = as_float_batch("z", z, self.latent_shape)
        sizes = [math.prod(shape) for shape in self.part_shapes]
        pieces = jnp.split(z.reshape(z.shape[0], self.dim), np.cumsum(sizes)[:-1], axis=1)
        return tuple(piece.reshape(-1, *shape) for piece, shape in zip(pieces, self.part_shapes, strict=True))

    def join_latent(self, parts: Sequence[Array]) -> Array:
        """Joins parts [B, *shape], in the order of `part_shapes`, to z [B, *latent_shape]: the inverse of
        `split_latent`.

        Raises:
          ValueError: for another number of parts than `part_shapes` has, and for a part of another shape or dtype.
        """
        shapes, parts = self.part_shapes, as_sequence("parts", parts, "a list of arrays")
        if len(parts) != len(shapes):
            raise ValueError(f"parts: expected {len(shapes)}, of the shapes {shapes}, got {len(parts)}")
        arrays = [as_float_batch(f"parts[{n}]", *pair) for n, pair in enumerate(zip(parts, shapes, strict=True))]
        sizes = {array.shape[0] for array in arrays}
        if len(sizes) > 1:
            raise ValueError(f"parts: expected the same number of examples in all, got {sorted(sizes)}")
        z = jnp.concatenate([array.reshape(array.shape[0], -1) for array in arrays], axis=1)
        return z.reshape(-1, *self.latent_shape)
