"""What configs and their flows share: checks, and what follows from the shape of the events of a recipe."""

import math
from typing import Any, get_args

from flax import nnx

from resflow_jax.functional.checks import as_shape, check_count, check_type
from resflow_jax.layers.couplings.conditioners import CNNConditioner, MLPConditioner, ResNetConditioner
from resflow_jax.models.groups import ImageTransform, VectorTransform

Network = MLPConditioner | CNNConditioner | ResNetConditioner


class OfEvents:
    """Base of a frozen config that has `shape`, the shape of one x: (D,) or (H, W, C)."""

    shape: tuple[int, ...]

    @property
    def dim(self) -> int:
        """D, the number of elements of one x."""
        return math.prod(self.shape)

    @property
    def is_flat(self) -> bool:
        """Whether the layers act on vectors."""
        return len(self.shape) == 1 or isinstance(self.conditioner, MLPConditioner)


def check_shape_and_data(config: Any) -> None:
    """Checks `shape`, `data` and `condition_dim` of a frozen config, in place.

    A plain `VectorTransform()`, the default of `data`, stands for an `ImageTransform()` where the events are images.
    """
    object.__setattr__(config, "shape", as_event_shape(config.shape))
    is_image = len(config.shape) == 3
    if is_image and config.data == VectorTransform():
        object.__setattr__(config, "data", ImageTransform())
    check_type("data", config.data, ImageTransform if is_image else VectorTransform)
    if not is_image and isinstance(config.data, ImageTransform):
        raise ValueError("data: expected VectorTransform for vectors, got ImageTransform")
    config.data.check_channels(config.shape[-1])
    if config.condition_dim is not None:
        check_count("condition_dim", config.condition_dim, 1)


def check_network(config: Any) -> None:
    """Checks that `conditioner` of a config fits its events."""
    network = config.conditioner
    if not isinstance(network, get_args(Network)):
        expected = " or ".join(kind.__name__ for kind in get_args(Network))
        raise ValueError(f"conditioner: expected {expected}, got {type(network).__name__}")
    if len(config.shape) == 1 and not isinstance(network, MLPConditioner):
        raise ValueError(f"conditioner: expected MLPConditioner for vectors, got {type(network).__name__}")


def check_squeezes(shape: tuple[int, ...], squeezes: int) -> None:
    """Checks that the sides of an image can be halved `squeezes` times."""
    if halvings(shape, squeezes) < squeezes:
        expected = f"height and width divisible by {2**squeezes}, for {squeezes} squeezes"
        raise ValueError(f"shape: expected {expected}, got {shape}")


def check_rngs(rngs: Any) -> None:
    """Raises ValueError unless rngs has a stream for parameters."""
    check_type("rngs", rngs, nnx.Rngs)
    if not hasattr(rngs, "params"):
        raise ValueError("rngs: expected a stream for params, as in nnx.Rngs(0) or nnx.Rngs(params=0), got none")


def halvings(shape: tuple[int, ...], most: int) -> int:
    """How often both sides of an image can be halved, at most `most` times; 0 for vectors."""
    if len(shape) != 3:
        return 0
    return next((n for n in range(most) if shape[0] % 2 ** (n + 1) or shape[1] % 2 ** (n + 1)), most)


def as_event_shape(shape: Any) -> tuple[int, ...]:
    """The shape of vectors or images as a tuple; ValueError for anything else."""
    shape = as_shape("shape", shape)
    if len(shape) not in (1, 3):
        raise ValueError(f"shape: expected (D,) for vectors or (H, W, C) for images, got {shape}")
    return shape
