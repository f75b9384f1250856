"""Convolution in one, two or three spatial dimensions, with a fast lowering for each platform.

    out[b, i, j, o] = sum_{di, dj, c} x[b, i + di - kh//2, j + dj - kw//2, c] * kernel[di, dj, c, o]

in two dimensions, and likewise in one and three. Channels are last, kernels have odd sides, the stride is one, and the
output has the input's spatial size. Beyond the ends of the grid x is zero, or periodic with `padding="periodic"`. On
TPUs the lowering is one `lax.conv_general_dilated`. XLA's convolution on a CPU, above all its weight gradient, is up
to ten times slower than a matrix product, so there the sum is one matrix product:

  fewer channels in:   concatenate the kh*kw shifted copies of x, axis by axis, then one product;
  fewer channels out:  one product to kh*kw*O channels, then add the shifted copies.

In three dimensions, for 27 taps, this is up to 30 times faster than XLA if one side has one channel, and three times
faster for 16 channels on both sides and 8^3 pixels. On 16^3 pixels the copies exceed the cache, and it is slower by a
factor below two.

On a GPU the sum is a matrix product where one side has few channels, so that its copies have no more channels than the
other side, as in the first and last convolution of a residual block. One H100 takes 1.1 to 1.8 times as long for the
vjp of a block of 512 hidden channels by cuDNN's convolutions. Other convolutions there are cuDNN's. With a kernel for
each example, under `vmap`, every platform takes products: a grouped convolution would be far slower.

`convolve` and its derivative in the kernel are two bilinear JAX primitives. Every derivative of either, of any order,
is one of the two again, in its fast form, and needs only x and the kernel. With either padding, the transpose in x is
the convolution with the reflected kernel and the same padding.

Products have the precision of `jax.default_matmul_precision` at the time of tracing, and so have their derivatives.
With `matmul_dtype` the factors of every product, also in derivatives, are rounded to that dtype (bfloat16: 8 bits), and
sums are in float32.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.batch_axes import vary_alike
from resflow_jax.functional.checks import check_choice
from resflow_jax.functional.primitives.jax_internals import Primitive, ad, batching, mlir

Array = jax.Array

MATMUL_DTYPES = (None, "bfloat16")
PADDINGS = ("zero", "periodic")


def convolve(x: Array, kernel: Array, *, padding: str = "zero", matmul_dtype: str | None = None) -> Array:
    """Convolves x [B, *size, I] with kernel [*sides, I, O] (odd sides) to [B, *size, O], of their common dtype.

    Args:
      x: floats on a grid of one, two or three dimensions.
      kernel: floats with as many spatial axes. It may be larger than the grid.
      padding: "zero" or "periodic": the values beyond the ends of the grid.
      matmul_dtype: dtype of the factors of products: None (that of x and kernel) or "bfloat16".

    Raises:
      ValueError: for wrong ranks, different channel counts, an even side, or an unknown choice.
    """
    if x.ndim not in (3, 4, 5):
        raise ValueError(f"x: expected rank 3, 4 or 5 [B, *size, C], got shape {x.shape}")
    if kernel.ndim != x.ndim or any(side % 2 == 0 for side in kernel.shape[:-2]):
        names = ["k", "kh, kw", "kd, kh, kw"][x.ndim - 3]
        raise ValueError(f"kernel: expected [{names}, I, O] with odd {names}, got shape {kernel.shape}")
    if kernel.shape[-2] != x.shape[-1]:
        raise ValueError(f"kernel: expected {x.shape[-1]} input channels (those of x), got {kernel.shape[-2]}")
    check_choice("padding", padding, PADDINGS)
    check_choice("matmul_dtype", matmul_dtype, MATMUL_DTYPES)
    dtype = jnp.result_type(x, kernel)
    precision = jax.config.jax_default_matmul_precision
    return _convolve(x.astype(dtype), kernel.astype(dtype), False, padding, matmul_dtype, precision)


def conv2d(x: Array, kernel: Array, *, matmul_dtype: str | None = None) -> Array:
    """`convolve` of images x [B, H, W, I] with kernel [kh, kw, I, O], zero beyond the border."""
    if x.ndim != 4:
        raise ValueError(f"x: expected rank 4 [B, H, W, C], got shape {x.shape}")
    return convolve(x, kernel, matmul_dtype=matmul_dtype)


def reflected_kernel(kernel: Array) -> Array:
    """The kernel of the transposed convolution: flipped on every spatial axis, with I and O swapped."""
    return kernel[(slice(None, None, -1),) * (kernel.ndim - 2)].swapaxes(-2, -1)


# The primitives are out = convolve(x, kernel), with the flag `reflected` for its transpose in x, convolve(x,
# reflected_kernel(kernel)); and kernel_bar with <kernel_bar, kernel> = <y, convolve(x, kernel)>. The transpose is a
# flag because XLA would copy a transposed matrix in every iteration of a loop.
_convolve_p = Primitive("convolve")
_correlate_p = Primitive("correlate")


def _convolve(
    x: Array, kernel: Array, reflected: bool, padding: str, matmul_dtype: str | None, precision: str | None
) -> Array:
    x, kernel = vary_alike(x, kernel)
    options = {"padding": padding, "matmul_dtype": matmul_dtype, "precision": precision}
    return _convolve_p.bind(x, kernel, reflected=reflected, **options)


def _correlate(
    x: Array, y: Array, sides: tuple[int, ...], padding: str, matmul_dtype: str | None, precision: str | None
) -> Array:
    x, y = vary_alike(x, y)
    options = {"padding": padding, "matmul_dtype": matmul_dtype, "precision": precision}
    return _correlate_p.bind(x, y, sides=sides, **options)


def convolve_lax(
    x: Array, kernel: Array, *, reflected: bool = False, padding: str = "zero", matmul_dtype: str | None = None
) -> Array:
    """`convolve` by one convolution instruction, as on TPUs, or by a matrix product for a single tap."""
    sides = kernel.shape[:-2]
    if math.prod(sides) == 1:
        return convolve_matmul(x, kernel, reflected=reflected, matmul_dtype=matmul_dtype)
    kernel = reflected_kernel(kernel) if reflected else kernel
    axes = "HWD"[: len(sides)]
    periodic = padding == "periodic"
    return lax.conv_general_dilated(
        *_factors(_padded(x, sides, padding) if periodic else x, kernel, matmul_dtype),
        window_strides=(1,) * len(sides),
        padding="VALID" if periodic else "SAME",
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        preferred_element_type=_sum_dtype(x, matmul_dtype),
    ).astype(x.dtype)


def correlate_lax(
    x: Array, y: Array, *, sides: tuple[int, ...], padding: str = "zero", matmul_dtype: str | None = None
) -> Array:
    """The derivative of `convolve` in the kernel by a convolution over the batch, as on TPUs, [*sides, I, O]."""
    if math.prod(sides) == 1:
        return correlate_matmul(x, y, sides=sides, matmul_dtype=matmul_dtype)
    axes = "HWD"[: len(sides)]
    periodic = padding == "periodic"
    return lax.conv_general_dilated(
        *_factors(_padded(x, sides, padding) if periodic else x, y, matmul_dtype),
        window_strides=(1,) * len(sides),
        padding="VALID" if periodic else [(side // 2, side // 2) for side in sides],
        dimension_numbers=(f"C{axes}N", f"I{axes}O", f"{axes}NC"),
        preferred_element_type=_sum_dtype(x, matmul_dtype),
    ).astype(x.dtype)


def convolve_matmul(
    x: Array, kernel: Array, *, reflected: bool = False, padding: str = "zero", matmul_dtype: str | None = None
) -> Array:
    """`convolve` on a CPU: one matrix product, and shifted copies of the side with fewer channels."""
    *sides, channels_in, channels_out = kernel.shape
    if math.prod(sides) == 1:
        return _outer(x, kernel[(0,) * len(sides)], matmul_dtype, transposed=reflected)
    if reflected:
        kernel, channels_in, channels_out = reflected_kernel(kernel), channels_out, channels_in
    if channels_in <= channels_out:
        return _outer(_patches(x, sides, padding), kernel.reshape(-1, channels_out), matmul_dtype)
    to_all_taps = jnp.moveaxis(kernel, -2, 0).reshape(channels_in, -1)
    all_taps = _padded(_outer(x, to_all_taps, matmul_dtype), sides, padding)
    taps = jnp.split(all_taps, math.prod(sides), axis=-1)
    return sum(_window(tap, offset, x.shape[1:-1]) for tap, offset in zip(taps, np.ndindex(*sides), strict=True))


def correlate_matmul(
    x: Array, y: Array, *, sides: tuple[int, ...], padding: str = "zero", matmul_dtype: str | None = None
) -> Array:
    """The derivative of `convolve` in the kernel on a CPU: one matrix product, with patches of the thinner side."""
    channels_in, channels_out = x.shape[-1], y.shape[-1]
    if channels_in <= channels_out or math.prod(sides) == 1:
        return _inner(_patches(x, sides, padding), y, matmul_dtype).reshape(*sides, channels_in, channels_out)
    flipped = _inner(_patches(y, sides, padding), x, matmul_dtype).reshape(*sides, channels_out, channels_in)
    return reflected_kernel(flipped)


def convolve_gpu(x: Array, kernel: Array, *, reflected: bool = False, **options: Any) -> Array:
    """`convolve` on a GPU: as on a CPU if one side has few channels, otherwise as on a TPU."""
    form = convolve_matmul if _has_thin_side(*kernel.shape) else convolve_lax
    return form(x, kernel, reflected=reflected, **options)


def correlate_gpu(x: Array, y: Array, *, sides: tuple[int, ...], **options: Any) -> Array:
    """The derivative of `convolve` in the kernel on a GPU: as on a CPU or as on a TPU, like `convolve_gpu`."""
    form = correlate_matmul if _has_thin_side(*sides, x.shape[-1], y.shape[-1]) else correlate_lax
    return form(x, y, sides=sides, **options)


def _has_thin_side(*shape: int) -> bool:
    """Whether all taps of the side with fewer channels are no more channels than the other side; shape of a kernel."""
    *sides, channels_in, channels_out = shape
    return math.prod(sides) * min(channels_in, channels_out) <= max(channels_in, channels_out)


def _patches(x: Array, sides: Sequence[int], padding: str) -> Array:
    """[B, *size, taps * C]: the neighbourhood of every pixel, with the taps in the order of a kernel's axes.

    Copies along one axis after the other, the last one first, are fewer than one for each tap, and their runs of
    neighbouring numbers are longer. That is up to twice as fast, and XLA compiles half as many kernels.
    """
    for axis in reversed(range(len(sides))):
        along = [sides[axis] if n == axis else 1 for n in range(len(sides))]
        if sides[axis] > 1:
            padded, size = _padded(x, along, padding), x.shape[1:-1]
            x = jnp.concatenate([_window(padded, offset, size) for offset in np.ndindex(*along)], axis=-1)
    return x


def _window(padded: Array, offset: Sequence[int], size: Sequence[int]) -> Array:
    """x[b, i + di - kh//2, j + dj - kw//2, c] of the padded x for one offset (di, dj) of the kernel."""
    return padded[:, *(slice(d, d + n) for d, n in zip(offset, size, strict=True))]


def _padded(x: Array, sides: Sequence[int], padding: str) -> Array:
    """x padded by half of the kernel on both ends of each axis."""
    widths = ((0, 0), *((side // 2, side // 2) for side in sides), (0, 0))
    return jnp.pad(x, widths, mode="wrap" if padding == "periodic" else "constant")


def _outer(x: Array, matrix: Array, matmul_dtype: str | None, *, transposed: bool = False) -> Array:
    """x @ matrix, or x @ matrix^T, for every pixel."""
    product = _matmul(x.reshape(-1, x.shape[-1]), matrix, (1,), (int(transposed),), matmul_dtype)
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _inner(a: Array, b: Array, matmul_dtype: str | None) -> Array:
    """sum_pixels a^T b, [channels of a, channels of b]."""
    if matmul_dtype is None:
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    # Without the reshape XLA would transpose a. With rounded factors, its product along the first of two axes is slow.
    pixels = tuple(range(a.ndim - 1))
    return _matmul(a, b, pixels, pixels, matmul_dtype)


def _matmul(a: Array, b: Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...], matmul_dtype: str | None) -> Array:
    product = lax.dot_general(
        *_factors(a, b, matmul_dtype),
        ((a_axes, b_axes), ((), ())),
        preferred_element_type=_sum_dtype(a, matmul_dtype),
    )
    return product.astype(a.dtype)


def _factors(a: Array, b: Array, matmul_dtype: str | None) -> tuple[Array, Array]:
    return (a, b) if matmul_dtype is None else (a.astype(matmul_dtype), b.astype(matmul_dtype))


def _sum_dtype(a: Array, matmul_dtype: str | None):
    return a.dtype if matmul_dtype is None else jnp.float32


def _convolve_aval(x, kernel, *, reflected, **_):
    return x.update(shape=(*x.shape[:-1], kernel.shape[-2 if reflected else -1]), weak_type=False)


def _correlate_aval(x, y, *, sides, **_):
    return x.update(shape=(*sides, x.shape[-1], y.shape[-1]), weak_type=False)


_STATIC = "sides", "reflected", "padding", "matmul_dtype", "precision"


def _at_precision(lowering):
    """The lowering with the precision that JAX had when the operation was traced; by now it may have another one."""

    def lower(*arguments, precision, **params):
        with jax.default_matmul_precision(precision):
            return lowering(*arguments, **params)

    return lower


def _at_once(compiled, forms, *arguments, **params):
    """Evaluates a primitive outside of any program. With jax.disable_jit `compiled` would call the primitive."""
    if not jax.config.jax_disable_jit:
        return compiled(*arguments, **params)
    return forms.get(jax.default_backend(), forms["default"])(*arguments, **params)


def _batch(products, arguments, axes, **params):
    """vmap of the products, with a kernel for each example."""
    return jax.vmap(partial(products, **params), axes)(*arguments), 0


def _batch_convolve(arguments, axes, **params):
    (x, kernel), (axis, kernel_axis) = arguments, axes
    if kernel_axis is not None:
        return _batch(_convolve_forms["cpu"], arguments, axes, **params)
    x = jnp.moveaxis(x, axis, 0)
    out = _convolve(x.reshape(-1, *x.shape[2:]), kernel, **params)
    return out.reshape(*x.shape[:2], *out.shape[1:]), 0


def _forms(**forms):
    return {platform: _at_precision(form) for platform, form in forms.items()}


_convolve_forms = _forms(cpu=convolve_matmul, gpu=convolve_gpu, default=convolve_lax)
_correlate_forms = _forms(cpu=correlate_matmul, gpu=correlate_gpu, default=correlate_lax)
for _primitive, _of_platform, _aval in (
    (_convolve_p, _convolve_forms, _convolve_aval),
    (_correlate_p, _correlate_forms, _correlate_aval),
):
    _primitive.def_impl(partial(_at_once, jax.jit(_primitive.bind, static_argnames=_STATIC), _of_platform))
    _primitive.def_abstract_eval(_aval)
    for _platform, _form in _of_platform.items():
        _rule = mlir.lower_fun(_form, multiple_results=False)
        mlir.register_lowering(_primitive, _rule, platform=None if _platform == "default" else _platform)
    batching.primitive_batchers[_primitive] = partial(_batch, _of_platform["cpu"])
batching.primitive_batchers[_convolve_p] = _batch_convolve


def _convolve_transpose_x(ct, x, kernel, *, reflected, **options):
    return _convolve(ct, kernel, not reflected, **options)


def _convolve_transpose_kernel(ct, x, kernel, *, reflected, **options):
    x, y = (ct, x) if reflected else (x, ct)
    return _correlate(x, y, kernel.aval.shape[:-2], **options)


ad.defbilinear(_convolve_p, _convolve_transpose_x, _convolve_transpose_kernel)
ad.defbilinear(
    _correlate_p,
    lambda ct, x, y, *, sides, **options: _convolve(y, ct, True, **options),
    lambda ct, x, y, *, sides, **options: _convolve(x, ct, False, **options),
)
