"""Upper bounds on the norms of linear maps. (Power iteration gives lower bounds.)

`spectral_norm_bound` and `induced_norm_bound` run on the host in float64, for every dtype of the kernel and every
setting of JAX. They are upper bounds on the exact norm of the map with exactly these weights: the rounding errors of
the computation are bounded too. `gram_iteration_bound` is a differentiable bound, computed in the kernel's dtype.

All maps are treated as a convolution A: [*size, I] -> [*size, O] on a grid of one, two or three axes. On two axes,
(A x)[i, j] = sum_{d, e} K[d, e]^T x[i + d - p, j + e - p'] with x zero outside of the grid; a dense map has one pixel
and one tap. Four facts reduce the work:

1. On an axis of n pixels, taps further than n - 1 from the centre meet only zeros; they are cut off. Along an axis that
   keeps one tap the operator is block diagonal with equal blocks, so one pixel is enough.
2. The transpose of A has the flipped kernel with I and O swapped, and the same norm. So assume I <= O.
3. A = P C E. Here E embeds the grid into a torus of N >= n + p pixels on each axis, with zeros elsewhere, C is the
   circular convolution on the torus, and P restricts to the grid: pixel i in [0, n) reads pixels -p ... n + p - 1, and
   those outside [0, n) are, modulo N, in [n, N), where the zeros are. As |P|, |E| <= 1, |A| <= |C|. All values that
   wrap around are zeros, so they may also be multiplied by -1: the antiperiodic C bounds |A| too, independently for
   each axis. C is block diagonal in frequency, with a shift s on each axis: s = 0 if periodic, s = 1/2 if antiperiodic.
       |C| = max_w |K^(w)|_2,   K^(w) = sum_t exp(i w.t) K[t],   w = 2 pi (j + s) / N, j = 0 ... N - 1.
   |C| is larger if a frequency hits a peak of |K^(w)|. So the bound is the least |C| over both s and over
   N = n + p ... n + 2 p, on each axis. On three axes only N = n + p is tried, because there are many frequencies.
   For the taps (1, 1, 1), N = n + 1 and s = 1/2 give the exact norm 1 + 2 cos(pi / (n + 1)); s = 0 gives 3.
4. With periodic padding A = C with N = n and s = 0, for kernels of any side, and the norm is exact (Sedghi et al. 2019,
   arXiv 1805.10408). For zero padding this C is not a bound.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.checks import as_host_array, check_count, check_order
from resflow_jax.functional.linear_maps import ConvMap, DenseMap, LinearMap, folded_kernel, tap_windows
from resflow_jax.functional.primitives.convolution import reflected_kernel
from resflow_jax.functional.primitives.precision import wide_dtype

Array = jax.Array

# Side of the largest Gram matrix whose eigenvalues are computed directly; it takes 0.06 s on 2 cores.
_EXACT_SIDE = 1024
# Number of complex numbers in a batch of frequencies, which limits an array to 32 MiB.
_BATCH_NUMBERS = 2**21
_EPSILON = float(np.finfo(np.float64).eps)


def spectral_norm_bound(linear_map: LinearMap, kernel: Array | np.ndarray) -> float:
    """Computes an upper bound on the largest singular value of the map x -> linear_map(kernel, x).

    Let n be the number of pixels and c the smaller number of channels. The result is exact, to about 1e-7, for dense
    and 1x1 maps, for periodic padding, and for n c <= 1024 (from the Gram matrix). Otherwise it is the torus bound
    derived at the head of this module. In the tests this is at most 5 % above the norm for 3x3 kernels on 8x8 or more
    pixels and for 5x5 kernels on 14x14 or more, 0.1 % in one dimension on 40 or more, and 10 % for 3x3x3 kernels on
    7x7x6 or more. It runs on the host in float64, is deterministic, and costs O((n c)^3) operations for n c <= 1024,
    else O(n c^3 + I O c).

    Args:
      linear_map: `DenseMap` or `ConvMap`.
      kernel: floats of shape `linear_map.kernel_shape`, a JAX or NumPy array, not traced.

    Returns:
      The bound, a Python float. Rounding errors of the computation are included.

    Raises:
      ValueError: if the kernel has another shape, is not of floats, or is not finite.

    Example:
      >>> kernel = np.ones((3, 1, 1))   # taps (1, 1, 1) on 5 pixels: the norm is 1 + 2 cos(pi / 6)
      >>> round(rf.spectral_norm_bound(rf.ConvMap((5,), 1, 1), kernel), 4)
      2.7321
    """
    kernel, exponent = _scaled(linear_map, kernel)
    return _unscaled(_spectral_bound(linear_map, kernel), exponent)


def induced_norm_bound(linear_map: LinearMap, kernel: Array | np.ndarray, domain: float, codomain: float) -> float:
    """Computes an upper bound on max |A x|_q / |x|_p over whole inputs, p = `domain`, q = `codomain` in [1, inf].

    It is exact for 1 -> q (the largest q-norm of a column) and p -> inf (the largest p*-norm of a row, with
    1/p + 1/p* = 1), and equals `spectral_norm_bound` for 2 -> 2. For other orders, with |A|_{a,b} the norm from
    p = 1/a to q = 1/b:

    1. log |A|_{a,b} of the complex norm is convex on the unit square of (a, b) (Riesz-Thorin; Bergh and
       Lofstrom 1976, theorem 1.1.1). A real norm is at most the complex one, and they agree at (1/2, 1/2)
       (singular vectors are real), at a = 1 (the extreme points of the ball of l1 are unit vectors times
       phases) and at b = 0 (by duality).
    2. For p <= q, that is b <= a: the ray from (1/2, 1/2) through (a, b) leaves the square at (a', b') with
       a' = 1 or b' = 0, whichever comes first, so with t = max(2 a - 1, 1 - 2 b),
       (a, b) = (1 - t) (1/2, 1/2) + t (a', b') and |A|_{a,b} <= |A|_{1/2,1/2}^(1 - t) |A|_{a',b'}^t.
    3. For p > q and any r in [q, p]: |x|_r <= n^(1/r - 1/p) |x|_p on n elements, so
       |A|_{p->q} <= n_in^(1/r - 1/p) |A|_{r->r} n_out^(1/q - 1/r).
       The bound is the least over r = q, r = p and, if it lies between them, r = 2. n_in and n_out count all pixels,
       also for a 1x1 kernel: the norm over n pixels is then n^(1/q - 1/p) times that of one pixel.

    It runs on the host in float64, is deterministic, and costs as much as `spectral_norm_bound`.

    Args:
      linear_map: `DenseMap` or `ConvMap`.
      kernel: floats of shape `linear_map.kernel_shape`, a JAX or NumPy array, not traced.
      domain: order p of the norm of inputs.
      codomain: order q of the norm of outputs.

    Returns:
      The bound, a Python float.

    Raises:
      ValueError: for an order below 1 or NaN, or a kernel that `spectral_norm_bound` refuses.

    Example:
      >>> kernel = np.array([[1.0, -2.0], [3.0, 4.0]])
      >>> rf.induced_norm_bound(rf.DenseMap(2, 2), kernel, domain=1, codomain=np.inf).__round__(6)   # largest element
      4.0
    """
    check_order("domain", domain)
    check_order("codomain", codomain)
    kernel, exponent = _scaled(linear_map, kernel)
    a, b = 1 / float(domain), 1 / float(codomain)
    n_in, n_out = (math.prod(_size(linear_map)) * channels for channels in kernel.shape[-2:])
    if b <= a:
        bound = _interpolated_bound(linear_map, kernel, a, b)
    else:
        inner = {a, b, min(max(a, 0.5), b)}  # 1 / r
        bound = min(n_in ** (c - a) * _interpolated_bound(linear_map, kernel, c, c) * n_out ** (b - c) for c in inner)
    return _unscaled(bound * (1 + 64 * _EPSILON), exponent)  # the factor bounds the rounding errors of powers


def gram_iteration_bound(linear_map: LinearMap, kernel: Array, iterations: int = 7) -> Array:
    """Computes a differentiable upper bound on the largest singular value, up to rounding in the kernel's dtype.

    It is Gram iteration (Delattre et al. 2023, arXiv 2305.16173; 2024, arXiv 2402.00240), for a convolution in each
    frequency of the tori at the head of this module: G_0 = K^ K^*, G_{t+1} = G_t^2, and

        sigma <= |G_t|_F^(1 / 2^(t+1)) <= c^(1 / 2^(t+2)) sigma,

    the Schatten norm of order 2^(t+2), which does not increase with t; c is the smaller number of channels. Each G_t is
    scaled to norm one and the logarithm of its scale is kept, so nothing overflows. The limit is the exact norm for
    dense and 1x1 maps and for periodic padding. Otherwise it is the bound of the smallest torus. The cost is
    O(n c^2 (O + c t)) operations for n pixels and, for images, 4 (H + p) (W + p') c (O + c) numbers of memory. The
    function is deterministic, and works under jit, grad and vmap.

    Args:
      linear_map: `DenseMap` or `ConvMap`.
      kernel: floats of shape `linear_map.kernel_shape`; it may be traced.
      iterations: t, the number of squarings.

    Returns:
      The bound, a scalar in the kernel's dtype (float32 for 16-bit floats).

    Raises:
      ValueError: if the kernel has another shape or is not of floats, or for a negative number of iterations.

    Example:
      >>> linear_map, kernel = rf.DenseMap(2, 2), jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> bound_of = lambda kernel: rf.gram_iteration_bound(linear_map, kernel)
      >>> bound, gradient = jax.jit(jax.value_and_grad(bound_of))(kernel)
      >>> round(float(bound), 4), gradient.round(4).tolist()
      (3.0, [[1.0, 0.0], [0.0, 0.0]])
    """
    check_count("iterations", iterations, 0)
    kernel = _checked_kernel(linear_map, kernel)
    kernel = kernel.astype(wide_dtype(kernel.dtype))
    # The bound does not depend on the scales that are divided out, so they need no gradient.
    scale = lax.stop_gradient(jnp.max(jnp.abs(kernel)))
    size, kernel, periodic = _canonical(linear_map, kernel / jnp.where(scale > 0, scale, 1))
    sides = kernel.shape[:-2]
    frequencies, tori = _tori(_torus_sizes(size, sides, periodic)[0], _kinds(sides, periodic))
    waves = _waves(frequencies, sides)
    real, imaginary = (jnp.asarray(part, kernel.dtype) for part in (waves.real, waves.imag))
    taps = kernel.reshape(len(waves[0]), -1)
    response = _product(real, taps)
    if waves.imag.any():
        response = lax.complex(response, _product(imaginary, taps))
    response = response.reshape(-1, *kernel.shape[-2:])
    gram = _product(response, response.conj().mT)
    log_scale = jnp.zeros(gram.shape[0], kernel.dtype)
    for _ in range(iterations):
        norm = lax.stop_gradient(jnp.sqrt(_squared_norm(gram)))
        gram = gram / norm[:, None, None].astype(gram.dtype)
        gram, log_scale = _product(gram, gram), 2 * (log_scale + jnp.log(norm))
    log_bounds = (log_scale + jnp.log(_squared_norm(gram)) / 2) / 2 ** (iterations + 1)
    return scale * jnp.exp(jnp.min(jnp.max(log_bounds[tori], axis=1)))


def _squared_norm(gram: Array) -> Array:
    """|G|_F^2 + epsilon^2 for a batch: at least |G|_F^2, with a finite logarithm and gradient at G = 0."""
    return jnp.sum(jnp.real(gram * gram.conj()), (1, 2)) + jnp.finfo(gram.dtype).eps ** 2


def _product(a: Array, b: Array) -> Array:
    """a @ b in full precision. Accelerators reduce it by default, and the result would not be a bound."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _checked_kernel(linear_map: LinearMap, kernel: Array | np.ndarray) -> Array | np.ndarray:
    if not isinstance(linear_map, LinearMap):
        raise ValueError(f"linear_map: expected a DenseMap or a ConvMap, got {linear_map!r}")
    expected = f"a float array {linear_map.kernel_shape}"
    kernel = as_host_array("kernel", kernel, expected)
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(f"kernel: expected {expected}, got {kernel.dtype}")
    if kernel.shape != linear_map.kernel_shape:
        raise ValueError(f"kernel: expected {expected}, got {kernel.shape}")
    return kernel


def _scaled(linear_map: LinearMap, kernel: Array | np.ndarray) -> tuple[np.ndarray, int]:
    """(K, e) with kernel = 2^e K, K in float64 with entries of at most one.

    So no product overflows, and products that underflow are negligible.
    """
    kernel = _checked_kernel(linear_map, kernel)
    kernel = np.asarray(kernel).astype(np.float64)
    largest = np.max(np.abs(kernel))
    if not np.isfinite(largest):
        raise ValueError(f"kernel: expected finite weights, got {largest}")
    exponent = math.frexp(largest)[1]
    return np.ldexp(kernel, -exponent), exponent


def _unscaled(bound: float, exponent: int) -> float:
    """2^exponent * bound; infinity, which is still a bound, if that overflows."""
    with np.errstate(over="ignore"):
        return float(np.ldexp(bound, exponent))


def _size(linear_map: LinearMap) -> tuple[int, ...]:
    """The size of the grid; a dense map has one pixel."""
    return linear_map.size if isinstance(linear_map, ConvMap) else (1, 1)


def _is_periodic(linear_map: LinearMap) -> bool:
    return isinstance(linear_map, ConvMap) and linear_map.padding == "periodic"


def _reaching_taps(linear_map: LinearMap, kernel: Array | np.ndarray) -> Array | np.ndarray:
    """The taps [*sides, I, O] that reach the grid (fact 1): one for a dense map, all for periodic padding."""
    if isinstance(linear_map, DenseMap):
        return kernel[None, None]
    if _is_periodic(linear_map):
        return kernel
    cuts = [max(k // 2 - (n - 1), 0) for n, k in zip(linear_map.size, linear_map.sides, strict=True)]
    return kernel[tuple(slice(cut, k - cut) for cut, k in zip(cuts, linear_map.sides, strict=True))]


def _canonical(linear_map: LinearMap, kernel: Array | np.ndarray) -> tuple[tuple[int, ...], Array | np.ndarray, bool]:
    """(size, kernel [*sides, c, c'] with c <= c', is_periodic) of a convolution with the same norm: facts 1 and 2."""
    kernel = _reaching_taps(linear_map, kernel)
    size = tuple(1 if k == 1 else n for n, k in zip(_size(linear_map), kernel.shape, strict=False))
    kernel = kernel if kernel.shape[-2] <= kernel.shape[-1] else reflected_kernel(kernel)
    return size, kernel, _is_periodic(linear_map)


def _spectral_bound(linear_map: LinearMap, kernel: np.ndarray) -> float:
    """`spectral_norm_bound` for a kernel of `_scaled`."""
    size, kernel, periodic = _canonical(linear_map, kernel)
    has_one_tap = math.prod(kernel.shape[:-2]) == 1
    if has_one_tap or (math.prod(size) * kernel.shape[-2] <= _EXACT_SIDE and not periodic):
        largest = _exact_gram_norm(size, kernel)
    else:
        largest = min(_torus_gram_norms(size, kernel, periodic))
    return math.sqrt(largest) * (1 + 4 * _EPSILON)


def _largest_eigenvalues(gram: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Upper bounds on the largest eigenvalues of Gram matrices whose computed values are `gram` [..., m, m].

    1. An entry of A^* A is a sum of n <= taps (c' + 2^axes) products of entries of K (and waves), computed to within
       gamma_n |A|^* |A| (Higham 2002, section 3.5). |A| has the taps |K[t]|, so that
       | |A|^* |A| |_2 <= (sum_t |K[t]|_F)^2 <= taps |K|_F^2. 8 epsilon = 16 u instead of u leave room for the
       rounding of the waves, at most 32 u times the sum of the kernel's sides.
    2. Reduction to tridiagonal form by reflections is backward stable, |E|_F <= O(m^2) u |G|_F (Higham 2002, lemma
       19.3), and so is the iteration on it; by Weyl's inequality an eigenvalue moves by at most |E|_2.
    """
    sides = kernel.shape[:-2]
    taps = math.prod(sides)
    assembly = taps * (kernel.shape[-1] + 2 ** len(sides)) * taps * np.sum(kernel**2)
    reduction = gram.shape[-1] ** 2 * np.linalg.norm(gram, axis=(-2, -1))
    return np.linalg.eigvalsh(gram)[..., -1] + 8 * _EPSILON * (assembly + reduction)


def _exact_gram_norm(size: tuple[int, ...], kernel: np.ndarray) -> float:
    """|A^T A|_2 of the zero-padded convolution itself.

    With S_d the shift by d - p that drops what leaves the grid, A^T A in two dimensions is the sum over pairs of taps
    of (S_d S_d'^T) (x) (S_e S_e'^T) (x) K[d, e] K[d', e']^T: one axis after the other.
    """
    *sides, channels, _ = kernel.shape
    taps = kernel.reshape(-1, *kernel.shape[-2:])
    products = np.einsum("tio,sjo->tsij", taps, taps, optimize=True).reshape(*sides, *sides, channels, channels)
    axes = len(sides)
    products = products.transpose(*(axis + side for axis in range(axes) for side in (0, axes)), -2, -1)
    for n in size:
        products = _with_pixels(products, n)
    return float(_largest_eigenvalues(products, kernel))


def _with_pixels(products: np.ndarray, n: int) -> np.ndarray:
    """sum_{d, f} (S_d S_f^T) (x) products[d, f]: [k, k, ..., a, b] -> [..., n a, n b] for an axis of n pixels."""
    taps, *rest, a, b = products.shape[1:]
    total = np.zeros((n, n, *rest, a, b))
    written = np.arange(n)
    for d in range(taps):
        for f in range(taps):
            i, j = written + d - taps // 2, written + f - taps // 2  # what taps d and f carry to the same pixel
            inside = (np.minimum(i, j) >= 0) & (np.maximum(i, j) < n)
            total[i[inside], j[inside]] += products[d, f]
    return np.moveaxis(total, (0, 1), (-4, -2)).reshape(*rest, n * a, n * b)


def _torus_gram_norms(size: tuple[int, ...], kernel: np.ndarray, periodic: bool) -> list[float]:
    """The least |C^* C|_2 over the kinds of each torus, from K^ K^*(w) = sum_l exp(i w.l) lags[l]."""
    lags = _autocorrelation(kernel)
    sides, channels = kernel.shape[:-2], kernel.shape[-2]
    matrix = lags.reshape(-1, channels**2)
    norms = []
    for torus in _torus_sizes(size, sides, periodic):
        frequencies, tori = _tori(torus, _kinds(sides, periodic))
        numbers = len(frequencies) * max(matrix.shape)
        largest = []
        for batch in np.array_split(frequencies, min(len(frequencies), math.ceil(numbers / _BATCH_NUMBERS))):
            waves = _waves(batch, lags.shape[:-2])
            gram = waves.real @ matrix + 1j * (waves.imag @ matrix)
            largest.append(_largest_eigenvalues(gram.reshape(-1, channels, channels), kernel))
        norms.append(float(np.concatenate(largest)[tori].max(axis=1).min()))
    return norms


def _torus_sizes(size: tuple[int, ...], sides: tuple[int, ...], periodic: bool) -> list[tuple[int, ...]]:
    """The sizes of the tori of facts 3 and 4, smallest first. An axis with one tap has one frequency."""
    if periodic:
        return [size]
    axes = [range(n + k // 2, n + 2 * (k // 2) + 1) if k > 1 else [1] for n, k in zip(size, sides, strict=True)]
    tori = list(itertools.product(*axes))
    return tori if len(size) < 3 else tori[:1]


def _kinds(sides: tuple[int, ...], periodic: bool) -> list[int]:
    """The number of kinds of torus along each axis: 1 (periodic), or 2 (also antiperiodic) unless it has one tap."""
    return [1 if periodic or k == 1 else 2 for k in sides]


def _autocorrelation(kernel: np.ndarray) -> np.ndarray:
    """lags[kh - 1 + l, kw - 1 + m] = sum_{d, e} K[d + l, e + m] K[d, e]^T: [2 kh - 1, 2 kw - 1, c, c]."""
    *sides, channels, _ = kernel.shape
    taps = kernel.reshape(-1, *kernel.shape[-2:])
    lags = np.zeros((*(2 * k - 1 for k in sides), channels, channels))
    for offset in np.ndindex(*sides):
        products = np.einsum("io,tjo->tij", kernel[offset], taps, optimize=True)[::-1]
        window = tuple(slice(d, d + k) for d, k in zip(offset, sides, strict=True))
        lags[window] += products.reshape(*sides, channels, channels)
    return lags


def _tori(torus: tuple[int, ...], kinds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(frequencies, tori): w / 2 pi, [F, axes], and the indices of those of each kind of torus, [kinds, pixels].

    The frequencies of the periodic and the antiperiodic kind are the even and the odd members of a grid of 2 N
    frequencies on each axis. |K^(-w)| = |K^(w)| for a real kernel, so only half of them are listed.
    """
    grid = [kind * n for kind, n in zip(kinds, torus, strict=True)]
    half = (*grid[:-1], grid[-1] // 2 + 1)
    frequencies = np.indices(half).reshape(len(grid), -1).T / grid
    all_of_them = np.indices(grid)
    opposite = -all_of_them % np.reshape(grid, (-1, *(1 for _ in grid)))
    index = np.ravel_multi_index(tuple(np.where(all_of_them[-1] < half[-1], all_of_them, opposite)), half)
    starts = np.ndindex(*kinds)
    tori = [
        index[tuple(slice(s, None, kind) for s, kind in zip(start, kinds, strict=True))].ravel() for start in starts
    ]
    return frequencies, np.stack(tori)


def _waves(frequencies: np.ndarray, sides: tuple[int, ...]) -> np.ndarray:
    """exp(i w.t) [F, taps] for the offsets t of taps from the centre of a kernel with these sides."""
    offsets = np.indices(sides).reshape(len(sides), -1) - np.array(sides)[:, None] // 2
    return np.exp(2j * np.pi * (frequencies @ offsets))


def _interpolated_bound(linear_map: LinearMap, kernel: np.ndarray, a: float, b: float) -> float:
    """Steps 1 and 2 of `induced_norm_bound`, for b <= a."""
    t = max(2 * a - 1, 1 - 2 * b)
    if t == 0:
        return _spectral_bound(linear_map, kernel)
    parts = _parts(linear_map, kernel)
    if t == 2 * a - 1:
        edge = _largest_column(parts, 0.5 + (b - 0.5) / t)
    else:  # |A|_{p->inf} = |A^T|_{1->p*}
        edge = _largest_column([part.swapaxes(-2, -1) for part in parts], 0.5 - (a - 0.5) / t)
    return edge if t == 1 else _spectral_bound(linear_map, kernel) ** (1 - t) * edge**t


def _parts(linear_map: LinearMap, kernel: np.ndarray) -> list[np.ndarray]:
    """Absolute values, rounded up, of the parts of the kernel that pixels see, each part once."""
    if _is_periodic(linear_map):
        size, taps = linear_map.size, math.prod(linear_map.sides)
        rounding = taps * _EPSILON * folded_kernel(np.abs(kernel), size)
        return [np.abs(folded_kernel(kernel, size)) + rounding]
    taps = np.abs(_reaching_taps(linear_map, kernel))
    windows = (tap_windows(k, n) for n, k in zip(_size(linear_map), taps.shape, strict=False))
    return [taps[window] for window in itertools.product(*windows)]


def _largest_column(parts: list[np.ndarray], b: float) -> float:
    """The largest norm of order 1 / b of the columns part[..., i, :] over parts and inputs i, rounded up."""
    if b <= 0:
        return float(max(part.max() for part in parts))
    largest = max(part.max() for part in parts) or 1.0
    powers = max(np.sum((part / largest) ** (1 / b), axis=(*range(part.ndim - 2), -1)).max() for part in parts)
    return float(largest * powers**b * (1 + 8 * _EPSILON * max(part.size for part in parts)))
