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
    """x [..., features_in] -> x @ kernel * min(1, coefficient / sigma) + bias [..., features_out].

    The bound holds for the last axis, and so for the whole where `domain` <= `codomain`. Initial values, norms and
    their cost are those of `LipschitzLinear`; call `update_norm()` after any change of the kernel.

    Example:
      layer = LipschitzDense(64, 32, 0.9, rngs=nnx.Rngs(0))
      y = layer(jnp.ones((8, 10, 64)))      # [8, 10, 32]
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
          features_out: size of the last axis of what comes out.
          coefficient: bound on the norm from the order `domain` to the order `codomain`, in (0, 1).
          rngs: `rngs.params` draws kernel, bias and v.
          domain: order of the norm of x, at least 1.
          codomain: order of the norm of what comes out, at least 1.
          matmul_dtype: of the factors of products: None (that of x and kernel) or "bfloat16".

        Raises:
          ValueError: for an argument outside of these, and when called for an x of another last axis.
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
    """x [B, *size, channels_in] -> convolve(x, kernel) * min(1, coefficient / sigma) + bias [B, *size, channels_out].

    In one, two or three dimensions, with zeros beyond the ends of the grid or, with `padding="periodic"`, the grid
    again: the layer then commutes with shifts of the grid, as a lattice asks for. Initial values, norms and their cost
    are those of `LipschitzLinear`; call `update_norm()` after any change of the kernel.

    Example:
      layer = LipschitzConv((8, 8), 1, 16, padding="periodic", rngs=nnx.Rngs(0))
      y = layer(jnp.ones((4, 8, 8, 1)))     # [4, 8, 8, 16]
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
          size: of the grid, a tuple of one to three sides.
          channels_in: number of channels of x.
          channels_out: number of channels of what comes out.
          kernel_size: odd side of the kernel on every axis, or a tuple of them; it may exceed the grid's.
          coefficient: bound on the norm from the order `domain` to the order `codomain`, in (0, 1).
          padding: "zero" or "periodic".
          rngs: `rngs.params` draws kernel, bias and v.
          domain: order of the norm of x, at least 1.
          codomain: order of the norm of what comes out, at least 1.
          matmul_dtype: of the factors of products: None (that of x and kernel) or "bfloat16".

        Raises:
          ValueError: for an argument outside of these, and when called for an x of another shape.
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
