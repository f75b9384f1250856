"""Linear maps whose induced norm bounds a layer: dense, and convolution with zero or periodic padding.

A map knows the shapes of its kernel, of its input and of its output, how to
apply itself to a batch, and how to act on one vector and transpose that action,
which is all that power iteration needs. It holds no numbers: the kernel is
passed in. A convolution whose kernel has one tap acts on each pixel alone: its power
iteration is that of its [I, O] matrix, of which the grid has `copies`.

Two families of induced norms have closed forms. The extreme points of the
1-norm's unit ball are the unit vectors, so

    ||W||_{1->q} = max_j ||W e_j||_q,    ||W||_{p->inf} = ||W^T||_{1->p*} = max_i ||W^T e_i||_{p*}

are largest norms of columns and of rows; for a zero-padded convolution over all positions
of the kernel on the grid, parts of it outside. With periodic padding every position sees the same:
the whole kernel, with those taps added up that fall on one pixel of a grid smaller than the kernel.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from resflow_jax.functional.checks import check_choice, check_count
from resflow_jax.functional.convolution import MATMUL_DTYPES, PADDINGS, conv2d, convolve, reflected_kernel
from resflow_jax.functional.vector_norms import Order, conjugate, vector_norm

Array = jax.Array


@dataclass(frozen=True)
class DenseMap:
    """x -> x @ kernel on [..., features_in], kernel [features_in, features_out].

    The map of a batch multiplies in `matmul_dtype` (see `convolve`); its norm is measured in the kernel's own.

    Raises:
      ValueError: for a count below one, an unknown `matmul_dtype`, or, when called, another last axis.
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
        """||W e_j|| in the order `codomain` for every input j, [features_in, 1]; differentiable in kernel and order."""
        return vector_norm(kernel, codomain, axis=1)[:, None]

    def row_norms(self, kernel: Array, domain: Order) -> Array:
        """||W^T e_i|| in the order conjugate to `domain` for every output i, [features_out]; likewise."""
        return vector_norm(kernel, conjugate(domain), axis=0)


@dataclass(frozen=True)
class ConvMap:
    """x -> convolve(x, kernel) on [B, *size, channels_in], kernel [*sides, channels_in, channels_out].

    The map of a batch multiplies in `matmul_dtype` (see `convolve`); its norm is measured in the kernel's own.

    Attributes:
      size: of the grid, in one, two or three dimensions.
      channels_in: number of channels of x.
      channels_out: number of channels of what comes out.
      kernel_size: side of the kernel on every axis, odd; or a tuple, one for each axis. It may exceed the grid's.
      padding: "zero" or "periodic": what is beyond the ends of the grid.
      matmul_dtype: None or "bfloat16".

    Raises:
      ValueError: for a count below one, an even side, an unknown choice, or, when called, an x of another shape.
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
        """Those of the kernel, one for each axis of the grid."""
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
        """Shape of what one example becomes."""
        return *self.size, self.channels_out

    @property
    def copies(self) -> int:
        """How many times the map holds the one between `input_shape` and `output_shape`: once a pixel for one tap."""
        return math.prod(self.size) if self.is_pixelwise else 1

    def __call__(self, kernel: Array, x: Array) -> Array:
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
        """The largest ||W e_j|| in the order `codomain` of each input channel, over all pixels, [channels_in, 1].

        The padding is included; differentiable in the kernel and in the order.
        """
        axes = *range(len(self.size)), len(self.size) + 1
        columns = [vector_norm(part, codomain, axis=axes) for part in self._parts(kernel)]
        return jnp.max(jnp.stack(columns), axis=0)[:, None]

    def row_norms(self, kernel: Array, domain: Order) -> Array:
        """The largest ||W^T e_i|| in the order conjugate to `domain` of each output channel, [channels_out]."""
        axes = tuple(range(len(self.size) + 1))
        rows = [vector_norm(part, conjugate(domain), axis=axes) for part in self._parts(kernel)]
        return jnp.max(jnp.stack(rows), axis=0)

    def _parts(self, kernel: Array) -> list[Array]:
        """What the kernel is at the pixels of the grid, without repetition; all of it alone, if it fits."""
        if self.padding == "periodic":
            return [folded_kernel(kernel, self.size)]
        windows = itertools.product(*map(tap_windows, self.sides, self.size))
        return [kernel[window] for window in windows]


def tap_windows(taps: int, size: int) -> list[slice]:
    """The largest ranges of taps that fall on `size` pixels, centred on one of them."""
    if size >= taps:
        return [slice(0, taps)]  # no part of a vector has a larger norm
    ends = range(taps // 2 + 1, taps // 2 + size + 1)
    return [slice(max(0, end - size), min(taps, end)) for end in ends]


def folded_kernel(kernel: Array | np.ndarray, size: Sequence[int]) -> Array | np.ndarray:
    """The kernel [*sides, I, O] with taps added up that fall on one pixel of a periodic grid: at most `size` of them.

    What is left of an axis is shifted, which changes no norm.
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
