"""Linear maps whose spectral norm bounds a layer: dense, and zero-padded convolution.

A map knows the shapes of its kernel, of its input and of its output, how to
apply itself to a batch, and how to act on one vector and transpose that action,
which is all that power iteration needs. It holds no numbers: the kernel is
passed in. A 1x1 convolution acts on each pixel alone, so its norm is that of
its [I, O] matrix, whatever the image's size.
"""

from dataclasses import dataclass

import jax

from resflow_jax.functional.convolution import conv2d

Array = jax.Array


@dataclass(frozen=True)
class DenseMap:
    """x -> x @ kernel on the last axis, kernel [features_in, features_out]."""

    features_in: int
    features_out: int

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.features_in, self.features_out

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the vector v on which the norm is measured."""
        return (self.features_in,)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the vector u = W v / |W v|."""
        return (self.features_out,)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one output of the layer."""
        return (self.features_out,)

    def __call__(self, kernel: Array, x: Array) -> Array:
        return x @ kernel

    def matvec(self, kernel: Array, v: Array) -> Array:
        """W v for one vector of `input_shape`."""
        return v @ kernel

    def rmatvec(self, kernel: Array, u: Array) -> Array:
        """W^T u for one vector of `output_shape`."""
        return kernel @ u


@dataclass(frozen=True)
class ConvMap:
    """x -> conv2d(x, kernel) on [B, *size, channels_in], kernel [k, k, channels_in, channels_out]."""

    size: tuple[int, int]
    channels_in: int
    channels_out: int
    kernel_size: int = 3

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.kernel_size, self.kernel_size, self.channels_in, self.channels_out

    @property
    def _grid(self) -> tuple[int, ...]:
        return () if self.kernel_size == 1 else self.size

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the vector v on which the norm is measured: (I,) for a 1x1 kernel, else (H, W, I)."""
        return *self._grid, self.channels_in

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the vector u = W v / |W v|: (O,) for a 1x1 kernel, else (H, W, O)."""
        return *self._grid, self.channels_out

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one output of the layer, which is that of u but for a 1x1 kernel."""
        return *self.size, self.channels_out

    def __call__(self, kernel: Array, x: Array) -> Array:
        return conv2d(x, kernel)

    def matvec(self, kernel: Array, v: Array) -> Array:
        """W v for one vector of `input_shape`."""
        return v @ kernel[0, 0] if self.kernel_size == 1 else conv2d(v[None], kernel)[0]

    def rmatvec(self, kernel: Array, u: Array) -> Array:
        """W^T u for one vector of `output_shape`: convolution with the flipped, transposed kernel."""
        if self.kernel_size == 1:
            return kernel[0, 0] @ u
        return conv2d(u[None], kernel[::-1, ::-1].swapaxes(2, 3))[0]


LinearMap = DenseMap | ConvMap
