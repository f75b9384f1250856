"""The linear maps of layers: dense, and convolution with zero or periodic padding.

A map holds shapes and options but no numbers: the kernel is an argument of its methods. It applies a kernel to a batch,
and it applies the operator and its transpose to one vector, which is what power iteration needs. A convolution with a
single tap acts on each pixel independently. Its power iteration runs on the [I, O] matrix of one pixel, and `copies` is
the number of pixels.

Two families of induced norms have closed forms. The extreme points of the 1-norm's unit ball are the unit vectors (up
to sign), so

    ||W||_{1->q} = max_j ||W e_j||_q,    ||W||_{p->inf} = ||W^T||_{1->p*} = max_i ||W^T e_i||_{p*}

are the largest norms of columns and of rows. For a zero-padded convolution the maximum runs over all positions of the
kernel on the grid, with the taps cut off that lie outside. With periodic padding all positions are alike. If the kernel
is larger than a periodic grid, taps that fall on the same pixel are added.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.functional.primitives.convolution import MATMUL_DTYPES, PADDINGS, conv2d, convolve, reflected_kernel
from resflow_jax.functional.vector_norms import Order, conjugate, vector_norm

Array = jax.Array


@dataclass(frozen=True)
class DenseMap:
    """The dense map x -> x @ kernel, from [..., features_in] to [..., features_out].

    It has no parameters: call it with a kernel [features_in, features_out] and x, floats of the same dtype.

    Attributes:
      features_in: length of the last axis of x.
      features_out: length of the last axis of the result.
      matmul_dtype: None, or "bfloat16" to round the factors of the product of a batch; sums are in float32. Norms are
        computed in the kernel's dtype.

    Raises:
      ValueError: for a count below one, an unknown `matmul_dtype`, or, when called, another last axis of x.

    Example:
      >>> linear_map = rf.DenseMap(2, 3)
      >>> kernel = jnp.ones(linear_map.kernel_shape)
      >>> linear_map(kernel, jnp.ones((5, 2))).shape
      (5, 3)
      >>> round(rf.spectral_norm_bound(linear_map, kernel), 4)   # sqrt(6)
      2.4495
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
        """Shape of the result for one example, without leading axes."""
        return (self.features_out,)

    @property
    def copies(self) -> int:
        """Number of copies of the map between `input_shape` and `output_shape` that the whole map consists of: one."""
        return 1

    def __call__(self, kernel: Array, x: Array) -> Array:
        _check_arrays(kernel, x)
        if x.ndim < 1 or x.shape[-1] != self.features_in:
            raise ValueError(f"x: expected [..., {self.features_in}], got shape {x.shape}")
        if self.matmul_dtype is None:
            return x @ kernel
        rows = x.reshape(-1, self.features_in)
        y = conv2d(rows[:, None, None], kernel[None, None], matmul_dtype=self.matmul_dtype)[:, 0, 0]
        return y.reshape(*x.shape[:-1], self.features_out)

    def matvec(self, kernel: Array, v: Array) -> Array:
        """W v for one vector of `input_shape`."""
        return v @ kernel

    def rmatvec(self, kernel: Array, u: Array) -> Array:
        """W^T u for one vector of `output_shape`."""
        return kernel @ u

    def inner(self, kernel: Array, u: Array, v: Array) -> Array:
        """<u, W v>, as one sum over the kernel, which compiles faster than two products, and so does its gradient."""
        return jnp.sum(kernel * (v[:, None] * u[None]))

    def column_norms(self, kernel: Array, codomain: Order) -> Array:
        """||W e_j|| in the order `codomain` for every input j, [features_in, 1]. Differentiable in kernel and order."""
        return vector_norm(kernel, codomain, axis=1)[:, None]

    def row_norms(self, kernel: Array, domain: Order) -> Array:
        """||W^T e_i|| in the order conjugate to `domain` for every output i, [features_out]. Also differentiable."""
        return vector_norm(kernel, conjugate(domain), axis=0)


@dataclass(frozen=True)
class ConvMap:
    """The convolution x -> convolve(x, kernel), from [B, *size, channels_in] to [B, *size, channels_out].

    It has stride one and no parameters: call it with a kernel [*sides, channels_in, channels_out] and x, floats of the
    same dtype. Its norms are those of the operator on the real grid, not those of the reshaped kernel.

    Attributes:
      size: size of the grid, in one, two or three dimensions.
      channels_in: number of channels of x.
      channels_out: number of channels of the result.
      kernel_size: side of the kernel on every axis, odd, or a tuple with one side for each axis. A side may exceed the
        size of the grid.
      padding: "zero" or "periodic": the values beyond the ends of the grid.
      matmul_dtype: None, or "bfloat16" to round the factors of products of a batch; sums are in float32. Norms are
        computed in the kernel's dtype.

    Raises:
      ValueError: for a count below one, an even side, an unknown choice, or, when called, an x of another shape.

    Example:
      >>> linear_map = rf.ConvMap((4,), 1, 1, padding="periodic")
      >>> kernel = jnp.ones(linear_map.kernel_shape)
      >>> linear_map(kernel, jnp.ones((5, 4, 1))).shape
      (5, 4, 1)
      >>> round(rf.spectral_norm_bound(linear_map, kernel), 4)   # three taps of one, for the constant vector
      3.0
    """

    size: tuple[int, ...]
    channels_in: int
    channels_out: int
    kernel_size: int | tuple[int, ...] = 3
    padding: str = "zero"
    matmul_dtype: str | None = None

    def __post_init__(self):
        if not isinstance(self.size, tuple) or len(self.size) not in (1, 2, 3):
            raise ValueError(f"size: expected a tuple of one, two or three sides, got {self.size!r}")
        for side in self.size:
            check_count("size", side, 1)
        check_count("channels_in", self.channels_in, 1)
        check_count("channels_out", self.channels_out, 1)
        if isinstance(self.kernel_size, tuple) and len(self.kernel_size) != len(self.size):
            raise ValueError(
                f"kernel_size: expected a number or {len(self.size)} of them, one for each axis of size {self.size}, "
                f"got {self.kernel_size}"
            )
        for side in self.sides:
            check_count("kernel_size", side, 1)
            if side % 2 == 0:
                raise ValueError(f"kernel_size: expected odd sides, got {self.kernel_size}")
        check_choice("padding", self.padding, PADDINGS)
        check_choice("matmul_dtype", self.matmul_dtype, MATMUL_DTYPES)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides of the kernel, one for each axis of the grid."""
        return self.kernel_size if isinstance(self.kernel_size, tuple) else (self.kernel_size,) * len(self.size)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return *self.sides, self.channels_in, self.channels_out

    @property
    def is_pixelwise(self) -> bool:
        """Whether the kernel has a single tap."""
        return math.prod(self.sides) == 1

    @property
    def _grid(self) -> tuple[int, ...]:
        return () if self.is_pixelwise else self.size

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the vector v on which the norm is measured: (I,) for a kernel of one tap, else (*size, I)."""
        return *self._grid, self.channels_in

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the vector u = W v / |W v|: (O,) for a kernel of one tap, else (*size, O)."""
        return *self._grid, self.channels_out

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of the result for one example, without the batch axis."""
        return *self.size, self.channels_out

    @property
    def copies(self) -> int:
        """Number of copies of the map between `input_shape` and `output_shape`: the pixels, for one tap; else one."""
        return math.prod(self.size) if self.is_pixelwise else 1

    def __call__(self, kernel: Array, x: Array) -> Array:
        _check_arrays(kernel, x)
        shape = *self.size, self.channels_in
        if x.shape[1:] != shape:
            raise ValueError(f"x: expected [B, {', '.join(map(str, shape))}], got shape {x.shape}")
        return convolve(x, kernel, padding=self.padding, matmul_dtype=self.matmul_dtype)

    def matvec(self, kernel: Array, v: Array) -> Array:
        """W v for one vector of `input_shape`."""
        if self.is_pixelwise:
            return v @ kernel[(0,) * len(self.size)]
        return convolve(v[None], kernel, padding=self.padding)[0]

    def rmatvec(self, kernel: Array, u: Array) -> Array:
        """W^T u for one vector of `output_shape`: convolution with the flipped, transposed kernel."""
        if self.is_pixelwise:
            return kernel[(0,) * len(self.size)] @ u
        return convolve(u[None], reflected_kernel(kernel), padding=self.padding)[0]

    def inner(self, kernel: Array, u: Array, v: Array) -> Array:
        """<u, W v> for one vector of `output_shape` and one of `input_shape`."""
        return jnp.vdot(u, self.matvec(kernel, v))

    def column_norms(self, kernel: Array, codomain: Order) -> Array:
        """The largest ||W e_j|| over all pixels, in the order `codomain`, for each input channel: [channels_in, 1].

        It takes the padding into account, and is differentiable in the kernel and in the order.
        """
        axes = *range(len(self.size)), len(self.size) + 1
        columns = [vector_norm(part, codomain, axis=axes) for part in self._parts(kernel)]
        return jnp.max(jnp.stack(columns), axis=0)[:, None]

    def row_norms(self, kernel: Array, domain: Order) -> Array:
        """The largest ||W^T e_i|| over all pixels, in the order conjugate to `domain`: [channels_out]."""
        axes = tuple(range(len(self.size) + 1))
        rows = [vector_norm(part, conjugate(domain), axis=axes) for part in self._parts(kernel)]
        return jnp.max(jnp.stack(rows), axis=0)

    def _parts(self, kernel: Array) -> list[Array]:
        """The parts of the kernel that pixels of the grid see, each once: the whole kernel if it fits on the grid."""
        if self.padding == "periodic":
            return [folded_kernel(kernel, self.size)]
        windows = itertools.product(*map(tap_windows, self.sides, self.size))
        return [kernel[window] for window in windows]


def tap_windows(taps: int, size: int) -> list[slice]:
    """The largest ranges of taps that fall on `size` pixels, centred on one of them."""
    if size >= taps:
        return [slice(0, taps)]  # a pixel in the middle sees all taps; parts of a vector have no larger norm
    ends = range(taps // 2 + 1, taps // 2 + size + 1)
    return [slice(max(0, end - size), min(taps, end)) for end in ends]


def folded_kernel(kernel: Array | np.ndarray, size: Sequence[int]) -> Array | np.ndarray:
    """The kernel [*sides, I, O] on a periodic grid: taps that fall on the same pixel are added, so sides <= size.

    The result is shifted along the axes, which does not change norms.
    """
    numpy = np if isinstance(kernel, np.ndarray) else jnp
    for axis, n in enumerate(size):
        turns = -(-kernel.shape[axis] // n)
        if turns > 1:
            widths = [(0, turns * n - kernel.shape[axis] if a == axis else 0) for a in range(kernel.ndim)]
            padded = numpy.pad(kernel, widths)
            kernel = padded.reshape(*kernel.shape[:axis], turns, n, *kernel.shape[axis + 1 :]).sum(axis)
    return kernel


LinearMap = DenseMap | ConvMap


def _check_arrays(kernel: Array, x: Array) -> None:
    for name, array in {"kernel": kernel, "x": x}.items():
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise ValueError(f"{name}: expected a float array, got {type(array).__name__}")
