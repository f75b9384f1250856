"""Linear maps whose induced norm bounds a layer: dense, and zero-padded convolution.

A map knows the shapes of its kernel, of its input and of its output, how to
apply itself to a batch, and how to act on one vector and transpose that action,
which is all that power iteration needs. It holds no numbers: the kernel is
passed in. A 1x1 convolution acts on each pixel alone: its power iteration is
that of its [I, O] matrix, of which the image has `copies`.

Two families of induced norms have closed forms. The extreme points of the
1-norm's unit ball are the unit vectors, so

    ||W||_{1->q} = max_j ||W e_j||_q,    ||W||_{p->inf} = ||W^T||_{1->p*} = max_i ||W^T e_i||_{p*}

are largest norms of columns and of rows; for a convolution over all positions
of the kernel on the image, parts of it outside.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.functional.convolution import MATMUL_DTYPES, conv2d
from resflow_jax.functional.vector_norms import Order, conjugate, vector_norm

Array = jax.Array


@dataclass(frozen=True)
class DenseMap:
    """x -> x @ kernel on [B, features_in], kernel [features_in, features_out].

    The map of a batch multiplies in `matmul_dtype` (see `conv2d`); its norm is measured in the kernel's own.
    """

    features_in: int
    features_out: int
    matmul_dtype: str | None = None

    def __post_init__(self):
        check_count("features_in", self.features_in, 1)
        check_count("features_out", self.features_out, 1)
        check_choice("matmul_dtype", self.matmul_dtype, MATMUL_DTYPES)

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
    def example_shape(self) -> tuple[int, ...]:
        """Shape of what one example becomes."""
        return (self.features_out,)

    @property
    def copies(self) -> int:
        """How many times the map holds the one between `input_shape` and `output_shape`."""
        return 1

    def __call__(self, kernel: Array, x: Array) -> Array:
        if x.ndim != 2:
            raise ValueError(f"x: expected rank 2 [B, {self.features_in}], got shape {x.shape}")
        if self.matmul_dtype is None:
            return x @ kernel
        return conv2d(x[:, None, None], kernel[None, None], matmul_dtype=self.matmul_dtype)[:, 0, 0]

    def matvec(self, kernel: Array, v: Array) -> Array:
        """W v for one vector of `input_shape`."""
        return v @ kernel

    def rmatvec(self, kernel: Array, u: Array) -> Array:
        """W^T u for one vector of `output_shape`."""
        return kernel @ u

    def column_norms(self, kernel: Array, codomain: Order) -> Array:
        """||W e_j|| in the order `codomain` for every input j, [features_in, 1]; differentiable in kernel and order."""
        return vector_norm(kernel, codomain, axis=1)[:, None]

    def row_norms(self, kernel: Array, domain: Order) -> Array:
        """||W^T e_i|| in the order conjugate to `domain` for every output i, [features_out]; likewise."""
        return vector_norm(kernel, conjugate(domain), axis=0)


@dataclass(frozen=True)
class ConvMap:
    """x -> conv2d(x, kernel) on [B, *size, channels_in], kernel [k, k, channels_in, channels_out].

    The map of a batch multiplies in `matmul_dtype` (see `conv2d`); its norm is measured in the kernel's own.
    """

    size: tuple[int, int]
    channels_in: int
    channels_out: int
    kernel_size: int = 3
    matmul_dtype: str | None = None

    def __post_init__(self):
        if not isinstance(self.size, tuple) or len(self.size) != 2:
            raise ValueError(f"size: expected (H, W), got {self.size!r}")
        for side in self.size:
            check_count("size", side, 1)
        check_count("channels_in", self.channels_in, 1)
        check_count("channels_out", self.channels_out, 1)
        check_count("kernel_size", self.kernel_size, 1)
        check_choice("matmul_dtype", self.matmul_dtype, MATMUL_DTYPES)

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
    def example_shape(self) -> tuple[int, ...]:
        """Shape of what one example becomes."""
        return *self.size, self.channels_out

    @property
    def copies(self) -> int:
        """How many times the map holds the one between `input_shape` and `output_shape`: H W for a 1x1 kernel."""
        return self.size[0] * self.size[1] if self.kernel_size == 1 else 1

    def __call__(self, kernel: Array, x: Array) -> Array:
        return conv2d(x, kernel, matmul_dtype=self.matmul_dtype)

    def matvec(self, kernel: Array, v: Array) -> Array:
        """W v for one vector of `input_shape`."""
        return v @ kernel[0, 0] if self.kernel_size == 1 else conv2d(v[None], kernel)[0]

    def rmatvec(self, kernel: Array, u: Array) -> Array:
        """W^T u for one vector of `output_shape`: convolution with the flipped, transposed kernel."""
        if self.kernel_size == 1:
            return kernel[0, 0] @ u
        return conv2d(u[None], kernel[::-1, ::-1].swapaxes(2, 3))[0]

    def column_norms(self, kernel: Array, codomain: Order) -> Array:
        """The largest ||W e_j|| in the order `codomain` of each input channel, over all pixels, [channels_in, 1].

        The zero padding is included; differentiable in the kernel and in the order.
        """
        columns = [vector_norm(part, codomain, axis=(0, 1, 3)) for part in self._parts(kernel)]
        return jnp.max(jnp.stack(columns), axis=0)[:, None]

    def row_norms(self, kernel: Array, domain: Order) -> Array:
        """The largest ||W^T e_i|| in the order conjugate to `domain` of each output channel, [channels_out]."""
        rows = [vector_norm(part, conjugate(domain), axis=(0, 1, 2)) for part in self._parts(kernel)]
        return jnp.max(jnp.stack(rows), axis=0)

    def _parts(self, kernel: Array) -> list[Array]:
        """The parts of the kernel that lie inside the image at some pixel: all of it alone, if it fits."""
        down, across = (tap_windows(self.kernel_size, size) for size in self.size)
        return [kernel[rows, columns] for rows in down for columns in across]


def tap_windows(taps: int, size: int) -> list[slice]:
    """The largest ranges of taps that fall on `size` pixels, centred on one of them."""
    if size >= taps:
        return [slice(0, taps)]  # no part of a vector has a larger norm
    ends = range(taps // 2 + 1, taps // 2 + size + 1)
    return [slice(max(0, end - size), min(taps, end)) for end in ends]


LinearMap = DenseMap | ConvMap
