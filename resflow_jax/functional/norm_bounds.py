"""Upper bounds on the norms of linear maps: what power iteration estimates from below, bounded from above.

`spectral_norm_bound` and `induced_norm_bound` run on the host in float64, whatever the kernel's dtype
and JAX's own; they are upper bounds of the exact norm of the map with exactly these weights, rounding of
their own computation included. `gram_iteration_bound` is the differentiable bound, in the kernel's dtype.

All maps are one case, A: [*size, I] -> [*size, O] on a grid of one, two or three axes. In two,
(A x)[i, j] = sum_{d, e} K[d, e]^T x[i + d - p, j + e - p'], zero outside; a dense map has one pixel and one tap. Four
facts reduce the work:

1. Taps further than n - 1 from the centre meet only zeros on an axis of n pixels: they are cut off. Along an
   axis that keeps one tap the operator is block diagonal with equal blocks: one pixel stands for all.
2. The transpose of A has the kernel flipped and with I and O swapped: I <= O without loss of generality.
3. A = P C E, with E putting the grid into a torus of N >= n + p pixels an axis (zeros elsewhere), C the
   circular convolution on it, P restricting to the grid: pixel i in [0, n) reads pixels -p ... n + p - 1,
   and those outside [0, n) are, modulo N, in [n, N), where there are zeros. As |P|, |E| <= 1, |A| <= |C|.
   Whatever wraps around meets zeros, so it may as well be multiplied by -1: the antiperiodic C bounds |A| too,
   on each axis on its own. C is block diagonal in frequency, with s = 0 or, antiperiodic, s = 1/2 an axis:
       |C| = max_w |K^(w)|_2,   K^(w) = sum_t exp(i w.t) K[t],   w = 2 pi (j + s) / N, j = 0 ... N - 1.
   A peak of |K^(w)| counts in full if a frequency hits it, so the least |C| over both s and N = n + p ... n + 2 p
   is taken, on each axis; on three axes N = n + p alone, where there would be many tori of many frequencies.
   For the taps (1, 1, 1), N = n + 1 and s = 1/2 give the exact 1 + 2 cos(pi / (n + 1)), s = 0 gives 3.
4. With periodic padding A is C itself, N = n and s = 0, whatever the kernel's sides: that norm is exact (Sedghi et
   al. 2019, arXiv 1805.10408). For zero padding it is no bound.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resflow_jax.functional.checks import as_host_array, check_count, check_order
from resflow_jax.functional.iteration import wide_dtype
from resflow_jax.functional.linear_maps import ConvMap, DenseMap, LinearMap, folded_kernel, tap_windows
from resflow_jax.functional.primitives.convolution import reflected_kernel

Array = jax.Array

# Side of the largest Gram matrix whose eigenvalues are computed at once: 0.06 s on 2 cores.
_EXACT_SIDE = 1024
# Complex numbers worked on at a time, which bounds the memory: 32 MiB an array.
_BATCH_NUMBERS = 2**21
_EPSILON = float(np.finfo(np.float64).eps)


def spectral_norm_bound(linear_map: LinearMap, kernel: Array | np.ndarray) -> float:
    """An upper bound of the largest singular value: |x -> linear_map(kernel, x)|_2 <= result.

    With n pixels and c the smaller channel side: exact (to about 1e-7) for dense and 1x1 maps, with periodic padding,
    and where n c <= 1024, from the Gram matrix of that side; otherwise the torus bound of the head of this file, in
    tests at most 5 per cent above from 8x8 pixels on for 3x3 kernels and from 14x14 for 5x5, 0.1 per cent from 40
    pixels on in one dimension, and 10 per cent from 7x7x6 on for 3x3x3 kernels. Cost O((n c)^3) where n c <= 1024,
    else O(n c^3 + I O c).

    Raises:
      ValueError: for a kernel of another shape, not float, or not finite.
    """
    kernel, exponent = _scaled(linear_map, kernel)
    return _unscaled(_spectral_bound(linear_map, kernel), exponent)


def induced_norm_bound(linear_map: LinearMap, kernel: Array | np.ndarray, domain: float, codomain: float) -> float:
    """An upper bound of max |A x|_q / |x|_p over whole inputs, p = `domain`, q = `codomain` in [1, inf].

    Exact for 1 -> q (the largest q-norm of a column) and p -> inf (the largest p*-norm of a row, with
    1/p + 1/p* = 1); `spectral_norm_bound` for 2 -> 2. Elsewhere, with |A|_{a,b} the norm from p = 1/a to q = 1/b:

    1. log |A|_{a,b} of the complex norm is convex on the unit square of (a, b) (Riesz-Thorin; Bergh and
       Lofstrom 1976, theorem 1.1.1). A real norm is at most the complex one, and they agree at (1/2, 1/2)
       (singular vectors are real), at a = 1 (the extreme points of the ball of l1 are unit vectors times
       phases) and at b = 0 (by duality).
    2. For p <= q, that is b <= a: the ray from (1/2, 1/2) through (a, b) leaves the square at (a', b') with
       a' = 1 or b' = 0, whichever comes first, so with t = max(2 a - 1, 1 - 2 b),
       (a, b) = (1 - t) (1/2, 1/2) + t (a', b') and |A|_{a,b} <= |A|_{1/2,1/2}^(1 - t) |A|_{a',b'}^t.
    3. For p > q and any r in [q, p]: |x|_r <= n^(1/r - 1/p) |x|_p on n elements, so
       |A|_{p->q} <= n_in^(1/r - 1/p) |A|_{r->r} n_out^(1/q - 1/r).
       The least over r = q, r = p and, if between, r = 2 is taken. n counts all pixels, also for a 1x1 kernel: the
       norm over n pixels is then n^(1/q - 1/p) times that of a pixel.

    Raises:
      ValueError: for an order below 1 or NaN, or a kernel that `spectral_norm_bound` refuses.
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
    return _unscaled(bound * (1 + 64 * _EPSILON), exponent)  # for the powers


def gram_iteration_bound(linear_map: LinearMap, kernel: Array, iterations: int = 7) -> Array:
    """A differentiable upper bound of the largest singular value, up to rounding in the kernel's dtype.

    Gram iteration (Delattre et al. 2023, arXiv 2305.16173; 2024, arXiv 2402.00240), for a convolution in each
    frequency of the tori: G_0 = K^ K^*, G_{t+1} = G_t^2, and

        sigma <= |G_t|_F^(1 / 2^(t+1)) <= c^(1 / 2^(t+2)) sigma,

    the Schatten norm of order 2^(t+2), non-increasing in t; c is the smaller channel side. Each G_t is kept
    at norm one and the logarithm of its scale apart, so that nothing overflows. The limit is the exact norm
    for dense and 1x1 maps and for periodic padding, for others the bound of the head of this file from the smallest
    torus alone. Cost O(n c^2 (O + c t)) for n pixels, and for images 4 (H + p) (W + p') c (O + c) numbers of memory.
    Works under jit, grad and vmap.

    Raises:
      ValueError: for a kernel of another shape or not float, or a negative number of iterations.
    """
    check_count("iterations", iterations, 0)
    kernel = _checked_kernel(linear_map, kernel)
    kernel = kernel.astype(wide_dtype(kernel.dtype))
    # The bound does not depend on the factors that are split off, so they carry no gradient.
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
    """|G|_F^2 + epsilon^2 of a batch: not less than |G|_F^2, and finite in logarithm and gradient at zero."""
    return jnp.sum(jnp.real(gram * gram.conj()), (1, 2)) + jnp.finfo(gram.dtype).eps ** 2


def _product(a: Array, b: Array) -> Array:
    """a @ b without the reduced precision that accelerators use by default: a bound cannot afford it."""
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
    """(K, e), the kernel being 2^e K in float64 with entries of at most one: no product overflows, none matters
    that underflows.
    """
    kernel = _checked_kernel(linear_map, kernel)
    kernel = np.asarray(kernel).astype(np.float64)
    largest = np.max(np.abs(kernel))
    if not np.isfinite(largest):
        raise ValueError(f"kernel: expected finite weights, got {largest}")
    exponent = math.frexp(largest)[1]
    return np.ldexp(kernel, -exponent), exponent


def _unscaled(bound: float, exponent: int) -> float:
    """2^exponent bound; infinite, and still a bound, beyond float64's range."""
    with np.errstate(over="ignore"):
        return float(np.ldexp(bound, exponent))


def _size(linear_map: LinearMap) -> tuple[int, ...]:
    """That of the grid; a dense map has one pixel."""
    return linear_map.size if isinstance(linear_map, ConvMap) else (1, 1)


def _is_periodic(linear_map: LinearMap) -> bool:
    return isinstance(linear_map, ConvMap) and linear_map.padding == "periodic"


def _reaching_taps(linear_map: LinearMap, kernel: Array | np.ndarray) -> Array | np.ndarray:
    """The taps [*sides, I, O] that reach the grid: fact 1. A dense map has one; with periodic padding all do."""
    if isinstance(linear_map, DenseMap):
        return kernel[None, None]
    if _is_periodic(linear_map):
        return kernel
    cuts = [max(k // 2 - (n - 1), 0) for n, k in zip(linear_map.size, linear_map.sides, strict=True)]
    return kernel[tuple(slice(cut, k - cut) for cut, k in zip(cuts, linear_map.sides, strict=True))]


def _canonical(linear_map: LinearMap, kernel: Array | np.ndarray) -> tuple[tuple[int, ...], Array | np.ndarray, bool]:
    """Size, kernel [*sides, c, c'] with c <= c', and whether it is periodic, of a convolution of the same norm: facts 1
    and 2.
    """
    kernel = _reaching_taps(linear_map, kernel)
    size = tuple(1 if k == 1 else n for n, k in zip(_size(linear_map), kernel.shape, strict=False))
    kernel = kernel if kernel.shape[-2] <= kernel.shape[-1] else reflected_kernel(kernel)
    return size, kernel, _is_periodic(linear_map)


def _spectral_bound(linear_map: LinearMap, kernel: np.ndarray) -> float:
    """`spectral_norm_bound` of a kernel from `_scaled`."""
    size, kernel, periodic = _canonical(linear_map, kernel)
    has_one_tap = math.prod(kernel.shape[:-2]) == 1
    if has_one_tap or (math.prod(size) * kernel.shape[-2] <= _EXACT_SIDE and not periodic):
        largest = _exact_gram_norm(size, kernel)
    else:
        largest = min(_torus_gram_norms(size, kernel, periodic))
    return math.sqrt(largest) * (1 + 4 * _EPSILON)


def _largest_eigenvalues(gram: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Upper bounds of the largest eigenvalues of exact Gram matrices that were computed as `gram` [..., m, m].

    1. An entry of A^* A is a sum of n <= taps (c' + 2^axes) products of entries of K (and waves), computed to within
       gamma_n |A|^* |A| (Higham 2002, section 3.5). |A| has the taps |K[t]|, so that
       | |A|^* |A| |_2 <= (sum_t |K[t]|_F)^2 <= taps |K|_F^2. 8 epsilon = 16 u in place of u leave room for the
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
    """For each torus of `_torus_sizes` the least |C^* C|_2 of its kinds, from K^ K^*(w) = sum_l exp(i w.l) lags[l]."""
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
    """The tori of facts 3 and 4, smallest first. An axis with one tap has one frequency."""
    if periodic:
        return [size]
    axes = [range(n + k // 2, n + 2 * (k // 2) + 1) if k > 1 else [1] for n, k in zip(size, sides, strict=True)]
    tori = list(itertools.product(*axes))
    return tori if len(size) < 3 else tori[:1]


def _kinds(sides: tuple[int, ...], periodic: bool) -> list[int]:
    """Of how many kinds the torus may be along each axis: periodic, or also antiperiodic, unless it has one tap."""
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
    """(frequencies, tori): w / 2 pi, [F, axes], and which of them make up each kind of torus, [kinds, pixels].

    The periodic and the antiperiodic grid of an axis are the even and the odd members of the grid of 2 N frequencies.
    A real kernel has |K^(-w)| = |K^(w)|, so F counts half of them.
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
    """exp(i w.t) [F, taps] for offsets t from the centre of an array with these sides."""
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
    """Absolute values, rounded up, of what the kernel is at the pixels around one of them, for every such one."""
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
