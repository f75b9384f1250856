"""The affine layers that users compose: `LipschitzDense` and `LipschitzConv`, each a `LipschitzLinear` of its map.

    h(x) = W x * min(1, c / sigma) + b

sigma is u^T W v from the power iteration of the operator itself, for a periodic convolution too. Its norm has a closed
form there, the largest singular value of the kernel's discrete Fourier transform over all frequencies, but that takes
a singular value decomposition of a matrix [channels_in, channels_out] for every frequency at every application, against
one product W v here. `spectral_norm_bound` computes it once, on the host, for certificates and for `tighten`.
"""

from flax import nnx

from resflow_jax.functional.linear_maps import ConvMap, DenseMap
from resflow_jax.layers.lipschitz import LipschitzLinear, Order


class LipschitzDense(LipschitzLinear):
    """Dense layer of bounded norm: y = x @ kernel * min(1, coefficient / sigma) + bias, [..., features_in] -> [...,
    features_out].

    The bound holds on the last axis, and for a whole event if `domain` <= `codomain`. Kernel and bias start from
    U(-1/sqrt(features_in), 1/sqrt(features_in)), and sigma is iterated to convergence. After any change of the kernel,
    the caller must run `update_norm()`.

    Args: see `__init__`.

    Randomness: `rngs` only. Cost: one matrix product, and one product with the vector v for sigma.

    Raises:
      ValueError: for arguments outside their ranges, and when called for an x of another last axis.

    Source: Miyato et al. (2018, arXiv 1802.05957) normalise always; Behrmann et al. (2019, arXiv 1811.00995) only where
    sigma exceeds the coefficient, as here.

    Example:
      >>> layer = rf.LipschitzDense(4, 3, 0.9, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 5, 4))).shape
      (2, 5, 3)
      >>> kernel, _ = layer.weights()
      >>> bool(jnp.linalg.norm(kernel, 2) <= 0.9 * 1.01)
      True
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        coefficient: float = 0.98,
        *,
        rngs: nnx.Rngs,
        domain: Order = 2.0,
        codomain: Order = 2.0,
        matmul_dtype: str | None = None,
    ):
        """Makes kernel, bias and the vectors of the norm.

        Args:
          features_in: size of the last axis of x.
          features_out: size of the last axis of y.
          coefficient: bound on the norm from the order `domain` to the order `codomain`, in (0, 1).
          rngs: `rngs.params` draws kernel, bias and v.
          domain: order of the norm of x, at least 1.
          codomain: order of the norm of y, at least 1.
          matmul_dtype: dtype that the factors of products are rounded to: None (no rounding) or "bfloat16".

        Raises:
          ValueError: for an argument outside these ranges.
        """
        linear_map = DenseMap(features_in, features_out, matmul_dtype)
        super().__init__(linear_map, coefficient, domain=domain, codomain=codomain, rngs=rngs)

    @property
    def features_in(self) -> int:
        return self.linear_map.features_in

    @property
    def features_out(self) -> int:
        return self.linear_map.features_out

    @property
    def matmul_dtype(self) -> str | None:
        return self.linear_map.matmul_dtype


class LipschitzConv(LipschitzLinear):
    """Convolution of bounded norm: y = convolve(x, kernel) * min(1, coefficient / sigma) + bias.

    x [B, *size, channels_in] is mapped to y [B, *size, channels_out], in one, two or three dimensions. Beyond the edges
    of the grid x is zero or, with `padding="periodic"`, repeats; the layer then commutes with shifts of the grid, as
    for a lattice. Kernel and bias start from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), and sigma, the norm of the whole
    convolution, is iterated to convergence. After any change of the kernel, the caller must run `update_norm()`.

    Args: see `__init__`.

    Randomness: `rngs` only. Cost: one convolution of x, and one of the single example v for sigma.

    Raises:
      ValueError: for arguments outside their ranges, and when called for an x of another shape.

    Source: Behrmann et al. (2019, arXiv 1811.00995); the power iteration of a convolution as in Gouk et al. (2018,
    arXiv 1804.04368).

    Example:
      >>> layer = rf.LipschitzConv((4, 4), 1, 2, padding="periodic", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((3, 4, 4, 1))).shape
      (3, 4, 4, 2)
    """

    def __init__(
        self,
        size: tuple[int, ...],
        channels_in: int,
        channels_out: int,
        kernel_size: int | tuple[int, ...] = 3,
        coefficient: float = 0.98,
        *,
        padding: str = "zero",
        rngs: nnx.Rngs,
        domain: Order = 2.0,
        codomain: Order = 2.0,
        matmul_dtype: str | None = None,
    ):
        """Makes kernel, bias and the vectors of the norm.

        Args:
          size: size of the grid, a tuple of one to three sides.
          channels_in: number of channels of x.
          channels_out: number of channels of y.
          kernel_size: odd side of the kernel on every axis, or a tuple of them; it may exceed the grid's.
          coefficient: bound on the norm from the order `domain` to the order `codomain`, in (0, 1).
          padding: "zero" or "periodic".
          rngs: `rngs.params` draws kernel, bias and v.
          domain: order of the norm of x, at least 1.
          codomain: order of the norm of y, at least 1.
          matmul_dtype: dtype that the factors of products are rounded to: None (no rounding) or "bfloat16".

        Raises:
          ValueError: for an argument outside these ranges.
        """
        linear_map = ConvMap(size, channels_in, channels_out, kernel_size, padding, matmul_dtype)
        super().__init__(linear_map, coefficient, domain=domain, codomain=codomain, rngs=rngs)

    @property
    def size(self) -> tuple[int, ...]:
        return self.linear_map.size

    @property
    def channels_in(self) -> int:
        return self.linear_map.channels_in

    @property
    def channels_out(self) -> int:
        return self.linear_map.channels_out

    @property
    def kernel_size(self) -> int | tuple[int, ...]:
        return self.linear_map.kernel_size

    @property
    def padding(self) -> str:
        return self.linear_map.padding

    @property
    def matmul_dtype(self) -> str | None:
        return self.linear_map.matmul_dtype
