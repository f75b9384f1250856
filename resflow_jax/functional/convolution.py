"""Zero-padded 2-D convolution with the lowering that is fast on each platform.

    out[b, i, j, o] = sum_{di, dj, c} x[b, i + di - kh//2, j + dj - kw//2, c] * kernel[di, dj, c, o]

NHWC images, HWIO kernels with odd sides, stride one, output of the input's
spatial size. On accelerators it is one `lax.conv_general_dilated`. XLA's CPU
convolution is up to ten times slower than a matrix product (its weight gradient
above all), so there the same sum is written as one product:

  few channels in:   gather the kh*kw shifted copies of x, then one product;
  few channels out:  one product to kh*kw*O channels, then add the shifted copies.

`conv2d` and its derivative in the kernel are two primitives of JAX, bilinear and closed under
derivatives of any order: every derivative is one of the two again, in the form that is fast, and
nothing but x and the kernel is ever saved for it.

With `matmul_dtype` the factors of every product, those of the derivatives included, are rounded to that
dtype (bfloat16: 8 bits), and added up in float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from resflow_jax.functional.checks import check_choice
from resflow_jax.functional.manual_axes import vary_alike
from resflow_jax.functional.platforms import by_platform

Array = jax.Array

MATMUL_DTYPES = (None, "bfloat16")


def conv2d(x: Array, kernel: Array, *, matmul_dtype: str | None = None) -> Array:
    """Convolves x [B, H, W, I] with kernel [kh, kw, I, O] (odd sides) to [B, H, W, O], of their common dtype.

    Raises ValueError for wrong ranks, channel counts that differ, an even side, or another `matmul_dtype` than
    None (that of x and kernel) and "bfloat16".
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected rank 4 [B, H, W, C], got shape {x.shape}")
    if kernel.ndim != 4 or kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"kernel: expected [kh, kw, I, O] with odd kh, kw, got shape {kernel.shape}")
    if kernel.shape[2] != x.shape[3]:
        raise ValueError(f"kernel: expected {x.shape[3]} input channels (those of x), got {kernel.shape[2]}")
    check_choice("matmul_dtype", matmul_dtype, MATMUL_DTYPES)
    dtype = jnp.result_type(x, kernel)
    return _conv2d(x.astype(dtype), kernel.astype(dtype), False, matmul_dtype)


# The primitives: out = conv2d(x, kernel), or with `reflected` its transpose in x, conv2d(x, _reflected(kernel)); and
# kernel_bar with <kernel_bar, kernel> = <y, conv2d(x, kernel)>. The transpose is a flag, since XLA would copy a
# transposed matrix in every turn of a loop.
_conv2d_p = Primitive("conv2d")
_correlate_p = Primitive("conv2d_correlate")


def _conv2d(x: Array, kernel: Array, reflected: bool, matmul_dtype: str | None) -> Array:
    x, kernel = vary_alike(x, kernel)
    return _conv2d_p.bind(x, kernel, reflected=reflected, matmul_dtype=matmul_dtype)


def _correlate(x: Array, y: Array, sides: tuple[int, int], matmul_dtype: str | None) -> Array:
    x, y = vary_alike(x, y)
    return _correlate_p.bind(x, y, sides=sides, matmul_dtype=matmul_dtype)


def _reflected(kernel: Array) -> Array:
    """The kernel of the transposed convolution."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


def conv2d_lax(x: Array, kernel: Array, *, reflected: bool = False, matmul_dtype: str | None = None) -> Array:
    """The accelerators' path of `conv2d`: one convolution instruction; a product for a 1x1 kernel."""
    if kernel.shape[:2] == (1, 1):
        return conv2d_matmul(x, kernel, reflected=reflected, matmul_dtype=matmul_dtype)
    kernel = _reflected(kernel) if reflected else kernel
    return lax.conv_general_dilated(
        *_factors(x, kernel, matmul_dtype),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=_sum_dtype(x, matmul_dtype),
    ).astype(x.dtype)


def correlate_lax(x: Array, y: Array, *, sides: tuple[int, int], matmul_dtype: str | None = None) -> Array:
    """The accelerators' derivative of `conv2d` in the kernel: a convolution over the batch, [kh, kw, I, O]."""
    if sides == (1, 1):
        return correlate_matmul(x, y, sides=sides, matmul_dtype=matmul_dtype)
    kh, kw = sides
    return lax.conv_general_dilated(
        *_factors(x, y, matmul_dtype),
        window_strides=(1, 1),
        padding=((kh // 2, kh // 2), (kw // 2, kw // 2)),
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=_sum_dtype(x, matmul_dtype),
    ).astype(x.dtype)


def conv2d_matmul(x: Array, kernel: Array, *, reflected: bool = False, matmul_dtype: str | None = None) -> Array:
    """The CPU's path of `conv2d`: one matrix product and shifted copies of the thinner side."""
    if kernel.shape[:2] == (1, 1):
        return _outer(x, kernel[0, 0], matmul_dtype, transposed=reflected)
    kernel = _reflected(kernel) if reflected else kernel
    kh, kw, channels_in, channels_out = kernel.shape
    if channels_in <= channels_out:
        return _outer(_patches(x, kh, kw), kernel.reshape(-1, channels_out), matmul_dtype)
    products = _outer(x, kernel.transpose(2, 0, 1, 3).reshape(channels_in, -1), matmul_dtype)
    shifts = _shifts(products, kh, kw)
    return sum(shift[..., n * channels_out : (n + 1) * channels_out] for n, shift in enumerate(shifts))


def correlate_matmul(x: Array, y: Array, *, sides: tuple[int, int], matmul_dtype: str | None = None) -> Array:
    """The CPU's derivative of `conv2d` in the kernel: one product of the thinner side's patches and the other."""
    channels_in, channels_out = x.shape[-1], y.shape[-1]
    if channels_in <= channels_out or sides == (1, 1):
        return _inner(_patches(x, *sides), y, matmul_dtype).reshape(*sides, channels_in, channels_out)
    return _reflected(_inner(_patches(y, *sides), x, matmul_dtype).reshape(*sides, channels_out, channels_in))


def _patches(x: Array, kh: int, kw: int) -> Array:
    """[B, H, W, kh * kw * C]: the neighbourhood of every pixel."""
    return x if kh == kw == 1 else jnp.concatenate(_shifts(x, kh, kw), axis=-1)


def _shifts(x: Array, kh: int, kw: int) -> list[Array]:
    """x[b, i + di - kh//2, j + dj - kw//2, c] for every offset (di, dj) of the kernel, zero outside."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
    return [padded[:, di : di + height, dj : dj + width] for di in range(kh) for dj in range(kw)]


def _outer(x: Array, matrix: Array, matmul_dtype: str | None, *, transposed: bool = False) -> Array:
    """x @ matrix, or its transpose, for every pixel."""
    product = _matmul(x.reshape(-1, x.shape[-1]), matrix, (1,), (int(transposed),), matmul_dtype)
    return product.reshape(*x.shape[:-1], product.shape[-1])


def _inner(a: Array, b: Array, matmul_dtype: str | None) -> Array:
    """sum_pixels a^T b, [channels of a, channels of b]."""
    if matmul_dtype is None:
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    # else XLA transposes a where there are several axes to sum over; along the first of two its product is slow
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


def _conv2d_aval(x, kernel, *, reflected, matmul_dtype):
    return x.update(shape=(*x.shape[:3], kernel.shape[2 if reflected else 3]), weak_type=False)


def _correlate_aval(x, y, *, sides, matmul_dtype):
    return x.update(shape=(*sides, x.shape[3], y.shape[3]), weak_type=False)


_STATIC = "sides", "reflected", "matmul_dtype"


def _at_once(compiled, cpu, default, *arguments, **params):
    """A primitive outside of any program; under jax.disable_jit `compiled` would be the primitive itself."""
    if not jax.config.jax_disable_jit:
        return compiled(*arguments, **params)
    return (cpu if jax.default_backend() == "cpu" else default)(*arguments, **params)


def _batch(cpu, default, arguments, axes, **params):
    """vmap of the lowerings themselves, which is fast where each example has a kernel of its own."""
    cpu, default = (jax.vmap(partial(lowering, **params), axes) for lowering in (cpu, default))
    return by_platform(*arguments, cpu=cpu, default=default, out=jax.typeof(jax.eval_shape(cpu, *arguments))), 0


def _batch_conv2d(arguments, axes, **params):
    (x, kernel), (axis, kernel_axis) = arguments, axes
    if kernel_axis is not None:
        return _batch(conv2d_matmul, conv2d_lax, arguments, axes, **params)
    x = jnp.moveaxis(x, axis, 0)
    out = _conv2d(x.reshape(-1, *x.shape[2:]), kernel, **params)
    return out.reshape(*x.shape[:2], *out.shape[1:]), 0


for _primitive, _cpu, _default, _aval in (
    (_conv2d_p, conv2d_matmul, conv2d_lax, _conv2d_aval),
    (_correlate_p, correlate_matmul, correlate_lax, _correlate_aval),
):
    _primitive.def_impl(partial(_at_once, jax.jit(_primitive.bind, static_argnames=_STATIC), _cpu, _default))
    _primitive.def_abstract_eval(_aval)
    mlir.register_lowering(_primitive, mlir.lower_fun(_default, multiple_results=False))
    mlir.register_lowering(_primitive, mlir.lower_fun(_cpu, multiple_results=False), platform="cpu")
    batching.primitive_batchers[_primitive] = partial(_batch, _cpu, _default)
batching.primitive_batchers[_conv2d_p] = _batch_conv2d


def _conv2d_transpose_kernel(ct, x, kernel, *, reflected, matmul_dtype):
    x, y = (ct, x) if reflected else (x, ct)
    return _correlate(x, y, kernel.aval.shape[:2], matmul_dtype)


ad.defbilinear(
    _conv2d_p,
    lambda ct, x, kernel, *, reflected, matmul_dtype: _conv2d(ct, kernel, not reflected, matmul_dtype),
    _conv2d_transpose_kernel,
)
ad.defbilinear(
    _correlate_p,
    lambda ct, x, y, *, sides, matmul_dtype: _conv2d(y, ct, True, matmul_dtype),
    lambda ct, x, y, *, sides, matmul_dtype: _conv2d(x, ct, False, matmul_dtype),
)
