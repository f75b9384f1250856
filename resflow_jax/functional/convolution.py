"""Zero-padded 2-D convolution with the lowering that is fast on each platform.

    out[b, i, j, o] = sum_{di, dj, c} x[b, i + di - kh//2, j + dj - kw//2, c] * kernel[di, dj, c, o]

NHWC images, HWIO kernels with odd sides, stride one, output of the input's
spatial size. On accelerators it is one `lax.conv_general_dilated`. XLA's CPU
convolution is up to ten times slower than a matrix product (its weight gradient
above all), so there the same sum is written as one product:

  few channels in:   gather the kh*kw shifted copies of x, then one product;
  few channels out:  one product to kh*kw*O channels, then add the shifted copies.

Each form is the transpose of the other, so derivatives of either stay matrix
products. `conv2d` is bilinear and says so to JAX (`custom_jvp`): a derivative is
another `conv2d`, and nothing but x and the kernel is ever saved for it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

Array = jax.Array


def conv2d(x: Array, kernel: Array) -> Array:
    """Convolves x [B, H, W, I] with kernel [kh, kw, I, O] (odd sides) to [B, H, W, O].

    Raises ValueError for wrong ranks, channel counts that differ, or an even side.
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected rank 4 [B, H, W, C], got shape {x.shape}")
    if kernel.ndim != 4 or kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"kernel: expected [kh, kw, I, O] with odd kh, kw, got shape {kernel.shape}")
    if kernel.shape[2] != x.shape[3]:
        raise ValueError(f"kernel: expected {x.shape[3]} input channels (those of x), got {kernel.shape[2]}")
    dtype = jnp.result_type(x, kernel)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if kernel.shape[:2] == (1, 1):
        return x @ kernel[0, 0]
    return _conv2d(x, kernel)


@jax.custom_jvp
def _conv2d(x: Array, kernel: Array) -> Array:
    return lax.platform_dependent(x, kernel, cpu=conv2d_matmul, default=conv2d_lax)


def _conv2d_jvp(primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    out = _conv2d(x, kernel)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(_conv2d(dx, kernel))
    if not isinstance(dkernel, SymbolicZero):
        terms.append(_conv2d(x, dkernel))
    return out, sum(terms) if terms else jnp.zeros_like(out)


_conv2d.defjvp(_conv2d_jvp, symbolic_zeros=True)


def conv2d_lax(x: Array, kernel: Array) -> Array:
    """The accelerators' path of `conv2d`: one convolution instruction."""
    return lax.conv_general_dilated(
        x, kernel, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv2d_matmul(x: Array, kernel: Array) -> Array:
    """The CPU's path of `conv2d`: one matrix product and shifted copies of the thinner side."""
    kh, kw, channels_in, channels_out = kernel.shape
    if channels_in <= channels_out:
        patches = jnp.concatenate(_shifts(_pad(x, kh, kw), kh, kw), axis=-1)
        return patches @ kernel.reshape(kh * kw * channels_in, channels_out)
    products = x @ kernel.transpose(2, 0, 1, 3).reshape(channels_in, kh * kw * channels_out)
    shifts = _shifts(_pad(products, kh, kw), kh, kw)
    return sum(shift[..., n * channels_out : (n + 1) * channels_out] for n, shift in enumerate(shifts))


def _pad(x: Array, kh: int, kw: int) -> Array:
    return jnp.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))


def _shifts(padded: Array, kh: int, kw: int) -> list[Array]:
    """x[b, i + di - kh//2, j + dj - kw//2, c] for every offset (di, dj) of the kernel."""
    height, width = padded.shape[1] - kh + 1, padded.shape[2] - kw + 1
    return [padded[:, di : di + height, dj : dj + width] for di in range(kh) for dj in range(kw)]
